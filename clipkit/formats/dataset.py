"""A dataset directory opened for reading any record at any time.

The directory is TFDS's own, so this also opens what TFDS itself wrote (ImageNet, for one). Opening reads only the
metadata: shards are opened when first needed and closed when too many are open, and the index of record offsets is
mapped into memory, so that ten million records cost no more than ten. A dataset in an object store is read by ranges;
with a cache, in blocks of neighbouring records that all processes of the machine share.
"""

import contextlib
import io
import re
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipkit.errors import UserError
from clipkit.formats.features import Feature, parse_features
from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest, index_path, read_manifest
from clipkit.formats.records import RecordError, decode_example, index_records, unframe
from clipkit.storage.cache import BlockCache, CachedRanges
from clipkit.storage.files import as_path, is_remote, local_copy, read_json
from clipkit.storage.ranges import RangeReader, Reopenable, read_whole
from clipkit.storage.stores import StoredFile, list_folder, reading

Rewrite = Literal["purge", "add-captions"]
REWRITES: dict[Rewrite, str] = {"purge": "a purge", "add-captions": "adding captions"}

VERSION = "1.0.0"  # of every dataset: the folder below its name


@dataclass(frozen=True)
class ShardFile:
    """One TFRecord file. `bytes` is its size when the dataset was opened, `crc32c` what the manifest says, or "".

    `version` tells it from a later file of the same name and size, for what is kept of it in a cache.
    """

    file: str
    records: int
    bytes: int
    crc32c: str = ""
    version: str = ""


class ShardedRecords(Reopenable):
    """Records of shards, numbered one shard behind the other, and read by ranges of bytes.

    With a `cache`, `block_records` neighbours are got at once and kept in it: those whose numbers agree but for what is
    left of a division by `block_records`, as far as they are in one shard.
    """

    cache: BlockCache | None
    block_records: int

    def _open(self, folder: Path, files: Sequence[StoredFile], counts: Sequence[int]) -> None:
        self._ends = list(accumulate(counts))
        self._files = RangeReader(folder, files)
        self._blocks = CachedRanges(self._files, self.cache) if self.cache else None

    @abstractmethod
    def _range(self, shard: int, first: int, last: int) -> tuple[int, int]:
        """The bytes of the records [first, last) of a shard."""

    @property
    def num_records(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, i: int) -> tuple[int, int]:
        """The number of the shard that holds record `i`, and the record's number in it."""
        if not 0 <= i < self.num_records:
            raise IndexError(f"record {i} of {self.num_records}")
        shard = bisect_right(self._ends, i)
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def key(self, i: int) -> str:
        """A name for record `i` that stays: "shard's file:number in the shard"."""
        shard, number = self.locate(i)
        return f"{self._files.files[shard].name}:{number}"

    def fill(self, i: int) -> int:
        """Get the block of record `i` into the cache, where there is one; returns the first record behind the block.

        Raises UserError when the shard is gone or can't be read.
        """
        shard, _ = self.locate(i)
        if self._blocks is not None:
            self._blocks.fill(shard, self._block(i))
        return min((i // self.block_records + 1) * self.block_records, self._ends[shard])

    def _block(self, i: int) -> tuple[int, int]:
        """The bytes of the records that are got together with record `i`, in its shard."""
        shard, number = self.locate(i)
        first = number - i % self.block_records
        count = self._ends[shard] - i + number
        return self._range(shard, max(0, first), min(first + self.block_records, count))


class Dataset(ShardedRecords):
    """One split of a dataset directory; made by `open_dataset`. `cache` and `block_records` are as in ShardedRecords.

    Reading is safe from several threads. A pickled dataset opens its files again in the process that unpickles it.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        split: str,
        features: Mapping[str, Feature],
        shards: Sequence[ShardFile],
        cache: BlockCache | None = None,
        block_records: int = 64,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`options` are those that the split was built with, as the manifest has them."""
        self.path, self.name, self.split, self.options = path, name, split, dict(options or {})
        self.features = dict(features)
        self.shards = tuple(shards)
        self.cache, self.block_records = cache, block_records
        self._start()

    def _start(self) -> None:
        files = [StoredFile(shard.file, shard.bytes, shard.version) for shard in self.shards]
        self._open(self.path, files, [shard.records for shard in self.shards])
        self._index = self._load_index()
        self._found: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.num_records

    def __repr__(self) -> str:
        return f"<Dataset {self.name}/{self.split}: {self.num_records} records in {len(self.shards)} shards>"

    def offsets(self, shard: int) -> np.ndarray:
        """Byte offsets of a shard's records, uint64[records]. Found by reading the headers where there is no index."""
        if self._index is not None:
            end = self._ends[shard]
            return self._index[end - self.shards[shard].records : end]
        found = self._found.get(shard)
        if found is None:
            file = self.shards[shard]
            if self.cache is not None:
                key = f"offsets of {self.path / file.file} {file.bytes} {file.version}"
                found = np.frombuffer(self.cache.read(key, lambda: self._headers(shard).tobytes()), np.uint64)
            else:
                found = self._headers(shard)
            if len(found) != file.records:
                raise UserError(
                    f"{self.path / file.file} holds {len(found)} records where dataset_info.json says {file.records}: "
                    "fetch the shard again"
                )
            self._found[shard] = found
        return found

    def _headers(self, shard: int) -> np.ndarray:
        path = self.path / self.shards[shard].file
        try:
            with local_copy(path) as local:
                return index_records(local)
        except FileNotFoundError as error:
            raise UserError(f"{path} is gone: put the shard back or build it again") from error

    def read(self, i: int) -> bytes:
        """The bytes of record `i`, CRC checked. Raises RecordError when damaged, UserError when its shard is gone."""
        shard, number = self.locate(i)
        start, end = self._range(shard, number, number + 1)
        path = self.path / self.shards[shard].file
        if self._blocks is None:
            return unframe(self._files.read(shard, start, end), start, path)
        block = self._block(i)
        try:
            return unframe(self._blocks.read(shard, block, start, end), start, path)
        except RecordError:  # perhaps only in the cache
            self._blocks.drop(shard, block)
            return unframe(self._blocks.read(shard, block, start, end), start, path)

    def _range(self, shard: int, first: int, last: int) -> tuple[int, int]:
        offsets, file = self.offsets(shard), self.shards[shard]
        return int(offsets[first]), int(offsets[last]) if last < file.records else file.bytes

    def example(self, i: int) -> dict[str, Any]:
        """Record `i` by column: bytes for an image, str, int, float, a list of these, or None for a missing value."""
        record = self.read(i)
        try:
            values = decode_example(record)
        except ValueError as error:
            shard, number = self.locate(i)
            offset = int(self.offsets(shard)[number])
            raise RecordError(self.path / self.shards[shard].file, offset, str(error)) from error
        return {name: feature.value(values.get(name)) for name, feature in self.features.items()}

    def label_names(self, column: str = "label") -> list[str] | None:
        """Class names in label order, from the file that TFDS keeps beside; None where there is none."""
        path = self.path / f"{column}.labels.txt"
        names = path.read_text(encoding="utf-8").split("\n") if path.is_file() else None
        return names and [name.strip() for name in names if name.strip()]  # as TFDS reads them

    def _load_index(self) -> np.ndarray | None:
        path, records = index_path(self.path, self.split), self.num_records
        try:
            with reading(path):
                if is_remote(path):
                    index = _remote_index(path, self.cache)
                else:
                    # A plain view: indexing an np.memmap costs three times as much.
                    index = np.asarray(np.load(path, mmap_mode="r" if records else None))
        except FileNotFoundError:
            return None
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} isn't an index ({error}): remove it and run clipkit build-tfds again") from error
        if index.shape != (records,):
            raise UserError(
                f"{path} knows {index.size} records where the shards hold {records}: run clipkit build-tfds again"
            )
        return index


def _remote_index(path: Path, cache: BlockCache | None) -> np.ndarray:
    """The index, where there is a cache in a file of it, which all processes map."""
    status = path.stat()
    if cache is not None:
        file = cache.file(f"{path} {status.st_size} {status.st_mtime}", lambda: read_whole(path, status.st_size))
        with contextlib.suppress(FileNotFoundError):  # the cache is too small to keep it
            return np.asarray(np.load(file, mmap_mode="r"))
    return np.asarray(np.load(io.BytesIO(read_whole(path, status.st_size))))


@dataclass(frozen=True)
class DatasetLayout:
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


def check_name(name: str, what: str = "dataset name") -> str:
    """`name` itself. Raises UserError for a name that TFDS doesn't allow for a dataset or a split."""
    if not re.fullmatch(r"[a-zA-Z]\w*", name, re.ASCII):
        raise UserError(f"{what} {name!r}: TFDS allows a letter, then letters, digits and _ only; choose such a name")
    return name


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """The file name of one shard as TFDS's default template has it."""
    return f"{name}-{split}.tfrecord-{number:05d}-of-{count:05d}"


def read_layout(path: Path) -> DatasetLayout:
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
        raise UserError(f"{folder} has metadata that isn't TFDS's ({error!r}): build the dataset again") from error
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
    return DatasetLayout(folder, name, features, lengths, files, manifest)


def open_dataset(
    path: Path | str, split: str = "train", cache: BlockCache | None = None, block_records: int = 64
) -> Dataset:
    """Open one split of the dataset at `path`: the version's directory, or a parent that holds exactly one dataset.

    `cache` and `block_records` are as in `Dataset`.
    Raises UserError, each naming what is wrong: no metadata, a build or a purge that hasn't finished, no such split,
    shards that are missing or whose size isn't the manifest's.
    """
    layout = read_layout(as_path(path))
    folder, lengths = layout.folder, layout.lengths
    if split not in lengths:
        raise UserError(f"{folder} has no split {split!r}: choose one of {', '.join(sorted(lengths)) or 'none'}")
    refuse_unfinished_rewrite(folder)
    if layout.differs(split):
        raise UserError(f"{folder}: dataset_info.json and clipkit/manifest.json differ: build the dataset again")
    manifest = layout.manifest.get(split)
    count = len(lengths[split])
    known = [(shard.bytes, shard.crc32c) for shard in manifest.shards] if manifest else [(None, "")] * count
    # One listing: a thousand questions to a store would take a minute.
    stored = {file.name: file for file in list_folder(folder)}
    shards = [
        _checked_shard(folder / file, records, stored.get(file), expected, crc32c)
        for file, records, (expected, crc32c) in zip(layout.files[split], lengths[split], known, strict=True)
    ]
    options = manifest.options if manifest else None
    return Dataset(folder, layout.name, split, layout.features, shards, cache, block_records, options)


def journal_path(folder: Path, command: Rewrite) -> Path:
    """Where a command that writes shards again keeps what it has begun: while the file is there, shards and metadata
    may not agree."""
    return folder / CLIPKIT_FOLDER / f"{command}.json"


def refuse_unfinished_rewrite(folder: Path) -> None:
    """Raise UserError, which says how to go on, where a command has begun to write the shards in `folder` again."""
    for command, what in REWRITES.items():
        if journal_path(folder, command).exists():
            raise UserError(f"{folder}: {what} isn't finished, run the same clipkit {command} command again")


def _find(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"dataset {path} doesn't exist: check the path, or make it with clipkit build-tfds")
    found = find_dataset(path)
    if found is not None and (found / "features.json").is_file():
        return found
    begun = unfinished(path)
    if begun is not None:
        raise UserError(begun)
    lacking = "features.json" if found else "dataset_info.json"
    raise UserError(f"{path} has no {lacking}, so it isn't a dataset: make one with clipkit build-tfds")


def below(path: Path, pattern: str) -> list[Path]:
    """What matches a pattern in `path` or up to two folders below, where a dataset may be, sorted."""
    return sorted(found for depth in ("", "*/", "*/*/") for found in path.glob(f"{depth}{pattern}"))


def find_dataset(path: Path) -> Path | None:
    """The folder of the one dataset at or below a path, or None. Raises UserError when there are several."""
    found = [file.parent for file in below(path, "dataset_info.json")]
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} datasets: name one of them, such as {found[0]}")
    return found[0] if found else None


def refuse_unfinished_download(folder: Path) -> None:
    """Raise UserError for a folder that `clipkit download` hasn't finished: the rest would be lost without a word."""
    if is_unfinished_download(folder):
        raise UserError(_finish_download(folder))


def is_unfinished_download(folder: Path) -> bool:
    """Whether `clipkit download` has begun to write into a folder and hasn't come to its end."""
    return (folder / CLIPKIT_FOLDER / "plan.json").exists() and not (folder / CLIPKIT_FOLDER / "download.json").exists()


def _finish_download(folder: Path) -> str:
    return f"the download into {folder} isn't finished: run the same clipkit download command to its end"


def unfinished(path: Path) -> str | None:
    """One line on what was begun at or below `path` and has no metadata yet, and how to go on; None without any."""
    for memory in below(path, CLIPKIT_FOLDER):
        folder, works = memory.parent, sorted(memory.glob("build-*"))
        if (folder / "dataset_info.json").exists():
            continue
        if is_unfinished_download(folder):
            return _finish_download(folder)
        if works:
            plan = works[0] / "plan.json"  # what is in it tells the command
            command = "build-imagenet" if plan.exists() and "images" in read_json(plan) else "build-tfds"
            return f"{folder} isn't finished: run the same clipkit {command} command again to go on"
    return None


def _file_names(name: str, split: str, count: int, template: str) -> list[str]:
    template = template or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    words = {"DATASET": name, "SPLIT": split, "FILEFORMAT": "tfrecord", "NUM_SHARDS": f"{count:05d}"}
    return [
        template.format_map({**words, "SHARD_INDEX": f"{i:05d}", "SHARD_X_OF_Y": f"{i:05d}-of-{count:05d}"})
        for i in range(count)
    ]


def _checked_shard(path: Path, records: int, stored: StoredFile | None, expected: int | None, crc32c: str) -> ShardFile:
    if stored is None:
        raise UserError(f"shard {path} is missing: put it back or build it again")
    if expected is not None and stored.bytes != expected:
        raise UserError(
            f"shard {path} has {stored.bytes} bytes where the manifest says {expected}: fetch it again or build it "
            "again"
        )
    return ShardFile(path.name, records, stored.bytes, crc32c, crc32c or stored.version)
