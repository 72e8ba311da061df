"""Which words carry a caption's meaning: nouns first, then adjectives, then verbs, then the rest (CLIPA's `syntax`).

A word is tagged once, by itself, by HanTa's English morphological tagger (Wartena, "A probabilistic morphology model",
2019; trained on the British National Corpus, C5 tags; its model ships with the package). CLIPA tags with NLTK: its
PyTorch code whole captions in context, its JAX code each vocabulary entry by itself, as here. A tag that doesn't depend
on the neighbours can be kept for every later caption, which makes it fast enough for the loader.
"""

from collections.abc import Callable, Sequence

from clipkit.errors import UserError
from clipkit.text.tokenizer import WordTokenizer

NOUN, ADJECTIVE, VERB, OTHER = range(4)

# C5 tags by their first two letters. Modal verbs (VM0) stay among the rest, as they do with NLTK's tags.
CLASSES = {"NN": NOUN, "NP": NOUN, "AJ": ADJECTIVE, "VB": VERB, "VD": VERB, "VH": VERB, "VV": VERB}

# A web-scale run meets words without end; a full cache is emptied and fills again with the frequent ones.
CACHE_WORDS = 1_000_000
# The tagger tries each way of cutting a word into morphemes: 3,000 letters in a row (Thai has no spaces) would take a
# minute. No English word is as long as this.
LONGEST_WORD = 64

Tagger = Callable[[str], int]


def load_tagger() -> Tagger:
    """A function from a lower-case word to its class. Loading takes 0.2 s, a new word about 1 ms.

    Raises UserError when HanTa isn't installed.
    """
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError as error:
        raise UserError('syntax masking needs the package HanTa: pip install "clipkit[syntax]"') from error
    tagger = HanoverTagger("morphmodel_en.pgz")

    def word_class(word: str) -> int:
        if not any(character.isalpha() for character in word):
            return OTHER
        if len(word) > LONGEST_WORD:
            return NOUN
        _, tag = tagger.analyze(word)
        if tag == "UNC":
            return NOUN  # words it doesn't know are names of things far more often than not; NLTK's tagger agrees
        return CLASSES.get(tag[:2], OTHER)

    return word_class


class Syntax:
    """Priorities for the `syntax` way of `tokens.reduce_text`. One a worker: it holds its cache of words."""

    def __init__(self, tokenizer: WordTokenizer, tagger: Tagger | None = None) -> None:
        self.tagger = tagger or load_tagger()
        self.cache: dict[tuple[int, ...], int] = {}
        self.tokenizer = tokenizer

    def priorities(self, ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """The class of each id's word: 0 noun, 1 adjective, 2 verb, 3 other; all pieces of a word have the same.

        `ids` is what the tokenizer's `encode` gives: the words are read off the ids, so the two lists match by
        construction.
        """
        cache, split_words = self.cache, self.tokenizer.split_words
        rows = []
        for caption in ids:
            row: list[int] = []
            for word in split_words(caption):
                priority = cache.get(word)
                if priority is None:
                    priority = self.classify(word)
                row += [priority] * len(word)
            rows.append(row)
        return rows

    def classify(self, word: tuple[int, ...]) -> int:
        """Tag one word and remember it."""
        if len(self.cache) >= CACHE_WORDS:
            self.cache.clear()
        priority = self.cache[word] = self.tagger(self.tokenizer.spell(word))
        return priority
