"""What a trainer would else make of each caption again and again, made once when the dataset is built.

`tokens` is a list of ints: what `clipkit.text.tokenizer.Tokenizer.encode` gives, so without start and end and not cut.
`syntax` is a list of ints, one for each token: what `clipkit.text.syntax.Syntax.priorities` gives for them (0 noun, 1
adjective, 2 verb, 3 other). The two are the arguments `ids` and `priorities` of `clipkit.text.tokens.reduce_text`.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from clipkit.errors import UserError
from clipkit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.text.syntax import Syntax

TOKENS, SYNTAX = "tokens", "syntax"
PRECOMPUTED = (TOKENS, SYNTAX)


def check_precompute(wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted columns in their order. Raises UserError for others, and when the tagger isn't installed."""
    for name in wanted:
        if name not in PRECOMPUTED:
            raise UserError(f"can't precompute {name!r}: choose among {', '.join(PRECOMPUTED)}")
    if SYNTAX in wanted:
        from clipkit.text.syntax import load_tagger

        load_tagger()
    return tuple(name for name in PRECOMPUTED if name in wanted)


def precompute(wanted: Sequence[str], captions: Sequence[str]) -> list[dict[str, list[int]]]:
    """The wanted columns of each caption."""
    if not wanted:
        return [{} for _ in captions]
    columns = {TOKENS: tokenizer().encode(captions)}
    if SYNTAX in wanted:
        columns[SYNTAX] = syntax().priorities(columns[TOKENS])
    return [{name: columns[name][i] for name in wanted} for i in range(len(captions))]


@cache
def tokenizer() -> Tokenizer:
    """One a process: it takes a third of a second to build, and a worker makes many shards."""
    return Tokenizer()


@cache
def syntax() -> "Syntax":
    """One a process: its memory of tagged words makes it a hundred times as fast."""
    from clipkit.text.syntax import Syntax

    return Syntax(tokenizer())
