"""Arrays in files on a disk or in a store: written whole or not at all, read as they are needed."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.storage.files import is_remote, write_beside
from clipkit.storage.stores import store_errors


def save_array(path: Path, values: npt.NDArray[Any]) -> None:
    """Write an array as NumPy's own file. Raises UserError when the disk or the store refuses."""
    with write_beside(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def load_array(path: Path) -> npt.NDArray[Any]:
    """An array as `save_array` left it."""
    if not is_remote(path):
        loaded: npt.NDArray[Any] = np.load(path)
        return loaded
    with store_errors(path):
        fetched: npt.NDArray[Any] = np.load(io.BytesIO(path.read_bytes()))
    return fetched
