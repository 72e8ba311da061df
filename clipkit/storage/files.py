"""Files that are whole or absent.

Every stage may be killed at any moment. A file is therefore written beside its place, flushed to the disk, and renamed:
whoever finds the final name finds the whole file. All of this takes remote paths too (`as_path("s3://bucket/folder")`);
there a file is made on the local disk and then put, which a store does at once (see `stores`).
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import resource
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.errors import UserError
from clipkit.storage import stores
from clipkit.storage.stores import is_remote as is_remote

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_OPEN_FILES = 65_536
# The temporary names of `write_beside`. Its random numbers hardly ever have less than eleven digits; a date in the name
# of a person's own hidden file has eight.
WRITTEN_BESIDE = re.compile(r"\..+\.\d{11,}")


def as_path(text: str | Path) -> Path:
    """A `pathlib.Path` for what is local (`file://` too), and a remote path for `s3://`, `gs://`, `hf://` and so on.

    A remote path is a `upath.UPath`: it has pathlib's methods and can be pickled, but isn't an instance of `Path`, and
    `open(path)` or a C library can't take it (use `path.open()`, or `local_copy`).
    Raises UserError for an unknown protocol, and for one whose package is missing.
    """
    return stores.parse(text) if isinstance(text, str) else stores.parse(str(text)) if not is_remote(text) else text


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, renamed to `path` when the block ends without an exception.

    The block makes a file or a folder there. A folder can't take the place of one that exists. The name of the
    temporary begins with a dot and ends in a random number (a process id may occur twice in a cluster that shares the
    folder), so that what a killed process left is never taken for a result, and two that write the same file don't
    collide.
    For a remote `path` the temporary is a local file in a folder of its own, put at the end; it can't be a folder.
    Raises UserError when the disk is full or the folder can't be written, or when the store refuses.
    """
    if is_remote(path):
        with stores.scratch() as scratch, disk_errors(scratch):
            yield scratch / path.name
            stores.put(scratch / path.name, path)
        return
    temporary = path.parent / f".{path.name}.{secrets.randbits(60)}"
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
                sync_file(file)
            temporary.replace(path)
            sync_file(path.parent)
    except BaseException:
        remove(temporary)
        raise


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk's or the store's refusals below `path` into one line with a remedy; all else passes unchanged."""
    try:
        with stores.reading(path):
            yield
    except OSError as error:
        message = None if is_remote(path) else disk_message(error, path)
        if message is None:
            raise
        raise UserError(message) from error


def disk_message(error: OSError, path: Path | str) -> str | None:
    """The one line for a disk's refusal, or None when the error is something else."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"the disk is full while writing {path}: free some space and run the same command again"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return f"can't write {path} ({os.strerror(error.errno)}): choose another output or change its permissions"
        case errno.ENOTDIR | errno.EEXIST:
            return f"can't write {path}: a file stands where a folder is needed; choose another output"
    return None


def sync_file(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries (so that a rename in it survives a power cut), to the disk.

    A remote path needs nothing: what was put is kept.
    """
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a whole folder; nothing happens where there is none."""
    if is_remote(path):
        stores.remove(path)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """`folder` itself, made with its parents if need be. A store has no folders (and `mkdir` might make a bucket)."""
    if not is_remote(folder):
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear_leftovers(*folders: Path) -> None:
    """Remove what killed runs were writing beside in these folders (not below them), and no other hidden file.

    A worker that outlives its run, or that was given up, does no harm: its temporary is taken from it, so
    its rename fails, and it can't leave half a folder, which is renamed before it is emptied. Call this while no
    worker of the present run writes there, and before a run writes other bytes to the same names.
    In a store there is nothing to remove.
    """
    for folder in folders:
        if is_remote(folder):
            continue
        for leftover in folder.glob(".*"):
            if WRITTEN_BESIDE.fullmatch(leftover.name):
                doomed = leftover.with_name(f".removed.{secrets.randbits(60)}")
                with contextlib.suppress(FileNotFoundError):  # its writer, or another run, was quicker
                    leftover.rename(doomed)
                    remove(doomed)


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yield `path` itself when it is local, else a copy of the remote file on the local disk, removed at the end.

    For what needs a real file. The copy keeps the name; TMPDIR says where it lies. Transient errors are tried again.
    Raises UserError when there is no such remote file, when the store refuses, and when the local disk is full.
    """
    if not is_remote(path):
        yield path
        return
    with stores.scratch() as scratch:
        with disk_errors(scratch):
            stores.fetch(path, scratch / path.name)
        yield scratch / path.name


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with write_beside(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError when it is missing or isn't JSON."""
    try:
        with stores.reading(path):
            return json.loads(require_file(path, "file").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} isn't valid JSON ({error}): it may be damaged; make it again or remove it") from error


def read_text(path: Path, what: str) -> str:
    """A person's text file, without the mark and the blank lines that editors leave at its ends. Raises UserError."""
    try:
        return require_file(path, what).read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} isn't UTF-8 text: convert it, for example with iconv") from error


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """A person's TOML file. Raises UserError."""
    import tomllib

    try:
        return tomllib.loads(read_text(path, what))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} {path} isn't TOML ({error}): mend it") from error


def save_array(path: Path, values: "npt.NDArray[Any]") -> None:
    """Write an array as NumPy's own file, whole or not at all."""
    import numpy as np

    with write_beside(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def load_array(path: Path) -> "npt.NDArray[Any]":
    """An array as `save_array` left it."""
    import numpy as np

    with stores.reading(path):
        loaded: npt.NDArray[Any] = np.load(io.BytesIO(path.read_bytes()) if is_remote(path) else path)
    return loaded


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write one JSON line for each value, all or none."""
    with write_beside(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON line in a single write, so that a killed process leaves whole lines.

    A torn line that a full disk left at the end is closed first, so that it can't swallow this one.
    A remote object can't be appended to: it is read and put again, so it should be small and have one writer.
    """
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    if is_remote(path):
        stores.append(path, line)
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_json_lines(path: Path) -> list[Any]:
    """All whole JSON lines of a file, in order; [] when there is no file. A torn last line is left out."""
    with stores.reading(path):
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    values = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            values.append(json.loads(line))
    return values


def allow_many_files() -> int:
    """Raise this process's limit of open files as far as it may, for connections and shards; what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def means_absent(error: Exception) -> bool:
    """Whether the error of opening a file says that there is none of that name, nor can be one (too long, a NUL)."""
    is_too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return is_too_long or isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | ValueError)


def require_file(path: Path, what: str) -> Path:
    """`path` itself when it is a file. Raises UserError otherwise."""
    with stores.reading(path):
        if not path.is_file():
            kind = "is a folder, not a file" if path.is_dir() else "doesn't exist"
            raise UserError(f"{what} {path} {kind}: check the path")
    return path


def require_dir(path: Path, what: str) -> Path:
    """`path` itself when it is a folder. Raises UserError otherwise."""
    with stores.reading(path):
        if not path.is_dir():
            kind = "is a file, not a folder" if path.exists() else "doesn't exist"
            raise UserError(f"{what} {path} {kind}: check the path")
    return path


def require_writable(folder: Path) -> Path:
    """Make `folder` if need be and prove that it takes a file, before hours of work. Raises UserError otherwise."""
    if is_remote(folder):
        stores.probe(folder)
        return folder
    probe = folder / f".clipkit-probe.{secrets.randbits(60)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            disk_message(error, folder) or f"can't write {folder} ({error}): choose another output"
        ) from error
    return folder


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a folder against a second process that would write the same files; the kernel lets go when the process ends.

    In a store it is a lease that a killed process leaves behind for some minutes (see `lease`).
    Raises UserError when another process holds it.
    """
    if is_remote(folder):
        from clipkit.storage.lease import hold

        with hold(folder / ".lock"):
            yield
        return
    require_writable(folder)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"{folder} is being written by another clipkit (process {holder}): wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
