"""What a worker of `clipkit purge` does with one shard: find the records that are to go, and write it without them.

A shard is rewritten beside its place; its new account (`ShardState`) is written before it is renamed. So a shard that
has the size of its account is done, one that hasn't is as it was, and either way the next run knows what to do.
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
from clipkit.formats.features import Feature
from clipkit.formats.manifest import ShardEntry, SourceEntry
from clipkit.formats.records import RecordWriter, decode_example, read_records
from clipkit.storage.files import local_copy, read_json, write_beside, write_json
from clipkit.tfrecord_tools.pictures.sniff import image_format
from clipkit.tfrecord_tools.purge.removals import HASHES, find
from clipkit.tfrecord_tools.reasons import PURGED

BATCH = 4096


@dataclass(frozen=True)
class Target:
    """One shard as the dataset tells it: `records` and `bytes`, and the manifest's entry where there is one."""

    path: Path
    split: str
    records: int
    bytes: int
    entry: ShardEntry | None


@dataclass(frozen=True)
class Match:
    """The records of a shard that are in the list: their numbers, and where their values stand in the list's array.

    `computed` counts the records whose hash had to be computed from the stored image.
    """

    numbers: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    computed: int


@dataclass(frozen=True)
class ShardState:
    """The account of a rewritten shard. `contents` are the bytes of the removed records without their frames, and
    `columns` how many of these had each column.

    The removed records stand in a file beside it (`read_removed`), for there may be millions.
    """

    records: int
    bytes: int
    entry: ShardEntry | None
    contents: int
    removed: int
    columns: dict[str, int]


@dataclass(frozen=True)
class Values:
    """How the value that the list is compared with is read from a record."""

    by: str
    image: str | None
    columns: frozenset[str]

    @classmethod
    def of(cls, by: str, features: Mapping[str, Feature]) -> "Values":
        """Raises UserError for a hash that is neither a column nor can be computed."""
        image = next((name for name, f in features.items() if f.kind == "image" and not f.is_list), None)
        if by not in features and image is None:
            raise UserError(
                f"the dataset has neither a column {by!r} nor an image to compute it of: choose another --by"
            )
        return cls(by, image, frozenset(features))

    def keys(self) -> list[str]:
        """The columns to decode."""
        needed = [self.by] if self.by in self.columns else []
        return needed + ([self.image] if self.by in HASHES and self.image is not None else [])

    def value(self, values: Mapping[str, list[Any]]) -> tuple[bytes, bool]:
        """The record's value, b"" when it has none, and whether it was computed of the stored image's bytes."""
        items = values.get(self.by)
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


def find_records(target: Target, values: Values, wanted: Path) -> Match:
    """Look at every record of a shard. `wanted` is the file of the list's array, mapped and so shared by the workers.

    Raises UserError when the shard isn't what the dataset says, or is damaged.
    """
    keys = values.keys()
    numbers: list[int] = []
    places: list[int] = []
    computed = number = 0
    with local_copy(wanted) as array, local_copy(target.path) as local:
        entries = np.load(array, mmap_mode="r")
        batch: list[bytes] = []
        for record in read_records(local):
            value, was_computed = values.value(decode_example(record, keys))
            computed += was_computed
            batch.append(value)
            if len(batch) == BATCH:
                _note(find(entries, batch), number, numbers, places)
                number += len(batch)
                batch = []
        _note(find(entries, batch), number, numbers, places)
        number += len(batch)
    if number != target.records:
        raise UserError(
            f"{target.path} holds {number:,} records where dataset_info.json says {target.records:,}: "
            "run clipkit verify, and purge when the dataset is whole"
        )
    return Match(np.array(numbers, np.int64), np.array(places, np.int64), computed)


def _note(found: npt.NDArray[np.int64], first: int, numbers: list[int], places: list[int]) -> None:
    hits = np.flatnonzero(found >= 0)
    numbers += (hits + first).tolist()
    places += found[hits].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PurgeJob:
    """A shard, the numbers of the records to take out, and where its account goes."""

    target: Target
    values: Values
    numbers: tuple[int, ...]
    state: Path


def purge_shard(job: PurgeJob) -> ShardState:
    """Write the shard without those records, unless an earlier run has; return its account."""
    state = read_state(job)
    return _rewrite(job) if state is None else state


def read_state(job: PurgeJob) -> ShardState | None:
    """The account of a shard that is rewritten, or None when it still is as it was."""
    if not job.state.exists():
        return None
    told = read_json(job.state)
    if job.target.path.stat().st_size != told["bytes"]:
        return None
    entry = ShardEntry.from_dict(told["entry"]) if told["entry"] else None
    return ShardState(told["records"], told["bytes"], entry, told["contents"], told["removed"], told["columns"])


def _rewrite(job: PurgeJob) -> ShardState:
    target, doomed = job.target, set(job.numbers)
    offsets: list[int] = []
    removed = contents = 0
    gone: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    sources = _Sources(target.entry)
    with write_beside(target.path) as temporary:
        with (
            RecordWriter(temporary) as writer,
            local_copy(target.path) as local,
            write_beside(removed_path(job.state)) as list_path,
            list_path.open("w", encoding="utf-8") as lines,
        ):
            # Another worker may have done this very shard a moment ago: its numbers then mean other records.
            if local.stat().st_size != target.bytes:
                raise _changed(target)
            for number, record in enumerate(read_records(local)):
                source = sources.next(number in doomed)
                if number not in doomed:
                    offsets.append(writer.write(record))
                    continue
                values = decode_example(record)
                columns.update(values.keys())
                image = values.get(job.values.image or "")
                gone[(image_format(image[0]) if image else None) or "unknown"] += 1
                contents += len(record)
                removed += 1
                line = {"number": number, **_description(values, job.values), "source": source}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        if removed != len(doomed) or writer.records + removed != target.records:
            raise _changed(target)
        entry = target.entry
        if entry is not None:
            formats = {name: count - gone[name] for name, count in entry.formats.items() if count > gone[name]}
            checksum = f"{writer.checksum:08x}"
            entry = replace(entry, records=writer.records, bytes=writer.bytes, crc32c=checksum, formats=formats)
            entry = replace(entry, sources=sources.left())
        state = ShardState(writer.records, writer.bytes, entry, contents, removed, dict(sorted(columns.items())))
        with write_beside(offsets_path(job.state)) as path, path.open("wb") as file:
            np.save(file, np.array(offsets, np.uint64))
        write_json(job.state, asdict(state))
    return state


def _changed(target: Target) -> UserError:
    return UserError(f"{target.path} was changed while it was purged: run the same command again")


def offsets_path(state: Path) -> Path:
    """Where the byte offsets of a rewritten shard's records wait for the index of its split."""
    return state.with_suffix(".npy")


def removed_path(state: Path) -> Path:
    """Where the removed records of a shard are described, a JSON line each."""
    return state.with_suffix(".jsonl")


def read_removed(state: Path) -> Iterator[dict[str, Any]]:
    """The removed records of a shard: number, value, key, url, sha256, source; one at a time."""
    with local_copy(removed_path(state)) as local, local.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _description(values: Mapping[str, list[Any]], how: Values) -> dict[str, str | None]:
    """What a record was found by and what it was, without the image and the caption."""

    def text(column: str) -> str | None:
        items = values.get(column)
        value = items[0] if items else None
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else None if value is None else str(value)

    value = how.value(values)[0].decode("utf-8", "replace")
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
        return tuple(less(source, purged) for source, purged in zip(self.sources, self.purged, strict=True))


def less(source: SourceEntry, purged: int) -> SourceEntry:
    """A source of which so many records more are gone."""
    if not purged:
        return source
    skipped = {**source.skipped, PURGED: source.skipped.get(PURGED, 0) + purged}
    return replace(source, records=source.records - purged, skipped=dict(sorted(skipped.items())))
