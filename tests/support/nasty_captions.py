"""Captions of every nasty kind, the same for the same seed."""

import random
import unicodedata

import pyarrow.parquet as pq

from clipkit.embedded import emoji_parquet
from clipkit.text.tokenizer import clean

PIECES = [
    "“curly”", "it’s", "don't", "WE'LL", "I'M", "you'Ve", "'ſ", "they'd've", "``x´´", "<b>bold</b>",
    "&amp;", "&amp;amp;", "&amp;amp;lt;", "&lt;br&gt;", "&nbsp;", "&#39;s", "&#x27;", "&copy", "&notit;",
    "&NTILDE;", "&#0;", "&#xD800;", "& ", "AT&T", "\x00", "\x07bell", "\x1b[31mred\x1b[0m", "\x1c",
    "\x1f", "\x7f", "\x85", "\x0b", "\x0c", "\r\n", "\r", "\n\n", "\t", "\u2028", "\u3000", "\u200b",
    "\u200d", "\ufeff", "\u00ad", "\u202e", "schÃ¶n", "â€œquotedâ€", "voilÃ le", "ï¿½", "ＬＯＵＤ",
    "ﬁne ﬂower", "ß", "İstanbul", "ıI", "K", "ſ", "ǅ", "Ω", "é", "e\u0301", "ñandú", "Ελλάδα", "Москва",
    "עברית", "العربية", "हिन्दी", "ไทย", "日本語のテキスト", "中文，标点。", "한국어", "ｶﾀｶﾅ", "٣٤",
    "½", "Ⅷ", "x²", "1234567890", "3.14", "10,000", "😀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇨🇭",
    "✨✨✨", "♥", "™", "—", "…", "...", "!!!", "???", "#tag", "@user", "http://a.b/c?d=e&f=g",
    "<start_of_text>", "<end_of_text>", "<END_OF_TEXT>", "<ſtart_of_text>", "!<end_of_text>",
    "<start_of_text", "<|endoftext|>", "<|startoftext|>", "</w>", "cat</w>", "Ġ", "\\n", "\\u00e9",
    "a_b-c", "IMG_2034.JPG", "aaaaaaaaaaaaaaaaaaaaaaaa", "supercalifragilisticexpialidocious", "x" * 300,
    "", " ",
]  # fmt: skip


def varied_captions(n: int, seed: int) -> list[str]:
    """Emoji captions cut and spiced with the nasty pieces, plus random code points; the same for the same seed."""
    rng = random.Random(seed)
    table = pq.read_table(emoji_parquet("train"), columns=["caption"])
    words = [word for caption in table["caption"].to_pylist() for word in caption.split()]
    captions = [*PIECES]
    while len(captions) < n:
        parts = rng.choices(words, k=rng.randint(0, 8)) + rng.choices(PIECES, k=rng.randint(0, 4))
        for _ in range(rng.randint(0, 2)):
            parts.append("".join(chr(rng.choice(RANGES)[rng.randint(0, 94)]) for _ in range(rng.randint(1, 6))))
        parts = [rng.choice([str.upper, str.title, str])(part) for part in parts]
        rng.shuffle(parts)
        caption = rng.choice([" ", " ", "", ", "]).join(parts)
        # Code points without a meaning yet are letters to one engine and not to another, by the age of their tables.
        if all(unicodedata.category(character) != "Cn" for character in clean(caption)):
            captions.append(caption)
    return captions


# Blocks of 95 code points, from ASCII (control characters too) to emoji and ideographs.
RANGES = [
    range(start, start + 95) for start in (0, 32, 32, 128, 192, 0x300, 0x400, 0x600, 0x2000, 0x4E00, 0xFF00, 0x1F600)
]
