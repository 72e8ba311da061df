"""The list of URLs: what file it is, which columns it has, and its rows by number.

Text tables are copied once to parquet: a shard's rows must be found without reading all that stands before them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.files import write_beside

TEXT_DELIMITERS = {".csv": ",", ".tsv": "\t", ".csv.gz": ",", ".tsv.gz": "\t"}
SUFFIXES = (".parquet", *TEXT_DELIMITERS)
TEXT_BLOCK_BYTES = 16 << 20
COPY_ROWS = 10_000
# Up to this size the whole file is hashed, beyond it samples of it: the check is against the wrong file, not an enemy.
WHOLE_HASH_BYTES = 256 << 20
HASH_SAMPLES = 64
HASH_SAMPLE_BYTES = 1 << 20


def table_suffix(path: Path) -> str:
    """Which of SUFFIXES the file has. Raises UserError when none."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise UserError(
        f"can't tell what {path} is: give a URL table that ends in {', '.join(SUFFIXES)}, or a folder of them"
    )


def find_tables(urls: Path) -> list[Path]:
    """The table files behind `urls`, a file or a folder, ordered by name. Raises UserError when there are none."""
    if urls.is_dir():
        paths = sorted(path for path in urls.iterdir() if path.name.lower().endswith(SUFFIXES) and path.is_file())
        if not paths:
            raise UserError(f"no URL table in {urls}: put files there that end in {', '.join(SUFFIXES)}")
        return paths
    if not urls.is_file():
        raise UserError(f"URL table {urls} doesn't exist: check the path")
    table_suffix(urls)
    return [urls]


def read_schema(path: Path) -> pa.Schema:
    """The columns and types of a table; of text, as its first rows have them. Raises UserError."""
    suffix = table_suffix(path)
    try:
        if suffix == ".parquet":
            return pq.read_schema(path)
        with open_text(path, None) as reader:
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


def open_text(path: Path, types: dict[str, pa.DataType] | None) -> pyarrow.csv.CSVStreamingReader:
    """A reader of a CSV or TSV file block by block; gzip is undone by the file's name.

    CSV fields may be quoted and hold line breaks. In TSV a quote is a character like any other, as in the published
    tables: a caption that begins with a lone quote would otherwise swallow the rows up to the next one.
    """
    delimiter = TEXT_DELIMITERS[table_suffix(path)]
    quoted = delimiter == ","
    return pyarrow.csv.open_csv(
        pa.input_stream(str(path), compression="gzip" if path.name.lower().endswith(".gz") else None),
        read_options=pyarrow.csv.ReadOptions(block_size=TEXT_BLOCK_BYTES),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
        ),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types),
    )


def count_rows(path: Path, copy: Path, text_columns: Sequence[str]) -> int:
    """Count the rows of a table; those of a text table by copying it to parquet at `copy`.

    `text_columns` (URL and caption) are read as text even where they look like numbers. Raises UserError when the
    table can't be read to its end.
    """
    suffix = table_suffix(path)
    try:
        return pq.read_metadata(path).num_rows if suffix == ".parquet" else copy_text(path, copy, text_columns)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, suffix, error) from error


def rows_path(path: Path, copy: Path) -> Path:
    """The parquet file to read a table's rows from: itself, or the copy of a text table."""
    return path if table_suffix(path) == ".parquet" else copy


def copy_text(path: Path, copy: Path, text_columns: Sequence[str]) -> int:
    """Write a text table as parquet and return its number of rows.

    Types are guessed from the first block; where a later row doesn't fit them, every column becomes text.
    """
    with open_text(path, None) as reader:
        names = reader.schema.names
    try:
        return write_copy(path, copy, dict.fromkeys(text_columns, pa.string()))
    except pa.ArrowInvalid:
        return write_copy(path, copy, dict.fromkeys(names, pa.string()))


def write_copy(path: Path, copy: Path, types: dict[str, pa.DataType]) -> int:
    """Write a text table as parquet with the given types (the others guessed) and return its number of rows."""
    with (
        open_text(path, types) as reader,
        write_beside(copy) as temporary,
        pq.ParquetWriter(temporary, reader.schema) as writer,
    ):
        rows = 0
        for batch in reader:
            writer.write_table(pa.Table.from_batches([batch]), row_group_size=COPY_ROWS)
            rows += batch.num_rows
        return rows


def fingerprint(path: Path) -> str:
    """A hash that tells a changed file from the one seen before: of the whole file, or of samples when it is large."""
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


def read_rows(path: Path, start: int, count: int, columns: list[str]) -> pa.Table:
    """Rows `start` to `start + count` of a parquet file, reading the row groups that hold them alone.

    Raises UserError when the file is gone or damaged.
    """
    try:
        return _read_rows(path, start, count, columns)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, ".parquet", error) from error


def _read_rows(path: Path, start: int, count: int, columns: list[str]) -> pa.Table:
    with pq.ParquetFile(path) as file:
        first = passed = 0
        groups: list[int] = []
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if passed + rows > start and passed < start + count:
                if not groups:
                    first = passed
                groups.append(group)
            passed += rows
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
        batches = _slice(file, groups, start - first, count, columns)
        return pa.Table.from_batches(batches, schema).combine_chunks()


def _slice(
    file: pq.ParquetFile, groups: list[int], skip: int, count: int, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    for batch in file.iter_batches(batch_size=65_536, row_groups=groups, columns=columns):
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        part = batch.slice(skip, count)
        skip, count = 0, count - part.num_rows
        yield part.select(columns)
        if count == 0:
            return
