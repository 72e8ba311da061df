"""Embeddings that were computed before: kept on the disk by what they were computed from, in pieces.

A piece is a batch of images or of texts. Its key is a hash of the weights, the architecture, the arithmetic, and the
batch's own content (encoded images and preprocessing, or token ids), so the same model on the same data finds it under
whatever name the two are given, and an evaluation that was killed goes on behind its last piece.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clipkit.embedding.encoder import Compute, Encoder
from clipkit.errors import UserError
from clipkit.log import warn_on_stderr
from clipkit.storage.cache import BlockCache


@dataclass(frozen=True, eq=False)
class Piece:
    """float32[n, E] unit vectors, and which of the piece's items they are of; the others have a reason why not."""

    vector_NE: NDArray[np.float32]
    index_N: NDArray[np.int64]
    problems: dict[int, str]


def open_cache(folder: Path | None, limit: int) -> BlockCache | None:
    """The cache in `folder`, or else in the user's cache folder. If the latter is not writable: None, and a warning.

    Raises UserError if `folder` is given and not writable.
    """
    if folder is not None:
        return BlockCache(folder, limit)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return BlockCache(home / "clipkit" / "embeddings", limit)
    except UserError as error:
        warn_on_stderr(f"embeddings aren't kept: {error}")
        return None


def key_of(encoder: Encoder, compute: Compute, content: bytes) -> str:
    """Under which name a piece with this content is kept.

    On a CPU the number of threads is part of the hardware, as matrix products are divided by it: of a small model in
    float32, three threads gave other last bits (9e-8) than 1, 2, 4 and 8 in one of 25 numbers, and none elsewhere.
    """
    arithmetic = compute.device.arithmetic(compute.precision or encoder.precision)
    how = f"{encoder.weights} {encoder.architecture} {arithmetic} {compute.device.hardware()} torch {torch.__version__}"
    return hashlib.blake2b(how.encode() + content, digest_size=16).hexdigest()


def read_piece(cache: BlockCache, key: str, make: Callable[[], Piece]) -> Piece:
    """A piece as it was kept, or made now. One that is damaged on the disk is made again."""
    return unpack(cache.read(key, lambda: pack(make())))


def pack(piece: Piece) -> bytes:
    """A piece as bytes: the length of a JSON header, the header, the vectors."""
    header = {"index": piece.index_N.tolist(), "problems": piece.problems, "width": piece.vector_NE.shape[1]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + np.ascontiguousarray(piece.vector_NE, "<f4").tobytes()


def unpack(data: bytes) -> Piece:
    """The inverse of `pack`."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    vector_NE = np.frombuffer(data, "<f4", offset=start).reshape(-1, header["width"]).copy()
    problems = {int(place): reason for place, reason in header["problems"].items()}
    return Piece(vector_NE, np.array(header["index"], dtype=np.int64), problems)
