"""Which caption of a record a sample gets, and which sentence of a long one: pure functions of the sample's key.

A record's captions are of sources (`original`, `synthetic`, …; see `clipkit.formats.captions`), and a recipe may give
each source a weight. First a source is drawn, by the weights of those that the record has captions of; then one of
its captions, each as likely as another.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from clipkit.counter_rng import Float64Array, UInt64Array, uniform
from clipkit.formats.captions import ORIGINAL
from clipkit.train.sources.source import Pair

DRAWN_CAPTION, DRAWN_SENTENCE = 905, 908  # streams of random numbers

Clean = Callable[[str], str]

# Behind the signs that end a sentence, and quotes or brackets that close with it, stands a space; not so in Chinese and
# Japanese. An abbreviation ("St. Louis") is cut too: who looks for fewer words than fit doesn't mind.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|(?<=[。！？])")
# No tokenizer's cleaning leaves nothing of printable text without entities that has one of these.
WORD = re.compile("[0-9A-Za-z]")


class Text(NamedTuple):
    """A cleaned caption, and its token ids and their priorities where the record holds them."""

    caption: str
    ids: list[int] | None = None
    priorities: list[int] | None = None
    number: int = 0
    """The caption's place among all those of the record (`Pair.captions`)."""
    choices: "tuple[Choice, ...]" = ()
    """Where there are several, those of which one is drawn for each sample; `caption` says nothing then."""
    raw: str = ""
    """The caption as it was found."""


class Choice(NamedTuple):
    """The captions of one source that aren't blank, with their numbers."""

    weight: float
    captions: Sequence[tuple[int, str]]


def used_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights above 0 of a recipe; `original` alone where it gives none."""
    return {source: weight for source, weight in weights.items() if weight > 0} or {ORIGINAL: 1.0}


def text_of(pair: Pair, weights: Mapping[str, float], clean: Clean) -> Text | None:
    """What a sample may be told of a record; None where it has no caption of these sources."""
    is_single = isinstance(pair.caption, str)
    first = (pair.caption,) if isinstance(pair.caption, str) else pair.caption
    if is_single and not pair.added and ORIGINAL in weights:  # nearly every record
        caption = clean(first[0])
        return Text(caption, pair.ids, pair.priorities, raw=first[0]) if caption else None
    choices, number = [], 0
    for source, captions in ((ORIGINAL, first), *(pair.added or {}).items()):
        if source in weights:
            numbered = [(number + place, raw) for place, raw in enumerate(captions) if says_something(raw, clean)]
            if numbered:
                choices.append(Choice(weights[source], numbered))
        number += len(captions)
    if not choices:
        return None
    ids, priorities = (pair.ids, pair.priorities) if is_single else (None, None)
    text = Text("", ids, priorities, choices=tuple(choices))
    return text if len(choices) > 1 or len(choices[0].captions) > 1 else draw_caption(text, (0.0, 0.0), clean)


def says_something(raw: str, clean: Clean) -> bool:
    """Whether anything is left of a caption that is cleaned."""
    return ("&" not in raw and raw.isprintable() and WORD.search(raw) is not None) or clean(raw) != ""


def caption_draws(keys_B: UInt64Array) -> Float64Array:
    """float64[B, 2] in [0, 1): what each sample draws its caption by."""
    return uniform(keys_B, 2, DRAWN_CAPTION)


def draw_caption(text: Text, draws: Sequence[float], clean: Clean) -> Text:
    """One of several captions. Which one of its source is by the first of the draws, which source by the second."""
    if not text.choices:
        return text
    place = draws[1] * sum([choice.weight for choice in text.choices])
    for choice in text.choices:
        if place < choice.weight:
            break
        place -= choice.weight
    number, raw = choice.captions[int(draws[0] * len(choice.captions))]
    if number:
        return Text(clean(raw), number=number, raw=raw)
    return Text(clean(raw), text.ids, text.priorities, raw=raw)


def drawn_captions(
    pairs: Sequence[Pair | None], keys_B: UInt64Array, weights: Mapping[str, float], clean: Clean
) -> list[str]:
    """The caption that each sample got of its record's, as it was found; "" where there is none."""
    texts = [text_of(pair, weights, clean) if pair is not None else None for pair in pairs]
    draws = caption_draws(keys_B).tolist()
    return [draw_caption(text, draw, clean).raw if text else "" for text, draw in zip(texts, draws, strict=True)]


def sentence_draws(keys_B: UInt64Array) -> Float64Array:
    """float64[B] in [0, 1): what each sample draws a sentence by."""
    return uniform(keys_B, 1, DRAWN_SENTENCE)[:, 0]


def draw_sentence(raw: str, draw: float, clean: Clean) -> str:
    """One of a caption's sentences, cleaned."""
    found = [each for each in SENTENCE_END.split(raw) if any(map(str.isalnum, each)) and says_something(each, clean)]
    return clean(found[int(draw * len(found))] if found else raw)
