"""Embeddings in a temporary file, read back in tiles: a million of them take no more memory than a thousand."""

import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipkit.embedding.encoder import check_finite
from clipkit.storage.files import disk_errors

IN_MEMORY_BYTES = 64 << 20


class Vectors:
    """Rows float32[E] in the order they were added. The file is in memory while it is small, else in TMPDIR."""

    def __init__(self) -> None:
        # SIM115 asks for a `with` block, but the file must live as long as this object: the finalizer closes it.
        self.file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.rows = self.width = 0

    def add(self, rows_BE: Tensor) -> None:
        """Append rows. Raises UserError when they hold NaN or infinity, and when the disk is full."""
        with disk_errors(Path(tempfile.gettempdir())):
            self.file.seek(0, 2)
            self.file.write(check_finite(rows_BE).float().cpu().contiguous().numpy().tobytes())
        self.rows, self.width = self.rows + len(rows_BE), rows_BE.shape[1]

    def __len__(self) -> int:
        return self.rows

    def read(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows `start` to `stop` (or the end), float32[B, E] on a device."""
        values = np.empty((min(stop, self.rows) - start, self.width), np.float32)
        self.file.seek(start * self.width * 4)
        self.file.readinto(values.data.cast("B"))
        return torch.from_numpy(values).to(device)

    def tiles(self, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """All rows, `size` at a time: the number of the first, and float32[B, E] on a device."""
        for start in range(0, self.rows, size):
            yield start, self.read(start, start + size, device)


def vectors_of(matrix_NE: Tensor) -> Vectors:
    """The rows of a matrix."""
    vectors = Vectors()
    vectors.add(matrix_NE)
    return vectors
