"""Tables: which files are tables, what their columns are called, and how their rows are read.

Every command that reads a table goes by the rules here, whether it holds URLs, images, names of image files or what is
to be purged: so downloading, building, inspecting, purging, training and evaluating find the same columns in it.
"""

import contextlib
import errno
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.formats.captions import CaptionChoice, captions_of, check_caption_type
from clipkit.formats.kinds import OWN, arrow_type, kind_of, unify
from clipkit.formats.text_file import PIECE_BYTES, TEXT_BLOCK_BYTES, Quoting, TextFile
from clipkit.formats.text_quotes import study
from clipkit.storage.files import disk_errors, disk_message, is_remote, local_copy
from clipkit.storage.stores import store_errors

# ---- What things are called ------------------------------------------------------------------------------------------

# Of the formats that clipkit decodes (`clipkit.pixels.images.FORMATS`) all that Pillow knows.
IMAGE_SUFFIXES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif", "avifs"),
        *("jp2", "j2k", "jpc", "jpf", "jpx", "j2c", "ppm", "pgm", "pbm", "pnm", "pfm", "ico"),
    )
)
# What programs leave in folders of others: archives made on a Mac, disks of Synology, Windows and so on.
LEFT_BY_PROGRAMS = frozenset(
    {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "#recycle", "lost+found"}
)
IMAGE_NAMES = ("jpg", "image", "img", *sorted(IMAGE_SUFFIXES - {"jpg"}), "image_bytes", "bytes")
CAPTION_NAMES = ("txt", "caption", "text", "title")
FILE_NAMES = ("file_name", "filename", "filepath", "file_path", "file", "image", "image_path", "path")
CLASS_NAMES = ("label", "class", "class_name", "classname", "category", "label_name", "wnid", "target")
URL_NAME, KEY_NAME = "url", "key"

DELIMITERS = {".csv": ",", ".tsv": "\t", ".csv.gz": ",", ".tsv.gz": "\t"}
TABLE_SUFFIXES = (".parquet", *DELIMITERS, ".jsonl")
METADATA_STEM = "metadata"

SCHEMA_ROWS = 10_000  # of JSON lines, as many are looked at for the columns' types
COPY_ROWS = 10_000
BATCH_ROWS = 4_096
# A row group of a published table holds a million rows: its pages are read as they are needed.
BUFFER_BYTES = 1 << 18


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over wherever folders are listed."""
    return name.startswith(".") or name.lower() in LEFT_BY_PROGRAMS


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return not is_hidden(name) and name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def find_name(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted names that is there, in upper or lower case; one of clipkit's own before all others."""
    own = next((OWN + usual for usual in wanted if OWN + usual in names), None)
    if own is not None:
        return own
    return next((name for usual in wanted for name in names if name.lower() == usual), None)


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded images: binary, or Hugging Face's struct of `bytes` and `path`."""
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and holds_images(kind.field(i).type) for i in range(kind.num_fields))
    return is_bytes(kind)


def image_bytes(cell: Any) -> bytes:
    """The encoded image in a cell of such a column; b"" where there is none."""
    return (cell.get("bytes") if isinstance(cell, dict) else cell) or b""


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes of any length."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def find_image_column(schema: pa.Schema) -> str | None:
    """The column with images by its usual names, or the only one of such a type; None when it can't be told."""
    fitting = [field.name for field in schema if holds_images(field.type) and field.name.lower() not in CAPTION_NAMES]
    return find_name(fitting, IMAGE_NAMES) or (fitting[0] if len(fitting) == 1 else None)


@dataclass(frozen=True)
class PairColumns:
    """Which columns of a table hold the image (or its file name) and the caption; None is found by the usual names.

    `captions` says which are stored of several captions of one image; None refuses them.
    """

    image: str | None = None
    caption: str | None = None
    captions: CaptionChoice | None = None
    quoting: Quoting | None = None
    """What quotes mean in a text table (see `text_quotes`), None: to be told from the table."""

    def find_image(self, schema: pa.Schema) -> str | None:
        """The column with encoded images, or None. Raises UserError when the one that was named isn't there."""
        if self.image is None:
            return find_image_column(schema)
        if self.image not in schema.names:
            raise UserError(f"no column {self.image!r} in the table: choose among {', '.join(schema.names)}")
        return self.image if holds_images(schema.field(self.image).type) else None  # else it names files

    def require_image(self, schema: pa.Schema, table: Path) -> str:
        """The column with encoded images. Raises UserError when there is none."""
        found = self.find_image(schema)
        if found is None:
            raise self._lacking(table, "images", "--image-column", schema.names, IMAGE_NAMES)
        return found

    def require_file(self, names: Sequence[str], table: Path) -> str:
        """The column with the names of image files. Raises UserError when there is none."""
        found = find_name(names, FILE_NAMES) if self.image is None else self.image
        if found not in names:
            raise self._lacking(table, "names of image files", "--image-column", names, FILE_NAMES)
        return str(found)

    def require_caption(self, schema: pa.Schema, table: Path) -> str:
        """The column with captions. Raises UserError when there is none, or when it can't hold any."""
        names = schema.names
        found = find_name(names, CAPTION_NAMES) if self.caption is None else self.caption
        if found not in names:
            raise self._lacking(table, "captions", "--caption-column", names, CAPTION_NAMES)
        check_caption_type(schema.field(found).type, str(found), table)
        return str(found)

    def _lacking(self, table: Path, what: str, option: str, names: Sequence[str], usual: Sequence[str]) -> UserError:
        return UserError(
            f"{table} has no column with {what} ({', '.join(names)}): call it {' or '.join(usual[:3])}, or name it to "
            f"clipkit build-tfds by {option}"
        )


USUAL = PairColumns()


# ---- Files -----------------------------------------------------------------------------------------------------------


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table."""
    return path.name.lower().endswith(TABLE_SUFFIXES) and not is_hidden(path.name)


def table_suffix(path: Path, what: str = "table") -> str:
    """Which of TABLE_SUFFIXES the file has. Raises UserError when none, calling it `what`."""
    for suffix in TABLE_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    known = ", ".join(TABLE_SUFFIXES)
    raise UserError(f"can't tell what {path} is: give a {what} that ends in {known}, or a folder of them")


def find_tables(path: Path, what: str = "table") -> list[Path]:
    """The tables at `path`, a file or a folder, ordered by name. Raises UserError for none, calling them `what`."""
    with disk_errors(path):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if is_table(file) and file.is_file())
            if not found:
                raise UserError(f"no {what} in {path}: put files there that end in {', '.join(TABLE_SUFFIXES)}")
            return found
        if not path.is_file():
            raise UserError(f"{what} {path} doesn't exist: check the path")
    table_suffix(path, what)
    return [path]


def unreadable(path: Path, error: Exception) -> UserError:
    """The one-line error for a table that can't be read, or for a full disk, which is not the table's fault."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(disk_message(error, error.filename or f"what is made of {path}"))
    reason = str(error).partition("\n")[0]
    kind = next((suffix[1:] for suffix in TABLE_SUFFIXES if path.name.lower().endswith(suffix)), "parquet")
    return UserError(f"{path} can't be read as {kind} ({reason}): it may be damaged or of another kind; get it again")


@contextlib.contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """In the block, what Arrow raises about a table becomes a UserError of one line."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, error) from error


def read_schema(path: Path, header: Sequence[str] = (), quoting: Quoting = "auto") -> pa.Schema:
    """The columns and types of a table; those of CSV and TSV are text, of JSON lines as the first rows have them.

    `header` names the columns of a CSV or TSV file that has no line with their names. Raises UserError.
    """
    suffix = table_suffix(path)
    with table_errors(path):
        if suffix == ".parquet":
            with open_parquet(path) as file:
                return file.schema_arrow
        with local_copy(path) as local:
            if suffix != ".jsonl":
                return pa.schema([(name, pa.string()) for name in open_text(local, path, quoting, header).names])
            kinds = unify(json_kinds(row) for row in islice(read_json_lines(local, path), SCHEMA_ROWS))
            return pa.schema([(name, arrow_type(kind)) for name, kind in kinds.items()])


def read_columns(path: Path, columns: Sequence[str], quoting: Quoting = "auto") -> Iterator[pa.RecordBatch]:
    """Some columns of a table of any kind, in their order, some thousand rows at once; those of text files as text.

    Raises UserError when it lacks one or can't be read to its end.
    """
    suffix, names = table_suffix(path), list(dict.fromkeys(columns))
    with table_errors(path):
        if suffix == ".parquet":
            with open_parquet(path) as file:
                require_columns(path, file.schema_arrow.names, names)
                for batch in file.iter_batches(BATCH_ROWS, columns=names):
                    yield batch.select(names)
            return
        with local_copy(path) as local:
            if suffix != ".jsonl":
                yield from text_batches(open_text(local, path, quoting), names)
                return
            lines = read_json_lines(local, path)
            while rows := list(islice(lines, BATCH_ROWS)):
                arrays = [_json_column([row.get(name) for row in rows], name, path) for name in names]
                yield pa.RecordBatch.from_arrays(arrays, names)


def require_columns(table: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise UserError unless a table, whose columns have these names, has each of the wanted ones once."""
    for name in wanted:
        if names.count(name) != 1:
            raise UserError(f"{table} has {names.count(name)} columns {name!r}: {', '.join(names)}")


def _json_column(values: list[Any], name: str, table: Path) -> pa.Array:
    """Values of JSON as text, or as lists of text where one of them is a list. Raises UserError for an object."""
    if any(isinstance(value, list | dict) for value in values):
        texts = [None if value is None else captions_of(value, f"{table}, column {name!r},") for value in values]
        return pa.array([text and [without_surrogates(item) for item in text] for text in texts], pa.list_(pa.string()))
    texts = [None if value is None or value != value else without_surrogates(str(value)) for value in values]
    return pa.array(texts, pa.string())


def without_surrogates(value: Any) -> Any:
    """Text without lone surrogates, which JSON can hold and Arrow can't; other values as they are."""
    return value.encode("utf-8", "replace") if isinstance(value, str) else value


# ---- CSV and TSV -----------------------------------------------------------------------------------------------------


def open_text(path: Path, table: Path, quoting: Quoting, header: Sequence[str] = ()) -> TextFile:
    """A local CSV or TSV file, which its user calls `table`. Raises UserError for the first line."""
    return TextFile(path, table, DELIMITERS[table_suffix(path)], quoting, header)


def text_batches(file: TextFile, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """All rows, of some columns in their order or of all, every field as text; an empty one is "". Raises UserError."""
    require_columns(file.table, file.names, columns or file.names)
    if file.is_empty:
        return
    reading = study(file)
    pieces = file.blocks() if reading.fields is None else reading.fields.rewrite(file.blocks(PIECE_BYTES))
    try:
        with pyarrow.csv.open_csv(
            pa.PythonFile(_Blocks(pieces), "r"),
            read_options=pyarrow.csv.ReadOptions(
                block_size=TEXT_BLOCK_BYTES, column_names=file.names, skip_rows_after_names=int(file.has_header)
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=file.delimiter.decode(),
                quote_char='"' if reading.quoted else False,
                newlines_in_values=reading.newlines,
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(file.names, pa.string()), include_columns=list(columns)
            ),
        ) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        reason = str(error).partition("\n")[0]
        if column := re.match(r"In CSV column #(\d+): .*invalid UTF8", reason):
            name = file.names[int(column[1])]
            raise UserError(
                f"column {name!r} of {file.table} isn't UTF-8 text: convert the file, for example with iconv"
            ) from error
        if "Expected" not in reason:
            raise
        raise UserError(
            f"{file.table} can't be read as {table_suffix(file.table)[1:]} ({reason}): its fields are separated by "
            f"{file.delimiter.decode()!r}; mend that row, or say what quotes mean by --quoting"
        ) from error


class _Blocks:
    """Pieces of bytes as the file that Arrow reads, a block at a time, of which none ends in a carriage return.

    Arrow takes a line feed that begins a block for the other half of a line's end, also within quotes, and drops it.
    """

    closed = False

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.rest = pieces, b""

    def read(self, _: int) -> bytes:
        """The next block, whatever its size; b"" at the end."""
        block, self.rest = self.rest, b""
        while len(block) < 2 and (piece := next(self.pieces, None)) is not None:
            block += piece
        if len(block) > 1 and block.endswith(b"\r"):
            block, self.rest = block[:-1], b"\r"
        return block

    def close(self) -> None:
        """Nothing: the pieces' file closes itself."""


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def read_json_lines(path: Path, table: Path) -> Iterator[dict[str, Any]]:
    """The objects of a local file of JSON lines. Raises UserError, naming the table, for a line that isn't one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"table {table}: line {number} isn't UTF-8: convert the file, say with iconv"
                ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"table {table}: line {number} isn't JSON ({error}): mend it") from error
            if not isinstance(row, dict):
                raise UserError(f"table {table}: line {number} isn't a JSON object: each line is one image's columns")
            yield with_writable_names(row, line)


def with_writable_names(row: dict[str, Any], text: bytes) -> dict[str, Any]:
    """The row that JSON `text` gave, half a surrogate pair in a column's name, which UTF-8 hasn't, as "?"."""
    if b"\\u" not in text:
        return row
    return {name.encode("utf-8", "replace").decode(): value for name, value in row.items()}


def json_kinds(row: dict[str, Any]) -> dict[str, str]:
    """The kinds of a row's values, without those that are missing."""
    return {name: kind for name, value in row.items() if (kind := kind_of(value)) is not None}


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def open_parquet(path: Path, buffer_bytes: int = BUFFER_BYTES) -> pq.ParquetFile:
    """A parquet file, local or remote, that is read page by page rather than a whole row group at a time."""
    if is_remote(path):
        with store_errors(path):
            return pq.ParquetFile(path.open("rb"), buffer_size=buffer_bytes, pre_buffer=False)
    return pq.ParquetFile(path, buffer_size=buffer_bytes, pre_buffer=False, memory_map=False)


def row_group_starts(file: pq.ParquetFile) -> npt.NDArray[np.int64]:
    """int64[row groups + 1]: the number of the first row of each, and of all rows."""
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


class RowReader:
    """Rows of one parquet file by number; use it as a context manager.

    What is asked for in rising order is read once: a shard's rows are found by going on from the shard before, and not
    by unpacking a row group of a million rows again. Memory is that of the rows asked for and a few pages.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str] | None = None,
        batch_rows: int = BATCH_ROWS,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """`columns` (or all) that the file hasn't are left out. Raises UserError when it is gone or damaged."""
        self.path, self.batch_rows = path, batch_rows
        with table_errors(path):
            self.file = open_parquet(path, buffer_bytes)
        self.starts = row_group_starts(self.file)
        whole = self.file.schema_arrow
        self.columns = None if columns is None else [name for name in columns if name in whole.names]
        self.schema = whole if self.columns is None else pa.schema([whole.field(name) for name in self.columns])
        self.remaining: Iterator[pa.RecordBatch] = iter(())
        self.rest: pa.RecordBatch | None = None
        self.position = -1  # of the first row of `rest`, or of the batch to come

    def read(self, start: int, stop: int) -> pa.Table:
        """The rows `start` to `stop`, in one chunk a column. Raises UserError when the file is damaged."""
        return self._table(part for _, part in self.batches(start, stop))

    def pick(self, numbers: npt.NDArray[np.int64]) -> pa.Table:
        """The rows of these numbers, which rise; what lies between is read past and not held. Raises UserError."""
        return self._table(self._picked(numbers))

    def _table(self, parts: Iterator[pa.RecordBatch]) -> pa.Table:
        return pa.Table.from_batches(list(parts), self.schema).combine_chunks()

    def _picked(self, numbers: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
        if len(numbers):
            for first, part in self.batches(int(numbers[0]), int(numbers[-1]) + 1):
                places = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + part.num_rows)]
                yield part.take(pa.array(places - first))

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows `start` to `stop` some at a time, each with the number of its first row. Raises UserError."""
        if start >= stop:
            return
        group = int(np.searchsorted(self.starts, start, side="right")) - 1
        if not (self.starts[group] <= self.position <= start):
            groups = list(range(group, self.file.num_row_groups))
            self.remaining = self.file.iter_batches(self.batch_rows, row_groups=groups, columns=self.columns)
            self.rest, self.position = None, int(self.starts[group])
        while start < stop:
            with table_errors(self.path):
                batch = self.rest if self.rest is not None else next(self.remaining)
            skipped = min(start - self.position, batch.num_rows)
            part = batch.slice(skipped, stop - start)
            if part.num_rows:
                yield start, part if self.columns is None else part.select(self.columns)
            start += part.num_rows
            taken = skipped + part.num_rows
            self.rest = batch.slice(taken) if taken < batch.num_rows else None
            self.position += taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
