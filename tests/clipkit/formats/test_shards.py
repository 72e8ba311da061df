"""Which files of a folder are read: by kind, by split, from a folder within, and what is told to be left aside."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from image_shards import pair, picture, write_tar

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.folders import group_by_split
from clipkit.formats.shards import list_shards
from clipkit.train.sources.open import open_source


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        ("train-00000-of-00001.parquet test-00000-of-00001.parquet", {"train": [0], "test": [1]}),
        ("cc3m-train-0000.tar cc3m-train-0001.tar cc3m-validation-0000.tar", {"train": [0, 1], "validation": [2]}),
        ("train2017.tar val2017.tar", {"train": [0], "validation": [1]}),
        ("TrainSet.tar TestSet.tar", {"train": [0], "test": [1]}),
        ("test-tube-train-0.tar test-tube-val-0.tar", {"train": [0], "validation": [1]}),
        ("00000.tar 00001.tar val.tar", {"": [0, 1], "validation": [2]}),
        ("train-val-0.tar train-0.tar", {"validation": [0], "train": [1]}),
        ("train_a.tar train_b.tar", {}),
        ("00000.tar", {}),
        ("latest.tar contest.tar training_day.tar", {"": [0, 1], "train": [2]}),
    ],
)
def test_splits_are_told_by_the_words_that_differ(names, groups):
    found = names.split()
    assert group_by_split(found) == {split: [found[i] for i in places] for split, places in groups.items()}


def write(path: Path, caption: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        write_tar(path, [pair(0, txt=caption, json=None)])
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"image": [picture(0)], "text": [caption]}), path)
    else:
        (path.parent / "0.jpg").write_bytes(picture(0))
        path.write_text(f"file_name,text\n0.jpg,{caption}\n")


def build(folder: Path, *options: str) -> tuple[int, list[str], str]:
    """Exit code, captions and standard error of `clipkit build-tfds`."""
    out = folder.with_name(f"out-{folder.name}-{len(list(folder.parent.iterdir()))}")
    result = CliRunner().invoke(main, ["build-tfds", str(folder), str(out), "--name", "x", *options])
    if result.exit_code:
        return result.exit_code, [], result.stderr
    split = options[1] if options and options[1] != "all" else "train"
    dataset = open_dataset(out, split)
    return 0, [dataset.example(i)["txt"] for i in range(len(dataset))], result.stderr


def train(folder: Path, split: str = "train") -> list[str]:
    opened = open_source(folder, split=split)
    return [pair.caption for pair in opened.source().pairs(range(opened.num_records))]


LAYOUTS = {
    "beside each other": "{split}-00000-of-00001{suffix}",
    "in folders": "{split}/0{suffix}",
    "in folders of a folder": "data/{split}-0{suffix}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".csv"])
def test_splits_are_kept_apart(suffix, layout, tmp_path):
    folder = tmp_path / "in"
    for split in ("train", "test", "val"):
        write(folder / LAYOUTS[layout].format(split=split, suffix=suffix), f"{split}ed")
    code, captions, told = build(folder)
    assert (code, captions) == (0, ["trained"])
    assert "reading the split train; left aside: " in told
    assert build(folder, "--split", "test")[1] == ["tested"]
    assert build(folder, "--split", "validation")[1] == ["valed"]
    assert train(folder) == ["trained"]
    assert train(folder, "val") == ["valed"]
    code, _, told = build(folder, "--split", "holdout")
    assert code == 2
    assert "of which none is 'holdout': name one with --split, or take all with --split all" in told
    with pytest.raises(UserError, match="of which none is 'holdout'"):
        train(folder, "holdout")
    if suffix != ".csv" and layout != "in folders":
        assert sorted(build(folder, "--split", "all")[1]) == ["tested", "trained", "valed"]
        assert sorted(train(folder, "all")) == ["tested", "trained", "valed"]


def test_a_split_beside_files_of_none_must_be_named(tmp_path):
    for name in ("00000.tar", "00001.tar", "test.tar"):
        write(tmp_path / "in" / name, name)
    code, _, told = build(tmp_path / "in")
    assert code == 2
    assert "(others 2 files, test 1 file), of which none is 'train'" in told
    assert train(tmp_path / "in", "test") == ["test.tar"]


def test_what_is_not_read_is_told(tmp_path):
    folder = tmp_path / "in"
    write(folder / "00000.tar", "a")
    for name in ("._00000.tar", ".DS_Store", "00000.parquet", "00000_stats.json", "README.md"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert build(folder)[2].count("not read") == 0
    write(folder / "more" / "0.tar", "b")
    write(folder / "__MACOSX" / "0.tar", "c")
    for name in ("00001.tar.gz", "labels.csv", "x.jpg"):
        (folder / name).write_bytes(b"x")
    code, captions, told = build(folder)
    assert (code, captions) == (0, ["a"])
    assert f"{folder}: not read: .csv 1, .tar.gz 1, images 1, more/" in told
    opened = open_source(folder)
    assert opened.notes == [f"{folder}: not read: .csv 1, .tar.gz 1, images 1, more/"]


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".zip"])
def test_packed_shards_are_named(suffix, tmp_path):
    write(tmp_path / "0.tar", "a")
    (tmp_path / "in").mkdir()
    (tmp_path / "0.tar").rename(tmp_path / "in" / f"0{suffix}")
    code, _, told = build(tmp_path / "in")
    assert code == 2
    assert f"holds no image shards ({suffix} 1: unpack them)" in told
    with pytest.raises(UserError, match=f"nothing else to train on .{suffix} 1: unpack them"):
        train(tmp_path / "in")


def test_folders_two_levels_down_are_named(tmp_path):
    write(tmp_path / "in" / "default" / "train" / "0.tar", "a")  # as the Hub converts datasets
    code, _, told = build(tmp_path / "in")
    assert (code, "holds no image shards (1 folder: default): " in told) == (2, True)
    assert build(tmp_path / "in" / "default")[1] == ["a"]


def test_folders_that_could_all_be_meant_are_refused(tmp_path):
    write(tmp_path / "in" / "a" / "0.tar", "a")
    write(tmp_path / "in" / "b" / "0.tar", "b")
    code, _, told = build(tmp_path / "in")
    assert code == 2
    assert "holds no shards, and its folders a, b do: name one" in told


def test_tens_of_thousands_of_shards_are_listed_at_once(tmp_path):
    """LAION-400M has 41,408: what grows with their square takes minutes."""
    for number in range(41_408):
        (tmp_path / f"{'train' if number else 'test'}-{number:05d}.tar").touch()
    before = time.process_time()
    found = list_shards(tmp_path, "train", lambda folder, file: False)
    assert found is not None and len(found.files) == 41_407
    assert time.process_time() - before < 10
