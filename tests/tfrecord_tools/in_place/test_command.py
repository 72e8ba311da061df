import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from folder_contents import contents
from image_shards import picture
from tensorflow_process import with_tensorflow

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats import records as record_files
from clipkit.formats.dataset import open_dataset
from clipkit.formats.features import Feature
from clipkit.formats.records import (
    RecordError,
    RecordWriter,
    decode_example,
    encode_example,
    index_records,
    read_records,
)
from clipkit.storage.files import as_path
from clipkit.tfrecord_tools.in_place import command as in_place
from clipkit.tfrecord_tools.in_place import shard as in_place_shard
from clipkit.tfrecord_tools.in_place.command import build_in_place
from clipkit.train.sources.source import IMAGE_FIELD, TEXT_FIELD

FIXTURE = Path(__file__).parents[2] / "data" / "img2dataset-tfrecord"


@pytest.fixture
def shards(tmp_path) -> Path:
    """What img2dataset 1.47 itself wrote with TensorFlow 2.16 and tensorflow_io; see the README beside it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in FIXTURE.glob("0*"):
        shutil.copy(path, folder)
    return folder


def made_up(folder: Path, *shards: list[dict]) -> Path:
    """Shards of given columns; each record gets an image, a caption and a key unless it says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, records in enumerate(shards):
        with RecordWriter(folder / f"{number:05d}.tfrecord") as writer:
            for i, columns in enumerate(records):
                given = {"jpg": picture(i), "txt": f"number {i}", "key": f"{number}{i}", **columns}
                writer.write(encode_example({name: v for name, v in given.items() if v is not None}))
    return folder


def records(path: Path) -> list[dict]:
    return [decode_example(record) for record in read_records(path)]


def rows() -> dict[str, dict]:
    """What the fixture's table and img2dataset's own parquet files say of the samples that were fetched, by key."""
    tables = [pq.read_table(path).to_pylist() for path in sorted(FIXTURE.glob("*.parquet"))]
    return {row["key"]: row for table in tables for row in table if row["status"] == "success"}


READ = """
import tensorflow as tf, tensorflow_datasets as tfds
builder = tfds.builder_from_directory(arguments[0])
def plain(value):
    value = value.numpy() if hasattr(value, "numpy") else value
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value
data = builder.as_dataset(split="train", read_config=tfds.ReadConfig(interleave_cycle_length=1))
result = {
    "name": builder.name,
    "lengths": list(builder.info.splits["train"].shard_lengths),
    "types": {name: [spec.dtype.name, len(spec.shape)] for name, spec in data.element_spec.items()},
    "examples": [{n: list(v.shape) if n == "jpg" else plain(v) for n, v in example.items()} for example in data],
}
"""


def test_img2datasets_own_shards_become_a_dataset_that_tfds_reads(shards):
    summary = build_in_place(shards, "laion")
    assert (summary.records, summary.samples, summary.shards, summary.built) == (11, 11, 3, True)
    read = with_tensorflow(READ, shards)
    assert (read["name"], read["lengths"]) == ("laion", [4, 4, 3])
    texts = {name: ["string", 0] for name in ("exif", "key", "licence", "sha256", "txt", "url")}
    ints = {name: ["int64", 0] for name in ("height", "width", "original_height", "original_width", "seen", "stars")}
    assert read["types"] == {
        **texts,
        **ints,
        "jpg": ["uint8", 3],
        "score": ["float32", 0],
        "similarity": ["float32", 0],
        "sizes": ["int64", 1],
        "tags": ["string", 1],
        "weights": ["float32", 1],
    }
    expected = rows()
    assert len(read["examples"]) == len(expected) == 11
    for example in read["examples"]:
        row = expected.pop(example["key"])
        assert example["jpg"] == [16, 16, 3]
        assert example["txt"] == (row["caption"] or "")
        for name in ("url", "sha256", "width", "original_height", "similarity", "tags", "weights"):
            assert example[name] == row[name], name
        assert example["seen"] == int(row["seen"])
        assert example["licence"] == (row["licence"] or "")
        assert example["sizes"] == (row["sizes"] or [])
        assert example["stars"] == (-(2**63) if row["stars"] is None else row["stars"])
        assert example["score"] == pytest.approx(-3.4028235e38 if row["score"] is None else row["score"])
    assert not expected


def test_clipkit_reads_it_and_missing_stays_missing(shards):
    build_in_place(shards, "laion")
    dataset = open_dataset(shards)
    assert (dataset.num_records, [shard.records for shard in dataset.shards]) == (11, [4, 4, 3])
    assert dataset.features["stars"] == Feature("int", optional=True)
    assert dataset.features["score"] == Feature("float", optional=True)
    assert dataset.features["similarity"] == Feature("float")
    assert dataset.features["sizes"] == Feature("int", is_list=True)
    assert dataset.features["sha256"] == dataset.features["licence"] == Feature("text")
    assert {"status", "error_message", "caption"}.isdisjoint(dataset.features)
    assert {IMAGE_FIELD, TEXT_FIELD} <= set(dataset.features)
    expected = rows()
    for i in range(len(dataset)):
        example = dataset.example(i)
        row = expected[example["key"]]
        assert (example["stars"], example["score"], example["sizes"]) == (row["stars"], row["score"], row["sizes"])
    starts = [list(dataset.offsets(number)) for number in range(3)]
    assert starts == [list(index_records(shards / shard.file)) for shard in dataset.shards]


def test_only_what_tensorflow_could_not_read_is_written_anew(shards):
    before = {path.name: path.stat().st_ino for path in shards.iterdir()}
    old = {path.name: records(path) for path in shards.glob("*.tfrecord")}
    first = (shards / "00000.tfrecord").read_bytes()
    summary = build_in_place(shards, "laion")
    assert summary.rewritten == {
        "00001.tfrecord": "'score': 1 null; 'sizes': 1 null; 'stars': 1 null",
        "00002.tfrecord": "'stars': 1 null",
    }
    assert "2 of 3 shards rewritten" in summary.text()
    assert "00001.tfrecord ('score': 1 null; 'sizes': 1 null; 'stars': 1 null)" in summary.text()
    renamed = shards / "laion-train.tfrecord-00000-of-00003"
    assert (renamed.read_bytes(), renamed.stat().st_ino) == (first, before["00000.tfrecord"])
    for number in range(3):
        new = records(shards / f"laion-train.tfrecord-{number:05d}-of-00003")
        for was, now in zip(old[f"{number:05d}.tfrecord"], new, strict=True):
            gone = {name for name in was if name not in now}
            assert gone <= {"stars", "score", "sizes"}
            assert all(was[name] == [b""] for name in gone)
            assert now == {name: values for name, values in was.items() if name not in gone}
    assert not list(shards.glob("*.tfrecord"))
    for name in ("00000.parquet", "00001_stats.json"):
        assert (shards / name).stat().st_ino == before[name]


def test_the_account_of_it_adds_up(shards):
    build_in_place(shards, "laion")
    manifest = json.loads((shards / "clipkit" / "manifest.json").read_text())["splits"]["train"]
    assert (manifest["records"], manifest["samples"], manifest["formats"]) == (11, 11, {"jpeg": 11})
    for number, shard in enumerate(manifest["shards"]):
        path = shards / shard["file"]
        assert shard["bytes"] == path.stat().st_size
        assert shard["crc32c"] == checksum(path)
        assert shard["sources"][0]["file"] == f"{number:05d}.tfrecord"
        assert shard["sources"][0]["bytes"] == (FIXTURE / f"{number:05d}.tfrecord").stat().st_size
    assert sorted(path.name for path in (shards / "clipkit").iterdir()) == [
        ".lock",
        "index-train.npy",
        "manifest.json",
        "problems-train.jsonl",
    ]


def checksum(path: Path) -> str:
    import google_crc32c

    return f"{google_crc32c.value(path.read_bytes()):08x}"


def test_a_purge_that_is_not_finished_comes_first(shards):
    folder = build_in_place(shards, "laion").path
    (folder / "clipkit" / "purge.json").write_text("{}")
    with pytest.raises(UserError, match="a purge isn't finished"):
        build_in_place(shards, "laion")


def test_the_same_command_again_does_nothing(shards):
    once = build_in_place(shards, "laion")
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*") if path.is_file() and path.name != ".lock"}
    again = build_in_place(shards, "laion")
    assert not again.built
    assert {**vars(again), "built": True} == vars(once)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_workers_change_nothing(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "other")
    build_in_place(shards, "laion", workers=1)
    build_in_place(tmp_path / "other", "laion", workers=2)
    assert contents(shards) == contents(tmp_path / "other")


# Each run is killed just before one of its renames or removals, or after the last, and given again.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from clipkit.tfrecord_tools.in_place import command as in_place
from folder_contents import contents

os.fsync = lambda descriptor: None
original, folder = Path(sys.argv[1]), Path(sys.argv[2])
steps = {"replace": Path.replace, "unlink": Path.unlink}

def run(kill_at=None):
    done = 0
    def counted(step):
        def function(path, *arguments, **options):
            nonlocal done
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(path, *arguments, **options)
        return function
    for name, step in steps.items():
        setattr(Path, name, counted(step))
    in_place.build_in_place(folder, "laion")
    for name, step in steps.items():
        setattr(Path, name, step)
    os.kill(os.getpid(), signal.SIGKILL) if kill_at else None
    return done

shutil.copytree(original, folder)
count = run()
assert count > 18, count
expected = contents(folder)
for kill_at in range(1, count + 2):
    shutil.rmtree(folder)
    shutil.copytree(original, folder)
    child = os.fork()
    if not child:
        run(kill_at)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    run()
    assert contents(folder) == expected, kill_at
print("the same", count)
"""


def test_killed_between_any_two_renames_the_same_command_finishes(shards, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(shards), str(tmp_path / "work")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2] / "support",
    )
    assert done.returncode != -signal.SIGKILL
    assert done.stdout.startswith("the same"), done.stderr


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*tfrecord*"))


# The state of a folder that was damaged is as it was, whichever byte it is.
@pytest.mark.parametrize("byte", [0, 9, 13, 100, 700, 2000, -5, -1])
def test_a_damaged_shard_is_named_with_its_byte_and_nothing_is_renamed(shards, byte):
    path = shards / "00001.tfrecord"
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(RecordError, match=r"00001\.tfrecord: .* record at byte \d+: the file is damaged") as raised:
        build_in_place(shards, "laion")
    starts = index_records(FIXTURE / "00001.tfrecord").tolist()
    place = byte % len(data)
    assert raised.value.offset == max(start for start in starts if start <= place)
    assert names(shards) == ["00000.tfrecord", "00001.tfrecord", "00002.tfrecord"]
    assert not (shards / "dataset_info.json").exists()
    shutil.copy(FIXTURE / "00001.tfrecord", shards)
    assert build_in_place(shards, "laion").records == 11


@pytest.mark.parametrize("size", [5, 12, 300, 1300, 5000])
def test_a_shard_that_is_cut_off_is_named(shards, size):
    path = shards / "00001.tfrecord"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RecordError, match=r"00001\.tfrecord: the file ends inside a record"):
        build_in_place(shards, "laion")
    assert names(shards) == ["00000.tfrecord", "00001.tfrecord", "00002.tfrecord"]


def test_a_shard_that_is_cut_off_between_records_is_named(shards):
    path = shards / "00001.tfrecord"
    path.write_bytes(path.read_bytes()[: int(index_records(path)[3])])
    with pytest.raises(UserError, match=r"holds 3 records where 00001_stats\.json counts 4 successes: download the"):
        build_in_place(shards, "laion")
    assert names(shards) == ["00000.tfrecord", "00001.tfrecord", "00002.tfrecord"]


def test_a_shard_that_img2dataset_had_not_finished_is_named(shards):
    (shards / "00002_stats.json").unlink()
    with pytest.raises(UserError, match=r"00002\.tfrecord has no statistics beside it"):
        build_in_place(shards, "laion")
    for path in shards.glob("*_stats.json"):
        path.unlink()
    assert build_in_place(shards, "laion").records == 11


def test_records_larger_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_CHUNK_BYTES", 1000)
    large = {"jpg": picture(1, size=400), "note": "x" * 5000}
    folder = made_up(tmp_path / "shards", [{}, large, {}, {"note": "y"}, large, {}])
    assert len(picture(1, size=400)) > 3000
    summary = build_in_place(folder, "pairs")
    assert summary.records == 6
    assert open_dataset(folder).example(4)["note"] == "x" * 5000


def test_a_damaged_length_asks_for_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_CHUNK_BYTES", 1000)
    folder = made_up(tmp_path / "shards", [{"note": "x" * 3000}] * 10)
    path = folder / "00000.tfrecord"
    data = bytearray(path.read_bytes())
    data[1] ^= 0x10  # 4,096 bytes more or fewer
    path.write_bytes(data)
    asked: list[int] = []
    pread = os.pread

    def counted(descriptor, size, offset):
        asked.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    with pytest.raises(RecordError, match="the checksum of a record's length doesn't match, record at byte 0"):
        build_in_place(folder, "pairs")
    assert asked == [1000]


def test_what_is_no_example_is_named(tmp_path):
    folder = made_up(tmp_path / "shards", [{}])
    with RecordWriter(folder / "00000.tfrecord") as writer:
        writer.write(b"\x0a\x05\xff\xff")
    with pytest.raises(RecordError, match=r"not a tf\.train\.Example"):
        build_in_place(folder, "pairs")


def test_columns_are_unified_over_all_shards(tmp_path):
    folder = made_up(
        tmp_path / "shards",
        [{"n": "", "x": 1, "t": "", "late": None, "many": [7], "sha256": "ab", "mixed": 3}, {"n": "", "many": ""}],
        [
            {"n": 4, "x": 0.5, "t": "text", "late": 2, "many": [1, 2], "mixed": "word"},
            {"n": 300, "x": "", "many": [300]},
        ],
        [{"n": 5, "x": 0.25, "many": [3]}, {"n": 6, "many": [1, 2, 300]}],
    )
    summary = build_in_place(folder, "pairs")
    assert summary.rewritten == {
        "00000.tfrecord": "'many': 1 null; 'mixed': 1 not text; 'n': 2 null; 'x': 1 not float",
        "00001.tfrecord": "'x': 1 null",
    }
    dataset = open_dataset(folder)
    assert {name: dataset.features[name] for name in ("n", "x", "t", "late", "many", "sha256", "mixed", "key")} == {
        "n": Feature("int", optional=True),
        "x": Feature("float", optional=True),
        "t": Feature("text", optional=True),
        "late": Feature("int", optional=True),
        "many": Feature("int", is_list=True),
        "sha256": Feature("text", optional=True),
        "mixed": Feature("text", optional=True),
        "key": Feature("text"),
    }
    read = [dataset.example(i) for i in range(6)]
    assert [each["n"] for each in read] == [None, None, 4, 300, 5, 6]
    assert [each["x"] for each in read] == [1.0, None, 0.5, None, 0.25, None]
    assert [each["many"] for each in read] == [[7], None, [1, 2], [300], [3], [1, 2, 300]]
    assert [each["mixed"] for each in read] == ["3", None, "word", None, None, None]
    assert [each["sha256"] for each in read] == ["ab", None, None, None, None, None]
    tfds = with_tensorflow(READ, folder)["examples"]
    assert [each["many"] for each in tfds] == [[7], [], [1, 2], [300], [3], [1, 2, 300]]
    assert [each["mixed"] for each in tfds] == ["3", "", "word", "", "", ""]
    assert [each["n"] for each in tfds] == [-(2**63), -(2**63), 4, 300, 5, 6]


def test_keys_without_a_value(tmp_path):
    """Nobody's writer leaves them, but they are valid, and TensorFlow refuses them where one number is due."""
    folder = made_up(tmp_path / "shards", [{"n": [], "many": [1, 2], "none": []}, {"n": 3, "many": []}], [{"many": []}])
    assert build_in_place(folder, "pairs").rewritten == {"00000.tfrecord": "'n': 1 null"}
    dataset = open_dataset(folder)
    assert (dataset.features["n"], dataset.features["none"].is_list) == (Feature("int", optional=True), True)
    read = with_tensorflow(READ, folder)["examples"]
    assert [(each["n"], each["many"], each["none"]) for each in read] == [
        (-(2**63), [1, 2], []),
        (3, [], []),
        (-(2**63), [], []),
    ]


def test_a_shard_that_changed_between_two_runs_is_looked_at_again(tmp_path):
    folder = made_up(tmp_path / "shards", [{}, {}], [{}])
    second = folder / "00001.tfrecord"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(RecordError):
        build_in_place(folder, "pairs")
    made_up(folder, [{}, {}, {}])
    second.write_bytes(whole)
    assert build_in_place(folder, "pairs").records == 4
    assert [shard.records for shard in open_dataset(folder).shards] == [3, 1]


def test_bad_pairs_stay_and_are_named(tmp_path):
    folder = made_up(
        tmp_path / "shards",
        [
            {},
            {"jpg": ""},
            {"jpg": b"<html>"},
            {"jpg": picture(1, size=64)[:-200]},
            {"jpg": picture(1, "WEBP")},
            {"jpg": picture(1, "PNG")},
            {"txt": ""},
            {"txt": "  \u3000"},
            {"txt": b"\xff\xfe"},
            {"key": None, "txt": ""},
        ],
    )
    second = int(index_records(folder / "00000.tfrecord")[9])
    summary = build_in_place(folder, "pairs")
    assert (summary.records, summary.skipped, summary.formats) == (10, {}, {"jpeg": 6, "png": 1, "webp": 1})
    assert summary.problems == {
        "empty-caption": 3,
        "no-image": 1,
        "not-an-image": 1,
        "not-utf-8": 1,
        "truncated": 1,
        "webp image, which TFDS can't decode": 1,
    }
    listed = [json.loads(line) for line in (folder / "clipkit" / "problems-train.jsonl").read_text().splitlines()]
    assert {each["shard"] for each in listed} == {"pairs-train.tfrecord-00000-of-00001"}
    assert [(each["key"], each["reason"]) for each in listed] == [
        ("01", "no-image"),
        ("02", "not-an-image"),
        ("03", "truncated"),
        ("04", "webp image, which TFDS can't decode"),
        ("06", "empty-caption"),
        ("07", "empty-caption"),
        ("08", "not-utf-8"),
        (f"00000-{second}", "empty-caption"),
    ]
    assert "bad pairs, which can't be left out in place: empty-caption 3, no-image 1" in summary.text()


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"jpg": None, "png": picture(1, "PNG")},
            "has images in 'png' and not in 'jpg'.*run clipkit build-tfds without",
        ),
        ({"jpg": None, "webp": picture(1, "WEBP")}, "has images in 'webp'"),
        ({"png": picture(1, "PNG")}, "has images in 'jpg' and 'png'"),
        ({"jpg": None}, "has no images"),
        ({"txt": None, "caption": "a cat"}, "has no captions in 'txt'"),
    ],
)
def test_shards_that_need_a_copy_are_refused(tmp_path, columns, says):
    folder = made_up(tmp_path / "shards", [columns])
    with pytest.raises(UserError, match=says) as raised:
        build_in_place(folder, "pairs")
    assert "without --in-place" in str(raised.value)
    assert names(folder) == ["00000.tfrecord"]


def test_a_shard_without_records_among_others(tmp_path):
    folder = made_up(tmp_path / "shards", [{}], [], [{}])
    assert build_in_place(folder, "pairs").records == 2
    assert [shard.records for shard in open_dataset(folder).shards] == [1, 0, 1]
    with pytest.raises(UserError, match="holds no records"):
        build_in_place(made_up(tmp_path / "empty", []), "pairs")


def test_another_name_or_more_shards_are_refused(shards):
    build_in_place(shards, "laion")
    with pytest.raises(UserError, match="is a dataset already, of another name or split"):
        build_in_place(shards, "other")
    with pytest.raises(UserError, match="is a dataset already, of another name or split"):
        build_in_place(shards, "laion", split="test")
    shutil.copy(FIXTURE / "00000.tfrecord", shards / "00003.tfrecord")
    with pytest.raises(UserError, match=r"00003\.tfrecord doesn't belong to it"):
        build_in_place(shards, "laion")


def test_an_unfinished_run_is_finished_under_its_name(shards, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(in_place, "finish_dataset", stop)
    with pytest.raises(KeyboardInterrupt):
        build_in_place(shards, "laion")
    monkeypatch.undo()
    with pytest.raises(UserError, match="is being built as 'laion': finish it as it was begun"):
        build_in_place(shards, "other")
    with pytest.raises(UserError, match="isn't finished: run the same clipkit build-tfds command"):
        open_dataset(shards)
    shutil.copy(FIXTURE / "00000.tfrecord", shards / "00003.tfrecord")
    with pytest.raises(UserError, match=r"is being built with 00003\.tfrecord new in it"):
        build_in_place(shards, "laion")
    (shards / "00003.tfrecord").unlink()
    assert build_in_place(shards, "laion").records == 11


def test_shards_that_an_unfinished_run_has_renamed_are_not_left_behind(tmp_path, monkeypatch):
    folder = made_up(tmp_path, [{}], [{}], [{}])
    rename = Path.replace

    def stop(path, target):
        if path.name == "00001.tfrecord":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stop)
        build_in_place(folder, "pairs")
    with pytest.raises(UserError, match=r"pairs-train\.tfrecord-00000-of-00003 is of a build with another --name or "):
        build_in_place(folder, "pairs", split="test")
    assert build_in_place(folder, "pairs").records == 3


def test_shards_looked_at_once_are_not_read_again(shards, monkeypatch):
    looked: list[str] = []
    look = in_place_shard.scan_shard

    def counted(job):
        looked.append(job.source.name)
        return look(job)

    monkeypatch.setattr(in_place, "scan_shard", counted)
    path = shards / "00002.tfrecord"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(RecordError):
        build_in_place(shards, "laion")
    path.write_bytes(whole)
    build_in_place(shards, "laion")
    assert looked == ["00000.tfrecord", "00001.tfrecord", "00002.tfrecord", "00002.tfrecord"]


def test_a_shard_that_is_gone_in_between(shards):
    (shards / "00001.tfrecord").rename(shards / "elsewhere")
    (shards / "00001_stats.json").unlink()
    plan = shards / "clipkit" / "build-train" / "plan.json"
    plan.parent.mkdir(parents=True)
    listed = [f"{number:05d}.tfrecord" for number in range(3)]
    plan.write_text(json.dumps({"name": "laion", "in_place": listed}))
    with pytest.raises(UserError, match=r"00001\.tfrecord is gone: put it back"):
        build_in_place(shards, "laion")


@pytest.mark.parametrize(("name", "split"), [("laion-400m", "train"), ("laion", "a/b")])
def test_bad_names_get_one_line(shards, name, split):
    with pytest.raises(UserError, match="letters, digits and _ only"):
        build_in_place(shards, name, split=split)


def test_a_folder_without_shards_gets_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.tfrecord shards"):
        build_in_place(tmp_path, "laion")
    with pytest.raises(UserError, match="doesn't exist"):
        build_in_place(tmp_path / "none", "laion")


def test_a_full_disk_while_writing_anew_leaves_the_old_shards(shards, monkeypatch):
    write = RecordWriter.write

    def full(self, record):
        if self.records == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, record)

    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(UserError, match="the disk is full"):
        build_in_place(shards, "laion")
    assert names(shards) == ["00000.tfrecord", "00001.tfrecord", "00002.tfrecord"]
    monkeypatch.undo()
    assert build_in_place(shards, "laion").records == 11


def test_a_store_is_refused():
    with pytest.raises(UserError, match="shards in a store can't be renamed"):
        build_in_place(as_path("memory://shards"), "laion")


def test_the_command_says_what_it_did(shards):
    command = ["build-tfds", str(shards), "--name", "laion", "--in-place", "--workers", "1"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "11 of 11 samples" in done.stdout
    assert "2 of 3 shards rewritten" in done.stdout
    told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert (told["records"], told["built"], told["problems"]) == (11, False, {"empty-caption": 1})
    assert list(told["rewritten"]) == ["00001.tfrecord", "00002.tfrecord"]
