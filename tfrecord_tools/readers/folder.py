"""Read a plain folder of images with a table of file names and captions: CSV, TSV, parquet or JSON lines.

Hugging Face's image folders (`metadata.csv`, `metadata.jsonl`) are of this kind. The table is copied once to parquet,
so that a worker finds its rows without reading those before them.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.formats.kinds import arrow_type, fit, kind_of, unify
from clipkit.formats.tables import CAPTION_NAMES, FILE_NAMES, find_name, json_rows
from clipkit.storage.files import is_remote, local_copy, write_beside
from clipkit.storage.stores import as_upath, reading
from clipkit.tfrecord_tools.readers.parquet import (
    USUAL,
    PairColumns,
    caption_column,
    make_sample,
    open_parquet,
    read_rows,
)
from clipkit.tfrecord_tools.sample import Sample
from clipkit.tfrecord_tools.tables.url_table import copy_text, open_text, unreadable

COPY_ROWS = 4_096
SUMS = 100_000  # at most so many sums of sizes are held, however long the table


def copy_table(path: Path, copy: Path, columns: PairColumns = USUAL) -> None:
    """Write a table of any kind as parquet at `copy`; keys, captions and names stay text, even when all are numbers.

    Raises UserError when it can't be read to its end.
    """
    name = path.name.lower()
    with local_copy(path) as local:
        try:
            if name.endswith(".jsonl"):
                _copy_json_lines(local, copy)
            elif name.endswith(".parquet"):
                with write_beside(copy) as temporary:
                    _copy_parquet(local, temporary)
            else:
                with open_text(local, None) as reader:
                    names = reader.schema.names
                copy_text(local, copy, [name for name in names if _is_text(name, columns)])
        except (pa.ArrowException, EOFError) as error:
            raise unreadable(path, name.rpartition(".")[2], error) from error


def _is_text(name: str, columns: PairColumns) -> bool:
    return name.lower() in ("key", *CAPTION_NAMES, *FILE_NAMES) or name in (columns.image, columns.caption)


def _copy_parquet(path: Path, copy: Path) -> None:
    """The same rows in small row groups."""
    with open_parquet(path) as file, pq.ParquetWriter(copy, file.schema_arrow) as writer:
        for batch in file.iter_batches(COPY_ROWS):
            writer.write_batch(batch, row_group_size=COPY_ROWS)


def _copy_json_lines(path: Path, copy: Path) -> None:
    kinds = unify(
        {name: kind for name, value in row.items() if (kind := kind_of(value)) is not None}
        for row in json_rows(path, str(path))
    )
    schema = pa.schema([(name, arrow_type(kind)) for name, kind in kinds.items()])
    with write_beside(copy) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        rows: list[dict[str, Any]] = []
        for row in json_rows(path, str(path)):
            fitted = fit(row, kinds, {})
            rows.append({name: v.encode("utf-8", "replace") if isinstance(v, str) else v for name, v in fitted.items()})
            if len(rows) == COPY_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))


def file_column(schema: pa.Schema, columns: PairColumns, path: Path) -> str:
    """The column with the images' file names. Raises UserError when there is none."""
    if columns.image in schema.names:
        return str(columns.image)
    found = None if columns.image else find_name(schema.names, FILE_NAMES)
    if found is None:
        raise UserError(
            f"{path} has no column {columns.image or ' or '.join(FILE_NAMES[:3])} ({', '.join(schema.names)}): name "
            "the one with the images' file names by --image-column"
        )
    return found


def read_folder(
    folder: Path, table: Path, start: int = 0, stop: int | None = None, columns: PairColumns = USUAL
) -> Iterator[Sample]:
    """The samples of the rows [start, stop) of `table`, parquet; file names are relative to `folder`.

    An image that isn't there is a sample without an image. Raises UserError when the table lacks a column.
    """
    with local_copy(table) as local, open_parquet(local) as file:
        schema = file.schema_arrow
        image = file_column(schema, columns, folder)
        caption = caption_column(schema, columns, folder)
        for number, row in read_rows(file, start, stop, table, COPY_ROWS):
            name = row.get(image)
            yield make_sample(str(name or number), _read_image(folder, name), row, caption)


def _read_image(folder: Path, name: Any) -> bytes | None:
    if not isinstance(name, str) or not name:
        return None
    try:
        with reading(folder):
            return (folder / name).read_bytes() or None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None


class FolderSizes:
    """The rows of a table on a line of bytes: each takes as much as its image."""

    def __init__(self, folder: Path, table: Path, columns: PairColumns) -> None:
        """Asks for the size of each image, one after the other; those of a store in one listing."""
        with local_copy(table) as local, open_parquet(local) as file:
            image = file_column(file.schema_arrow, columns, folder)
            caption_column(file.schema_arrow, columns, folder)
            self.rows = file.metadata.num_rows
            self.step = max(1, self.rows // SUMS)
            self.sums = array("q")
            self.total = number = 0
            sizes = _remote_sizes(folder) if is_remote(folder) else None
            for batch in file.iter_batches(columns=[image]):
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
