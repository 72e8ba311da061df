"""Folders of labelled images: which folders are splits, which are classes, and which files in them are images.

Building, training and evaluating go by the rules here. A folder of class folders looks the same as a folder of splits
until one looks inside: a class holds images, a split holds classes. What could be both is refused, for a split taken
for a class gives an accuracy that looks like a result.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from clipkit.errors import UserError
from clipkit.formats.tables import is_hidden, is_image
from clipkit.formatting import counted, counts_text

# The words that Hugging Face's datasets go by, and the abbreviations of other exporters.
SPLIT_WORDS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
# Of several splits the first of these is evaluated on.
EVALUATED = ("validation", "test", "train")
# Words that say nothing beside a split's: `seg_train`, `TestSet`, `val_images`.
_FILLERS = frozenset(("seg", "set", "data", "dataset", "images", "image", "imgs", "img", "split", "pictures", "photos"))
# Folders beside splits that hold no samples, whatever images are in them (masks, previews).
_BESIDE_SPLITS = frozenset(
    ["annotation", "annotations", "label", "labels", "mask", "masks", "meta", "metadata", "docs"]
)
_PACKED = frozenset(("gz", "bz2", "xz", "zst"))
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+|[^\x00-\x7f]+")
_EXAMPLES = 3


# ---- Names -----------------------------------------------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """`train`, `validation` or `test` when this is a usual name of such a folder or file, in any case; or None."""
    words = [word for word in _words(name) if not word.isdigit() and word not in _FILLERS]
    return _split_word(words[0]) if len(words) == 1 else None


def choose_split(names: Collection[str], split: str | None = None, default: Sequence[str] = EVALUATED) -> str | None:
    """The one of a set's splits that was asked for, in its own spelling; unasked, the first of `default`."""
    spelled = {split_of(name) or "": name for name in names} | {name: name for name in names}
    wanted = (split, split_of(split) or split) if split else default
    return next((spelled[name] for name in wanted if name in spelled), None)


def group_by_split(names: Sequence[str]) -> dict[str, list[str]]:
    """Files or folders by the split that a word of their names says, "" for none; {} where all say the same.

    A word that all names have says nothing: `test-tube-train-0.tar` is of train beside `test-tube-val-0.tar`.
    """
    said = {name: _splits_said(name) for name in names}
    common = set.intersection(*said.values()) if said else set()
    groups: dict[str, list[str]] = {}
    for name, splits in said.items():
        groups.setdefault("+".join(sorted(splits - common or splits)), []).append(name)
    return groups if len(groups) > 1 else {}


def common_split(names: Sequence[str]) -> str:
    """The split that a word of each of these names says, or ""."""
    common = set.intersection(*map(_splits_said, names)) if names else set()
    return common.pop() if len(common) == 1 else ""


def _splits_said(name: str) -> set[str]:
    return {split for word in _words(name) if (split := _split_word(word)) is not None}


def _split_at_an_end(name: str) -> str | None:
    """The split that the first or last word of a name says; enough for a folder that can't be a class."""
    words = [word for word in _words(name) if not word.isdigit()]
    found = {split for word in (words[:1] + words[-1:]) if (split := _split_word(word)) is not None}
    return found.pop() if len(found) == 1 else None


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _split_word(word: str) -> str | None:
    word = word.removesuffix("set")
    return next((split for split, words in SPLIT_WORDS.items() if word in words), None)


def printable(name: str) -> str:
    r"""A file's name as text that can be written anywhere: bytes that aren't UTF-8 become `\xe9` and the like."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---- What is in a folder ---------------------------------------------------------------------------------------------


class FoundImage(NamedTuple):
    """An image below a folder: its name from there, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Listing:
    """The images of a folder by name, and what else is there, by suffix."""

    images: list[FoundImage] = field(default_factory=list)
    aside: Counter[str] = field(default_factory=Counter)


def list_images(folder: Path, is_content: Callable[[str], bool] = is_image) -> Listing:
    """The images at any depth of a folder. Hidden files are passed over; links are followed, but not in circles."""
    listing = Listing()
    waiting = [(folder, "", frozenset({folder.resolve()}))]
    while waiting:
        place, prefix, above = waiting.pop()
        for entry in _entries(place):
            name = prefix + entry.name
            if entry.is_dir():
                inner = Path(entry.path).resolve() if entry.is_symlink() else None
                if inner is not None and inner in above:
                    listing.aside["link to a folder around it"] += 1
                else:
                    waiting.append((place / entry.name, f"{name}/", above | {inner} if inner else above))
            elif not entry.is_file():
                listing.aside["broken link" if entry.is_symlink() else "not a file"] += 1
            elif is_content(entry.name):
                listing.images.append(FoundImage(name, entry.stat().st_size))
            else:
                listing.aside[kind_of_file(entry.name)] += 1
    listing.images.sort()
    return listing


def kind_of_file(name: str) -> str:
    """What files left aside are counted by: the suffix."""
    stem, dot, suffix = name.rpartition(".")
    if suffix.lower() in _PACKED and (inner := kind_of_file(stem)).startswith("."):
        return f"{inner}.{suffix.lower()}"  # .tar.gz
    return f".{printable(suffix.lower())}" if dot and stem else "without suffix"


def aside_text(aside: Mapping[str, int]) -> str:
    """`.txt 3, broken link 1`."""
    return counts_text(dict(sorted(aside.items())))


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    with os.scandir(folder) as found:
        return sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda entry: entry.name)


def empty_classes_text(empty: Mapping[str, str]) -> str:
    """What is said of classes without images, each with what is there instead."""
    name, there = next(iter(empty.items()))
    one, many = f"the class {name!r} has no images", f"{len(empty):,} classes have no images, such as {name!r}"
    return f"{one if len(empty) == 1 else many} ({there})"


def files_beside(folder: Path, is_content: Callable[[str], bool] = is_image) -> Counter[str]:
    """The files that lie beside a split's class folders, by suffix; images, which have no class there, as such."""
    return Counter(
        "image beside the class folders" if is_content(entry.name) else kind_of_file(entry.name)
        for entry in _files(folder)
    )


def _files(folder: Path) -> "list[os.DirEntry[str]]":
    return [entry for entry in _entries(folder) if not entry.is_dir()]


@dataclass(frozen=True)
class _Folder:
    """A folder by what is in it: images themselves, or folders (`inner`) with images at some depth, or neither.

    `images` is true too of one folder of images in another, as in Tiny ImageNet's `n01443537/images/`.
    """

    path: Path
    images: bool
    inner: tuple[str, ...]

    @property
    def holds_folders_only(self) -> bool:
        return bool(self.inner) and not self.images

    @property
    def text(self) -> str:
        """What was found in it, for an error's line."""
        if self.holds_folders_only:
            more = ", …" if len(self.inner) > _EXAMPLES else ""
            found = ", ".join(map(printable, self.inner[:_EXAMPLES])) + more
            return f"{printable(self.path.name)} holds {counted(len(self.inner), 'folder')} ({found})"
        return f"{printable(self.path.name)} holds {'images' if self.images else 'no images'}"


def _look_into(folder: Path, is_content: Callable[[str], bool], depth: int = 8) -> _Folder:
    """What a folder holds; a class folder is known by its first image."""
    inner = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                inner.append(entry.name)
            elif is_content(entry.name) and entry.is_file():
                return _Folder(folder, True, ())
    found_in = [_look_into(folder / name, is_content, depth - 1) for name in sorted(inner)] if depth else []
    full = [each for each in found_in if each.images or each.inner]
    return _Folder(folder, len(full) == 1 and full[0].images, tuple(each.path.name for each in full))


def _folders(path: Path, is_content: Callable[[str], bool]) -> Iterator[_Folder]:
    for entry in _entries(path):
        if entry.is_dir():
            yield _look_into(path / entry.name, is_content)


# ---- Splits and classes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How labelled images lie in a folder: in `splits` by their canonical names, or as one split, in `root`.

    A split's folder is that in which its classes are. `notes` say what is left aside.
    """

    root: Path
    splits: Mapping[str, Path]
    notes: tuple[str, ...] = ()


def find_layout(path: Path, is_content: Callable[[str], bool] = is_image, split: str | None = None) -> Layout:
    """Tell splits from classes, inside of as many folders as are wrapped around them.

    Folders are splits when their names say so and they hold class folders (or nothing beside them does).
    Raises UserError for splits beside classes unless one of them is asked for, and for two folders of one split.
    """
    folders = list(_folders(path, is_content))
    full = [each for each in folders if each.images or each.inner]
    named = {each.path.name: split_of(each.path.name) for each in full}
    named |= {
        each.path.name: _split_at_an_end(each.path.name)
        for each in full
        if each.holds_folders_only and named[each.path.name] is None
    }
    splits = [each for each in full if named[each.path.name] is not None]
    others = [each for each in full if each not in splits and each.path.name.lower() not in _BESIDE_SPLITS]
    if splits and (not others or any(each.holds_folders_only for each in splits)):
        if others and not (split and split_of(split) in named.values()):
            raise UserError(
                f"{path} has folders of splits ({_names(splits)}) beside others: {_texts(others)}: "
                "name one with --split, or give a folder that holds only splits or only classes"
            )
        found: dict[str, Path] = {}
        for each in splits:
            split = named[each.path.name] or ""
            if split in found:
                raise UserError(
                    f"{path} has two folders of the split {split}, {printable(found[split].name)} and "
                    f"{printable(each.path.name)}: give one of them in place of {path.name or path}"
                )
            found[split] = each.path
        aside = [each for each in folders if each not in splits]
        notes = (f"{path}: beside the splits and left aside: {_names(aside)}",) if aside else ()
        return Layout(path, {split: unwrap(folder, is_content) for split, folder in found.items()}, notes)
    if len(full) == 1 and full[0].holds_folders_only and not any(is_content(each.name) for each in _files(path)):
        inner = find_layout(full[0].path, is_content, split)
        aside = [each for each in folders if each is not full[0]]
        notes = (f"{path}: read {printable(full[0].path.name)}",)
        if aside:
            notes = (f"{notes[0]}, and left aside {_names(aside)}",)
        return Layout(inner.root, inner.splits, (*notes, *inner.notes))
    return Layout(path, {})


def unwrap(path: Path, is_content: Callable[[str], bool] = is_image) -> Path:
    """The folder with the classes of one split: `path`, or where it holds one folder with all of them, that."""
    while True:
        full = [each for each in _folders(path, is_content) if each.images or each.inner]
        if len(full) != 1 or not full[0].holds_folders_only:
            return path
        path = full[0].path


def holds_class_folders(path: Path) -> bool:
    """Whether some folder in it holds images, at any depth."""
    return any(each.images or each.inner for each in _folders(path, is_image))


def class_folders(root: Path, is_content: Callable[[str], bool] = is_image) -> list[Path]:
    """The folders of a split's classes by name, empty ones among them.

    Raises UserError for one that holds only folders, which is a split or a group of classes.
    """
    folders = list(_folders(root, is_content))
    wrong = [each for each in folders if each.holds_folders_only]
    if wrong:
        raise UserError(
            f"{root} isn't a folder of classes: {_texts(wrong)}, where a class holds images: give one of these "
            "folders, or put the classes beside each other"
        )
    return [each.path for each in folders]


def _names(folders: list[_Folder]) -> str:
    return _shortened([printable(each.path.name) for each in folders])


def _texts(folders: list[_Folder]) -> str:
    return _shortened([each.text for each in folders])


def _shortened(texts: list[str]) -> str:
    return ", ".join(texts[:_EXAMPLES]) + (f" and {len(texts) - _EXAMPLES:,} more" if len(texts) > _EXAMPLES else "")
