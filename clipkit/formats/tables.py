"""How tables name what clipkit wants of them: images, names of image files, captions.

Building a dataset and training straight from the files must find the same columns, so the rules are here, for both.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.formats.tar import IMAGE_SUFFIXES

IMAGE_NAMES = (*sorted(IMAGE_SUFFIXES), "image", "img", "image_bytes", "bytes")
CAPTION_NAMES = ("txt", "caption", "text", "title")
FILE_NAMES = ("file_name", "filename", "filepath", "file_path", "file", "image", "image_path", "path")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".csv.gz": ",", ".tsv.gz": "\t"}
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl", ".parquet")
METADATA_STEM = "metadata"

_BATCH_ROWS = 4_096
_TEXT_BLOCK_BYTES = 16 << 20

Rows = list[tuple[str | None, str | None]]


def find_name(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted names that is there, in upper or lower case."""
    return next((name for each in wanted for name in names if name.lower() == each), None)


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded images: binary, or Hugging Face's struct of `bytes` and `path`."""
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and holds_images(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def find_image_column(schema: pa.Schema) -> str | None:
    """The column with images by its usual names, or the only one of such a type; None when it can't be told."""
    fitting = [field.name for field in schema if holds_images(field.type)]
    named = [name for wanted in IMAGE_NAMES for name in fitting if name.lower() == wanted]
    return named[0] if named else fitting[0] if len(fitting) == 1 else None


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table."""
    return path.name.lower().endswith(TABLE_SUFFIXES)


def find_table(folder: Path) -> Path | None:
    """The one table of a folder: `metadata.*`, else the only one. Raises UserError when several could be meant."""
    tables = sorted(path for path in folder.iterdir() if is_table(path) and not path.name.startswith("."))
    named = [path for path in tables if path.name.lower().partition(".")[0] == METADATA_STEM]
    found = named or tables
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder} holds several tables ({names}): name one of them in place of the folder")
    return found[0] if found else None


def read_pair_table(table: Path, name: str) -> Iterator[Rows]:
    """File name and caption of each row of a local table of any kind, some thousand at once; None for a missing value.

    `name` tells the table's kind by its end. Raises UserError when it lacks a column or can't be read to its end.
    """
    lower = name.lower()
    try:
        if lower.endswith(".jsonl"):
            yield from _json_lines(table, name)
        elif lower.endswith(".parquet"):
            with pq.ParquetFile(table) as file:
                columns = _columns(file.schema_arrow.names, name)
                for batch in file.iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
                    yield _rows(batch, columns)
        else:
            yield from _text(table, name, next(DELIMITERS[end] for end in DELIMITERS if lower.endswith(end)))
    except (pa.ArrowException, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"table {name} can't be read ({reason}): mend it or fetch it again") from error


def _columns(names: Sequence[str], table: str) -> tuple[str, str]:
    file, caption = find_name(names, FILE_NAMES), find_name(names, CAPTION_NAMES)
    if file is None or caption is None:
        what, wanted = ("names of image files", FILE_NAMES) if file is None else ("captions", CAPTION_NAMES)
        raise UserError(
            f"table {table} has no column with {what} ({', '.join(names)}): call it {' or '.join(wanted[:3])}"
        )
    return file, caption


def _rows(batch: pa.RecordBatch, columns: tuple[str, str]) -> Rows:
    files, captions = (batch.column(batch.schema.names.index(name)).to_pylist() for name in columns)
    return [(_as_text(file), _as_text(caption)) for file, caption in zip(files, captions, strict=True)]


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _text(table: Path, name: str, delimiter: str) -> Iterator[Rows]:
    """In TSV a quote is a character like any other: a caption may begin with a lone one."""
    quoted = delimiter == ","

    def opened(types: dict[str, pa.DataType] | None) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(
            pa.input_stream(str(table), compression="gzip" if name.lower().endswith(".gz") else None),
            read_options=pyarrow.csv.ReadOptions(block_size=_TEXT_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
            ),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types),
        )

    with opened(None) as reader:
        names = reader.schema.names
    columns = _columns(names, name)
    with opened(dict.fromkeys(names, pa.string())) as reader:  # captions and names stay text, even when all are numbers
        for batch in reader:
            yield _rows(batch, columns)


def json_rows(table: Path, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises UserError, naming the table as `name`, for a line that is none."""
    with table.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"table {name}: line {number} isn't JSON ({error}): mend it") from error
            if not isinstance(row, dict):
                raise UserError(f"table {name}: line {number} is no JSON object: each line is one image's columns")
            yield row


def _json_lines(table: Path, name: str) -> Iterator[Rows]:
    rows: Rows = []
    columns: tuple[str, str] | None = None
    for row in json_rows(table, name):
        columns = columns or _columns(list(row), name)
        rows.append((_as_text(row.get(columns[0])), _as_text(row.get(columns[1]))))
        if len(rows) == _BATCH_ROWS:
            yield rows
            rows = []
    yield rows
