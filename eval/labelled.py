"""Labelled images from where people have them: a TFDS directory, a folder for each class, or a parquet file.

The three give the same thing: a list of keys and labels that is known at once, and the encoded images in that order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit import embedded
from clipkit.errors import UserError
from clipkit.eval.classes import nearest
from clipkit.formats.dataset import below, open_dataset
from clipkit.formats.features import find_image
from clipkit.formats.tables import find_image_column, is_hidden, is_image, open_parquet, table_errors
from clipkit.storage.files import read_json

EVALUATION_SPLITS = ("validation", "val", "test", "train")


@dataclass(frozen=True)
class LabelledImages:
    """The images to classify. `labels_N` are places in `label_names`; `read()` yields the N encoded images in order."""

    path: Path
    name: str
    """For results and file names: the data's name, its split where it has several, the label where it isn't `label`."""
    keys: list[str]
    labels_N: NDArray[np.int64]
    label_names: tuple[str, ...]
    named: bool
    """False when the labels are bare numbers, for which no prompt can be made without a file of names."""
    read: Callable[[], Iterator[bytes]]

    def __len__(self) -> int:
        return len(self.keys)


def open_labelled(data: Path, *, label: str = "label", split: str | None = None) -> LabelledImages:
    """Open labelled images of any of the three kinds.

    Without `split` the first of validation, val, test, train that is there is taken; the result's name says which.
    Raises UserError when `data` is none of the three, has no such split or label, or holds no image.
    """
    if data.is_file():
        return from_parquet(data, label)
    if not data.is_dir():
        raise UserError(
            f"data {data} doesn't exist: give a TFDS directory, a folder of class folders, or a parquet file"
        )
    splits = tfds_splits(data)
    if splits is None:
        return from_folder(data, split)
    first = splits[0] if splits else "train"
    return from_tfds(data, label, split or next((name for name in EVALUATION_SPLITS if name in splits), first))


def enumerate_labels(values: Sequence[Any]) -> tuple[NDArray[np.int64], tuple[str, ...], bool]:
    """Labels as numbers, their names, and whether they are names at all.

    Texts are sorted. Numbers keep their value, as they point into somebody's list of classes; so folders named 0 to 999
    aren't put in the order 0, 1, 10, 100, which is how ImageNetV2 is scored wrongly.
    """
    if all(isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) for value in values):
        labels_N = np.array([int(value) for value in values], dtype=np.int64)
        if labels_N.min() < 0:
            raise UserError(f"label {labels_N.min()} is negative: unlabelled test images can't be scored")
        return labels_N, *number_names(int(labels_N.max()) + 1)
    names = sorted({str(value) for value in values})
    place = {name: number for number, name in enumerate(names)}
    return np.array([place[str(value)] for value in values], dtype=np.int64), tuple(names), True


def number_names(count: int) -> tuple[tuple[str, ...], bool]:
    """The names of classes that are known by number alone: a thousand of them are ImageNet-1K's in its order."""
    if count == 1000:
        return tuple(entry["wnid"] for entry in embedded.imagenet_classes()), True
    return tuple(str(number) for number in range(count)), False


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
    if None in values:
        raise UserError(f"{path} row {values.index(None)} has no {label!r}: leave out the rows without a label")
    labels_N, names, named = enumerate_labels(values)

    def read() -> Iterator[bytes]:
        with table_errors(path):
            for batch in file.iter_batches(batch_size=256, columns=[image]):
                for cell in batch.column(0).to_pylist():
                    yield (cell.get("bytes") if isinstance(cell, dict) else cell) or b""

    keys = [str(row) for row in range(len(values))]
    return LabelledImages(path, with_label(path.stem, label), keys, labels_N, names, named, read)


def with_label(name: str, label: str) -> str:
    """A task's name: the label is part of it where it isn't the usual one."""
    return name if label == "label" else f"{name}-{label}"


def from_folder(path: Path, split: str | None) -> LabelledImages:
    """A folder for each class, images of any depth inside; or such a set in a folder for each split.

    A class may be called `test`: folders are splits when all of them have a split's name.
    """
    root, name = path, path.name
    folders = {folder.name for folder in _folders(path)}
    splits = [name for name in EVALUATION_SPLITS if name in folders] if folders <= set(EVALUATION_SPLITS) else []
    if split is not None and not (path / split).is_dir():
        raise UserError(
            f"{path} has no split {split!r}: it has {', '.join(splits) or 'no split folders'} (option --split)"
        )
    if split is not None or splits:
        chosen = split or splits[0]
        root, name = path / chosen, f"{path.name}-{chosen}"
    files: list[Path] = []
    for folder in _folders(root):
        files += sorted(file for file in folder.rglob("*") if is_image(file.name))
    if not files:
        raise UserError(
            f"{root} holds no class folders with images: give CLASS/IMAGE.jpg, a TFDS directory, or a parquet file"
        )
    labels_N, names, named = enumerate_labels([file.relative_to(root).parts[0] for file in files])
    keys = [file.relative_to(root).as_posix() for file in files]
    return LabelledImages(path, name, keys, labels_N, names, named, lambda: (file.read_bytes() for file in files))


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not is_hidden(folder.name))


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
        if value is None:
            raise UserError(f"{dataset.path} record {dataset.key(index)} has no {label!r}: leave such records out")
        values.append(value if isinstance(value, int) else str(value))
    labels_N, names, named = enumerate_labels(values)
    classes = dataset.features[label].num_classes
    if classes is not None:
        listed = dataset.label_names(label)
        names, named = (tuple(listed), True) if listed else number_names(classes)
        if labels_N.max() >= len(names):
            raise UserError(
                f"{dataset.path} has label {labels_N.max()}, but {len(names)} class names: mend its metadata"
            )

    def read() -> Iterator[bytes]:
        for index in range(dataset.num_records):
            yield dataset.example(index).get(image) or b""

    keys = [dataset.key(index) for index in range(dataset.num_records)]
    name = with_label(f"{dataset.name}-{dataset.split}", label)
    return LabelledImages(path, name, keys, labels_N, names, named, read)


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
