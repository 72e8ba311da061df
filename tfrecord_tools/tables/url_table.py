"""The list of URLs: what file it is, which columns it has, and its rows by number.

Text tables are copied once to parquet: a shard's rows must be found without reading all that stands before them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.storage.files import disk_errors, is_remote, local_copy, write_beside
from clipkit.storage.stores import as_upath, store_errors

TEXT_DELIMITERS = {".csv": ",", ".tsv": "\t", ".csv.gz": ",", ".tsv.gz": "\t"}
SUFFIXES = (".parquet", *TEXT_DELIMITERS)
TEXT_BLOCK_BYTES = 16 << 20
COPY_ROWS = 10_000
READ_ROWS = 4_096
# A row group of a published table holds a million rows: its pages are read as they are needed.
READ_BUFFER_BYTES = 1 << 18
# Up to this size the whole file is hashed, beyond it samples of it: the check is against the wrong file, not an enemy.
WHOLE_HASH_BYTES = 256 << 20
HASH_SAMPLES = 64
HASH_SAMPLE_BYTES = 1 << 20


def table_suffix(path: Path, what: str = "URL table") -> str:
    """Which of SUFFIXES the file has. Raises UserError when none, calling it `what`."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise UserError(f"can't tell what {path} is: give a {what} that ends in {', '.join(SUFFIXES)}, or a folder of them")


def find_tables(urls: Path, what: str = "URL table") -> list[Path]:
    """The table files behind `urls`, a file or a folder, ordered by name.

    Raises UserError when there are none, calling them `what`.
    """
    with disk_errors(urls):
        if urls.is_dir():
            paths = sorted(path for path in urls.iterdir() if path.name.lower().endswith(SUFFIXES) and path.is_file())
            if not paths:
                raise UserError(f"no {what} in {urls}: put files there that end in {', '.join(SUFFIXES)}")
            return paths
        if not urls.is_file():
            raise UserError(f"{what} {urls} doesn't exist: check the path")
    table_suffix(urls, what)
    return [urls]


def read_schema(path: Path, header: Sequence[str] = ()) -> pa.Schema:
    """The columns and types of a table; of text, as its first rows have them. Raises UserError.

    `header` names the columns of a text table that has no line with their names.
    """
    suffix = table_suffix(path)
    try:
        if suffix == ".parquet":
            with open_parquet(path) as file:
                return file.schema_arrow
        with local_copy(path) as local, open_text(local, None, header) as reader:
            schema = reader.schema
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, suffix, error) from error
    for field in schema:
        if pa.types.is_binary(field.type):
            raise UserError(
                f"column {field.name!r} of {path} isn't UTF-8 text: convert the file, for example with iconv"
            )
    return schema


def unreadable(path: Path, suffix: str, error: Exception) -> UserError:
    """The one line for a table that its reader refuses."""
    reason = str(error).partition("\n")[0]
    kind = suffix.lstrip(".")
    return UserError(f"{path} can't be read as {kind} ({reason}): it may be damaged or of another kind; get it again")


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def open_text(
    path: Path, types: dict[str, pa.DataType] | None, header: Sequence[str] = ()
) -> pyarrow.csv.CSVStreamingReader:
    """A reader of a CSV or TSV file block by block; gzip is undone by the file's name.

    CSV fields may be quoted and hold line breaks. In TSV a quote is a character like any other, as in the published
    tables: a caption that begins with a lone quote would otherwise swallow the rows up to the next one.
    """
    delimiter = TEXT_DELIMITERS[table_suffix(path)]
    quoted = delimiter == ","
    names = None if not header or has_header(path, delimiter, header) else list(header)
    return pyarrow.csv.open_csv(
        open_bytes(path),
        read_options=pyarrow.csv.ReadOptions(block_size=TEXT_BLOCK_BYTES, column_names=names),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
        ),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types),
    )


def open_bytes(path: Path) -> pa.NativeFile:
    """The bytes of a local text table, unpacked."""
    return pa.input_stream(str(path), compression="gzip" if path.name.lower().endswith(".gz") else None)


def has_header(path: Path, delimiter: str, header: Sequence[str]) -> bool:
    """Whether somebody has put the line of names in front of a table that is published without one."""
    expected = delimiter.join(header).encode()
    with open_bytes(path) as file:
        start: bytes = file.read(len(expected) + 4)
    return start.removeprefix(b"\xef\xbb\xbf").splitlines()[:1] == [expected]


def count_rows(path: Path, copy: Path, text_columns: Sequence[str], header: Sequence[str] = ()) -> int:
    """Count the rows of a table; those of a text table by copying it to parquet at `copy`.

    `text_columns` (URL and caption) are read as text even where they look like numbers. Raises UserError when the
    table can't be read to its end.
    """
    suffix = table_suffix(path)
    try:
        if suffix == ".parquet":
            with open_parquet(path) as file:
                return int(file.metadata.num_rows)
        with local_copy(path) as local:
            return copy_text(local, copy, text_columns, header)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, suffix, error) from error


def rows_path(path: Path, copy: Path) -> Path:
    """The parquet file to read a table's rows from: itself, or the copy of a text table."""
    return path if table_suffix(path) == ".parquet" else copy


def copy_text(path: Path, copy: Path, text_columns: Sequence[str], header: Sequence[str] = ()) -> int:
    """Write a text table as parquet and return its number of rows.

    Types are guessed from the first block; where a later row doesn't fit them, every column becomes text.
    """
    with open_text(path, None, header) as reader:
        names = reader.schema.names
    try:
        return write_copy(path, copy, dict.fromkeys(text_columns, pa.string()), header)
    except pa.ArrowInvalid:
        return write_copy(path, copy, dict.fromkeys(names, pa.string()), header)


def write_copy(path: Path, copy: Path, types: dict[str, pa.DataType], header: Sequence[str]) -> int:
    """Write a text table as parquet with the given types (the others guessed) and return its number of rows."""
    with (
        open_text(path, types, header) as reader,
        write_beside(copy) as temporary,
        pq.ParquetWriter(temporary, reader.schema) as writer,
    ):
        rows = 0
        for batch in reader:
            writer.write_table(pa.Table.from_batches([batch]), row_group_size=COPY_ROWS)
            rows += batch.num_rows
        return rows


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """A hash that tells a changed file from the one seen before: of the whole file, or of samples when it is large.

    Of a remote file it is what the store says of its contents (an ETag or a CRC), so that nothing is fetched.
    """
    if is_remote(path):
        target = as_upath(path)
        with store_errors(path):
            return f"{path.stat().st_size}-{target.fs.checksum(target.path)}"
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_HASH_BYTES:
            while block := file.read(HASH_SAMPLE_BYTES):
                digest.update(block)
        else:
            for i in range(HASH_SAMPLES):
                file.seek((size - HASH_SAMPLE_BYTES) * i // (HASH_SAMPLES - 1))
                digest.update(file.read(HASH_SAMPLE_BYTES))
    return digest.hexdigest()


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file, local or remote, that is read page by page rather than a whole row group at a time."""
    if is_remote(path):
        with store_errors(path):
            return pq.ParquetFile(path.open("rb"), buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
    return pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False, memory_map=False)


def row_group_starts(file: pq.ParquetFile) -> npt.NDArray[np.int64]:
    """int64[row groups + 1]: the number of the first row of each, and of all rows."""
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


class RowReader:
    """Rows of one parquet file by number; use it as a context manager.

    What is asked for in rising order is read once: a shard's rows are found by going on from the shard before, and not
    by unpacking a row group of a million rows again. Memory is that of the rows asked for and a few pages.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """`columns` that the file hasn't are left out. Raises UserError when it is gone or damaged."""
        self.path = path
        self.stack = ExitStack()
        try:
            self.file = self.stack.enter_context(open_parquet(path))
        except (pa.ArrowException, OSError, EOFError) as error:
            raise unreadable(path, ".parquet", error) from error
        self.starts = row_group_starts(self.file)
        self.columns = [name for name in columns if name in self.file.schema_arrow.names]
        self.schema = pa.schema([self.file.schema_arrow.field(name) for name in self.columns])
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.rest: pa.RecordBatch | None = None
        self.position = -1  # of the first row of `rest`, or of the batch to come

    def read(self, start: int, stop: int) -> pa.Table:
        """The rows `start` to `stop`, in one chunk a column. Raises UserError when the file is damaged."""
        return self._table(part for _, part in self._parts(start, stop))

    def pick(self, numbers: npt.NDArray[np.int64]) -> pa.Table:
        """The rows of these numbers, which rise; what lies between is read past and not held. Raises UserError."""
        return self._table(self._picked(numbers))

    def _table(self, parts: Iterator[pa.RecordBatch]) -> pa.Table:
        try:
            return pa.Table.from_batches(list(parts), self.schema).combine_chunks()
        except (pa.ArrowException, OSError, EOFError) as error:
            raise unreadable(self.path, ".parquet", error) from error

    def _picked(self, numbers: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
        if len(numbers):
            for first, part in self._parts(int(numbers[0]), int(numbers[-1]) + 1):
                places = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + part.num_rows)]
                yield part.take(pa.array(places - first))

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows from `start` to `stop` a batch at a time, each with the number of its first row."""
        if start >= stop:
            return
        group = int(np.searchsorted(self.starts, start, side="right")) - 1
        if not (self.starts[group] <= self.position <= start):
            groups = list(range(group, self.file.num_row_groups))
            self.batches = self.file.iter_batches(READ_ROWS, row_groups=groups, columns=self.columns)
            self.rest, self.position = None, int(self.starts[group])
        while start < stop:
            batch = self.rest if self.rest is not None else next(self.batches)
            skipped = min(start - self.position, batch.num_rows)
            part = batch.slice(skipped, stop - start)
            if part.num_rows:
                yield start, part.select(self.columns)
            start += part.num_rows
            taken = skipped + part.num_rows
            self.rest = batch.slice(taken) if taken < batch.num_rows else None
            self.position += taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


def read_rows(path: Path, start: int, count: int, columns: Sequence[str]) -> pa.Table:
    """Rows `start` to `start + count` of a parquet file, reading the row groups that hold them alone.

    Raises UserError when the file is gone or damaged.
    """
    with RowReader(path, columns) as reader:
        return reader.read(start, start + count)
