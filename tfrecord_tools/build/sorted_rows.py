"""Rows sorted by a 64-bit key in a file of which any range of keys can be read without the rest.

What is sorted over all of a dataset (hashes, places in a shuffle) doesn't fit into memory, so it lies in many such
files, and each worker reads its range of keys from all of them, on a disk or in a store alike. The file is
uint64[BUCKETS + 1] of row numbers, where each of as many equal ranges of keys begins, and then the rows.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.storage.files import is_remote, write_beside
from clipkit.storage.ranges import read_range

BUCKETS = 1 << 12
KEY_END = 1 << 64
_SHIFT = np.uint64(52)
_HEAD_BYTES = 8 * (BUCKETS + 1)

Rows = npt.NDArray[Any]


def write_sorted(path: Path, rows: Rows) -> None:
    """Write structured rows, sorted by their field `key` (uint64)."""
    starts = np.searchsorted(rows["key"] >> _SHIFT, np.arange(BUCKETS + 1, dtype=np.uint64)).astype("<u8")
    with write_beside(path) as temporary, temporary.open("wb") as file:
        file.write(starts.tobytes())
        file.write(rows.tobytes())


def read_sorted(path: Path, dtype: np.dtype[Any], low: int = 0, high: int = KEY_END) -> Rows:
    """The rows of `dtype` with keys in [low, high), in order. Raises UserError when the file is gone."""
    starts = np.frombuffer(read_bytes(path, 0, _HEAD_BYTES), "<u8")
    first, last = int(starts[low >> 52]), int(starts[-(-high >> 52)])
    rows = np.frombuffer(read_bytes(path, _HEAD_BYTES + first * dtype.itemsize, (last - first) * dtype.itemsize), dtype)
    keys = rows["key"]
    begin = np.searchsorted(keys, np.uint64(low))
    end = len(rows) if high >= KEY_END else np.searchsorted(keys, np.uint64(high))
    return rows[begin:end]


def read_bytes(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes of a local or remote file. Raises UserError when it is gone or shorter."""
    try:
        if is_remote(path):
            return read_range(path, offset, offset + length)
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, offset)
    except FileNotFoundError as error:
        raise gone(path) from error
    if len(data) < length:
        raise gone(path)
    return data


def gone(path: Path) -> UserError:
    """The one line for an intermediate file that is missing or cut short."""
    return UserError(f"{path} is gone or cut short: run the same command again")
