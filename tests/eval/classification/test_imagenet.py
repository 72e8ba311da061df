"""ImageNet's relatives: their classes, by whatever the labels are, and what is said of a set that isn't whole."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm.data
from image_shards import picture
from openclip_twin import TINY
from timm.data.real_labels import RealLabelsImagenet

from clipkit import embedded
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, clip_encoder
from clipkit.errors import UserError
from clipkit.eval.classification.imagenet import IN_DISTRIBUTION, class_ids, real_labels
from clipkit.eval.classification.task import classify, open_task
from clipkit.eval.datasets import find_published, published_datasets
from clipkit.model.clip import build
from clipkit.pixels.images import Preprocess
from clipkit.text.tokenizer import Tokenizer

COMPUTE = Compute(pick("cpu"))
THOUSAND = class_ids("imagenet1k")


@pytest.fixture(scope="module")
def encoder():
    return clip_encoder(build(TINY, seed=1), Tokenizer(), Preprocess(size=32), precision="float32")


def folders(root: Path, classes: tuple[str, ...], name: str = "1.jpg") -> Path:
    for number, wnid in enumerate(classes):
        (root / wnid).mkdir(parents=True)
        (root / wnid / name).write_bytes(picture(number))
    return root


def parquet(path: Path, labels: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [b"x"] * len(labels), "label": labels}), path)
    return path


def test_the_lists_are_the_published_ones() -> None:
    for name in ("imagenet-a", "imagenet-r"):
        info = Path(timm.data.__file__).parent / "_info" / f"{name.replace('-', '_')}_synsets.txt"
        assert sorted(info.read_text().split()) == list(class_ids(name))
    assert len(class_ids("imagenet-o")) == 200
    assert class_ids("imagenetv2") == class_ids("imagenet_sketch") == THOUSAND
    assert len(class_ids("objectnet")) == 113
    timms = RealLabelsImagenet([f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 50001)]).real_labels
    assert embedded.imagenet_real() == [timms[f"ILSVRC2012_val_{i:08d}.JPEG"] for i in range(1, 50001)]
    assert real_labels(["a/ILSVRC2012_val_00000002.JPEG"]) == [[970, 795]]
    assert real_labels(["a/ILSVRC2012_val_00000002.JPEG", "b/2.JPEG"]) is None


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("data/imagenet/val", "imagenet1k"),
        ("imagenet2012/5.1.0/validation", "imagenet1k"),
        ("ImageNet-A", "imagenet-a"),
        ("imagenet_r-test", "imagenet-r"),
        ("imagenetv2-matched-frequency-format-val", "imagenetv2"),
        ("wds_vtab-caltech101_test/test", "vtab/caltech101"),
        ("wds_dollar_street_test", "fairness/dollar_street"),
        ("cars", None),
        ("imagenet-100", None),
    ],
)
def test_names_of_datasets(path: str, key: str | None) -> None:
    found = find_published(Path(path))
    assert (found.key if found else None) == key
    assert len(published_datasets()) == 38


def test_a_class_folder_missing_or_too_many(tmp_path: Path, encoder) -> None:
    ids = class_ids("imagenet-r")
    with pytest.raises(UserError, match=r"lacks 1 class of imagenet-r, such as n01443537: add the folders"):
        open_task(folders(tmp_path / "a" / "imagenet-r", ids[1:]))
    assert len(open_task(tmp_path / "a" / "imagenet-r", allow_empty_classes=True).classes) == 200
    with pytest.raises(UserError, match="n01440764 is not among the 200 classes of imagenet-r"):
        open_task(folders(tmp_path / "b" / "imagenet-r", (*ids, "n01440764")))


def test_labels_are_places_among_the_set_or_among_imagenet(tmp_path: Path) -> None:
    """As Hugging Face and TFDS have ImageNet-A: 0 to 199, or ImageNet's own numbers."""
    places = [THOUSAND.index(wnid) for wnid in class_ids("imagenet-a")]
    own = open_task(parquet(tmp_path / "imagenet-a" / "test.parquet", [0, 5, 199]))
    theirs = open_task(parquet(tmp_path / "x" / "imagenet-a" / "test.parquet", [places[i] for i in (0, 5, 199)]))
    assert own.labels_N.tolist() == theirs.labels_N.tolist() == [0, 5, 199]
    assert own.classes == theirs.classes and len(own.classes) == 200
    assert own.classes.titles[0] == "stingray"
    with pytest.raises(UserError, match="n01440764 is not among the 200 classes of imagenet-a"):
        open_task(parquet(tmp_path / "y" / "imagenet-a" / "test.parquet", [0, *places]))
    with pytest.raises(UserError, match="label 1000, but imagenet-a has 200 classes"):
        open_task(parquet(tmp_path / "z" / "imagenet-a" / "test.parquet", [1000]))
    part = open_task(parquet(tmp_path / "imagenet" / "val.parquet", [3, 1]))
    assert len(part.classes) == 1000 and part.labels_N.tolist() == [3, 1]


def test_imagenets_real_labels_and_its_count(tmp_path: Path, encoder) -> None:
    root = tmp_path / "imagenet" / "val"
    folders(root, THOUSAND, "x.txt")
    for number in (1, 2, 3):  # the first has no ReaL label
        (root / THOUSAND[number] / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(picture(number))
    broken = [root / THOUSAND[number] / f"ILSVRC2012_val_{number:08d}.JPEG" for number in (7, 8, 9)]
    for path in broken:
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="3 of 6 images can't be read"):
        open_task(root, allow_empty_classes=True, templates_name="{}").measure(encoder, COMPUTE)
    for path in broken:
        path.unlink()
    task = open_task(root, allow_empty_classes=True, templates_name="{}")
    outcome = task.measure(encoder, COMPUTE)
    assert outcome.notes[0] == "ImageNet 1k has 50,000 images, but here are 3: the numbers aren't comparable"
    found = {each.metric: each for each in outcome.measures}
    assert (found["top1"].n, found["real_top1"].n) == (3, 2)
    tops = classify(encoder, task, COMPUTE).top_NK[:, 0]
    assert found["real_top1"].value == np.mean([tops[1] in (970, 795), tops[2] in (230, 231)])


def test_objectnet_is_the_113_classes_that_it_shares(tmp_path: Path) -> None:
    shared = class_ids("objectnet")
    root = folders(tmp_path / "objectnet" / "images", (*shared, "coaster", "squeegee"))
    task = open_task(root)
    assert len(task) == len(task.classes) == 113
    assert (task.classes.titles[0], task.classes.titles[3]) == ("alarm clock", "band aid")
    assert task.notes[-1].endswith("2 images of the classes that ImageNet doesn't have are left aside")


def test_imagenet_o_has_its_own_metric(tmp_path: Path, encoder) -> None:
    ids = class_ids("imagenet-o")
    root = folders(tmp_path / "imagenet-o", ids)
    task = open_task(root, templates_name="{}")
    assert any("no AUPR, ImageNet-O's own metric" in note for note in task.measure(encoder, COMPUTE).notes)
    folders(tmp_path / IN_DISTRIBUTION, ids[:40])
    found = {each.metric: each for each in task.measure(encoder, COMPUTE).measures}
    assert (found["aupr"].n, found["aupr"].chance) == (240, pytest.approx(200 / 240))
    sure_N = classify(encoder, task, COMPUTE).probability_NK[:, 0]  # the other pictures are the first 40 of these
    ranks = sorted([(sure, 1) for sure in sure_N] + [(sure, 0) for sure in sure_N[:40]])
    hits = [place for place, (_, is_out) in enumerate(ranks, 1) if is_out]
    expected = np.mean([number / place for number, place in enumerate(hits, 1)])
    assert found["aupr"].value == pytest.approx(expected, abs=0.01)  # but for ties
    assert found["aupr"].low < found["aupr"].value < found["aupr"].high
