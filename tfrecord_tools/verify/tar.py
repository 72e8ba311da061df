"""What a worker of `clipkit verify` does with one of img2dataset's tars: read it, and compare it with its neighbours.

Beside `00012.tar` stand `00012.parquet`, a row for each URL, and `00012_stats.json`, the counts; either may be absent.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.storage.files import local_copy, read_json
from clipkit.tfrecord_tools.pictures.sniff import image_format
from clipkit.tfrecord_tools.readers.tar import read_tar
from clipkit.tfrecord_tools.reasons import BAD_METADATA, BAD_TEXT
from clipkit.tfrecord_tools.verify.problems import FETCH, ProblemList, ShardReport
from clipkit.tfrecord_tools.verify.shard import decoding_error


@dataclass(frozen=True)
class TarCheck:
    """One tar, its size in bytes, its number among all, and how many of its images to decode (None: all)."""

    path: Path
    bytes: int
    number: int
    decode: int | None


def check_tar(check: TarCheck) -> ShardReport:
    """Read the tar once from front to back; the images to decode are drawn as they pass, and held until the end."""
    found = ProblemList(check.path.name)
    rng = random.Random(check.number)
    chosen: list[tuple[str, bytes]] = []
    samples = images = decoded = 0
    try:
        with local_copy(check.path) as local:
            for sample in read_tar(local, captions="first"):
                samples += 1
                if sample.problem in (BAD_METADATA, BAD_TEXT):
                    found.add(sample.problem, f"sample {sample.key}", FETCH)
                if sample.image is None:
                    found.add("a sample has no image", f"sample {sample.key}", FETCH)
                    continue
                images += 1
                if image_format(sample.image) is None:
                    found.add("an image is of no known format", f"sample {sample.key}", FETCH)
                elif check.decode is None:
                    decoded += _decode(sample.key, sample.image, found)
                elif len(chosen) < check.decode:
                    chosen.append((sample.key, sample.image))
                elif (place := rng.randrange(images)) < check.decode:
                    chosen[place] = (sample.key, sample.image)
    except UserError as error:
        # The rest of the line is advice, which the summary gives in its own words.
        found.add(str(error).removeprefix(f"{check.path}: ").rsplit(": ", 1)[0], f"after {samples:,} samples", FETCH)
    else:
        for name, count in _counts(check.path, found):
            if count != samples:
                found.add(f"{samples:,} samples where {name} says {count:,}", "", FETCH)
    for key, image in chosen:
        decoded += _decode(key, image, found)
    return ShardReport(samples, check.bytes, decoded, found.all())


def _decode(key: str, image: bytes, found: ProblemList) -> int:
    error = decoding_error(image)
    if error is not None:
        found.add("an image can't be decoded", f"sample {key}: {error}", FETCH, key)
    return 1


def _counts(tar: Path, found: ProblemList) -> list[tuple[str, int]]:
    """The number of samples that the files beside a tar count, by their names."""
    counts = []
    stats, table = tar.with_name(f"{tar.stem}_stats.json"), tar.with_suffix(".parquet")
    if stats.exists():
        try:
            counts.append((stats.name, int(read_json(stats)["successes"])))
        except (UserError, KeyError, TypeError, ValueError):
            found.add(f"{stats.name} isn't img2dataset's account", "", FETCH)
    if table.exists():
        try:
            with local_copy(table) as local:
                status = pq.read_table(local, columns=["status"])["status"]
            counts.append((table.name, pc.sum(pc.equal(status, "success")).as_py() or 0))
        except (pa.ArrowInvalid, KeyError, OSError):
            found.add(f"{table.name} can't be read", "", FETCH)
    return counts
