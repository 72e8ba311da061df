"""A fault of each kind is put into a whole dataset, and named by verify with its shard and a remedy."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from image_shards import pair, picture, write_tar
from small_dataset import pair_columns, write_dataset, write_pairs

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.features import Feature
from clipkit.formats.records import RecordWriter, encode_example, index_records
from clipkit.storage.files import as_path
from clipkit.tfrecord_tools.purge import command as purging
from clipkit.tfrecord_tools.verify.command import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("whole") / "data", [5, 0, 7])


@pytest.fixture
def data(whole, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(whole, tmp_path / "data")


def shard(data, number):
    return sorted(data.glob("*.tfrecord-*"))[number]


def change(path, offset, value=None):
    contents = bytearray(path.read_bytes())
    contents[offset] = contents[offset] ^ 1 if value is None else value
    path.write_bytes(contents)


def rewrite(data, number, records):
    """Put other records into a shard, and tell the manifest and the index of it: every checksum is right."""
    path = shard(data, number)
    with RecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    manifest = json.loads((data / "clipkit" / "manifest.json").read_text())
    entry = manifest["splits"]["train"]["shards"][number]
    entry["bytes"], entry["crc32c"] = writer.bytes, f"{writer.checksum:08x}"
    (data / "clipkit" / "manifest.json").write_text(json.dumps(manifest))
    info = json.loads((data / "dataset_info.json").read_text())
    info["splits"][0]["numBytes"] = str(sum(s["bytes"] for s in manifest["splits"]["train"]["shards"]))
    (data / "dataset_info.json").write_text(json.dumps(info))
    offsets = np.concatenate([index_records(each) for each in sorted(data.glob("*.tfrecord-*"))])
    np.save(data / "clipkit" / "index-train.npy", offsets)


def problems(data, **how):
    return [(each.file, each.what, each.count) for each in verify(data, **how).problems]


def test_a_whole_dataset_is_whole(whole):
    summary = verify(whole)
    assert (summary.problems, summary.leftovers, summary.remedies) == ((), (), {})
    assert (summary.shards, summary.records, summary.decoded) == (3, 12, 12)
    assert summary.bytes == sum(file.stat().st_size for file in whole.glob("*.tfrecord-*"))
    assert "all is well. Read 12 records" in summary.text()
    assert verify(whole.parent).path == whole


@pytest.mark.parametrize(("decode", "expected"), [(0, 0), (4, 4), (1000, 12), (None, 12)])
def test_so_many_images_are_decoded(whole, decode, expected):
    assert verify(whole, decode=decode).decoded == expected


def test_every_damaged_record_is_counted(data):
    path = shard(data, 2)
    for offset in index_records(path)[[1, 4]]:
        change(path, int(offset) + 40)
    assert problems(data) == [(path.name, "the checksum of a record's contents doesn't match", 2)]
    summary = verify(data)
    assert summary.problems[0].first == f"record 1 at byte {int(index_records(path)[1]):,}"
    assert summary.records == 12  # the others are read
    assert "copy the shard again" in summary.remedies[path.name]
    assert "00002.tar" in summary.remedies[path.name]


def test_a_damaged_length_ends_the_shard(data):
    path = shard(data, 2)
    change(path, int(index_records(path)[3]))
    assert problems(data) == [
        (path.name, "the checksum of a record's length doesn't match", 1),
        (path.name, "3 records where dataset_info.json says 7", 1),
    ]


@pytest.mark.parametrize("cut", [3, 20, 5000])
def test_a_shard_that_is_cut_short(data, cut):
    path = shard(data, 2)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-cut])
    found = problems(data)
    assert (path.name, f"{size - cut:,} bytes where the manifest says {size:,}", 1) in found
    assert any("records where dataset_info.json says 7" in what for _, what, _ in found)


def test_a_shard_that_is_gone_and_one_that_is_another(data):
    shard(data, 0).write_bytes(shard(data, 2).read_bytes())
    name = shard(data, 2).name
    shard(data, 2).unlink()
    found = problems(data)
    assert (name, "the shard is missing", 1) in found
    assert (shard(data, 0).name, "7 records where dataset_info.json says 5", 1) in found


def test_whole_records_in_another_order_are_noticed_by_the_file_s_checksum(data):
    path = shard(data, 0)
    records = [encode_example(pair_columns(number)) for number in (1, 0, 2, 3, 4)]
    size = path.stat().st_size
    with RecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    assert writer.bytes == size, "the records should be of one size, so that only the checksum can tell"
    assert problems(data)[0] == (
        path.name,
        "the checksum of the file isn't the manifest's, though every record is whole",
        1,
    )


def test_other_offsets_in_the_index(data):
    path = data / "clipkit" / "index-train.npy"
    index = np.load(path)
    index[6] += 1
    np.save(path, index)
    assert problems(data) == [(shard(data, 2).name, "index-train.npy says other offsets than the file has", 1)]
    assert "remove clipkit/index-train.npy" in verify(data).remedies[shard(data, 2).name]


@pytest.mark.parametrize("contents", ["short", "torn", "floats"])
def test_an_index_that_is_none(data, contents):
    path = data / "clipkit" / "index-train.npy"
    index = np.load(path)
    if contents == "torn":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        np.save(path, index[:-1] if contents == "short" else index.astype(np.float64))
    assert problems(data) == [("clipkit/index-train.npy", "it isn't an index of 12 records", 1)]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"txt": None}, "column 'txt' is missing and features.json doesn't call it optional"),
        ({"txt": b"caf\xe9"}, "column 'txt' isn't UTF-8"),
        ({"txt": 3}, "column 'txt' holds int and features.json says text"),
        ({"txt": ["a", "b"]}, "column 'txt' holds several values and features.json says one"),
        ({"similarity": 1}, "column 'similarity' holds int and features.json says float"),
        ({"jpg": 0.5}, "column 'jpg' holds float and features.json says image"),
        ({"jpg": b"GIF89a and no more"}, "an image can't be decoded"),
        ({"jpg": picture(3)[:-40]}, "an image can't be decoded"),
    ],
)
def test_a_record_that_does_not_fit(data, changes, what):
    records = [encode_example(pair_columns(number)) for number in range(5)]
    rewrite(data, 0, [*records[:3], encode_example(pair_columns(3, **changes)), records[4]])
    summary = verify(data, decode=None)
    assert [(each.file, each.what, each.count) for each in summary.problems] == [(shard(data, 0).name, what, 1)]
    assert summary.problems[0].first.startswith("record 3 at byte")
    if "decoded" in what:
        assert summary.problems[0].keys == ("000000003",)
        assert "clipkit purge --by key" in summary.remedies[shard(data, 0).name]


def test_optional_columns_may_be_missing(data):
    rewrite(data, 0, [encode_example(pair_columns(number, similarity=None)) for number in range(5)])
    assert problems(data) == []


def test_what_is_no_example(data):
    rewrite(data, 0, [b"\xff\xff\xff", *(encode_example(pair_columns(number)) for number in range(1, 5))])
    assert problems(data) == [(shard(data, 0).name, "a record isn't a tf.train.Example", 1)]


def test_labels_beyond_their_classes(tmp_path):
    features = {"image": Feature("image"), "label": Feature("label", num_classes=3), "file_name": Feature("text")}
    records = [{"image": picture(n), "label": label, "file_name": f"{n}.jpg"} for n, label in enumerate([0, 2, -1, 3])]
    data = write_dataset(tmp_path / "d", {"validation": [records]}, features, manifest=False, image="image")
    name = "pairs-validation.tfrecord-00000-of-00001"
    assert problems(data) == [(name, "column 'label' holds labels beyond its 3 classes", 1)]
    assert "make the dataset again with TFDS" in verify(data).remedies[name]


def test_accounts_that_do_not_agree(data):
    path = data / "clipkit" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["sources"][0]["skipped"] = {}
    path.write_text(json.dumps(manifest))
    whats = [what for _, what, _ in problems(data)]
    assert "split 'train': 15 samples are not the records and what was left out" in whats
    assert "6 samples, 5 records and 0 left out don't add up" in whats
    info = json.loads((data / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["5", "1", "7"]
    (data / "dataset_info.json").write_text(json.dumps(info))
    found = problems(data)
    assert (
        "clipkit/manifest.json",
        "split 'train': 12 records in 3 shards where dataset_info.json says 13 in 3",
        1,
    ) in found
    assert (shard(data, 1).name, "0 records where dataset_info.json says 1", 1) in found


def test_leftovers_are_named_and_are_no_problem(data):
    (data / ".pairs-train.tfrecord-00000-of-00003.123000000000000").write_bytes(b"x")
    (data / "pairs-train.tfrecord-00000-of-00009").write_bytes(b"x")
    (data / "clipkit" / "build-train").mkdir()
    summary = verify(data)
    assert summary.problems == ()
    assert summary.leftovers == (
        ".pairs-train.tfrecord-00000-of-00003.123000000000000",
        "pairs-train.tfrecord-00000-of-00009",
        "clipkit/build-train",
    )


def test_a_purge_that_is_not_finished_is_the_only_problem(data, tmp_path, monkeypatch):
    """Its shards are already rewritten: to copy them again would bring back what was removed."""
    listed = tmp_path / "list.txt"
    listed.write_text("http://example.org/1.jpg\nhttp://example.org/7.jpg\n")

    def killed(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(purging, "finish", killed)
        with pytest.raises(InterruptedError):
            purging.purge(data, listed)
    summary = verify(data)
    assert [(each.file, each.what) for each in summary.problems] == [("clipkit/purge.json", "a purge isn't finished")]
    assert summary.remedies.keys() == {"clipkit/purge.json"}
    assert "run the same clipkit purge command again" in summary.text()
    assert "again from where" not in summary.text()
    purging.purge(data, listed)
    assert problems(data) == []


def test_a_store_and_workers_find_the_same(data):
    change(shard(data, 0), 300)
    change(shard(data, 2), 300)
    here = problems(data)
    assert len(here) == 2
    assert problems(data, workers=2) == here
    store = as_path("memory://test-verify/data")
    for file in data.rglob("*"):
        if file.is_file():
            (store / file.relative_to(data).as_posix()).write_bytes(file.read_bytes())
    assert problems(store) == here
    (store / shard(data, 2).name).unlink()
    assert (shard(data, 2).name, "the shard is missing", 1) in problems(store)


def test_the_command_says_it_by_its_exit_code(data):
    run = CliRunner().invoke(main, ["verify", str(data), "--json", "--workers", "1", "--decode", "all"])
    told = json.loads(run.stdout)
    assert (run.exit_code, told["ok"], told["records"], told["decoded"]) == (0, True, 12, 12)
    change(shard(data, 0), 300)
    run = CliRunner().invoke(main, ["verify", str(data), "--workers", "1"])
    assert run.exit_code == 2
    assert run.stdout.splitlines()[0] == shard(data, 0).name
    run = CliRunner().invoke(main, ["verify", str(data), "--json", "--workers", "1"])
    told = json.loads(run.stdout)
    assert (run.exit_code, told["ok"], len(told["problems"])) == (2, False, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tars
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tars(tmp_path):
    """Two tars as img2dataset leaves them: four samples of five rows each."""
    for number in range(2):
        write_tar(tmp_path / f"{number:05d}.tar", [pair(number * 5 + i) for i in range(4)])
        (tmp_path / f"{number:05d}_stats.json").write_text(json.dumps({"count": 5, "successes": 4}))
        status = ["success"] * 4 + ["failed_to_download"]
        pq.write_table(pa.table({"status": status}), tmp_path / f"{number:05d}.parquet")
    return tmp_path


def test_whole_tars(tars):
    summary = verify(tars, decode=6)
    assert (summary.problems, summary.shards, summary.records, summary.decoded) == ((), 2, 8, 6)


def test_tars_with_faults(tars):
    write_tar(tars / "00000.tar", [pair(0), pair(1), pair(2, jpg=b"<html>"), pair(3, jpg=picture(3)[:200])])
    contents = (tars / "00001.tar").read_bytes()
    (tars / "00001.tar").write_bytes(contents[: len(contents) // 2])
    summary = verify(tars)
    found = [(each.file, each.what) for each in summary.problems]
    assert found[:2] == [("00000.tar", "an image is of no known format"), ("00000.tar", "an image can't be decoded")]
    assert found[2][0] == "00001.tar"
    assert "damaged tar at byte" in found[2][1]
    assert "run the same clipkit download again" in summary.remedies["00001.tar"]


@pytest.mark.parametrize("told", ["stats", "parquet"])
def test_tars_with_other_counts(tars, told):
    if told == "stats":
        (tars / "00001_stats.json").write_text(json.dumps({"successes": 5}))
    else:
        pq.write_table(pa.table({"status": ["success"] * 5}), tars / "00001.parquet")
    name = "00001_stats.json" if told == "stats" else "00001.parquet"
    assert problems(tars) == [("00001.tar", f"4 samples where {name} says 5", 1)]


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(UserError, match="doesn't exist"):
        verify(tmp_path / "nothing")
    (tmp_path / "._00000.tar").write_bytes(b"what a Mac leaves beside a file")
    with pytest.raises(UserError, match="isn't a dataset"):
        verify(tmp_path)
