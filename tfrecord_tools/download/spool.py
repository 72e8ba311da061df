"""A file without a name for the images of a shard until they can be written in order."""

import os
import tempfile
import threading

from clipkit.storage.files import disk_errors, is_remote
from clipkit.tfrecord_tools.account.shard_state import Layout


class Spool:
    """Bytes at places, on the disk of the output (of a remote output: where TMPDIR says).

    It has no name, so a killed process leaves nothing of it. It is closed when its last user lets go of it: a thread
    that works on though the download has failed must not write into a file that has got its number since. Safe from
    several threads.
    """

    def __init__(self, layout: Layout) -> None:
        """Raises UserError when the disk refuses."""
        self.root = layout.root
        self.lock = threading.Lock()
        self.end = 0
        with (
            disk_errors(self.root),
            tempfile.TemporaryFile(dir=None if is_remote(self.root) else layout.own, buffering=0) as file,
        ):
            self.descriptor = os.dup(file.fileno())

    def append(self, data: bytes) -> int:
        """Write bytes at the end; return their place. Raises UserError when the disk refuses."""
        with self.lock:
            start = place = self.end
            self.end += len(data)
        left = memoryview(data)
        with disk_errors(self.root):
            while left:
                written = os.pwrite(self.descriptor, left, place)
                left, place = left[written:], place + written
        return start

    def read(self, place: int, count: int) -> bytes:
        """The bytes at a place."""
        return os.pread(self.descriptor, count, place)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
