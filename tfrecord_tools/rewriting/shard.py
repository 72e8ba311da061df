"""One shard that is written again, and how the next run knows that it is done.

A shard is written beside its place, and its new state before it is renamed. It has another size then: so a shard that
has the size of its state is done, any other is as it was, and either way the next run knows what to do.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from clipkit.config import from_json
from clipkit.errors import UserError
from clipkit.formats.manifest import ShardEntry
from clipkit.formats.records import FOOTER_BYTES, HEADER_BYTES, RecordWriter
from clipkit.storage.files import load_array, read_json, save_array, write_beside, write_json
from clipkit.tfrecord_tools.tables.digests import UInt64Array, find_each


@dataclass(frozen=True)
class PlannedShard:
    """A shard as it was before, and how many of its records are to be removed."""

    split: str
    file: str
    records: int
    bytes: int
    purged: int = 0


@dataclass(frozen=True)
class RewriteJob:
    """A shard, and where its state goes. `entry` is the manifest's, None where the dataset has none."""

    path: Path
    before: PlannedShard
    entry: ShardEntry | None
    state: Path


@dataclass(frozen=True)
class ShardState:
    """The state of a shard, as it stands in the file `path`; each command adds what it has done to it."""

    path: Path
    before: PlannedShard
    bytes: int
    entry: ShardEntry | None

    @property
    def records(self) -> int:
        return self.before.records - self.before.purged

    @property
    def grown(self) -> int:
        """Bytes that the contents of the records grew by, without their frames."""
        return self.bytes - self.before.bytes + (HEADER_BYTES + FOOTER_BYTES) * self.before.purged

    def offsets(self) -> UInt64Array:
        """The byte offsets of the records, where the shard was written again."""
        return load_array(self.path.with_suffix(".npy"))

    def write(self) -> None:
        """Write what isn't in the plan."""
        write_json(self.path, {name: value for name, value in asdict(self).items() if name not in ("path", "before")})


State = TypeVar("State", bound=ShardState)


def read_state(job: RewriteJob, kind: type[State]) -> State | None:
    """The state of a shard that is done, or None."""
    if not job.state.exists():
        return None
    known = {field.name for field in fields(kind)}  # an earlier version wrote more
    values = {name: value for name, value in read_json(job.state).items() if name in known}
    state = from_json(kind, {**values, "path": job.state, "before": job.before}, str(job.state))
    return state if job.path.stat().st_size == state.bytes else None


def find_records(job: RewriteJob, wanted: UInt64Array, values: Iterable[bytes], doing: str) -> npt.NDArray[np.int64]:
    """Where each record's value stands in `wanted` (`tables.digests`), -1 where it doesn't: int64[records].

    Raises UserError when the shard has another number of records than the dataset says; `doing` is what must wait.
    """
    places, records = find_each(wanted, values), job.before.records
    if len(places) != records:
        raise UserError(
            f"{job.path} holds {len(places):,} records where dataset_info.json says {records:,}: run clipkit verify, "
            f"and {doing} when the dataset is whole"
        )
    return places


def rewrite(job: RewriteJob, records: Iterable[bytes], state_of: Callable[[int, ShardEntry | None], State]) -> State:
    """Write the shard again with these records, and then its state; `state_of` gets the bytes and the entry that it has
    now.
    """
    with write_beside(job.path) as temporary:
        with RecordWriter(temporary) as writer:
            offsets = [writer.write(record) for record in records]
        entry = job.entry
        if entry is not None:
            entry = replace(entry, records=writer.records, bytes=writer.bytes, crc32c=writer.crc32c)
        state = state_of(writer.bytes, entry)
        save_array(state.path.with_suffix(".npy"), np.array(offsets, np.uint64))
        state.write()
    return state
