"""The section "What clipkit accepts" of docs/data.md, from the code's own lists, so that it can't go stale.

`python docs/accepts.py` (or `make docs`) writes it; `tests/house/test_accepts.py` compares.
"""

from collections.abc import Iterable
from pathlib import Path

from clipkit.formats import folders, tables
from clipkit.formats.captions import CAPTION_CHOICES
from clipkit.formats.shards import ALL_SPLITS, SHARD_SUFFIXES
from clipkit.pixels.images import FORMATS

PAGE = Path(__file__).with_name("data.md")
BEGIN, END = "<!-- accepts: written by docs/accepts.py -->", "<!-- end of accepts -->"


def section() -> str:
    """The section's text, between its two marks."""
    shards, suffixes = listed(SHARD_SUFFIXES), listed(f".{suffix}" for suffix in sorted(tables.IMAGE_SUFFIXES))
    images = listed(name for name in tables.IMAGE_NAMES if name not in tables.IMAGE_SUFFIXES - {"jpg"})
    metadata = f"`{tables.METADATA_STEM}.*`"
    rows = [
        (
            "images",
            f"{listed(FORMATS)}, told by their first bytes; in folders the suffixes {suffixes}",
        ),
        ("shards", f"{shards} of one kind in a folder; a dataset directory; a folder of images with a table"),
        (
            "tables",
            f"{listed(tables.TABLE_SUFFIXES)}; in a folder of images {metadata}, or the only one",
        ),
        ("members of a tar", "`KEY.jpg` (or another image), `KEY.txt`, `KEY.json`, side by side; keys may have dots"),
        ("column of images", f"{images}, another suffix of images, or the only one with bytes; else `--image-column`"),
        ("column of file names", listed(tables.FILE_NAMES)),
        ("column of captions", f"{listed(tables.CAPTION_NAMES)}; else `--caption-column`"),
        ("column of classes", listed(tables.CLASS_NAMES)),
        ("column of links, of keys", f"`{tables.URL_NAME}`, `{tables.KEY_NAME}`; else `--url-column`"),
        (
            "captions",
            "text; bytes in UTF-8; a list of several, of which training draws one each time and a build takes "
            f"`--captions` {listed(CAPTION_CHOICES)}; a struct is refused",
        ),
        ("splits", splits()),
        (
            "labelled images",
            "a folder a class, in a folder a split or in the given one; a class without images is refused without "
            "`--allow-empty-classes`; for `zeroshot` also parquet files with a column `label`, and tars with a `.cls` "
            "for each sample",
        ),
        (
            "hidden, passed over everywhere",
            f"names that begin with a dot, and {listed(sorted(tables.LEFT_BY_PROGRAMS))}",
        ),
    ]
    lines = [f"| {what} | {how} |" for what, how in rows]
    return "\n".join(["| what | how |", "|---|---|", *lines])


def listed(names: Iterable[str]) -> str:
    """Names as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def splits() -> str:
    """The words that name a split."""
    words = "; ".join(f"{split}: {listed(found)}" for split, found in folders.SPLIT_WORDS.items())
    return (
        f"told by words in the names of files or folders, in any case ({words}); `--split` picks one, and "
        f"`--split {ALL_SPLITS}` mixes them"
    )


def write() -> str:
    """The page with the section as it is now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
