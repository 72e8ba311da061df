"""Blocks of data on the local disk, shared by all processes of a machine, within a bound.

The order of training takes neighbours from a few hundred blocks at a time, each by another worker. What is dear to get
(a range of a remote file, a decoded part of a parquet file) is therefore got once, as a whole block, and kept where
every worker and rank of the machine finds it: in files, which the system keeps in memory as long as there is room. The
oldest go when the bound is reached. A file is whole or absent, and carries a checksum that each process checks once, so
neither a kill nor a bad disk gives wrong data; an entry that is damaged is got again.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import struct
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c

from clipkit.errors import UserError
from clipkit.storage.files import WRITTEN_BESIDE, disk_errors, make_folder
from clipkit.storage.ranges import LocalFile, RangeReader, Reopenable
from clipkit.storage.stores import flocked

_MAX_OPEN = 256
_MAX_KNOWN = 1 << 16  # entries whose checksum this process has checked
_STRIPES = 256  # so many blocks at most are got at once
_EVICT_TO = 0.9  # of the bound, so that not every new entry has to look for the oldest
_TOUCH_SECONDS = 60.0
_OLD_SECONDS = 3600.0  # what was being written so long ago was left by a killed process
_FREE_SHARE = 0.8  # of what is free on the disk, at most
_TRAILER = struct.Struct("<4sI")
_MAGIC = b"cblk"
_SIZE = struct.Struct("<q")
_SCRATCH = "clipkit-blocks"

Make = Callable[[], bytes]


class _Entry(LocalFile):
    """An entry's file, open: it can be read even after it was removed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.bytes -= _TRAILER.size
        status = os.fstat(self.descriptor)
        self.inode, self.used = status.st_ino, status.st_mtime

    def is_whole(self) -> bool:
        """Whether the contents are those that were written."""
        data = self.read(0, self.bytes + _TRAILER.size)
        if self.bytes < 0 or len(data) != self.bytes + _TRAILER.size:
            return False
        magic, crc = _TRAILER.unpack(data[-_TRAILER.size :])
        return bool(magic == _MAGIC and crc == google_crc32c.value(data[: -_TRAILER.size]))


class BlockCache(Reopenable):
    """Entries of bytes by key, at most `limit` bytes of them, in a folder of the local disk.

    Safe from several threads and processes. A pickled one uses the same folder.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Make the folder. Raises UserError when it can't be written."""
        self.folder, self.limit = folder, limit
        make_folder(folder)
        with disk_errors(folder):
            (folder / "locks").mkdir(exist_ok=True)
            free = shutil.disk_usage(folder).free
        self.limit = min(limit, int(_FREE_SHARE * (free + self.stored())))
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Entry] = OrderedDict()
        self._known: OrderedDict[tuple[str, int], None] = OrderedDict()

    def read(self, key: str, make: Make, start: int = 0, length: int | None = None, lock: str | None = None) -> bytes:
        """Part of an entry, all from `start` on by default; `make` gives the whole entry where there is none.

        Whoever needs an entry of the same `lock` (the key by default) meanwhile, in any process, waits for it.
        """
        name = _name(key)
        entry = self._opened(name)
        if entry is None:
            made = self.ensure(key, make, lock)
            entry = self._opened(name) if made is None else None
            if entry is None:
                data = made if made is not None else make()
                return data[start:] if length is None else data[start : start + length]
        return entry.read(start, entry.bytes if length is None else max(start, min(start + length, entry.bytes)))

    def ensure(self, key: str, make: Make, lock: str | None = None) -> bytes | None:
        """Make an entry unless it is there; returns what was made, or None."""
        path = self._path(_name(key))
        if path.exists():
            return None
        with self._locked(f"locks/{int(_name(lock or key)[:8], 16) % _STRIPES}"):
            if path.exists():
                return None
            data = make()
            if not path.exists():
                self.put(key, data)
            return data

    def put(self, key: str, data: bytes) -> None:
        """Add an entry; one that alone is above the bound isn't kept. Raises UserError when the disk is full."""
        size = len(data) + _TRAILER.size
        if size > self.limit:
            return
        path = self._path(_name(key))
        self._reserve(size, self.limit)
        try:
            _write(path, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                with disk_errors(self.folder):
                    raise
            self._reserve(size, self.stored() // 2)
            with disk_errors(self.folder):
                _write(path, data)

    def has(self, key: str) -> bool:
        """Whether the entry is there now, and whole."""
        return self._opened(_name(key)) is not None

    def drop(self, key: str) -> None:
        """Remove an entry that turned out to be damaged."""
        name = _name(key)
        with self._lock:
            self._open.pop(name, None)
        self._path(name).unlink(missing_ok=True)

    def file(self, key: str, make: Make) -> Path:
        """An entry's file, which holds eight bytes more than the entry. It may be removed at any time: open it now."""
        name = _name(key)
        if self._opened(name) is None:
            self.ensure(key, make)
        return self._path(name)

    def stored(self) -> int:
        """Bytes that all entries take now, counted on the disk."""
        return sum(size for _, size, _ in self._entries())

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _opened(self, name: str) -> _Entry | None:
        with self._lock:
            entry = self._open.get(name)
            if entry is not None:
                self._open.move_to_end(name)
                return entry
        path = self._path(name)
        try:
            entry = _Entry(path)
        except FileNotFoundError:
            return None
        known = (name, entry.inode)
        if known not in self._known and not entry.is_whole():
            path.unlink(missing_ok=True)
            return None
        if time.time() - entry.used > _TOUCH_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(path)
        with self._lock:
            self._known[known] = None
            self._open[name] = entry
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        return entry

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        """Hold a file of the folder, against other threads too, for each has a descriptor of its own: yields that."""
        with contextlib.ExitStack() as stack:
            with disk_errors(self.folder):
                held = flocked(self.folder / name, fcntl.LOCK_EX, os.O_RDWR | os.O_CREAT)
                descriptor = stack.enter_context(held)
            yield descriptor

    def _reserve(self, size: int, limit: int) -> None:
        """Count `size` bytes more in the sum that all processes keep, and make room for them within a limit.

        The sum may be too high after a kill, until entries are next removed.
        """
        with self._locked("size") as descriptor:
            data = os.pread(descriptor, _SIZE.size, 0)
            total = size + (_SIZE.unpack(data)[0] if len(data) == _SIZE.size else self.stored())
            if total > limit:
                total = size + self._evict(int(_EVICT_TO * limit) - size)
            os.pwrite(descriptor, _SIZE.pack(total), 0)

    def _evict(self, limit: int) -> int:
        """Remove the entries that weren't used for longest until `limit` bytes are left; returns how many are."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    def _entries(self) -> Iterator[tuple[float, int, str]]:
        """Time of last use, bytes and path of each entry; removes what killed processes were writing."""
        for folder in list(os.scandir(self.folder)):
            if len(folder.name) != 2 or not folder.is_dir():
                continue
            for file in list(os.scandir(folder.path)):
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    if WRITTEN_BESIDE.fullmatch(file.name) and time.time() - status.st_mtime > _OLD_SECONDS:
                        Path(file.path).unlink()
                    else:
                        yield status.st_mtime, status.st_size, file.path


def _name(key: str) -> str:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Not flushed to the disk: after a power cut the checksum tells."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.randbits(60)}")
    try:
        with temporary.open("wb", buffering=0) as file:
            for part in (data, _TRAILER.pack(_MAGIC, google_crc32c.value(data))):
                if file.write(part) != len(part):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def scratch_cache(name: str, limit: int) -> BlockCache:
    """A cache that is removed when the last process of this machine that opened it under this `name` ends.

    It lies where `tempfile` puts things: TMPDIR chooses another disk. What a killed process left is removed by the
    next one that opens any.
    """
    parent, prefix = Path(tempfile.gettempdir()), f"{_SCRATCH}-{os.getuid()}-"
    folder = parent / f"{prefix}{_name(name)[:16]}"
    for left in parent.glob(f"{prefix}*"):
        if left != folder:
            with contextlib.suppress(OSError):
                _leave(os.open(left, os.O_RDONLY), left)
    while True:
        with disk_errors(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise UserError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
        # Its last user may be removing it: then it isn't the folder of that name any more.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                cache = BlockCache(folder, limit)
                weakref.finalize(cache, _leave, descriptor, folder)
                return cache
            os.close(descriptor)


def _leave(descriptor: int, folder: Path) -> None:
    """Let go of a scratch folder, and remove it unless another process holds it."""
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


class CachedRanges:
    """A RangeReader whose files are got block by block through a cache."""

    def __init__(self, reader: RangeReader, cache: BlockCache) -> None:
        self.reader, self.cache = reader, cache

    def read(self, number: int, block: tuple[int, int], start: int, end: int) -> bytes:
        """Bytes [start, end) of file `number`, which lie in `block`, a range of bytes that is got as a whole."""
        make = self._maker(number, block)
        return self.cache.read(self._key(number, block), make, start - block[0], end - start)

    def fill(self, number: int, block: tuple[int, int]) -> None:
        """Get a block into the cache where it isn't there."""
        self.cache.ensure(self._key(number, block), self._maker(number, block))

    def drop(self, number: int, block: tuple[int, int]) -> None:
        """Forget a block that turned out to be damaged."""
        self.cache.drop(self._key(number, block))

    def _maker(self, number: int, block: tuple[int, int]) -> Make:
        return lambda: self.reader.read(number, *block)

    def _key(self, number: int, block: tuple[int, int]) -> str:
        file = self.reader.files[number]
        return f"{self.reader.path(number)} {file.bytes} {file.version} {block[0]}-{block[1]}"
