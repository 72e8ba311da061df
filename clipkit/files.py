"""Files that are whole or absent.

Every stage may be killed at any moment. A file is therefore written beside its place, flushed to the disk, and renamed:
whoever finds the final name finds the whole file.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.errors import UserError


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, renamed to `path` when the block ends without an exception.

    The block makes a file or a folder there. A folder can't take the place of one that exists. The name of the
    temporary begins with a dot and ends in the process id, so that what a killed process left is never taken for a
    result. Raises UserError when the disk is full or the folder can't be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}"
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
    """Turn the disk's refusals below `path` into one line with a remedy; every other exception passes unchanged."""
    try:
        yield
    except OSError as error:
        message = disk_message(error, path)
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
    """Flush a file's bytes, or a folder's entries (so that a rename in it survives a power cut), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a whole folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with write_beside(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError when it is missing or isn't JSON."""
    try:
        return json.loads(require_file(path, "file").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} isn't valid JSON ({error}): it may be damaged; make it again or remove it") from error


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON line in a single write, so that a killed process leaves whole lines.

    A torn line that a full disk left at the end is closed first, so that it can't swallow this one.
    """
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
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
    if not path.exists():
        return []
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            values.append(json.loads(line))
    return values


def require_file(path: Path, what: str) -> Path:
    """`path` itself when it is a file. Raises UserError otherwise."""
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "doesn't exist"
        raise UserError(f"{what} {path} {kind}: check the path")
    return path


def require_dir(path: Path, what: str) -> Path:
    """`path` itself when it is a folder. Raises UserError otherwise."""
    if not path.is_dir():
        kind = "is a file, not a folder" if path.exists() else "doesn't exist"
        raise UserError(f"{what} {path} {kind}: check the path")
    return path


def require_writable(folder: Path) -> Path:
    """Make `folder` if need be and prove that it takes a file, before hours of work. Raises UserError otherwise."""
    probe = folder / f".clipkit-probe.{os.getpid()}"
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
    """Hold a folder against a second process that would write the same files; the kernel lets go when we die.

    Raises UserError when another process holds it.
    """
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
