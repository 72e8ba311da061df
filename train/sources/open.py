"""What `--data` names: the kind is told from what is there, it is opened, and several are mixed.

A dataset directory, a folder of webdataset tars, of parquet files with images, or of images with a table; on a disk or
in a store. What is in a store, and parquet, is read through a cache on the local disk.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.captions import source_columns
from clipkit.formats.dataset import below, open_dataset, refuse_unfinished_download, unfinished
from clipkit.formats.folders import holds_class_folders
from clipkit.formats.manifest import precomputed_columns
from clipkit.formats.shards import ALL_SPLITS, SHARD_SUFFIXES, ShardListing, describe_files, list_shards
from clipkit.formats.tables import is_image, is_table
from clipkit.storage.cache import BlockCache, scratch_cache
from clipkit.storage.files import as_path, is_remote
from clipkit.storage.stores import list_folder, list_subfolders, reading
from clipkit.train.sources.ahead import read_ahead
from clipkit.train.sources.features import describe_features, open_features
from clipkit.train.sources.folder import FolderSource, open_folder
from clipkit.train.sources.mixture import Member, Mixture
from clipkit.train.sources.parquets import ParquetSource, has_images, open_parquets
from clipkit.train.sources.source import (
    IMAGE_FIELD,
    LABEL_FIELD,
    LABELLED_IMAGE,
    TEXT_FIELD,
    LabelledSource,
    RecordSource,
    Source,
    class_captions,
)
from clipkit.train.sources.tars import TarSource, open_tars
from clipkit.train.teachers.stored import ReinforcedSource, Stored

CACHE_GB = 10.0
KINDS = "a dataset directory, tars, parquet files with images, or images with a table of captions"


FileSource = TarSource | ParquetSource | FolderSource


@dataclass(frozen=True)
class DataOption:
    """One `--data`: where, and its weight, None for one by its size."""

    path: Path
    weight: Fraction | None


@dataclass(frozen=True)
class OpenedSource:
    """One source that was found. `identity` is what decides its order and its records, beside the seed."""

    path: Path
    make: Callable[[bool, bool], Source]
    """With the token ids and word classes that it holds; with the stored vectors of its captions."""
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()
    """A line each on what is there and isn't read."""
    features: dict[str, Any] | None = None
    """What made the vectors that it has in the place of images."""
    files: Callable[[], str] | None = None
    """Makes a hash of a dataset directory's files, which its identity doesn't have: it may be built again, or moved."""


@dataclass(frozen=True)
class Data:
    """All that a run is trained on, opened."""

    parts: tuple[OpenedSource, ...]
    weights: tuple[Fraction, ...]
    stored: Stored | None = None
    """The teachers' embeddings that go with each sample."""
    stored_texts: bool = False
    """Whether stored vectors stand in the place of captions, as they do in that of images."""

    def source(self, precomputed: bool = False) -> Source:
        """What the loader reads from; `precomputed`: with the token ids and word classes that a dataset holds."""
        sources = [part.make(precomputed, self.stored_texts) for part in self.parts]
        if len(sources) == 1:
            return sources[0] if self.stored is None else ReinforcedSource(sources[0], self.stored)
        labels = [part.path.name for part in self.parts]
        if len(set(labels)) < len(labels):
            labels = [str(part.path) for part in self.parts]
        return Mixture([Member(*member) for member in zip(sources, self.weights, labels, strict=True)])

    @property
    def num_records(self) -> int:
        return sum(int(part.identity["records"]) for part in self.parts)

    @property
    def has_images(self) -> bool:
        """Whether there are images, and no stored vectors in their place."""
        return not any(part.features for part in self.parts)

    @property
    def notes(self) -> list[str]:
        """A line each on what is there and isn't read."""
        return [note for part in self.parts for note in part.notes]

    def identity(self) -> dict[str, Any]:
        """What decides the order of the data, beside the seed, as JSON values."""
        if len(self.parts) == 1:
            teachers = {} if self.stored is None else {"reinforced": self.stored.manifest.digest()}
            return {**self.parts[0].identity, **teachers}
        shares = [weight / sum(self.weights) for weight in self.weights]
        members = zip(self.parts, shares, strict=True)
        return {"mixture": [{**part.identity, "weight": str(share)} for part, share in members]}

    def places(self) -> str | list[str]:
        """Where the data are: one path, or several."""
        paths = [str(part.path if is_remote(part.path) else part.path.resolve()) for part in self.parts]
        return paths[0] if len(paths) == 1 else paths


def parse_data(text: str | Path) -> DataOption:
    """`PATH` or `PATH=WEIGHT`; what exists under the whole text is a path. Raises UserError for a bad weight."""
    name, equals, weight = str(text).rpartition("=")
    if not equals or not name or isinstance(text, Path) or Path(text).exists():
        return DataOption(as_path(text), None)
    try:
        value = Fraction(weight)
        if value <= 0:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--data {text}: the weight {weight!r} isn't a number above 0: write PATH=0.7") from None
    return DataOption(as_path(name), value)


def open_source(
    data: str | Path | Sequence[str | Path],
    *,
    cache: Path | None = None,
    cache_gb: float = CACHE_GB,
    block_size: int = 64,
    split: str = "train",
) -> Data:
    """Open what one `--data` or several name: of each its `split`, where it has several.

    Blocks of `block_size` neighbours of what is in a store, and decoded parquet, go into a cache of at most `cache_gb`
    (10**9 bytes): in the folder `cache`, where they stay and local data are put too; else in a temporary one that all
    ranks of this machine share, which is gone with the last of them.
    Raises UserError for a weight that isn't a number, for weights given only to some, and whatever the kinds raise.
    """
    several = data if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    wanted = [parse_data(name) for name in several]
    if not wanted:
        raise UserError("no --data given: name a dataset folder")
    if len({option.weight is None for option in wanted}) > 1:
        raise UserError("some --data have a weight and some don't: write PATH=WEIGHT for all of them, or for none")
    if not (cache_gb > 0 and math.isfinite(cache_gb)):
        raise UserError(f"--cache-gb is {cache_gb}: give a number of gigabytes above 0")
    opener = _Opener(cache, round(cache_gb * 1e9), block_size, [str(option.path) for option in wanted], split)
    parts = tuple(opener.open(option.path) for option in wanted)
    weights = tuple(
        Fraction(int(part.identity["records"])) if option.weight is None else option.weight
        for part, option in zip(parts, wanted, strict=True)
    )
    return Data(parts, weights)


class _Opener:
    """Opens one source after the other, with one cache for all, made when the first one needs it."""

    def __init__(self, folder: Path | None, limit: int, block_size: int, names: Sequence[str], split: str) -> None:
        self.folder, self.limit, self.block_size, self.names = folder, limit, block_size, names
        self.split = split
        self.made: BlockCache | None = None

    def cache(self) -> BlockCache:
        if self.made is None:
            if self.folder is None:
                # Ranks of one run find each other by what they read, and by who started them.
                run = os.environ.get("TORCHELASTIC_RUN_ID", "")
                self.made = scratch_cache(" ".join([*self.names, run, str(self.block_size)]), self.limit)
            else:
                self.made = BlockCache(self.folder, self.limit)
        return self.made

    def cache_for(self, path: Path) -> BlockCache | None:
        """The cache for files that are read in pieces: local ones need none unless it was asked for."""
        return self.cache() if is_remote(path) or self.folder is not None else None

    def open(self, path: Path) -> OpenedSource:
        """Raises UserError where nothing is that clipkit reads."""
        with reading(path):
            if _is_dataset(path):
                return self.open_directory(path)
            if not path.exists():
                raise UserError(f"{path} doesn't exist: check the path, or make a dataset with clipkit build-tfds")
            features = describe_features(path)
            if features is not None:
                return self.open_features(path, features)
            refuse_unfinished_download(path if path.is_dir() else path.parent)
            found = _one_file(path) if path.is_file() else list_shards(path, self.split, has_images)
            if found is None or found.kind == "tfrecords":
                there = describe_files(path) if path.is_dir() else ""
                lacking = f"{path} isn't a dataset, and holds nothing else to train on{there}: {remedy(path)}"
                raise UserError(unfinished(path) or lacking)
            return self.open_files(path, found)

    def open_files(self, path: Path, found: ShardListing) -> OpenedSource:
        folder, files = found.folder, found.files
        # An index is of all the folder's files of a kind, or of those that one path or one split names.
        suffix = f"-{path.name}" if path.is_file() else f"-{self.split}" if found.is_part else ""
        source: FileSource
        if found.kind == "tars":
            source = open_tars(folder, files, self.cache_for(folder), self.block_size, f"tars{suffix}")
            return self.opened(path, "tars", found, source, self.block_size)
        if found.kind == "parquet":
            source = open_parquets(folder, files, self.cache(), f"parquet{suffix}")
            return self.opened(path, "parquet", found, source, self.block_size)
        return self.opened(path, "folder", found, open_folder(folder, files[0], self.cache_for(folder)), 1)

    def open_features(self, path: Path, about: dict[str, Any]) -> OpenedSource:
        file = next(file for file in list_folder(path.parent) if file.name == path.name)
        found = ShardListing(path.parent, "parquet", (file,))
        without, with_texts = (
            self.opened(path, "features", found, source, self.block_size)
            for source in (open_features(path, file, about["width"], self.cache(), each) for each in (False, True))
        )
        return replace(
            without,
            make=lambda computed, texts: (with_texts if texts else without).make(computed, texts),
            identity={**without.identity, "image_weights": about["image_weights"]},
            features=about,
        )

    def open_directory(self, path: Path) -> OpenedSource:
        if self.split == ALL_SPLITS:
            raise UserError(f"--split {ALL_SPLITS}: name one split of the dataset {path}")
        dataset = open_dataset(path, self.split, cache=self.cache_for(path), block_records=self.block_size)
        identity = {"name": dataset.name, "split": dataset.split, "records": dataset.num_records}

        def files() -> str:
            return hash_of_files((shard.file, shard.bytes, shard.crc32c) for shard in dataset.shards)

        ahead = partial(read_ahead, cached=dataset, block_records=self.block_size)
        if IMAGE_FIELD in dataset.features and TEXT_FIELD in dataset.features:
            columns = precomputed_columns(dataset.options, dataset.features)
            added = source_columns(dataset.features)
            return OpenedSource(
                dataset.path,
                lambda computed, _: ahead(
                    RecordSource(dataset, precomputed=columns if computed else None, added=added)
                ),
                identity,
                files=files,
            )
        if LABELLED_IMAGE in dataset.features and LABEL_FIELD in dataset.features:
            labelled = ahead(LabelledSource(dataset, class_captions(dataset)))
            return OpenedSource(dataset.path, lambda *_: labelled, identity, files=files)
        raise UserError(
            f"{dataset.path} has neither {IMAGE_FIELD} and {TEXT_FIELD} nor {LABELLED_IMAGE} and {LABEL_FIELD} "
            f"({', '.join(dataset.features)}): train on pairs, or on labelled images"
        )

    def opened(
        self, path: Path, kind: str, found: ShardListing, source: FileSource, block_records: int
    ) -> OpenedSource:
        identity = {
            "name": path.name,
            "kind": kind,
            "records": source.num_records,
            "files": hash_of_files((file.name, file.bytes) for file in found.files),
        }
        ahead = read_ahead(source, source, block_records)
        return OpenedSource(path, lambda *_: ahead, identity, found.notes)


def hash_of_files(described: Iterable[tuple[object, ...]]) -> str:
    """Of the names of files with what tells one from another of the same name."""
    listing = " ".join(":".join(map(str, each)) for each in described)
    return hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()


def remedy(path: Path) -> str:
    """What to do with a path that holds nothing to train on."""
    if not path.is_dir():
        return f"clipkit reads {KINDS}"
    names = [file.name for file in list_folder(path)]
    if not names and not list_subfolders(path):
        return "it is empty: check the path, or make a dataset there with clipkit build-tfds"
    if any(map(is_image, names)):
        return "put a table beside the images, metadata.csv with the columns file_name and caption"
    if not is_remote(path) and holds_class_folders(path):
        return (
            "where its folders are classes, make a dataset of them with clipkit build-imagenet; where they are only "
            "folders of images, put a table into it, metadata.csv with the columns file_name and caption"
        )
    return f"clipkit reads {KINDS}"


def _one_file(path: Path) -> ShardListing | None:
    files = tuple(file for file in list_folder(path.parent) if file.name == path.name)
    kind = SHARD_SUFFIXES.get(path.suffix)
    if kind == "parquet" and not has_images(path.parent, files[0]):
        kind = None
    if kind is None and is_table(path):
        kind = "table"
    return ShardListing(path.parent, kind, files) if kind is not None else None


def _is_dataset(path: Path) -> bool:
    """Whether a dataset is at or below a path, finished or not: `open_dataset` finds it or says what is wrong."""
    return bool(below(path, "dataset_info.json") or below(path, "clipkit/build-*"))
