"""The concepts by which `--balance` thins captions out: their list, and which of them a caption has.

The way is MetaCLIP's (Xu et al., "Demystifying CLIP Data", ICLR 2024): a caption has a concept where it holds it as a
substring between spaces, in the same letters (`The` isn't `the`), once punctuation has been set apart by spaces. Here
that is done to the concepts too, so that `St. Louis` can be found, and runs of white space count as one space.

Such a substring is a row of whole words. So no automaton over letters is needed (Aho-Corasick, as MetaCLIP has it): a
table of all concepts and of all their beginnings is asked, from each word of a caption on, word after word. Half a
million concepts take some 0.1 GB and a second to set up.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from clipkit.embedded import bert_vocabulary, imagenet_classes
from clipkit.errors import UserError
from clipkit.formatting import counted
from clipkit.storage.files import as_path, read_json, require_file
from clipkit.storage.stores import reading

BUILTIN = "builtin"
SET_APART = ",.;:?!`"
SHORTEST_WORD = 3  # letters, in the built-in list


@dataclass(frozen=True)
class ConceptList:
    """Concepts as captions are compared with them, each once; `note` says what else the list held."""

    name: str
    texts: tuple[str, ...]
    note: str = ""

    @property
    def sha256(self) -> str:
        """Of all texts in their order."""
        return hashlib.sha256("\n".join(self.texts).encode("utf-8", "replace")).hexdigest()


def read_concepts(source: str) -> ConceptList:
    """The list in a file (a concept a line, or a JSON list of them), or the built-in one.

    Raises UserError for a file that is missing, isn't UTF-8 or JSON, or names nothing.
    """
    if source == BUILTIN:
        return ConceptList(BUILTIN, builtin_concepts())
    path = require_file(as_path(source), "list of concepts")
    try:
        with reading(path):
            text = path.read_bytes().decode("utf-8-sig")
        lines = json.loads(text) if path.suffix == ".json" else text.removesuffix("\n").split("\n")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--balance {path} can't be read ({error}): give UTF-8, a concept a line") from error
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"--balance {path} isn't a list of texts: give a JSON list, or a text file, a concept a line")
    concepts = [spaced(line) for line in lines]
    texts = tuple(dict.fromkeys(filter(None, concepts)))
    empty = concepts.count("")
    if not texts:
        raise UserError(f"--balance {path} holds no concept: give one a line")
    found = {"repeated concept": len(concepts) - empty - len(texts), "empty line": empty}
    others = " and ".join(counted(count, what) for what, count in found.items() if count)
    return ConceptList(path.name, texts, f"{path}: {others} left out" if others else "")


def builtin_concepts() -> tuple[str, ...]:
    """ImageNet's class names and BERT's English words, both with a small and a capital first letter.

    These are about 44,000: what the package has and may pass on. MetaCLIP's own half a million mustn't be (CC BY-NC).
    """
    words = bert_vocabulary().read_text(encoding="utf-8").split("\n")
    names = [spaced(each["name"]) for each in imagenet_classes()]
    words = [word for word in words if len(word) >= SHORTEST_WORD and word.isascii() and word.isalpha()]
    found = [*names, *(name.lower() for name in names), *words]
    return tuple(dict.fromkeys(form for text in found for form in (text, text[0].upper() + text[1:])))


def spaced(text: str) -> str:
    """A text with its punctuation set apart, single spaces, and none at the ends."""
    for mark in SET_APART:
        if mark in text:
            text = text.replace(mark, f" {mark} ")
    return " ".join(text.split())


class Matcher:
    """Finds the concepts of captions."""

    def __init__(self, concepts: Sequence[str]) -> None:
        """`concepts` are `spaced`, and each is there once."""
        self._numbers: dict[str, int] = {}  # of concepts; -1 for what is only the beginning of one
        for concept in concepts:
            for beginning in accumulate(concept.split(" ")[:-1], lambda one, other: f"{one} {other}"):
                self._numbers[beginning] = -1
        self._numbers.update(zip(concepts, range(len(concepts)), strict=True))

    def matches(self, caption: str) -> list[int]:
        """The numbers of the concepts that a caption has, rising, each once."""
        words = spaced(caption).split(" ")
        numbers, found = self._numbers, set()
        for end, word in enumerate(words, 1):
            text = word
            while (number := numbers.get(text)) is not None:
                if number >= 0:
                    found.add(number)
                if end == len(words):
                    break
                text = f"{text} {words[end]}"
                end += 1
        return sorted(found)


@lru_cache(maxsize=1)
def load_matcher(path: Path, sha256: str) -> Matcher:
    """The matcher of the concepts that are kept in `path`: one a process, which works on many stretches."""
    return Matcher(read_json(path))


def hashes(texts: Iterable[str]) -> list[int]:
    """64 bits of each text, the same everywhere."""
    return [
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        for text in texts
    ]
