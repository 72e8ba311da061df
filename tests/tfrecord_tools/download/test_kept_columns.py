"""Rows add up and kept columns arrive whatever they are called, in every format and when a dataset is built of it."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_site import examples, fetch, numbered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit.cli.demo_server import Answer, serve
from clipkit.errors import UserError
from clipkit.formats.manifest import read_manifest
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.purge.command import purge
from clipkit.tfrecord_tools.tables.url_table import OWN_NAMES
from clipkit.tfrecord_tools.writing.pair_writer import stored_name
from clipkit.train.sources.open import open_source

FORMATS = ("tfds", "webdataset", "parquet")
HOSTILE = [
    *(*OWN_NAMES, "hash", "phash", "txt", "TXT", "Caption", "URL", "md5"),
    *("a b", "a/b", 'say "x"', "é", "tokens", "__key__"),
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
VALUES = st.none() | TEXTS | st.sampled_from(["success", "", " ", "0017", "nan", "null", "{}"])


def stored(root: Path, format: str, tmp_path: Path) -> list[dict[str, Any]]:
    """The records of a download, or of the dataset that is built of it."""
    if format != "tfds":
        root = build_tfds(root, tmp_path / "built", "b").path
    return examples(root)


@pytest.fixture(scope="module")
def base_url() -> Any:
    with serve({path: Answer(jpg) for path, jpg in numbered(6).items()}) as url:
        yield url


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], dict[str, list[Any]]]:
    """The images of the rows, some of which don't exist, and the kept columns."""
    numbers = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6))
    names = draw(st.lists(st.sampled_from(HOSTILE), min_size=4, max_size=12, unique=True))
    floats = st.none() | st.floats(width=32, allow_nan=False)  # as records hold them
    integers = st.none() | st.integers(-(2**63), 2**63 - 1)
    columns = {name: draw(st.sampled_from([VALUES, integers, floats, st.booleans()])) for name in names}
    count = len(numbers)
    return numbers, {name: draw(st.lists(kind, min_size=count, max_size=count)) for name, kind in columns.items()}


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(table=tables())
def test_rows_add_up_and_kept_columns_arrive(
    tmp_path_factory: pytest.TempPathFactory, base_url: str, format: str, table: tuple[list[int], dict[str, list[Any]]]
) -> None:
    numbers, columns = table
    tmp_path = tmp_path_factory.mktemp("kept")
    own = {
        "address": [f"{base_url}/{number}.jpg" for number in numbers],
        "words": [f"caption {row}" for row in range(len(numbers))],
        "row": list(range(len(numbers))),
    }
    pq.write_table(pa.table({**own, **columns}), tmp_path / "t.parquet")
    keep = [*columns, "row"]
    options = {"url_column": "address", "caption_column": "words", "keep_columns": keep, "name": "x"}
    wanted = [row for row in range(len(numbers)) if row != 0 or len(numbers) == 1]
    where = None if len(numbers) == 1 else "row > 0"
    good = [row for row in wanted if numbers[row] < 6]
    try:
        summary = fetch(tmp_path / "t.parquet", tmp_path / "out", format=format, where=where, **options)
    except UserError as error:
        assert not good and "not one of" in str(error)
        return
    assert summary.rows == len(numbers) == summary.left_out + summary.downloaded + sum(summary.failed.values())
    assert (summary.left_out, summary.downloaded) == (len(numbers) - len(wanted), len(good))
    if not good:
        return
    records = stored(summary.out, format, tmp_path)
    assert [record["row"] for record in records] == good
    for row, record in zip(good, records, strict=True):
        assert record["txt"] == own["words"][row]
        assert {name: record.get(stored_name(name)) for name in columns} == {
            name: values[row] for name, values in columns.items()
        }


@pytest.mark.parametrize("format", FORMATS)
def test_a_text_table_with_columns_of_the_same_names(tmp_path: Path, base_url: str, format: str) -> None:
    """Kept columns that are called as the download's own, `caption` and `url` too; a purge goes by the own `url`."""
    names = [*OWN_NAMES, "txt", "hash", "uid"]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["address", "words", *names])
        for row in range(3):
            writer.writerow([f"{base_url}/{row}.jpg", f"words {row}", *(f"{name}-{row}, 00" for name in names)])
    options = {"url_column": "address", "caption_column": "words", "keep_columns": names, "name": "x"}
    out = fetch(tmp_path / "t.csv", tmp_path / "out", format=format, **options).out
    assert fetch(tmp_path / "t.csv", tmp_path / "out", format=format, **options).downloaded == 3  # nothing left to do
    root = out if format == "tfds" else build_tfds(out, tmp_path / "built", "b").path
    for row, record in enumerate(examples(root)):
        assert record["txt"] == f"words {row}"
        assert {name: record[stored_name(name)] for name in names} == {name: f"{name}-{row}, 00" for name in names}
        assert record["clipkit_url"] == f"{base_url}/{row}.jpg"
        assert (record["clipkit_width"], record["clipkit_height"]) == (38, 32)
        assert "clipkit_status" not in record
    if format == "tfds":  # and not the copy of the table, from which the rows were read
        (source,) = [source for shard in read_manifest(out)["train"].shards for source in shard.sources]
        assert (source.file, source.bytes) == ("t.csv", (tmp_path / "t.csv").stat().st_size)
    (tmp_path / "list.csv").write_text(f"url\n{base_url}/1.jpg\n")
    assert purge(root, tmp_path / "list.csv").records == 1
    assert [record["txt"] for record in examples(root)] == ["words 0", "words 2"]
    log = json.loads((root / "clipkit" / "purge-log.jsonl").read_text().splitlines()[0])
    assert log["record"]["url"] == f"{base_url}/1.jpg"


def test_the_preset_keeps_hash(tmp_path: Path, base_url: str) -> None:
    urls = [f"{base_url}/{row}.jpg" for row in range(3)]
    columns = {"url": urls, "caption": ["a"] * 3, "hash": [-1, -2, None], "md5": ["0" * 32] * 3}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    out = fetch(tmp_path / "t.parquet", tmp_path / "out", preset="relaion2b").out
    assert [(record["hash"], record["hash_check"]) for record in examples(out)] == [
        (-1, "differs"),
        (-2, "differs"),
        (None, "differs"),
    ]


def test_a_download_begun_before_types_were_decided_over_all_rows_goes_on(tmp_path: Path, base_url: str) -> None:
    """Its plan has no word on quotes, and its copy of the table other types: those of the plan stay."""
    (tmp_path / "t.csv").write_text(f"url,caption,sku\n{base_url}/0.jpg,a,0017\n{base_url}/1.jpg,b,0018\n")
    options = {"keep_columns": ["sku"], "name": "x"}
    out = fetch(tmp_path / "t.csv", tmp_path / "out", **options).out
    assert [record["sku"] for record in examples(out)] == ["0017", "0018"]
    plan = json.loads((out / "clipkit" / "plan.json").read_text())
    del plan["settings"]["quoting"]
    plan["settings"]["kept column"] = ["sku: int64"]
    (out / "clipkit" / "plan.json").write_text(json.dumps(plan))
    copy = out / "clipkit" / "input" / "00000.parquet"
    rows = pq.read_table(copy)
    pq.write_table(rows.set_column(2, "sku", pa.array([17, 18])), copy)
    for path in (out / "clipkit" / "shards").iterdir():
        path.unlink()
    assert fetch(tmp_path / "t.csv", tmp_path / "out", **options).downloaded == 2
    assert [record["sku"] for record in examples(out)] == [17, 18]


def test_what_lies_beside_the_tables_is_told(tmp_path: Path, base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"url": [f"{base_url}/0.jpg"], "caption": ["a"]}
    folder = tmp_path / "in"
    for name in ("t.parquet", "more/u.parquet", ".ipynb_checkpoints/t.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(row), folder / name)
    (folder / "._t.parquet").write_bytes(b"\0\5\x16\7")
    (folder / "notes.xlsx").write_bytes(b"PK")
    out = fetch(folder, tmp_path / "out", name="x").out
    assert f"download: {folder}: not read: more/, .xlsx 1\n" in capsys.readouterr().err
    assert purge(out, folder).records == 1
    assert f"purge: {folder}: not read: more/, .xlsx 1\n" in capsys.readouterr().err


def test_build_reads_quotes_as_it_is_told(tmp_path: Path) -> None:
    for name, jpg in numbered(3).items():
        (tmp_path / name[1:]).write_bytes(jpg)
    (tmp_path / "metadata.tsv").write_text('file_name\ttext\n0.jpg\t"a\n1.jpg\tb"\n2.jpg\t"c"\n')
    with pytest.raises(UserError, match="--quoting csv or --quoting none"):
        build_tfds(tmp_path, tmp_path / "out", "x")
    with pytest.raises(UserError, match="--quoting none, of clipkit build-tfds"):
        open_source(tmp_path)
    built = build_tfds(tmp_path, tmp_path / "out", "x", quoting="none").path
    assert [record["txt"] for record in examples(built)] == ['"a', 'b"', '"c"']
