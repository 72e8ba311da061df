"""A condition picks the rows that SQL says, the same in every run, and a wrong one is refused in one line."""

import datetime
import decimal
import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import UserError
from clipkit.formats.tables import open_parquet, table_errors
from clipkit.tfrecord_tools.tables.where import Mask, RowFilter, connect, iter_masks


def select(table: pa.Table, where: str) -> Mask:
    return RowFilter(where, table.schema).mask(table)


def select_rows(path: Path, where: str) -> Mask:
    with table_errors(path), open_parquet(path) as file:
        return np.concatenate(list(iter_masks(file, RowFilter(where, file.schema_arrow))))


TABLE = pa.table(
    {
        "URL": ["a", "b", "c", "d"],
        "similarity": pa.array([0.29, 0.31, None, 0.5], pa.float32()),
        "NSFW": ["UNLIKELY", "NSFW", "UNLIKELY", "UNLIKELY"],
        "WIDTH": pa.array([100, 200, 300, 400], pa.int32()),
        "odd name": [1, 2, 3, 4],
        "kind": pa.array(["x", "y", None, "x"]).dictionary_encode(),
        "tags": pa.array([["cat"], [], None, ["dog", "cat"]]),
        "scores": pa.array([[1.5], [0.5, 2.5], [], None]),
        "seen": pa.array([datetime.datetime(2020 + i, 1, 1, 23, tzinfo=datetime.UTC) for i in range(4)]),
        "day": pa.array([datetime.date(2020, 1, 1 + i) for i in range(4)]),
        "price": pa.array([decimal.Decimal("0.10"), decimal.Decimal("0.20"), None, decimal.Decimal("9.99")]),
        "nan": pa.array([0.1, 0.5, float("nan"), None]),
        "written": ["0.29", "0.31", " NaN ", "nan"],
        "half": pa.array([0.25, 0.5, 0.75, None], pa.float16()),
        "flag": [True, False, None, True],
        "exif": pa.array([{"make": "A"}, {"make": "B"}, None, {"make": None}]),
        "large": pa.array(["a", "b", "c", "d"], pa.large_string()),
        "view": pa.array(["a", "b", "c", "d"], pa.string_view()),
        "bytes": [b"a", b"b", b"c", b"d"],
        "nothing": pa.nulls(4),
        "byte": pa.array([0, 1, 2, 255], pa.uint8()),
    }
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("similarity > 0.3 AND NSFW = 'UNLIKELY'", "d"),
        ("similarity > 0.3", "bd"),
        ("NOT similarity > 0.3", "a"),
        ("similarity IS NULL", "c"),
        ("width >= 200 and Nsfw <> 'NSFW'", "cd"),
        ('"odd name" % 2 = 0', "bd"),
        ("kind = 'x'", "ad"),
        ("kind IS DISTINCT FROM 'x'", "bc"),
        ("list_contains(tags, 'cat')", "ad"),
        ("len(list_filter(scores, lambda s: s > 1)) > 0", "ab"),
        ("len([s for s in scores if s > 2]) = 1", "b"),
        ("list_avg(scores) > 1", "ab"),
        ("tags[1] = 'dog'", "d"),
        ("seen >= TIMESTAMPTZ '2021-01-01 23:00:00+00'", "bcd"),
        ("hour(seen) = 23 AND year(seen) < 2022", "ab"),
        ("seen - INTERVAL 1 DAY < TIMESTAMPTZ '2020-01-01'", "a"),
        ("day BETWEEN DATE '2020-01-02' AND DATE '2020-01-03'", "bc"),
        ("price <= 0.20", "ab"),
        ("half >= 0.5", "bc"),
        ("nan > 0.3", "b"),
        ("NOT nan > 0.3", "a"),
        ("nan IS NULL", "cd"),
        ("flag", "ad"),
        ("exif.make = 'B'", "b"),
        ("large IN ('a', 'd') OR view LIKE 'b%'", "abd"),
        ("bytes = 'b'::BLOB", "b"),
        ("nothing IS NULL", "abcd"),
        ("nothing = 1", ""),
        ("byte > 127", "d"),
        ("CASE WHEN WIDTH > 150 THEN flag ELSE true END", "ad"),
        ("regexp_matches(URL, '[bc]') -- a comment", "bc"),
        ("lower(URL || 'X') = 'ax'", "a"),
        ("TRY_CAST(URL AS INTEGER) IS NULL", "abcd"),
        ("hash(URL) % 1 = 0", "abcd"),
        ("CAST(written AS DOUBLE) > 0.3", "b"),
        ("written::FLOAT > 0.3 OR TRY_CAST(written AS REAL) < 0.3", "ab"),
        ("CAST(large AS VARCHAR) = 'b' OR lower(written) = 'nan' OR URL = 'a' AND CAST(written AS DOUBLE) > 0", "abd"),
    ],
)
def test_rows(where: str, rows: str) -> None:
    mask = select(TABLE, where)
    assert mask.dtype == np.bool_
    assert "".join(TABLE["URL"].filter(pa.array(mask)).to_pylist()) == rows


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("similarty > 0.3", "names column 'similarty'; the table has URL, similarity, NSFW"),
        ("nsfw.x.y = 1 AND nope = 2", "names column 'nope'"),
        ("rowid > 1", "names column 'rowid'"),
        ("similarity >", "isn't SQL that can be read: the condition ends too early, or a bracket has no partner$"),
        ("URL = 'é' AND", "isn't SQL that can be read: the condition ends too early"),
        ("(similarity > 0.3", "isn't SQL that can be read: .*a bracket has no partner$"),
        ("similarity > 0.3)", "isn't SQL that can be read: .*a bracket has no partner$"),
        ("URL = 'é' AND >", 'isn\'t SQL that can be read: syntax error at or near ">"$'),
        ("similarity > 0.3 /* more", r"isn't SQL that can be read: unterminated /\* comment at or near \"/\* more\"$"),
        (" ", "names no column"),
        ("NSFW = 'UNLIKELY", "isn't SQL that can be read"),
        ("similarity > 0.3; DROP TABLE x", "isn't SQL that can be read"),
        ("similarity > 0.3) FROM (SELECT 1", "isn't SQL that can be read"),
        ("WIDTH > 1) FROM clipkit_rows WHERE (WIDTH > 2", "isn't SQL that can be read|more than a condition"),
        ("WIDTH > 1), (WIDTH > 2", "more than a condition"),
        ("similarity", "isn't a condition: it gives float; compare it with something"),
        ("URL", "isn't a condition: it gives string"),
        ("1 = 1", "names no column: choose among URL, similarity"),
        ("similarity > avg(similarity)", r"avg\(\), which is over many rows"),
        ("count(*) > 1", "over many rows"),
        ("row_number() OVER () > WIDTH", "a window over several rows"),
        ("similarity > (SELECT 1)", "holds a query inside it"),
        ("URL IN (SELECT 'a')", "holds a query inside it"),
        ("URL IN (SELECT content FROM read_text('/etc/passwd'))", "holds a query inside it"),
        ("COLUMNS(*) > 0", r"holds \* for all columns"),
        ("WIDTH > ?", "holds a parameter"),
        ("#1 > 1", "holds a column by number"),
        ("random() < similarity", r"random\(\), which may answer otherwise in another run"),
        ("URL = uuid()::VARCHAR", "may answer otherwise"),
        ("seen < now()", r"now\(\), which may answer otherwise"),
        ("seen < current_timestamp", "names column 'current_timestamp'"),
        ("day < current_date", "names column 'current_date'"),
        ("day < today()", "may answer otherwise"),
        ("seen > ago(INTERVAL 1 DAY)", "may answer otherwise"),
        ("current_setting('threads') = URL", "may answer otherwise"),
        ("nextval('s') = WIDTH", "may answer otherwise"),
        ("pg_get_viewdef(WIDTH) = URL", "holds a query inside it"),
        ("no_such_function(URL) = 1", "can't be asked: .*no_such_function"),
        ("read_text(URL) = ''", "may answer otherwise|can't be asked"),
        ("getenv(URL) = ''", "can't be asked|may answer otherwise"),
        ("tags > 3", "can't be asked"),
    ],
)
def test_wrong_conditions_are_refused_in_one_line(where: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        RowFilter(where, TABLE.schema)
    assert "\n" not in str(caught.value)


def test_a_value_that_can_not_be_converted_is_one_line() -> None:
    with pytest.raises(UserError, match="Could not convert string 'a' to INT32") as caught:
        select(TABLE, "CAST(URL AS INTEGER) > 1")
    assert "\n" not in str(caught.value)


def test_a_number_asked_of_a_text_column_gets_the_remedy() -> None:
    """`0.30` in a CSV isn't written as the number 0.3 prints, so the column is text."""
    table = pa.table({"similarity": ["0.30", "0.350"]})
    with pytest.raises(UserError, match=r"similarity is text, as a number it is CAST\(similarity AS DOUBLE\)"):
        RowFilter("similarity > 0.33", table.schema).mask(table)
    assert RowFilter("CAST(similarity AS DOUBLE) > 0.33", table.schema).mask(table).tolist() == [False, True]


def test_columns_that_differ_in_case() -> None:
    table = pa.table({"url": [1, 2], "URL": [2, 1]})
    assert select(table, "url = 1").tolist() == [True, False]
    assert select(table, "URL = 1").tolist() == [False, True]
    with pytest.raises(UserError, match="the table has 2 columns 'Url'"):
        select(table, "Url = 1")
    with pytest.raises(UserError, match="differ only in upper and lower case"):
        select(table, "url = URL")


def test_files_and_python_variables_stay_out_of_reach(tmp_path: Path) -> None:
    """Even if a query came through."""
    (tmp_path / "t.csv").write_text("a\n1\n")
    secret = pa.table({"x": [1]})
    for query in (f"FROM '{tmp_path}/t.csv'", f"FROM read_text('{tmp_path}/t.csv')", "FROM secret"):
        with pytest.raises(duckdb.Error):
            connect().sql(query)
    with pytest.raises(duckdb.Error):
        connect().execute("SET enable_external_access = true")
    assert len(secret) == 1


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(allow_nan=False, width=32)), max_size=200),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
def test_order_is_kept_however_the_rows_are_cut(values: list[float | None], limit: float) -> None:
    table = pa.table({"v": pa.array(values, pa.float32())})
    row_filter = RowFilter(f"v > {limit!r}", table.schema)
    expected = [value is not None and value > limit for value in values]
    assert row_filter.mask(table).tolist() == expected
    for step in (1, 7):
        parts = [row_filter.mask(table.slice(start, step)) for start in range(0, len(table), step)]
        assert [bool(each) for part in parts for each in part] == expected


def test_chunked_tables_and_empty_ones() -> None:
    row_filter = RowFilter("WIDTH > 200", TABLE.schema)
    assert row_filter.columns == ["WIDTH"]
    assert row_filter.mask(pa.concat_tables([TABLE, TABLE.slice(2)])).tolist() == [False, False, *[True] * 4]
    assert row_filter.mask(TABLE.slice(0, 0)).tolist() == []


def test_parquet_file_in_small_row_groups(tmp_path: Path) -> None:
    rows = 200_000
    values = np.arange(rows) * 7919 % 1000
    table = pa.table({"v": values, "caption": np.char.mod("%d", values)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=70_001)
    np.testing.assert_array_equal(
        select_rows(tmp_path / "t.parquet", "v < 300 AND caption LIKE '1%'"),
        (values < 300) & np.char.startswith(values.astype(str), "1"),
    )
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"bad\.parquet can't be read as parquet"):
        select_rows(tmp_path / "bad.parquet", "v < 300")


def test_filters_in_several_threads() -> None:
    table = pa.table({"v": np.arange(5000)})
    wrong: list[int] = []

    def work(limit: int) -> None:
        row_filter = RowFilter(f"v < {limit}", table.schema)
        wrong.extend(limit for _ in range(20) if row_filter.mask(table).sum() != limit)

    threads = [threading.Thread(target=work, args=(limit,)) for limit in (10, 200, 3000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_duckdb_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['duckdb'] = None\n"
        "import pyarrow as pa\nfrom clipkit.errors import UserError\n"
        "from clipkit.tfrecord_tools.tables.where import RowFilter\n"
        "try: RowFilter('a > 1', pa.schema([('a', pa.int64())]))\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "--where needs DuckDB: pip install 'clipkit[download]'\n"
