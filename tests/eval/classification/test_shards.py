"""Labelled images in many files: Hugging Face's sharded parquet, and webdataset tars as CLIP_benchmark has them."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.errors import UserError
from clipkit.eval.classification.images import LabelledImages
from clipkit.eval.classification.labelled import open_labelled
from clipkit.eval.classification.prompts import templates

NAMES = ["red panda", "cat", "dog"]


def write_parquet(path: Path, labels: list[object], names: list[str] | None = None, column: str = "label") -> None:
    """A shard as `datasets` writes it; each image is its path and row."""
    images = [{"bytes": f"{path.name} {row}".encode(), "path": None} for row in range(len(labels))]
    table = pa.table({"image": images, column: labels})
    if names:
        feature: dict[str, object] = {"names": names, "_type": "ClassLabel"}
        if labels and isinstance(labels[0], list):
            feature = {"feature": feature, "_type": "List"}
        features = {"image": {"_type": "Image"}, column: feature}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_tar(path: Path, samples: dict[str, object]) -> None:
    """A tar of `KEY.SUFFIX` members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, value in samples.items():
            data = value if isinstance(value, bytes) else str(value).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def found(images: LabelledImages) -> list[tuple[str, str, bytes]]:
    labels = [images.label_names[number] for number in images.labels_N]
    return list(zip(images.keys, labels, images.read(), strict=True))


@pytest.mark.parametrize("below", ["", "data"])
def test_shards_of_hugging_face(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "pets" / below
    write_parquet(folder / "train-00000-of-00001.parquet", [1], NAMES)
    write_parquet(folder / "test-00000-of-00002.parquet", [2, 0], NAMES)
    write_parquet(folder / "test-00001-of-00002.parquet", [2], NAMES)
    (tmp_path / "pets" / "README.md").write_text("hello")
    (tmp_path / "pets" / "assets").mkdir()
    (tmp_path / "pets" / "assets" / "preview.png").write_bytes(b"x")
    images = open_labelled(tmp_path / "pets")
    assert (images.name, images.label_names, images.named) == ("pets-test", tuple(NAMES), True)
    assert found(images) == [
        ("test-00000-of-00002.parquet:0", "dog", b"test-00000-of-00002.parquet 0"),
        ("test-00000-of-00002.parquet:1", "red panda", b"test-00000-of-00002.parquet 1"),
        ("test-00001-of-00002.parquet:0", "dog", b"test-00001-of-00002.parquet 0"),
    ]
    train = open_labelled(tmp_path / "pets", split="train")
    assert (train.name, found(train)) == ("pets-train", [("0", "cat", b"train-00000-of-00001.parquet 0")])
    with pytest.raises(
        UserError, match=r"several splits \(test 2 files, train 1 file\), of which none is 'val': name one with --split"
    ):
        open_labelled(tmp_path / "pets", split="val")


@pytest.mark.parametrize("labels", [[2, 0], [2.0, 0.0], [[2], [0]]], ids=str)
def test_class_labels_of_one_file(tmp_path: Path, labels: list[object]) -> None:
    write_parquet(tmp_path / "a.parquet", labels, NAMES, "fine_label")
    images = open_labelled(tmp_path / "a.parquet", label="fine_label")
    assert [name for _, name, _ in found(images)] == ["dog", "red panda"]
    assert images.name == "a-fine_label"


@pytest.mark.parametrize("layout", ["test/1.parquet train/1.parquet", "Testing/1.parquet Training/1.parquet"])
def test_shards_in_folders_of_splits(tmp_path: Path, layout: str) -> None:
    for name in layout.split():
        write_parquet(tmp_path / "set" / name, ["test" if "est" in name else "train"])
    assert [label for _, label, _ in found(open_labelled(tmp_path / "set"))] == ["test"]
    assert [label for _, label, _ in found(open_labelled(tmp_path / "set", split="train"))] == ["train"]


def test_shards_that_no_split_is_told_of(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "0.parquet", ["a"])
    write_parquet(tmp_path / "set" / "1.parquet", ["b"])
    images = open_labelled(tmp_path / "set")
    assert (images.name, images.label_names, images.notes) == ("set", ("a", "b"), ())
    with pytest.raises(UserError, match="has no split 'test': its files are of no split"):
        open_labelled(tmp_path / "set", split="test")
    write_parquet(tmp_path / "set" / "test.parquet", ["c"])
    images = open_labelled(tmp_path / "set")
    assert images.label_names == ("c",)
    assert "reading the split test; left aside: others 2 files" in images.notes[0]
    both = open_labelled(tmp_path / "set", split="all")
    assert (both.name, both.label_names) == ("set-all", ("a", "b", "c"))


def test_shards_of_one_split(tmp_path: Path) -> None:
    for number in range(2):
        write_parquet(tmp_path / "set" / f"test-{number}.parquet", [number], NAMES)
    assert open_labelled(tmp_path / "set").name == open_labelled(tmp_path / "set", split="test").name == "set-test"
    with pytest.raises(UserError, match="has no split 'train': its files are of test"):
        open_labelled(tmp_path / "set", split="train")


def test_shards_that_are_refused(tmp_path: Path) -> None:
    for name in ("animals", "plants"):
        write_parquet(tmp_path / "several" / name / "test.parquet", [0], NAMES)
    write_parquet(tmp_path / "names" / "test-00000-of-00002.parquet", [0], NAMES)
    write_parquet(tmp_path / "names" / "test-00001-of-00002.parquet", [0], NAMES[::-1])
    write_parquet(tmp_path / "beyond" / "test.parquet", [3], NAMES)
    write_parquet(tmp_path / "unlabelled" / "test.parquet", [-1], NAMES)
    write_parquet(tmp_path / "null" / "test.parquet", [0, None], NAMES)
    for folder, says in (
        ("several", r"holds no shards, and its folders animals, plants do: name one"),
        ("names", "have other class names in 'label'"),
        ("beyond", "label 3, but 3 class names"),
        ("unlabelled", "label -1 is negative"),
        ("null", r"test.parquet row 1 has no 'label'"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            open_labelled(tmp_path / folder)
        assert "\n" not in str(caught.value)


def test_a_table_of_file_names_beside_class_folders_is_passed_by(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"x")
    pq.write_table(pa.table({"file_name": ["cat/1.png"], "label": [0]}), tmp_path / "metadata.parquet")
    write_tar(tmp_path / "images.tar", {"cat/1.png": b"x"})
    images = open_labelled(tmp_path)
    assert images.label_names == ("cat",)
    assert "files left aside: .parquet 1, .tar 1" in images.notes[0]


@pytest.mark.parametrize("given", ["", "test", "test/0.tar"])
def test_tars_of_clip_benchmark(tmp_path: Path, given: str) -> None:
    root = tmp_path / "pets"
    write_tar(root / "train" / "0.tar", {"s0.webp": b"t", "s0.cls": 1})
    write_tar(root / "test" / "0.tar", {"s0.webp": b"a", "s0.cls": 2, "s1.cls": "0\n", "s1.webp": b"b"})
    if given != "test/0.tar":
        write_tar(root / "test" / "1.tar", {"s0.jpg": b"c", "s0.cls": 2, "s0.json": "{}", "notes.txt": "x"})
    (root / "test" / "nshards.txt").write_text("2")
    (root / "classnames.txt").write_text("red panda\ncat\ndog\n")
    images = open_labelled(root / given)
    expected = [("0.tar:s0", "dog", b"a"), ("0.tar:s1", "red panda", b"b"), ("1.tar:s0", "dog", b"c")]
    if given == "test/0.tar":
        expected = [("s0", "dog", b"a"), ("s1", "red panda", b"b")]
    assert found(images) == expected
    assert images.name == {"": "pets-test", "test": "test", "test/0.tar": "0"}[given]
    assert images.notes[-1] == f"{images.path}: class names from {root / 'classnames.txt'}"
    assert not given or images.path == root / given


def test_other_labels_and_bad_tars(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", {"St. Anna 1.0.jpg": b"a", "St. Anna 1.0.cls": "church", "1.0.png": b"b", "1.0.cls": "x"}
    )
    assert [label for _, label, _ in found(open_labelled(tmp_path / "a.tar"))] == ["church", "x"]
    write_tar(tmp_path / "b.tar", {"1.jpg": b"a", "1.cls": 0, "1.breed": "Saluki"})
    assert open_labelled(tmp_path / "b.tar", label="breed").label_names == ("Saluki",)
    assert not open_labelled(tmp_path / "b.tar").named
    for samples, says in (
        ({"1.jpg": b"a", "1.txt": "a"}, "sample 1 has no .cls: mend the tar, or name the suffix by --label"),
        ({"1.cls": 0}, "sample 1 has no image"),
        ({"1.jpg": b"a", "1.cls": " \n"}, "sample 1 has an empty .cls"),
        ({"1.txt": "a"}, "holds no sample of an image and a .cls"),
    ):
        write_tar(tmp_path / "c.tar", samples)
        with pytest.raises(UserError, match=says):
            open_labelled(tmp_path / "c.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[:1500])
    with pytest.raises(UserError, match="damaged tar"):
        open_labelled(tmp_path / "c.tar")


def test_templates_of_clip_benchmark(tmp_path: Path) -> None:
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    found = templates(str(tmp_path / "zeroshot_classification_templates.txt"))
    assert found.sentences == ("a photo of a {}.", "{}")
