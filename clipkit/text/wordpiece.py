"""BERT's WordPiece, with a vocabulary that the user gives: the tokenizer of CLIPA-v2.

The pieces are those of the Rust `tokenizers` library: accents off, lower case, split at white space and punctuation,
then the longest piece of the vocabulary, again and again (Devlin et al., "BERT", 2019). The rows are those of CLIPA's
JAX code, which trained the published models: [CLS], ids, zeros, and no [SEP].
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from clipkit.errors import UserError, one_line
from clipkit.text.tokenizer import LETTERS, WordTokenizer, tidy

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = (PAD, UNKNOWN, START, END, "[MASK]")


class WordPiece(WordTokenizer):
    """Captions to the ids of a vocabulary file with one token a line, such as the `vocab.txt` of bert-base-uncased.

    With `end=0` its rows are OpenCLIP's, which puts a zero in place of [SEP]: a caption that is cut then has a word
    less. Those that fit are the same.
    """

    name = "wordpiece"
    clean = staticmethod(tidy)

    def __init__(self, vocabulary_path: Path, end: int | None = None) -> None:
        self.vocabulary, vocabulary = read_vocabulary(vocabulary_path)
        self.vocab_size = len(vocabulary)
        self.start, self.end = vocabulary[START], end
        self.separator = vocabulary[END]
        self.fast = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100))
        self.fast.normalizer = normalizers.BertNormalizer(lowercase=True)
        self.fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # As in transformers, a special token that stands in a caption as a literal is that token.
        self.fast.add_special_tokens([token for token in SPECIAL if token in vocabulary])
        self.whole = {word: [index] for word, index in vocabulary.items() if LETTERS.fullmatch(word)}
        self.cache = dict(self.whole)

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """The ids of each text, whether it was seen before or not; zero for a literal [SEP], as in OpenCLIP."""
        ids = super().encode_words(words)
        for index, text in enumerate(words):
            if END in text:
                ids[index] = [self.pad if token == self.separator else token for token in ids[index]]
        return ids

    @cached_property
    def continues_word(self) -> list[bool]:
        """Whether each id goes on with the word before it."""
        return [piece.startswith("##") for piece in self.pieces]

    def split_words(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The ids of one caption, as `encode` gives them, word by word."""
        continues, words, start = self.continues_word, [], 0
        for place, token in enumerate(ids):
            if place > start and not continues[token]:
                words.append(tuple(ids[start:place]))
                start = place
        return [*words, tuple(ids[start:])] if ids else words

    def spell(self, ids: Sequence[int]) -> str:
        """The word that these ids stand for."""
        return "".join(self.pieces[token].removeprefix("##") for token in ids)


def read_vocabulary(path: Path) -> tuple[bytes, dict[str, int]]:
    """The file, and each token's id: the number of its line, from 0. UserError where it isn't one of BERT's."""
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the vocabulary {path} ({one_line(error)}): give BERT's vocab.txt") from error
    vocabulary = {token: index for index, token in enumerate(lines)}
    for token in (PAD, UNKNOWN, START, END):
        if token not in vocabulary:
            raise UserError(f"the vocabulary {path} has no line {token}: give BERT's vocab.txt, one token on each line")
    if vocabulary[PAD] != 0:
        raise UserError(f"the vocabulary {path} has {PAD} on line {vocabulary[PAD] + 1}: it must be the first")
    if len(vocabulary) < len(lines):
        twice = next(token for index, token in enumerate(lines) if vocabulary[token] != index)
        raise UserError(f"the vocabulary {path} has {twice!r} on two lines: leave the token on one of them")
    return content, vocabulary
