"""What a worker of `clipkit purge` does with one shard: find the records that are to go, and write it without them.

A shard is rewritten beside its place; its new state (`RewrittenShard`) is written before it is renamed. So a shard that
has the size that its state gives is done, any other is as it was, and either way the next run knows what to do.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.formats.features import Feature, find_image
from clipkit.formats.kinds import own_name
from clipkit.formats.manifest import ShardEntry, SourceEntry
from clipkit.formats.records import RecordWriter, decode_example, read_records
from clipkit.storage.files import load_array, local_copy, read_json, save_array, write_beside, write_json
from clipkit.tfrecord_tools.pictures.sniff import image_format
from clipkit.tfrecord_tools.purge.removals import HASHES
from clipkit.tfrecord_tools.reasons import PURGED
from clipkit.tfrecord_tools.tables.digests import find

BATCH = 4096


@dataclass(frozen=True)
class SearchJob:
    """One shard to look through, as the dataset's metadata describe it."""

    path: Path
    split: str
    records: int
    bytes: int


@dataclass(frozen=True)
class Matches:
    """The records of a shard that are in the list: their numbers, and where their values stand in the list's array.

    `computed` counts the records whose hash had to be computed from the stored image.
    """

    numbers: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
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
        return needed + ([self.image] if self.by in HASHES and self.image is not None else [])

    def value(self, values: Mapping[str, list[Any]]) -> tuple[bytes, bool]:
        """The record's value, b"" when it has none, and whether it was computed from the stored image's bytes."""
        items = values.get(self.column)
        if items:
            value = items[0] if isinstance(items[0], bytes) else str(items[0]).encode()
            if self.by not in HASHES:
                return value, False
            if value:
                return value.strip().lower(), False
        image = values.get(self.image or "")
        if self.by in HASHES and image:
            return hashlib.new(self.by, image[0]).hexdigest().encode(), True
        return b"", False


def find_records(job: SearchJob, reader: ValueReader, wanted: Path) -> Matches:
    """Look at every record of a shard. `wanted` is the file of the list's array, mapped and so shared by the workers.

    Raises UserError when the shard isn't what the dataset says, or is damaged.
    """
    keys = reader.keys()
    numbers: list[int] = []
    places: list[int] = []
    computed = number = 0
    with local_copy(wanted) as array, local_copy(job.path) as local:
        entries = np.load(array, mmap_mode="r")
        batch: list[bytes] = []
        for record in read_records(local):
            value, was_computed = reader.value(decode_example(record, keys))
            computed += was_computed
            batch.append(value)
            if len(batch) == BATCH:
                _note(find(entries, batch), number, numbers, places)
                number += len(batch)
                batch = []
        _note(find(entries, batch), number, numbers, places)
        number += len(batch)
    if number != job.records:
        raise UserError(
            f"{job.path} holds {number:,} records where dataset_info.json says {job.records:,}: "
            "run clipkit verify, and purge when the dataset is whole"
        )
    return Matches(np.array(numbers, np.int64), np.array(places, np.int64), computed)


def _note(found: npt.NDArray[np.int64], first: int, numbers: list[int], places: list[int]) -> None:
    hits = np.flatnonzero(found >= 0)
    numbers += (hits + first).tolist()
    places += found[hits].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PurgeJob:
    """A shard as it was, the numbers of the records to remove, and where its state goes.

    `entry` is the manifest's, None where the dataset has no manifest.
    """

    path: Path
    records: int
    bytes: int
    entry: ShardEntry | None
    reader: ValueReader
    numbers: tuple[int, ...]
    state: Path


@dataclass(frozen=True)
class RewrittenShard:
    """The state of a shard that was rewritten, as it stands in the file `path`.

    `contents` are the bytes of the removed records without their frames, and `columns` how many of these had each
    column. The new offsets and the removed records stand in files beside it, for there may be millions.
    """

    path: Path
    records: int
    bytes: int
    entry: ShardEntry | None
    contents: int
    removed: int
    columns: dict[str, int]

    def offsets(self) -> npt.NDArray[np.uint64]:
        """The byte offsets of the records that are left."""
        return load_array(self.path.with_suffix(".npy"))

    def removed_records(self) -> Iterator[dict[str, Any]]:
        """The removed records: number, value, key, url, sha256, source; one at a time."""
        with local_copy(self.path.with_suffix(".jsonl")) as local, local.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def purge_shard(job: PurgeJob) -> RewrittenShard:
    """Write the shard without those records, unless an earlier run has; return its state."""
    if job.state.exists():
        values = read_json(job.state)
        if job.path.stat().st_size == values["bytes"]:
            values["entry"] = ShardEntry.from_dict(values["entry"]) if values["entry"] else None
            return RewrittenShard(job.state, **values)
    return _rewrite(job)


def _rewrite(job: PurgeJob) -> RewrittenShard:
    remove = set(job.numbers)
    offsets: list[int] = []
    removed = contents = 0
    formats_removed: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    sources = _Sources(job.entry)
    with write_beside(job.path) as temporary:
        with (
            RecordWriter(temporary) as writer,
            local_copy(job.path) as local,
            write_beside(job.state.with_suffix(".jsonl")) as list_path,
            list_path.open("w", encoding="utf-8") as lines,
        ):
            # Another worker may have done this very shard a moment ago: its numbers then mean other records.
            if local.stat().st_size != job.bytes:
                raise _changed(job)
            for number, record in enumerate(read_records(local)):
                source = sources.next(number in remove)
                if number not in remove:
                    offsets.append(writer.write(record))
                    continue
                values = decode_example(record)
                columns.update(values.keys())
                image = values.get(job.reader.image or "")
                formats_removed[(image_format(image[0]) if image else None) or "unknown"] += 1
                contents += len(record)
                removed += 1
                line = {"number": number, **_description(values, job.reader), "source": source}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        if removed != len(remove) or writer.records + removed != job.records:
            raise _changed(job)
        entry = job.entry
        if entry is not None:
            left = {name: count - formats_removed[name] for name, count in entry.formats.items()}
            entry = replace(
                entry,
                records=writer.records,
                bytes=writer.bytes,
                crc32c=writer.crc32c,
                formats={name: count for name, count in left.items() if count > 0},
                sources=sources.left(),
            )
        state = RewrittenShard(
            job.state, writer.records, writer.bytes, entry, contents, removed, dict(sorted(columns.items()))
        )
        save_array(job.state.with_suffix(".npy"), np.array(offsets, np.uint64))
        write_json(job.state, {name: value for name, value in asdict(state).items() if name != "path"})
    return state


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


class _Sources:
    """Takes purged records off the sources that they came from: records lie in the order of their sources.

    Where a build has shuffled them, the manifest has no sources in its shards (see `purge`).
    """

    def __init__(self, entry: ShardEntry | None) -> None:
        self.sources = list(entry.sources) if entry else []
        self.purged = [0] * len(self.sources)
        self.place, self.used = 0, 0

    def next(self, purged: bool) -> str | None:
        """The source of the next record in order; one more of it is gone if `purged`."""
        while self.place < len(self.sources) and self.used >= self.sources[self.place].records:
            self.place, self.used = self.place + 1, 0
        if self.place >= len(self.sources):
            return None
        self.used += 1
        self.purged[self.place] += purged
        return self.sources[self.place].file

    def left(self) -> tuple[SourceEntry, ...]:
        """The sources with what is left of them."""
        return tuple(without(source, purged) for source, purged in zip(self.sources, self.purged, strict=True))


def without(source: SourceEntry, purged: int) -> SourceEntry:
    """The account of a source of which `purged` more records were removed."""
    if not purged:
        return source
    skipped = {**source.skipped, PURGED: source.skipped.get(PURGED, 0) + purged}
    return replace(source, records=source.records - purged, skipped=dict(sorted(skipped.items())))
