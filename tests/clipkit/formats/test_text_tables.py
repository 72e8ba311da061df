"""CSV and TSV of every program and with any legal quoting are read as they were meant, or refused."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit.errors import UserError
from clipkit.formats import tables as tables_module
from clipkit.formats import text_file, text_quotes
from clipkit.formats.tables import read_columns
from clipkit.formats.text_file import Quoting
from clipkit.tfrecord_tools.tables.copies import copy_tables

Rows = list[list[str]]
Writer = Callable[[Path, list[str], Rows], None]

SPECIAL = "a\"\\,\t;\n\r |é0'"
HOSTILE = [
    *("", '"', '"whole"', '"lone', 'end"', "a\\", 'say \\"x\\"', "C:\\\\dir", " x ", "NULL", "nan"),
    *("one\ntwo", "a,b\nc,d", "a\tb\nc\td"),
]
fields = st.text(st.sampled_from(SPECIAL), max_size=6) | st.sampled_from(HOSTILE)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], Rows]:
    count = draw(st.integers(2, 3))
    names = draw(st.lists(fields.filter(bool), min_size=count, max_size=count, unique_by=str.lower))
    return names, draw(st.lists(st.lists(fields, min_size=count, max_size=count), min_size=1, max_size=5))


def python_writer(**options: Any) -> Writer:
    def write(path: Path, names: list[str], rows: Rows) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", **options)
            writer.writerow(names)
            writer.writerows(rows)

    return write


def pandas_writer(**options: Any) -> Writer:
    def write(path: Path, names: list[str], rows: Rows) -> None:
        separator = "\t" if path.suffix == ".tsv" else ","
        pandas.DataFrame(rows, columns=names, dtype=object).to_csv(path, sep=separator, index=False, **options)

    return write


def duckdb_writer(options: str) -> Writer:
    def write(path: Path, names: list[str], rows: Rows) -> None:
        separator = "\t" if path.suffix == ".tsv" else ","
        with duckdb.connect() as connection:
            connection.register("t", pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=names))
            connection.execute(f"COPY t TO '{path}' (FORMAT csv, HEADER, DELIM '{separator}'{options})")

    return write


WRITERS: dict[str, Writer] = {
    "python": python_writer(),
    "python LF": python_writer(lineterminator="\n"),
    "python all": python_writer(quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "python texts": python_writer(quoting=csv.QUOTE_NONNUMERIC),
    "python backslash": python_writer(doublequote=False, escapechar="\\"),
    "python backslash all": python_writer(doublequote=False, escapechar="\\", quoting=csv.QUOTE_ALL),
    "python none": python_writer(escapechar="\\", quoting=csv.QUOTE_NONE),
    "pandas": pandas_writer(),
    "pandas all": pandas_writer(quoting=csv.QUOTE_ALL),
    "pandas CRLF": pandas_writer(lineterminator="\r\n"),
    "pandas backslash": pandas_writer(doublequote=False, escapechar="\\"),
    "duckdb": duckdb_writer(""),
    "duckdb all": duckdb_writer(", FORCE_QUOTE *"),
    "duckdb backslash": duckdb_writer(", ESCAPE '\\'"),
}


def read(path: Path, names: list[str], quoting: Quoting = "auto") -> Rows:
    return [list(row.values()) for batch in read_columns(path, names, quoting) for row in batch.to_pylist()]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@settings(max_examples=40)
@given(tables())
def test_any_table_reads_back_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, writer: str, table: tuple[list[str], Rows]
) -> None:
    names, rows = table
    path = tmp_path_factory.mktemp("t") / f"t{suffix}"
    try:
        WRITERS[writer](path, names, rows)
    except (csv.Error, duckdb.Error):
        return  # the program itself refuses
    try:
        found = read(path, names)
    except UserError:
        return
    assert found == rows, path.read_bytes()


@pytest.mark.parametrize("quoting", ["csv", "backslash"])
def test_a_line_end_in_a_field_may_lie_on_the_border_of_two_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quoting: Quoting
) -> None:
    for module in (tables_module, text_file, text_quotes):
        monkeypatch.setattr(module, "TEXT_BLOCK_BYTES", 64)
        monkeypatch.setattr(module, "PIECE_BYTES", 32, raising=False)
    for length in range(48):
        rows = [[f"{row}", "x" * length + "\r\ny"] for row in range(20)]
        WRITERS["python all"](tmp_path / "t.csv", ["url", "caption"], rows)
        assert read(tmp_path / "t.csv", ["url", "caption"], quoting) == rows


ORDINARY = [["http://x/1.jpg", 'He said "hi"'], ["http://x/2.jpg", "a, b"], ["http://x/3.jpg", "plain"]]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_an_ordinary_table_is_not_refused(tmp_path: Path, suffix: str, writer: str) -> None:
    """But for a backslash before a quote in a field that isn't quoted, which may also be two characters."""
    path = tmp_path / f"t{suffix}"
    WRITERS[writer](path, ["url", "caption"], ORDINARY)
    if writer in ("python backslash", "python none", "pandas backslash"):
        with pytest.raises(UserError, match=r"has a backslash before a quote, .*: .* --quoting"):
            read(path, ["url", "caption"])
    else:
        assert read(path, ["url", "caption"]) == ORDINARY


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@given(tables())
def test_the_option_decides(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, table: tuple[list[str], Rows]
) -> None:
    names, rows = table
    path = tmp_path_factory.mktemp("t") / f"t{suffix}"
    ways: list[tuple[str, Quoting]] = [("python all", "csv"), ("duckdb", "csv"), ("pandas CRLF", "csv")]
    for writer, quoting in ways:
        WRITERS[writer](path, names, rows)
        assert read(path, names, quoting) == rows


@pytest.mark.parametrize("quote_all", [False, True])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_spark(tmp_path: Path, spark: Any, separator: str, quote_all: bool) -> None:
    texts = ["plain", 'a"b', "a\\b", "a,b", "a\tb", 'say "hi", she said', "C:\\dir, x"]
    texts += ['"whole"', "one\ntwo", "a\\", "é"]
    rows = [[f"{number}", text] for number, text in enumerate(texts)]
    frame = spark.createDataFrame(rows, "key string, text string").coalesce(1)
    frame.write.csv(str(tmp_path / "out"), header=True, sep=separator, quoteAll=quote_all)
    (part,) = (tmp_path / "out").glob("part-*")
    path = part.rename(tmp_path / ("t.csv" if separator == "," else "t.tsv"))
    assert read(path, ["key", "text"]) == rows
    assert read(path, ["key", "text"], "backslash") == rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(tables())
def test_any_table_of_spark_reads_back_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, spark: Any, suffix: str, table: tuple[list[str], Rows]
) -> None:
    rows = table[1]
    names = [f"c{number}" for number in range(len(rows[0]))]
    folder = tmp_path_factory.mktemp("t")
    frame = spark.createDataFrame(rows, ", ".join(f"{name} string" for name in names)).coalesce(1)
    # Spark trims fields unless it is told not to.
    whole = {"ignoreLeadingWhiteSpace": False, "ignoreTrailingWhiteSpace": False}
    frame.write.csv(str(folder / "out"), header=True, sep="\t" if suffix == ".tsv" else ",", **whole)
    (part,) = (folder / "out").glob("part-*")
    path = part.rename(folder / f"t{suffix}")
    try:
        found = read(path, names)
    except UserError:
        return
    assert found == rows, path.read_bytes()


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    from pyspark.sql import SparkSession

    session = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    yield session
    session.stop()


U = "http://x/1.jpg"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("t.tsv", 'u\t"He said ""hi"""\nu\tplain\n', ['He said "hi"', "plain"]),
        ("t.tsv", 'u\t"one\ntwo"\n', ["one\ntwo"]),
        ("t.tsv", f'{U}\t"lone\n{U}\tplain\n{U}\tends"\n', ['"lone', "plain", 'ends"']),
        ("t.tsv", 'u\t"lone\nu\t"whole, quoted"\nu\t5" pipe\n', ['"lone', "whole, quoted", '5" pipe']),
        ("t.tsv", 'u\t"never closed\nu\tplain\n', ['"never closed', "plain"]),
        ("t.csv", 'u,5" pipe\nu,"a, ""b"""\n', ['5" pipe', 'a, "b"']),
        ("t.csv", 'u,"say \\"hi\\", she"\nu,\\_\n', ['say "hi", she', "\\_"]),
        ("t.csv", "u;a, b\nu;c\n", ["a, b", "c"]),
        ("t.csv", "\ufeffu\tc\r\nu\td", ["c", "d"]),
        ("t.csv", "u,\n\nu,NA\n", ["", "NA"]),
    ],
)
def test_how_quotes_are_read(tmp_path: Path, name: str, content: str, found: list[str]) -> None:
    path = tmp_path / name
    separator = ";" if ";" in content else "\t" if "\t" in content else ","
    text = content.removeprefix("\ufeff")
    path.write_bytes(("\ufeff" * (text != content) + f"url{separator}caption\n" + text).encode())
    if "\r\n" in content:
        path.write_bytes(path.read_bytes().replace(b"caption\n", b"caption\r\n"))
    assert [row[0] for row in read(path, ["caption"])] == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", f'{U},a\n{U},"Unbalanced\n{U},b\n', r"the quote that opens in row 2 \(line 3\) .*--quoting none"),
        ("t.csv", f'{U},"Unbalanced\n{U},b\n{U},12"\n', r"opens in row 1 \(line 2\) .*some rows below.*--quoting none"),
        ("t.csv", 'u,"Unbalanced\nu,b\nu,12"\n', r"line 2 .*--quoting csv or --quoting none"),
        ("t.tsv", 'u\t"a\nu\tb"\n', r"line 2 .*--quoting csv or --quoting none"),
        ("t.csv", 'u,"a" b\n', r"row 1 \(line 2\) .*behind a quoted field.*--quoting none"),
        ("t.csv", 'u, "a"\n', r"row 1 .*blank before a quote.*--quoting none"),
        ("t.csv", 'u,a \\"b\\"\n', r"row 1 .*backslash before a quote.*--quoting csv or none"),
        ("t.csv", 'u,"C:\\\\dir, x"\n', r"backslashes .*--quoting csv or --quoting backslash"),
        ("t.csv", "u,a,b\n", r"Expected 2 columns, got 3.*separated by ','"),
        ("t.csv", "u,a\nu,b\r\n", r"some lines .* LF .*CRLF"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text("url,caption\n".replace(",", "\t" if "tsv" in name else ",") + content, newline="")
    with pytest.raises(UserError, match=message):
        read(path, ["url", "caption"])


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("url,caption\nu,c\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        read(tmp_path / "t.csv", ["url"])
    (tmp_path / "t.csv").write_text("url,a,a\nu,1,2\n")
    with pytest.raises(UserError, match="2 columns 'a'"):
        read(tmp_path / "t.csv", ["a"])


# ---- Types -----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "int": ["0", "-5", "3", "123", "12345678901", "9223372036854775807"],
    "float": ["0.5", "-1.25", "1e-05", "0.00001", "1.0", "1e+20"],
    "text": [
        *("10000000000000000001", "0017", "1e5", "+1", " 1", "1.50", "-0", "inf", "nan"),
        *("2024-01-01", "true", "1_0", "x"),
    ],
}


@given(st.lists(st.sampled_from([value for values in NUMBERS.values() for value in values] + [""]), min_size=1))
def test_a_number_is_printed_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, values: list[str]) -> None:
    folder = tmp_path_factory.mktemp("t")
    half = len(values) // 2
    parts = [part for part in (values[:half], values[half:]) if part]
    pairs = []
    for number, part in enumerate(parts):
        path = folder / f"{number}.csv"
        path.write_text("key,value\n" + "".join(f"k,{value}\n" for value in part))
        pairs.append((path, folder / f"{number}.parquet"))
    assert copy_tables(pairs, lambda name: name == "key") == [len(part) for part in parts]
    copies = [pq.read_table(copy)["value"] for _, copy in pairs]
    found = [value for column in copies for value in column.to_pylist()]
    assert len({column.type for column in copies}) == 1
    kinds = {kind for kind, known in NUMBERS.items() for value in values if value in known}
    if "text" in kinds or (kinds == {"int", "float"} and "9223372036854775807" in values):
        assert found == values
    else:
        number = float if "float" in kinds else int
        assert found == [number(value) if value else None for value in values]
        assert copies[0].type == (pa.null() if not kinds else pa.float64() if "float" in kinds else pa.int64())


def test_types_hold_for_tables_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,d\n1,1.0\n2,2.5\n")
    (tmp_path / "b.jsonl").write_text('{"n": 3, "d": 1}\n{"n": "007", "d": null}\n')
    pairs = [(path, path.with_suffix(".parquet")) for path in (tmp_path / "a.csv", tmp_path / "b.jsonl")]
    copy_tables(pairs, lambda name: False, others=[{"d": "text"}])
    tables = [pq.read_table(copy).to_pydict() for _, copy in pairs]
    assert tables == [{"n": ["1", "2"], "d": ["1.0", "2.5"]}, {"d": ["1", None], "n": ["3", "007"]}]
