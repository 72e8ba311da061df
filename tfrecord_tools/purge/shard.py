"""What a purge has set out to do, and what a worker does with one shard of it: find the records that are to go, and
write it without them.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.formats.dataset import DatasetLayout, Rewrite
from clipkit.formats.features import Feature, find_image
from clipkit.formats.kinds import own_name
from clipkit.formats.manifest import ShardEntry, SourceEntry
from clipkit.formats.records import decode_example, read_examples, read_records
from clipkit.storage.files import local_copy, write_beside
from clipkit.tfrecord_tools.pictures.sniff import image_format
from clipkit.tfrecord_tools.purge.removals import hash_named
from clipkit.tfrecord_tools.reasons import PURGED
from clipkit.tfrecord_tools.rewriting.plan import RewritePlan, rewrite_jobs
from clipkit.tfrecord_tools.rewriting.shard import RewriteJob, ShardState, find_records, read_state, rewrite
from clipkit.tfrecord_tools.tables.digests import value_bytes

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PurgePlan(RewritePlan):
    """A purge by its name. `computed` counts the records whose hash was computed from the stored image.

    `values` is the hash of what was read from the list, which depends on its quoting too; an older clipkit has none.
    """

    command: ClassVar[Rewrite] = "purge"

    purge: str
    list_path: str
    list_sha256: str
    by: str
    computed: int
    values: str = ""


@dataclass(frozen=True)
class Matches:
    """The records of a shard that are in the list: int64[2, n], their numbers, and where their values stand in the
    list's array.

    `computed` counts the records whose hash had to be computed from the stored image.
    """

    records_2N: Int64Array
    computed: int


@dataclass(frozen=True)
class ValueReader:
    """Reads from a record the value that is looked for in the list."""

    by: str
    image: str | None
    columns: frozenset[str]

    @classmethod
    def of(cls, by: str, features: Mapping[str, Feature]) -> "ValueReader":
        """Raises UserError for a hash that is neither a column nor can be computed."""
        image = find_image(features)
        if by not in features and image is None:
            raise UserError(
                f"the dataset has neither a column {by!r} nor an image to compute it from: choose another --by"
            )
        return cls(by, image, frozenset(features))

    @property
    def column(self) -> str:
        """The column of the records that is compared."""
        return own_name(self.columns, self.by)

    def keys(self) -> list[str]:
        """The columns to decode."""
        needed = [self.column] if self.column in self.columns else []
        return needed + ([self.image] if hash_named(self.by) and self.image is not None else [])

    def value(self, values: Mapping[str, list[Any]]) -> tuple[bytes, bool]:
        """The record's value, b"" when it has none, and whether it was computed from the stored image's bytes."""
        value, name = value_bytes((values.get(self.column) or [None])[0]), hash_named(self.by)
        if name is None:
            return value, False
        image = values.get(self.image or "")
        if image and not value:
            return hashlib.new(name, image[0]).hexdigest().encode(), True
        return value.strip().lower(), False


def search_shard(job: RewriteJob, reader: ValueReader, wanted: Path) -> Matches:
    """Look at every record of a shard. `wanted` is the file of the list's array, mapped and so shared by the workers.

    Raises UserError when the shard isn't what the dataset says, or is damaged.
    """
    computed = 0

    def values(local: Path) -> Iterator[bytes]:
        nonlocal computed
        for _, columns in read_examples(local, keys=reader.keys()):
            value, was_computed = reader.value(columns)
            computed += was_computed
            yield value

    with local_copy(wanted) as array, local_copy(job.path) as local:
        places = find_records(job, np.load(array, mmap_mode="r"), values(local), "purge")
    numbers = np.flatnonzero(places >= 0)
    return Matches(np.stack([numbers, places[numbers]]), computed)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PurgeJob(RewriteJob):
    """A shard to rewrite, and the numbers of the records to remove."""

    reader: ValueReader
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class PurgedShard(ShardState):
    """The state of a shard without the removed records; `columns` counts how many of these had each column.

    They stand in a file beside it, for there may be millions.
    """

    columns: dict[str, int]

    def removed_records(self) -> Iterator[dict[str, Any]]:
        """The removed records: number, value, key, url, sha256, source; one at a time."""
        with local_copy(self.path.with_suffix(".jsonl")) as local, local.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def purge_jobs(layout: DatasetLayout, plan: PurgePlan, reader: ValueReader, numbers: Int64Array) -> list[PurgeJob]:
    """The shards to rewrite, in the plan's order; `numbers` are those of the records to remove, shard after shard."""
    ends = np.cumsum([shard.purged for shard in plan.shards], dtype=np.int64)
    return [
        PurgeJob(**vars(job), reader=reader, numbers=tuple(part.tolist()))
        for job, part in zip(rewrite_jobs(layout, plan), np.split(numbers, ends), strict=False)
    ]


def purge_shard(job: PurgeJob) -> PurgedShard:
    """Write the shard without those records, unless an earlier run has; return its state."""
    done = read_state(job, PurgedShard)
    if done is not None:
        return done
    removal = _Removal(job)
    with local_copy(job.path) as local:
        # Another worker may have done this very shard a moment ago: its numbers then mean other records.
        if local.stat().st_size != job.before.bytes:
            raise _changed(job)
        return rewrite(job, removal.records_left(local), removal.state)


class _Removal:
    """Takes the records of a job out of a shard, and counts what goes with them."""

    def __init__(self, job: PurgeJob) -> None:
        self.job = job
        self.formats: Counter[str] = Counter()
        self.columns: Counter[str] = Counter()
        # Records lie in the order of their sources; where a build has shuffled them, a shard has none (see `purge`).
        self.sources = job.entry.sources if job.entry else ()
        self.ends = list(accumulate(source.records for source in self.sources))
        self.purged = [0] * len(self.sources)

    def records_left(self, local: Path) -> Iterator[bytes]:
        """The other records; those that go are listed beside the state. Raises UserError when there are others."""
        left, reader, number = set(self.job.numbers), self.job.reader, -1
        with (
            write_beside(self.job.state.with_suffix(".jsonl")) as list_path,
            list_path.open("w", encoding="utf-8") as lines,
        ):
            for number, record in enumerate(read_records(local)):
                if number not in left:
                    yield record
                    continue
                left.remove(number)
                source = None
                if (place := bisect_right(self.ends, number)) < len(self.sources):
                    self.purged[place] += 1
                    source = self.sources[place].file
                values = decode_example(record)
                image = values.get(reader.image or "")
                self.columns.update(values.keys())
                self.formats[(image_format(image[0]) if image else None) or "unknown"] += 1
                line = {"number": number, **_description(values, reader), "source": source}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            if left or number + 1 != self.job.before.records:
                raise _changed(self.job)

    def state(self, size: int, entry: ShardEntry | None) -> PurgedShard:
        """The state when all is written."""
        if entry is not None:
            formats = {name: count - self.formats[name] for name, count in entry.formats.items()}
            formats = {name: count for name, count in formats.items() if count > 0}
            sources = tuple(map(without, self.sources, self.purged))
            entry = replace(entry, formats=formats, sources=sources)
        return PurgedShard(self.job.state, self.job.before, size, entry, dict(sorted(self.columns.items())))


def _changed(job: PurgeJob) -> UserError:
    return UserError(f"{job.path} was changed while it was purged: run the same command again")


def _description(values: Mapping[str, list[Any]], reader: ValueReader) -> dict[str, str | None]:
    """What a record was found by and what it was, without the image and the caption."""

    def text(column: str) -> str | None:
        items = values.get(own_name(values, column))
        value = items[0] if items else None
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else None if value is None else str(value)

    value = reader.value(values)[0].decode("utf-8", "replace")
    return {"value": value, "key": text("key") or text("file_name"), "url": text("url"), "sha256": text("sha256")}


def without(source: SourceEntry, purged: int) -> SourceEntry:
    """The account of a source of which `purged` more records were removed."""
    if not purged:
        return source
    skipped = {**source.skipped, PURGED: source.skipped.get(PURGED, 0) + purged}
    return replace(source, records=source.records - purged, skipped=dict(sorted(skipped.items())))
