"""Labelled images from where people have them: a TFDS directory, a folder for each class, parquet files, or tars.

All give the same thing: a list of keys and labels that is known at once, and the encoded images in that order.
An option that a kind can't heed is refused, for a number that looks as if it had been heeded is a wrong one.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.config import nearest
from clipkit.errors import UserError
from clipkit.eval.classification.images import LabelledImages, sizes_of
from clipkit.eval.classification.labels import enumerate_labels, is_missing, listed_labels, number_names
from clipkit.eval.classification.webdataset import from_tars
from clipkit.formats.dataset import below, open_dataset
from clipkit.formats.features import find_image
from clipkit.formats.folders import (
    EVALUATED,
    aside_text,
    choose_split,
    class_folders,
    empty_classes_text,
    files_beside,
    find_layout,
    holds_class_folders,
    list_images,
    printable,
    split_of,
    unwrap,
)
from clipkit.formats.shards import ALL_SPLITS, ShardKind, ShardListing, list_shards
from clipkit.formats.tables import find_image_column, image_bytes, open_parquet, table_errors
from clipkit.pixels.images import ImageError, read_encoded
from clipkit.storage.files import read_json
from clipkit.storage.stores import StoredFile

KINDS = "CLASS/IMAGE.jpg, a TFDS directory, parquet files, or webdataset tars with .cls"


def open_labelled(
    data: Path,
    *,
    label: str = "label",
    split: str | None = None,
    allow_empty_classes: bool = False,
    default_splits: Sequence[str] = EVALUATED,
) -> LabelledImages:
    """Open labelled images of any kind.

    Without `split` the first of `default_splits` that is there is taken; the result's name says which.
    Raises UserError when `data` is of no such kind, has no such split or label, or holds no image, and for an option
    that its kind can't heed.
    """
    if not data.exists():
        raise UserError(f"data {data} doesn't exist: give {KINDS}")
    if data.name in ("", ".."):
        data = data.resolve()
    splits = tfds_splits(data) if data.is_dir() else None
    shards = None if splits is not None else _find_shards(data, split, default_splits)
    if splits is None and shards is None:
        refuse_option("--label", label != "label", f"{data} is a folder of class folders, whose names are the labels")
        return from_folder(data, split, allow_empty_classes, default_splits)
    refuse_option("--allow-empty-classes", allow_empty_classes, f"{data} holds no class folders")
    if shards is None:
        images = from_tfds(data, label, choose_split(splits or (), split, default_splits) or split or "train")
    else:
        said = said_split(data, shards, split)
        files = [shards.folder / file.name for file in shards.files]
        read = from_tars if shards.kind == "tars" else from_parquet
        images = read(files, *named_split(data, said), label)
        images = replace(images, notes=(*shards.notes, *images.notes))
    return images if label == "label" else replace(images, path=images.path / label, name=f"{images.name}-{label}")


def said_split(data: Path, shards: ShardListing, split: str | None) -> str:
    """The split that shards are of, as their names say it. Raises UserError where another one is asked for."""
    said = ALL_SPLITS if split == ALL_SPLITS else shards.split
    if split and said not in (split, split_of(split)):
        raise UserError(f"{data} has no split {split!r}: its files are {f'of {said}' if said else 'of no split'}")
    return said


def named_split(data: Path, said: str) -> tuple[Path, str]:
    """Where the shards of a split are, and what the task is called."""
    if data.is_file():
        return data, data.stem
    return (data / said, f"{data.name}-{said}") if said else (data, data.name)


def _find_shards(data: Path, split: str | None, default: Sequence[str]) -> ShardListing | None:
    """The parquet files or tars that the labelled images are in; None for a folder of class folders.

    Tables of file names, and archives that class folders were unpacked from, lie beside those: they are passed by.
    """
    if data.is_file():
        refuse_option("--split", split, f"{data} is a file")
        kind: ShardKind = "tars" if data.suffix.lower() == ".tar" else "parquet"
        return ShardListing(data.parent, kind, (StoredFile(data.name, data.stat().st_size),))

    wanted = split or (*default, "")
    if (found := find_parquet(data, wanted)) is not None:
        return found
    if holds_class_folders(data) or not (below(data, "*.parquet") or below(data, "*.tar")):
        return None
    found = list_shards(data, wanted, has_images)
    return found if found is not None and found.kind in ("parquet", "tars") else None


def find_parquet(data: Path, wanted: str | Sequence[str]) -> ShardListing | None:
    """The parquet files with images of a folder itself; None where it has none."""
    for folder in (data, data / "data"):  # as Hugging Face has it, pictures for the README beside
        found = list_shards(folder, wanted, has_images, inside=True) if any(folder.glob("*.parquet")) else None
        if found is not None and found.kind == "parquet":
            return found
    return None


def has_images(folder: Path, file: StoredFile) -> bool:
    """Whether a parquet file has a column of images."""
    with table_errors(folder / file.name):
        return find_image_column(open_parquet(folder / file.name).schema_arrow) is not None


def refuse_option(option: str, given: object, why: str) -> None:
    """Raise UserError when an option was given that can't be heeded."""
    if given:
        raise UserError(f"{option} can't be heeded: {why}: leave it out")


def from_parquet(paths: Sequence[Path], origin: Path, name: str, label: str) -> LabelledImages:
    """A row an image: a column of encoded bytes (or Hugging Face's `{bytes, path}`), and the column `label`.

    A column that Hugging Face's metadata call a ClassLabel has its names from there.
    """
    files: list[tuple[Path, pq.ParquetFile, str]] = []
    keys: list[str] = []
    values: list[Any] = []
    for path in paths:
        with table_errors(path):
            file = open_parquet(path)
            schema = file.schema_arrow
            if label not in schema.names:
                raise UserError(f"{path} has no column {label!r}: {nearest(label, schema.names)} (option --label)")
            of_file = file.read(columns=[label])[label].to_pylist()
        image = find_image_column(schema)
        if image is None:
            columns = ", ".join(schema.names)
            raise UserError(f"{path} has no column of encoded images ({columns}): name the column `image`")
        lacking = next((row for row, value in enumerate(of_file) if is_missing(value)), None)
        if lacking is not None:
            raise UserError(f"{path} row {lacking} has no {label!r}: leave out the rows without a label")
        listed = class_label_names(schema, label)
        if files and listed != class_label_names(files[0][1].schema_arrow, label):
            raise UserError(f"{path} and {paths[0]} have other class names in {label!r}: evaluate one at a time")
        files.append((path, file, image))
        keys += [f"{path.name}:{row}" if len(paths) > 1 else str(row) for row in range(len(of_file))]
        values += of_file
    if not values:
        raise UserError(f"{paths[0]} has no rows: nothing to classify")
    labels = enumerate_labels(values, f"{origin} column {label!r}")
    if listed and labels.are_numbers:
        labels = listed_labels(labels, listed, f"{origin} column {label!r}")

    def read() -> Iterator[bytes]:
        for path, file, image in files:
            with table_errors(path):
                for batch in file.iter_batches(batch_size=256, columns=[image]):
                    yield from map(image_bytes, batch.column(0).to_pylist())

    return LabelledImages(origin, name, keys, *labels, read, files=sizes_of(paths))


def class_label_names(schema: pa.Schema, label: str) -> list[str] | None:
    """The class names that Hugging Face's datasets write into a parquet file's metadata; None without any."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = info["info"]["features"][label]
        names = feature.get("feature", feature)["names"]  # of a list of labels, those of its elements
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return names if isinstance(names, list) and all(isinstance(each, str) for each in names) else None


def from_folder(
    path: Path, split: str | None, allow_empty_classes: bool = False, default_splits: Sequence[str] = EVALUATED
) -> LabelledImages:
    """A folder for each class, images of any depth inside; or such a set in a folder for each split.

    Which folders are splits, which are classes, and which files are images is told by `clipkit.formats.folders`.
    """
    root, name, notes = _find_split(path, split, default_splits)
    folders = class_folders(root)
    listings = [list_images(folder) for folder in folders]
    images = [
        (folder.name, image.name) for folder, each in zip(folders, listings, strict=True) for image in each.images
    ]
    sizes = [image.size for each in listings for image in each.images]
    aside = sum((each.aside for each in listings), files_beside(root))
    if not images:
        found = f" ({aside_text(aside)})" if aside else ""
        raise UserError(f"{root} holds no class folders with images{found}: give {KINDS}")
    empty = {
        printable(folder.name): f"{folder} has {aside_text(each.aside) or 'no files'}"
        for folder, each in zip(folders, listings, strict=True)
        if not each.images
    }
    if empty and not allow_empty_classes:
        remedy = "put images there, remove the folder, or give --allow-empty-classes"
        raise UserError(f"{empty_classes_text(empty)}: {remedy}")
    if empty:
        notes = (*notes, empty_classes_text(empty))
    if aside:
        notes = (*notes, f"{root}: files left aside: {aside_text(aside)}")
    labels = enumerate_labels([printable(folder.name) for folder in folders], str(root))

    def read() -> Iterator[bytes | ImageError]:
        return (read_encoded(root / folder / file) for folder, file in images)

    keys = [printable(f"{folder}/{file}") for folder, file in images]
    return LabelledImages(
        root,
        name,
        keys,
        np.repeat(labels.labels_N, [len(each.images) for each in listings]),
        *labels[1:],
        read,
        notes,
        files=list(zip(keys, sizes, strict=True)),
    )


def _find_split(path: Path, split: str | None, default: Sequence[str]) -> tuple[Path, str, tuple[str, ...]]:
    """The folder with the classes of a split, the task's name, and notes."""
    if split and (path / split).is_dir():
        return unwrap(path / split), f"{path.name}-{split}", ()
    layout = find_layout(path)
    chosen = choose_split(layout.splits, split, default)
    if chosen is None and not (split or layout.splits):
        return layout.root, path.name, layout.notes
    if chosen is None:
        there = ", ".join(layout.splits) or "no split folders"
        raise UserError(f"{path} has no split {split or default[0]!r}: it has {there} (option --split)")
    root = layout.splits[chosen]
    return root, f"{path.name}-{root.relative_to(layout.root).parts[0]}", layout.notes


def from_tfds(path: Path, label: str, split: str) -> LabelledImages:
    """A TFDS directory: the image is `image` or `jpg`, the label a ClassLabel, a number or a text."""
    dataset = open_dataset(path, split=split)
    if not dataset.num_records:
        raise UserError(f"{dataset.path} split {dataset.split} has no records: choose another with --split")
    columns = list(dataset.features)
    if label not in columns:
        raise UserError(f"{dataset.path} has no feature {label!r}: {nearest(label, columns)} (option --label)")
    image = find_image(dataset.features)
    if image is None:
        raise UserError(f"{dataset.path} has no image feature among {', '.join(columns)}: give a dataset of images")
    values: list[Any] = []
    for index in range(dataset.num_records):
        value = dataset.example(index)[label]
        if is_missing(value):
            raise UserError(f"{dataset.path} record {dataset.key(index)} has no {label!r}: leave such records out")
        values.append(value)
    labels = enumerate_labels(values, f"{dataset.path} feature {label!r}")
    classes = dataset.features[label].num_classes
    if classes is not None:
        listed = dataset.label_names(label)
        names, named = (tuple(listed), True) if listed else number_names(classes)
        labels = listed_labels(labels, names, str(dataset.path))._replace(named=named)

    def read() -> Iterator[bytes]:
        for index in range(dataset.num_records):
            yield dataset.example(index).get(image) or b""

    keys = [dataset.key(index) for index in range(dataset.num_records)]
    name = f"{dataset.name}-{dataset.split}"
    files = [(f"{shard.file}:{shard.crc32c}", shard.bytes) for shard in dataset.shards]
    return LabelledImages(dataset.path / dataset.split, name, keys, *labels, read, files=files)


def tfds_splits(path: Path) -> list[str] | None:
    """The splits of the TFDS dataset at `path` or up to two folders below, or None when there is no such dataset.

    Hugging Face's `save_to_disk` writes a `dataset_info.json` too, whose splits are an object, null or absent.
    """
    for file in below(path, "dataset_info.json"):
        info = read_json(file)
        splits = info.get("splits") if isinstance(info, dict) else None
        if isinstance(splits, list) and all(isinstance(entry, dict) for entry in splits):
            return [str(entry.get("name", "")) for entry in splits]
    return None
