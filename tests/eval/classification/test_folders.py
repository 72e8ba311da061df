"""Image folders given to zeroshot: splits, classes and images by the rule of building, and nothing in silence."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.errors import UserError
from clipkit.eval.classification.images import LabelledImages
from clipkit.eval.classification.labelled import open_labelled
from clipkit.pixels.images import ImageError


def tree(root: Path, *files: str) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(name.encode())
    return root


def classes_of(images: LabelledImages) -> list[str]:
    return [images.label_names[number] for number in images.labels_N]


SPLITS = {
    "roboflow": (["train", "valid", "test"], "valid"),
    "title": (["Train", "Test"], "Test"),
    "words": (["training", "testing"], "testing"),
    "train only": (["training"], "training"),
    "fillers": (["seg_train", "seg_test"], "seg_test"),
    "upper": (["TRAIN", "VAL"], "VAL"),
}


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("beside", ["", "annotations/x.json", "wrapped"])
def test_splits_are_no_classes(tmp_path: Path, kind: str, beside: str) -> None:
    folders, taken = SPLITS[kind]
    root = tmp_path / "set" / "data" if beside == "wrapped" else tmp_path / "set"
    tree(root, *(f"{folder}/{name}/{folder}.png" for folder in folders for name in ("cat", "dog")))
    if beside and beside != "wrapped":
        tree(root, beside)
    images = open_labelled(tmp_path / "set")
    assert images.name == f"set-{taken}"
    assert images.label_names == ("cat", "dog")
    assert images.keys == [f"cat/{taken}.png", f"dog/{taken}.png"]
    for folder in folders:
        assert open_labelled(tmp_path / "set", split=folder).keys[0] == f"cat/{folder}.png"
    assert bool(images.notes) == bool(beside)


def test_a_split_by_another_spelling(tmp_path: Path) -> None:
    tree(tmp_path / "set", "Training/a/1.png", "Training/b/1.png", "valid/a/1.png", "valid/b/1.png")
    assert open_labelled(tmp_path / "set", split="train").name == "set-Training"
    assert open_labelled(tmp_path / "set", split="validation").name == "set-valid"
    with pytest.raises(UserError, match=r"has no split 'test': it has train, validation \(option --split\)"):
        open_labelled(tmp_path / "set", split="test")
    with pytest.raises(UserError, match=r"has no split 'test': it has no split folders"):
        open_labelled(tmp_path / "set" / "valid", split="test")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["noise/1/a/1.png", "noise/2/a/1.png", "blur/1/a/1.png", "blur/2/a/1.png"], "blur holds 2 folders"),
        (["train/a/1.png", "train/b/1.png", "cat/1.png"], "name one with --split"),
        (["a/1.png", "b/notes.txt", "b/x.heic"], r"class 'b' has no images \(.*b has .heic 1, .txt 1\).*--allow-empty"),
        (["a/1.png", "b/", "c/"], r"2 classes have no images, such as 'b' \(.*b has no files\)"),
        (["a/notes.txt"], r"no class folders with images \(.txt 1\)"),
        (["1.png"], r"no class folders with images \(image beside the class folders 1\)"),
        ([], "no class folders with images: give"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, files: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_labelled(tree(tmp_path, *files))
    assert "\n" not in str(caught.value)


def test_an_empty_class_keeps_its_place_when_allowed(tmp_path: Path) -> None:
    tree(tmp_path, "ant/1.png", "bee/notes.txt", "cat/1.png")
    images = open_labelled(tmp_path, allow_empty_classes=True)
    assert images.label_names == ("ant", "bee", "cat")
    assert images.labels_N.tolist() == [0, 2]
    assert "the class 'bee' has no images" in images.notes[0]


def test_hidden_files_are_passed_over_and_others_told(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "a/2.ppm", "a/3.jfif", "a/x.png/4.png", "a/deep/5.JPG", "a/notes.txt", "b/1.png")
    tree(tmp_path, "a/.ipynb_checkpoints/1.png", "a/._1.png", "a/@eaDir/1.png", "__MACOSX/a/1.png", ".git/x/1.png")
    tree(tmp_path.parent / "other-disk", "6.png")
    (tmp_path / "b" / "linked").symlink_to(tmp_path.parent / "other-disk")
    (tmp_path / "b" / "gone.png").symlink_to("/nonexistent.png")
    (tmp_path / "c").symlink_to(tmp_path.parent / "other-disk")
    images = open_labelled(tmp_path)
    assert images.keys == [
        *("a/1.png", "a/2.ppm", "a/3.jfif", "a/deep/5.JPG", "a/x.png/4.png"),
        *("b/1.png", "b/linked/6.png", "c/6.png"),
    ]
    assert classes_of(images) == ["a"] * 5 + ["b"] * 2 + ["c"]
    assert images.notes == (f"{tmp_path}: files left aside: .txt 1, broken link 1",)
    assert len(list(images.read())) == 8


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for name in (b"caf\xe9/1.png", b"dog/na\xefve.png"):
        path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
        path.parent.mkdir()
        path.write_bytes(b"x")
    images = open_labelled(tmp_path)
    assert images.keys == [r"caf\xe9/1.png", r"dog/na\xefve.png"]
    assert images.label_names == (r"caf\xe9", "dog")
    assert list(images.read()) == [b"x", b"x"]


def test_the_folder_that_one_stands_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "set", "a/1.png", "b/1.png")
    monkeypatch.chdir(tmp_path / "set" / "a")
    assert open_labelled(Path("..")).name == "set"
    monkeypatch.chdir(tmp_path / "set")
    assert open_labelled(Path()).name == "set"


def test_a_file_that_goes_away_is_an_unreadable_image(tmp_path: Path) -> None:
    images = open_labelled(tree(tmp_path, "a/1.png", "b/1.png"))
    (tmp_path / "a" / "1.png").unlink()
    gone, there = images.read()
    assert isinstance(gone, ImageError)
    assert there == b"b/1.png"


def test_options_that_cannot_be_heeded_are_refused(tmp_path: Path) -> None:
    folder = tree(tmp_path / "set", "a/1.png", "b/1.png")
    file = tmp_path / "d.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": ["a"]}), file)
    for path, options, says in (
        (file, {"split": "test"}, "--split can't be heeded: .*parquet is a file"),
        (
            file,
            {"allow_empty_classes": True},
            "--allow-empty-classes can't be heeded: .*parquet holds no class",
        ),
        (folder, {"label": "fine"}, "--label can't be heeded: .*set is a folder of class folders"),
    ):
        with pytest.raises(UserError, match=says):
            open_labelled(path, **options)
