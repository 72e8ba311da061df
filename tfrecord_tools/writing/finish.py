"""The one end of every dataset: index, list of skipped samples, manifest, and TFDS's own files, in this order."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from clipkit.formats.features import Feature, Kind
from clipkit.formats.kinds import EMPTY_LIST, LIST
from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest, index_path, write_manifest
from clipkit.storage.files import write_beside
from clipkit.storage.stores import reading
from clipkit.tfrecord_tools.writing.metadata import write_metadata

IMAGE_COLUMN, CAPTION_COLUMN = "jpg", "txt"


def kinds_of(features: Mapping[str, Feature]) -> dict[str, str]:
    """The kinds of the columns that a dataset has already."""
    return {
        name: (LIST if feature.is_list else "") + feature.kind
        for name, feature in features.items()
        if name not in (IMAGE_COLUMN, CAPTION_COLUMN)
    }


def feature_of(kind: str, optional: bool) -> Feature:
    """A column of a kind as `features.json` declares it (see `metadata` for missing values)."""
    if kind == EMPTY_LIST:
        return Feature("text", is_list=True)
    if kind.startswith(LIST):
        return Feature(cast(Kind, kind.removeprefix(LIST)), is_list=True)
    return Feature("int" if kind == "bool" and optional else cast(Kind, kind), optional)


def pair_features(
    kinds: Mapping[str, str],
    present: Iterable[Mapping[str, int]],
    records: int,
    known: Mapping[str, Feature] | None = None,
) -> dict[str, Feature]:
    """The columns of image-text pairs; optional where any record of any split lacks a value.

    `present` counts each column's values in each of the shards, which hold `records` in all; `known` are the columns
    that the dataset's other splits have already.
    """
    values: Counter[str] = Counter()
    for counts in present:
        values.update(counts)
    features = {IMAGE_COLUMN: Feature("image"), CAPTION_COLUMN: Feature("text")}
    for column, kind in kinds.items():
        elsewhere = bool(known) and (column not in (known or {}) or (known or {})[column].optional)
        features[column] = feature_of(kind, values[column] < records or elsewhere)
    return features


def write_index(folder: Path, split: str, offsets: Iterable[npt.NDArray[np.uint64]], records: int) -> None:
    """The offsets of all shards in one file, written through the disk's cache: 400 million take 3.2 GB."""
    with write_beside(index_path(folder, split)) as temporary:
        index = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=(records,))
        start = 0
        for part in offsets:
            index[start : start + len(part)] = part
            start += len(part)
        index.flush()
        del index


def write_skipped(folder: Path, split: str, parts: Iterable[Path]) -> None:
    """One JSON line for each sample that was left out, of all shards, to be looked at or fetched again."""
    with write_beside(folder / CLIPKIT_FOLDER / f"skipped-{split}.jsonl") as temporary, temporary.open("wb") as file:
        for part in parts:
            with reading(part):
                file.write(part.read_bytes())


def finish_dataset(
    folder: Path,
    name: str,
    features: Mapping[str, Feature],
    splits: Mapping[str, SplitManifest],
    offsets: Mapping[str, Iterable[npt.NDArray[np.uint64]]],
    **metadata: Any,
) -> None:
    """Write what stands around the shards, `dataset_info.json` last: then the dataset is whole.

    `splits` are all that the dataset has, `offsets` those of the shards of the splits that are new; `metadata` is as in
    `write_metadata`. Raises UserError when the disk or the store refuses.
    """
    for split, parts in offsets.items():
        write_index(folder, split, parts, splits[split].records)
    write_manifest(folder, splits)
    write_metadata(folder, name, features, splits, **metadata)
