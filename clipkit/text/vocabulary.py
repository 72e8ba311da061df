"""Which tokenizer a model has, and the file with its vocabulary."""

import hashlib
from pathlib import Path

from clipkit.embedded import bert_vocabulary
from clipkit.errors import UserError
from clipkit.text.sentence_piece import SentencePiece
from clipkit.text.tokenizer import Tokenizer, WordTokenizer
from clipkit.text.wordpiece import WordPiece


def open_tokenizer(name: str, vocabulary: Path | None = None) -> WordTokenizer:
    """The tokenizer that `model.text.tokenizer` names, with the vocabulary of a file.

    `clip-bpe` takes no file, `wordpiece` has that of bert-base-uncased, which CLIPA-v2's models have, where none is
    given, and `sentencepiece` needs one. Raises UserError otherwise, and for a file of another kind.
    """
    match name:
        case "clip-bpe" if vocabulary is not None:
            raise UserError(
                f"the tokenizer clip-bpe takes no vocabulary: leave out --tokenizer {vocabulary}, or set "
                "model.text.tokenizer to wordpiece or sentencepiece"
            )
        case "clip-bpe":
            return Tokenizer()
        case "wordpiece":
            return WordPiece(vocabulary or bert_vocabulary())
        case "sentencepiece" if vocabulary is not None:
            return SentencePiece(vocabulary)
        case "sentencepiece":
            raise UserError(
                "the tokenizer sentencepiece has no vocabulary of its own: give its file with --tokenizer; "
                "docs/training.md says where SigLIP's is"
            )
    raise UserError(f"unknown tokenizer {name!r}: choose clip-bpe, wordpiece or sentencepiece")


def vocabulary_hash(tokenizer: WordTokenizer) -> str | None:
    """The SHA-256 of the tokenizer's file; None where it has none."""
    return None if tokenizer.vocabulary is None else hashlib.sha256(tokenizer.vocabulary).hexdigest()
