"""What is refused before anything is fetched, which rows become which shards, and what is remembered."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_site import JPEG, examples, fetch, write_urls
from hypothesis import given
from hypothesis import strategies as st

from clipkit.cli.demo_server import Answer, serve
from clipkit.errors import UserError
from clipkit.storage.files import lock
from clipkit.tfrecord_tools.account.shard_state import FORMATS
from clipkit.tfrecord_tools.download import command as download_module
from clipkit.tfrecord_tools.download import work
from clipkit.tfrecord_tools.download.command import dataset_name, download
from clipkit.tfrecord_tools.download.plan import cut, cut_wanted, load_mask, wanted_rows, write_mask
from clipkit.tfrecord_tools.pictures.picture import PictureSettings
from clipkit.tfrecord_tools.tables.url_table import column_kind, common_type
from clipkit.tfrecord_tools.web.settings import FetchSettings


def test_missing_column_names_the_columns_and_a_preset(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "u.parquet", URL=["http://x/a.jpg"], TEXT=["a"], similarity=[0.3])
    with pytest.raises(UserError, match=r"no URL column 'url'; it has URL, TEXT, similarity: --preset laion400m fits"):
        download(urls, tmp_path / "out")
    with pytest.raises(UserError, match=r"no caption column 'ALT'"):
        download(urls, tmp_path / "out", preset="laion400m", caption_column="ALT")
    with pytest.raises(UserError, match=r"no column 'hash' to keep"):
        download(urls, tmp_path / "out", preset="laion400m", keep_columns=["hash"])
    with pytest.raises(UserError, match=r"no hash column 'md5'"):
        download(urls, tmp_path / "out", preset="laion400m", hash_column="md5", hash_kind="md5")
    with pytest.raises(UserError, match="holds double, not text"):
        download(urls, tmp_path / "out", preset="laion400m", caption_column="similarity")
    odd = write_urls(tmp_path / "odd.parquet", a=["http://x/a.jpg"], b=["a"])
    with pytest.raises(UserError, match="it has a, b: name the columns with --url-column and --caption-column"):
        download(odd, tmp_path / "out")


def test_a_column_that_is_there_twice_is_not_guessed(tmp_path: Path) -> None:
    arrays = [pa.array([f"http://x/{name}.jpg"]) for name in "abcd"]
    pq.write_table(pa.Table.from_arrays(arrays, ["url", "caption", "twice", "twice"]), tmp_path / "u.parquet")
    for options in ({"keep_columns": ["twice"]}, {"hash_column": "twice", "hash_kind": "md5"}):
        with pytest.raises(UserError, match="has 2 columns 'twice': rename all but one"):
            download(tmp_path / "u.parquet", tmp_path / "out", **options)


def test_values_that_cannot_be_kept_are_one_line(tmp_path: Path) -> None:
    """Types of which no table by itself says that they don't go together, and text that isn't UTF-8."""
    (tmp_path / "urls").mkdir()
    write_urls(tmp_path / "urls" / "0.parquet", url=["u"], caption=["a"], number=[2**53 + 1])
    write_urls(tmp_path / "urls" / "1.parquet", url=["u"], caption=["a"], number=[0.5])
    with pytest.raises(
        UserError, match=r"'number' of .*0\.parquet can't be read as double \(Integer value 900719925474"
    ):
        fetch(tmp_path / "urls", tmp_path / "out", keep_columns=["number"], format="parquet")
    latin = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9"))
    urls = write_urls(tmp_path / "latin.parquet", url=["u"], caption=latin)
    with pytest.raises(UserError, match=r"'caption' of .*latin\.parquet can't be read as string \(.*UTF8"):
        fetch(urls, tmp_path / "latin", format="parquet")


def test_columns_that_cannot_be_kept(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "u.parquet", url=["http://x/a.jpg"], caption=["a"], clipkit_width=[1], raw=[b"bytes"])
    with pytest.raises(UserError, match=r"'clipkit_width'.*clipkit's own; rename yours"):
        download(urls, tmp_path / "out", keep_columns=["clipkit_width"])
    with pytest.raises(UserError, match=r"'raw'.*it holds binary"):
        download(urls, tmp_path / "out", keep_columns=["raw"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "laion4b"}, "unknown preset 'laion4b': choose one of laion400m"),
        ({"format": "files"}, "unknown format 'files': choose one of tfds, webdataset, parquet"),
        ({"pictures": PictureSettings(resize_mode="squash")}, "unknown resize mode"),
        ({"pictures": PictureSettings(quality=0)}, "JPEG quality"),
        ({"pictures": PictureSettings(image_size=0)}, "image size"),
        ({"network": FetchSettings(timeout=0.0)}, "timeout and deadline must be above 0"),
        ({"network": FetchSettings(connections=0)}, "number of connections must be at least 1"),
        ({"samples_per_shard": 0}, "samples per shard must be at least 1"),
        ({"retry_failed": "dns,gone"}, r"unknown reason 'gone' in --retry-failed=dns,gone: choose among dns, connect"),
        ({"retry_failed": ","}, "no reason is named"),
        ({"hash_column": "h"}, "by --hash-column and --hash-kind together"),
        ({"hash_column": "h", "hash_kind": "crc"}, "unknown hash kind 'crc'"),
        ({"drop_changed": True}, "--drop-changed needs a hash of each image"),
        ({"preset": "relaion2b", "drop_changed": True}, "--drop-changed needs a hash of each image"),
        ({"name": "two words"}, "--name 'two words': TFDS allows a letter"),
        ({"where": "similarity >"}, "isn't SQL that can be read"),
        ({"where": "similarity > 0.3"}, "names column 'similarity'; the table has url, caption"),
        ({"where": "caption = 'b'"}, "leaves none of the 1 rows"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        download(write_urls(tmp_path / "u.parquet"), tmp_path / "out", **options)


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'clipkit\[download\]'"):
        download(write_urls(tmp_path / "u.parquet"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_used(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "u.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write"):
        download(urls, tmp_path / "file")
    for number, name in enumerate(["00000.tar", "00000_stats.json", "00000.parquet"]):
        (tmp_path / f"strange{number}").mkdir()
        (tmp_path / f"strange{number}" / name).write_bytes(b"")
        with pytest.raises(UserError, match="isn't from clipkit download: choose an empty output"):
            download(urls, tmp_path / f"strange{number}", format="webdataset")
    (tmp_path / "built" / "u" / "1.0.0").mkdir(parents=True)
    (tmp_path / "built" / "u" / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="isn't from clipkit download"):
        download(urls, tmp_path / "built")
    with (
        lock(tmp_path / "busy" / "clipkit"),
        pytest.raises(UserError, match="is being written by another clipkit"),
    ):
        download(urls, tmp_path / "busy", format="parquet")
    with pytest.raises(UserError, match="is both the folder of the tables and the output"):
        download(tmp_path, tmp_path, format="parquet")


def test_changed_table_or_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "run_jobs", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    urls = write_urls(tmp_path / "u.parquet")
    options = {"format": "webdataset", "where": "caption != 'b'"}
    with pytest.raises(KeyboardInterrupt):
        download(urls, tmp_path / "out", **options)
    with pytest.raises(UserError, match="begun with image_size 256, not 64"):
        download(urls, tmp_path / "out", pictures=PictureSettings(image_size=64), **options)
    with pytest.raises(UserError, match=r"begun with where \"caption != 'b'\", not None"):
        download(urls, tmp_path / "out", format="webdataset")
    with pytest.raises(UserError, match="begun with format 'webdataset', not 'parquet'"):
        download(urls, tmp_path / "out", format="parquet", where=options["where"])
    plan = tmp_path / "out" / "clipkit" / "plan.json"
    before = json.loads(plan.read_text())
    plan.write_text(json.dumps({**before, "settings": {**before["settings"], "phash column": "caption"}}))
    with pytest.raises(KeyboardInterrupt):  # so an earlier version named a column of perceptual hashes
        download(urls, tmp_path / "out", hash_column="caption", hash_kind="phash", **options)
    plan.write_text(json.dumps(before))
    urls.rename(tmp_path / "renamed.parquet")
    with pytest.raises(KeyboardInterrupt):  # the same table elsewhere is the same table
        download(tmp_path / "renamed.parquet", tmp_path / "out", network=FetchSettings(connections=3), **options)
    write_urls(urls, url=["http://127.0.0.1:1/b.jpg"], caption=["a"])
    with pytest.raises(UserError, match=r"isn't the table that .*out was begun with"):
        download(urls, tmp_path / "out", **options)


def test_names_of_datasets(tmp_path: Path) -> None:
    assert dataset_name(None, "laion400m", tmp_path) == "laion400m"
    assert dataset_name(None, "relaion-coco", tmp_path) == "relaion_coco"
    assert dataset_name(None, None, Path("x/My URLs (1).csv.gz")) == "my_urls_1"
    assert dataset_name(None, None, Path("2024.parquet")) == "urls_2024"
    assert dataset_name("Own", "laion400m", tmp_path) == "Own"
    (tmp_path / "laion").mkdir()
    assert dataset_name(None, None, tmp_path / "laion") == "laion"


# ---------------------------------------------------------------------------------------------------------------------
# Which rows
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_tables_is_cut_in_order() -> None:
    shards = list(cut([Path("a"), Path("b")], [5, 2], [None, None], 2))
    assert [(s.number, str(s.table), s.start, s.stop, s.rows) for s in shards] == [
        (0, "a", 0, 2, 2), (1, "a", 2, 4, 2), (2, "a", 4, 5, 1), (3, "b", 0, 2, 2),
    ]  # fmt: skip


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7), st.integers(1, 11))
def test_each_wanted_row_is_in_one_shard(wanted: list[bool], samples: int, step: int) -> None:
    bits = np.packbits(np.array(wanted, np.bool_))
    found = []
    shards = list(cut_wanted(bits, len(wanted), samples, step))
    for start, stop, rows in shards:
        numbers = wanted_rows(bits, start, stop).tolist()
        assert len(numbers) == rows and numbers[0] == start and numbers[-1] == stop - 1
        found += numbers
    assert found == [number for number, each in enumerate(wanted) if each]
    assert all(rows == samples for _, _, rows in shards[:-1])


def test_wanted_rows_are_remembered_as_bits(tmp_path: Path) -> None:
    """Eight rows a byte, whatever parts the condition is asked in."""
    rows = 70_001
    table = write_urls(tmp_path / "t.parquet", n=pa.array(range(rows), pa.int32()))
    assert write_mask(table, tmp_path / "mask.npy", "n % 3 = 0 OR n > 70000") == len(
        [n for n in range(rows) if n % 3 == 0 or n > 70000]
    )
    bits = load_mask(tmp_path / "mask.npy")
    assert bits.nbytes == -(-rows // 8)
    assert wanted_rows(bits, 69_990, rows).tolist() == [69990, 69993, 69996, 69999]
    (tmp_path / "mask.npy").write_bytes(b"no mask")
    with pytest.raises(UserError, match=r"mask\.npy can't be read"):
        load_mask(tmp_path / "mask.npy")


def test_where_chooses_before_anything_is_fetched(tmp_path: Path) -> None:
    """Two tables with other columns; what isn't wanted isn't asked for, and is counted."""
    (tmp_path / "urls").mkdir()
    with serve({f"/{n}.jpg": Answer(JPEG) for n in range(0, 20, 2)}) as base_url:
        for part in range(2):
            numbers = range(part * 10, part * 10 + 10)
            extra = {"tag": ["x"] * 10} if part else {}
            write_urls(
                tmp_path / "urls" / f"{part}.parquet",
                url=[f"{base_url}/{n}.jpg" for n in numbers], caption=[f"c{n}" for n in numbers],
                n=pa.array(numbers, pa.int16() if part else pa.float32()), **extra,
            )  # fmt: skip
        write_urls(tmp_path / "urls" / "2.parquet", url=[f"{base_url}/1.jpg"], caption=["none wanted"], n=[1])
        options = {"where": "n % 2 = 0", "keep_columns": None, "samples_per_shard": 3}
        summary = fetch(tmp_path / "urls", tmp_path / "out", preset=None, **options)
    assert (summary.rows, summary.left_out, summary.downloaded, summary.failed, summary.shards) == (21, 11, 10, {}, 4)
    assert [each["txt"] for each in examples(summary.out)] == [f"c{n}" for n in range(0, 20, 2)]
    plan = json.loads((summary.out / "clipkit" / "plan.json").read_text())
    assert (plan["rows"], plan["wanted"]) == ([10, 10, 1], [5, 5, 0])
    ledger = pq.read_table(summary.out / "clipkit" / "ledger" / "00001.parquet")
    assert ledger["row"].to_pylist() == [6, 8]
    assert "left out by --where: 11 of 21 rows" in summary.text()


def test_tables_with_other_columns_are_taken_together(tmp_path: Path) -> None:
    """A column that a table lacks is null there; one that is int here and float or text there holds both."""
    (tmp_path / "urls").mkdir()
    with serve({"/a.jpg": Answer(JPEG)}) as base_url:
        common = {"URL": [f"{base_url}/a.jpg"], "TEXT": ["a"]}
        write_urls(tmp_path / "urls" / "0.parquet", **common, similarity=pa.array([1], pa.int64()), LICENSE=[5])
        write_urls(tmp_path / "urls" / "1.parquet", **common, similarity=[0.5], LICENSE=["CC0"])
        (tmp_path / "urls" / "2.tsv").write_text(f'TEXT\tURL\tNSFW\n"a\t{base_url}/a.jpg\tUNSURE\n')
        for format in ("tfds", "parquet"):
            summary = fetch(tmp_path / "urls", tmp_path / format, preset="laion400m", format=format)
            if format == "tfds":
                rows = examples(summary.out)
            else:
                rows = [row for n in range(3) for row in pq.read_table(summary.out / f"0000{n}.parquet").to_pylist()]
            assert [row["similarity"] for row in rows] == [1.0, 0.5, None]
            assert [row["LICENSE"] for row in rows] == ["5", "CC0", None]
            assert [row["NSFW"] for row in rows] == [None, None, "UNSURE"]
            assert rows[2]["txt" if format == "tfds" else "caption"] == '"a'


def test_types_taken_together() -> None:
    assert common_type(pa.int32(), pa.int64()) == pa.int64()
    assert common_type(pa.int64(), pa.float32()) == pa.float64()
    assert common_type(pa.bool_(), pa.string()) == pa.string()
    assert common_type(None, pa.dictionary(pa.int8(), pa.string())) == pa.string()
    assert common_type(pa.list_(pa.int32()), pa.int32()) is None
    assert [column_kind(kind) for kind in (pa.null(), pa.bool_(), pa.uint64(), pa.float16(), pa.large_string())] == [
        None, "bool", "int", "float", "text",
    ]  # fmt: skip
    assert column_kind(pa.list_(pa.string())) == "list of text"


def test_lists_and_single_values_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "urls").mkdir()
    write_urls(tmp_path / "urls" / "0.parquet", url=["u"], caption=["a"], tags=[1])
    write_urls(tmp_path / "urls" / "1.parquet", url=["u"], caption=["a"], tags=[[1]])
    with pytest.raises(UserError, match=r"column 'tags' holds list<.*> in .*1\.parquet and int64 in a table before"):
        download(tmp_path / "urls", tmp_path / "out", keep_columns=["tags"])
    assert FORMATS[0] == "tfds"
