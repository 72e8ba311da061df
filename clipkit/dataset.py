"""A dataset directory opened for reading any record at any time.

The directory is TFDS's own, so this also opens what TFDS itself wrote (ImageNet, for one). Opening reads the metadata
alone: shards are opened when first needed and closed when too many are open, and the index of record offsets is mapped
into memory, so that ten million records cost no more than ten. A dataset in an object store is read by ranges.

Records are read with `pread` and not through a mapping of the shard: a mapped shard counts as the process's own memory,
and one that is cut short while it is in use kills the process where `pread` gives an error that can be told.
"""

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import UserError
from clipkit.features import Feature, parse_features
from clipkit.files import as_path, disk_errors, is_remote, local_copy, read_json
from clipkit.manifest import CLIPKIT_FOLDER, SplitManifest, index_path, read_manifest
from clipkit.records import RecordError, decode_example, index_records, unframe
from clipkit.remote import as_upath

# Far below the usual limit of 1,024 open files, with room for a loader's workers of the same process.
_MAX_OPEN = 128


@dataclass(frozen=True)
class ShardFile:
    """One TFRecord file. `bytes` is its size when the dataset was opened."""

    file: str
    records: int
    bytes: int


class _Open:
    """A file descriptor that is closed when its last user lets go of it, whichever thread that is."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.bytes = os.fstat(self.descriptor).st_size

    def read(self, length: int, offset: int) -> bytes:
        # A method, so that the object outlives the call: with the bare descriptor in hand it could be closed before.
        return os.pread(self.descriptor, length, offset)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _OpenRemote:
    """The same for an object of a store, which is asked for each range."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = path.stat().st_size

    def read(self, length: int, offset: int) -> bytes:
        target = as_upath(self.path)
        with disk_errors(self.path):
            data: bytes = target.fs.cat_file(target.path, start=offset, end=offset + length)
        return data


class Dataset:
    """One split of a dataset directory; made by `open_dataset`.

    Reading is safe from several threads. A pickled dataset opens its files anew in the process that unpickles it.
    """

    def __init__(
        self, path: Path, name: str, split: str, features: Mapping[str, Feature], shards: Sequence[ShardFile]
    ) -> None:
        self.path, self.name, self.split = path, name, split
        self.features = dict(features)
        self.shards = tuple(shards)
        self._start()

    def _start(self) -> None:
        self._ends = list(accumulate(shard.records for shard in self.shards))
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Open | _OpenRemote] = OrderedDict()
        self._index = _load_index(self.path, self.split, self.num_records)
        self._found: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def num_records(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return self.num_records

    def __repr__(self) -> str:
        return f"<Dataset {self.name}/{self.split}: {self.num_records} records in {len(self.shards)} shards>"

    def locate(self, i: int) -> tuple[int, int]:
        """The number of the shard that holds record `i`, and the record's number in it."""
        if not 0 <= i < self.num_records:
            raise IndexError(f"record {i} of {self.num_records}")
        shard = bisect_right(self._ends, i)
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def key(self, i: int) -> str:
        """A name for record `i` that stays: "shard's file:number in the shard"."""
        shard, number = self.locate(i)
        return f"{self.shards[shard].file}:{number}"

    def offsets(self, shard: int) -> np.ndarray:
        """Byte offsets of a shard's records, uint64[records]. Found by reading the headers where there is no index."""
        if self._index is not None:
            end = self._ends[shard]
            return self._index[end - self.shards[shard].records : end]
        found = self._found.get(shard)
        if found is None:
            file = self.shards[shard]
            with local_copy(self.path / file.file) as local:
                found = index_records(local)
            if len(found) != file.records:
                raise UserError(
                    f"{self.path / file.file} holds {len(found)} records where dataset_info.json says {file.records}: "
                    "fetch the shard again"
                )
            self._found[shard] = found
        return found

    def read(self, i: int) -> bytes:
        """The bytes of record `i`, CRC checked. Raises RecordError when damaged, UserError when its shard is gone."""
        shard, number = self.locate(i)
        file = self.shards[shard]
        offsets = self.offsets(shard)
        start = int(offsets[number])
        end = int(offsets[number + 1]) if number + 1 < file.records else file.bytes
        framed = self._opened(shard).read(end - start, start)
        return unframe(framed, start, self.path / file.file)

    def example(self, i: int) -> dict[str, Any]:
        """Record `i` by column: bytes for an image, str, int, float, a list of these, or None for a missing value."""
        record = self.read(i)
        try:
            values = decode_example(record)
        except ValueError as error:
            shard, number = self.locate(i)
            offset = int(self.offsets(shard)[number])
            raise RecordError(self.path / self.shards[shard].file, offset, str(error)) from error
        return {name: _value(feature, values.get(name)) for name, feature in self.features.items()}

    def label_names(self, column: str = "label") -> list[str] | None:
        """Class names in label order, from the file that TFDS keeps beside; None where there is none."""
        path = self.path / f"{column}.labels.txt"
        return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else None

    def _opened(self, shard: int) -> _Open | _OpenRemote:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                path = self.path / self.shards[shard].file
                try:
                    file = _OpenRemote(path) if is_remote(path) else _Open(path)
                except FileNotFoundError as error:
                    raise UserError(f"{path} is gone: put the shard back or build it anew") from error
                if file.bytes != self.shards[shard].bytes:  # the offsets are those of another file
                    raise UserError(
                        f"{path} has changed since the dataset was opened (clipkit purge?): run the command again"
                    )
                self._open[shard] = file
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
            return file


def _value(feature: Feature, values: list[Any] | None) -> Any:
    if values is None:
        return None
    if feature.kind == "text":
        values = [value.decode("utf-8", errors="replace") for value in values]
    elif feature.kind == "bool":
        values = [bool(value) for value in values]
    if feature.is_list:
        return values
    return values[0] if values else None


def _load_index(folder: Path, split: str, records: int) -> np.ndarray | None:
    path = index_path(folder, split)
    if not path.exists():
        return None
    try:
        if is_remote(path):
            with local_copy(path) as local:
                index = np.load(local)
        else:
            # A plain view: indexing an np.memmap costs three times as much.
            index = np.asarray(np.load(path, mmap_mode="r" if records else None))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} isn't an index ({error}): remove it and run clipkit build-tfds again") from error
    if index.shape != (records,):
        raise UserError(
            f"{path} knows {index.size} records where the shards hold {records}: run clipkit build-tfds again"
        )
    return index


@dataclass(frozen=True)
class Layout:
    """What the metadata of a dataset directory say, before any shard is looked at.

    `lengths` are the records of each shard by split, as dataset_info.json has them, and `files` the shards' names.
    """

    folder: Path
    name: str
    features: dict[str, Feature]
    lengths: dict[str, list[int]]
    files: dict[str, list[str]]
    manifest: dict[str, SplitManifest]

    def differs(self, split: str) -> bool:
        """Whether the manifest counts other shards or records than dataset_info.json."""
        manifest = self.manifest.get(split)
        return manifest is not None and [shard.records for shard in manifest.shards] != self.lengths[split]


def read_layout(path: Path) -> Layout:
    """Read the metadata of the dataset at `path`: the version's directory, or a parent that holds exactly one dataset.

    Raises UserError where there is no dataset or no metadata that is TFDS's.
    """
    folder = _find(path)
    info = read_json(folder / "dataset_info.json")
    try:
        lengths = {part["name"]: [int(n) for n in part.get("shardLengths", [])] for part in info["splits"]}
        templates = {part["name"]: part.get("filepathTemplate", "") for part in info["splits"]}
        name = str(info["name"])
        features = parse_features(read_json(folder / "features.json"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} has metadata that isn't TFDS's ({error!r}): build the dataset anew") from error
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise UserError(f"{folder} holds {file_format} files and clipkit reads tfrecord: convert it with TFDS")
    manifest = read_manifest(folder)
    files = {
        split: [shard.file for shard in manifest[split].shards]
        if split in manifest
        else _file_names(name, split, len(lengths[split]), templates[split])
        for split in lengths
    }
    return Layout(folder, name, features, lengths, files, manifest)


def open_dataset(path: Path | str, split: str = "train") -> Dataset:
    """Open one split of the dataset at `path`: the version's directory, or a parent that holds exactly one dataset.

    Raises UserError, each naming what is wrong: no metadata, a build or a purge that hasn't finished, no such split,
    shards that are missing or whose size isn't the manifest's.
    """
    layout = read_layout(as_path(path))
    folder, lengths = layout.folder, layout.lengths
    if split not in lengths:
        raise UserError(f"{folder} has no split {split!r}: choose one of {', '.join(sorted(lengths)) or 'none'}")
    if journal_path(folder).exists():
        raise UserError(f"{folder}: a purge isn't finished, run the same clipkit purge command again")
    if layout.differs(split):
        raise UserError(f"{folder}: dataset_info.json and clipkit/manifest.json differ: build the dataset anew")
    manifest = layout.manifest.get(split)
    sizes = [shard.bytes for shard in manifest.shards] if manifest else [None] * len(lengths[split])
    shards = [
        ShardFile(file, records, _checked_size(folder / file, size))
        for file, records, size in zip(layout.files[split], lengths[split], sizes, strict=True)
    ]
    return Dataset(folder, layout.name, split, layout.features, shards)


def journal_path(folder: Path) -> Path:
    """Where `clipkit purge` keeps what it has begun: while the file is there, shards and metadata may not agree."""
    return folder / CLIPKIT_FOLDER / "purge.json"


def _find(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"dataset {path} doesn't exist: check the path, or make it with clipkit build-tfds")
    found = sorted(file.parent for depth in ("", "*/", "*/*/") for file in path.glob(f"{depth}dataset_info.json"))
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} datasets: name one of them, such as {found[0]}")
    if found and (found[0] / "features.json").is_file():
        return found[0]
    if any(any(path.glob(f"{depth}{CLIPKIT_FOLDER}/build-*")) for depth in ("", "*/", "*/*/")):
        raise UserError(f"{path} isn't finished: run the same clipkit build-tfds command again to go on")
    lacking = "features.json" if found else "dataset_info.json"
    raise UserError(f"{path} has no {lacking}, so it isn't a dataset: make one with clipkit build-tfds")


def _file_names(name: str, split: str, count: int, template: str) -> list[str]:
    template = template or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    words = {"DATASET": name, "SPLIT": split, "FILEFORMAT": "tfrecord", "NUM_SHARDS": f"{count:05d}"}
    return [
        template.format_map({**words, "SHARD_INDEX": f"{i:05d}", "SHARD_X_OF_Y": f"{i:05d}-of-{count:05d}"})
        for i in range(count)
    ]


def _checked_size(path: Path, expected: int | None) -> int:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"shard {path} is missing: put it back or build it anew") from error
    if expected is not None and size != expected:
        raise UserError(
            f"shard {path} has {size} bytes where the manifest says {expected}: fetch it again or build it anew"
        )
    return size
