"""Labelled images in webdataset tars, as CLIP_benchmark and DataComp have them.

    ROOT/classnames.txt                              a name a line, in label order
    ROOT/zeroshot_classification_templates.txt       a sentence a line, {c} for the name
    ROOT/dataset_type.txt                            "multilabel", where an image has several labels
    ROOT/test/nshards.txt                            how many tars
    ROOT/test/0.tar …                                an image and a `.cls` a sample, or a `.npy`: 0 or 1 a class

Where samples have a `.npy` beside the `.cls`, it is metadata: numbers such as the region.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import UserError
from clipkit.eval.classification.images import LabelledImages, sizes_of
from clipkit.eval.classification.labels import Labels, class_name, enumerate_labels, listed_labels
from clipkit.formats.tables import IMAGE_SUFFIXES
from clipkit.formats.tar import Member, list_samples, read_members
from clipkit.formatting import counted
from clipkit.storage.files import read_text

NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


def from_tars(paths: Sequence[Path], origin: Path, name: str, label: str) -> LabelledImages:
    """The labelled images of some tars. Another `label` is the suffix of another member than `.cls`.

    Raises UserError where `nshards.txt` says another number of tars, and for a sample without an image or label.
    """
    folder = paths[0].parent
    if not origin.is_file():
        check_shards(folder, len(paths))
    kind = _beside(folder, "dataset_type.txt")
    kind_name = read_text(kind, "dataset type").strip().lower() if kind else "classification"
    if kind_name == "retrieval":
        raise UserError(f"{origin} holds captions, no classes (dataset_type.txt): evaluate it as retrieval")
    several = kind_name == "multilabel" and label == "label"
    suffix = "npy" if several else "cls" if label == "label" else label.lower()
    keys, images, values, numbers = [], [], [], []
    for path in paths:
        found = list(_labelled_members(path, suffix))
        contents = read_members((path, members[suffix]) for _, _, members in found)
        for (key, image, members), value in zip(found, contents, strict=True):
            if not value.strip():
                raise UserError(f"{path}: sample {key} has an empty .{suffix}: leave out the samples without a label")
            keys.append(f"{path.name}:{key}" if len(paths) > 1 else key)
            images.append((path, image))
            values.append(value if several else value.strip())
            numbers += [(path, members["npy"])] if "npy" in members and not several else []
    if not values:
        raise UserError(f"{paths[0]} holds no sample of an image and a .{suffix}: --label names the label's suffix")
    notes: tuple[str, ...] = ()
    listed = _beside(folder, NAMES_FILE)
    names = _names_in(listed) if listed else None
    targets_NC = number_rows(values, f"{origin} .npy").astype(bool) if several else None
    if targets_NC is not None:
        if names is None or len(names) != targets_NC.shape[1]:
            there = f"{len(names):,} names" if names else "no names"
            raise UserError(f"{origin}: {targets_NC.shape[1]:,} classes in .npy, but {there} in {NAMES_FILE}: mend it")
        labels = Labels(targets_NC.argmax(axis=1).astype(np.int64), tuple(names), True)
    else:
        labels = enumerate_labels(values, f"{origin} .{suffix}")
    if listed and names and labels.are_numbers:
        labels = listed_labels(labels, names, str(listed))
    elif listed and names and not several:
        labels, notes = _among(labels, names, listed, origin)
    if listed and names and labels.names == tuple(names):
        notes = (*notes, f"{origin}: class names from {listed}")

    def read() -> Iterator[bytes]:
        return read_members(images)

    return LabelledImages(
        origin,
        name,
        keys,
        *labels,
        read,
        notes,
        templates=_beside(folder, TEMPLATES_FILE),
        targets_NC=targets_NC,
        metadata=list(read_members(numbers)) if len(numbers) == len(keys) else None,
        files=sizes_of(paths),
    )


def _names_in(file: Path) -> list[str]:
    """The names in a list of them. Raises UserError for a line without one, behind which all would be others'."""
    names = [line.strip() for line in read_text(file, "class names").split("\n")]
    if "" in names:
        raise UserError(f"{file}: line {names.index('') + 1:,} has no name: a class is known by its line, so write it")
    return names


def _among(labels: Labels, names: Sequence[str], file: Path, origin: Path) -> tuple[Labels, tuple[str, ...]]:
    """Labels that are texts as places in the list of names, in which classes may be that no image has; as they are, and
    a line on it, where they are other names. Raises UserError for a list that has some of them only.
    """
    place = {class_name(name): number for number, name in enumerate(names)}
    lacking = [label for label in labels.names if class_name(label) not in place]
    if len(lacking) == len(labels.names):
        return labels, (f"{origin}: {file} is left aside: none of its names is a label here, such as {lacking[0]!r}",)
    if lacking or len(place) < len(names):
        what = f"lacks {lacking[0]!r}, which occurs in {origin}" if lacking else "has a name twice"
        raise UserError(f"{file} {what}: list each class of the .cls once")
    number_L = np.array([place[class_name(label)] for label in labels.names], dtype=np.int64)
    return Labels(number_L[labels.labels_N], tuple(names), True), ()


def check_shards(folder: Path, count: int) -> None:
    """Raise UserError where `nshards.txt` says another number than there are tars."""
    file = folder / "nshards.txt"
    if not file.is_file():
        return
    text = read_text(file, "number of shards").strip()
    if not text.isdecimal():
        raise UserError(f"{file} says {text[:20]!r}, not how many tars there are: mend it")
    if int(text) != count:
        raise UserError(f"{file} says {counted(int(text), 'shard')}, but {count:,} are there: complete the download")


def _beside(folder: Path, name: str) -> Path | None:
    """A file in the folder of the tars, or in the one above."""
    return next((file for file in (folder / name, folder.parent / name) if file.is_file()), None)


def number_rows(arrays: Sequence[bytes], where: str) -> NDArray[np.int64]:
    """int64[N, F] from a `.npy` file for each sample. Raises UserError where they aren't F whole numbers each."""
    rows: list[NDArray[Any]] = []
    for data in arrays:
        try:
            rows.append(np.load(io.BytesIO(data), allow_pickle=False).reshape(-1))
        except ValueError as error:
            raise UserError(f"{where}: it isn't an array of numbers ({error}): mend the tar") from error
    if len({len(row) for row in rows}) > 1 or any(row.dtype.kind not in "biuf" or (row % 1 != 0).any() for row in rows):
        raise UserError(f"{where}: samples have arrays of different lengths or not of whole numbers: mend the tar")
    return np.stack(rows).astype(np.int64)


def _labelled_members(path: Path, suffix: str) -> Iterator[tuple[str, Member, dict[str, Member]]]:
    """The key, image and members of each labelled sample of a tar. Raises UserError for one that lacks either."""
    for key, members in list_samples(path).items():
        image = next((members[kind] for kind in members if kind in IMAGE_SUFFIXES), None)
        if image is None and suffix not in members:
            continue
        if image is None or suffix not in members:
            lacking = "image" if image is None else f".{suffix}"
            raise UserError(f"{path}: sample {key} has no {lacking}: mend the tar, or name the suffix by --label")
        yield key, image, members
