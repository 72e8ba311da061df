"""Ids equal OpenCLIP's on captions of every nasty kind; the cleaning's short cut changes nothing."""

import html
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_captions import varied_captions

from clipkit.errors import UserError
from clipkit.text import tokenizer as tokenizer_module
from clipkit.text.tokenizer import EOT, MERGES_FILE, SOT, STRAIGHT, UNTOUCHED, VOCAB_SIZE, Tokenizer, clean


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def peer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def test_ids_equal_openclip(tokenizer: Tokenizer, peer) -> None:
    captions = varied_captions(int(os.environ.get("CLIPKIT_TOKENIZER_CAPTIONS", "12000")), seed=0)
    for caption, ids in zip(captions, tokenizer.encode(captions), strict=True):
        assert ids == peer.encode(caption), repr(caption)


@pytest.mark.parametrize("context_length", [8, 16, 77])
def test_padding_and_truncation_equal_openclip(tokenizer: Tokenizer, peer, context_length: int) -> None:
    captions = varied_captions(300, seed=1)
    ids_BT = tokenizer(captions, context_length)
    assert ids_BT.dtype == np.int32
    np.testing.assert_array_equal(ids_BT, peer(captions, context_length).numpy())
    long = tokenizer("cat " * 200, context_length)[0]
    assert (long[0], long[-1]) == (SOT, EOT)


@given(
    st.text(st.characters(max_codepoint=0x7F) | st.sampled_from("&;#<>'’é \xa0\x85ſ"))
    | st.text(st.sampled_from("‘’“”–—…& \n-<'aZ0;"))
    | st.lists(st.sampled_from(["’", "”", "…", "–", "&", " ", "quot;", "lt", "Ã", "â", "€", "a", "\n"])).map("".join)
    | st.text(st.sampled_from("àéÉñößÀÃÂÎÐØÙ‘’“”–…&;® ²€°ab.'1"))
)
@settings(max_examples=1000, deadline=None)
def test_the_short_cut_of_cleaning_changes_nothing(text: str) -> None:
    plain = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    assert clean(text) == " ".join(plain.split()).strip().lower()


def test_no_short_run_of_typography_is_taken_for_mojibake() -> None:
    """The patterns of ftfy are at most so long; that it leaves these alone is what the short cut rests on."""
    for length in (1, 2, 3):
        for characters in itertools.product("‘’“”–—…&aZ0 .'éÉà", repeat=length):
            text = "".join(characters)
            if UNTOUCHED.fullmatch(text):
                assert ftfy.fix_text(text) == text.translate(STRAIGHT), repr(text)


def test_every_letter_with_an_accent_is_left_alone_in_a_word() -> None:
    """With each printable character of ASCII on either side of it."""
    letters = [character for character in map(chr, range(0xC0, 0x17F)) if UNTOUCHED.fullmatch(character)]
    assert {"é", "É", "ü", "ß"} < set(letters)
    assert not {"Ã", "Â", "×", "÷", "œ"} & set(letters)
    for letter in letters:
        for one, other in itertools.product(map(chr, range(32, 127)), "aZ 0'-&"):
            for text in (f"{one}{letter}{other}", f"{other}{letter}{one}", f"ca{other} {letter} {one}fe"):
                if UNTOUCHED.fullmatch(text):
                    assert ftfy.fix_text(text) == text


def test_words_that_are_kept_have_the_ids_they_have_in_a_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads share a memory that is full again and again."""
    captions = [clean(caption) for caption in varied_captions(600, seed=2)]
    tokenizer = Tokenizer()
    known = len(tokenizer.cache)
    monkeypatch.setattr(tokenizer_module, "CACHE_WORDS", known + 50)
    expected = tokenizer.encode_words(captions)  # whole, by the library
    most: list[int] = []

    def encode(_: int) -> list[list[int]]:
        rows = []
        for start in range(0, len(captions), 20):
            rows += tokenizer.encode_cleaned(captions[start : start + 20])
            most.append(len(tokenizer.cache) - known)
        return rows

    with ThreadPoolExecutor(3) as pool:
        for rows in pool.map(encode, range(3)):
            assert rows == expected
    assert max(most) < 2000 < sum(most)
    assert max(map(len, tokenizer.cache)) <= tokenizer_module.CACHE_LENGTH


def test_words_that_are_known_from_the_start_have_the_ids_that_the_library_gives() -> None:
    """All of them: a token's own letters might be merged another way before they come to it."""
    tokenizer = Tokenizer()
    words = list(tokenizer.cache)
    assert len(words) > 30_000
    assert tokenizer.encode_words(words) == list(tokenizer.cache.values())


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.model.token_to_id("<end_of_text>") == EOT == VOCAB_SIZE - 1
    assert tokenizer("", 4).tolist() == [[SOT, EOT, 0, 0]]
    assert tokenizer([], 4).shape == (0, 4)


def test_foreign_merges_are_refused(tmp_path) -> None:
    broken = tmp_path / "merges.txt.gz"
    broken.write_bytes(MERGES_FILE.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"merges\.txt\.gz"):
        Tokenizer(broken)
