"""Webdatasets in CLIP_benchmark's and DataComp's layout: templates, numbers of shards, several labels, groups."""

import io
from pathlib import Path

import numpy as np
import pytest
from image_shards import picture
from labelled_sources import tar_of
from openclip_twin import TINY

from clipkit.device import pick
from clipkit.embedding.encoder import Compute, clip_encoder
from clipkit.errors import UserError
from clipkit.eval.classification.prompts import Classes, prompts, templates
from clipkit.eval.classification.task import classify, open_task
from clipkit.model.clip import build
from clipkit.pixels.images import Preprocess
from clipkit.text.tokenizer import Tokenizer

COMPUTE = Compute(pick("cpu"))


@pytest.fixture(scope="module")
def encoder():
    return clip_encoder(build(TINY, seed=1), Tokenizer(), Preprocess(size=32), precision="float32")


def npy(*numbers: float) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(numbers))
    return file.getvalue()


def write(
    root: Path, samples: dict[str, bytes], names: str = "ant\nbee\ncat\n", shards: str = "1", **files: str
) -> Path:
    (root / "test").mkdir(parents=True)
    (root / "test" / "0.tar").write_bytes(tar_of(samples))
    (root / "test" / "nshards.txt").write_text(shards)
    (root / "classnames.txt").write_text(names)
    for name, text in files.items():
        (root / f"{name}.txt").write_text(text)
    return root


def samples(labels: list[int], *metadata: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number, label in enumerate(labels):
        found[f"s{number}.jpg"], found[f"s{number}.cls"] = picture(number), str(label).encode()
        if metadata:
            found[f"s{number}.npy"] = metadata[number]
    return found


def test_its_own_templates_are_taken_and_said(tmp_path: Path) -> None:
    own = {"zeroshot_classification_templates": "a drawing of {c}.\n{c}\n"}
    root = write(tmp_path / "set", samples([0, 2]), **own)
    task = open_task(root)
    assert task.templates.sentences == ("a drawing of {}.", "{}")
    assert task.notes[-1] == f"{root}: templates from {root / 'zeroshot_classification_templates.txt'}"
    assert open_task(root, templates_name="openai-7").templates.name == "openai-7"
    bad = write(tmp_path / "bad", samples([0]), zeroshot_classification_templates="a photo\n")
    with pytest.raises(UserError, match=r"template 'a photo' in zeroshot_classification_templates has no \{\}"):
        open_task(bad)


@pytest.mark.parametrize(
    ("shards", "says"), [("2", "says 2 shards, but 1 are there: complete the download"), ("many", "not how many tars")]
)
def test_the_number_of_shards(tmp_path: Path, shards: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_task(write(tmp_path, samples([0]), shards=shards))


def test_labels_beyond_the_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="label 3, but 3 class names"):
        open_task(write(tmp_path, samples([0, 3])))


def test_classes_of_one_name_are_told_apart_by_their_order(tmp_path: Path) -> None:
    root = write(tmp_path, samples([0, 1, 2, 2]), names="crane\nheron\ncrane\n")
    task = open_task(root)
    assert task.labels_N.tolist() == [0, 1, 2, 2]
    assert any("'crane' is of several classes" in note for note in task.notes)
    (tmp_path / "names.json").write_text('{"crane": "bird", "heron": "heron"}')
    with pytest.raises(UserError, match="has two classes of one name: list the names in label order"):
        open_task(root, classes=tmp_path / "names.json")
    (tmp_path / "names.txt").write_text("crane bird\nheron bird\nconstruction crane\n")
    assert open_task(root, classes=tmp_path / "names.txt").labels_N.tolist() == [0, 1, 2, 2]


def texts(*labels: str) -> dict[str, bytes]:
    images = {f"s{number}.jpg": picture(number) for number in range(len(labels))}
    return images | {f"s{number}.cls": label.encode() for number, label in enumerate(labels)}


def test_labels_that_are_texts_are_chosen_among_all_the_names(tmp_path: Path) -> None:
    """A class that no image of the split has is a candidate, too; fewer of them make a better number."""
    root = write(tmp_path / "set", texts("tree_frog", "ant", "tree_frog"), names="tree frog\ndog\nant\n")
    task = open_task(root)
    assert (task.classes.titles, task.labels_N.tolist()) == (("tree frog", "dog", "ant"), [0, 2, 0])
    assert task.notes[-1] == f"{root / 'test'}: class names from {root / 'classnames.txt'}"
    for number, (names, says) in enumerate(
        [
            ("ant\ndog\n", "classnames.txt lacks 'tree_frog', which occurs in"),
            ("ant\nant\ntree frog", "has a name twice"),
        ]
    ):
        with pytest.raises(UserError, match=says):
            open_task(write(tmp_path / str(number), texts("tree_frog", "ant"), names=names))


def test_names_of_other_labels_are_said_to_be_left_aside(tmp_path: Path) -> None:
    task = open_task(write(tmp_path, texts("n01440764", "n01443537"), names="a fish\nanother\n"))
    assert task.classes.titles == ("tench", "goldfish")
    assert (
        f"{tmp_path / 'classnames.txt'} is left aside: none of its names is a label here, such as 'n01440764'"
        in task.notes[-1]
    )


def test_a_blank_line_among_the_names_is_refused(tmp_path: Path) -> None:
    """All names behind it would be those of other labels; at the end an editor left it."""
    with pytest.raises(UserError, match=r"classnames.txt: line 2 has no name: a class is known by its line"):
        open_task(write(tmp_path / "a", samples([0, 1]), names="ant\n\nbee\n"))
    assert open_task(write(tmp_path / "b", samples([0, 1]), names="ant\r\nbee\r\n\n")).classes.titles == ("ant", "bee")


def test_several_labels(tmp_path: Path, encoder) -> None:
    rows = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]
    files = {f"s{i}.jpg": picture(i) for i in range(4)} | {f"s{i}.npy": npy(*row) for i, row in enumerate(rows)}
    task = open_task(write(tmp_path / "a", files, dataset_type="multilabel"))
    (found,) = task.measure(encoder, COMPUTE).measures
    assert (found.metric, found.n, found.chance) == ("mean_average_precision", 4, 5 / 12)
    logit_NC = classify(encoder, task, COMPUTE).logit_NC
    expected = []
    for score_N, truth_N in zip(logit_NC.T, np.array(rows).T, strict=True):
        order = np.argsort(-score_N, kind="stable")  # of pictures that are alike
        hits = [place + 1 for place, i in enumerate(order) if truth_N[i]]
        expected.append(np.mean([(rank + 1) / place for rank, place in enumerate(hits)]))
    assert found.value == pytest.approx(np.mean(expected))
    with pytest.raises(UserError, match="several labels, which --pooling sum doesn't do"):
        open_task(tmp_path / "a", pooling="sum")
    with pytest.raises(UserError, match=r"3 classes in .npy, but 2 names in classnames.txt"):
        open_task(write(tmp_path / "b", files, names="ant\nbee", dataset_type="multilabel"))
    with pytest.raises(UserError, match=r"holds captions, no classes \(dataset_type.txt\)"):
        open_task(write(tmp_path / "c", files, dataset_type="retrieval"))


def test_datacomps_groups(tmp_path: Path, encoder) -> None:
    regions = [npy(region, 7) for region in (0, 1, 1, 5)]
    root = write(tmp_path / "wds_geode_test", samples([0, 1, 2, 0], *regions))
    task = open_task(root)
    outcome = task.measure(encoder, COMPUTE)
    found = {each.metric: each for each in outcome.measures}
    correct_N = classify(encoder, task, COMPUTE).top_NK[:, 0] == task.labels_N
    assert found["worst_group_top1"].value == min(correct_N[0], correct_N[1:3].mean(), correct_N[3])
    assert outcome.notes == (
        "GeoDE has 12,488 images, but here are 4: the numbers aren't comparable",
        "GeoDE has 40 classes, but here are 3",
    )
    bare = write(tmp_path / "bare" / "wds_geode_test", samples([0, 1]))
    with pytest.raises(UserError, match=r"no .npy with their groups, which worst_group_top1 needs: mend the tars"):
        open_task(bare).measure(encoder, COMPUTE)
    mixed = write(tmp_path / "mixed" / "wds_geode_test", samples([0, 1], npy(1), npy(1, 2)))
    with pytest.raises(UserError, match="arrays of different lengths or not of whole numbers"):
        open_task(mixed).measure(encoder, COMPUTE)
    iwildcam = write(tmp_path / "wds_wilds-iwildcam_test", samples([0, 1, 2]))
    assert "macro_f1" in {each.metric for each in open_task(iwildcam).measure(encoder, COMPUTE).measures}


def test_templates_for_each_class(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"ant": ["An {} is small.", "Six legs."], "b": ["A bee flies."]}')
    own = templates(str(tmp_path / "own.json"))
    classes = Classes(("a", "b"), (("ant",), ("bee", "wasp")))
    assert prompts(classes, own.sentences) == [["An ant is small.", "Six legs."], ["A bee flies."] * 2]
    root = write(tmp_path / "set", samples([0]), names="ant\nbee")
    with pytest.raises(UserError, match="the templates have no sentences for the class 'bee'"):
        open_task(root, templates_name=str(tmp_path / "own.json"))
    (tmp_path / "own.json").write_text('{"ant": []}')
    with pytest.raises(UserError, match="has no sentence for the class 'ant'"):
        templates(str(tmp_path / "own.json"))
