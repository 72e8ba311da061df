"""Values of a column as 128-bit hashes in one sorted array, for looking up those of millions of records.

Millions of URLs as Python strings would fill the memory of each worker. So a value is kept as a BLAKE2b hash of 128
bits, all of them in one sorted array, which the workers map from the disk and share. No comparison with the values
themselves follows: that some two of N different values agree in 128 bits has a chance of N² / 2^129, which is 4 in
10^20 for the five billion records of the largest sets, far below that of a memory error. Nobody gains by searching for
a collision either: it would take 2^64 hashes, to have a record of one's own taken for another.
"""

import hashlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.storage.files import disk_errors

READ_BYTES = 1 << 20
BATCH = 4096

UInt64Array = npt.NDArray[np.uint64]


def value_bytes(value: Any) -> bytes:
    """A value of a table as records hold it, b"" for a missing one. Whole numbers beside gaps are pandas' floats."""
    if isinstance(value, bytes):
        return value
    if value is None or value != value:
        return b""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).encode("utf-8", "replace")


def digests(values: list[bytes]) -> UInt64Array:
    """128 bits of each value: uint64[2, n]."""
    joined = b"".join(hashlib.blake2b(value, digest_size=16).digest() for value in values)
    return np.ascontiguousarray(np.frombuffer(joined, "<u8").reshape(-1, 2).T)


def find(wanted: UInt64Array, values: list[bytes]) -> npt.NDArray[np.int64]:
    """Where each value stands in `wanted`, -1 where it doesn't: int64[len(values)]."""
    count = wanted.shape[1]
    if not count:
        return np.full(len(values), -1)
    asked = digests(values)
    place = np.searchsorted(wanted[0], asked[0])
    while True:
        inside = np.minimum(place, count - 1)
        same_first = (place < count) & (wanted[0][inside] == asked[0])
        behind = same_first & (wanted[1][inside] < asked[1])
        if not behind.any():  # two entries share their first 64 bits once in a lifetime
            return np.where(same_first & (wanted[1][inside] == asked[1]), place, -1)
        place = place + behind


def find_each(wanted: UInt64Array, values: Iterable[bytes]) -> npt.NDArray[np.int64]:
    """`find` for values that come one at a time and aren't kept."""
    rest, places = iter(values), [np.zeros(0, np.int64)]
    while batch := list(islice(rest, BATCH)):
        places.append(find(wanted, batch))
    return np.concatenate(places)


def sha256_of(files: Iterable[Path]) -> str:
    """The hash of the bytes of all files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with disk_errors(path), path.open("rb") as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
    return digest.hexdigest()
