"""The table of captions, and what is made of it once so that each worker can look up any row.

Two files: the captions of all rows, each row's as the column that a record gets (`encode_column`), one behind the
other; and an array sorted by the hash of the rows' keys (`tables.digests`) that says where a row's are. The workers map
both, so that a table may be larger than the memory.
"""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipkit.config import nearest
from clipkit.errors import UserError
from clipkit.formats.captions import captions_of, check_caption_type
from clipkit.formats.features import Feature
from clipkit.formats.kinds import own_name
from clipkit.formats.records import encode_column
from clipkit.formats.tables import KEY_NAME, URL_NAME, find_tables, read_columns, read_schema
from clipkit.storage.files import save_array, write_beside
from clipkit.tfrecord_tools.tables.digests import digests, sha256_of, value_bytes

IDENTITIES = (KEY_NAME, URL_NAME)
ROWS, TEXTS = "table.npy", "captions.bin"


@dataclass(frozen=True)
class CaptionTable:
    """A table and how it is read: `by` is the column of both sides that is compared, `column` has the captions.

    `sha256` is that of the bytes of its files, one after the other.
    """

    path: Path
    files: tuple[Path, ...]
    by: str
    column: str
    sha256: str


@dataclass(frozen=True)
class RowCounts:
    """How many rows a table has, and how many can't be joined for want of a caption or, having one, of a key."""

    rows: int
    without_caption: int
    without_key: int


def open_table(path: Path, by: str | None, column: str, features: Mapping[str, Feature]) -> CaptionTable:
    """Find out how a table (parquet, CSV, TSV, JSON lines, or a folder of them) is joined to records of `features`.

    Raises UserError for a table that isn't there or lacks a column, a column that has no captions, and records that
    have nothing to compare.
    """
    files = find_tables(path, "table of captions")
    schemas = [(file, read_schema(file)) for file in files]
    names = schemas[0][1].names
    known = [name for name in IDENTITIES if own_name(features, name) in features]
    if by is None:
        fitting = [name for name in known if name in names]
        if len(fitting) != 1:
            why = f"both {' and '.join(fitting)}" if fitting else f"neither {' nor '.join(IDENTITIES)} of the records"
            raise UserError(f"{path} has {why} ({', '.join(names)}): say what to join by with --by")
        by = fitting[0]
    if by not in known:
        columns = ", ".join(sorted(features))
        raise UserError(f"--by {by}: the records have no column {by!r} ({columns}): join by another")
    for file, schema in schemas:
        for option, name in (("--by", by), ("--column", column)):
            if name not in schema.names:
                raise UserError(f"{option} {name}: {file} has no such column: {nearest(name, schema.names)}")
        _check_texts(schema.field(column).type, column, file)
    return CaptionTable(path, tuple(files), by, column, sha256_of(files))


def _check_texts(kind: pa.DataType, column: str, file: Path) -> None:
    check_caption_type(kind, column, file)
    item = kind.value_type if pa.types.is_nested(kind) else kind
    if pa.types.is_primitive(item):
        raise UserError(f"--column {column}: {file} has {kind} there, not captions: name a column of text")


def pack_table(table: CaptionTable, name: str, folder: Path) -> RowCounts:
    """Write ROWS, uint64[4, n] (hash of the key in two words, place and size of its captions), and TEXTS.

    `name` is the column that the records get. Raises UserError for a table without any caption, for a key that has two
    rows, and for what can't be read.
    """
    words, place = array("Q"), 0
    rows = without_caption = without_key = 0
    with write_beside(folder / TEXTS) as temporary, temporary.open("wb") as texts:
        for keys, captions in read_rows(table):
            taken = [(key, some) for key, some in zip(keys, captions, strict=True) if key and some]
            rows += len(keys)
            without_caption += sum(not some for some in captions)
            without_key += sum(not key and bool(some) for key, some in zip(keys, captions, strict=True))
            entries = np.empty((len(taken), 4), np.uint64)
            entries[:, :2] = digests([key for key, _ in taken]).T
            for row, (_, some) in enumerate(taken):
                column = encode_column(name, some)
                texts.write(column)
                entries[row, 2:] = place, len(column)
                place += len(column)
            words.frombytes(entries.tobytes())
    counts = RowCounts(rows, without_caption, without_key)
    entries = np.frombuffer(words, np.uint64).reshape(-1, 4) if words else np.zeros((0, 4), np.uint64)
    if not len(entries):
        raise UserError(f"{table.path} has no caption in {table.column!r} beside a {table.by}: {_describe(counts)}")
    entries = entries[np.lexsort((entries[:, 1], entries[:, 0]))]
    again = (entries[1:, :2] == entries[:-1, :2]).all(axis=1)
    if again.any():
        twice = {entry.tobytes() for entry in entries[1:, :2][again]}
        raise UserError(
            f"{table.path} has more than one row of {len(twice):,} keys, such as {_first_of(table, twice)!r}: put the "
            "captions of an image into one row, as a list"
        )
    save_array(folder / ROWS, np.ascontiguousarray(entries.T))
    return counts


def read_rows(table: CaptionTable) -> Iterator[tuple[list[bytes], list[list[str]]]]:
    """Keys (b"" for a missing one) and captions that aren't blank, some thousand rows at a time."""
    for file in table.files:
        for batch in read_columns(file, [table.by, table.column]):
            keys, values = (batch.column(name).to_pylist() for name in (table.by, table.column))
            yield [value_bytes(value) for value in keys], [_captions(value, file, table.column) for value in values]


def _captions(value: object, file: Path, column: str) -> list[str]:
    try:
        return [text for text in captions_of(value, file) if text.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"--column {column}: {file} has bytes that aren't UTF-8: convert them") from error


def _first_of(table: CaptionTable, wanted: set[bytes]) -> str:
    for keys, captions in read_rows(table):
        taken = [key for key, some in zip(keys, captions, strict=True) if key and some]
        for key, entry in zip(taken, digests(taken).T, strict=True):
            if entry.tobytes() in wanted:
                return key.decode("utf-8", "replace")
    raise AssertionError("the table has changed")


def _describe(counts: RowCounts) -> str:
    if not counts.rows:
        return "it is empty"
    return f"of {counts.rows:,} rows {counts.without_caption:,} have no caption, {counts.without_key:,} others no key"
