"""Read parquet files that hold the images themselves: img2dataset's, Hugging Face's data sets, one's own.

An image is a binary column, or Hugging Face's struct of `bytes` and `path`. Rows are read a few at a time, for a row
group of ten thousand images would take a third of a gigabyte.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.formats.tables import CAPTION_NAMES, find_image_column, find_name, holds_images
from clipkit.tfrecord_tools.reasons import NO_IMAGE
from clipkit.tfrecord_tools.sample import DROPPED_COLUMNS, Sample

BATCH_ROWS = 64
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class PairColumns:
    """Which columns of a table hold the image (or its file name) and the caption; None is found by the usual names."""

    image: str | None = None
    caption: str | None = None


USUAL = PairColumns()


def read_parquet(path: Path, start: int = 0, stop: int | None = None, columns: PairColumns = USUAL) -> Iterator[Sample]:
    """The samples of the rows [start, stop) of a parquet file with images.

    Raises UserError when it is damaged, or when it has no column with images or none with captions.
    """
    with open_parquet(path) as file:
        schema = file.schema_arrow
        image = image_column(schema, columns)
        if image is None:
            raise UserError(f"{path} has no column with images ({', '.join(schema.names)}): name it by --image-column")
        caption = caption_column(schema, columns, path)
        for number, row in read_rows(file, start, stop, path):
            yield make_sample(f"{path.stem}-{number}", _image_bytes(row.pop(image)), row, caption)


def make_sample(fallback: str, image: bytes | None, row: dict[str, Any], caption_name: str) -> Sample:
    """A sample of a row's image and its other columns; `fallback` is the key where the row has none."""
    caption = row.pop(caption_name)
    for name in DROPPED_COLUMNS:
        row.pop(name, None)
    if caption_name == "txt":
        row.pop("caption", None)  # img2dataset writes it twice
    key = row.get("key")
    key = row["key"] = fallback if key is None or key == "" else str(key)
    return Sample(key, image, None if caption is None else str(caption), row, None if image else NO_IMAGE)


def open_parquet(path: Path) -> pq.ParquetFile:
    """A local parquet file that is read page by page. Raises UserError when it can't be read as one."""
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False, memory_map=False)
    except (pa.ArrowException, EOFError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> UserError:
    """The one line for a parquet file that its reader refuses."""
    reason = str(error).partition("\n")[0]
    return UserError(f"{path} can't be read as parquet ({reason}): it is damaged or of another kind; fetch it again")


def image_column(schema: pa.Schema, columns: PairColumns) -> str | None:
    """The column with images, or None. Raises UserError when the one that was named holds none."""
    if columns.image is not None:
        if columns.image in schema.names and holds_images(schema.field(columns.image).type):
            return columns.image
        if columns.image in schema.names:
            return None  # names of files
        raise UserError(f"no column {columns.image!r} in the table: choose among {', '.join(schema.names)}")
    return find_image_column(schema)


def caption_column(schema: pa.Schema, columns: PairColumns, path: Path) -> str:
    """The column with captions. Raises UserError when there is none."""
    if columns.caption is not None:
        if columns.caption not in schema.names:
            raise UserError(
                f"{path} has no column {columns.caption!r}: choose --caption-column among {', '.join(schema.names)}"
            )
        return columns.caption
    found = find_name(schema.names, CAPTION_NAMES)
    if found is None:
        raise UserError(
            f"{path} has no column {' or '.join(CAPTION_NAMES)} ({', '.join(schema.names)}): name it by "
            "--caption-column"
        )
    return found


def read_rows(
    file: pq.ParquetFile, start: int, stop: int | None, path: Path, batch_rows: int = BATCH_ROWS
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and values of the rows [start, stop), in plain Python types. Raises UserError when they can't be read."""
    starts = row_group_starts(file)
    end = int(starts[-1]) if stop is None else min(stop, int(starts[-1]))
    if start >= end:
        return
    first = int(np.searchsorted(starts, start, side="right")) - 1
    last = int(np.searchsorted(starts, end, side="left"))
    position = int(starts[first])
    try:
        for batch in file.iter_batches(batch_rows, row_groups=list(range(first, last))):
            skip = max(start - position, 0)
            part = batch.slice(skip, end - position - skip) if skip < batch.num_rows else batch.slice(0, 0)
            yield from enumerate(plain(part), position + skip)
            position += batch.num_rows
            if position >= end:
                return
    except (pa.ArrowException, OSError, EOFError) as error:
        raise damaged(path, error) from error


def row_group_starts(file: pq.ParquetFile) -> "np.typing.NDArray[np.int64]":
    """int64[row groups + 1]: the number of the first row of each, and of all rows."""
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def plain(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """A batch's rows in the types that JSON has, and bytes; dates, times and decimals as text."""
    arrays = []
    for array in batch.columns:
        kind = array.type
        if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
            array = pc.cast(array, pa.string())
        arrays.append(array)
    rows: list[dict[str, Any]] = pa.RecordBatch.from_arrays(arrays, names=batch.schema.names).to_pylist()
    return rows


def row_at(path: Path, position: int, size: int) -> int:
    """The row at a byte position, when the row groups lie one after the other on `size` bytes, rows evenly in each."""
    with open_parquet(path) as file:
        metadata = file.metadata
        groups = [metadata.row_group(number) for number in range(file.num_row_groups)]
        lengths = [
            sum(group.column(column).total_compressed_size for column in range(group.num_columns)) for group in groups
        ]
        left = position * sum(lengths) // max(size, 1)
        row = 0
        for group, length in zip(groups, lengths, strict=True):
            if left < length:
                return row + left * group.num_rows // length
            left -= length
            row += group.num_rows
        return row


def _image_bytes(value: Any) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) and value else None
