"""Captions to ids. `WordTokenizer` is what every tokenizer has; `Tokenizer` is CLIP's byte-pair encoding, with the
same ids as OpenCLIP's SimpleTokenizer, several times as fast.

The merges run in the Rust `tokenizers` library; the cleaning (ftfy, HTML entities, white space, lower case) is
OpenCLIP's, skipped where it provably changes nothing. Encoding: Sennrich, Haddow & Birch, ACL 2016, over bytes as in
GPT-2; vocabulary and cleaning: Radford et al., "Learning transferable visual models", 2021.
"""

import gzip
import html
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import ftfy
import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from clipkit.embedded import folder
from clipkit.errors import UserError

SOT = 49406
EOT = 49407
VOCAB_SIZE = 49408
MERGES = 49152 - 256 - 2
# The gzipped byte-pair merges, as CLIP was published with them.
MERGES_FILE = folder("clip") / "bpe_simple_vocab_16e6.txt.gz"

# How many words of captions are kept with their ids, and how long one may be: a few dozen megabytes. A full cache is
# emptied, and fills again with the frequent ones.
CACHE_WORDS, CACHE_LENGTH = 100_000, 40

LETTERS = re.compile("[a-z]+")

# OpenCLIP writes these two literals into its splitting pattern, so a caption that holds one gets the special id.
SPECIAL = {"<start_of_text>": SOT, "<end_of_text>": EOT}

# OpenCLIP matches without regard to case after lowering the text. The one character that is left to differ in case
# from an ASCII letter of the pattern is the long s, so it is written out and the engines' case folding isn't needed.
# U+0345 (iota below) is a mark whose capital is a letter: OpenCLIP's engine then puts it in no class and drops it.
# Cleaned text holds no white space but the space, so \s is a space here, whatever an engine counts as white.
PATTERN = r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^ \u0345\p{L}\p{N}]+"


# Typography that ftfy makes plain, and the captions that neither it nor `html.unescape` would change in any other way:
# an ampersand before a space isn't an entity, and no sign of mojibake is made of only ASCII, dashes, dots and curly
# quotes, or of a Latin letter with an accent between two characters of ASCII (ftfy's `badness.py` needs more).
STRAIGHT = str.maketrans("‘’“”", "''\"\"")
UNTOUCHED = re.compile("(?:[ -%'-~–—…‘’“”]|&(?= |$)|(?<![^ -~])[ÀÁÄ-ÖØ-Üß-öø-ü](?![^ -~]))*")


def clean(text: str) -> str:
    """A caption as CLIP's tokenizer sees it: tidy, and in lower case."""
    return tidy(text).lower()


def tidy(text: str) -> str:
    """A caption with mojibake repaired, entities resolved and white space collapsed.

    Printable ASCII without `&` takes a short cut: there ftfy and `html.unescape` have nothing to act on (no entity, no
    control character, no escape sequence, no character above 127). So does what UNTOUCHED describes.
    """
    if not (text.isascii() and text.isprintable() and "&" not in text):
        plain = UNTOUCHED.fullmatch(text)
        text = text.translate(STRAIGHT) if plain else html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order in which CLIP's vocabulary lists them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]


class WordTokenizer(ABC):
    """Captions to ids, word by word: no token holds a space. It can be shared between threads."""

    name: str
    vocab_size: int
    fast: tokenizers.Tokenizer
    whole: dict[str, list[int]]
    """The words that are known from the start."""
    cache: dict[str, list[int]]
    start: int | None
    """The id before a caption's own."""
    end: int | None
    """The id after them, kept when the caption is cut."""
    pad: int = 0
    vocabulary: bytes | None = None
    """The file that the user gave, which goes into every checkpoint."""

    @staticmethod
    @abstractmethod
    def clean(text: str) -> str:
        """A caption as `encode_cleaned` takes it."""

    @abstractmethod
    def split_words(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The ids of one caption, as `encode` gives them, word by word."""

    @abstractmethod
    def spell(self, ids: Sequence[int]) -> str:
        """The word that these ids stand for."""

    @property
    def specials(self) -> int:
        """How many ids a caption has beside its own: start and end."""
        return (self.start is not None) + (self.end is not None)

    @cached_property
    def pieces(self) -> list[str]:
        """The text of each id, as the vocabulary writes it."""
        return [str(self.fast.id_to_token(index)) for index in range(self.vocab_size)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each caption, cleaned, without start and end, not truncated."""
        return self.encode_cleaned([self.clean(text) for text in texts])

    def encode_cleaned(self, cleaned: Sequence[str]) -> list[list[int]]:
        """The same for captions that went through `clean` already.

        Each word between spaces has its ids whatever is beside it: those of the words that captions are mostly made of
        are looked up, and the library is asked for the rest.
        """
        cache = self.cache
        if len(cache) > CACHE_WORDS:
            cache = self.cache = dict(self.whole)  # another, not emptied: a thread may be reading the old one
        rows = [text.split(" ") for text in cleaned]
        new = {word for row in rows for word in row if word not in cache}
        if new:
            long = [word for word in new if len(word) > CACHE_LENGTH]
            short = [word for word in new if len(word) <= CACHE_LENGTH]
            cache.update(zip(short, self.encode_words(short), strict=True))
            if long:
                ids = dict(zip(long, self.encode_words(long), strict=True))
                return [[i for word in row for i in (ids[word] if word in ids else cache[word])] for row in rows]
        return [[i for word in row for i in cache[word]] for row in rows]

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """The ids of each text, whether it was seen before or not."""
        encodings = self.fast.encode_batch_fast(words, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def __call__(self, texts: str | Sequence[str], context_length: int = 77) -> npt.NDArray[np.int32]:
        """int32[B, context_length]: start, ids, end, then padding. A caption too long loses its tail, never its end."""
        return self.rows(self.encode([texts] if isinstance(texts, str) else texts), context_length)

    def rows(self, encoded: Sequence[list[int]], context_length: int) -> npt.NDArray[np.int32]:
        """The same for captions that went through `encode` already."""
        start = [] if self.start is None else [self.start]
        end = [] if self.end is None else [self.end]
        ids_BT = np.full((len(encoded), context_length), self.pad, np.int32)
        for row, ids in zip(ids_BT, encoded, strict=True):
            kept = start + ids[: context_length - len(start) - len(end)] + end
            row[: len(kept)] = kept
        return ids_BT


@cache
def read_merges(path: Path) -> tuple[models.BPE, dict[str, list[int]]]:
    """The encoding by a list of merges, and the words that it gives one id each. A tenth of a second, but once only."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the tokenizer's merges {path} ({error}): install clipkit again") from error
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    characters = byte_characters()
    words = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, *SPECIAL])}
    if len(vocabulary) != VOCAB_SIZE:
        raise UserError(f"{path} gives {len(vocabulary)} ids, not {VOCAB_SIZE}: it isn't CLIP's list of merges")
    # A whole word of the vocabulary has one id: most words are known from the start.
    ends = (word.removesuffix("</w>") for word in words if word.endswith("</w>"))
    whole = {word: [vocabulary[f"{word}</w>"]] for word in ends if LETTERS.fullmatch(word)}
    return models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"), whole


class Tokenizer(WordTokenizer):
    """CLIP's byte-pair encoding."""

    name = "clip-bpe"
    vocab_size = VOCAB_SIZE
    start, end = SOT, EOT
    clean = staticmethod(clean)

    def __init__(self, merges_path: Path | None = None) -> None:
        self.model, self.whole = read_merges(merges_path or MERGES_FILE)
        self.split = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
        self.to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.fast = tokenizers.Tokenizer(self.model)
        self.fast.pre_tokenizer = pre_tokenizers.Sequence([self.split, self.to_bytes])
        self.cache = dict(self.whole)

    @cached_property
    def ends_word(self) -> list[bool]:
        """Whether each id is the last of its word."""
        return [piece.endswith("</w>") or piece in SPECIAL for piece in self.pieces]

    def split_words(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The ids of one caption, as `encode` gives them, word by word."""
        ends_word, words, start = self.ends_word, [], 0
        for stop, token in enumerate(ids, 1):
            if ends_word[token]:
                words.append(tuple(ids[start:stop]))
                start = stop
        return words

    def spell(self, ids: Sequence[int]) -> str:
        """The word that these ids stand for."""
        spelled: str = decoders.ByteLevel().decode([self.pieces[token] for token in ids])
        return spelled.removesuffix("</w>")

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """The ids of each text, whether it was seen before or not."""
        ids = super().encode_words(words)
        for index, text in enumerate(words):
            if "<" in text and any(literal in text for literal in SPECIAL):
                ids[index] = self.encode_with_specials(text)
        return ids

    def encode_with_specials(self, text: str) -> list[int]:
        """The ids of one cleaned caption in which a special token stands as a literal. Slow, and rare.

        The library would cut such literals out first; OpenCLIP's pattern finds them in turn, so that "!<end_of_text>"
        holds none ("!<" is taken as one word).
        """
        ids: list[int] = []
        for word, _ in self.split.pre_tokenize_str(text):
            if word in SPECIAL:
                ids.append(SPECIAL[word])
            else:
                ids.extend(
                    token.id for part, _ in self.to_bytes.pre_tokenize_str(word) for token in self.model.tokenize(part)
                )
        return ids
