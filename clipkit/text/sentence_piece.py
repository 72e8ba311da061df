"""SentencePiece with a model file that the user gives: the tokenizer of SigLIP.

Captions are cleaned as CLIP's, then lose case and ASCII punctuation (`canonicalize` of big_vision); the pieces are
those of Google's own library (Kudo & Richardson, 2018). The rows are SigLIP's: ids, the end id, which is 1, and more of
it as padding; SigLIP 2's are padded with 0.
"""

import string
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from clipkit.errors import UserError, one_line
from clipkit.text.tokenizer import WordTokenizer, tidy

END = 1
SPACE = "▁"
CANONICAL = str.maketrans({"_": " ", **dict.fromkeys(string.punctuation.replace("_", ""))})


def canonicalize(text: str) -> str:
    """A caption tidy, in lower case and without ASCII punctuation; an underscore becomes a space."""
    return " ".join(tidy(text).translate(CANONICAL).lower().split())


class SentencePiece(WordTokenizer):
    """Captions to the ids of a SentencePiece model, such as T5's of 32,000 pieces for English."""

    name = "sentencepiece"
    start, end = None, END
    clean = staticmethod(canonicalize)

    def __init__(self, path: Path, pad: int = END) -> None:
        self.pad = pad
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise UserError('the tokenizer sentencepiece needs its package: pip install "clipkit[siglip]"') from error
        try:
            self.vocabulary = path.read_bytes()
            self.model = SentencePieceProcessor(model_proto=self.vocabulary)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"can't read the vocabulary {path} ({one_line(error)}): give a SentencePiece model, as SigLIP's is"
            ) from error
        if self.model.eos_id() != END:
            raise UserError(
                f"the vocabulary {path} ends captions with the id {self.model.eos_id()}, SigLIP's with {END}: "
                "give SigLIP's, or train one with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1"
            )
        self.vocab_size = self.model.vocab_size()

    def encode_cleaned(self, cleaned: Sequence[str]) -> list[list[int]]:
        """The ids of captions that went through `clean` already; a caption is looked at as a whole."""
        ids: list[list[int]] = self.model.encode(list(cleaned), num_threads=1)
        return ids

    @cached_property
    def pieces(self) -> list[str]:
        """The text of each id, as the vocabulary writes it."""
        return [self.model.id_to_piece(index) for index in range(self.vocab_size)]

    @cached_property
    def begins_word(self) -> list[bool]:
        """Whether a word begins with each id."""
        return [piece.startswith(SPACE) for piece in self.pieces]

    def split_words(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The ids of one caption, as `encode` gives them, word by word."""
        starts = [place for place, token in enumerate(ids) if self.begins_word[token] or place == 0]
        stops = [*starts[1:], len(ids)][: len(starts)]
        return [tuple(ids[start:stop]) for start, stop in zip(starts, stops, strict=True)]

    def spell(self, ids: Sequence[int]) -> str:
        """The word that these ids stand for."""
        return "".join(self.pieces[token] for token in ids).replace(SPACE, "")
