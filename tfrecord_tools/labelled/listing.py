"""Where the images of a labelled set lie, in the layouts that people have: tars of class tars, class folders, one heap.

A split is cut into parts, a class each, so that many are listed at the same time: on a network disk the 1.3 million
files of ImageNet take longer to list than to name. Nothing is unpacked: an image in a tar is known by its place there,
and read from it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from clipkit.errors import UserError
from clipkit.formats.folders import (
    class_folders,
    files_beside,
    find_layout,
    kind_of_file,
    list_images,
    printable,
    split_of,
    unwrap,
)
from clipkit.formats.tables import is_hidden, is_image
from clipkit.formats.tar import TarError, read_headers

WHOLE_FILE = -1

_OFFICIAL_TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
# Kaggle's archive of ImageNet holds the splits further down.
_ROOTS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", ".")
_ORDER = ("train", "validation", "test")


class Image(NamedTuple):
    """One image: `size` bytes at byte `offset` of the tar `container`, or the file `name` below the folder `container`.

    `label` is its class, or "" where labels stand in a file. `name` is CLASS/FILE, or FILE in a heap.
    """

    container: str
    name: str
    offset: int
    size: int
    label: str


@dataclass(frozen=True)
class Part:
    """What is listed in one go: a folder, or a tar at bytes `start` to `end` of a file. `label` as in Image."""

    path: Path
    label: str
    is_tar: bool = False
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class SplitSource:
    """One split as it was found."""

    split: str
    path: Path
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    aside: Mapping[str, int] = field(default_factory=dict)
    """Files that lie beside the class folders."""


@dataclass(frozen=True)
class PartImages:
    """The images of a part by name, and the number of other files in it by suffix."""

    images: list[Image] = field(default_factory=list)
    aside: Counter[str] = field(default_factory=Counter)


def find_splits(source: Path, split: str | None) -> list[SplitSource]:
    """The splits of a source, train first; with `split` that one only.

    A source without folders or tars for its splits is one split itself: `split`, or train.
    Raises UserError when there is no such split, and for a layout that can't be understood.
    """
    if not source.is_dir():
        raise UserError(f"{source} isn't a folder: give one with the tars, or with a folder for each split or class")
    if split is not None and (source / split).is_dir() and split_of(split) is not None:
        return [_source(split_of(split) or split, unwrap(source / split, _is_content))]
    root = next((source / each for each in _ROOTS if (source / each).is_dir()), source)
    tars = {name: root / tar for name, tar in _OFFICIAL_TARS.items() if (root / tar).is_file()}
    layout = find_layout(root, _is_content, split)
    places = {**layout.splits, **tars}
    if not places:
        return [_source(split or "train", layout.root, layout.notes)]
    if split is None:
        unlabelled = {name for name, path in places.items() if _is_unlabelled_test(name, path)}
        notes = (*layout.notes, *(f"{places[name]}: left aside, as it has no class folders" for name in unlabelled))
        found = [_source(name, places[name]) for name in _ORDER if name in places and name not in unlabelled]
        found = [each for each in found if each.parts]
        return [replace(each, notes=notes if each is found[0] else ()) for each in found]
    canonical = split if split in places else split_of(split)
    if canonical not in places:
        raise UserError(f"{source} has no split {split!r}: it has {', '.join(places)}")
    return [_source(canonical, places[canonical], layout.notes)]


def _is_content(name: str) -> bool:
    """Whether a file makes its folder more than a folder of folders: an image, or the tar of a class."""
    return is_image(name) or (name.endswith(".tar") and not is_hidden(name))


def _is_unlabelled_test(split: str, path: Path) -> bool:
    """ImageNet's test images come without labels, beside the other splits; nothing can be scored on them."""
    return split == "test" and path.is_dir() and not [each for each in path.iterdir() if each.is_dir()]


def _source(split: str, path: Path, notes: tuple[str, ...] = ()) -> SplitSource:
    parts = tuple(_parts(path))
    in_folders = parts and parts[0].label and not parts[0].is_tar
    return SplitSource(split, path, parts, notes, files_beside(path) if in_folders else {})


def _parts(path: Path) -> list[Part]:
    if path.is_file():
        inner = [
            Part(path, _class_name(name), True, offset, offset + size)
            for name, offset, size in _tar_members(path, 0, path.stat().st_size)
            if name.endswith(".tar")
        ]
        return sorted(inner, key=lambda part: part.label) or [Part(path, "", True, 0, path.stat().st_size)]
    folders = [Part(each, printable(each.name)) for each in class_folders(path, _is_content)]
    if folders:
        return folders
    entries = sorted((each for each in path.iterdir() if not is_hidden(each.name)), key=lambda each: each.name)
    tars = [each for each in entries if each.name.endswith(".tar") and each.is_file()]
    if tars:
        return [Part(each, _class_name(each.name), True, 0, each.stat().st_size) for each in tars]
    return [Part(path, "")] if any(is_image(each.name) for each in entries) else []


def _class_name(tar: str) -> str:
    return tar.rpartition("/")[2].removesuffix(".tar")


def list_part(part: Part) -> PartImages:
    """All images of a part, by name. Raises UserError for a damaged tar."""
    return _tar_images(part) if part.is_tar else _folder_images(part)


def _tar_images(part: Part) -> PartImages:
    found = PartImages()
    prefix = f"{part.label}/" if part.label else ""
    for name, offset, size in _tar_members(part.path, part.start, part.end):
        base = name.rpartition("/")[2]
        if is_image(base):
            found.images.append(Image(str(part.path), prefix + base, offset, size, part.label))
        elif not is_hidden(base):
            found.aside[kind_of_file(base)] += 1
    found.images.sort(key=lambda image: image.name)
    return found


def _folder_images(part: Part) -> PartImages:
    """The images at any depth of a class folder, or those of a heap."""
    listing = list_images(part.path)
    container = part.path.parent if part.label else part.path
    prefix = f"{part.path.name}/" if part.label else ""
    images = [Image(str(container), prefix + name, WHOLE_FILE, size, part.label) for name, size in listing.images]
    return PartImages(images, listing.aside)


def _tar_members(path: Path, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset of the contents in `path` and size of each regular file of the tar at bytes `start` to `end`."""
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(start + offset)
            return file.read(max(0, min(length, end - start - offset)))

        try:
            for member in read_headers(read, path):
                if start + member.start + member.size > end:
                    raise TarError(path, member.first, "it ends inside a member")
                yield member.name, start + member.start, member.size
        except TarError as error:
            raise TarError(path, start + error.offset, error.reason) from None
