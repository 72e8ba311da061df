"""Folders as people have them through build-imagenet: splits in any spelling, empty classes, odd files."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from image_shards import picture
from labelled_sources import tar_of, write_class_folders, write_heap

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.tfrecord_tools.labelled.imagenet import LabelledSummary, build_imagenet
from clipkit.tfrecord_tools.labelled.listing import find_splits

TWO = {"cat": {"1.jpg": picture(1)}, "dog": {"1.jpg": picture(2)}}


def build(source: Path, **options) -> LabelledSummary:
    return build_imagenet(source, source.parent / "out", name="x", **options)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("Train", "Test"), ["train", "test"]),
        (("training", "testing"), ["train", "test"]),
        (("seg_train", "seg_test"), ["train", "test"]),
        (("train", "valid", "test"), ["train", "validation", "test"]),
        (("TRAIN", "dev"), ["train", "validation"]),
        (("seg_train/seg_train", "seg_test/seg_test"), ["train", "test"]),
        (("wrap/Train", "wrap/Val"), ["train", "validation"]),
    ],
)
def test_splits_in_any_spelling(tmp_path, names, splits) -> None:
    for name in names:
        write_class_folders(tmp_path / "data" / name, TWO)
    (tmp_path / "data" / "meta").mkdir()
    (tmp_path / "data" / "meta" / "classes.txt").write_text("cat")
    summary = build(tmp_path / "data")
    assert [(split.split, split.records) for split in summary.splits] == [(name, 2) for name in splits]
    assert open_dataset(summary.path, splits[0]).label_names() == ["cat", "dog"]
    assert any("left aside" in note and "meta" in note for note in summary.notes)


def test_one_split_by_its_folders_name_or_its_own(tmp_path) -> None:
    for name in ("Train", "Valid"):
        write_class_folders(tmp_path / "data" / name, TWO)
    for given in ("Valid", "valid", "validation", "val"):
        assert [split.split for split in find_splits(tmp_path / "data", given)] == ["validation"]


def test_a_class_that_holds_only_folders_is_refused(tmp_path) -> None:
    write_class_folders(tmp_path / "data" / "indoor", TWO)
    write_class_folders(tmp_path / "data" / "outdoor", TWO)
    with pytest.raises(UserError, match=r"indoor holds 2 folders \(cat, dog\)"):
        build(tmp_path / "data")


def test_an_unlabelled_test_set_is_left_aside_and_told(tmp_path) -> None:
    write_class_folders(tmp_path / "data" / "train", TWO)
    write_heap(tmp_path / "data" / "test", {"1.jpg": picture(3)})
    summary = build(tmp_path / "data")
    assert [split.split for split in summary.splits] == ["train"]
    assert any("test: left aside" in note for note in summary.notes)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no files"),
        ({"a.heic": b"x", "b.HEIC": b"x", "n.txt": b"x"}, r"\.heic 2, \.txt 1"),
        ({".a.jpg": b"x"}, "no"),
    ],
)
def test_an_empty_class_stops_the_build_or_keeps_its_number(tmp_path, files, says) -> None:
    source = write_class_folders(tmp_path / "data", {"ant": TWO["cat"], "bee": files, "cow": TWO["dog"]})
    with pytest.raises(UserError, match=rf"the class 'bee' has no images .*{says}.*give --allow-empty-classes"):
        build(source)
    assert not (tmp_path / "out").exists()
    summary = build(source, allow_empty_classes=True)
    dataset = open_dataset(summary.path)
    assert dataset.label_names() == ["ant", "bee", "cow"]
    assert {row["file_name"]: row["label"] for row in map(dataset.example, range(2))} == {
        "ant/1.jpg": 0,
        "cow/1.jpg": 2,
    }
    assert any("'bee' has no images" in note for note in summary.notes)


def test_an_empty_class_tar_stops_the_build_too(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    for name, files in (("ant", TWO["cat"]), ("bee", {"notes.txt": b"x"})):
        (tmp_path / "data" / f"{name}.tar").write_bytes(tar_of(files))
    with pytest.raises(UserError, match=r"the class 'bee' has no images .*\.txt 1"):
        build(tmp_path / "data")


def test_a_class_that_another_split_fills_is_not_empty(tmp_path) -> None:
    write_class_folders(tmp_path / "data" / "train", TWO)
    write_class_folders(tmp_path / "data" / "val", {"cat": {}, "dog": TWO["dog"]})
    summary = build(tmp_path / "data")
    assert open_dataset(summary.path, "validation").label_names() == ["cat", "dog"]


def test_files_left_aside_are_counted_by_suffix_and_told(tmp_path) -> None:
    source = write_class_folders(
        tmp_path / "data",
        {
            "cat": {"1.jpg": picture(1), "2.heic": b"x", "3.heic": b"x", "notes.txt": b"x", "._1.jpg": b"x"},
            "dog": {"1.jpg": picture(2), "README": b"x"},
        },
    )
    (source / "classes.csv").write_text("cat")
    (source / "lone.jpg").write_bytes(picture(4))
    (source / "cat" / "gone.jpg").symlink_to("/nonexistent.jpg")
    write_heap(source / "cat" / "album.jpg", {"4.jpg": picture(5)})
    write_heap(source / "__MACOSX" / "cat", {"1.jpg": b"x"})
    write_heap(source / "cat" / "@eaDir", {"1.jpg": b"x"})
    write_heap(tmp_path / "elsewhere", {"1.jpg": picture(6)})
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    summary = build(source)
    dataset = open_dataset(summary.path)
    assert dataset.label_names() == ["cat", "dog", "linked"]
    assert {row["file_name"] for row in map(dataset.example, range(len(dataset)))} == {
        *("cat/1.jpg", "cat/album.jpg/4.jpg", "dog/1.jpg", "linked/1.jpg"),
    }
    assert (
        "train: files left aside: .csv 1, .heic 2, .txt 1, broken link 1, image beside the class folders 1, "
        "without suffix 1"
    ) in summary.notes


def test_names_that_are_not_utf8_are_written_with_an_escape(tmp_path) -> None:
    source = write_class_folders(tmp_path / "data", TWO)
    (source / "cat" / "1.jpg").rename(source / "cat" / os.fsdecode(b"caf\xe9.jpg"))
    (source / "dog").rename(source / os.fsdecode(b"ch\xe8vre"))
    dataset = open_dataset(build(source).path)
    assert {row["file_name"] for row in map(dataset.example, range(2))} == {r"cat/caf\xe9.jpg", r"ch\xe8vre/1.jpg"}
    assert dataset.label_names() == ["cat", r"ch\xe8vre"]


def test_a_broken_image_with_such_a_name_is_named(tmp_path) -> None:
    source = write_class_folders(tmp_path / "data", TWO)
    Path(os.fsdecode(bytes(source / "cat") + b"/caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"cat/caf\\xe9\.jpg \("):
        build(source)
    assert build(source, max_bad=1).splits[0].records == 2


def test_the_command_takes_the_option(tmp_path) -> None:
    source = write_class_folders(tmp_path / "data", {**TWO, "bee": {}})
    command = ["build-imagenet", str(source), str(tmp_path / "out"), "--name", "x"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1].startswith("Error: the class 'bee' has no images")
    assert CliRunner().invoke(main, [*command, "--allow-empty-classes"]).exit_code == 0
