"""Copies of text tables as parquet, whose rows can be found by number, with types that are decided over all tables.

A field of CSV or TSV is text until it is shown to be a number: every value of its column, in every table, must be
printed again as it was written. So 10000000000000000001, 0017, +1, 1e5, 1.50 and dates stay text, with all of their
column. What JSON lines hold has types of its own.

A copy is written while the types are still being found. Where a later row or table widens one, it is written again.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.formats.captions import captions_of
from clipkit.formats.kinds import arrow_type, fit, unify, widest
from clipkit.formats.tables import (
    COPY_ROWS,
    json_kinds,
    open_parquet,
    open_text,
    read_json_lines,
    table_errors,
    table_suffix,
    text_batches,
    without_surrogates,
)
from clipkit.formats.text_file import Quoting, TextFile
from clipkit.storage.files import local_copy, write_beside

_EXACT = 1 << 53  # beyond it a float skips integers
_THREADS = 4  # that look at a column each


class Column(NamedTuple):
    """What is known of a column: its kind (see `kinds`), None while all is empty; `is_large` where a float won't do."""

    kind: str | None = None
    is_large: bool = False


Columns = dict[str, Column]


def copy_tables(
    tables: Sequence[tuple[Path, Path]],
    is_text: Callable[[str], bool],
    header: Sequence[str] = (),
    quoting: Quoting = "auto",
    others: Sequence[dict[str, str]] = (),
) -> list[int]:
    """Write each table (the first of a pair) as parquet (the second), in small row groups; the numbers of rows.

    Columns for whose name `is_text` holds stay text. `others` are the kinds of columns in tables that aren't copied.
    Raises UserError when a table can't be read to its end.
    """
    known: Columns = {}
    for kinds in others:
        known = join(known, {name: Column(kind) for name, kind in kinds.items()})
    copies = []
    for path, copy in tables:
        rows, known = _copy(path, copy, known, is_text, header, quoting)
        copies.append((path, copy, rows, known))
    for path, copy, _, written in copies:
        if any(written[name].kind != known[name].kind for name in written):
            _copy(path, copy, known, is_text, header, quoting)
    return [rows for _, _, rows, _ in copies]


def copy_table(
    path: Path,
    copy: Path,
    is_text: Callable[[str], bool],
    captions: str | None = None,
    quoting: Quoting = "auto",
) -> int:
    """The same of one table, which may be parquet too.

    In JSON lines the column `captions` becomes lists of text, whatever single rows hold.
    """
    if table_suffix(path) != ".parquet":
        return _copy(path, copy, {}, is_text, (), quoting, captions)[0]
    with table_errors(path), local_copy(path) as local, open_parquet(local) as file:
        return _write(copy, file.schema_arrow, file.iter_batches(COPY_ROWS))


def join(one: Columns, other: Columns) -> Columns:
    """What holds the values of both."""
    joined = dict(one)
    for name, column in other.items():
        before = one.get(name, Column())
        if before.kind is None or column.kind is None:
            kind = before.kind or column.kind
        else:
            kind = widest((before.kind, column.kind))
        is_large = before.is_large or column.is_large
        joined[name] = Column("text" if kind == "float" and is_large else kind, is_large)
    return joined


def _copy(
    path: Path,
    copy: Path,
    known: Columns,
    is_text: Callable[[str], bool],
    header: Sequence[str],
    quoting: Quoting,
    captions: str | None = None,
) -> tuple[int, Columns]:
    with table_errors(path), local_copy(path) as local:
        if table_suffix(path) == ".jsonl":
            return _copy_json_lines(local, copy, path, known, captions)
        file = open_text(local, path, quoting, header)
        known = join({name: Column("text" if is_text(name) else None) for name in file.names}, known)
        is_whole = False
        while not is_whole:
            found = _TextCopy(file, known)
            rows = _write(copy, None, found.typed())
            is_whole, known = not found.widened, found.columns
        if not rows:
            _write(copy, pa.schema([(name, pa.string()) for name in file.names]), iter(()))
        return rows, known


def _write(copy: Path, schema: pa.Schema | None, batches: Iterator[pa.RecordBatch]) -> int:
    """Write batches as parquet; without any, and without a schema, nothing is written."""
    if schema is None:
        first = next(batches, None)
        if first is None:
            return 0
        schema, batches = first.schema, chain([first], batches)
    rows = 0
    with (
        write_beside(copy) as temporary,
        pq.ParquetWriter(temporary, schema, use_dictionary=False, write_statistics=False) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch, row_group_size=COPY_ROWS)
            rows += batch.num_rows
    return rows


# ---- CSV and TSV -----------------------------------------------------------------------------------------------------


class _TextCopy:
    """The rows of a file in the types of `columns`, which widen on the way; what comes after that isn't given."""

    def __init__(self, file: TextFile, columns: Columns) -> None:
        self.file, self.columns = file, dict(columns)
        self.widened = False

    def typed(self) -> Iterator[pa.RecordBatch]:
        """The rows, until a column that was written turns out to be wider."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for number, batch in enumerate(text_batches(self.file)):
                names = batch.schema.names
                before = [self.columns[name] for name in names]
                found = list(pool.map(_typed, batch.columns, before))
                self.columns.update({name: column for name, (column, _) in zip(names, found, strict=True)})
                is_wider = any(column.kind != old.kind for (column, _), old in zip(found, before, strict=True))
                self.widened = self.widened or (is_wider and number > 0)
                if not self.widened:
                    yield pa.RecordBatch.from_arrays([array for _, array in found], names=names)


def _typed(texts: pa.Array, known: Column) -> tuple[Column, pa.Array]:
    """What is known of a column with some more of its values, and these in its type."""
    if known.kind not in (None, "int", "float"):
        return Column("text"), texts
    values = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    if values.null_count == len(values):
        return known, pa.nulls(len(values), arrow_type(known.kind) if known.kind else pa.null())
    if known.kind != "float" and (numbers := _integers(values)) is not None:
        bounds = pc.min_max(numbers)
        is_large = known.is_large or max(abs(bounds["min"].as_py()), abs(bounds["max"].as_py())) > _EXACT
        return Column("int", is_large), numbers
    numbers = None if known.is_large else _floats(values)
    return (Column("text"), texts) if numbers is None else (Column("float"), numbers)


def _integers(values: pa.Array) -> pa.Array | None:
    """The numbers that texts are, when all are integers that are printed as they are written."""
    try:
        numbers = values.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return numbers if numbers.cast(pa.string()).equals(values) else None


def _floats(values: pa.Array) -> pa.Array | None:
    """The numbers that texts are, when all are printed, by Arrow or by Python, as they are written.

    Python's way but for the fraction of integers: a large one is 12345678901.0 to Python and 1.2345678901e+10 to Arrow.
    """
    try:
        numbers = values.cast(pa.float64())
    except pa.ArrowInvalid:
        return None
    if not pc.all(pc.is_finite(numbers)).as_py() or pc.any(pc.equal(values, "-0")).as_py():
        return None
    others = values.filter(pc.not_equal(numbers.cast(pa.string()), values))
    return numbers if all(repr(float(text)) in (text, f"{text}.0") for text in others.unique().to_pylist()) else None


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def _copy_json_lines(path: Path, copy: Path, table: Path, known: Columns, captions: str | None) -> tuple[int, Columns]:
    large: set[str] = set()

    def read() -> Iterator[dict[str, Any]]:
        for row in read_json_lines(path, table):
            yield {**row, captions: captions_of(row[captions], table)} if captions in row else row

    def kinds_of_rows() -> Iterator[dict[str, str]]:
        for row in read():
            large.update(name for name, value in row.items() if isinstance(value, int) and abs(value) > _EXACT)
            yield json_kinds(row)

    own = unify(kinds_of_rows())
    known = join(known, {name: Column(kind, name in large) for name, kind in own.items()})
    kinds = {name: kind for name in own if (kind := known[name].kind) is not None}
    schema = pa.schema([(name, arrow_type(kind)) for name, kind in kinds.items()])

    def batches() -> Iterator[pa.RecordBatch]:
        lines = read()
        while rows := list(islice(lines, COPY_ROWS)):
            fitted = [{name: without_surrogates(value) for name, value in fit(row, kinds, {}).items()} for row in rows]
            yield pa.RecordBatch.from_pylist(fitted, schema)

    return _write(copy, schema, batches()), known
