"""Read parquet files that hold the images themselves, and folders of images with a table of file names and captions.

An image is a binary column, or Hugging Face's struct of `bytes` and `path`, or a file that the row names. A folder's
table (CSV, TSV, JSON lines or parquet; Hugging Face's `metadata.csv` and `metadata.jsonl` are of this kind) is copied
once to parquet, so that a worker finds its rows without reading those before them. Rows with images are read a few at a
time, for a row group of ten thousand would take a third of a gigabyte.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipkit.errors import UserError
from clipkit.formats.captions import merge_captions
from clipkit.formats.kinds import own_name
from clipkit.formats.tables import (
    CAPTION_NAMES,
    COPY_ROWS,
    FILE_NAMES,
    KEY_NAME,
    USUAL,
    PairColumns,
    RowReader,
    is_bytes,
    read_schema,
)
from clipkit.storage.files import is_remote, local_copy, means_absent
from clipkit.storage.stores import as_upath, reading
from clipkit.tfrecord_tools.reasons import NO_IMAGE
from clipkit.tfrecord_tools.sample import Sample, drop_account, samples_of
from clipkit.tfrecord_tools.tables.copies import copy_table

BATCH_ROWS = 64
SUMS = 100_000  # at most so many sums of sizes are held, however long the table
_BUFFER_BYTES = 1 << 20


def open_rows(path: Path, batch_rows: int = BATCH_ROWS, columns: Sequence[str] | None = None) -> RowReader:
    """A parquet file with images, or a folder's table; of a remote one no more is fetched than is asked for.

    Raises UserError when it can't be read, and when two of its columns have one name.
    """
    rows = RowReader(path, columns, batch_rows, _BUFFER_BYTES)
    names = rows.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has {names.count(twice)} columns {twice!r}: rename all but one")
    return rows


def stored_columns(rows: RowReader, pair: Sequence[str]) -> list[str]:
    """The columns that a record can hold: the `pair` of image and caption, and metadata that are text or numbers.

    Of columns of bytes those are text that begin with UTF-8 in their first rows. A second image, and whatever has bytes
    inside, is left out.
    """
    held = [field for field in rows.schema if field.name in pair or not _has_bytes_inside(field.type)]
    binary = [field.name for field in held if field.name not in pair and _is_bytes(field.type)]
    first = next(rows.file.iter_batches(BATCH_ROWS, columns=binary), None) if binary else None
    lost = {name for name in binary if first is not None and not _is_text(first.column(name))}
    return [field.name for field in held if field.name not in lost]


def _is_bytes(kind: pa.DataType) -> bool:
    return is_bytes(kind) or bool(pa.types.is_fixed_size_binary(kind))


def _has_bytes_inside(kind: pa.DataType) -> bool:
    fields = [kind.field(number) for number in range(kind.num_fields)]
    return any(_is_bytes(field.type) or _has_bytes_inside(field.type) for field in fields)


def _is_text(values: pa.Array) -> bool:
    try:
        return all(b"\0" not in value and value.decode("utf-8") is not None for value in values.drop_null().to_pylist())
    except UnicodeDecodeError:
        return False


def read_parquet(path: Path, start: int = 0, stop: int | None = None, columns: PairColumns = USUAL) -> Iterator[Sample]:
    """The samples of the rows [start, stop) of a parquet file with images.

    Raises UserError when it is damaged, or when it has no column with images or none with captions.
    """
    with open_rows(path) as whole:
        image = columns.require_image(whole.schema, path)
        caption = columns.require_caption(whole.schema, path)
        stored = stored_columns(whole, (image, caption))
    with open_rows(path, columns=stored) as rows:
        for number, row in _read(rows, start, stop):
            found = _sample(f"{path.stem}-{number}", _image_bytes(row.pop(image)), row, caption)
            yield from samples_of(found, columns.captions, path)


def read_folder(
    folder: Path, table: Path, start: int = 0, stop: int | None = None, columns: PairColumns = USUAL
) -> Iterator[Sample]:
    """The samples of the rows [start, stop) of `table`, parquet; file names are relative to `folder`.

    An image that isn't there is a sample without an image. Raises UserError when the table lacks a column.
    """
    with local_copy(table) as local, ExitStack() as stack:
        whole = stack.enter_context(open_rows(local, COPY_ROWS))
        image = columns.require_file(whole.schema.names, folder)
        caption = columns.require_caption(whole.schema, folder)
        rows = stack.enter_context(open_rows(local, COPY_ROWS, stored_columns(whole, (image, caption))))
        for number, row in _read(rows, start, stop):
            name = row.get(image)
            found = _sample(str(name or number), _read_image(folder, name), row, caption)
            yield from samples_of(found, columns.captions, folder)


def copy_pairs(path: Path, copy: Path, columns: PairColumns = USUAL) -> None:
    """Write a folder's table as parquet at `copy`; keys, captions and names stay text, even when all are numbers.

    Raises UserError when it can't be read to its end.
    """
    usual = {KEY_NAME, *CAPTION_NAMES, *FILE_NAMES}
    quoting = columns.quoting or "auto"
    schema = read_schema(path, (), quoting)
    columns.require_file(schema.names, path.parent)
    copy_table(
        path,
        copy,
        lambda name: name.lower() in usual or name in (columns.image, columns.caption),
        captions=columns.require_caption(schema, path.parent),
        quoting=quoting,
    )


def _sample(fallback: str, image: bytes | None, row: dict[str, Any], caption_name: str) -> Sample:
    """A sample of a row's image and its other columns; `fallback` is the key where the row has none."""
    caption = row.pop(caption_name)
    drop_account(row)
    if caption_name == "txt" and (caption is None or isinstance(caption, str)):
        caption = merge_captions(caption, row)
    name = own_name(row, KEY_NAME)
    key = row.get(name)
    key = row[name] = fallback if key is None or key != key or key == "" else str(key)
    return Sample(key, image, caption, _as_text(row), None if image else NO_IMAGE)


def _image_bytes(value: Any) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) and value else None


def _read_image(folder: Path, name: Any) -> bytes | None:
    if not isinstance(name, str) or not name:
        return None
    try:
        with reading(folder):
            return (folder / name).read_bytes() or None
    except (OSError, ValueError) as error:
        if not means_absent(error):
            raise
        return None


# ---- Rows ------------------------------------------------------------------------------------------------------------


def _read(rows: RowReader, start: int, stop: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and values of the rows [start, stop). Raises UserError when they can't be read."""
    count = int(rows.starts[-1])
    for first, batch in rows.batches(start, count if stop is None else min(stop, count)):
        yield from enumerate(plain(batch), first)


def plain(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """A batch's rows in the types that JSON has, and bytes; dates, times and decimals as text."""
    arrays = [pc.cast(column, pa.string()) if _is_odd(column.type) else column for column in batch.columns]
    rows: list[dict[str, Any]] = pa.RecordBatch.from_arrays(arrays, names=batch.schema.names).to_pylist()
    return rows


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its bytes as text; a byte that isn't UTF-8 is escaped."""
    return {
        name: value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
        for name, value in row.items()
    }


def _is_odd(kind: pa.DataType) -> bool:
    return bool(pa.types.is_temporal(kind) or pa.types.is_decimal(kind))


def row_at(path: Path, position: int, size: int) -> int:
    """The row at a byte position, when the row groups lie one after the other on `size` bytes, rows evenly in each."""
    with open_rows(path) as rows:
        metadata = rows.file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
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


class FolderSizes:
    """The rows of a table on a line of bytes: each takes as much as its image."""

    def __init__(self, folder: Path, table: Path, columns: PairColumns) -> None:
        """Asks for the size of each image, one after the other; those of a store in one listing."""
        with local_copy(table) as local, open_rows(local) as rows:
            image = columns.require_file(rows.schema.names, folder)
            columns.require_caption(rows.schema, folder)
            self.rows = int(rows.starts[-1])
            self.step = max(1, self.rows // SUMS)
            self.sums = array("q")
            self.total = number = 0
            sizes = _remote_sizes(folder) if is_remote(folder) else None
            for batch in rows.file.iter_batches(columns=[image]):
                for name in batch.column(0).to_pylist():
                    if number % self.step == 0:
                        self.sums.append(self.total)
                    number += 1
                    if isinstance(name, str):
                        self.total += sizes.get(name, 0) if sizes is not None else _local_size(folder, name)

    def row_at(self, position: int) -> int:
        """The first row, of those whose sum is held, that begins at or behind a byte."""
        return min(bisect_left(self.sums, position) * self.step, self.rows)


def _local_size(folder: Path, name: str) -> int:
    try:
        return (folder / name).stat().st_size
    except (OSError, ValueError):
        return 0


def _remote_sizes(folder: Path) -> dict[str, int]:
    target = as_upath(folder)
    with reading(folder):
        found = target.fs.find(target.path, detail=True)
    start = target.path.rstrip("/").lstrip("/") + "/"
    return {name.lstrip("/").removeprefix(start): int(info.get("size") or 0) for name, info in found.items()}
