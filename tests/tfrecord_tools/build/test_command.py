import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from folder_contents import contents
from hypothesis import given
from hypothesis import strategies as st
from image_shards import pair, picture, write_tar, write_tars

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.features import Feature
from clipkit.formats.kinds import fit, unify
from clipkit.formats.manifest import read_manifest
from clipkit.formats.records import RecordWriter, encode_example, index_records
from clipkit.jobs.passes import PassProgress
from clipkit.pixels import images
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.labelled.imagenet import build_imagenet

# webdataset fills a tar up to a multiple of this, so that a few small samples make one such block.
TAR_BLOCK = 10_240
ONE_TAR = TAR_BLOCK / 1e6


def test_all_good_samples_arrive_in_order_with_their_columns(tmp_path):
    tars = write_tars(tmp_path / "shards", [3, 2, 0, 4, 1])
    third = sum(tar.stat().st_size for tar in tars) / 3
    summary = build_tfds(tmp_path / "shards", tmp_path / "out", "pairs", shard_megabytes=third / 1e6)
    assert summary.path == tmp_path / "out" / "pairs" / "1.0.0"
    assert (summary.shards, summary.samples, summary.records, summary.skipped, summary.built) == (3, 10, 10, {}, True)
    dataset = open_dataset(tmp_path / "out")
    # Each sample belongs to the third of the line of bytes in which it begins: the second tar is divided.
    lengths = [shard.records for shard in dataset.shards]
    assert lengths == [4, 3, 3]
    sources = [[(s.file, s.samples) for s in shard.sources] for shard in read_manifest(dataset.path)["train"].shards]
    assert sources == [
        [("00000.tar", 3), ("00001.tar", 1)],
        [("00001.tar", 1), ("00002.tar", 0), ("00003.tar", 2)],
        [("00003.tar", 2), ("00004.tar", 1)],
    ]
    assert [dataset.example(i)["key"] for i in range(10)] == [f"{i:09d}" for i in range(10)]
    assert dataset.example(7)["jpg"] == picture(7)
    assert dataset.features == {
        "jpg": Feature("image"),
        "txt": Feature("text"),
        "height": Feature("int"),
        "width": Feature("int"),
        "key": Feature("text"),
        "url": Feature("text"),
        "similarity": Feature("float"),
    }
    offsets = np.load(dataset.path / "clipkit" / "index-train.npy")
    assert offsets.dtype == np.uint64
    assert offsets.tolist() == [o for s in dataset.shards for o in index_records(dataset.path / s.file).tolist()]
    info = json.loads((dataset.path / "dataset_info.json").read_text())
    assert info["splits"][0]["shardLengths"] == [str(length) for length in lengths]
    assert int(info["splits"][0]["numBytes"]) == sum((dataset.path / s.file).stat().st_size for s in dataset.shards)
    assert not list(dataset.path.rglob("build-*"))
    assert re.match(r"10 of 10 samples, [\d.]+ kB in \d shards?: split train of ", summary.text())
    assert "skipped" not in summary.text()


def test_what_cannot_be_used_is_counted_by_reason_and_named(tmp_path):
    write_tar(
        tmp_path / "shards" / "00000.tar",
        [
            pair(0),
            pair(1, txt="  \n"),
            pair(2, txt="nan", json={"caption": None}),
            pair(3, jpg=b"<html>gone</html>"),
            pair(4, jpg=b""),
            pair(5, jpg=picture(5)[:-9]),
            pair(6, jpg=None),
            pair(7, txt=None, json=None),
            pair(8, json=b"{"),
            pair(9, txt=b"\xff"),
            pair(10, jpg=b"II*\x00 and no more of a TIFF"),
        ],
    )
    write_tar(tmp_path / "shards" / "00001.tar", [pair(11), pair(12, jpg=None)])
    summary = build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    assert summary.skipped == {
        "empty-caption": 2,
        "metadata-not-json": 1,
        "no-caption": 1,
        "no-image": 2,
        "not-an-image": 3,
        "not-utf-8": 1,
        "truncated": 1,
    }
    assert (summary.samples, summary.records) == (13, 2)
    manifest = read_manifest(summary.path)["train"]
    for source in manifest.shards[0].sources:
        assert source.samples == source.records + sum(source.skipped.values())
    assert [source.samples for source in manifest.shards[0].sources] == [11, 2]
    skipped = [json.loads(line) for line in (summary.path / "clipkit" / "skipped-train.jsonl").read_text().splitlines()]
    assert len(skipped) == 11
    assert "no-image 2, not-an-image 3" in summary.text()
    assert json.loads(json.dumps(summary.to_json()))["skipped"] == summary.skipped
    assert skipped[-1] == {"source": "00001.tar", "key": "000000012", "reason": "no-image"}


def test_a_truncated_image_with_a_whole_thumbnail_is_truncated(tmp_path):
    image, thumbnail = picture(1, size=64), picture(2)
    exif = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    image = image[:2] + exif + image[2:]
    write_tar(tmp_path / "0.tar", [pair(0, jpg=image), pair(1, jpg=image[:-9]), pair(2, jpg=picture(2, "PNG")[:-9])])
    summary = build_tfds(tmp_path / "0.tar", tmp_path / "out", "pairs")
    assert (summary.records, summary.skipped) == (1, {"truncated": 2})


def test_images_that_tfds_cannot_decode_become_jpegs(tmp_path):
    formats = ("JPEG", "PNG", "WEBP", "GIF", "TIFF")
    write_tar(tmp_path / "0.tar", [pair(i, jpg=picture(i, name, 64)) for i, name in enumerate(formats)])
    summary = build_tfds(tmp_path / "0.tar", tmp_path / "out", "pairs")
    assert (summary.formats, summary.converted) == ({"jpeg": 4, "png": 1}, {"gif": 1, "tiff": 1, "webp": 1})
    dataset = open_dataset(tmp_path / "out")
    for i, name in enumerate(formats):
        stored = dataset.example(i)["jpg"]
        if name in ("JPEG", "PNG"):
            assert stored == picture(i, name, 64)
        else:
            assert stored.startswith(b"\xff\xd8")
            difference = images.decode(stored).astype(int) - images.decode(picture(i, name, 64))
            assert np.abs(difference).mean() < 2


def test_kinds_are_unified_over_all_shards(tmp_path):
    columns = [
        [{"n": 1, "x": 1, "mixed": 1, "big": 1, "late": None, "deep": [1]}, {"n": None, "x": 2, "flag": True}],
        [{"n": None, "x": 0.5, "mixed": "a", "big": 2**64, "deep": {"a": 1}}],
        [{"n": 3, "x": None, "mixed": None, "late": float("nan"), "flag": False, "half": "\ud83d", "never": None}],
    ]
    number = iter(range(9))
    for i, shard in enumerate(columns):
        write_tar(tmp_path / "shards" / f"{i}.tar", [pair(next(number), json=extra) for extra in shard])
    summary = build_tfds(tmp_path / "shards", tmp_path / "out", "pairs", shard_megabytes=ONE_TAR)
    assert summary.shards > 1
    dataset = open_dataset(tmp_path / "out")
    names = ("n", "x", "mixed", "big", "deep", "flag", "half")
    assert {name: dataset.features[name] for name in names} == {
        "n": Feature("int", optional=True),
        "x": Feature("float", optional=True),
        "mixed": Feature("text", optional=True),
        "big": Feature("text", optional=True),
        "deep": Feature("text", optional=True),
        "flag": Feature("int", optional=True),  # not bool: TFDS would read a missing one as False
        "half": Feature("text", optional=True),
    }
    assert not {"late", "never"} & set(dataset.features)
    values = [tuple(dataset.example(i)[name] for name in names) for i in range(4)]
    assert values == [
        (1, 1.0, "1", "1", "[1]", None, None),
        (None, 2.0, None, None, None, 1, None),
        (None, 0.5, "a", str(2**64), '{"a": 1}', None, None),
        (3, None, None, None, None, 0, "?"),
    ]


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers()))


@given(st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), max_size=6), st.randoms())
def test_kinds_do_not_depend_on_the_order_of_shards(records, random):
    def kinds_of(records):
        from clipkit.formats.kinds import KindWidenedError

        kinds: dict[str, str] = {}
        while True:
            try:
                for record in records:
                    encode_example(fit(record, kinds, {}))
            except (KindWidenedError, UnicodeEncodeError) as error:
                if isinstance(error, UnicodeEncodeError):
                    return None
                kinds = error.kinds
            else:
                return dict(sorted(kinds.items()))

    whole = kinds_of(records)
    shuffled = random.sample(records, len(records))
    assert kinds_of(shuffled) == whole
    if whole is not None:
        half = len(records) // 2
        assert unify([kinds_of(records[half:]), kinds_of(records[:half])]) == whole


def test_unify_knows_the_order_of_kinds():
    for kinds, expected in [
        (("bool", "int"), "int"),
        (("int", "bool", "float"), "float"),
        (("float", "text"), "text"),
        (("list of int", "list of nothing", "list of float"), "list of float"),
        (("list of int", "int"), "text"),
        (("list of text", "text"), "text"),
    ]:
        for order in permutations(kinds):
            assert unify([{"a": kind} for kind in order]) == {"a": expected}


def test_workers_change_nothing(tmp_path):
    write_tars(tmp_path / "shards", [2, 3, 1])
    one = build_tfds(tmp_path / "shards", tmp_path / "one", "pairs", workers=1, shard_megabytes=2 * ONE_TAR)
    seen: list[PassProgress] = []
    build_tfds(
        tmp_path / "shards", tmp_path / "two", "pairs", workers=2, progress=seen.append, shard_megabytes=2 * ONE_TAR
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert [(p.label, p.jobs_done) for p in seen] == [("build-tfds", n) for n in (0, 1, 2, 3)]
    assert (seen[-1].counts["records"], seen[-1].done) == (one.records, seen[-1].total)


# The shards differ in the kind of one column, so that the second pass over them is killed too.
KILLED = """
import json, sys
from pathlib import Path
from clipkit.tfrecord_tools.build.command import build_tfds
from killed_builds import kill_at_each_rename

shards, out, OPTIONS = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

def build():
    summary = build_tfds(shards, out, "pairs", progress=lambda now: None, shard_megabytes=0.01024, **OPTIONS)
    return summary.records, summary.skipped

kill_at_each_rename(build, out, least=14)
"""


@pytest.mark.parametrize("options", [{}, {"dedup": "caption", "shuffle": 3, "split": "train=0.7,test=0.3"}])
def test_killed_at_any_rename_the_same_command_ends_with_the_same_bytes(tmp_path, options):
    write_tar(tmp_path / "shards" / "0.tar", [pair(0), pair(1, jpg=None)])
    write_tar(tmp_path / "shards" / "1.tar", [pair(2, json={"width": 1.5})])
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            KILLED,
            str(tmp_path / "shards"),
            str(tmp_path / "out"),
            json.dumps(options),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2] / "support",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "the same\n"


def test_a_damaged_shard_stops_the_build_and_mended_it_goes_on(tmp_path):
    tars = write_tars(tmp_path / "shards", [2, 2])
    good = tars[1].read_bytes()
    tars[1].write_bytes(good[:12_000])
    with pytest.raises(UserError, match=r"00001\.tar: damaged tar at byte"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs", shard_megabytes=1.6 * ONE_TAR)
    version = tmp_path / "out" / "pairs" / "1.0.0"
    assert [path.name for path in version.iterdir() if path.is_file()] == ["pairs-train.tfrecord-00000-of-00002"]
    first = (version / "pairs-train.tfrecord-00000-of-00002").stat()
    with pytest.raises(UserError, match="isn't finished"):
        open_dataset(tmp_path / "out")
    tars[1].write_bytes(good)
    build_tfds(tmp_path / "shards", tmp_path / "out", "pairs", shard_megabytes=1.6 * ONE_TAR)
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.example(i)["key"] for i in range(4)] == [f"{i:09d}" for i in range(4)]
    # The cuts stay, so what doesn't touch the mended shard needn't be written again.
    assert (version / "pairs-train.tfrecord-00000-of-00002").stat().st_ino == first.st_ino


def test_a_shard_that_was_fetched_anew_is_built_anew(tmp_path):
    tars = write_tars(tmp_path / "shards", [2, 2])
    good = tars[1].read_bytes()
    tars[1].write_bytes(good[:12_000])
    with pytest.raises(UserError, match=r"00001\.tar: damaged tar"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs", shard_megabytes=1.6 * ONE_TAR)
    tars[1].write_bytes(good)
    write_tar(tars[0], [pair(10 + i) for i in range(5)])
    build_tfds(tmp_path / "shards", tmp_path / "out", "pairs", shard_megabytes=1.6 * ONE_TAR)
    dataset = open_dataset(tmp_path / "out")
    assert [int(dataset.example(i)["key"]) for i in range(len(dataset))] == [10, 11, 12, 13, 14, 2, 3]


def test_a_damaged_tfrecord_stops_the_build(tmp_path):
    (tmp_path / "shards").mkdir()
    path = tmp_path / "shards" / "00000.tfrecord"
    with RecordWriter(path) as writer:
        writer.write(encode_example({"jpg": picture(), "txt": "words"}))
        second = writer.write(encode_example({"jpg": picture(), "txt": "words"}))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"00000\.tfrecord: the file ends inside a record, record at byte {second}"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    assert not list((tmp_path / "out").rglob("*tfrecord*"))


def test_built_already_is_left_alone(tmp_path):
    write_tars(tmp_path / "shards", [2])
    first = build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    times = {path: path.stat().st_mtime_ns for path in first.path.rglob("*") if path.is_file()}
    second = build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    assert (second.built, second.records) == (False, first.records)
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert {path.name for path in changed} <= {".lock"}
    write_tars(tmp_path / "shards", [2, 1])
    with pytest.raises(UserError, match="already holds a split 'train' made from other shards"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    next(first.path.glob("*tfrecord*")).unlink()
    (tmp_path / "shards" / "00001.tar").unlink()
    with pytest.raises(UserError, match="is missing"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")


def test_an_unfinished_build_of_other_shards_is_not_mixed_in(tmp_path):
    tars = write_tars(tmp_path / "shards", [2])
    good = tars[0].read_bytes()
    tars[0].write_bytes(good[:1000])
    with pytest.raises(UserError, match="damaged"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    tars[0].rename(tars[0].with_name("other.tar")).write_bytes(good)
    with pytest.raises(UserError, match=r"build-train holds a build begun from other shards: remove"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")


def test_a_second_split_joins_and_one_that_does_not_fit_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [pair(0), pair(1)])
    write_tar(tmp_path / "b.tar", [pair(2, json={"rating": 4})])
    write_tar(tmp_path / "c.tar", [pair(3, json={"width": "wide"})])
    build_tfds(tmp_path / "a.tar", tmp_path / "out", "pairs")
    build_tfds(tmp_path / "b.tar", tmp_path / "out", "pairs", split="test")
    train, test = open_dataset(tmp_path / "out"), open_dataset(tmp_path / "out", "test")
    assert (len(train), len(test)) == (2, 1)
    assert train.features == test.features
    assert test.features["rating"] == Feature("int", optional=True)
    assert [train.example(0)["rating"], test.example(0)["rating"]] == [None, 4]
    with pytest.raises(UserError, match="column 'width' is text in these shards and int in the dataset's other splits"):
        build_tfds(tmp_path / "c.tar", tmp_path / "out", "pairs", split="odd")
    assert len(open_dataset(tmp_path / "out")) == 2


def test_bad_arguments_get_one_line(tmp_path):
    tars = write_tars(tmp_path / "shards", [1])
    for arguments, message in [
        ({"name": "my-data"}, "dataset name 'my-data'.*choose"),
        ({"name": "pairs", "split": "a/b"}, "split 'a/b'"),
        ({"name": "pairs", "shard_megabytes": 0}, "at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            build_tfds(tmp_path / "shards", tmp_path / "out", **arguments)
    with pytest.raises(UserError, match="don't exist"):
        build_tfds(tmp_path / "absent", tmp_path / "out", "pairs")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        build_tfds(tmp_path / "shards", tars[0], "pairs")


def test_a_dataset_is_not_built_onto_itself(tmp_path, monkeypatch):
    write_tars(tmp_path / "shards", [2])
    made = build_tfds(tmp_path / "shards", tmp_path / "out", "pairs").path
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    for source in (made, Path("out/pairs/1.0.0"), made / ".." / "1.0.0", Path("out"), next(made.glob("*.tfrecord*"))):
        for split in ("train", "validation"):
            with pytest.raises(UserError, match="the dataset itself is the source: choose another --name or output"):
                build_tfds(source, tmp_path / "out", "pairs", split=split, dedup="sha256")
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_shards_without_one_good_sample_are_an_error(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", [pair(0, jpg=None), pair(1, txt=" ")])
    with pytest.raises(UserError, match=r"no sample of .* can be used .1 × empty-caption, .*--caption-column"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    with pytest.raises(UserError, match="isn't finished"):
        open_dataset(tmp_path / "out")


def test_another_dataset_of_the_name_is_not_overwritten(tmp_path):
    write_tars(tmp_path / "shards", [1])
    version = tmp_path / "out" / "pairs" / "1.0.0"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text(json.dumps({"name": "pairs", "splits": [{"name": "train"}]}))
    with pytest.raises(UserError, match="a dataset that clipkit didn't write"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")


def test_no_split_joins_labelled_images(tmp_path):
    write_tars(tmp_path / "shards", [1])
    (tmp_path / "labelled" / "cat").mkdir(parents=True)
    (tmp_path / "labelled" / "cat" / "1.jpg").write_bytes(picture(1))
    made = build_imagenet(tmp_path / "labelled", tmp_path / "out", name="pairs").path
    before = contents(made)
    with pytest.raises(UserError, match="holds a dataset without captions: choose another output or --name"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs", split="test")
    assert contents(made) == before


# As TFDS leaves it, and as Hugging Face's save_to_disk does.
@pytest.mark.parametrize("splits", [[{"name": "train"}], ["train"], {"train": {"name": "train"}}, {}, None])
def test_a_refused_dataset_stays_as_it_is(tmp_path, splits):
    write_tars(tmp_path / "shards", [1])
    version = tmp_path / "out" / "pairs" / "1.0.0"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text(json.dumps({"splits": splits}))
    (version / ".notes.txt.12").write_text("mine")
    before = contents(version)
    with pytest.raises(UserError, match="a dataset that clipkit didn't write"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    assert contents(version) == before


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    write_tars(tmp_path / "shards", [1])
    version = tmp_path / "out" / "pairs" / "1.0.0"
    version.mkdir(parents=True)
    for name in (".gitignore", ".snapshot", ".features.json.471100000000000"):
        (version / name).write_text("")
    (version / "clipkit").mkdir()
    (version / "clipkit" / ".index-train.npy.471100000000000").write_text("half")
    build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    assert {path.name for path in version.rglob(".*")} == {".gitignore", ".snapshot", ".lock"}


def test_two_builds_do_not_share_a_folder(tmp_path):
    write_tars(tmp_path / "shards", [1])
    folder = tmp_path / "out" / "pairs" / "1.0.0" / "clipkit"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another clipkit"):
            build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    assert build_tfds(tmp_path / "shards", tmp_path / "out", "pairs").records == 1


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, monkeypatch):
    write_tars(tmp_path / "shards", [3])
    write = RecordWriter.write

    def full(self, record):
        if self.records == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, record)

    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(UserError, match="the disk is full"):
        build_tfds(tmp_path / "shards", tmp_path / "out", "pairs")
    assert not list((tmp_path / "out").rglob("*tfrecord*"))
    monkeypatch.setattr(RecordWriter, "write", write)
    assert build_tfds(tmp_path / "shards", tmp_path / "out", "pairs").records == 3
