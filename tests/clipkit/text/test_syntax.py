"""Word classes of captions, matched to the tokenizer's ids."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import UserError
from clipkit.text import syntax
from clipkit.text.syntax import ADJECTIVE, NOUN, OTHER, VERB, Syntax, load_tagger
from clipkit.text.tokenizer import Tokenizer, clean
from clipkit.text.tokens import reduce_text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def tagged(tokenizer: Tokenizer) -> Syntax:
    return Syntax(tokenizer)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dog", NOUN),
        ("houses", NOUN),
        ("paris", NOUN),
        ("hdtv", NOUN),  # unknown to the tagger
        ("beautiful", ADJECTIVE),
        ("bigger", ADJECTIVE),
        ("red", ADJECTIVE),
        ("running", VERB),
        ("is", VERB),
        ("has", VERB),
        ("might", OTHER),
        ("the", OTHER),
        ("quickly", OTHER),
        ("with", OTHER),
        ("7", OTHER),
        (",", OTHER),
        ("'s", OTHER),
        ("😀", OTHER),
        pytest.param("a" * 100, NOUN, id="longer than any word"),
        pytest.param("ก" * 100_000, NOUN, id="a text without spaces"),
    ],
)
def test_classes_of_words(tagged: Syntax, word: str, expected: int) -> None:
    assert tagged.tagger(word) == expected


@given(texts=st.lists(st.text(max_size=40), max_size=4))
@settings(max_examples=80, deadline=None)
def test_one_priority_for_each_id(counted: tuple[Syntax, list[str]], tokenizer: Tokenizer, texts: list[str]) -> None:
    by_length, asked = counted
    asked.clear()
    ids = tokenizer.encode(texts)
    assert [len(row) for row in by_length.priorities(ids)] == [len(row) for row in ids]
    # The words read off the ids are those of the captions.
    assert all(any(word in clean(text) for text in texts) for word in asked)


@pytest.fixture(scope="module")
def counted(tokenizer: Tokenizer) -> tuple[Syntax, list[str]]:
    """A tagger that goes by length, and the words it was asked for."""
    asked: list[str] = []

    def by_length(word: str) -> int:
        asked.append(word)
        return len(word) % 4

    return Syntax(tokenizer, by_length), asked


def test_pieces_of_a_word_share_its_class(tokenizer: Tokenizer, tagged: Syntax) -> None:
    ids = tokenizer.encode(["the antidisestablishmentarianism sings"])
    assert len(ids[0]) > 4
    assert tagged.priorities(ids)[0] == [OTHER, *[NOUN] * (len(ids[0]) - 2), VERB]


def test_a_caption_keeps_its_nouns(tokenizer: Tokenizer, tagged: Syntax) -> None:
    ids = tokenizer.encode(["a photo of the happy brown dog that is running with a ball in the green park"])
    kept = [
        tokenizer.fast.decode(
            [token for token in reduce_text("syntax", ids, length, [0], tagged.priorities(ids))[0] if 0 < token < 49406]
        )
        for length in (6, 9, 11)
    ]
    assert [text.replace("</w>", "").split() for text in kept] == [
        ["photo", "dog", "ball", "park"],
        ["photo", "happy", "brown", "dog", "ball", "green", "park"],
        ["photo", "happy", "brown", "dog", "is", "running", "ball", "green", "park"],
    ]


def test_each_word_is_tagged_once_until_the_cache_is_full(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    stub = Syntax(tokenizer, tagger=lambda word: asked.append(word) or NOUN)
    ids = tokenizer.encode(["red dog", "dog red café", "café"])
    stub.priorities(ids)
    stub.priorities(ids)
    assert asked == ["red", "dog", "café"]
    monkeypatch.setattr(syntax, "CACHE_WORDS", 3)
    stub.priorities(tokenizer.encode(["new"]))
    assert len(stub.cache) == 1


def test_without_the_tagger_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "HanTa.HanoverTagger", None)
    with pytest.raises(UserError, match=r'pip install "clipkit\[syntax\]"'):
        load_tagger()
