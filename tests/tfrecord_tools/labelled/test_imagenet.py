import base64
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from folder_contents import contents
from image_shards import picture
from labelled_sources import (
    CMYK_NAME,
    PNG_NAME,
    cmyk_picture,
    tar_of,
    train_images,
    validation_images,
    write_class_folders,
    write_devkit,
    write_heap,
    write_official,
)
from tensorflow_process import with_tensorflow

from clipkit import embedded
from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.eval.classification.labelled import open_labelled
from clipkit.eval.classification.task import open_task
from clipkit.formats.dataset import Dataset, open_dataset
from clipkit.formats.records import decode_example, read_records
from clipkit.storage.files import as_path
from clipkit.tfrecord_tools.labelled import imagenet
from clipkit.tfrecord_tools.labelled import shard as labelled_shard
from clipkit.tfrecord_tools.labelled.imagenet import build_imagenet
from clipkit.tfrecord_tools.pictures.sniff import is_truncated

WNIDS = [entry["wnid"] for entry in embedded.imagenet_classes()]

# TFDS's own preparation from the same tars. It asks for a package that isn't among its dependencies, and for dataset
# information on the network unless told not to.
TFDS_PREPARES = """
import importlib.resources, importlib.resources.abc, sys
sys.modules.setdefault("importlib_resources", importlib.resources)
sys.modules.setdefault("importlib_resources.abc", importlib.resources.abc)
import tensorflow_datasets as tfds
tfds.core.utils.gcs_utils.gcs_dataset_info_files = lambda *_, **__: None
builder = tfds.builder("imagenet2012", data_dir=arguments[1])
builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=arguments[0]))
result = str(builder.data_dir)
"""

# By name and by directory; `as_supervised` needs the keys that the metadata name.
TFDS_READS = """
import tensorflow_datasets as tfds
def read(builder):
    found = {"version": str(builder.version), "classes": builder.info.features["label"].names[:3]}
    for split in builder.info.splits:
        order = tfds.ReadConfig(interleave_cycle_length=1)
        data = builder.as_dataset(split=split, read_config=order)
        names = [example["file_name"].numpy().decode() for example in data]
        pairs = builder.as_dataset(split=split, read_config=order, as_supervised=True)
        labels = [builder.info.features["label"].int2str(int(label)) for _, label in pairs]
        shapes = {tuple(image.shape[2:]) for image, _ in pairs}
        found[split] = [builder.info.splits[split].num_examples, names, labels, sorted(shapes)]
    return found
result = [read(tfds.builder("imagenet2012", data_dir=arguments[0])), read(tfds.builder_from_directory(arguments[1]))]
"""


def rows(dataset: Dataset) -> dict[str, tuple[bytes, str]]:
    """Image and class by file name."""
    names = dataset.label_names() or []
    examples = [dataset.example(i) for i in range(len(dataset))]
    return {example["file_name"]: (example["image"], names[example["label"]]) for example in examples}


def by_name(images: dict[str, dict[str, bytes]]) -> dict[str, tuple[bytes, str]]:
    return {name: (data, label) for label, files in images.items() for name, data in files.items()}


def examples(folder: Path, split: str) -> list[dict[str, list]]:
    return [decode_example(r) for path in sorted(folder.glob(f"*-{split}.tfrecord-*")) for r in read_records(path)]


def test_the_records_are_those_that_tfds_itself_makes_of_the_tars(tmp_path):
    source = write_official(tmp_path / "tars", train_images(), validation_images())
    summary = build_imagenet(source, tmp_path / "ours", subset=True)
    theirs = Path(str(with_tensorflow(TFDS_PREPARES, source, tmp_path / "theirs")))
    assert summary.path.relative_to(tmp_path / "ours") == theirs.relative_to(tmp_path / "theirs")
    for split, count in (("train", 22), ("validation", 6)):
        ours = examples(summary.path, split)
        assert len(ours) == count
        assert ours == examples(theirs, split)
    assert (summary.path / "label.labels.txt").read_text() == (theirs / "label.labels.txt").read_text()
    assert json.loads((summary.path / "features.json").read_text()) == json.loads(
        (theirs / "features.json").read_text()
    )
    assert [split.converted for split in summary.splits] == [{"cmyk jpeg": 1, "png": 1}, {}]


def test_tfds_reads_it_by_its_name_and_by_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "SHARD_MEGABYTES", 0.004)
    source = write_official(tmp_path / "tars", train_images(), validation_images())
    summary = build_imagenet(source, tmp_path / "out", subset=True)
    assert [split.shards for split in summary.splits] == [4, 1]
    by_builder, by_directory = with_tensorflow(TFDS_READS, tmp_path / "out", summary.path)
    assert by_builder == by_directory
    assert (by_builder["version"], by_builder["classes"]) == ("5.1.0", WNIDS[:3])
    for split in ("train", "validation"):
        dataset = open_dataset(tmp_path / "out" / "imagenet2012", split)
        read = [dataset.example(i) for i in range(len(dataset))]
        names, labels = [each["file_name"] for each in read], [WNIDS[each["label"]] for each in read]
        assert by_builder[split] == [len(read), names, labels, [[3]]]
    assert by_name(train_images()).keys() == set(by_builder["train"][1])


CONVERT_WITH_TFDS = """
import base64
from pathlib import Path
from tensorflow_datasets.core import utils
result = [base64.b64encode(utils.jpeg_cmyk_to_rgb(Path(path).read_bytes())).decode() for path in arguments]
"""


def test_jpegs_of_four_components_become_the_bytes_that_tfds_makes_of_them(tmp_path):
    adobe = cmyk_picture()
    marker = adobe.index(b"\xff\xee")
    length = 2 + int.from_bytes(adobe[marker + 2 : marker + 4], "big")
    plain = adobe[:marker] + adobe[marker + length :]  # not inverted
    ycck = adobe[: marker + 15] + b"\x02" + adobe[marker + 16 :]
    paths = [tmp_path / name for name in ("adobe", "plain", "ycck")]
    for path, data in zip(paths, (adobe, plain, ycck), strict=True):
        path.write_bytes(data)
    theirs = with_tensorflow(CONVERT_WITH_TFDS, *paths)
    assert [base64.b64encode(labelled_shard.cmyk_to_rgb(path.read_bytes())).decode() for path in paths] == theirs
    assert len(set(theirs)) == 3


def test_labels_are_in_the_order_of_the_class_names(tmp_path):
    source = write_official(tmp_path / "tars", train_images(), None)
    path = build_imagenet(source, tmp_path / "out", subset=True).path
    assert sorted(WNIDS) == WNIDS
    dataset = open_dataset(path, "train")
    assert dataset.label_names() == WNIDS
    for i in range(len(dataset)):
        example = dataset.example(i)
        if example["file_name"] not in (CMYK_NAME, PNG_NAME):
            assert WNIDS[example["label"]] == example["file_name"].partition("_")[0]
    names = {entry["wnid"]: entry["name"] for entry in embedded.imagenet_classes()}
    assert names["n01440764"] == "tench"
    assert {example["label"] for example in map(dataset.example, range(22))} == {
        WNIDS.index(wnid) for wnid in train_images()
    }


def test_zero_shot_evaluation_reads_it(tmp_path):
    source = write_official(tmp_path / "tars", None, validation_images())
    build_imagenet(source, tmp_path / "out", subset=True)
    images = open_labelled(tmp_path / "out" / "imagenet2012")
    assert (images.name, len(images), images.label_names) == ("imagenet2012-validation", 6, tuple(WNIDS))
    task = open_task(tmp_path / "out" / "imagenet2012")
    assert [names[0] for names in task.classes.rows[:2]] == ["tench", "goldfish"]


def test_the_layouts_give_the_same_records(tmp_path):
    train, validation = train_images(), validation_images()
    wnids = ["n01440764", "n15075141", "n01440764", "n02105855", "n01739381", "n01440764"]
    labels = dict(zip(validation, wnids, strict=True))
    by_class: dict[str, dict[str, bytes]] = {}
    for name, wnid in labels.items():
        by_class.setdefault(wnid, {})[name] = validation[name]
    lines = tmp_path / "labels.txt"
    lines.write_text("\n".join(labels.values()))

    write_official(tmp_path / "tars", train, validation)
    write_class_folders(tmp_path / "folders" / "train", train)
    write_class_folders(tmp_path / "folders" / "val", by_class)
    kaggle = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    write_class_folders(kaggle / "train", train)
    write_heap(kaggle / "val", validation)
    write_heap(kaggle / "test", {"ILSVRC2012_test_00000001.JPEG": picture(1)})
    table = "".join(f"{Path(name).stem},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in reversed(labels.items()))
    (tmp_path / "kaggle" / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + table)
    class_tars = tmp_path / "class-tars" / "train"
    class_tars.mkdir(parents=True)
    for wnid, files in train.items():
        (class_tars / f"{wnid}.tar").write_bytes(tar_of(files))
    write_heap(tmp_path / "class-tars" / "val", validation)

    read = {}
    for layout, given in (("tars", lines), ("folders", None), ("kaggle", None), ("class-tars", lines)):
        summary = build_imagenet(tmp_path / layout, tmp_path / f"out-{layout}", subset=True, labels=given)
        assert [split.split for split in summary.splits] == ["train", "validation"]
        read[layout] = [(split.split, examples(summary.path, split.split)) for split in summary.splits]
    assert read["tars"] == read["folders"] == read["kaggle"] == read["class-tars"]
    found = {each["file_name"][0].decode(): WNIDS[each["label"][0]] for each in read["tars"][1][1]}
    assert found == labels


def test_one_split_may_be_named_or_be_the_source_itself(tmp_path):
    write_class_folders(tmp_path / "all" / "train", train_images())
    write_class_folders(tmp_path / "all" / "val", {"n01440764": {"a.JPEG": picture(1)}})
    only = build_imagenet(tmp_path / "all", tmp_path / "one", split="validation", subset=True)
    assert [(split.split, split.records) for split in only.splits] == [("validation", 1)]
    itself = build_imagenet(tmp_path / "all" / "val", tmp_path / "two", split="validation", subset=True)
    assert contents(only.path) == contents(itself.path)
    with pytest.raises(UserError, match=r"has no split 'test': it has train, validation"):
        build_imagenet(tmp_path / "all", tmp_path / "three", split="test", subset=True)


IDS = [490, 361, 171, 822]  # as in the devkit, the classes aren't numbered in the order of their wnids
TRUTH = [171, 490, 361, 822, 490, 361]
TRUE_WNIDS = ["n01739381", "n02105855", "n01440764", "n15075141", "n02105855", "n01440764"]


@pytest.mark.parametrize("unpacked", [False, True])
def test_the_devkit_tells_the_validation_labels(tmp_path, unpacked):
    source = write_official(tmp_path / "tars", None, validation_images())
    archive = write_devkit(source, list(train_images()), IDS, TRUTH)
    if unpacked:
        subprocess.run(["tar", "-xzf", archive.name], cwd=source, check=True)
        archive.unlink()
    summary = build_imagenet(source, tmp_path / "out", subset=True)
    labels = [label for _, (_, label) in sorted(rows(open_dataset(summary.path, "validation")).items())]
    assert labels == TRUE_WNIDS
    assert any("ILSVRC2012_devkit_t12" in note for note in summary.notes)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(TRUE_WNIDS),
        "\n".join(map(str, TRUTH)),
        "".join(f"ILSVRC2012_val_{i + 1:08d}.JPEG {wnid}\n" for i, wnid in reversed(list(enumerate(TRUE_WNIDS)))),
        "".join(f"val/ILSVRC2012_val_{i + 1:08d}.JPEG\t{wnid}\n" for i, wnid in enumerate(TRUE_WNIDS)),
        "".join(f"ILSVRC2012_val_{i + 1:08d},{wnid}\r\n" for i, wnid in enumerate(TRUE_WNIDS)),
    ],
)
def test_labels_in_every_form(tmp_path, text):
    source = write_heap(tmp_path / "heap" / "val", validation_images()).parent
    write_devkit(source, list(train_images()), IDS, [1])
    (tmp_path / "labels").write_text(text)
    summary = build_imagenet(source, tmp_path / "out", subset=True, labels=tmp_path / "labels")
    labels = [label for _, (_, label) in sorted(rows(open_dataset(summary.path, "validation")).items())]
    assert labels == TRUE_WNIDS


def test_official_names_hold_their_place_where_some_are_missing(tmp_path):
    images = validation_images()
    del images["ILSVRC2012_val_00000002.JPEG"]
    source = write_heap(tmp_path / "heap" / "val", images).parent
    write_devkit(source, list(train_images()), IDS, TRUTH)
    summary = build_imagenet(source, tmp_path / "out", subset=True)
    labels = [label for _, (_, label) in sorted(rows(open_dataset(summary.path, "validation")).items())]
    assert labels == TRUE_WNIDS[:1] + TRUE_WNIDS[2:]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n".join(TRUE_WNIDS[:5]), "has 5 labels for 6 images"),
        ("\n".join(map(str, TRUTH)), "'171', which is a number"),
        ("ILSVRC2012_val_00000001.JPEG n01440764\n", "has no class for ILSVRC2012_val_00000002.JPEG"),
        ("\n".join(["n99999999", *TRUE_WNIDS[1:]]), "'n99999999', which is none of the classes"),
        (b"\xff\xfe", "isn't UTF-8"),
        (None, "don't exist"),
    ],
)
def test_labels_that_do_not_go_with_the_images(tmp_path, text, says):
    source = write_heap(tmp_path / "heap" / "val", validation_images()).parent
    if text is not None:
        (tmp_path / "labels").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        build_imagenet(source, tmp_path / "out", subset=True, labels=tmp_path / "labels")
    assert not (tmp_path / "out").exists()


def test_without_any_labels_the_error_says_where_to_get_them(tmp_path, monkeypatch):
    source = write_heap(tmp_path / "heap" / "val", validation_images()).parent
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"put ILSVRC2012_devkit_t12\.tar\.gz beside them, give --labels FILE, or"):
        build_imagenet(source, tmp_path / "out", subset=True)


@pytest.fixture
def whole(tmp_path, monkeypatch) -> Path:
    """A training set of two images a class and a validation set of one, where that is a whole ImageNet."""
    monkeypatch.setattr(imagenet, "IMAGENET_COUNTS", {"train": 2000, "validation": 1000})
    monkeypatch.setattr(imagenet, "IMAGENET_SHARDS", {"train": 16, "validation": 4})
    data = picture(1, size=8)
    train = {wnid: {f"{wnid}_{i}.JPEG": data for i in range(2)} for wnid in WNIDS}
    source = write_official(tmp_path / "tars", train, {f"ILSVRC2012_val_{i + 1:08d}.JPEG": data for i in range(1000)})
    (tmp_path / "labels.txt").write_text("\n".join(WNIDS))
    return source


def test_a_whole_one_has_the_names_of_tfdss_files_and_its_classes_are_spread(whole, tmp_path):
    summary = build_imagenet(whole, tmp_path / "out", labels=tmp_path / "labels.txt")
    assert not summary.subset
    assert summary.notes == (f"validation: labels from {tmp_path / 'labels.txt'}",)
    assert [(split.records, split.shards) for split in summary.splits] == [(2000, 16), (1000, 4)]
    files = sorted(path.name for path in summary.path.glob("*.tfrecord-*"))
    assert files[0] == "imagenet2012-train.tfrecord-00000-of-00016"
    assert files[-1] == "imagenet2012-validation.tfrecord-00003-of-00004"
    dataset = open_dataset(summary.path, "train")
    labels = np.array([dataset.example(i)["label"] for i in range(2000)])
    assert {shard.records for shard in dataset.shards} == {125}
    for start in range(0, 2000, 125):
        shard = labels[start : start + 125]
        assert len(set(shard)) > 105  # of 125 images, nearly each of another class
        assert abs(np.corrcoef(np.arange(125), shard)[0, 1]) < 0.35
    assert (np.bincount(labels) == 2).all()


@pytest.mark.parametrize("subset", [False, True])
def test_what_is_missing_is_refused_or_said_out_loud(whole, tmp_path, subset):
    data = picture(1, size=8)
    train = {wnid: {f"{wnid}_{i}.JPEG": data for i in range(2)} for wnid in WNIDS[1:]}
    write_official(whole, train, None)
    says = "train has 1,998 images where ImageNet's has 2,000, 1 class missing, such as n01440764"
    if not subset:
        with pytest.raises(UserError, match=says):
            build_imagenet(whole, tmp_path / "out", labels=tmp_path / "labels.txt")
        assert not (tmp_path / "out").exists()
        return
    summary = build_imagenet(whole, tmp_path / "out", labels=tmp_path / "labels.txt", subset=True)
    assert summary.subset
    assert [note for note in summary.notes if note.startswith("SUBSET")] == [
        f"SUBSET: {says}; its numbers can't be compared with those of the whole"
    ]
    assert "SUBSET" in summary.text()
    assert " kB in 4 shards" in summary.text()
    assert "subset" in json.loads((summary.path / "dataset_info.json").read_text())["description"]
    assert open_dataset(summary.path, "train").label_names() == WNIDS


def test_the_right_number_of_images_with_a_class_missing_is_refused(whole, tmp_path):
    data = picture(1, size=8)
    train = {wnid: {f"{wnid}_{i}.JPEG": data for i in range(2)} for wnid in WNIDS[1:]}
    train[WNIDS[1]] |= {f"{WNIDS[1]}_{i}.JPEG": data for i in (2, 3)}
    write_official(whole, train, None)
    with pytest.raises(UserError, match=r"has 2,000 images .* 1 class missing, such as n01440764"):
        build_imagenet(whole, tmp_path / "out", labels=tmp_path / "labels.txt")


def test_a_validation_set_taken_for_the_training_set_gets_a_hint(whole, tmp_path):
    write_class_folders(tmp_path / "val", {wnid: {f"{wnid}.JPEG": picture(1, size=8)} for wnid in WNIDS})
    with pytest.raises(UserError, match="has 1,000 images where ImageNet's has 2,000: give --split validation"):
        build_imagenet(tmp_path / "val", tmp_path / "out")
    assert build_imagenet(tmp_path / "val", tmp_path / "out", split="validation").splits[0].records == 1000


def test_classes_that_are_not_imagenets(tmp_path):
    write_class_folders(tmp_path / "train", {"n01440764": {"a.JPEG": picture(1)}, "n99": {"b.JPEG": picture(2)}})
    with pytest.raises(UserError, match="1 class isn't among ImageNet-1K's 1,000, 'n99': give another"):
        build_imagenet(tmp_path / "train", tmp_path / "out", subset=True)


def test_a_file_name_twice_is_refused(tmp_path):
    write_class_folders(tmp_path / "train", {"n01440764": {"a.JPEG": picture(1)}, "n01443537": {"a.JPEG": picture(2)}})
    with pytest.raises(UserError, match="holds 1 file name twice"):
        build_imagenet(tmp_path / "train", tmp_path / "out", subset=True)


def food(folder: Path, **changes: bytes) -> Path:
    """Another set, of two splits; PNG, WebP and BMP among its files, and things that are no images."""
    train = {
        "apple pie": {"1.jpg": picture(1), "2.png": picture(2, "PNG"), ".DS_Store": b"x", "notes.txt": b"x"},
        "waffles": {"1.webp": picture(3, "WEBP"), "4.bmp": picture(4, "BMP"), "cmyk.jpg": cmyk_picture(), **changes},
    }
    write_class_folders(folder / "train", train)
    write_class_folders(folder / "test", {"waffles": {"1.jpg": picture(6)}})
    (folder / "test" / "apple pie" / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "test" / "apple pie" / "deep" / "7.jpg").write_bytes(picture(7))
    return folder


def test_any_image_folder_becomes_a_dataset(tmp_path):
    summary = build_imagenet(food(tmp_path / "food"), tmp_path / "out", name="food101")
    assert summary.path == tmp_path / "out" / "food101" / "1.0.0"
    assert (summary.classes, summary.subset, summary.notes) == (2, False, ("train: files left aside: .txt 1",))
    train, test = summary.splits
    assert (train.split, train.records, train.formats) == ("train", 5, {"bmp": 1, "jpeg": 3, "png": 1})
    assert train.converted == {"cmyk jpeg": 1, "webp": 1}
    assert (test.split, test.records) == ("test", 2)
    read = rows(open_dataset(summary.path, "train"))
    assert {name: label for name, (_, label) in read.items()} == {
        "apple pie/1.jpg": "apple pie",
        "apple pie/2.png": "apple pie",
        "waffles/1.webp": "waffles",
        "waffles/4.bmp": "waffles",
        "waffles/cmyk.jpg": "waffles",
    }
    assert read["apple pie/2.png"][0] == picture(2, "PNG")
    assert read["waffles/1.webp"][0][:3] == b"\xff\xd8\xff"
    assert set(rows(open_dataset(summary.path, "test"))) == {"apple pie/deep/7.jpg", "waffles/1.jpg"}
    assert open_task(summary.path, split="test").classes.labels == ("apple pie", "waffles")
    counts, read_by_tfds = with_tensorflow(READ_ANY, summary.path)
    assert counts == {"train": 5, "test": 2}
    assert read_by_tfds == {name: WHERE[label] for name, (_, label) in read.items()}


WHERE = {"apple pie": 0, "waffles": 1}
READ_ANY = """
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(arguments[0])
counts = {name: split.num_examples for name, split in builder.info.splits.items()}
result = [counts, {e["file_name"].numpy().decode(): int(e["label"]) for e in builder.as_dataset(split="train")}]
"""


@pytest.mark.parametrize(
    ("file", "text"),
    [("classes.txt", "waffles\nsushi\napple pie\n"), ("classes.json", '["waffles", "sushi", "apple pie"]')],
)
def test_classes_may_be_listed(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    summary = build_imagenet(food(tmp_path / "food"), tmp_path / "out", name="food", classes=tmp_path / file)
    dataset = open_dataset(summary.path, "test")
    assert dataset.label_names() == ["waffles", "sushi", "apple pie"]
    assert {dataset.example(i)["file_name"]: dataset.example(i)["label"] for i in range(2)} == {
        "waffles/1.jpg": 0,
        "apple pie/deep/7.jpg": 2,
    }


def test_classes_that_are_numbers_stand_in_the_order_of_their_values(tmp_path):
    write_class_folders(tmp_path / "train", {str(i): {f"{i}.jpg": picture(i)} for i in range(12)})
    summary = build_imagenet(tmp_path / "train", tmp_path / "out", name="digits")
    assert open_dataset(summary.path, "train").label_names() == [str(i) for i in range(12)]
    write_class_folders(tmp_path / "train", {f"0{i}": {f"{i}.jpg": picture(i)} for i in range(12)})
    summary = build_imagenet(tmp_path / "train", tmp_path / "again", name="digits")
    names = [name for i in range(12) for name in sorted([f"0{i}", str(i)])]
    assert open_dataset(summary.path, "train").label_names() == names


def test_numbers_that_pandas_made_fractions_of_are_the_numbers(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(12):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(picture(i))
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\n" + "".join(f"{i}.jpg,{i}.0\n" for i in range(12)))
    summary = build_imagenet(tmp_path / "images", tmp_path / "out", name="digits", labels=labels)
    dataset = open_dataset(summary.path)
    assert dataset.label_names() == [str(i) for i in range(12)]
    labels.write_text("file,label\n" + "".join(f"{i}.jpg,{i}.{i % 2}\n" for i in range(12)))  # fractions indeed
    summary = build_imagenet(tmp_path / "images", tmp_path / "again", name="digits", labels=labels)
    assert open_dataset(summary.path).label_names()[1] == "1.1"


def test_a_class_that_only_one_split_has_is_told(tmp_path):
    """It may be the same one, spelled otherwise: as files are named on a Mac, for one."""
    for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        write_class_folders(tmp_path / "food" / split, {name: {"1.jpg": picture(1)}, "x": {"1.jpg": picture(2)}})
    assert build_imagenet(tmp_path / "food", tmp_path / "out", name="food").notes == (
        "train has no image of 1 class that another split has, such as 'cafe\u0301'",
        "validation has no image of 1 class that another split has, such as 'caf\u00e9'",
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("waffles\n", "1 class isn't among those of .*classes.json, 'apple pie'"),
        ('["waffles", "apple pie", "waffles"]', "names the class 'waffles' twice"),
        ("{}", "isn't a list of classes"),
    ],
)
def test_lists_of_classes_that_are_wrong(tmp_path, text, says):
    file = tmp_path / "classes.json"
    file.write_text(text if text[0] in "[{" else json.dumps(text.split()))
    with pytest.raises(UserError, match=says):
        build_imagenet(food(tmp_path / "food"), tmp_path / "out", name="food", classes=file)


BROKEN = {
    "cut.jpg": picture(8, size=64)[:-200],
    "cut.png": picture(8, "PNG", size=64)[:-40],
    "page.jpg": b"<html>not an image</html>" * 50,
}


def test_broken_images_are_named_counted_and_refused_beyond_what_is_allowed(tmp_path):
    source = food(tmp_path / "food", **BROKEN)
    command = {"name": "food"}
    with pytest.raises(UserError, match=r"3 images of train are broken: .*give --max-bad 3") as raised:
        build_imagenet(source, tmp_path / "out", **command)
    for name in BROKEN:
        assert f"waffles/{name}" in str(raised.value)
    assert not (tmp_path / "out" / "food" / "1.0.0" / "dataset_info.json").exists()
    with pytest.raises(UserError, match="3 images"):
        build_imagenet(source, tmp_path / "out", max_bad=2, **command)
    summary = build_imagenet(source, tmp_path / "out", max_bad=3, **command)
    train = summary.splits[0]
    assert (train.samples, train.records, train.skipped) == (8, 5, {"not-an-image": 1, "truncated": 2})
    listed = [json.loads(line) for line in (summary.path / "clipkit" / "skipped-train.jsonl").read_text().splitlines()]
    assert {each["name"]: each["reason"] for each in listed} == {
        "waffles/cut.jpg": "truncated",
        "waffles/cut.png": "truncated",
        "waffles/page.jpg": "not-an-image",
    }
    assert "left out as broken: not-an-image 1, truncated 2" in summary.text()


def test_mended_images_are_taken_by_the_next_run(tmp_path):
    source = food(tmp_path / "food", **BROKEN)
    with pytest.raises(UserError, match="3 images"):
        build_imagenet(source, tmp_path / "out", name="food")
    food(source, **{name: picture(9) for name in BROKEN})
    assert build_imagenet(source, tmp_path / "out", name="food").splits[0].records == 8


def test_a_mended_image_of_the_same_size_is_taken_by_the_next_run(tmp_path):
    good = picture(9)
    source = food(tmp_path / "food", **{"page.jpg": b"<html>".ljust(len(good))})
    with pytest.raises(UserError, match="1 image of train"):
        build_imagenet(source, tmp_path / "out", name="food")
    food(source, **{"page.jpg": good})
    assert build_imagenet(source, tmp_path / "out", name="food").splits[0].records == 6


def test_an_image_replaced_between_two_runs_is_taken_as_it_is_now(tmp_path, monkeypatch):
    source = food(tmp_path / "food")
    monkeypatch.setattr(imagenet, "finish_dataset", None)
    with pytest.raises(TypeError):
        build_imagenet(source, tmp_path / "out", name="food", split="train")
    monkeypatch.undo()
    (source / "train" / "apple pie" / "1.jpg").write_bytes(picture(50, size=30))
    path = build_imagenet(source, tmp_path / "out", name="food", split="train").path
    assert rows(open_dataset(path))["apple pie/1.jpg"][0] == picture(50, size=30)


def test_imagenet_lacks_no_image_unless_it_is_a_subset(tmp_path):
    images = train_images()
    images["n01440764"]["n01440764_0.JPEG"] = b"<html>"
    source = write_official(tmp_path / "tars", images, None)
    with pytest.raises(UserError, match="give --subset with --max-bad"):
        build_imagenet(source, tmp_path / "out", max_bad=1)
    with pytest.raises(UserError, match=r"n01440764/n01440764_0\.JPEG \(not-an-image\).*give --subset --max-bad 1"):
        build_imagenet(source, tmp_path / "out", subset=True)
    assert build_imagenet(source, tmp_path / "out", subset=True, max_bad=1).splits[0].records == 21


def test_what_a_decoder_reads_to_the_end_is_whole():
    """TEM, a marker that has no length, inside the scan: what stands behind it leads past the end mark."""
    whole = picture(3, size=200)
    odd = whole[:-60] + b"\xff\x01\xfd\xfe" + whole[-60:] + b"\r\n"
    assert is_truncated(odd)
    assert labelled_shard.stored_as(odd, True) == (odd, "jpeg")
    assert labelled_shard.stored_as(whole[:-60], True) == (None, "truncated")


def test_components_are_read_from_the_frame_header():
    assert labelled_shard.jpeg_components(picture(1)) == 3
    assert labelled_shard.jpeg_components(cmyk_picture()) == 4
    # A thumbnail's frame lies inside a segment and doesn't count; fill bytes may stand before a marker.
    exif = b"\xff\xe1" + (len(cmyk_picture()) + 2).to_bytes(2, "big") + cmyk_picture()
    assert labelled_shard.jpeg_components(picture(1)[:2] + exif + b"\xff" + picture(1)[2:]) == 3
    assert labelled_shard.jpeg_components(b"\xff\xd8\xff\xe0") == 0


def test_a_split_may_join_later_and_what_is_there_is_left_alone(tmp_path, monkeypatch):
    both = food(tmp_path / "food")
    at_once = build_imagenet(both, tmp_path / "one", name="food").path
    build_imagenet(both, tmp_path / "two", name="food", split="test")
    path = tmp_path / "two" / "food" / "1.0.0"
    before = contents(path)
    joined = build_imagenet(both, tmp_path / "two", name="food")
    assert [split.built for split in joined.splits] == [True, False]
    assert contents(path) == contents(at_once)
    assert {name: before[name] for name in before if "test" in name}.items() <= contents(path).items()
    monkeypatch.setattr(labelled_shard, "write_beside", None)
    again = build_imagenet(both, tmp_path / "two", name="food")
    assert [split.built for split in again.splits] == [False, False]
    (both / "train" / "waffles" / "more.jpg").write_bytes(picture(9))
    with pytest.raises(UserError, match="already holds a split 'train' made from other images"):
        build_imagenet(both, tmp_path / "two", name="food")
    (both / "train" / "zucchini").mkdir()
    (both / "train" / "zucchini" / "1.jpg").write_bytes(picture(9))
    with pytest.raises(UserError, match="of other columns or classes"):
        build_imagenet(both, tmp_path / "two", name="food")


def test_a_split_with_classes_in_another_order_does_not_join(tmp_path):
    source = food(tmp_path / "food")
    (tmp_path / "classes.json").write_text('["waffles", "apple pie"]')
    build_imagenet(source, tmp_path / "out", name="food", split="test")
    with pytest.raises(UserError, match="has other classes: build all splits at once, or give --classes"):
        build_imagenet(source, tmp_path / "out", name="food", split="train", classes=tmp_path / "classes.json")


def test_what_others_wrote_is_not_overwritten(tmp_path):
    source = write_official(tmp_path / "tars", train_images(), None)
    version = tmp_path / "out" / "imagenet2012" / "5.1.0"
    version.mkdir(parents=True)
    theirs = version / "imagenet2012-train.tfrecord-00000-of-00001"
    theirs.write_text("theirs")
    with pytest.raises(UserError, match="is of another build"):
        build_imagenet(source, tmp_path / "out", subset=True)
    (version / "dataset_info.json").write_text(json.dumps({"splits": [{"name": "train"}]}))
    with pytest.raises(UserError, match="choose another output or --name"):
        build_imagenet(source, tmp_path / "out", subset=True)
    assert theirs.read_text() == "theirs"


def test_an_unfinished_build_of_other_images_is_not_mixed_in(tmp_path):
    source = food(tmp_path / "food", **BROKEN)
    with pytest.raises(UserError, match="broken"):
        build_imagenet(source, tmp_path / "out", name="food")
    (source / "train" / "waffles" / "more.jpg").write_bytes(picture(9))
    with pytest.raises(UserError, match="begun from other images"):
        build_imagenet(source, tmp_path / "out", name="food")


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "SHARD_MEGABYTES", 0.004)
    source = write_official(tmp_path / "tars", train_images(), validation_images())
    one = build_imagenet(source, tmp_path / "one", subset=True, workers=1)
    build_imagenet(source, tmp_path / "two", subset=True, workers=3)
    assert one.splits[0].shards == 4
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


KILLED = """
import sys
from pathlib import Path
from clipkit.tfrecord_tools.labelled import imagenet
from killed_builds import kill_at_each_rename

imagenet.SHARD_MEGABYTES = 0.004
source, out = Path(sys.argv[1]), Path(sys.argv[2])

def build():
    return [split.records for split in imagenet.build_imagenet(source, out, subset=True).splits]

kill_at_each_rename(build, out, least=20)
"""


def test_killed_at_any_rename_the_same_command_ends_with_the_same_bytes(tmp_path):
    source = write_official(tmp_path / "tars", train_images(), validation_images())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2] / "support",
    )
    assert done.returncode != -signal.SIGKILL
    assert done.stdout == "the same\n", done.stderr


def test_a_purge_that_is_not_finished_comes_first(tmp_path):
    source = write_official(tmp_path / "tars", train_images(), None)
    folder = build_imagenet(source, tmp_path / "data", subset=True).path
    (folder / "clipkit" / "purge.json").write_text("{}")
    with pytest.raises(UserError, match="a purge isn't finished"):
        build_imagenet(source, tmp_path / "data", subset=True)


def test_finished_shards_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "SHARD_MEGABYTES", 0.004)
    source = write_official(tmp_path / "tars", train_images(), None)
    build = labelled_shard.build_labelled_shard
    made: list[str] = []
    stop_at = 2

    def counted(job):
        if len(made) == stop_at:
            raise KeyboardInterrupt
        made.append(job.path.name)
        return build(job)

    monkeypatch.setattr("clipkit.tfrecord_tools.labelled.split.build_labelled_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        build_imagenet(source, tmp_path / "out", subset=True)
    stop_at = 5
    build_imagenet(source, tmp_path / "out", subset=True)
    assert made == [f"imagenet2012-train.tfrecord-{i:05d}-of-00004" for i in range(4)]


def test_it_can_be_written_into_an_object_store(tmp_path):
    source = write_official(tmp_path / "tars", train_images(), None)
    here = build_imagenet(source, tmp_path / "out", subset=True).path
    out = as_path("memory://build-imagenet/out")
    there = build_imagenet(source, out, subset=True).path
    for path in here.rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert (there / path.relative_to(here).as_posix()).read_bytes() == path.read_bytes()
    assert not build_imagenet(source, out, subset=True).splits[0].built


@pytest.mark.parametrize("cut", [700, 5_000, 20_000])
def test_a_damaged_tar_gets_one_line(tmp_path, cut):
    source = write_official(tmp_path / "tars", train_images(), None)
    tar = source / "ILSVRC2012_img_train.tar"
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar: damaged tar at byte \d+"):
        build_imagenet(source, tmp_path / "out", subset=True)


def test_a_damaged_class_tar_gets_one_line(tmp_path):
    images = train_images()
    source = write_official(tmp_path / "tars", images, None)
    tar = source / "ILSVRC2012_img_train.tar"
    data = bytearray(tar.read_bytes())
    second = 1024 + len(images["n02105855"]["n02105855_0.JPEG"])
    second += -second % 512
    data[second + 100] ^= 1
    tar.write_bytes(data)
    with pytest.raises(
        UserError, match=f"damaged tar at byte {second}, a header's checksum doesn't match: fetch it again"
    ):
        build_imagenet(source, tmp_path / "out", subset=True)


def test_a_class_tar_without_its_end_gets_one_line(tmp_path):
    whole = tar_of(train_images()["n01440764"])
    unmarked = whole.rstrip(b"\0")
    unmarked += bytes(-len(unmarked) % 512)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of({"n01440764.tar": unmarked}))
    with pytest.raises(UserError, match=f"damaged tar at byte {512 + len(unmarked)}, "):
        build_imagenet(tmp_path, tmp_path / "out", subset=True)
    (tmp_path / "train").mkdir()
    for name, data in (("n01440764", whole.rstrip(b"\0")), ("n01739381", whole[:1024])):
        path = tmp_path / "train" / f"{name}.tar"
        path.write_bytes(data + bytes(-len(data) % 512))
        with pytest.raises(UserError, match=rf"{name}\.tar: damaged tar at byte \d+"):
            build_imagenet(tmp_path / "train", tmp_path / "out", subset=True)
        path.unlink()


def test_joined_class_tars_are_read_to_the_end_and_garbage_is_told(tmp_path):
    images = train_images()["n01440764"]
    halves = [dict(list(images.items())[:1]), dict(list(images.items())[1:])]
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "n01440764.tar"
    path.write_bytes(b"".join(map(tar_of, halves)))
    summary = build_imagenet(tmp_path / "train", tmp_path / "out", subset=True, split="train")
    assert summary.splits[0].records == len(images) > 1
    path.write_bytes(tar_of(images) + b"garbage")
    with pytest.raises(UserError, match="what follows its end mark is not another tar"):
        build_imagenet(tmp_path / "train", tmp_path / "other", subset=True, split="train")


def test_an_image_that_vanishes_gets_one_line(tmp_path, monkeypatch):
    source = food(tmp_path / "food")
    plan = imagenet.plan_shards

    def vanishing(*arguments):
        (source / "train" / "waffles" / "4.bmp").unlink(missing_ok=True)
        return plan(*arguments)

    monkeypatch.setattr(imagenet, "plan_shards", vanishing)
    with pytest.raises(UserError, match=r"4\.bmp \(image waffles/4\.bmp\) is gone: put it back"):
        build_imagenet(source, tmp_path / "out", name="food")


def test_a_tar_that_shrinks_gets_one_line(tmp_path, monkeypatch):
    source = write_official(tmp_path / "tars", train_images(), None)
    tar = source / "ILSVRC2012_img_train.tar"
    plan = imagenet.plan_shards

    def shrinking(*arguments):
        tar.write_bytes(tar.read_bytes()[:5000])
        return plan(*arguments)

    monkeypatch.setattr(imagenet, "plan_shards", shrinking)
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar ends inside n\d+/n\d+_\d\.JPEG: fetch it again"):
        build_imagenet(source, tmp_path / "out", subset=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "food-101"}, "letters, digits and _ only"),
        ({"split": "../x"}, "letters, digits and _ only"),
        ({"classes": Path("x")}, "ImageNet's classes are known"),
        ({"name": "food", "classes": Path("x")}, "don't exist"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        build_imagenet(food(tmp_path / "food"), tmp_path / "out", **options)


def test_an_empty_source_gets_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        build_imagenet(tmp_path / "empty", tmp_path / "out")


def test_the_command_says_what_it_made(tmp_path):
    source = write_official(tmp_path / "tars", train_images(), validation_images())
    command = ["build-imagenet", str(source), str(tmp_path / "out"), "--subset"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "train: 22 images" in done.stdout
    assert "SUBSET: train has 22 images" in done.stdout
    told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert (told["subset"], told["splits"]["train"]["records"], told["splits"]["train"]["built"]) == (True, 22, False)
    failed = CliRunner().invoke(main, command[:-1])
    assert failed.exit_code == 2
    assert failed.stderr.splitlines()[-1].startswith("Error: ")
    assert "give --subset" in failed.stderr
