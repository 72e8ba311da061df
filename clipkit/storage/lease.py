"""A lock on a folder of an object store.

No kernel releases it when its holder dies, so it is a lease: an object that says who holds the folder and when the
holder was last seen, written again every minute. A lease that wasn't refreshed for five minutes may be taken over, and
so may one whose process is known to be dead because it ran on this machine, in the same container. It rests on clocks
that agree within some minutes and on the store's conditional put (S3, Google and memory have one; on a store without,
two that start within the same instant may both start). It keeps a second command from working on the same folder by
mistake: the same one would do all work twice, another one (a purge by another list, a build with other options) would
mix its shards in.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clipkit.config import to_json
from clipkit.errors import UserError
from clipkit.storage.stores import put_bytes, remove, retry, store_errors

REFRESH_SECONDS = 60.0
STALE_SECONDS = 300.0


@dataclass(frozen=True)
class Lease:
    """Who holds a folder. `token` differs between holders of one process; `seen` is in seconds since 1970."""

    token: str
    host: str
    pid: int
    seen: float


@cache
def here() -> str:
    """This machine and, as a few digits, its container: several may have one host's name, and none sees the processes
    of the others.
    """
    seen = ""
    with contextlib.suppress(OSError):
        seen = Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()} ({hashlib.sha256(seen.encode()).hexdigest()[:6]})"


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock object `path` while the block runs.

    Raises UserError when another process holds it, and at the end when another took it over meanwhile (because this
    one could not reach the store for minutes).
    """
    token = secrets.token_hex(8)
    with store_errors(path, writing=True):
        _acquire(path, token)
    ended = threading.Event()
    lost: list[Lease] = []
    refresher = threading.Thread(target=_refresh, args=(path, token, ended, lost), name="clipkit-lease", daemon=True)
    refresher.start()
    try:
        yield
    finally:
        ended.set()
        refresher.join()
        if not lost:
            with contextlib.suppress(Exception):  # it goes stale by itself
                held = _read(path)
                if held and held.token == token:
                    remove(path)
    if lost:
        raise UserError(
            f"{path.parent} was taken over by another clipkit ({_describe(lost[0])}) while this one couldn't reach the "
            "store: stop one of them and run the command again"
        )


def _acquire(path: Path, token: str) -> None:
    for _ in range(2):
        try:
            put_bytes(_lease(token), path, "create")
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            if _read(path) is None:  # a store without conditional puts
                put_bytes(_lease(token), path)
        held = _read(path)
        if held and held.token == token:
            return
        if held and not _is_dead(held):
            raise UserError(
                f"{path.parent} is being written by another clipkit ({_describe(held)}, seen "
                f"{max(0, round(time.time() - held.seen))} s ago): wait for it or stop it; the lock of a killed one is "
                f"free after {STALE_SECONDS / 60:.0f} minutes"
            )
        remove(path)
    raise UserError(f"{path.parent} was taken by another clipkit just now: wait for it or stop it")


def _refresh(path: Path, token: str, ended: threading.Event, lost: list[Lease]) -> None:
    while not ended.wait(REFRESH_SECONDS):
        with contextlib.suppress(Exception):  # the next minute may be better
            held = _read(path)
            if held and held.token != token:
                lost.append(held)
                return
            put_bytes(_lease(token), path)


def _lease(token: str) -> bytes:
    return json.dumps(to_json(Lease(token, here(), os.getpid(), time.time()))).encode()


def _read(path: Path) -> Lease | None:
    """The lease, or None when there is none or it can't be understood."""
    try:
        return Lease(**json.loads(retry(path.read_bytes)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _is_dead(held: Lease) -> bool:
    if time.time() - held.seen > STALE_SECONDS:
        return True
    if held.host != here():
        return False
    try:
        os.kill(held.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _describe(held: Lease) -> str:
    return f"process {held.pid} on {held.host}"
