"""What the captions of a sample are like, and what each way to shorten them keeps.

All ways keep the same number of tokens; which ones is the difference. So their nouns are counted too: a caption without
its nouns says little about its picture.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
from tokenizers import decoders

from clipkit.errors import UserError
from clipkit.text.syntax import ADJECTIVE, NOUN, VERB, Syntax
from clipkit.text.tokenizer import SPECIAL, Tokenizer, clean
from clipkit.text.tokens import TextMethod, reduce_text
from clipkit.tfrecord_tools.inspection.histogram import Histogram, histogram_of

CONTEXTS = (8, 16, 32)
# Which sentence is drawn isn't seen from ids: `sentence` would look like `truncate` here.
METHODS: tuple[TextMethod, ...] = tuple(method for method in get_args(TextMethod) if method != "sentence")
REDUCED = 2000
FREQUENT = 10
EXAMPLES = 3


@dataclass(frozen=True)
class Reduction:
    """What one way keeps at `context_length` tokens, start and end included: shares of all tokens but these two.

    `whole` is the share of captions that lose nothing. Shares of a word class are None where no tagger is installed.
    """

    method: TextMethod
    context_length: int
    kept: float
    whole: float
    nouns: float | None
    adjectives: float | None
    verbs: float | None


@dataclass(frozen=True)
class Example:
    """One caption in pieces, and for each way and length which of them are kept: (method, length) to bool[pieces]."""

    pieces: tuple[str, ...]
    kept: dict[tuple[TextMethod, int], tuple[bool, ...]]


@dataclass(frozen=True)
class CaptionFacts:
    """Captions of `read` records. Tokens count start and end. `repeated` are those whose text, cleaned, comes again.

    `reduced` captions were shortened; `note` says which way is missing and why.
    """

    column: str
    read: int
    empty: int
    repeated: int
    words: Histogram | None
    tokens: Histogram | None
    frequent: tuple[tuple[str, int], ...]
    reduced: int
    reductions: tuple[Reduction, ...]
    note: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class SourceFacts:
    """The captions of one source: `captions` in all, of `records` that have any."""

    source: str
    records: int
    captions: int
    tokens: Histogram | None
    examples: tuple[str, ...]


def source_facts(source: str, captions: Sequence[Sequence[str]]) -> SourceFacts:
    """Look at the captions that a source has for the records of a sample."""
    found = [text for texts in captions for text in texts]
    tokens = [len(each) + 2 for each in Tokenizer().encode(found)]
    return SourceFacts(
        source, sum(map(bool, captions)), len(found), histogram_of(tokens, whole=True), tuple(found[:EXAMPLES])
    )


def caption_facts(column: str, captions: Sequence[str], places: Sequence[int]) -> CaptionFacts:
    """Look at the captions of a sample; `places` are the numbers of their records, by which random ways choose."""
    tokenizer = Tokenizer()
    cleaned = [clean(caption) for caption in captions]
    ids = tokenizer.encode_cleaned(cleaned)
    counts = Counter(text for text in cleaned if text)
    first = dict(zip(reversed(cleaned), reversed(captions), strict=True))
    frequent = [(first[text], count) for text, count in counts.most_common(FREQUENT) if count > 1]
    note = ""
    methods: tuple[TextMethod, ...] = METHODS
    syntax: Syntax | None = None
    try:
        syntax = Syntax(tokenizer)
    except UserError as error:
        note = str(error)
        methods = tuple(method for method in METHODS if method != "syntax")
    filled = [number for number, each in enumerate(ids) if each][:REDUCED]
    some = [ids[number] for number in filled]
    keys = np.array([places[number] for number in filled], np.uint64)
    classes = syntax.priorities(some) if syntax and some else None
    kept = {
        (method, context): _kept(method, context, some, keys, classes)
        for context in CONTEXTS
        for method in methods
        if some
    }
    kinds = np.concatenate([np.array(row) for row in classes]) if classes is not None else None
    reductions = [_reduction(*way, masks, kinds) for way, masks in kept.items()]
    examples = [
        Example(
            pieces=tuple(pieces_of(tokenizer, some[number])),
            kept={way: tuple(masks[number].tolist()) for way, masks in kept.items()},
        )
        for number in _chosen(some)
    ]
    return CaptionFacts(
        column=column,
        read=len(captions),
        empty=sum(not text for text in cleaned),
        repeated=sum(count for count in counts.values() if count > 1),
        words=histogram_of([len(text.split()) for text in cleaned], whole=True),
        tokens=histogram_of([len(each) + 2 for each in ids], whole=True),
        frequent=tuple(frequent),
        reduced=len(some),
        reductions=tuple(reductions),
        note=note,
        examples=tuple(examples),
    )


def _chosen(ids: Sequence[Sequence[int]]) -> list[int]:
    """Captions to show: of middling length, of the longer ones, and one of the longest, unlike each other."""
    order = sorted(range(len(ids)), key=lambda number: (len(ids[number]), number))
    places = [order[round((len(order) - 1) * share)] for share in (0.5, 0.9, 0.98)] if order else []
    unlike = {tuple(ids[place]): place for place in places}
    return list(unlike.values())[:EXAMPLES]


def _kept(
    method: TextMethod,
    context: int,
    ids: Sequence[Sequence[int]],
    keys: npt.NDArray[np.uint64],
    classes: Sequence[Sequence[int]] | None,
) -> list[npt.NDArray[np.bool_]]:
    """Which tokens of each caption are kept: bool[tokens] each."""
    # Each token's place goes through in place of its id, and so comes out where it is kept; 0 is the padding.
    places = [list(range(1, len(each) + 1)) for each in ids]
    out_BT = reduce_text(method, places, context, keys, classes if method == "syntax" else None)
    masks = []
    for row, length in zip(out_BT, map(len, places), strict=True):
        mask = np.zeros(length, bool)
        mask[row[1 : min(length, context - 2) + 1] - 1] = True
        masks.append(mask)
    return masks


def _reduction(
    method: TextMethod, context: int, masks: Sequence[npt.NDArray[np.bool_]], kinds: npt.NDArray[np.int64] | None
) -> Reduction:
    """What a way keeps of all tokens; `kinds` are their word classes."""
    kept = np.concatenate(masks)

    def of(kind: int) -> float | None:
        return float(kept[kinds == kind].mean()) if kinds is not None and (kinds == kind).any() else None

    whole = sum(len(mask) <= context - 2 for mask in masks) / len(masks)
    return Reduction(method, context, float(kept.mean()), whole, of(NOUN), of(ADJECTIVE), of(VERB))


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[str]:
    """The text of each token, with a space behind the last of a word; a part of a character shows as a mark."""
    decoder = decoders.ByteLevel()
    for each in ids:
        piece = str(tokenizer.fast.id_to_token(each))
        text: str = decoder.decode([piece.removesuffix("</w>")])
        yield text + " " * (piece.endswith("</w>") or piece in SPECIAL)
