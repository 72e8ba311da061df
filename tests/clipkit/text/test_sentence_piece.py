"""Ids equal those of another implementation of the same model file, cleaning that of OpenCLIP."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from nasty_captions import varied_captions
from open_clip.tokenizer import _clean_canonicalize
from tokenizers import models, pre_tokenizers
from vocabularies import write_sentencepiece

from clipkit.errors import UserError
from clipkit.text.sentence_piece import SPACE, SentencePiece, canonicalize
from clipkit.text.syntax import NOUN, OTHER, Syntax
from clipkit.text.tokens import reduce_text
from clipkit.text.vocabulary import open_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePiece:
    return SentencePiece(write_sentencepiece(tmp_path_factory.mktemp("siglip") / "spiece.model"))


@pytest.fixture(scope="module")
def peer(tokenizer: SentencePiece) -> tokenizers.Tokenizer:
    """The same pieces in the Rust library, which is what transformers runs."""
    pieces = [(tokenizer.pieces[index], tokenizer.model.get_score(index)) for index in range(tokenizer.vocab_size)]
    peer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    peer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    return peer


@given(
    text=st.text(st.sampled_from("a photo_of TWO red-cats, .ing!01") | st.characters(max_codepoint=255), max_size=40)
)
def test_ids_equal_another_implementations(tokenizer: SentencePiece, peer: tokenizers.Tokenizer, text: str) -> None:
    cleaned = tokenizer.model.normalize(canonicalize(text)).replace(SPACE, " ").strip()
    assert tokenizer.encode([text]) == [peer.encode(cleaned).ids]


def test_cleaning_is_openclips() -> None:
    for caption in varied_captions(500, seed=5):
        assert canonicalize(caption) == _clean_canonicalize(caption), repr(caption)


def test_rows_are_siglips(tokenizer: SentencePiece) -> None:
    """Ids, the end id, which stays when a caption is cut, and more of it as padding."""
    ids = tokenizer.encode(["A photo of: a_red CAT!"])[0]
    rows = tokenizer(["a photo of a red cat", "a photo of a red cat " * 9, ""], len(ids) + 3)
    assert rows[0].tolist() == [*ids, 1, 1, 1]
    assert rows[1, : len(ids)].tolist() == ids and rows[1, -1] == 1 and 1 not in rows[1, :-1]
    assert rows[2].tolist() == [1] * len(rows[2])
    cut = reduce_text("truncate", [ids], 5, np.zeros(1, np.uint64), start=None, end=tokenizer.end, pad_id=tokenizer.pad)
    np.testing.assert_array_equal(cut, tokenizer(["a photo of a red cat"], 5))


def test_syntax_keeps_whole_words(tokenizer: SentencePiece) -> None:
    asked: list[str] = []
    tagged = Syntax(tokenizer, lambda word: asked.append(word) or (NOUN if word == "cats" else OTHER))
    ids = tokenizer.encode(["the red cats", ""])
    (row, empty) = tagged.priorities(ids)
    assert asked == ["the", "red", "cats"] and empty == []
    assert len(row) == len(ids[0]) and row.count(NOUN) == len(tokenizer.encode(["cats"])[0])


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "no.model").write_bytes(b"[PAD]\n[UNK]")
    with pytest.raises(UserError, match=r"can't read the vocabulary .*no\.model .*: give a SentencePiece model"):
        open_tokenizer("sentencepiece", tmp_path / "no.model")
    with pytest.raises(UserError, match="can't read the vocabulary"):
        open_tokenizer("sentencepiece", tmp_path / "none.model")
    with pytest.raises(UserError, match="ends captions with the id 0, SigLIP's with 1"):
        open_tokenizer("sentencepiece", write_sentencepiece(tmp_path / "other.model", eos_id=0))
    with pytest.raises(UserError, match="no vocabulary of its own: give its file with --tokenizer"):
        open_tokenizer("sentencepiece")
