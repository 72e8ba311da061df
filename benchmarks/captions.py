"""Captions of two sources: what drawing one costs the loader, and how fast `clipkit add-captions` adds them.

A dataset of pictures as img2dataset delivers them (256 px, some 34 KB) and captions of LAION's kind gets synthetic ones
of some 50 words. The same loader then takes batches of the original captions, and of both by halves, in turn; compared
is this process's processor time, round by round: the median and the spread. All texts are cut at 16 tokens, so what
differs is the drawing, and the cleaning and encoding of longer captions. With `--short` the synthetic ones are as long
as the others, which leaves the drawing only.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.pictures import captions, jpegs

from clipkit.storage.files import remove
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.captions.command import add_captions
from clipkit.train.augmentation import Augmentation
from clipkit.train.loader.loader import batches
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.sources.open import open_source

BATCH, WORDS = 256, 50
CONFIG = LoaderConfig(112, 16, BATCH, Augmentation(crop_area=(0.4, 1.0)))
BOTH = replace(CONFIG, captions={"original": 0.5, "synthetic": 0.5})


def make_dataset(folder: Path, count: int) -> Path:
    """Pairs in parquet, built; few different pictures, each many times."""
    images, texts = jpegs(64), captions(count)
    shards = folder / "shards"
    shards.mkdir()
    for first in range(0, count, 2000):
        numbers = range(first, min(first + 2000, count))
        columns = {
            "key": [f"{number:09d}" for number in numbers],
            "image": [images[number % len(images)] for number in numbers],
            "caption": [texts[number] for number in numbers],
        }
        pq.write_table(pa.table(columns), shards / f"{first:09d}.parquet")
    return build_tfds(shards, folder / "out", "pairs", shard_megabytes=32, progress=lambda _: None).path


def make_table(folder: Path, count: int, short: bool) -> Path:
    """Synthetic captions of all records but each tenth, in another order than theirs."""
    texts, numbers = captions(count, seed=1), np.random.default_rng(1).permutation(count).tolist()
    said = [texts[number] for number in numbers]
    if not short:  # plain words, as captioners write
        words = [word for text in captions(7 * count, seed=2) for word in text.lower().split() if is_plain(word)]
        rows = [words[WORDS * number : WORDS * (number + 1)] for number in numbers]
        said = [f"{' '.join(row[:20])}. {' '.join(row[20:])}" for row in rows]
    keys = [f"{n:09d}" if n % 10 else f"{count + n:09d}" for n in numbers]
    pq.write_table(pa.table({"key": keys, "caption": said}), folder / "captions.parquet")
    return folder / "captions.parquet"


def is_plain(word: str) -> bool:
    """Whether it has only ASCII letters."""
    return word.isascii() and word.isalpha()


def us_per_sample(data: Path, config: LoaderConfig, samples: int) -> float:
    """Processor time of the loader, which makes batches in this thread."""
    loader = batches(open_source(data).source(), config, workers=0)
    next(loader)
    began = time.process_time()
    for _ in range(samples // BATCH):
        next(loader)
    spent = time.process_time() - began
    loader.close()
    return 1e6 * spent / (samples // BATCH * BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="synthetic captions as long as the others")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_dataset(folder, options.records)
        remove(folder / "shards")
        table = make_table(folder, options.records, options.short)
        began = time.monotonic()
        summary = add_captions(data, table, workers=1)
        rate = summary.records / (time.monotonic() - began)
        plain, drawn = [], []
        for _ in range(options.rounds):
            plain.append(us_per_sample(data, CONFIG, options.records // 2))
            drawn.append(us_per_sample(data, BOTH, options.records // 2))
    slower = [both / one - 1 for one, both in zip(plain, drawn, strict=True)]
    told = {
        "records": options.records,
        "joined": summary.joined,
        "add_captions_records_per_s": round(rate),
        "loader_us": [round(value, 1) for value in (np.median(plain), min(plain), max(plain))],
        "loader_us_both_sources": [round(value, 1) for value in (np.median(drawn), min(drawn), max(drawn))],
        "slower": [f"{value:+.1%}" for value in (np.median(slower), min(slower), max(slower))],
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
