"""`--dedup`: of samples with the same image, caption or picture the first stays, over all sources, in flat memory.

Three passes, each over files: every stretch of the image shards leaves the hashes of its samples, sorted; every part of
the hashes' range is then judged by itself, from all these files; and whoever writes a stretch finds the numbers of its
own duplicates. A hash is 128 bits of a digest, or the 64 bits of a perceptual hash.

Pictures are the same up to `NEAR_BITS` bits of their perceptual hashes. Two hashes that differ in three bits at most
agree in one of four runs of 16 bits, so they are sorted four times, each time by another run, and compared with those
of the same run. A picture goes when any earlier one is that near, whether that one stays or not, so each that goes is
linked to an earlier one that stays. This costs a decoding of every image, and comparisons that grow with the square of
the number of pictures (10 million: about 3 thousand million, some seconds of one core; 400 million: about 5 million
million, some hours). Pictures of one colour are left alone: their hash says nothing.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.pixels.images import ImageError
from clipkit.pixels.phash import perceptual_hash_of
from clipkit.text.tokenizer import clean
from clipkit.tfrecord_tools.build.prepare import Preparation, Stretch, usable
from clipkit.tfrecord_tools.build.sorted_rows import BUCKETS, KEY_END, read_sorted, write_sorted
from clipkit.tfrecord_tools.sample import Sample

Method = Literal["sha256", "caption", "phash"]
METHODS: tuple[Method, ...] = get_args(Method)

HASHES = "hashes"  # what the first pass leaves of a stretch
NEAR_BITS = 3
RUNS = 4  # of 16 bits each: one more than the bits that may differ
FLAT = (0, 1 << 63)  # the perceptual hashes of pictures of one colour
HASH = np.dtype([("key", "<u8"), ("rest", "<u8"), ("number", "<u4")])
NUMBER = np.dtype([("key", "<u8")])
PART_ROWS = 2_000_000  # judged at a time, some 200 MB of memory
COMPARED_ROWS, COMPARED_COLUMNS = 1024, 8192
_NUMBER_BITS = 32

UInt64Array = npt.NDArray[np.uint64]


def hashes_path(folder: Path, number: int, run: int) -> Path:
    return folder / f"{HASHES}-{number:05d}-{run}.rows"


def runs_of(method: Method) -> int:
    """How many times each hash is sorted."""
    return RUNS if method == "phash" else 1


# ---- First pass ------------------------------------------------------------------------------------------------------


def hash_samples(job: Stretch, preparation: Preparation, method: Method) -> int:
    """Write the hashes of the samples that may be taken; the number of them."""
    keys: list[int] = []
    rests: list[int] = []
    numbers: list[int] = []
    for number, sample in usable(job.parts, preparation):
        if (found := hash_of(sample, method)) is not None:
            keys.append(found[0])
            rests.append(found[1])
            numbers.append(number)
    rows = np.empty(len(keys), HASH)
    rows["rest"], rows["number"] = np.array(rests, np.uint64), numbers
    for run in range(runs_of(method)):
        rows["key"] = rotated(np.array(keys, np.uint64), 16 * run)
        write_sorted(hashes_path(job.folder, job.number, run), rows[np.argsort(rows["key"], kind="stable")])
    job.write_count(HASHES, len(keys), compared=False)
    return len(keys)


def hash_of(sample: Sample, method: Method) -> tuple[int, int] | None:
    """128 bits as two numbers; None for a picture that is like no other: of one colour, or none at all."""
    assert sample.image is not None
    if method == "phash":
        try:
            found = perceptual_hash_of(sample.image)
        except ImageError:
            return None
        return None if found in FLAT else (found, 0)
    # The caption is compared as the model gets it: mended, white space as one space, lower case.
    data = sample.image if method == "sha256" else clean(sample.caption or "").encode("utf-8", "replace")
    digest = hashlib.sha256(data).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def rotated(keys: UInt64Array, bits: int) -> UInt64Array:
    """Each number with its highest `bits` bits moved to its end."""
    if not bits:
        return keys
    return cast(UInt64Array, keys << np.uint64(bits) | keys >> np.uint64(64 - bits))


# ---- Second pass -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecideJob:
    """The `number`th of `count` parts of the keys of one run, over all stretches of a build."""

    folder: Path
    stretches: int
    run: int
    number: int
    count: int

    @property
    def path(self) -> Path:
        return self.folder / f"duplicates-{self.run}-{self.number:04d}-of-{self.count:04d}.rows"


def decide_jobs(folder: Path, stretches: int, hashes: int, method: Method) -> tuple[DecideJob, ...]:
    """Parts of about PART_ROWS hashes."""
    count = 1
    while count < BUCKETS and hashes > count * PART_ROWS:
        count *= 2
    return tuple(
        DecideJob(folder, stretches, run, number, count) for run in range(runs_of(method)) for number in range(count)
    )


def decide(job: DecideJob, method: Method) -> int:
    """Write which samples of the job's keys are duplicates of earlier ones; the number of them."""
    low, high = (KEY_END * each // job.count for each in (job.number, job.number + 1))
    found = [read_sorted(hashes_path(job.folder, i, job.run), HASH, low, high) for i in range(job.stretches)]
    rows = np.concatenate(found)
    first = np.array([place(stretch, job.stretches) for stretch in range(job.stretches)], np.uint64)
    places = np.repeat(first, [len(each) for each in found]) | rows["number"]
    order = np.lexsort((places, rows["rest"], rows["key"]))
    keys, rests, places = rows["key"][order], rows["rest"][order], places[order]
    again = np.zeros(len(keys), np.bool_)
    again[1:] = (keys[1:] == keys[:-1]) & (rests[1:] == rests[:-1])
    duplicates = [places[again]]
    if method == "phash":
        duplicates.append(near_duplicates(keys[~again], places[~again]))
    made = np.empty(sum(map(len, duplicates)), NUMBER)
    made["key"] = np.sort(np.concatenate(duplicates))
    write_sorted(job.path, made)
    return len(made)


def near_duplicates(keys: UInt64Array, places: UInt64Array) -> UInt64Array:
    """Of different keys in rising order, the places of those with an earlier place near, of the same 16 high bits."""
    high = keys >> np.uint64(48)
    starts = np.flatnonzero(np.append(True, high[1:] != high[:-1])) if len(keys) else np.empty(0, np.int64)
    ends = np.append(starts[1:], len(keys))
    found = [np.empty(0, np.uint64)]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=False):
        if end - start > 1:
            order = np.argsort(places[start:end])
            near = near_earlier(keys[start:end][order])
            found.append(places[start:end][order][near])
    return np.concatenate(found)


def near_earlier(keys: UInt64Array) -> npt.NDArray[np.bool_]:
    """bool[n]: whether any earlier one of n keys differs in NEAR_BITS bits or fewer."""
    near = np.zeros(len(keys), np.bool_)
    for top in range(0, len(keys), COMPARED_ROWS):
        rows = keys[top : top + COMPARED_ROWS, None]
        end = top + len(rows)
        for left in range(0, end, COMPARED_COLUMNS):
            columns = keys[None, left : min(left + COMPARED_COLUMNS, end)]
            hits = np.bitwise_count(rows ^ columns) <= NEAR_BITS
            near[top:end] |= np.tril(hits, top - left - 1).any(axis=1)  # only with those before it
    return near


def place(stretch: int, stretches: int) -> int:
    """The place of a stretch's first sample in the order of all, spread over 64 bits."""
    return stretch * ((1 << (64 - _NUMBER_BITS)) // stretches) << _NUMBER_BITS


# ---- Third pass ------------------------------------------------------------------------------------------------------


def duplicates_in(jobs: tuple[DecideJob, ...], stretch: int) -> npt.NDArray[np.int64]:
    """The numbers of the samples of a stretch that are duplicates, rising; none when there was nothing to decide."""
    found = [np.empty(0, np.uint64)]
    for job in jobs:
        low = place(stretch, job.stretches)
        found.append(read_sorted(job.path, NUMBER, low, low + (1 << _NUMBER_BITS))["key"] - np.uint64(low))
    return np.unique(np.concatenate(found)).astype(np.int64)


def check_dedup(method: str | None) -> Method | None:
    """The method. Raises UserError for one that there isn't."""
    if method is not None and method not in METHODS:
        raise UserError(f"--dedup {method}: choose among {', '.join(METHODS)}")
    return method
