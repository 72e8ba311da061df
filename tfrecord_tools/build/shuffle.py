"""Records into another order or into several splits without holding them in memory: `--shuffle`, `--split a=…,b=…`.

The stretches of the image shards have been written as TFRecord files in the order of arrival (`shard`). Each
record gets a key: a hash of (seed, its number among all records), or without a shuffle the number itself. The keys of
many stretches at a time are sorted and written with the records' places; an output shard is a range of keys, so its
worker looks it up in each of these files and copies the records in the order of their keys, to the byte as they were.
So the order is a pure function of the records, the seed and nothing else, and every order is equally likely as far as
the hash is random. Meanwhile it takes as much disk space again as the dataset.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipkit.counter_rng import sample_keys
from clipkit.formats.manifest import ShardEntry
from clipkit.formats.records import RecordWriter, unframe
from clipkit.storage.files import is_remote, load_array, read_json, save_array, write_beside, write_json
from clipkit.tfrecord_tools.build.sorted_rows import KEY_END, gone, read_bytes, read_sorted, write_sorted
from clipkit.tfrecord_tools.pictures.sniff import FORMATS
from clipkit.tfrecord_tools.writing.pair_writer import count_format

ENTRY = np.dtype([("key", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("stretch", "<u4"), ("format", "u1")])
INDEX_RECORDS = 2_000_000  # keys sorted at a time, some 150 MB of memory
_MAX_OPEN = 128


def stretch_path(folder: Path, number: int) -> Path:
    """The intermediate file of one stretch."""
    return folder / f"stretch-{number:05d}.tfrecord"


@dataclass(frozen=True)
class StretchFile:
    """An intermediate file: where its offsets and notes lie, and `first`, the number of its first record among all."""

    offsets: Path
    notes: Path
    bytes: int
    records: int
    first: int


@dataclass(frozen=True)
class IndexJob:
    """Stretches, numbered from `start` on, whose records' keys are sorted together into one file a split."""

    number: int
    folder: Path
    start: int
    stretches: tuple[StretchFile, ...]
    splits: tuple[str, ...]
    total: int
    seed: int | None


def index_path(folder: Path, number: int, split: str) -> Path:
    return folder / f"places-{number:05d}-{split}.rows"


def index_jobs(
    folder: Path, stretches: Sequence[StretchFile], splits: tuple[str, ...], total: int, seed: int | None
) -> list[IndexJob]:
    """As few jobs as may hold INDEX_RECORDS each."""
    jobs: list[IndexJob] = []
    group: list[StretchFile] = []
    start = 0
    for i, stretch in enumerate(stretches):
        group.append(stretch)
        if sum(each.records for each in group) >= INDEX_RECORDS or i == len(stretches) - 1:
            jobs.append(IndexJob(len(jobs), folder, start, tuple(group), splits, total, seed))
            start, group = i + 1, []
    return jobs


def index_records(job: IndexJob) -> dict[str, int]:
    """Write the sorted places; the number of bytes by split."""
    found = np.empty(sum(stretch.records for stretch in job.stretches), ENTRY)
    splits = np.empty(len(found), np.uint8)
    at = 0
    for number, stretch in enumerate(job.stretches, job.start):
        rows = slice(at, at + stretch.records)
        offsets, notes = load_array(stretch.offsets), load_array(stretch.notes)
        ordinals = np.arange(stretch.first, stretch.first + stretch.records, dtype=np.uint64)
        found["key"][rows] = keys_of(ordinals, job.total, job.seed)
        found["offset"][rows] = offsets
        found["length"][rows] = np.diff(offsets, append=np.uint64(stretch.bytes))
        found["stretch"][rows] = number
        splits[rows], found["format"][rows] = notes[:, 0], notes[:, 1]
        at += stretch.records
    sizes = {}
    for number, split in enumerate(job.splits):
        chosen = found[splits == number]
        write_sorted(index_path(job.folder, job.number, split), chosen[np.argsort(chosen["key"], kind="stable")])
        sizes[split] = int(chosen["length"].sum(dtype=np.uint64))
    return sizes


def keys_of(ordinals: npt.NDArray[np.uint64], total: int, seed: int | None) -> npt.NDArray[np.uint64]:
    """The keys of records by their number among all `total`: random, or without a seed rising and evenly spread."""
    if seed is None:
        return ordinals * np.uint64((KEY_END - 1) // max(total, 1))
    return sample_keys(seed, ordinals)


@dataclass(frozen=True)
class GatherJob:
    """Output shard `number` of `count` of a split. `made_of` differs for one that is gathered from other records."""

    number: int
    count: int
    split: str
    path: Path
    folder: Path
    indexes: int
    made_of: str

    def beside(self, suffix: str) -> Path:
        return self.folder / f"gathered-{self.split}-{self.number:05d}{suffix}"


def gather(job: GatherJob) -> ShardEntry:
    """Write an output shard, its offsets and its state from the stretches' files."""
    low, high = (KEY_END * each // job.count for each in (job.number, job.number + 1))
    entries = np.concatenate(
        [read_sorted(index_path(job.folder, i, job.split), ENTRY, low, high) for i in range(job.indexes)]
    )
    entries = entries[np.argsort(entries["key"], kind="stable")]
    files = Stretches(job.folder)
    formats: Counter[str] = Counter()
    converted: Counter[str] = Counter()
    offsets = []
    try:
        with write_beside(job.path) as temporary, RecordWriter(temporary) as writer:
            for _, offset, length, stretch, kind in entries.tolist():
                framed = files.read(stretch, offset, length)
                offsets.append(writer.write(unframe(framed, offset, stretch_path(job.folder, stretch))))
                count_format(FORMATS[kind], formats, converted)
    finally:
        files.close()
    save_array(job.beside(".npy"), np.array(offsets, np.uint64))
    shard = ShardEntry.of(job.path.name, writer, (), formats, converted)
    write_json(job.beside(".json"), {"made_of": job.made_of, "shard": asdict(shard)})
    return shard


def read_gathered(job: GatherJob) -> ShardEntry | None:
    """What is known of a finished output shard, or None when it must be written (again)."""
    if not (job.beside(".json").exists() and job.path.exists()):
        return None
    values = read_json(job.beside(".json"))
    shard = ShardEntry.from_dict(values["shard"])
    return shard if values["made_of"] == job.made_of and job.path.stat().st_size == shard.bytes else None


class Stretches:
    """Reads parts of the many intermediate files, of which few are open at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Raises UserError when the file is gone or shorter."""
        path = stretch_path(self.folder, number)
        if is_remote(path):
            return read_bytes(path, offset, length)
        descriptor = self.open.get(number)
        if descriptor is None:
            try:
                descriptor = self.open[number] = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                raise gone(path) from error
            if len(self.open) > _MAX_OPEN:
                os.close(self.open.popitem(last=False)[1])
        else:
            self.open.move_to_end(number)
        data = os.pread(descriptor, length, offset)
        if len(data) < length:
            raise gone(path)
        return data

    def close(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1])
