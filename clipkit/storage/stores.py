"""Files in an object store, so that a dataset may live in `s3://` or `gs://` as well as on a disk.

Remote paths are `upath.UPath`, which have pathlib's methods over fsspec. They aren't instances of `pathlib.Path`, yet
everything in clipkit takes both and says `Path`: the casts are here and nowhere else. `files.py` is the face of this
module; nothing remote is imported before the first remote path is met.

An object store has no folders and no renaming, but it puts an object whole or not at all. So a file is written on the
local disk first and then put under its final name. What is not an object store (sftp, http, …) can only be read.
"""

import contextlib
import errno
import fcntl
import os
import random
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from clipkit.errors import InternalError, UserError, one_line

if TYPE_CHECKING:
    from upath import UPath

R = TypeVar("R")

# Where a put object appears at once and whole.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf", "memory")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # which extra of clipkit reads a protocol
ATTEMPTS = 4  # of one transfer, after the store's own client has given up each time
FIRST_PAUSE = 1.0  # seconds before the second attempt; then four times as long each

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?://|::?)(.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.+)", re.DOTALL)
# Whose exceptions are about the store, known by name so that none of these packages is imported.
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "huggingface_hub", "s3fs")
_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError")
_VERSIONS = ("ETag", "etag", "md5Hash", "oid", "blob_id", "LastModified", "mtime", "updated", "created")
_TRANSIENT = (
    errno.EIO,
    errno.EREMOTEIO,
    errno.EBUSY,
    errno.EAGAIN,
    errno.ETIMEDOUT,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EHOSTUNREACH,
    # aiohttp's own errors carry these without being ConnectionErrors.
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EPIPE,
)


def parse(text: str) -> Path:
    """A `Path` for a local path or a `file://` URL, a remote path for any other URL that fsspec knows.

    `s3:/bucket/x`, which is what `pathlib.Path` makes of a URL, becomes `s3://` again.
    Raises UserError for an unknown protocol, for one whose package is missing, and for a URL without a bucket.
    """
    single = _ONE_SLASH.fullmatch(text)
    if single and single[1].lower() in (*OBJECT_STORES, "file"):
        text = f"{single[1]}://{'/' if single[1].lower() == 'file' else ''}{single[2]}"
    url = _URL.fullmatch(text)
    if not url:
        return Path(text)
    protocol = url[1].lower()
    if protocol in ("file", "local"):
        return Path(url[2])
    import fsspec
    from upath import UPath

    try:
        fsspec.get_filesystem_class(protocol)
        # Listings are never remembered: other processes write the same folders.
        path = UPath(text, use_listings_cache=False)
        if protocol in EXTRAS and not path.drive:
            raise ValueError("the bucket is missing")
        return cast(Path, path)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install 'clipkit[{extra}]'" if extra else str(error).strip().rstrip(".")
        raise UserError(f"{text} needs a package that is missing: {remedy}") from error
    except ValueError as error:
        known = protocol in fsspec.available_protocols()
        reason = str(error) if known else f"no file system is known for {protocol}://"
        raise UserError(f"{text}: {reason}; give a local path, or one such as s3://BUCKET/FOLDER") from error


def is_remote(path: Path) -> bool:
    """Whether `path` lies in a store rather than on a disk."""
    return not isinstance(path, Path)


def as_upath(path: Path) -> "UPath":
    """The remote path as what it is, for its `fs` (the fsspec file system) and its `path` (the name in it)."""
    return cast(Any, path)


def is_object_store(path: Path) -> bool:
    """Whether objects are put whole at this remote path, so that it can be written."""
    return as_upath(path).protocol in OBJECT_STORES


def put(local: Path, path: Path) -> None:
    """Put a local file under `path`, whole or not at all, again when a transient error stops it.

    Raises UserError for what the store refuses, and InternalError for a local folder.
    """
    if not is_object_store(path):
        raise _read_only(path)
    if local.is_dir():
        raise InternalError(f"{path} can't be written as a folder: an object store can't take one whole")
    target = as_upath(path)
    if target.protocol == "memory":  # its put_file shows the object before it is filled
        target.fs.pipe_file(target.path, local.read_bytes())
        return
    with store_errors(path, writing=True):
        retry(lambda: target.fs.put_file(str(local), target.path))


def _read_only(path: Path) -> UserError:
    return UserError(
        f"can't write {path}: a file appears there before it is whole; write to a local folder or to an object store "
        "such as s3://"
    )


def put_bytes(data: bytes, path: Path, mode: str = "overwrite") -> None:
    """Put `data` under `path`; with mode "create" raises FileExistsError when there is an object already."""
    target = as_upath(path)
    target.fs.pipe_file(target.path, data, mode=mode)


@dataclass(frozen=True)
class StoredFile:
    """A file of a folder, as it was when it was listed. `version` tells it from a later one of the same name."""

    name: str
    bytes: int
    version: str = ""


def list_folder(folder: Path) -> list[StoredFile]:
    """The files that lie in a folder, local or remote, by name: one question to a store for a thousand of them.

    Raises FileNotFoundError where there is no folder, and UserError for what the store refuses.
    """
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
        return sorted(
            (StoredFile(name, status.st_size, str(status.st_mtime_ns)) for name, status in files),
            key=lambda file: file.name,
        )
    found = [
        StoredFile(name, int(entry["size"]), str(next((entry[key] for key in _VERSIONS if entry.get(key)), "")))
        for name, entry in _listing(folder)
        if entry.get("type") != "directory" and entry.get("size") is not None
    ]
    return sorted(found, key=lambda file: file.name)


def list_subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, local or remote. Raises as `list_folder`."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    return sorted(name for name, entry in _listing(folder) if entry.get("type") == "directory")


def _listing(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """What a store tells of each file and folder in a folder, by their names there."""
    target = as_upath(folder)
    with store_errors(folder):
        found = retry(lambda: target.fs.ls(target.path, detail=True))
    return [(str(entry["name"]).rstrip("/").rpartition("/")[2], entry) for entry in found]


def append(path: Path, line: bytes) -> None:
    """Put an object again with one more line, after closing a torn one."""
    with store_errors(path, writing=True):
        before = path.read_bytes() if path.exists() else b""
        put_bytes(before + b"\n" * (not before.endswith(b"\n") and before != b"") + line, path)


def probe(folder: Path) -> None:
    """Prove that objects can be put below `folder` and removed. Raises UserError otherwise."""
    if not is_object_store(folder):
        raise _read_only(folder)
    name = folder / f".clipkit-probe.{secrets.randbits(60)}"
    with store_errors(folder, writing=True):
        put_bytes(b"x", name)
        remove(name)


def fetch(path: Path, local: Path) -> None:
    """Copy a remote file to `local`, again when a transient error stops it or the copy is short.

    Raises UserError when there is none and for what the store refuses.
    """
    source = as_upath(path)

    def copy() -> None:
        size = source.fs.info(source.path)["size"]
        source.fs.get_file(source.path, str(local))
        if size is not None and local.stat().st_size != size:
            raise OSError(errno.EIO, f"{local.stat().st_size} of {size} bytes came")

    with store_errors(path):
        try:
            retry(copy)
        except FileNotFoundError as error:
            raise UserError(f"{path} doesn't exist: check the path") from error


def remove(path: Path) -> None:
    """Remove an object, or all below a folder; nothing happens where there is none. A bucket is never removed."""
    target = as_upath(path)
    if target.parent == target:
        raise InternalError(f"{path} is a whole bucket: clipkit never removes one")
    with store_errors(path), contextlib.suppress(FileNotFoundError):
        target.fs.rm(target.path, recursive=True)


def retry(
    action: Callable[[], R],
    *,
    attempts: int | None = None,
    first_pause: float | None = None,
    pause_growth: float = 4,
    tell: Callable[[Exception, int], None] = lambda error, attempt: None,
) -> R:
    """What `action` returns, tried up to `attempts` times with growing pauses while its errors are transient.

    The pauses are those of a transfer unless given. `tell` hears of each error that is followed by another attempt.
    """
    attempts, pause = attempts or ATTEMPTS, FIRST_PAUSE if first_pause is None else first_pause
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except Exception as error:
            if attempt == attempts or not is_transient(error):
                raise
            tell(error, attempt)
        time.sleep(pause * random.uniform(0.5, 1))
        pause *= pause_growth
    raise AssertionError


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed in a moment: connections, timeouts, a busy store."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | UserError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        return True
    return comes_from_store(error) and not isinstance(error, OSError) and type(error).__name__ not in _CREDENTIALS


@contextlib.contextmanager
def store_errors(path: Path, *, writing: bool = False) -> Iterator[None]:
    """Turn what a store's client raises into one line with a remedy; every other exception passes unchanged.

    A missing file passes too, unless `writing`, when only the bucket can be missing.
    """
    try:
        yield
    except Exception as error:
        if writing and isinstance(error, FileNotFoundError):
            raise UserError(f"can't write {path}: its bucket doesn't exist; make it or check the name") from error
        message = store_message(error, path)
        if message is None:
            raise
        raise UserError(message) from error


def reading(path: Path) -> contextlib.AbstractContextManager[None]:
    """`store_errors` for a path that may be local; the disk's errors pass."""
    return store_errors(path) if is_remote(path) else contextlib.nullcontext()


def store_message(error: Exception, path: Path | str) -> str | None:
    """The one line for a store's refusal, or None when the error is something else."""
    reason = one_line(error)
    if type(error).__name__ in _CREDENTIALS:
        return (
            f"no credentials for {path} ({reason}): set them as the store's own tools want them, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS"
        )
    if isinstance(error, PermissionError) and error.filename is None:  # the disk's own names its file
        return f"the store refuses {path} ({reason}): check the credentials and what they allow"
    if is_transient(error):
        return f"can't reach {path} ({reason}): check the endpoint and the network, and run the same command again"
    if comes_from_store(error):
        return f"the store refuses {path} ({reason}): check the bucket, the region and the name"
    return None


def comes_from_store(error: BaseException) -> bool:
    """Whether a store's client raised it, or what it was made from."""
    kinds = [*type(error).__mro__, *(type(error.__cause__).__mro__ if error.__cause__ else ())]
    return any(kind.__module__.partition(".")[0] in _CLIENTS for kind in kinds)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a local folder for temporary files, removed at the end. Raises UserError when none can be made.

    It is held by a kernel lock, so that what a killed process left can be recognised, and is removed here.
    It lies where `tempfile` puts things: TMPDIR chooses another disk.
    """
    while True:
        try:
            for left in Path(tempfile.gettempdir()).glob("clipkit-scratch-*"):
                with contextlib.suppress(OSError), flocked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix="clipkit-scratch-"))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"can't write temporary files ({reason}): free some space, or set TMPDIR") from error
        # Another process may have taken the folder for a left one before we hold it.
        with contextlib.suppress(FileNotFoundError), flocked(folder, fcntl.LOCK_EX):
            if folder.exists():
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


@contextlib.contextmanager
def flocked(path: Path, how: int, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Hold the kernel's lock on a local file or folder; yields its descriptor, opened with `flags`."""
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)
