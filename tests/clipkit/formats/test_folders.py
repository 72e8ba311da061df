"""Which folders are splits, which are classes, which files are images: the rule of build, train and zeroshot."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipkit.errors import UserError
from clipkit.formats.folders import (
    SPLIT_WORDS,
    choose_split,
    class_folders,
    common_split,
    find_layout,
    list_images,
    printable,
    split_of,
)
from clipkit.formats.tables import IMAGE_SUFFIXES
from clipkit.pixels.images import FORMATS


def tree(root: Path, *files: str) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"x")
        else:
            path.mkdir(exist_ok=True)
    return root


def test_image_suffixes_are_those_of_the_formats_that_are_decoded() -> None:
    Image.init()
    assert {suffix[1:] for suffix, name in Image.registered_extensions().items() if name in FORMATS} == IMAGE_SUFFIXES


WORDS = [(word, split) for split, words in SPLIT_WORDS.items() for word in words]


@given(
    st.sampled_from(WORDS),
    st.sampled_from([str.lower, str.upper, str.title]),
    st.sampled_from(["{}", "seg_{}", "{}_set", "{}-images", "{}2017", "{} data", "images.{}", "{}_224"]),
)
def test_names_of_splits_in_any_case_and_spelling(word, case, around) -> None:
    assert split_of(around.format(case(word[0]))) == word[1]


@pytest.mark.parametrize(
    ("name", "split"),
    [("TrainSet", "train"), ("trainingset", "train"), ("testset", "test"), ("ValidationData", "validation")]
    + [(name, None) for name in ("bullet train", "test_tube", "trainer", "dog", "train_station", "train-test", "7")],
)
def test_other_names(name, split) -> None:
    assert split_of(name) == split


SPLITS = {
    "lower": (["train/a/1.jpg", "valid/a/1.jpg", "test/a/1.jpg"], {"train", "validation", "test"}),
    "title": (["Train/a/1.jpg", "Train/b/1.jpg", "Test/a/1.jpg"], {"train", "test"}),
    "words": (["training/a/1.jpg", "testing/a/1.jpg", "testing/b/1.jpg"], {"train", "test"}),
    "fillers": (["seg_train/a/1.jpg", "seg_train/b/1.jpg", "seg_test/a/1.jpg"], {"train", "test"}),
    "twice": (["seg_train/seg_train/a/1.jpg", "seg_train/seg_train/b/1.jpg", "seg_test/seg_test/a/1.jpg"], None),
    "prefix": (
        ["set1_train/a/1.jpg", "set1_train/b/1.jpg", "set1_test/a/1.jpg", "set1_test/b/2.png"],
        None,
    ),
    "annotations": (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "annotations/a.png"], None),
    "meta": (["Train/a/1.jpg", "Test/a/1.jpg", "meta/classes.txt"], None),
    "hidden": (["train/a/1.jpg", "test/a/1.jpg", "__MACOSX/train/a/1.jpg", ".git/x/1.jpg", "@eaDir/y/1.jpg"], None),
    "wrapped": (["set/train/a/1.jpg", "set/train/b/1.jpg", "set/test/a/1.jpg", "set/README.md"], None),
    "wrapped twice": (["x/set/train/a/1.jpg", "x/set/train/b/1.jpg", "x/set/test/a/1.jpg", "docs/a.txt"], None),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_folders_of_splits(tmp_path, kind) -> None:
    files, splits = SPLITS[kind]
    layout = find_layout(tree(tmp_path / "data", *files))
    assert set(layout.splits) == (splits or set(layout.splits) & {"train", "validation", "test"})
    assert len(layout.splits) >= 2
    assert {folder.name for folder in class_folders(layout.splits["train"])} <= {"a", "b"}


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (["train/1.jpg", "test/1.jpg", "exam/1.jpg"], ["exam", "test", "train"]),
        (["train/1.jpg", "bus/1.jpg"], ["bus", "train"]),
        (["set/a/1.jpg", "set/b/1.jpg"], ["a", "b"]),
        (["a/images/1.jpg", "a/boxes.txt", "b/images/1.jpg"], ["a", "b"]),
        (["a/1.jpg", "a/deep/2.jpg", "b/deep/deeper/1.jpg"], ["a", "b"]),
        (["a/1.jpg", "b/notes.txt", "c/"], ["a", "b", "c"]),
    ],
)
def test_folders_of_classes(tmp_path, files, classes) -> None:
    layout = find_layout(tree(tmp_path / "data", *files))
    assert not layout.splits
    assert [folder.name for folder in class_folders(layout.root)] == classes


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["noise/1/a/1.jpg", "noise/2/a/1.jpg", "blur/1/a/1.jpg", "blur/2/a/1.jpg"], r"blur holds 2 folders \(1, 2\)"),
        (["cat/1.jpg", "birds/wren/1.jpg", "birds/owl/1.jpg"], r"birds holds 2 folders \(owl, wren\)"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "cat/1.jpg"],
            r"splits \(train\) beside others: cat holds images",
        ),
        (["val/a/1.jpg", "val/b/1.jpg", "valid/a/1.jpg"], "two folders of the split validation, val and valid"),
    ],
)
def test_what_could_be_both_is_refused_with_what_was_found(tmp_path, files, says) -> None:
    with pytest.raises(UserError, match=says) as caught:
        class_folders(find_layout(tree(tmp_path / "data", *files)).root)
    assert "\n" not in str(caught.value)


def test_images_of_a_folder_and_what_is_left_aside(tmp_path) -> None:
    tree(tmp_path, "a.JPG", "b.ppm", "deep/c.jfif", "x.png/d.png", "e.heic", "README", "notes.txt", "more/notes.TXT")
    tree(tmp_path, "._a.jpg", ".ipynb_checkpoints/a.jpg", "__MACOSX/a.jpg", "@eaDir/a.jpg", "Thumbs.db", ".DS_Store")
    tree(tmp_path.parent / "elsewhere", "1.jpg")
    (tmp_path / "linked").symlink_to(tmp_path.parent / "elsewhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to("/nonexistent.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    listing = list_images(tmp_path)
    assert [image.name for image in listing.images] == [
        *("a.JPG", "b.ppm", "deep/c.jfif", "linked/1.jpg", "x.png/d.png"),
    ]
    assert dict(listing.aside) == {
        ".heic": 1,
        ".txt": 2,
        "without suffix": 1,
        "broken link": 1,
        "not a file": 1,
        "link to a folder around it": 1,
    }


def test_names_that_are_not_utf8_can_be_written(tmp_path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")).write_bytes(b"x")
    (image,) = list_images(tmp_path).images
    assert printable(image.name) == r"caf\xe9.png"
    assert printable("café.png") == "café.png"


def test_a_split_that_is_asked_for_may_stand_beside_other_folders(tmp_path):
    """Intel's scenes: `seg_pred` holds images without classes."""
    for name in ("seg_train/cat/1.jpg", "seg_train/dog/1.jpg", "seg_test/cat/1.jpg", "seg_pred/1.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="beside others: seg_pred holds images: name one with --split"):
        find_layout(tmp_path)
    layout = find_layout(tmp_path, split="train")
    assert layout.splits["train"] == tmp_path / "seg_train"
    assert "left aside: seg_pred" in layout.notes[0]
    with pytest.raises(UserError, match="beside others"):
        find_layout(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("names", "asked", "chosen"),
    [
        (["train", "validation"], None, "validation"),
        (["train", "val", "test"], None, "val"),
        (["train", "test"], None, "test"),
        (["Training"], None, "Training"),
        (["train", "val"], "validation", "val"),
        (["train", "validation"], "dev", "validation"),
        (["train", "fold_1"], "fold_1", "fold_1"),
        (["train", "fold_1"], "test", None),
        (["fold_1", "fold_2"], None, None),
    ],
)
def test_the_split_that_is_evaluated_on(names, asked, chosen) -> None:
    assert choose_split(names, asked) == chosen


@pytest.mark.parametrize(
    ("names", "split"),
    [("test-0.tar test-1.tar", "test"), ("0.tar 1.tar", ""), ("test-0.tar train-1.tar", ""), ("train-val.tar", "")],
)
def test_the_split_that_all_names_say(names, split) -> None:
    assert common_split(names.split()) == split
