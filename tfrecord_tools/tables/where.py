"""Which rows of a table are wanted: an SQL condition over one row, judged by DuckDB before anything is fetched.

A condition must give the same rows on every machine and in every run, whatever the rows are cut into. So it may name
only the row's own columns, and nothing that is counted over rows, drawn at random, read from the clock, from a setting
or from a file. DuckDB's own parser says what a condition holds; what isn't known to be harmless is refused.
"""

import json
import re
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.tfrecord_tools.tables.url_table import is_text

if TYPE_CHECKING:
    import duckdb

Mask = npt.NDArray[np.bool_]

BATCH_ROWS = 65_536
TABLE = "clipkit_rows"
# The kinds of expression of DuckDB's parser that depend only on one row; FUNCTION and COLUMN_REF are looked into.
HARMLESS = frozenset(
    {"BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT"}
    | {"FUNCTION", "LAMBDA", "OPERATOR", "TYPE"}
)
FRACTIONS = frozenset({"DOUBLE", "DOUBLE PRECISION", "FLOAT", "FLOAT4", "FLOAT8", "REAL"})
NAN_TEXT = r"(?i)^\s*[+-]?nan\s*$"
REFUSED = {
    "SUBQUERY": "a query inside it",
    "WINDOW": "a window over several rows",
    "STAR": "* for all columns",
    "PARAMETER": "a parameter",
    "POSITIONAL_REFERENCE": "a column by number",
}


class RowFilter:
    """A condition, checked once, then asked of many tables in turn; not of several by threads at once.

    Holds a DuckDB connection of its own with one thread, so a process that makes one can't hand it to another.
    """

    def __init__(self, where: str, schema: pa.Schema) -> None:
        """`schema` is that of the tables to come.

        Raises UserError for unknown columns and functions, wrong syntax, wrong types, what isn't a condition, and what
        depends on more than the row: aggregates, windows, queries, parameters, files, settings, the clock, random
        numbers.
        """
        self.where = where
        self.connection = connect()
        casts = find_columns(self.connection, where, schema)
        self.columns = list(casts)
        """The columns of the schema that the condition names, so that no other has to be read."""
        self.cast = {name for name, types in casts.items() if None not in types}
        """Those of them that it names only to CAST them: what type they have doesn't matter."""
        self.fractions = {name for name, types in casts.items() if types <= FRACTIONS}
        empty = pa.schema([schema.field(name) for name in self.columns]).empty_table()
        kind = self.ask(empty).schema.types[0]
        if not pa.types.is_boolean(kind):
            raise UserError(f"--where {where!r} isn't a condition: it gives {kind}; compare it with something")

    def mask(self, table: pa.Table) -> Mask:
        """bool[len(table)]: which rows fulfil the condition, in their order; unknown (null) counts as false.

        Raises UserError where a value can't be converted as the condition asks.
        """
        answer = pc.fill_null(self.ask(table.select(self.columns)).column(0), False)
        return np.asarray(answer.to_numpy(), dtype=np.bool_)

    def ask(self, table: pa.Table) -> pa.Table:
        """One column, the condition's value for each row, with DuckDB's complaints as a UserError."""
        import duckdb

        try:
            self.connection.register(TABLE, readable(table, self.fractions))
            return self.connection.sql(f"SELECT ({self.where}\n) FROM {TABLE}").to_arrow_table()
        except (duckdb.Error, pa.ArrowException) as error:
            texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
            is_text = bool(texts) and "VARCHAR" in str(error)
            hint = f"; {texts[0]} is text, as a number it is CAST({texts[0]} AS DOUBLE)" if is_text else ""
            raise UserError(f"--where {self.where!r} can't be asked: {reason(error)}{hint}") from error
        finally:
            self.connection.unregister(TABLE)


def iter_masks(file: pq.ParquetFile, row_filter: RowFilter) -> Iterator[Mask]:
    """The masks of consecutive rows of an open parquet file, at most BATCH_ROWS at a time."""
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=row_filter.columns):
        yield row_filter.mask(pa.Table.from_batches([batch]))


# ---- What a condition may hold ---------------------------------------------------------------------------------------


def connect() -> "duckdb.DuckDBPyConnection":
    """A DuckDB without files, network, extensions, threads and Python's variables. Raises UserError if it's missing."""
    try:
        import duckdb
    except ImportError as error:
        raise UserError("--where needs DuckDB: pip install 'clipkit[download]'") from error
    connection = duckdb.connect(
        ":memory:",
        config={
            "threads": 1,
            "enable_external_access": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
        },
    )
    # Timestamps with a zone turn into dates and hours by this setting, which would else be the machine's.
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET lock_configuration = true")
    return connection


def find_columns(connection: "duckdb.DuckDBPyConnection", where: str, schema: pa.Schema) -> dict[str, set[str | None]]:
    """The columns, as the schema spells them, that a condition names, with what each is cast to; None for nothing.

    Raises UserError.
    """
    found: dict[str, set[str | None]] = {}
    for name, cast in named_columns(connection, where, where, frozenset()):
        found.setdefault(match_column(name, where, schema), set()).add(cast)
    if not found:
        raise UserError(f"--where {where!r} names no column: choose among {', '.join(schema.names)}")
    if len({name.lower() for name in found}) < len(found):
        raise UserError(f"--where {where!r} names columns that differ only in upper and lower case: rename one")
    return found


def match_column(name: str, where: str, schema: pa.Schema) -> str:
    """The column that SQL means by a name: the one spelt so, else the one spelt so but for upper and lower case."""
    same = [column for column in schema.names if column == name]
    same = same or [column for column in schema.names if column.lower() == name.lower()]
    if not same:
        raise UserError(f"--where {where!r} names column {name!r}; the table has {', '.join(schema.names)}")
    if len(same) > 1:
        raise UserError(f"--where {where!r}: the table has {len(same)} columns {name!r}; rename all but one")
    return same[0]


def named_columns(
    connection: "duckdb.DuckDBPyConnection", expression: str, where: str, parameters: frozenset[str]
) -> Iterator[tuple[str, str | None]]:
    """The columns named in an expression, in order, with the type that each is cast to there, if it is.

    `parameters` are names that aren't columns. Raises UserError.
    """
    (tree,) = parse(connection, expression, where)["select_list"]
    nodes = list(walk(tree))
    parameters |= {name.lower() for node in nodes if node["class"] == "LAMBDA" for name in lambda_names(node)}
    casts = {id(node["child"]): node["type_expr"]["type_name"].upper() for node in nodes if node["class"] == "CAST"}
    for node in nodes:
        if node["class"] not in HARMLESS:
            what = REFUSED.get(node["class"], node["class"].lower())
            raise UserError(f"--where {where!r} holds {what}: a condition is over the columns of one row")
        if node["class"] == "FUNCTION":
            check_function(connection, node["function_name"], where)
        if node["class"] == "COLUMN_REF" and node["column_names"][0].lower() not in parameters:
            yield node["column_names"][0], casts.get(id(node))


def parse(connection: "duckdb.DuckDBPyConnection", expression: str, where: str) -> dict[str, Any]:
    """DuckDB's tree of `SELECT (expression) FROM …`. Raises UserError when it is more or less than one expression."""

    def tree(inner: str) -> dict[str, Any]:
        ending = f"\n) FROM {TABLE}"
        query = f"SELECT ({inner}{ending}"
        ((text,),) = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchall()
        answer = without_positions(json.loads(text))
        if answer["error"]:
            problem = answer["error_message"].replace(ending, "")
            # The place is in bytes; what stands there, or is missing, is ours.
            if int(answer.get("position") or 0) >= len(f"SELECT ({inner}".encode()):
                problem = "the condition ends too early, or a bracket has no partner"
            raise UserError(f"--where {where!r} isn't SQL that can be read: {problem}")
        return {"select_list": [], **answer["statements"][0]["node"], "statements": len(answer["statements"])}

    found, plain = tree(expression), tree("true")
    if found | {"select_list": []} != plain | {"select_list": []} or len(found["select_list"]) != 1:
        raise UserError(f"--where {where!r} is more than a condition: give only what stands behind WHERE")
    return found


def without_positions(node: Any) -> Any:
    """A tree without the places in the text, which differ from text to text."""
    if isinstance(node, dict):
        return {key: without_positions(value) for key, value in node.items() if not key.startswith("query_location")}
    return [without_positions(item) for item in node] if isinstance(node, list) else node


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """All expressions in a tree, the outer before the inner."""
    if isinstance(node, dict):
        if "class" in node:
            yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def lambda_names(node: dict[str, Any]) -> list[str]:
    """The parameters of `x -> …` or `(x, i) -> …`."""
    return [part["column_names"][0] for part in walk(node["lhs"]) if part["class"] == "COLUMN_REF"]


def check_function(connection: "duckdb.DuckDBPyConnection", name: str, where: str) -> None:
    """Raise UserError for a function that doesn't exist, or whose answer depends on more than its arguments."""
    rows = connection.execute(
        "SELECT DISTINCT function_type, stability, macro_definition, parameters FROM duckdb_functions() "
        "WHERE lower(function_name) = lower(?)",
        [name],
    ).fetchall()
    kinds = {row[0] for row in rows}
    if "aggregate" in kinds:
        raise UserError(f"--where {where!r} uses {name}(), which is over many rows: a condition is over one row")
    for kind, stability, definition, parameters in rows:
        if kind == "macro":
            inner = named_columns(connection, definition, where, frozenset(map(str.lower, parameters)))
            steady = next(inner, None) is None
        else:
            steady = kind == "scalar" and stability == "CONSISTENT"
        if not steady:
            raise UserError(f"--where {where!r} uses {name}(), which may answer otherwise in another run: leave it out")


def readable(table: pa.Table, fractions: Container[str] = ()) -> pa.Table:
    """The table as DuckDB is to read it: without 16-bit floats, which it hasn't, and null for NaN, as everywhere here.

    To DuckDB NaN is above all numbers, so `similarity > 0.3` would want every row whose similarity is missing. The
    columns of `fractions` are cast to such: there NaN may be a text.
    """
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name in fractions and is_text(column.type):
            column = column.cast(pa.large_string())
            column = pc.if_else(pc.match_substring_regex(column, NAN_TEXT), pa.scalar(None, column.type), column)
        if pa.types.is_floating(column.type):
            column = column.cast(pa.float32()) if pa.types.is_float16(column.type) else column
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        columns.append(column)
    return pa.Table.from_arrays(columns, names=table.column_names)


def reason(error: Exception) -> str:
    """The first sentence of DuckDB's or Arrow's message, without its drawing of the place."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"^[A-Za-z ]+ Error: ", "", first).strip()
