"""Small vocabulary files: what BERT's and SigLIP's are, for the captions of tests."""

import io
import string
from pathlib import Path

import sentencepiece

CAPTIONS = ["picture number 0 1 2 3 4 5 6 7 8 9", "a photo of a red cat", "the smiling faces of two running dogs"]


def write_wordpiece(path: Path, *words: str) -> Path:
    """A vocab.txt of letters, digits and some words."""
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{each}" for each in letters), "picture", *words]
    path.write_text("\n".join(pieces), encoding="utf-8")
    return path


def write_sentencepiece(path: Path, eos_id: int = 1) -> Path:
    """A model trained on a few captions, with the special ids of T5's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 3), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        pad_id=1 - eos_id, eos_id=eos_id, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path
