"""Which rows of a table are wanted: an SQL condition over one row, judged by DuckDB before anything is fetched."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Mask = npt.NDArray[np.bool_]


class RowFilter:
    """A condition, checked once, then asked of many tables. Not for several threads at once."""

    def __init__(self, where: str, schema: pa.Schema) -> None:
        """Raises UserError in one line: see `check_where`."""
        raise NotImplementedError

    def mask(self, table: pa.Table) -> Mask:
        """bool[len(table)]: which rows fulfil the condition, in their order; unknown (null) counts as false."""
        raise NotImplementedError


def check_where(where: str, schema: pa.Schema) -> None:
    """Raise UserError for a condition that can't be asked of each row of a table with this schema alone."""
    RowFilter(where, schema)


def select(table: pa.Table, where: str) -> Mask:
    """bool[len(table)]; for many tables make a RowFilter once."""
    return RowFilter(where, table.schema).mask(table)


def select_rows(path: Path, where: str, columns: Sequence[str] | None = None) -> Mask:
    """bool[rows of the parquet file]: one row group after the other, a byte a row in memory."""
    raise NotImplementedError


def iter_masks(path: Path, row_filter: RowFilter, columns: Sequence[str] | None = None) -> Iterator[Mask]:
    """The same in parts of at most some ten thousand rows, in order; memory stays flat."""
    raise NotImplementedError
