"""Ranges of local and remote files, asked for again until they come whole.

Training reads for weeks from stores that now and then refuse, break off, answer short or not at all. A range that
doesn't come is asked for again after growing pauses; one that stalls is cut off first, for a client without a time
limit would wait forever. A warning on stderr tells of what was repeated; what fails in the end is one line.

Files are read with `pread` and not through a mapping: a mapped file counts as the process's own memory, and one that is
cut short while it is in use kills the process where `pread` gives an error that can be reported.
"""

import errno
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipkit.errors import UserError, one_line
from clipkit.log import warn_on_stderr
from clipkit.storage.files import allow_many_files, is_remote
from clipkit.storage.stores import StoredFile, as_upath, is_transient, retry, store_errors

# As many files as the loader's order has blocks at a time (`train.order`), or nearly: each may be in another one. Where
# a process may not open many, several readers and all else must fit into what it may.
_MAX_OPEN, _SHARE = 320, 8

ATTEMPTS = 6
FIRST_PAUSE = 0.5  # seconds before the second attempt; twice as long before each further one
# An answer may take so many seconds, and one more for so many bytes: slower than that, no training is fed.
STALL_SECONDS = 20.0
SLOWEST = 250_000
PIECE_BYTES = 8_000_000

Warn = Callable[[str], None]


def read_range(path: Path, start: int, end: int, warn: Warn = warn_on_stderr) -> bytes:
    """Bytes [start, end) of a remote file; errors that may pass, stalls and short answers are tried again.

    Raises FileNotFoundError when there is no such file, and UserError when the store refuses or doesn't answer.
    """
    return _read(path, start, end, warn) if start < end else b""


def read_object(path: Path) -> bytes:
    """All of a remote file whose size isn't known, and is small. Raises as `read_range`."""
    return _read(path, None, None, warn_on_stderr)


def _read(path: Path, start: int | None, end: int | None, warn: Warn) -> bytes:
    part = str(path) if start is None or end is None else f"{path}, bytes {start:,} to {end:,}"

    def ask() -> bytes:
        data = _ask(path, start, end)
        if start is not None and end is not None and len(data) != end - start:
            raise OSError(errno.EIO, f"{len(data):,} of {end - start:,} bytes came")
        return data

    def tell(error: Exception, attempt: int) -> None:
        if isinstance(error, TimeoutError) or attempt > 1:  # a single failure that isn't a stall isn't worth a line
            warn(f"{part}: {_reason(error)}; asked again ({attempt + 1} of {ATTEMPTS})")

    try:
        return retry(ask, attempts=ATTEMPTS, first_pause=FIRST_PAUSE, pause_growth=2, tell=tell)
    except Exception as error:
        if not is_transient(error):
            with store_errors(path):
                raise
        raise UserError(
            f"can't read {path} ({_reason(error)}, {ATTEMPTS} times): check the endpoint and the network, and run the "
            "same command again"
        ) from error


def _reason(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else one_line(error)


def read_whole(path: Path, size: int) -> bytes:
    """All `size` bytes of a remote file, in pieces that are short enough for a time limit. Raises as `read_range`."""
    return b"".join(read_range(path, start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES))


def _ask(path: Path, start: int | None, end: int | None) -> bytes:
    """One request, cut off when it takes too long. Raises TimeoutError then."""
    target = as_upath(path)
    seconds = STALL_SECONDS + (PIECE_BYTES if start is None or end is None else end - start) / SLOWEST
    if getattr(target.fs, "async_impl", False) and hasattr(target.fs, "loop"):
        from fsspec.asyn import sync

        data: bytes = sync(target.fs.loop, target.fs._cat_file, target.path, start=start, end=end, timeout=seconds)
        return data
    # Such a client can't be cut off: its thread is left behind, and ends with its answer or the process.
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(target.fs.cat_file(target.path, start=start, end=end))
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError
    if isinstance(answer[0], Exception):
        raise answer[0]
    found: bytes = answer[0]
    return found


class LocalFile:
    """An open file that is closed when its last user, in whichever thread, drops it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.bytes = os.fstat(self.descriptor).st_size

    def read(self, start: int, end: int) -> bytes:
        # A method, so that the object outlives the call: a bare descriptor could be closed before.
        return os.pread(self.descriptor, end - start, start)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _RemoteFile:
    """The same for an object of a store, to which each range is a request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with store_errors(path):
            self.bytes = retry(lambda: path.stat().st_size)

    def read(self, start: int, end: int) -> bytes:
        return read_range(self.path, start, end)


class Reopenable(ABC):
    """Pickled without its open files: what begins with `_` stays behind, and `_start` makes it in the new process."""

    @abstractmethod
    def _start(self) -> None:
        """Open what isn't pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


class RangeReader(Reopenable):
    """Files by number, opened when first needed and closed when too many are open.

    Safe from several threads. A pickled one opens its files again in the process that unpickles it.
    """

    def __init__(self, folder: Path, files: Sequence[StoredFile]) -> None:
        self.folder, self.files = folder, tuple(files)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, LocalFile | _RemoteFile] = OrderedDict()
        self._most = max(1, min(_MAX_OPEN, allow_many_files() // _SHARE))

    def path(self, number: int) -> Path:
        """Where a file is."""
        return self.folder / self.files[number].name

    def read(self, number: int, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, fewer where a local one ends before.

        Raises UserError when the file is gone, has changed, or can't be read.
        """
        try:
            return self._opened(number).read(start, end)
        except FileNotFoundError as error:
            raise UserError(f"{self.path(number)} is gone: put the shard back or build it again") from error
        except OSError as error:
            raise UserError(
                f"can't read {self.path(number)} ({error.strerror or error}): check the disk, and run the command again"
            ) from error

    def _opened(self, number: int) -> LocalFile | _RemoteFile:
        with self._lock:
            file = self._open.get(number)
            if file is not None:
                self._open.move_to_end(number)
                return file
        path = self.path(number)
        file = _RemoteFile(path) if is_remote(path) else LocalFile(path)
        if file.bytes != self.files[number].bytes:  # the offsets are those of another file
            raise UserError(f"{path} has changed since the dataset was opened (clipkit purge?): run the command again")
        with self._lock:
            self._open[number] = file
            if len(self._open) > self._most:
                self._open.popitem(last=False)
        return file
