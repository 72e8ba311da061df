"""What a worker of `clipkit add-captions` does with one shard.

Its records are read twice: for their keys, and, where a row of the table has one of them, to be written again. All
bytes of a record stay but for the column that comes into it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.formats.records import RecordError, read_examples, read_range, with_column
from clipkit.storage.files import load_array, local_copy, save_array
from clipkit.tfrecord_tools.captions.table import ROWS, TEXTS
from clipkit.tfrecord_tools.rewriting.shard import RewriteJob, ShardState, find_records, rewrite
from clipkit.tfrecord_tools.tables.digests import UInt64Array, value_bytes


@dataclass(frozen=True)
class CaptionedShard(ShardState):
    """The state of a shard of which `joined` records got captions; their rows stand in a file beside it."""

    joined: int

    def joined_rows(self) -> npt.NDArray[np.int64]:
        """Where the rows that were joined stand in the table's array."""
        return load_array(self.path.with_suffix(".rows.npy"))


def add_captions_to(job: RewriteJob, table: Path, key: str, column: str) -> CaptionedShard:
    """Write the shard again with the captions of its records. Raises UserError when it isn't what the dataset says.

    `table` is the folder of the packed table, `key` the records' column that is compared, `column` the one they get.
    """
    with local_copy(job.path) as local, local_copy(table / ROWS) as array, local_copy(table / TEXTS) as texts:
        if local.stat().st_size != job.before.bytes:
            raise UserError(f"{job.path} was changed meanwhile: run the same command again")
        rows = np.load(array, mmap_mode="r")
        places = find_records(job, rows[:2], _keys(local, key), "add captions")
        joined = int((places >= 0).sum())
        save_array(job.state.with_suffix(".rows.npy"), np.unique(places[places >= 0]))
        if not joined:
            state = CaptionedShard(job.state, job.before, job.before.bytes, job.entry, 0)
            state.write()
            return state
        return rewrite(
            job,
            _captioned(job.path, local, column, texts, rows, places),
            lambda size, entry: CaptionedShard(job.state, job.before, size, entry, joined),
        )


def _keys(local: Path, key: str) -> Iterator[bytes]:
    """The keys of a shard's records; b"" for a missing one."""
    for _, values in read_examples(local, keys=[key]):
        yield value_bytes((values.get(key) or [None])[0])


def _captioned(
    path: Path, local: Path, column: str, texts: Path, rows: UInt64Array, places: npt.NDArray[np.int64]
) -> Iterator[bytes]:
    """A shard's records, with the captions of those that have some."""
    descriptor = os.open(texts, os.O_RDONLY)
    try:
        for (offset, record), place in zip(read_range(local), places.tolist(), strict=True):
            if place < 0:
                yield record
                continue
            begin, size = rows[2:, place].tolist()
            try:
                yield with_column(record, column, os.pread(descriptor, size, begin))
            except ValueError as error:
                raise RecordError(path, offset, str(error)) from error
    finally:
        os.close(descriptor)
