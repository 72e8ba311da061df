"""Which files of a folder hold image–text pairs: of what kind they are, of which split, and what is left aside.

Building and training go by the rules here. Hugging Face and others put the files of all splits into one folder, told
apart by a word in their names (`train-00000-of-00002.parquet`), or into a folder each: they are never mixed unless
`ALL_SPLITS` asks for it. What lies there and isn't read is told in one line.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from clipkit.errors import UserError
from clipkit.formats.folders import aside_text, common_split, group_by_split, kind_of_file, split_of
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.formats.tables import METADATA_STEM, is_hidden, is_image, is_table
from clipkit.formatting import counted
from clipkit.storage.stores import StoredFile, list_folder, list_subfolders

ShardKind = Literal["tars", "tfrecords", "parquet", "table"]
SHARD_SUFFIXES: dict[str, ShardKind] = {".tar": "tars", ".tfrecord": "tfrecords", ".parquet": "parquet"}
ALL_SPLITS = "all"
# Files that usually lie beside a data set and do not belong to it.
_BESIDE = frozenset({"readme.md", "license", "license.md", "license.txt", "dataset_infos.json", "stats.json"})


@dataclass(frozen=True)
class ShardListing:
    """The files to read, by name, all of one kind; a table is one file. `notes` tell what is left aside."""

    folder: Path
    kind: ShardKind
    files: tuple[StoredFile, ...]
    notes: tuple[str, ...] = ()
    is_part: bool = False
    """Whether files of other splits lie in the same folder."""
    split: str = ""
    """The split that the names of the files, or of their folder, say."""


def list_shards(
    folder: Path, split: str | Sequence[str], has_images: Callable[[Path, StoredFile], bool], inside: bool = False
) -> ShardListing | None:
    """The shards of a split in a folder, in its folder of that split, or in the one folder that holds any.

    Of several splits asked for, the first that is there is taken. `has_images` tells whether a parquet file holds
    images; with `inside` no folders are looked into. Returns None where nothing is found. Raises UserError for files of
    two kinds, and for several splits without one that was asked for.
    """
    files = [file for file in list_folder(folder) if not is_hidden(file.name)]
    found = _in_folder(folder, files, split, has_images)
    if found is None and not inside:
        return _in_subfolders(folder, split, has_images)
    if found is None or found.kind == "table":  # beside a table lie its images, in folders of any number
        return found
    unread = [*_unread(found, files), *(f"{name}/" for name in _shard_folders(folder))]
    note = f"{folder}: not read: {', '.join(unread)}"
    return replace(found, notes=(*found.notes, note)) if unread else found


def note_beside_tables(folder: Path) -> str | None:
    """A line on what lies in a folder of tables and isn't read: files of other kinds, and folders that hold tables."""
    if not folder.is_dir():
        return None
    names = [file.name for file in list_folder(folder) if not (is_hidden(file.name) or is_table(Path(file.name)))]
    aside = Counter(kind_of_file(name) for name in names if name.lower() not in _BESIDE)
    unread = [*(f"{name}/" for name in _shard_folders(folder)), *([aside_text(aside)] if aside else [])]
    return f"{folder}: not read: {', '.join(unread)}" if unread else None


def describe_files(folder: Path) -> str:
    """What lies in a folder that holds nothing to read, for an error's line: ` (.tar.gz 2)`; "" for nothing."""
    kinds = Counter(kind_of_file(file.name) for file in list_folder(folder) if not is_hidden(file.name))
    packed = any(kind.endswith((".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz")) for kind in kinds)
    inner = [name for name in list_subfolders(folder) if not is_hidden(name)]
    some = [f"{counted(len(inner), 'folder')}: {', '.join(inner[:3])}{', …' * (len(inner) > 3)}"] if inner else []
    there = ", ".join([*([aside_text(kinds)] if kinds else []), *some])
    return f" ({there}{': unpack them' * packed})" if there else ""


def select_split(folder: Path, names: Sequence[str], split: str | Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The names of a split's files among those of a folder, and a line on those of others.

    Raises UserError where the names say several splits, and not the one that was asked for.
    """
    groups = group_by_split(names)
    if not groups or split == ALL_SPLITS:
        return list(names), ()
    asked = [split] if isinstance(split, str) else split
    wanted = next((known for each in asked if (known := split_of(each) or each) in groups), None)
    described = [f"{group or 'others'} {counted(len(of_group), 'file')}" for group, of_group in groups.items()]
    if wanted is None:
        raise UserError(
            f"{folder} holds files of several splits ({', '.join(described)}), of which none is {asked[0]!r}: name one "
            f"with --split, or take all with --split {ALL_SPLITS}"
        )
    others = [text for group, text in zip(groups, described, strict=True) if group != wanted]
    return groups[wanted], (f"{folder}: reading the split {wanted}; left aside: {', '.join(others)}",)


def find_table(
    folder: Path, names: Iterable[str], split: str | Sequence[str] = "train"
) -> tuple[str | None, tuple[str, ...]]:
    """The one table among a folder's files, `metadata.*`, else the only one of the split, and a line on others.

    Raises UserError when several could be meant.
    """
    tables = sorted(name for name in names if is_table(Path(name)))
    found = [name for name in tables if name.lower().partition(".")[0] == METADATA_STEM]
    notes: tuple[str, ...] = ()
    if not found:
        found, notes = select_split(folder, tables, split)
    if len(found) > 1:
        raise UserError(f"{folder} holds several tables ({', '.join(found)}): name one of them in place of the folder")
    return (found[0] if found else None), notes


def _in_folder(
    folder: Path,
    files: Sequence[StoredFile],
    split: str | Sequence[str],
    has_images: Callable[[Path, StoredFile], bool],
) -> ShardListing | None:
    by_kind: dict[ShardKind, list[StoredFile]] = {}
    for file in files:
        kind = SHARD_SUFFIXES.get(Path(file.name).suffix)
        if kind is not None:
            by_kind.setdefault(kind, []).append(file)
    if "tars" in by_kind and "tfrecords" in by_kind:
        raise UserError(f"{folder} holds both .tar and .tfrecord shards: name a folder with one kind, or one file")
    # Beside its tars and tfrecords img2dataset leaves parquet files without images.
    kind = next((kind for kind in ("tars", "tfrecords", "parquet") if kind in by_kind), None)
    if kind is not None and (kind != "parquet" or has_images(folder, by_kind[kind][0])):
        names, notes = select_split(folder, [file.name for file in by_kind[kind]], split)
        wanted = set(names)  # of tens of thousands
        chosen = tuple(file for file in by_kind[kind] if file.name in wanted)
        is_part = len(chosen) < len(by_kind[kind])
        return ShardListing(folder, kind, chosen, notes, is_part, common_split(names))
    table, notes = find_table(folder, (file.name for file in files), split)
    if table is None:
        return None
    return ShardListing(folder, "table", tuple(file for file in files if file.name == table), notes)


def _in_subfolders(
    folder: Path, split: str | Sequence[str], has_images: Callable[[Path, StoredFile], bool]
) -> ShardListing | None:
    full = _shard_folders(folder)
    if not full:
        return None
    names, notes = select_split(folder, full, split)
    if len(names) > 1:
        raise UserError(
            f"{folder} holds no shards, and its folders {', '.join(names[:3])}{' …' * (len(names) > 3)} do: name one"
        )
    found = list_shards(folder / names[0], split, has_images, inside=True)
    note = f"{folder}: reading {names[0]}/"
    said = common_split(names) or (found.split if found else "")
    return found and replace(found, notes=(*(notes or (note,)), *found.notes), split=said)


def _shard_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder that hold shards or tables."""
    inner = (name for name in list_subfolders(folder) if not is_hidden(name) and name != CLIPKIT_FOLDER)
    return [name for name in inner if _holds_shards(folder / name)]


def _holds_shards(folder: Path) -> bool:
    return any(
        (Path(file.name).suffix in SHARD_SUFFIXES or is_table(Path(file.name))) and not is_hidden(file.name)
        for file in list_folder(folder)
    )


def _unread(found: ShardListing, files: Sequence[StoredFile]) -> list[str]:
    """The files that belong to none of the shards, counted by suffix."""
    suffix = next(suffix for suffix, kind in SHARD_SUFFIXES.items() if kind == found.kind)
    stems = {file.name.removesuffix(suffix) for file in files if file.name.endswith(suffix)}
    aside: Counter[str] = Counter()
    for file in files:
        stem = file.name.partition(".")[0].removesuffix("_stats")
        if not file.name.endswith(suffix) and stem not in stems and file.name.lower() not in _BESIDE:
            aside["images" if is_image(file.name) else kind_of_file(file.name)] += 1
    return [aside_text(aside)] if aside else []
