"""The index of a folder of shards that have none: made on first use, then mapped into memory by every worker.

It lies in the folder's `clipkit/`, or in the user's cache (XDG_CACHE_HOME) where the folder is read-only or in a store.
A shard that was added or changed, by its size and time, is looked at again; the others are not. Making it may be killed
at any moment and goes on where it stopped; two that begin at once wait for each other.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import UserError
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.jobs.run import run_jobs
from clipkit.log import Progress
from clipkit.storage.files import is_remote, make_folder, read_json, remove, require_writable, save_array, write_json
from clipkit.storage.stores import StoredFile

REMOTE_THREADS = 8
# Starting processes takes longer than looking at shards of so many bytes.
FEW_BYTES = 4 << 30

MakeRows = Callable[[Path, StoredFile], np.ndarray]


@dataclass(frozen=True)
class FolderIndex:
    """The index of a folder. `counts` are the rows of each shard in `path`, a .npy file; shard after shard."""

    path: Path
    counts: tuple[int, ...]

    def rows(self) -> np.ndarray:
        """All rows, mapped into memory."""
        return np.load(self.path, mmap_mode="r" if sum(self.counts) else None)


def open_index(folder: Path, shards: Sequence[StoredFile], stem: str, make: MakeRows) -> FolderIndex:
    """The index `stem` of a folder's shards, made where it is missing or old by `make` of each, which must pickle.

    Raises what `make` raises.
    """
    place = index_place(folder)
    with waiting_lock(place / f".{stem}.lock"):
        known = _read_summary(place / f"{stem}.json")
        if [each[:3] for each in known] != list(map(_version, shards)):
            known = _make(folder, shards, place, stem, make, known)
        return FolderIndex(place / f"{stem}.npy", tuple(count for *_, count in known))


def index_place(folder: Path) -> Path:
    """Where the index of a folder lies; the place is made and can be written."""
    if not is_remote(folder):
        own = folder / CLIPKIT_FOLDER
        with contextlib.suppress(UserError):
            return require_writable(own)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipkit"
    name = str(folder if is_remote(folder) else folder.resolve())
    return require_writable(cache / f"index-{hashlib.blake2b(name.encode(), digest_size=10).hexdigest()}")


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold a lock file; another process that has it is waited for."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


Version = tuple[str, int, str]
Summary = list[tuple[str, int, str, int]]


def _read_summary(path: Path) -> Summary:
    """Name, size, version and rows of each shard that was indexed; [] where nothing, or nothing legible, is."""
    if not path.exists() or not path.with_suffix(".npy").exists():
        return []
    with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
        return [(str(name), int(size), str(version), int(rows)) for name, size, version, rows in read_json(path)]
    return []


def _version(shard: StoredFile) -> Version:
    return shard.name, shard.bytes, shard.version


def _make(
    folder: Path, shards: Sequence[StoredFile], place: Path, stem: str, make: MakeRows, known: Summary
) -> Summary:
    work, place_of_rows = make_folder(place / f"{stem}-work"), place / f"{stem}.npy"
    old: dict[Version, np.ndarray] = {}
    if known:
        ends = np.cumsum([count for *_, count in known])
        parts = np.split(np.load(place_of_rows), ends[:-1])
        old = {each[:3]: rows for each, rows in zip(known, parts, strict=True)}
    todo = [shard for shard in shards if _version(shard) not in old and not _part(work, shard).exists()]
    function = partial(_make_part, folder=folder, work=work, make=make)
    with Progress(f"index {folder.name}", len(todo), unit="shards", quiet=not todo) as progress:
        for done, _ in enumerate(_over(function, todo, is_remote(folder)), 1):
            progress.update(done)
    arrays = [old[_version(each)] if _version(each) in old else np.load(_part(work, each)) for each in shards]
    remove(place / f"{stem}.json")  # a new index with an old summary must never be seen
    save_array(place_of_rows, np.concatenate(arrays))
    found = [(*_version(shard), len(rows)) for shard, rows in zip(shards, arrays, strict=True)]
    write_json(place / f"{stem}.json", found)
    remove(work)
    return found


def _over(function: Callable[[StoredFile], None], todo: Sequence[StoredFile], remote: bool) -> Iterator[Any]:
    if remote:
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            yield from pool.map(function, todo)
    else:
        workers = 1 if sum(shard.bytes for shard in todo) < FEW_BYTES else None
        yield from run_jobs(function, todo, workers=workers, describe=lambda shard: shard.name)


def _make_part(shard: StoredFile, folder: Path, work: Path, make: MakeRows) -> None:
    save_array(_part(work, shard), make(folder, shard))


def _part(work: Path, shard: StoredFile) -> Path:
    mark = hashlib.blake2b(f"{shard.name} {shard.bytes} {shard.version}".encode(), digest_size=12).hexdigest()
    return work / f"{mark}.npy"
