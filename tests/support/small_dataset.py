"""Dataset directories for tests, written record by record without a build, so that each byte of them is chosen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from image_shards import picture

from clipkit.formats.dataset import shard_name
from clipkit.formats.features import Feature
from clipkit.formats.manifest import ShardEntry, SourceEntry, SplitManifest, index_path, write_manifest
from clipkit.formats.records import RecordWriter, encode_example
from clipkit.storage.files import write_beside
from clipkit.tfrecord_tools.pictures.sniff import image_format
from clipkit.tfrecord_tools.writing.metadata import write_metadata

PAIR_FEATURES = {
    "jpg": Feature("image"),
    "txt": Feature("text"),
    "url": Feature("text"),
    "key": Feature("text"),
    "similarity": Feature("float", optional=True),
}


def jpg(number: int) -> bytes:
    """The image of a pair: the first twenty are all different, which neighbours of `picture` may not be."""
    return picture(number * 12)


def pair_columns(number: int, **changes: Any) -> dict[str, Any]:
    """The columns of one image-text record; `changes` replaces some, None takes one out."""
    columns = {
        "jpg": jpg(number),
        "txt": f"picture number {number}",
        "url": f"http://example.org/{number}.jpg",
        "key": f"{number:09d}",
        "similarity": number / 8,
    }
    return {**columns, **changes}


def write_dataset(
    folder: Path,
    splits: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    features: Mapping[str, Feature] = PAIR_FEATURES,
    *,
    name: str = "pairs",
    manifest: bool = True,
    image: str = "jpg",
) -> Path:
    """Write the splits' shards of records, and the metadata; without `manifest` what TFDS would write, and no more."""
    told = {}
    for split, shards in splits.items():
        entries, index = [], []
        for number, records in enumerate(shards):
            path = folder / shard_name(name, split, number, len(shards))
            formats: dict[str, int] = {}
            with write_beside(path) as temporary, RecordWriter(temporary) as writer:
                for columns in records:
                    index.append(writer.write(encode_example(columns)))
                    kind = image_format(columns[image]) or "unknown"
                    formats[kind] = formats.get(kind, 0) + 1
            source = SourceEntry(f"{number:05d}.tar", 1000, len(records) + 1, len(records), {"no-caption": 1})
            checksum = f"{writer.checksum:08x}"
            entries.append(ShardEntry(path.name, writer.records, writer.bytes, checksum, (source,), formats))
        told[split] = SplitManifest(tuple(entries))
        if manifest:
            with write_beside(index_path(folder, split)) as temporary, temporary.open("wb") as file:
                np.save(file, np.array(index, np.uint64))
    if manifest:
        write_manifest(folder, told)
    write_metadata(folder, name, features, told)
    return folder


def write_pairs(folder: Path, counts: Sequence[int], **how: Any) -> Path:
    """A split `train` of shards with so many pairs each, numbered through."""
    shards, first = [], 0
    for count in counts:
        shards.append([pair_columns(first + i) for i in range(count)])
        first += count
    return write_dataset(folder, {"train": shards}, **how)
