"""The files around the records that make a dataset of them: index, skipped samples, manifest, and TFDS's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from clipkit.formats.features import Feature, Kind
from clipkit.formats.kinds import EMPTY_LIST, LIST
from clipkit.formats.manifest import CLIPKIT_FOLDER, index_path
from clipkit.storage.files import load_array, write_beside
from clipkit.storage.stores import reading
from clipkit.tfrecord_tools.build.shard import ShardJob, ShardState

IMAGE_COLUMN, CAPTION_COLUMN = "jpg", "txt"


def kinds_of(features: Mapping[str, Feature]) -> dict[str, str]:
    """The kinds of the columns that a dataset has already."""
    return {
        name: (LIST if feature.is_list else "") + feature.kind
        for name, feature in features.items()
        if name not in (IMAGE_COLUMN, CAPTION_COLUMN)
    }


def features_of(
    states: Sequence[ShardState], kinds: Mapping[str, str], known: Mapping[str, Feature]
) -> dict[str, Feature]:
    """The columns as `features.json` declares them; optional where any record of any split lacks a value."""
    records = sum(state.shard.records for state in states)
    features = {IMAGE_COLUMN: Feature("image"), CAPTION_COLUMN: Feature("text")}
    for column, kind in kinds.items():
        present = sum(state.present.get(column, 0) for state in states)
        optional = present < records or (bool(known) and (column not in known or known[column].optional))
        if kind == EMPTY_LIST:
            features[column] = Feature("text", is_list=True)
        elif kind.startswith(LIST):
            features[column] = Feature(cast(Kind, kind.removeprefix(LIST)), is_list=True)
        else:
            features[column] = Feature("int" if kind == "bool" and optional else cast(Kind, kind), optional)
    return features


def write_index(folder: Path, split: str, offsets: Sequence[Path], records: int) -> None:
    """The offsets of all shards in one file, written through the disk's cache: 400 million take 3.2 GB."""
    with write_beside(index_path(folder, split)) as temporary:
        index = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=(records,))
        start = 0
        for path in offsets:
            part = load_array(path)
            index[start : start + len(part)] = part
            start += len(part)
        index.flush()
        del index


def write_skipped(folder: Path, split: str, job_list: Sequence[ShardJob]) -> None:
    """One JSON line for each sample that was left out, so that it can be looked at or fetched again."""
    with write_beside(folder / CLIPKIT_FOLDER / f"skipped-{split}.jsonl") as temporary, temporary.open("wb") as file:
        for job in job_list:
            path = job.beside(f".skipped-{split}.jsonl")
            with reading(path):
                file.write(path.read_bytes())
