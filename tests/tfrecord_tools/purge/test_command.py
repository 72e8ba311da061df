"""What is on the list is gone, all else is as it was, and a purge killed at any moment is ended by the next."""

import hashlib
import json
import random
import shutil
import signal
import time
import tracemalloc
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from download_site import fetch
from hypothesis import given
from hypothesis import strategies as st
from image_shards import picture
from purge_child import purge_in_a_child
from ranks import forkserver
from small_dataset import PAIR_FEATURES, jpg, pair_columns, write_dataset, write_pairs
from tensorflow_process import with_tensorflow

from clipkit.cli.demo_server import Answer, serve
from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.features import Feature
from clipkit.formats.manifest import SourceEntry, read_manifest, write_manifest
from clipkit.formats.records import read_records
from clipkit.storage.files import WRITTEN_BESIDE, as_path, read_json, read_json_lines
from clipkit.tfrecord_tools.account.purged import PURGED_TABLE, purged_path, purged_rows
from clipkit.tfrecord_tools.pictures.picture import PictureSettings
from clipkit.tfrecord_tools.purge import removals as purge_list
from clipkit.tfrecord_tools.purge import shard as purge_shard
from clipkit.tfrecord_tools.purge.command import purge
from clipkit.tfrecord_tools.purge.removals import open_list, read_values, wanted_entries
from clipkit.tfrecord_tools.tables import digests
from clipkit.tfrecord_tools.tables.digests import find
from clipkit.tfrecord_tools.verify.command import verify
from clipkit.tfrecord_tools.web.settings import FetchSettings


@pytest.fixture
def data(tmp_path):
    """Twenty pairs in three shards, the middle one empty; and three more in a split of their own."""
    train = [[pair_columns(n) for n in range(8)], [], [pair_columns(n) for n in range(8, 20)]]
    return write_dataset(tmp_path / "data", {"train": train, "test": [[pair_columns(n) for n in (4, 20, 21)]]})


def urls(*numbers):
    return [f"http://example.org/{number}.jpg" for number in numbers]


def write_list(path, values):
    path.write_text("".join(f"{value}\n" for value in values))
    return path


def keys(data, split="train"):
    dataset = open_dataset(data, split)
    return [int(dataset.example(i)["key"]) for i in range(len(dataset))]


def contents(folder):
    """Every file by name but the lock, for comparing what a purge leaves."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_records_are_gone_and_the_others_are_as_they_were(data, tmp_path):
    before = {n: open_dataset(data).read(n) for n in range(20)}
    untouched = (data / "pairs-train.tfrecord-00001-of-00003").stat().st_mtime_ns
    summary = purge(data, write_list(tmp_path / "list.txt", urls(4, 7, 19, 500)))
    assert keys(data) == [n for n in range(20) if n not in (4, 7, 19)]
    assert keys(data, "test") == [20, 21]
    dataset = open_dataset(data)
    assert [dataset.read(i) for i in range(17)] == [before[n] for n in range(20) if n not in (4, 7, 19)]
    assert (summary.records, summary.shards, summary.matched, summary.unmatched) == (4, 3, 3, 1)
    assert (summary.by, summary.entries, summary.before, summary.dry_run) == ("url", 4, 0, False)
    assert summary.bytes > 4 * 700
    assert summary.text().startswith(f"removed 4 records ({summary.bytes / 1000:.1f} kB) from 3 shards of ")
    assert (data / "pairs-train.tfrecord-00001-of-00003").stat().st_mtime_ns == untouched
    assert verify(data).problems == ()
    assert verify(data).leftovers == ()


def test_the_counts_add_up(data, tmp_path):
    before = read_manifest(data)["train"]
    purge(data, write_list(tmp_path / "list.txt", urls(4, 7, 19)))
    after = read_manifest(data)["train"]
    assert (after.samples, after.records) == (before.samples, before.records - 3)
    assert after.skipped == {"no-caption": 3, "purged": 3}
    assert after.formats == {"jpeg": 17}
    assert [s.sources[0].skipped.get("purged", 0) for s in after.shards] == [2, 0, 1]
    info = {part["name"]: part for part in read_json(data / "dataset_info.json")["splits"]}
    assert info["train"]["shardLengths"] == ["6", "0", "11"]
    assert info["train"]["numBytes"] == str(after.bytes)
    lines = read_json_lines(data / "clipkit" / "skipped-train.jsonl")
    assert [(line["source"], int(line["key"]), line["reason"]) for line in lines] == [
        ("00000.tar", 4, "purged"),
        ("00000.tar", 7, "purged"),
        ("00002.tar", 19, "purged"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.tsv", 'url\tnote\n"{}"\tx\n"{}"\t"a ""b"""\n'),
        ("list.tsv", '"url"\r\n"{}"\r\n"{}"\r\n'),
        ("list.csv", "url;note\n{};a\n{};b, c\n"),
        ("list.csv", '\ufeffurl,note\n{},"one\ntwo"\n"{}",\n'),
        ("list.jsonl", '{{"url": "{}"}}\n{{"url": "{}", "note": 1}}\n'),
    ],
)
def test_lists_as_programs_write_them(data, tmp_path, name, content):
    (tmp_path / name).write_text(content.format(*urls(4, 19)), newline="", encoding="utf-8")
    summary = purge(data, tmp_path / name)
    assert (summary.entries, summary.matched, summary.records) == (2, 2, 3)  # 4 is in both splits


def test_a_list_whose_quotes_are_characters(data, tmp_path):
    (tmp_path / "list.csv").write_text(f'url,note\n{urls(4)[0]},"a\n{urls(19)[0]},b\n')
    with pytest.raises(UserError, match=r"row 1 \(line 2\) .*--quoting none"):
        purge(data, tmp_path / "list.csv")
    assert purge(data, tmp_path / "list.csv", quoting="none").records == 3


def test_sources_of_a_shuffled_split(data, tmp_path):
    """A shuffled split names its sources once; which of them a record came from isn't known, but the sums stay."""
    splits = read_manifest(data)
    shards = tuple(replace(shard, sources=()) for shard in splits["train"].shards)
    sources = (SourceEntry("a.tar", 10, 2, 2), SourceEntry("b.tar", 10, 20, 18, {"no-caption": 2}))
    write_manifest(data, splits | {"train": replace(splits["train"], shards=shards, sources=sources)})
    purge(data, write_list(tmp_path / "list.txt", urls(4, 7, 19)))
    after = read_manifest(data)["train"]
    assert (after.samples, after.records, after.skipped) == (22, 17, {"no-caption": 2, "purged": 3})
    assert [source.records for source in after.sources] == [0, 17]
    assert verify(data).problems == ()


def test_the_log_says_who_and_why_and_keeps_no_picture(data, tmp_path):
    listed = write_list(tmp_path / "list.txt", urls(4, 19, 500))
    purge(data, listed)
    *records, whole = read_json_lines(data / "clipkit" / "purge-log.jsonl")
    assert {int(line["record"]["key"]) for line in records} == {4, 19}
    for line in records:
        assert line["list_sha256"] == hashlib.sha256(listed.read_bytes()).hexdigest()
        assert (line["list"], line["by"]) == (str(listed), "url")
        assert line["record"]["url"] == line["record"]["value"]
        assert line["record"].keys() == {"value", "key", "url", "sha256", "split", "shard"}
    assert {(line["record"]["split"], line["record"]["shard"]) for line in records} == {
        ("test", "pairs-test.tfrecord-00000-of-00001"),
        ("train", "pairs-train.tfrecord-00000-of-00003"),
        ("train", "pairs-train.tfrecord-00002-of-00003"),
    }
    assert (whole["removed"], whole["entries"], whole["matched"]) == (3, 3, 2)
    left = b"".join(contents(data).values())
    assert jpg(19) not in left
    assert b"picture number 19" not in left
    assert b"picture number 18" in left


def test_what_must_not_come_back_is_listed_with_what_matched_nothing(data, tmp_path):
    purge(data, write_list(tmp_path / "list.txt", urls(4, 500, 500)))
    purge(data, write_list(tmp_path / "second.txt", urls(600)))
    rows = pq.read_table(data / "clipkit" / "purged.parquet").to_pylist()
    assert [(row["by"], row["value"], row["matched"]) for row in rows] == [
        ("url", *urls(4), True),
        ("url", *urls(4), True),
        ("url", *urls(500), False),
        ("url", *urls(600), False),
    ]
    assert rows[0]["key"] == "000000004"
    assert len({row["purge"] for row in rows}) == 2


def test_pages_that_show_what_was_removed_go_too(data, tmp_path):
    pages = [data / "clipkit" / name for name in ("inspection.html", "inspection.json", "inspection-test.html")]
    for page in (*pages, data / "clipkit" / "inspection-notes.txt"):
        page.write_text("a picture of each record")
    purge(data, write_list(tmp_path / "none.txt", urls(500)))
    assert all(page.exists() for page in pages)
    purge(data, write_list(tmp_path / "list.txt", urls(4)))
    assert sorted(path.name for path in (data / "clipkit").glob("inspection*")) == ["inspection-notes.txt"]


def test_a_second_run_changes_nothing(data, tmp_path):
    listed = write_list(tmp_path / "list.txt", urls(4, 500))
    purge(data, listed)
    before = contents(data)
    again = purge(data, listed)
    assert (again.records, again.matched, again.before, again.unmatched) == (0, 0, 1, 1)
    assert contents(data) == before


def test_a_dry_run_counts_and_changes_nothing(data, tmp_path):
    before = contents(data)
    summary = purge(data, write_list(tmp_path / "list.txt", urls(4, 7, 500)), dry_run=True)
    assert (summary.records, summary.shards, summary.matched, summary.unmatched) == (3, 2, 2, 1)
    assert summary.text().startswith("would remove 3 records from 2 shards")
    assert contents(data) == before


def test_a_shard_of_which_nothing_is_left(data, tmp_path):
    purge(data, write_list(tmp_path / "list.txt", urls(*range(20))))
    assert keys(data) == []
    assert keys(data, "test") == [20, 21]
    assert verify(data).problems == ()


# ---------------------------------------------------------------------------------------------------------------------
# The list
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "csv.gz", "txt", "folder"])
def test_every_kind_of_list(data, tmp_path, kind):
    table = pa.table({"URL": [*urls(4, 7), None, ""], "why": ["asked", "to, be", "left", "out"]})
    path = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "folder":
        path.mkdir()
        pq.write_table(table.slice(0, 1), path / "a.parquet")
        pq.write_table(table.slice(1), path / "b.parquet")
    elif kind == "txt":
        path.write_bytes("\r\n".join([*urls(4, 7), "", ""]).encode())
    else:
        rows = table.to_pylist()
        comma = "\t" if kind == "tsv" else ","
        lines = [comma.join(["URL", "why"])]
        lines += [comma.join([row["URL"] or "", row["why"].replace(",", "")]) for row in rows]
        text = "".join(f"{line}\n" for line in lines).encode()
        with pa.output_stream(str(path), compression="gzip" if kind == "csv.gz" else None) as file:
            file.write(text)
    summary = purge(data, path)
    assert (summary.by, summary.entries, summary.matched, summary.records) == ("url", 2, 2, 3)
    assert keys(data) == [n for n in range(20) if n not in (4, 7)]
    if kind != "txt":
        assert summary.empty == 2


def test_urls_are_compared_to_the_letter(data, tmp_path):
    near = ["http://EXAMPLE.org/4.jpg", "http://example.org/4.jpg/", " http://example.org/4.jpg", "example.org/4.jpg"]
    assert purge(data, write_list(tmp_path / "list.txt", near), by="url").records == 0


def test_by_key_and_by_another_column(data, tmp_path):
    pq.write_table(pa.table({"key": ["000000004"], "url": urls(5)}), tmp_path / "two.parquet")
    with pytest.raises(UserError, match="has key and url: say which of them is meant by --by key"):
        purge(data, tmp_path / "two.parquet")
    assert purge(data, tmp_path / "two.parquet", by="key").matched == 1
    assert 5 in keys(data)
    assert purge(data, write_list(tmp_path / "list.txt", ["picture number 6"]), by="txt").records == 1
    assert 6 not in keys(data)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "\ufeff{}\r\n{}\r\n"),
        ("list.txt", "{}\r{}"),
        ("list.csv", "\ufeffurl\r\n{}\r\n{}"),
    ],
)
def test_lines_as_editors_write_them(data, tmp_path, name, text):
    (tmp_path / name).write_bytes(text.format(*urls(4, 7)).encode())
    for by in ("url", None):
        assert open_list(tmp_path / name, by, PAIR_FEATURES).by == "url"
    assert purge(data, tmp_path / name, by="url").matched == 2


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_of_any_type(data, tmp_path, kind):
    """Spark and Hive write text as bytes, pandas repeated text as a dictionary."""
    pq.write_table(pa.table({"url": pa.array(urls(4, 7)).cast(kind)}), tmp_path / "list.parquet")
    assert purge(data, tmp_path / "list.parquet").matched == 2


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.binary(64)])
def test_hashes_in_hexadecimal_of_any_type(data, tmp_path, kind):
    values = [hashlib.sha256(jpg(4)).hexdigest().encode()]
    pq.write_table(pa.table({"sha256": pa.array(values).cast(kind)}), tmp_path / "list.parquet")
    assert purge(data, tmp_path / "list.parquet").matched == 1


@pytest.mark.parametrize("name", ["list.parquet", "list.csv", "list.jsonl"])
def test_whole_numbers_that_pandas_has_made_floats_of(tmp_path, name):
    features = PAIR_FEATURES | {"id": Feature("int")}
    data = write_dataset(tmp_path / "data", {"train": [[pair_columns(n, id=10**15 + n) for n in range(5)]]}, features)
    table = pa.table({"id": [1e15 + 1, None, 1e15 + 3, float("nan")]})
    if name == "list.parquet":
        pq.write_table(table, tmp_path / name)
    elif name == "list.csv":
        table.to_pandas().to_csv(tmp_path / name, index=False)
    else:
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))
    summary = purge(data, tmp_path / name, by="id")
    assert (summary.entries, summary.empty, summary.matched) == (2, 2, 2)
    assert keys(data) == [0, 2, 4]


def test_a_column_of_hashes_in_capitals(tmp_path):
    """In its name and in its values; one that is missing is computed."""
    hashes = [hashlib.md5(jpg(number)).hexdigest() for number in range(4)]
    records = [pair_columns(0, MD5=hashes[0].upper()), pair_columns(1), pair_columns(2, MD5=hashes[2])]
    features = PAIR_FEATURES | {"MD5": Feature("text", optional=True)}
    data = write_dataset(tmp_path / "data", {"train": [records]}, features)
    summary = purge(data, write_list(tmp_path / "list.txt", [hashes[0], hashes[1].upper(), hashes[3]]))
    assert (summary.by, summary.matched, summary.computed) == ("MD5", 2, 1)
    assert keys(data) == [2]


@pytest.mark.parametrize("kind", ["sha256", "md5"])
@pytest.mark.parametrize("form", ["txt", "upper", "bytes"])
def test_a_hash_is_computed_of_the_stored_image(data, tmp_path, kind, form):
    digest = hashlib.new(kind, jpg(7))
    path = tmp_path / f"list.{'parquet' if form == 'bytes' else 'txt'}"
    if form == "bytes":
        pq.write_table(pa.table({kind: [digest.digest()]}), path)
    else:
        write_list(path, [digest.hexdigest().upper() if form == "upper" else digest.hexdigest()])
    summary = purge(data, path)
    assert (summary.by, summary.records, summary.computed) == (kind, 1, 23)
    assert keys(data) == [n for n in range(20) if n != 7]
    assert "computed from the stored image" in summary.text()


def test_a_column_of_hashes_counts_for_the_records_that_have_it(tmp_path):
    """It is the hash of the file that was fetched; the stored image may be another encoding of it."""
    fetched = hashlib.sha256(b"the file as fetched").hexdigest()
    stored = [hashlib.sha256(jpg(number)).hexdigest() for number in range(3)]
    records = [pair_columns(0, sha256=fetched), pair_columns(1), pair_columns(2, sha256="0" * 64)]
    features = PAIR_FEATURES | {"sha256": Feature("text", optional=True)}
    data = write_dataset(tmp_path / "data", {"train": [records]}, features)
    summary = purge(data, write_list(tmp_path / "list.txt", [fetched, stored[1], stored[2]]))
    assert keys(data) == [2]
    assert (summary.matched, summary.computed) == (2, 1)


@pytest.mark.parametrize(
    ("name", "text", "by", "says"),
    [
        ("list.txt", "4\n", None, "can't tell what the lines of .* are: say it by --by url, sha256 or key"),
        ("list.csv", "a,b\n1,2\n", None, "has the columns a, b, none of them url, key or a hash"),
        ("list.csv", "a,b\n1,2\n", "url", "has no column 'url': it has a, b"),
        ("list.txt", "4\n", "uid", "the dataset has no column 'uid'"),
        ("list.txt", "4\n", "similarity", "column 'similarity' of the dataset is float"),
        ("list.parquet", "no parquet", None, "can't be read as parquet"),
        ("list.doc", "x", None, "can't tell what .* is: give a list that ends in .parquet,"),
        ("none.parquet", None, None, "list .*none.parquet doesn't exist: check the path"),
        ("folder", "", None, "no list in .*folder: put files there"),
        ("list.txt", "", None, "list .* is empty: give one with"),
        ("list.txt", "\n\n", "url", "list .* is empty: give one with"),
        ("list.csv", "url\n", None, "list .* is empty: give one with"),
        (
            "list.csv",
            "http://example.org/4.jpg\nhttp://example.org/5.jpg\n",
            "url",
            "begins with 'http://.*4.jpg', a value",
        ),
        ("list.csv", "000000004\n000000005\n", "key", "begins with '000000004', a value"),
        ("list.txt", "\ufeffhttp://example.org/4.jpg\n".encode("utf-16-le"), "url", "is UTF-16"),
        (
            "list.jsonl",
            '{"url": ["http://example.org/4.jpg"]}\n',
            None,
            "column 'url' of .* holds list<.*: put each value",
        ),
        ("list.parquet", pa.table({"url": [{"a": "x"}]}), None, "column 'url' of .* holds struct<"),
        ("list.parquet", pa.table([["a"], ["b"]], names=["url", "url"]), "url", "has 2 columns 'url'"),
    ],
)
def test_lists_that_cannot_be_used(data, tmp_path, name, text, by, says):
    if name == "folder":
        (tmp_path / name).mkdir()
    elif isinstance(text, pa.Table):
        pq.write_table(text, tmp_path / name)
    elif text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(data)
    with pytest.raises(UserError, match=says):
        purge(data, tmp_path / name, by=by)
    assert contents(data) == before


def test_the_tables_of_a_folder_have_one_column(data, tmp_path):
    pq.write_table(pa.table({"url": urls(4)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"URL": urls(5)}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet has 0 columns 'url': URL"):
        purge(data, tmp_path)


@given(st.lists(st.binary(min_size=1, max_size=6)), st.lists(st.binary(min_size=1, max_size=6)))
def test_find_is_membership(listed, asked):
    class Lines:
        by, column, files = "url", None, ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(purge_list, "read_values", lambda _: iter([listed]))
        wanted, _ = wanted_entries(Lines)
    assert wanted.shape == (2, len(set(listed)))
    places = find(wanted, asked)
    assert [place >= 0 for place in places] == [value in set(listed) for value in asked]
    assert len({place for place in places if place >= 0}) == len(set(asked) & set(listed))


def test_values_whose_first_half_is_the_same_are_told_apart(monkeypatch):
    def half(values):
        return np.array([[7] * len(values), [value[0] for value in values]], np.uint64)

    monkeypatch.setattr(digests, "digests", half)
    wanted = np.array([[5, 7, 7, 7, 9], [0, 10, 20, 30, 0]], np.uint64)
    assert find(wanted, [bytes([n]) for n in (5, 10, 15, 20, 30, 35)]).tolist() == [-1, 1, -1, 2, 3, -1]


def test_a_long_list_takes_sixteen_bytes_an_entry(tmp_path):
    count = 200_000
    pq.write_table(pa.table({"url": urls(*range(count))}), tmp_path / "list.parquet")
    removals = open_list(tmp_path / "list.parquet", None, PAIR_FEATURES)
    assert sum(len(values) for values in read_values(removals)) == count
    tracemalloc.start()
    wanted, _ = wanted_entries(removals)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert wanted.nbytes == 16 * count
    assert peak < 6 * 16 * count + 10_000_000


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def test_a_dataset_that_is_not_whole_is_left_alone(data, tmp_path):
    path = data / "pairs-train.tfrecord-00002-of-00003"
    damaged = bytearray(path.read_bytes())
    damaged[200] ^= 1
    path.write_bytes(damaged)
    before = contents(data)
    with pytest.raises(UserError, match="checksum of a record's contents doesn't match"):
        purge(data, write_list(tmp_path / "list.txt", urls(4)))
    assert not (data / "clipkit" / "purge.json").exists()
    assert {name: before[name] for name in before} == {name: contents(data)[name] for name in before}
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        purge(data, tmp_path / "list.txt")


def stop_in(monkeypatch, name):
    """Make the purge fail at a shard, as a full disk would."""
    real = purge_shard.purge_shard

    def stop(job):
        if job.path.name == name:
            raise UserError("the disk is full")
        return real(job)

    monkeypatch.setattr("clipkit.tfrecord_tools.purge.command.purge_shard", stop)


def test_a_purge_is_ended_with_the_quoting_that_it_began_with(data, tmp_path, monkeypatch):
    listed = tmp_path / "list.csv"
    listed.write_text("url\n" + "".join(f'"{url}"\n' for url in urls(4, 500, 19)))
    with monkeypatch.context() as patch:
        stop_in(patch, "pairs-train.tfrecord-00002-of-00003")
        with pytest.raises(UserError, match="the disk is full"):
            purge(data, listed)
    with pytest.raises(UserError, match="isn't finished: run that one again first, with its options"):
        purge(data, listed, quoting="none")
    assert purge(data, listed).matched == 2


def test_another_purge_waits_for_the_one_that_is_not_finished(data, tmp_path, monkeypatch):
    first, second = write_list(tmp_path / "first.txt", urls(4, 19)), write_list(tmp_path / "second.txt", urls(7))
    with monkeypatch.context() as patch:
        stop_in(patch, "pairs-train.tfrecord-00002-of-00003")
        with pytest.raises(UserError, match="the disk is full"):
            purge(data, first)
    with pytest.raises(UserError, match="a purge isn't finished, run the same clipkit purge command again"):
        open_dataset(data)
    assert ("clipkit/purge.json", "a purge isn't finished") in [(p.file, p.what) for p in verify(data).problems]
    with pytest.raises(UserError, match=r"a purge by url with .*first\.txt isn't finished: run that one again first"):
        purge(data, second)
    with pytest.raises(UserError, match="run it again without --dry-run"):
        purge(data, first, dry_run=True)
    summary = purge(data, first)
    assert (summary.records, summary.matched, summary.shards) == (3, 2, 3)
    assert purge(data, second).records == 1
    assert keys(data) == [n for n in range(20) if n not in (4, 7, 19)]


def test_a_worker_that_comes_late_removes_nothing_more(data, tmp_path, monkeypatch):
    """A worker taken for lost may begin a shard that another has rewritten: its numbers would be other records'."""
    jobs = []
    real = purge_shard.purge_shard
    monkeypatch.setattr(
        "clipkit.tfrecord_tools.purge.command.purge_shard", lambda job: (jobs.append(job), real(job))[1]
    )
    purge(data, write_list(tmp_path / "list.txt", urls(4, 7, 19)))
    before = contents(data)
    for job in jobs:
        with pytest.raises(UserError, match="was changed while it was purged"):
            purge_shard.purge_shard(job)
    after = contents(data)
    assert {name: after[name] for name in before} == before


def test_two_workers_do_the_same(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    listed = write_list(tmp_path / "list.txt", urls(4, 7, 19))
    purge(data, listed)
    purge(copy, listed, workers=2)
    same = ("tfrecord", "index-", "manifest.json", "dataset_info.json")
    here, there = contents(data), contents(copy)
    assert here.keys() == there.keys()
    assert [n for n in here if any(word in n for word in same) and here[n] != there[n]] == []


def test_a_dataset_in_a_store(data, tmp_path):
    store = as_path("memory://test-purge/data")
    for name, file in contents(data).items():
        (store / name).write_bytes(file)
    listed = write_list(tmp_path / "list.txt", urls(4, 7, 19, 500))
    assert purge(store, listed).records == 4
    purge(data, listed)
    assert keys(store) == keys(data)
    assert verify(store).problems == ()
    for name in ("clipkit/index-train.npy", "clipkit/manifest.json", "dataset_info.json"):
        assert (store / name).read_bytes() == (data / name).read_bytes()
    assert not (store / "clipkit" / "purge.json").exists()
    assert not (store / "clipkit" / "purge").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A download's account
# ---------------------------------------------------------------------------------------------------------------------

NETWORK = FetchSettings(allow_private_hosts=True, timeout=5.0)
NOTHING = Answer(b"gone", "text/plain", HTTPStatus.NOT_FOUND)


@pytest.fixture
def downloaded(tmp_path):
    """Twelve rows in three shards, four of which give no image; the site as it is later, with all images."""
    later = {f"/{n}.jpg": Answer(picture(n * 12, size=40), "image/jpeg") for n in range(12)}
    now = later | {f"/{n}.jpg": NOTHING for n in (1, 2, 6, 10)}
    with serve(now) as base:
        table = {"url": [f"{base}/{n}.jpg" for n in range(12)], "caption": [f"picture number {n}" for n in range(12)]}
        pq.write_table(pa.table(table), tmp_path / "urls.parquet")
        get = {"name": "pairs", "samples_per_shard": 4, "network": NETWORK, "pictures": PictureSettings()}
        fetch(tmp_path / "urls.parquet", tmp_path / "out", **get)
    return tmp_path / "out" / "pairs" / "1.0.0", table["url"], later, get


def test_purged_rows_stay_in_the_ledger_and_are_never_fetched_again(downloaded, tmp_path):
    data, listed, later, get = downloaded
    asked = [listed[n] for n in (4, 6, 8, 10)]  # two with an image, two without
    summary = purge(data, write_list(tmp_path / "list.txt", asked))
    assert (summary.records, summary.matched) == (2, 2)
    assert verify(data).problems == ()
    rows = pq.read_table(data / "clipkit" / "failures.parquet").to_pylist()
    assert {row["url"]: row["reason"] for row in rows} == {
        **dict.fromkeys(asked, "purged"),
        **{listed[n]: "http-4xx" for n in (1, 2)},
    }
    assert {row["caption"] for row in rows if row["reason"] == "purged"} == {None}
    left = b"".join(contents(data / "clipkit" / "ledger").values())
    assert hashlib.sha256(jpg(4)).hexdigest().encode() not in left
    manifest = read_manifest(data)["train"]
    assert (manifest.samples, manifest.records, manifest.skipped) == (12, 6, {"http-4xx": 2, "purged": 4})
    told = read_json(data / "clipkit" / "download.json")
    assert (told["downloaded"], told["failed"]) == (6, {"purged": 4, "http-4xx": 2})
    before = contents(data)
    assert fetch(tmp_path / "urls.parquet", tmp_path / "out", **get).failed == told["failed"], "nothing is fetched"
    assert contents(data) == before
    with serve(later, urlsplit(listed[0]).port):
        again = fetch(tmp_path / "urls.parquet", tmp_path / "out", retry_failed="http-4xx", **get)
    assert (again.downloaded, again.failed) == (8, {"purged": 4})
    assert set(pq.read_table(data / "clipkit" / "failures.parquet")["caption"].to_pylist()) == {None}
    dataset = open_dataset(data)
    assert [dataset.example(i)["url"] for i in range(8)] == [listed[n] for n in (0, 1, 2, 3, 5, 7, 9, 11)]
    assert verify(data).problems == ()


@pytest.mark.parametrize("lost", ["pairs-train.tfrecord-00001-of-00003", "clipkit/ledger/00001.parquet"])
def test_a_lost_shard_is_fetched_without_what_was_purged(downloaded, tmp_path, lost):
    """By URL, with an image and without, and by a hash, which the table hasn't: none of them is asked for again."""
    data, listed, later, get = downloaded
    digest = hashlib.sha256(open_dataset(data).example(4)["jpg"]).hexdigest()  # the image of row 7
    assert open_dataset(data).example(4)["url"] == listed[7]
    purge(data, write_list(tmp_path / "list.txt", [listed[n] for n in (4, 6, 8)]))
    purge(data, write_list(tmp_path / "hashes.txt", [digest]))
    before = pq.read_table(data / "clipkit" / "ledger" / "00001.parquet", columns=["key", "url", "caption", "reason"])
    (data / lost).unlink()
    gone = dict.fromkeys(("/4.jpg", "/6.jpg", "/7.jpg"), NOTHING)
    with serve(later | gone, urlsplit(listed[0]).port):
        again = fetch(tmp_path / "urls.parquet", tmp_path / "out", **get)
    assert (again.downloaded, again.failed) == (5, {"purged": 4, "http-4xx": 3})
    after = pq.read_table(data / "clipkit" / "ledger" / "00001.parquet", columns=before.column_names)
    assert after.to_pylist() == before.to_pylist()
    dataset = open_dataset(data)
    assert [dataset.example(i)["url"] for i in range(5)] == [listed[n] for n in (0, 3, 5, 9, 11)]
    assert verify(data).problems == ()


def test_purged_rows_are_found_by_url_and_by_key_of_the_split(tmp_path):
    assert purged_rows(tmp_path, ["u0"], ["0"]) == {}
    nothing = {"value": None, "url": None, "key": None, "split": None}
    lines = [
        {"purge": "a", "by": "url", "value": "u1"},
        {"purge": "b", "by": "key", "value": "2"},
        {"purge": "c", "by": "sha256", "value": "u3", "url": "u4", "key": "9", "split": "train"},
        {"purge": "d", "by": "sha256", "value": "0", "url": None, "key": "5", "split": "train"},
        {"purge": "e", "by": "sha256", "value": "0", "url": None, "key": "6", "split": "test"},
        {"purge": "f", "by": "key", "value": "u7"},
    ]
    (tmp_path / "clipkit").mkdir()
    table = pa.Table.from_pylist([nothing | {"matched": True} | line for line in lines], schema=PURGED_TABLE)
    pq.write_table(table, purged_path(tmp_path))
    urls = [None, *[f"u{n}" for n in range(1, 8)]]
    assert purged_rows(tmp_path, urls, [str(n) for n in range(8)]) == {1: "a", 2: "b", 4: "c", 5: "d"}


def test_a_list_of_rows_without_an_image_alone(downloaded, tmp_path):
    data, listed, _, get = downloaded
    summary = purge(data, write_list(tmp_path / "list.txt", [listed[6]]))
    assert (summary.records, summary.unmatched) == (0, 1)
    assert read_manifest(data)["train"].skipped == {"http-4xx": 3, "purged": 1}
    assert fetch(tmp_path / "urls.parquet", tmp_path / "out", **get).failed == {"http-4xx": 3, "purged": 1}
    before = contents(data)
    purge(data, tmp_path / "list.txt")
    assert contents(data) == before


def test_a_download_waits_for_a_purge_that_is_not_finished(downloaded, tmp_path, monkeypatch):
    data, listed, _, get = downloaded
    with monkeypatch.context() as patch:
        stop_in(patch, "pairs-train.tfrecord-00002-of-00003")
        with pytest.raises(UserError, match="the disk is full"):
            purge(data, write_list(tmp_path / "list.txt", [listed[4], listed[8]]))
    with pytest.raises(UserError, match="a purge isn't finished"):
        fetch(tmp_path / "urls.parquet", tmp_path / "out", **get)
    assert purge(data, tmp_path / "list.txt").records == 2
    assert fetch(tmp_path / "urls.parquet", tmp_path / "out", **get).downloaded == 6


# ---------------------------------------------------------------------------------------------------------------------
# TFDS
# ---------------------------------------------------------------------------------------------------------------------

READ_WITH_TFDS = """
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(arguments[0])
key = arguments[1]
result = {}
for split, info in builder.info.splits.items():
    examples = tfds.as_numpy(builder.as_dataset(split))
    result[split] = [info.num_examples, [example[key].decode() for example in examples]]
"""


def test_tfds_opens_what_is_left(data, tmp_path):
    purge(data, write_list(tmp_path / "list.txt", urls(*range(8), 19)))
    told = with_tensorflow(READ_WITH_TFDS, data, "key")
    assert {split: (count, [int(key) for key in found]) for split, (count, found) in told.items()} == {
        "train": (11, list(range(8, 19))),
        "test": (2, [20, 21]),
    }


def test_a_dataset_of_tfds_itself_without_a_manifest(tmp_path):
    features = {"image": Feature("image"), "label": Feature("label", num_classes=9), "file_name": Feature("text")}
    records = [{"image": picture(n), "label": n % 9, "file_name": f"n01_{n}.JPEG"} for n in range(10)]
    data = write_dataset(
        tmp_path / "d", {"validation": [records[:6], records[6:]]}, features, manifest=False, image="image"
    )
    info = read_json(data / "dataset_info.json")
    sizes = [len(record) for path in sorted(data.glob("*.tfrecord*")) for record in read_records(path)]
    info["splits"][0]["numBytes"] = str(sum(sizes))
    info["citation"] = "kept as it is"
    (data / "dataset_info.json").write_text(json.dumps(info))
    assert purge(data, write_list(tmp_path / "list.txt", ["n01_2.JPEG", "n01_7.JPEG"]), by="file_name").records == 2
    info = read_json(data / "dataset_info.json")
    assert info["splits"][0]["shardLengths"] == ["5", "3"]
    assert info["splits"][0]["numBytes"] == str(sum(sizes) - sizes[2] - sizes[7])
    assert info["citation"] == "kept as it is"
    assert not (data / "clipkit" / "manifest.json").exists()
    assert verify(data).problems == ()
    told = with_tensorflow(READ_WITH_TFDS, data, "file_name")
    assert told == {"validation": [8, [f"n01_{n}.JPEG" for n in range(10) if n not in (2, 7)]]}


# ---------------------------------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------------------------------

MOMENTS = 50


def run_child(data, listed, seconds=None):
    """Purge in a process of its own, killed after so many seconds; how long it took, or None when it was killed.

    All is imported before it begins: the time is the purge's own.
    """
    context = forkserver()
    pipe, other = context.Pipe(duplex=False)
    process = context.Process(target=purge_in_a_child, args=(data, listed, other))
    process.start()
    other.close()
    assert pipe.poll(60) and pipe.recv() == "begins"
    began = time.monotonic()
    process.join(60 if seconds is None else seconds)
    took = time.monotonic() - began
    if seconds is not None:
        process.kill()  # of one that has ended in the meantime it thinks nothing
    process.join(60)
    code = process.exitcode
    process.close()
    pipe.close()
    assert code in (0, -signal.SIGKILL)
    return took if code == 0 else None


def test_killed_at_any_moment(tmp_path):
    data = write_pairs(tmp_path / "data", [9, 4, 8, 6, 5, 7])
    listed = write_list(tmp_path / "list.txt", urls(0, 8, 15, 20, 21, 26, 27, 28, 29, 30, 31, 37, 99))
    unbroken = shutil.copytree(data, tmp_path / "unbroken")
    run_child(unbroken, listed)  # the first pays for what the others find in memory
    unbroken = shutil.copytree(data, tmp_path / "second")
    whole = run_child(unbroken, listed)
    wanted, old = keys(unbroken), keys(data)
    same = [name for name in contents(unbroken) if "purge" not in name and "skipped" not in name]
    rng = random.Random(7)
    outcomes = set()
    for moment in range(MOMENTS):
        copy = shutil.copytree(data, tmp_path / f"copy{moment}")
        ended = run_child(copy, listed, rng.uniform(0, whole * 1.05))
        if moment % 3 == 0 and ended is None:
            run_child(copy, listed, rng.uniform(0, whole))
        try:
            assert keys(copy) in (old, wanted), "a dataset that opens is as before or as after"
            outcomes.add("opens")
        except UserError as error:
            assert "a purge isn't finished, run the same clipkit purge command again" in str(error)
            outcomes.add("refused")
        run_child(copy, listed)
        assert keys(copy) == wanted
        left = contents(copy)
        assert left.keys() == contents(unbroken).keys()
        assert [name for name in same if left[name] != (unbroken / name).read_bytes()] == []
        logged = [line["record"]["key"] for line in read_json_lines(copy / "clipkit" / "purge-log.jsonl")[:-1]]
        assert [int(key) for key in logged] == [n for n in old if n not in wanted], "each is logged once"
        assert len(read_json_lines(copy / "clipkit" / "skipped-train.jsonl")) == len(old) - len(wanted)
        table = pq.read_table(copy / "clipkit" / "purged.parquet")
        assert sorted(table["value"].to_pylist()) == sorted(listed.read_text().split())
        assert not [path for path in copy.rglob(".*") if WRITTEN_BESIDE.fullmatch(path.name)]
        shutil.rmtree(copy)
    assert outcomes == {"opens", "refused"}


class CrashError(BaseException):
    """The end of the process, as far as the code under it can tell."""


def crash_at(monkeypatch, folder, step):
    """Make everything fail from the rename or removal of this number on, below `folder`; what came before is done."""
    left = step

    def counted(real):
        def stop(path, *arguments, **options):
            nonlocal left
            if path.is_relative_to(folder):
                left -= 1
                if left < 0:
                    raise CrashError
            return real(path, *arguments, **options)

        return stop

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))


def test_stopped_before_each_rename_and_each_removal(tmp_path, monkeypatch):
    """The moments that matter, one after the other, where a random one falls between two steps once in a long while."""
    data = write_pairs(tmp_path / "data", [5, 3, 4])
    listed = write_list(tmp_path / "list.txt", urls(0, 4, 9, 99))
    unbroken = shutil.copytree(data, tmp_path / "unbroken")
    purge(unbroken, listed)
    wanted, old, moment = keys(unbroken), keys(data), 0
    same = [name for name in contents(unbroken) if "purge" not in name and "skipped" not in name]
    messages = []
    while True:
        copy = shutil.copytree(data, tmp_path / f"copy{moment}")
        with monkeypatch.context() as patch:
            crash_at(patch, copy, moment)
            try:
                purge(copy, listed)
                break
            except CrashError:
                moment += 1
        try:
            assert keys(copy) in (old, wanted)
        except UserError as error:
            messages.append(str(error))
        purge(copy, listed)
        assert keys(copy) == wanted
        assert [name for name in same if contents(copy)[name] != (unbroken / name).read_bytes()] == []
        assert len(read_json_lines(copy / "clipkit" / "purge-log.jsonl")) == len(old) - len(wanted) + 1
        shutil.rmtree(copy)
    assert moment > 15
    assert len(messages) > 10
    assert {message.partition(": ")[2] for message in messages} == {
        "a purge isn't finished, run the same clipkit purge command again"
    }


def test_the_command(data, tmp_path):
    listed = write_list(tmp_path / "list.txt", urls(4, 500))
    run = CliRunner().invoke(main, ["purge", str(data), "--list", str(listed), "--json", "--workers", "1"])
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert (told["records"], told["matched"], told["unmatched"], told["by"]) == (2, 1, 1, "url")
    run = CliRunner().invoke(main, ["purge", str(data), "--list", str(listed), "--workers", "1"])
    assert (run.exit_code, "1 purged before, 1 in no record" in run.stdout) == (0, True)
