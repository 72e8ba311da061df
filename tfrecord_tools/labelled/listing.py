"""Where the images of a labelled set lie, in the layouts that people have: tars of class tars, class folders, one heap.

A split is cut into parts, a class each, so that many are listed at the same time: on a network disk the 1.3 million
files of ImageNet take longer to list than to name. Nothing is unpacked: an image in a tar is known by its place there,
and read from it.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from clipkit.errors import UserError
from clipkit.formats.tables import is_hidden, is_image

WHOLE_FILE = -1

SPLIT_FOLDERS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
_OFFICIAL_TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
# Kaggle's archive of ImageNet holds the splits further down.
_ROOTS = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")


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


def find_splits(source: Path, split: str | None) -> list[SplitSource]:
    """The splits of a source, train first; with `split` that one alone.

    A source without folders or tars for its splits is one split itself: `split`, or train.
    Raises UserError when there is no such split, and for a layout that can't be understood.
    """
    if not source.is_dir():
        raise UserError(f"{source} isn't a folder: give one with the tars, or with a folder for each split or class")
    for root in (source / each for each in _ROOTS):
        places = {name: path for name in SPLIT_FOLDERS if (path := _place(root, name)) is not None}
        if split is not None and split in places:
            return [_source(split, places[split])]
        if places and split is None:
            found = (_source(name, path) for name, path in places.items() if not _is_unlabelled_test(name, path))
            return [each for each in found if each.parts]
        if places:
            raise UserError(f"{source} has no split {split!r}: it has {', '.join(places)}")
    return [_source(split or "train", source)]


def _place(root: Path, split: str) -> Path | None:
    """The tar or the folder of a split, where there is one."""
    tar = _OFFICIAL_TARS.get(split)
    if tar is not None and (root / tar).is_file():
        return root / tar
    return next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)


def _is_unlabelled_test(split: str, path: Path) -> bool:
    """ImageNet's test images come without labels, beside the other splits; nothing can be scored on them."""
    return split == "test" and path.is_dir() and not [each for each in path.iterdir() if each.is_dir()]


def _source(split: str, path: Path) -> SplitSource:
    return SplitSource(split, path, tuple(_parts(path)))


def _parts(path: Path) -> list[Part]:
    if path.is_file():
        inner = [
            Part(path, _class_name(name), True, offset, offset + size)
            for name, offset, size in _tar_members(path, 0, path.stat().st_size)
            if name.endswith(".tar")
        ]
        return sorted(inner, key=lambda part: part.label) or [Part(path, "", True, 0, path.stat().st_size)]
    with os.scandir(path) as found:
        entries = sorted((each for each in found if not is_hidden(each.name)), key=lambda each: each.name)
    folders = [Part(path / each.name, each.name) for each in entries if each.is_dir()]
    if folders:
        return folders
    tars = [each for each in entries if each.name.endswith(".tar")]
    if tars:
        return [Part(path / each.name, _class_name(each.name), True, 0, each.stat().st_size) for each in tars]
    return [Part(path, "")] if any(is_image(each.name) for each in entries) else []


def _class_name(tar: str) -> str:
    return tar.rpartition("/")[2].removesuffix(".tar")


def list_part(part: Part) -> list[Image]:
    """All images of a part, by name. Raises UserError for a damaged tar."""
    return sorted(_tar_images(part) if part.is_tar else _folder_images(part), key=lambda image: image.name)


def _tar_images(part: Part) -> Iterator[Image]:
    prefix = f"{part.label}/" if part.label else ""
    for name, offset, size in _tar_members(part.path, part.start, part.end):
        base = name.rpartition("/")[2]
        if is_image(base):
            yield Image(str(part.path), prefix + base, offset, size, part.label)


def _tar_members(path: Path, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset of the contents in `path` and size of each regular file of the tar at bytes `start` to `end`."""
    reached = start
    try:
        with path.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    reached = member.offset
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                # The standard library takes a damaged header for the end: what stands there must be the end mark.
                reached = tar.offset
                file.seek(reached)
                block = file.read(tarfile.BLOCKSIZE)
                if reached >= end or len(block) < tarfile.BLOCKSIZE or any(block):
                    raise tarfile.ReadError("no header and no end mark")
    except tarfile.TarError as error:
        raise UserError(f"{path}: damaged tar at byte {reached} ({error}): fetch it again") from error


def _folder_images(part: Part) -> Iterator[Image]:
    """The images at any depth of a class folder, or those of a heap."""
    container = part.path.parent if part.label else part.path
    folders = [part.path]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as found:
            entries = [each for each in found if not is_hidden(each.name)]
        for entry in entries:
            if entry.is_dir():
                folders.append(folder / entry.name)
            elif is_image(entry.name):
                name = (folder / entry.name).relative_to(container).as_posix()
                yield Image(str(container), name, WHOLE_FILE, entry.stat().st_size, part.label)
