"""Labelled images from where people have them: a TFDS directory, a folder for each class, or a parquet file.

The three give the same thing: a list of keys and labels that is known at once, and the encoded images in that order.
An option that a kind can't heed is refused, for a number that looks as if it had been heeded is a wrong one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.config import nearest
from clipkit.errors import UserError
from clipkit.eval.labels import enumerate_labels, is_missing, listed_labels, number_names
from clipkit.formats.dataset import below, open_dataset
from clipkit.formats.features import find_image
from clipkit.formats.folders import (
    aside_text,
    choose_split,
    class_folders,
    empty_classes_text,
    files_beside,
    find_layout,
    list_images,
    printable,
    unwrap,
)
from clipkit.formats.tables import find_image_column, open_parquet, table_errors
from clipkit.pixels.images import ImageError
from clipkit.storage.files import read_json


@dataclass(frozen=True)
class LabelledImages:
    """The images to classify. `labels_N` are places in `label_names`; `read()` yields the N encoded images in order."""

    path: Path
    """Where they are, down to the split, and the label where it isn't `label`."""
    name: str
    """For results and file names: the data's name, its split where it has several, the label where it isn't `label`."""
    keys: list[str]
    labels_N: NDArray[np.int64]
    label_names: tuple[str, ...]
    named: bool
    """False when the labels are bare numbers, for which no prompt can be made without a file of names."""
    read: Callable[[], Iterator[bytes | ImageError]]
    notes: tuple[str, ...] = ()
    """What else to know: files left aside, classes without images."""

    def __len__(self) -> int:
        return len(self.keys)


def open_labelled(
    data: Path, *, label: str = "label", split: str | None = None, allow_empty_classes: bool = False
) -> LabelledImages:
    """Open labelled images of any of the three kinds.

    Without `split` the first of validation, test, train that is there is taken; the result's name says which.
    Raises UserError when `data` is none of the three, has no such split or label, or holds no image, and for an option
    that its kind can't heed.
    """
    if data.is_file():
        refuse_option("--split", split, f"{data} is a file")
        refuse_option("--allow-empty-classes", allow_empty_classes, f"{data} is a file")
        return from_parquet(data, label)
    if not data.is_dir():
        raise UserError(
            f"data {data} doesn't exist: give a TFDS directory, a folder of class folders, or a parquet file"
        )
    splits = tfds_splits(data)
    if splits is None:
        refuse_option("--label", label != "label", f"{data} is a folder of class folders, whose names are the labels")
        return from_folder(data, split, allow_empty_classes)
    refuse_option("--allow-empty-classes", allow_empty_classes, f"{data} is a dataset, which lists its classes")
    first = splits[0] if splits else "train"
    return from_tfds(data, label, choose_split(splits, split) or split or first)


def refuse_option(option: str, given: object, why: str) -> None:
    """Raise UserError when an option was given that can't be heeded."""
    if given:
        raise UserError(f"{option} can't be heeded: {why}: leave it out")


def from_parquet(path: Path, label: str) -> LabelledImages:
    """A row an image: a column of encoded bytes (or Hugging Face's `{bytes, path}`), and the column `label`."""
    with table_errors(path):
        file = open_parquet(path)
    schema = file.schema_arrow
    if label not in schema.names:
        raise UserError(f"{path} has no column {label!r}: {nearest(label, schema.names)} (option --label)")
    image = find_image_column(schema)
    if image is None:
        raise UserError(f"{path} has no column of encoded images ({', '.join(schema.names)}): name the column `image`")
    with table_errors(path):
        values = file.read(columns=[label])[label].to_pylist()
    if not values:
        raise UserError(f"{path} has no rows: nothing to classify")
    lacking = next((row for row, value in enumerate(values) if is_missing(value)), None)
    if lacking is not None:
        raise UserError(f"{path} row {lacking} has no {label!r}: leave out the rows without a label")
    labels = enumerate_labels(values, f"{path} column {label!r}")

    def read() -> Iterator[bytes]:
        with table_errors(path):
            for batch in file.iter_batches(batch_size=256, columns=[image]):
                for cell in batch.column(0).to_pylist():
                    yield (cell.get("bytes") if isinstance(cell, dict) else cell) or b""

    keys = [str(row) for row in range(len(values))]
    return LabelledImages(path_of(path, label), with_label(path.stem, label), keys, *labels, read)


def with_label(name: str, label: str) -> str:
    """A task's name: the label is part of it where it isn't the usual one."""
    return name if label == "label" else f"{name}-{label}"


def path_of(path: Path, label: str) -> Path:
    """Where a task's images are, the label with it where it isn't the usual one."""
    return path if label == "label" else path / label


def from_folder(path: Path, split: str | None, allow_empty_classes: bool = False) -> LabelledImages:
    """A folder for each class, images of any depth inside; or such a set in a folder for each split.

    Which folders are splits, which are classes, and which files are images is told by `clipkit.formats.folders`.
    """
    root, name, notes = _find_split(path, split)
    folders = class_folders(root)
    listings = [list_images(folder) for folder in folders]
    images = [
        (folder.name, image.name) for folder, each in zip(folders, listings, strict=True) for image in each.images
    ]
    aside = sum((each.aside for each in listings), files_beside(root))
    if not images:
        found = f" ({aside_text(aside)})" if aside else ""
        kinds = "give CLASS/IMAGE.jpg, a TFDS directory, or a parquet file"
        raise UserError(f"{root} holds no class folders with images{found}: {kinds}")
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
        for folder, file in images:
            try:
                yield (root / folder / file).read_bytes()
            except OSError as error:
                yield ImageError(f"the file can't be read ({error.strerror})")

    return LabelledImages(
        root,
        name,
        [printable(f"{folder}/{file}") for folder, file in images],
        np.repeat(labels.labels_N, [len(each.images) for each in listings]),
        labels.names,
        labels.named,
        read,
        notes,
    )


def _find_split(path: Path, split: str | None) -> tuple[Path, str, tuple[str, ...]]:
    """The folder with the classes of a split, the task's name, and notes."""
    if split and (path / split).is_dir():
        return unwrap(path / split), f"{path.name}-{split}", ()
    layout = find_layout(path)
    chosen = choose_split(layout.splits, split)
    if chosen is None and not split:
        return layout.root, path.name, layout.notes
    if chosen is None:
        there = ", ".join(layout.splits) or "no split folders"
        raise UserError(f"{path} has no split {split!r}: it has {there} (option --split)")
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
    name = with_label(f"{dataset.name}-{dataset.split}", label)
    return LabelledImages(path_of(dataset.path / dataset.split, label), name, keys, *labels, read)


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
