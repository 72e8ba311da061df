"""What a worker of `clipkit add-captions` does with one shard.

Its records are read twice: for their keys, and, where a row of the table has one of them, to be written again beside
the shard. All bytes of a record stay but for the column that comes into it. The new state is written before the shard
is renamed, and a shard that got captions is larger than before: so one that has the size of its state is done.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.formats.manifest import ShardEntry
from clipkit.formats.records import RecordError, RecordWriter, decode_example, read_range, with_column
from clipkit.storage.files import load_array, local_copy, read_json, save_array, write_beside, write_json
from clipkit.tfrecord_tools.tables.digests import find

BATCH = 4096


@dataclass(frozen=True)
class CaptionJob:
    """A shard as it was, and where its state goes. `entry` is the manifest's, None where the dataset has none.

    `rows` and `texts` are the files of `table`, `key` the records' column that is compared, `column` the one that is
    added.
    """

    path: Path
    records: int
    bytes: int
    entry: ShardEntry | None
    rows: Path
    texts: Path
    key: str
    column: str
    state: Path


@dataclass(frozen=True)
class CaptionedShard:
    """The state of a shard. `joined` records got captions; their new offsets and rows stand in files beside it."""

    path: Path
    bytes: int
    entry: ShardEntry | None
    joined: int
    added: int
    """Bytes that its records' contents grew by."""

    def offsets(self) -> npt.NDArray[np.uint64]:
        """The byte offsets of the records."""
        return load_array(self.path.with_suffix(".npy"))

    def joined_rows(self) -> npt.NDArray[np.int64]:
        """Where the rows that were joined stand in the table's array."""
        return load_array(self.path.with_suffix(".rows.npy"))


def read_state(job: CaptionJob) -> CaptionedShard | None:
    """The state of a shard that is done, or None."""
    if not job.state.exists():
        return None
    values = read_json(job.state)
    if job.path.stat().st_size != values["bytes"]:
        return None
    values["entry"] = ShardEntry.from_dict(values["entry"]) if values["entry"] else None
    return CaptionedShard(job.state, **values)


def add_captions_to(job: CaptionJob) -> CaptionedShard:
    """Write the shard again with the captions of its records. Raises UserError when it isn't what the dataset says."""
    with local_copy(job.path) as local, local_copy(job.rows) as array, local_copy(job.texts) as texts:
        if local.stat().st_size != job.bytes:
            raise UserError(f"{job.path} was changed meanwhile: run the same command again")
        rows = np.load(array, mmap_mode="r")
        places = np.concatenate([np.zeros(0, np.int64), *(find(rows[:2], keys) for keys in _keys(job, local))])
        if len(places) != job.records:
            raise UserError(
                f"{job.path} holds {len(places):,} records where dataset_info.json says {job.records:,}: run clipkit "
                "verify, and add captions when the dataset is whole"
            )
        joined = np.unique(places[places >= 0])
        state = CaptionedShard(job.state, job.bytes, job.entry, int((places >= 0).sum()), 0)
        save_array(job.state.with_suffix(".rows.npy"), joined)
        if not state.joined:
            _write_state(state)
            return state
        with write_beside(job.path) as temporary:
            with RecordWriter(temporary) as writer:
                offsets = [writer.write(record) for record in _captioned(job, local, texts, rows, places.tolist())]
            entry = job.entry
            if entry is not None:
                entry = replace(entry, bytes=writer.bytes, crc32c=f"{writer.checksum:08x}")
            state = replace(state, bytes=writer.bytes, entry=entry, added=writer.bytes - job.bytes)
            save_array(job.state.with_suffix(".npy"), np.array(offsets, np.uint64))
            _write_state(state)
    return state


def _write_state(state: CaptionedShard) -> None:
    write_json(state.path, {name: value for name, value in asdict(state).items() if name != "path"})


def _keys(job: CaptionJob, local: Path) -> Iterator[list[bytes]]:
    """The keys of a shard's records, some at a time; b"" for a missing one."""
    batch: list[bytes] = []
    for offset, record in read_range(local):
        try:
            values = decode_example(record, [job.key]).get(job.key)
        except ValueError as error:
            raise RecordError(job.path, offset, str(error)) from error
        value = values[0] if values else b""
        batch.append(value if isinstance(value, bytes) else str(value).encode())
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


def _captioned(
    job: CaptionJob, local: Path, texts: Path, rows: npt.NDArray[np.uint64], places: list[int]
) -> Iterator[bytes]:
    """A shard's records, with the captions of those that have some."""
    descriptor = os.open(texts, os.O_RDONLY)
    try:
        for (offset, record), place in zip(read_range(local), places, strict=True):
            if place < 0:
                yield record
                continue
            begin, size = rows[2:, place].tolist()
            try:
                yield with_column(record, job.column, os.pread(descriptor, size, begin))
            except ValueError as error:
                raise RecordError(job.path, offset, str(error)) from error
    finally:
        os.close(descriptor)
