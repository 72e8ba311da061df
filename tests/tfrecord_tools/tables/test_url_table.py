"""Tables of URLs in all their kinds: their rows by number, and what can't be read gets one line."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_site import fetch as download
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import UserError
from clipkit.formats import tables, text_file
from clipkit.formats.tables import RowReader
from clipkit.tfrecord_tools.tables import url_table


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.parquet", None, "missing.parquet doesn't exist"),
        ("urls.txt", b"http://x/a.jpg", "can't tell what .*urls.txt is"),
        ("bad.parquet", b"PAR1 nonsense", "bad.parquet can't be read as parquet"),
        ("bad.csv", b"url,caption\na,b\nc,d,e\n", "bad.csv can't be read as csv .*Expected 2 columns, got 3"),
        ("latin.csv", b"url,caption\na,\xe9t\xe9\n", "'caption' of .*latin.csv isn't UTF-8 text"),
        ("bad.tsv.gz", b"no gzip", "bad.tsv.gz can't be read as tsv.gz"),
        ("none.csv", b"url,caption\n", "none.csv holds no rows"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        download(tmp_path / name, tmp_path / "out")


def read_rows(path: Path, start: int, count: int, columns: list[str]) -> pa.Table:
    with RowReader(path, columns) as reader:
        return reader.read(start, start + count)


def damaged_parquet(path: Path) -> Path:
    """A table whose metadata is whole and whose first page can't be unpacked."""
    pq.write_table(pa.table({"url": ["http://127.0.0.1:1/a.jpg"] * 50, "caption": ["a"] * 50}), path)
    content = bytearray(path.read_bytes())
    content[30:60] = bytes(30)
    path.write_bytes(content)
    return path


def test_tables_that_are_damaged_further_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged_parquet(tmp_path / "page.parquet")
    with pytest.raises(UserError, match=r"page\.parquet can't be read as parquet") as caught:
        read_rows(path, 0, 50, ["url", "caption"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.parquet can't be read as parquet"):
        read_rows(tmp_path / "gone.parquet", 0, 1, ["url"])
    monkeypatch.setattr(text_file, "TEXT_BLOCK_BYTES", 1 << 16)
    noise = np.random.default_rng(0).integers(0, 10**12, 200_000).tolist()
    content = bytearray(gzip.compress("\n".join(["url,caption", *(f"u,{n}" for n in noise)]).encode()))
    content[-200_000:-100_000] = bytes(100_000)
    (tmp_path / "late.csv.gz").write_bytes(content)
    tables.read_schema(tmp_path / "late.csv.gz")  # the damage lies beyond what this reads
    with pytest.raises(UserError, match=r"late\.csv\.gz can't be read as csv\.gz") as caught:
        url_table.count_rows([tmp_path / "late.csv.gz"], [tmp_path / "copy.parquet"], ("url", "caption"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*copy*"))


def test_empty_tables_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no URL table in"):
        download(tmp_path, tmp_path / "out")
    pq.write_table(
        pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="holds no rows"):
        download(tmp_path, tmp_path / "out")


def test_text_tables(tmp_path: Path) -> None:
    """CSV quotes, TSV doesn't; captions that look like numbers stay text; a column that changes its mind is text."""
    csv = tmp_path / "a.csv"
    csv.write_text('url,caption,score\nu0,007,1\nu1,"two\nlines, one comma",2\nu2,,\n')
    assert url_table.count_rows([csv], [tmp_path / "a.parquet"], ("url", "caption")) == [3]
    rows = pq.read_table(tmp_path / "a.parquet").to_pydict()
    assert rows == {"url": ["u0", "u1", "u2"], "caption": ["007", "two\nlines, one comma", ""], "score": [1, 2, None]}
    tsv = tmp_path / "a.tsv"
    tsv.write_text('caption\turl\n"quote at the start\tu0\nplain\tu1\n')
    assert url_table.count_rows([tsv], [tmp_path / "b.parquet"], ("url", "caption")) == [2]
    assert pq.read_table(tmp_path / "b.parquet")["caption"].to_pylist() == ['"quote at the start', "plain"]


def test_text_types_that_change_after_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TEXT_BLOCK_BYTES", 64)
    monkeypatch.setattr(text_file, "TEXT_BLOCK_BYTES", 64)
    csv = tmp_path / "a.csv"
    csv.write_text("url,caption,score\n" + "u,c,1\n" * 40 + "u,c,high\n")
    assert url_table.count_rows([csv], [tmp_path / "a.parquet"], ("url", "caption")) == [41]
    assert set(pq.read_table(tmp_path / "a.parquet")["score"].to_pylist()) == {"1", "high"}


@pytest.mark.parametrize("number", ["12345678901", "9007199254740992"])
def test_large_integers_among_fractions_lose_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    monkeypatch.setattr(tables, "TEXT_BLOCK_BYTES", 64)
    monkeypatch.setattr(text_file, "TEXT_BLOCK_BYTES", 64)
    scores = [score for score in ("5", number, "7", "0.5") for _ in range(40)]
    csv = tmp_path / "a.csv"
    csv.write_text("url,caption,score\n" + "".join(f"u,c,{score}\n" for score in scores))
    assert url_table.count_rows([csv], [tmp_path / "a.parquet"], ("url", "caption")) == [160]
    assert pq.read_table(tmp_path / "a.parquet")["score"].to_pylist() == [float(score) for score in scores]


@pytest.mark.parametrize("group", [1, 3, 7, 100])
def test_rows_by_number(tmp_path: Path, group: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(20), "m": [[i] for i in range(20)]}), path, row_group_size=group)
    for start in range(20):
        for count in (1, 4, 20):
            got = read_rows(path, start, min(count, 20 - start), ["m", "n"])
            expected = list(range(start, min(start + count, 20)))
            assert got.column_names == ["m", "n"] and got["n"].to_pylist() == expected
    assert read_rows(path, 0, 0, ["n"]).num_rows == 0


def test_fingerprint_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_table, "WHOLE_HASH_BYTES", 1000)
    monkeypatch.setattr(url_table, "HASH_SAMPLE_BYTES", 50)
    path = tmp_path / "large"
    path.write_bytes(bytes(5000))
    first = url_table.fingerprint(path)
    path.write_bytes(bytes(4999) + b"x")
    second = url_table.fingerprint(path)
    path.write_bytes(bytes(5001))
    assert len({first, second, url_table.fingerprint(path)}) == 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_a_reader_that_goes_on_reads_what_a_new_one_would(tmp_path_factory, groups, data) -> None:
    """Ranges in any order, over row groups of any size."""
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    rows = sum(groups)
    with pq.ParquetWriter(path, pa.schema([("n", pa.int64())])) as writer:
        for start, count in zip(np.cumsum([0, *groups[:-1]]), groups, strict=True):
            writer.write_table(pa.table({"n": range(start, start + count)}))
    with RowReader(path, ["n", "gone"]) as reader:
        for _ in range(5):
            start = data.draw(st.integers(0, rows))
            stop = data.draw(st.integers(start, rows))
            assert reader.read(start, stop)["n"].to_pylist() == list(range(start, stop))
            numbers = sorted(data.draw(st.sets(st.integers(0, rows - 1))))
            assert reader.pick(np.array(numbers, np.int64))["n"].to_pylist() == numbers


def test_rows_between_those_picked_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition that leaves one row of ten thousand costs no more memory than one that leaves all."""
    path = tmp_path / "a.parquet"
    rows = 1_000_000
    pq.write_table(pa.table({"text": [f"{number:0100d}" for number in range(rows)]}), path, use_dictionary=False)
    held = []
    original = RowReader.batches

    def watched(self: RowReader, start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        for part in original(self, start, stop):
            held.append(pa.total_allocated_bytes())
            yield part

    monkeypatch.setattr(RowReader, "batches", watched)
    with RowReader(path, ["text"]) as reader:
        before = pa.total_allocated_bytes()
        picked = reader.pick(np.arange(0, rows, 10_000))
    assert [int(text) for text in picked["text"].to_pylist()] == list(range(0, rows, 10_000))
    assert max(held) - before < 20_000_000  # of 104 MB


def test_rising_ranges_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group of a million rows isn't unpacked again for each of its shards."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(100)}), path, row_group_size=50)
    opened = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda *args, **options: opened.append(options["row_groups"]) or original(*args, **options),
    )
    with RowReader(path, ["n"], batch_rows=8) as reader:
        for start in range(0, 100, 10):
            assert reader.read(start, start + 10)["n"].to_pylist() == list(range(start, start + 10))
        assert opened == [[0, 1]]
        assert reader.read(60, 61)["n"].to_pylist() == [60]
        assert opened == [[0, 1], [1]]


@pytest.mark.parametrize("with_header", [True, False])
def test_published_without_a_header(tmp_path: Path, with_header: bool) -> None:
    """CC3M's columns by name, whether or not somebody has put the line in front."""
    lines = ["caption\turl"] * with_header + ['a "cat\thttp://x/1.jpg', "007\thttp://x/2.jpg"]
    path = tmp_path / "cc3m.tsv"
    path.write_text("\n".join(lines) + "\n")
    header = ("caption", "url")
    assert tables.read_schema(path, header).names == ["caption", "url"]
    assert url_table.count_rows([path], [tmp_path / "copy.parquet"], ("url", "caption"), header) == [2]
    rows = pq.read_table(tmp_path / "copy.parquet").to_pydict()
    assert rows == {"caption": ['a "cat', "007"], "url": ["http://x/1.jpg", "http://x/2.jpg"]}
