"""Ids equal those of BERT's published rules, written plainly, and of the library's own BERT tokenizer."""

import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nasty_captions import varied_captions
from tokenizers.implementations import BertWordPieceTokenizer

from clipkit import counter_rng
from clipkit.errors import UserError
from clipkit.text.syntax import NOUN, OTHER, Syntax
from clipkit.text.tokenizer import tidy
from clipkit.text.tokens import reduce_text
from clipkit.text.vocabulary import open_tokenizer
from clipkit.text.wordpiece import SPECIAL, WordPiece, read_vocabulary

WORDS = (
    "the a dog cat photo of red running sun smil cafe ##e ##es ##ing ##s ##d un ##believ ##able ##er face ελλαδα 中 日"
)
CHARACTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation, *"абвгд♥…ß“ıσ"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough that some words are whole, many in pieces, and some unknown."""
    path = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    pieces = [*WORDS.split(), *CHARACTERS, *(f"##{each}" for each in string.ascii_lowercase)]
    tokens = [SPECIAL[0], "[unused0]", *SPECIAL[1:], *pieces]
    path.write_text("".join(f"{token}\n" for token in dict.fromkeys(tokens)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> WordPiece:
    return WordPiece(vocabulary)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    rng = np.random.default_rng(0)
    spice = "Unbelievable smiles CAFÉ cafés red-faced 中日 dog中cat [MASK] [SEP]a a[CLS]b [sep]"
    words = [*spice.split(), "x" * 101]
    return [f"{caption} {words[rng.integers(len(words))]}" for caption in varied_captions(4000, seed=3)]


def plain_words(text: str) -> list[str]:
    """The words of BERT's BasicTokenizer, special tokens apart."""
    spaced = ""
    for character in text:
        kind = unicodedata.category(character)
        if character in "\0\ufffd" or (kind.startswith("C") and character not in "\t\n\r"):
            continue
        ideograph = any(low <= ord(character) <= high for low, high in IDEOGRAPHS)
        spaced += f" {character} " if ideograph else " " if character.isspace() else character
    plain = "".join(each for each in unicodedata.normalize("NFD", spaced) if unicodedata.category(each) != "Mn")
    split = ""
    for character in "".join(map(str.lower, plain)):
        mark = character in string.punctuation or unicodedata.category(character).startswith("P")
        split += f" {character} " if mark else character
    return split.split()


def long_known(text: str) -> bool:
    """Whether its characters are old: the tables of two engines differ in age. Emoji are symbols or nothing to both."""
    return all(ord(each) > 0x1F000 or unicodedata.ucd_3_2_0.category(each) != "Cn" for each in text)


IDEOGRAPHS = [
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
]  # fmt: skip


def plain_pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    """The longest piece first, again and again; unknown as a whole where that comes to nothing."""
    ids, start = [], 0
    while start < len(word):
        ends = [end for end in range(len(word), start, -1) if "##" * (start > 0) + word[start:end] in vocabulary]
        if not ends or len(word) > 100:
            return [vocabulary["[UNK]"]]
        ids.append(vocabulary["##" * (start > 0) + word[start : ends[0]]])
        start = ends[0]
    return ids


def test_ids_equal_berts_rules(tokenizer: WordPiece, vocabulary: Path, captions: list[str]) -> None:
    (_, tokens), unknown = read_vocabulary(vocabulary), 0
    for caption, ids in zip(captions, tokenizer.encode(captions), strict=True):
        if any(token in caption for token in SPECIAL) or not long_known(caption):
            continue
        expected = [each for word in plain_words(tidy(caption)) for each in plain_pieces(word, tokens)]
        assert ids == expected, repr(caption)
        unknown += expected.count(tokens["[UNK]"])
    assert unknown > 1000


def test_ids_equal_the_librarys_bert(tokenizer: WordPiece, vocabulary: Path, captions: list[str]) -> None:
    """Special tokens written out in a caption too; [SEP] is zero, as OpenCLIP has it."""
    peer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    separator = peer.token_to_id("[SEP]")
    seen = 0
    for caption, ids in zip(captions, tokenizer.encode(captions), strict=True):
        expected = peer.encode(tidy(caption), add_special_tokens=False).ids
        assert ids == [0 if token == separator else token for token in expected], repr(caption)
        seen += separator in expected
    assert seen > 100


@given(st.text(st.sampled_from([*CHARACTERS, *" A[]"]) | st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_has_the_ids_of_the_librarys_bert(tokenizer: WordPiece, vocabulary: Path, text: str) -> None:
    peer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    separator = peer.token_to_id("[SEP]")
    expected = peer.encode(tidy(text), add_special_tokens=False).ids
    assert tokenizer.encode([text]) == [[0 if token == separator else token for token in expected]]


def test_the_packages_own_vocabulary_is_that_of_bert() -> None:
    tokenizer = open_tokenizer("wordpiece")
    assert tokenizer.vocab_size == 30_522
    assert tokenizer(["a photo of a cat"], 8).tolist() == [[101, 1037, 6302, 1997, 1037, 4937, 0, 0]]


def test_rows_are_clipas(tokenizer: WordPiece) -> None:
    """[CLS], ids, zeros; a caption that is cut fills its row."""
    tokens = tokenizer.fast.get_vocab()
    rows = tokenizer(["a dog", "the dog of the red cat", ""], 4)
    assert rows.dtype == np.int32
    start, a, dog, the, of = (tokens[each] for each in ("[CLS]", "a", "dog", "the", "of"))
    assert rows.tolist() == [[start, a, dog, 0], [start, the, dog, of], [start, 0, 0, 0]]


@pytest.mark.parametrize("context_length", [8, 32])
def test_rows_can_be_openclips(vocabulary: Path, captions: list[str], context_length: int) -> None:
    """What its HFTokenizer does with `strip_sep_token`, by the library's own BERT tokenizer."""
    peer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    peer.enable_truncation(context_length)
    peer.enable_padding(length=context_length)
    expected = np.array([encoding.ids for encoding in peer.encode_batch([tidy(caption) for caption in captions])])
    expected[expected == peer.token_to_id("[SEP]")] = 0
    np.testing.assert_array_equal(WordPiece(vocabulary, end=0)(captions, context_length), expected)


@pytest.mark.parametrize("end", [None, 0])
def test_truncation_by_key_equals_the_tokenizers_own(vocabulary: Path, captions: list[str], end: int | None) -> None:
    tokenizer = WordPiece(vocabulary, end)
    ids = tokenizer.encode(captions[:300])
    keys = counter_rng.sample_keys(0, np.arange(300))
    rows = reduce_text("truncate", ids, 8, keys, start=tokenizer.start, end=tokenizer.end, pad_id=tokenizer.pad)
    np.testing.assert_array_equal(rows, tokenizer(captions[:300], 8))


def test_syntax_keeps_whole_words(tokenizer: WordPiece) -> None:
    """A word is spelled from its pieces; punctuation is a word of its own."""
    asked: list[str] = []
    tagged = Syntax(tokenizer, lambda word: asked.append(word) or (NOUN if word == "unbelievables" else OTHER))
    ids = tokenizer.encode(["The unbelievables' cat", "", "cat"])
    assert asked == [] and tagged.priorities(ids) == [[OTHER, *[NOUN] * 4, OTHER, OTHER], [], [OTHER]]
    assert asked == ["the", "unbelievables", "'", "cat"]
    row = reduce_text("syntax", ids[:1], 5, [0], tagged.priorities(ids[:1]), start=tokenizer.start, end=None)[0]
    assert tokenizer.spell(row[1:]) == "unbelievables"


def test_words_known_from_the_start_have_the_ids_that_the_library_gives(tokenizer: WordPiece) -> None:
    assert tokenizer.encode_words(list(tokenizer.whole)) == list(tokenizer.whole.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "give BERT's vocab.txt"),
        (b"[PAD]\n[UNK]\n[CLS]\na\n", r"no line \[SEP\]"),
        (b"a\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"\[PAD\] on line 2: it must be the first"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na\n", "'a' on two lines"),
    ],
)
def test_files_that_are_no_vocabulary(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        WordPiece(path)


def test_a_vocabulary_with_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\na")
    assert WordPiece(path).encode(["A b"]) == [[4, 1]]
