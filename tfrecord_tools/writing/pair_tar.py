"""Write image-text tars as img2dataset's webdataset writer leaves them: KEY.jpg, KEY.json, KEY.txt, in key order.

The headers are made here because the standard library's `tarfile` (and webdataset, which calls it) spends 300 µs on a
sample, as much as fetching and resizing leave for everything else. They are POSIX ustar headers (IEEE 1003.1), with the
owner and mode that webdataset writes and a time of 0: when it was fetched is no part of the data.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from clipkit.errors import InternalError

_BLOCK = 512
_RECORD = 20 * _BLOCK
_BUFFER_BYTES = 1 << 20
_MAX_SIZE = 8**11 - 1  # eleven octal digits
_ZEROS = bytes(_RECORD)
_MODE, _ID, _TIME = b"0000444\0", b"0000000\0", b"00000000000\0"
_OWNER = b"bigdata".ljust(32, b"\0")
_AFTER_CHECKSUM = b"0" + bytes(100) + b"ustar\x0000" + _OWNER + _OWNER + bytes(8 + 8 + 155 + 12)
_CONSTANT_SUM = sum(_MODE + 2 * _ID + _TIME + b" " * 8 + _AFTER_CHECKSUM)


class PairTar:
    """Writes one tar of pairs; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=_BUFFER_BYTES)
        self._bytes = 0

    def add(self, key: str, jpg: bytes, caption: str, metadata: Mapping[str, Any]) -> None:
        """Append a pair. `metadata` must fit into JSON."""
        self._member(f"{key}.jpg", jpg)
        self._member(f"{key}.json", json.dumps(metadata).encode())
        self._member(f"{key}.txt", caption.encode())

    def _member(self, name: str, data: bytes) -> None:
        framed = b"".join((header(name, len(data)), data, _ZEROS[: -len(data) % _BLOCK]))
        self._file.write(framed)
        self._bytes += len(framed)

    def close(self) -> None:
        """Write the end of the archive, in whole records of 20 blocks as tar has it, and close the file."""
        if not self._file.closed:
            try:
                self._file.write(_ZEROS[: 2 * _BLOCK])
                self._file.write(_ZEROS[: -(self._bytes + 2 * _BLOCK) % _RECORD])
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a regular file of `size` bytes. Names are our keys: ASCII, under 100 characters."""
    encoded = name.encode("ascii")
    if len(encoded) >= 100 or size > _MAX_SIZE:
        raise InternalError(f"tar member {name} of {size} bytes doesn't fit a plain header: report this")
    length = b"%011o\0" % size
    checksum = sum(encoded) + sum(length) + _CONSTANT_SUM
    return b"".join((encoded.ljust(100, b"\0"), _MODE, _ID, _ID, length, _TIME, b"%06o\0 " % checksum, _AFTER_CHECKSUM))
