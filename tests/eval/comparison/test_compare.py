"""What can't be compared is told in words; what can is compared by the guesses; known models have known numbers."""

import csv
import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.eval import results
from clipkit.eval.classification.task import GUESSES
from clipkit.eval.comparison import published
from clipkit.eval.comparison.compare import compare
from clipkit.eval.comparison.significance import Difference, hits_of, paired_retrieval
from clipkit.eval.metrics import measure
from clipkit.eval.results import Result
from clipkit.eval.tables import results_text
from clipkit.intervals import wilson

HASHES = {"classes": "c", "templates": "t", "split": "s", "preprocessing": "p"}
N, CLASSES = 400, 8


def result(value=0.5, n=N, **changes):
    low, high = wilson(value, n)
    made = Result("top1", value, low, high, n, 1 / CLASSES, CLASSES, "pets", "pets", 100, "checkpoints/100", HASHES)
    return dataclasses.replace(made, **changes)


def write_run(folder, top_NK, label_N, **changes):
    """A run with the numbers and the guesses of one task."""
    made = [result(**dataclasses.asdict(each), **changes) for each in measure(top_NK, label_N, CLASSES)]
    results.write_results(folder, made)
    rows = [
        {
            **dict.fromkeys(GUESSES.names),
            "key": str(place),
            "label": f"class {label}",
            "correct": bool(top[0] == label),
            "guesses": [f"class {guess}" for guess in top],
        }
        for place, (top, label) in enumerate(zip(top_NK, label_N, strict=True))
    ]
    about = {"samples_seen": 100, "weights": changes.get("weights", "")}
    task = changes.get("task", "pets")
    results.write_predictions(results.predictions_path(folder, task), pa.Table.from_pylist(rows, schema=GUESSES), about)
    return folder


@pytest.fixture(scope="module")
def guessed():
    """Labels, and the guesses of two models of which the second is a little better."""
    random = np.random.default_rng(0)
    label_N = np.sort(random.integers(0, CLASSES, N))
    first_NK = np.argsort(random.random((N, CLASSES)) - 0.5 * np.eye(CLASSES)[label_N], axis=1)[:, :5]
    second_NK = first_NK.copy()
    wrong = np.flatnonzero(first_NK[:, 0] != label_N)[::7]
    second_NK[wrong, 0] = label_N[wrong]
    return label_N, first_NK, second_NK


def run(*arguments):
    done = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_models_on_the_same_images_are_compared_by_their_guesses(tmp_path, guessed):
    label_N, first_NK, second_NK = guessed
    a = write_run(tmp_path / "a", first_NK, label_N, weights="1")
    b = write_run(tmp_path / "b", second_NK, label_N, weights="2", hashes=HASHES | {"preprocessing": "other"})
    found = {pair.metric: pair for pair in compare([a, b]).pairs}
    assert set(found) == {"top1", "top5", "mean_per_class_recall"}
    top1 = found["top1"]
    won = int((second_NK[:, 0] == label_N).sum() - (first_NK[:, 0] == label_N).sum())
    assert (top1.difference.only_first, top1.difference.only_second, top1.difference.n) == (0, won, N)
    assert top1.difference.p == pytest.approx(2 * 0.5**won - 0.5**won)
    assert all(pair.difference.n == N for pair in found.values()), "each metric is paired"
    for pair in found.values():
        assert pair.difference.value == pytest.approx(pair.results[1].value - pair.results[0].value)
        assert pair.notes == ("other preprocessing, which is expected between models", "other weights")
    text = run(a, b).stdout
    assert "b − a" in text and "significant: McNemar, mid-p" in text and "which is expected between models" in text


@pytest.mark.parametrize(
    ("of_first", "of_second", "pairs"),
    [
        ([{}, {"task": "ema/pets"}], [{}], [("pets", "pets", "pets")]),
        ([{}, {"task": "pets-knn", "kind": "knn"}], [{}], [("pets", "pets", "pets")]),
        ([{"task": "pets-knn", "kind": "knn"}], [{}], []),
        ([{"task": "cats"}, {"task": "ema/cats"}], [{"task": "ema/pets"}], [("ema/cats", "ema/cats", "ema/pets")]),
        ([{"task": "cats"}], [{}, {"task": "ema/pets"}], [("cats", "cats", "pets")]),
        ([{"task": "ema/pets"}], [{}], [("ema/pets", "ema/pets", "pets")]),
        ([{"task": "cats"}, {"task": "dogs"}], [{"task": "dogs"}], [("dogs", "dogs", "dogs")]),
    ],
)
def test_tasks_on_the_same_images_are_matched_by_their_names_first(tmp_path, of_first, of_second, pairs):
    """Averages of weights, probes and zero-shot numbers of one model are all on the same images."""
    for name, tasks in (("a", of_first), ("b", of_second)):
        results.write_results(tmp_path / name, [result(**each) for each in tasks])
    found = compare([tmp_path / "a", tmp_path / "b"]).pairs
    assert [(pair.task, *(each.task for each in pair.results)) for pair in found] == pairs


@pytest.mark.parametrize(
    "change",
    [{"weights": "another"}, {"value": 0.5}, {"n": N - 1}, {"samples_seen": 50}],
    ids=["guesses of other weights", "guesses of another value", "fewer guesses", "guesses of another checkpoint"],
)
def test_guesses_that_are_not_the_numbers_own_are_not_used(tmp_path, guessed, change):
    label_N, first_NK, second_NK = guessed
    a = write_run(tmp_path / "a", first_NK, label_N, weights="1")
    b = write_run(tmp_path / "b", second_NK, label_N, weights="2")
    changed = [dataclasses.replace(each, **change) for each in results.read_results(b)]
    (b / "results.jsonl").unlink()
    results.write_results(b, changed)
    assert {pair.difference.test for pair in compare([a, b]).pairs} == {"unpaired intervals"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hashes": HASHES | {"templates": "u"}, "templates": "plain"}, "other templates (openai-80 and plain)"),
        ({"hashes": HASHES | {"classes": "u"}, "classes": 9}, "other class names (8 and 9)"),
        ({"hashes": HASHES | {"split": "u"}, "n": 300}, "other images, or other labels (400 images and 300 images)"),
        ({"hashes": HASHES | {"split": "u"}}, "other images, or other labels"),
        ({"hashes": HASHES | {"groups": "u"}}, "groups unknown, for one result has no hash of it"),
        ({"hashes": {}}, "classes unknown"),
    ],
    ids=["templates", "classes", "fewer images", "images", "a hash on one side", "no hashes"],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, change, words):
    results.write_results(tmp_path / "a", [result(templates="openai-80")])
    results.write_results(tmp_path / "b", [result(**{"templates": "openai-80", **change})])
    done = run(tmp_path / "a", tmp_path / "b")
    assert done.exit_code == 0
    (line,) = [line for line in done.stdout.splitlines() if "not comparable" in line]
    assert words in line and "pets" in line and "b − a" in line
    answer = json.loads(run(tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert answer["pairs"][0]["comparable"] is False and answer["pairs"][0]["difference"] is None


def test_of_several_results_those_that_fit_are_compared(tmp_path):
    plain = result(0.4, hashes=HASHES | {"templates": "plain"})
    results.write_results(tmp_path / "a", [plain, result(0.6)])
    results.write_results(tmp_path / "b", [result(0.5), result(0.1, samples_seen=50, checkpoint="checkpoints/50")])
    results.write_results(tmp_path / "c", [plain])
    (pair,) = compare([tmp_path / "a", tmp_path / "b"]).pairs
    assert [each.value for each in pair.results] == [0.6, 0.5], "same templates, and the newest checkpoint"
    (pair,) = compare([tmp_path / "a", tmp_path / "c"]).pairs
    assert pair.results[0].value == 0.4


def test_a_task_of_another_name_is_known_by_its_images(tmp_path):
    results.write_results(tmp_path / "a", [result()])
    results.write_results(tmp_path / "b", [result(task="my-pets")])
    assert [(row[0], None in row[2]) for row in compare([tmp_path / "a", tmp_path / "b"]).rows] == [("pets", False)]


def test_a_file_of_several_models_a_checkpoint_and_equal_names(tmp_path):
    models = ["open_clip:ViT-B-32:openai", "/models/siglip/model.safetensors", "/runs/x/checkpoints/000100"]
    results.write_results(tmp_path / "out", [result(checkpoint=name, model=name) for name in models])
    found = compare([tmp_path / "out" / "results.jsonl"])
    assert [entry.label for entry in found.entries] == [models[0], "model.safetensors", "x/000100"]
    assert len(found.pairs) == 2
    for name in ("one", "two"):
        checkpoint = tmp_path / name / "run" / "checkpoints" / "100"
        checkpoint.mkdir(parents=True)
        results.write_results(
            checkpoint.parents[1], [result(), result(0.7, samples_seen=50, checkpoint="checkpoints/50")]
        )
    runs = [tmp_path / name / "run" for name in ("one", "two")]
    assert [entry.label for entry in compare(runs).entries] == ["one/run", "two/run"]
    (entry,) = compare([runs[0] / "checkpoints" / "100"]).entries
    assert (entry.label, entry.results[0].value) == ("run/100", 0.5)
    both = [each / "checkpoints" / "100" for each in runs]
    assert [entry.label for entry in compare([*both, tmp_path / "out"]).entries[:2]] == ["one/run/100", "two/run/100"]
    results.write_results(tmp_path / "again", [result(checkpoint=models[0], model=models[0])])
    twice = compare([tmp_path / "out", tmp_path / "again"]).entries
    assert [entry.label for entry in twice if entry.model == models[0]] == [
        f"{tmp_path / each}: {models[0]}" for each in ("out", "again")
    ]


def test_formats(tmp_path):
    results.write_results(tmp_path / "a_1", [result(0.5)])
    results.write_results(tmp_path / "b&c", [result(0.6)])
    paths = tmp_path / "a_1", tmp_path / "b&c"
    rows = list(csv.DictReader(io.StringIO(run(*paths, "--format", "csv").stdout)))
    assert [(row["model"], row["value"], row["comparable"]) for row in rows] == [
        ("a_1", "0.5", ""),
        ("b&c", "0.6", "True"),
    ]
    assert float(rows[1]["difference"]) == pytest.approx(0.1) and rows[1]["significant"] == "True"
    markdown = run(*paths, "--format", "md").stdout.splitlines()
    assert markdown[2].split("|")[4:6] == [" a_1 ", " b&c "] and markdown[3] == "|---|---|---|---|---|"
    latex = run(*paths, "--format", "latex").stdout
    assert r"task & metric & n & a\_1 & b\&c \\" in latex and r"50.0\% (45.1\% -- 54.9\%)" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2


def test_formats_of_the_results_themselves():
    made = [result(0.5), result(0.2, metric="top5", notes=("a prompt, cut", "b"))]
    rows = list(csv.DictReader(io.StringIO(results_text(made, "csv"))))
    assert [(row["metric"], row["value"], row["hash_split"]) for row in rows] == [
        ("top1", "0.5", "s"),
        ("top5", "0.2", "s"),
    ]
    assert rows[1]["notes"] == "a prompt, cut; b"
    two = results_text([made[0], result(0.5, checkpoint="b")], "md")
    assert two.count("| checkpoints/100 | pets |") == two.count("| b | pets |") == 1, "each row says whose it is"
    assert "| pets | top-1 | 50.0% | 45.1% – 54.9% | 12.5% | 400 |  |" in results_text(made, "md").splitlines()
    assert r"pets & top-1 & 50.0\% & 45.1\% -- 54.9\% & 12.5\% & 400 &  \\" in results_text(made, "latex").splitlines()
    rank = result(0.5, metric="text_retrieval_median_rank", kind="retrieval")
    rank = dataclasses.replace(rank, value=3.0, low=2.0, high=5.0, chance=50.0)
    category = result(0.5, metric="accuracy:swap", kind="choice")
    assert "| pets | image to text, median rank | 3 | 2 – 5 | 50 | 400 |  |" in results_text([rank], "md").splitlines()
    assert "| pets | accuracy, swap | 50.0% |" in results_text([category], "md")
    assert results_text(made, "table").splitlines()[2].split() == [
        "pets",
        "top-1",
        "50.0%",
        "45.1%",
        "–",
        "54.9%",
        "12.5%",
        "400",
    ]


@pytest.mark.parametrize(
    ("name", "words"), [("absent", "doesn't exist: give runs"), ("empty", "has no results: evaluate first")]
)
def test_a_path_without_results_is_refused(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / name)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr and done.stderr.count("\n") == 1
    results.write_results(tmp_path / "a", [result()])
    with pytest.raises(UserError, match="given twice"):
        compare([tmp_path / "a", tmp_path / "a"])


# ---- What was published --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet1k", "wds_imagenet1k_test", "imagenet2012-validation", "ImageNet 1k"])
@pytest.mark.parametrize(("value", "deviates"), [(0.6329, False), (0.60, True)])
def test_a_known_model_is_held_to_its_published_number(tmp_path, name, value, deviates):
    model = "open_clip:ViT-B-32:openai"
    assert published.models()["vit-b-32:openai"]["ImageNet 1k/acc1"] == "0.6332"
    results.write_results(tmp_path, [result(value, 50_000, task=name, checkpoint=model, model=model)])
    ((_, found),) = compare([tmp_path]).published
    assert (found.value, found.deviates) == (0.6332, deviates)
    assert ("deviates by more than the interval" in run(tmp_path).stdout) == deviates


def test_retrieval_is_known_by_its_images_or_its_captions():
    model = "open_clip:ViT-B-32:openai"
    names = ("text_retrieval_recall@1", 5000), ("image_retrieval_recall@5", 25_010), ("mean_recall@1", 1000)
    made = [result(0.5, n, task="dataset_coco-test", kind="retrieval", metric=name) for name, n in names]
    row = published.models()["vit-b-32:openai"]
    found = published.published(model, made)
    assert [each.value for each in found] == [float(row[f"MSCOCO/{name}"]) for name, _ in names[:2]]


@pytest.mark.parametrize(
    ("model", "task", "n"),
    [
        ("open_clip:ViT-B-32:other", "imagenet1k", 50_000),
        ("ViT-B-32", "imagenet1k", 50_000),
        ("open_clip:ViT-B-32:openai", "imagenet1k", 10_000),
        ("open_clip:ViT-B-32:openai", "my-imagenet", 50_000),
    ],
)
def test_what_is_not_known_is_not_judged(model, task, n):
    assert published.published(model, [result(0.6, n, task=task)]) == []


def test_the_robustness_line_is_that_of_the_published_models(tmp_path):
    row = published.models()["vit-b-32:openai"]
    sizes = {
        "imagenetv2": ("ImageNet v2", 10_000),
        "imagenet-a": ("ImageNet-A", 7_500),
        "objectnet": ("ObjectNet", 18_574),
    }
    values = [result(0.6332, 50_000, task="imagenet1k")]
    values += [result(float(row[f"{name}/acc1"]), n, task=task) for task, (name, n) in sizes.items()]
    found = published.robustness(values)
    assert [each.dataset for each in found] == ["ImageNet v2", "ImageNet-A", "ObjectNet"]
    x, y = (
        np.array([float(each[f"{name}/acc1"]) for each in published.models().values()])
        for name in (published.IMAGENET, "ObjectNet")
    )
    x, y = (np.log(each / (1 - each)) for each in (x, y))
    slope = np.cov(x, y, bias=True)[0, 1] / x.var()
    expected = 1 / (1 + np.exp(-(y.mean() + slope * (np.log(0.6332 / 0.3668) - x.mean()))))
    assert found[2].expected == pytest.approx(expected)
    assert found[2].distance == pytest.approx(float(row["ObjectNet/acc1"]) - expected)
    results.write_results(tmp_path, values)
    assert "the line of 121 published models" in run(tmp_path).stdout
    assert published.robustness(values[1:]) == [], "without ImageNet there is no line"


def test_choices_are_paired() -> None:
    def result_of(metric: str, kind: str, hits: list[bool]) -> Result:
        value = sum(hits) / len(hits)
        return Result(metric, value, 0, 1, len(hits), 0.5, 0, "t", "d", 1, "c", kind=kind)

    choices = pa.table({"correct": [True, False, False], "right": [["text_score", "x"], ["text_score"], []]})
    hits = hits_of(choices, result_of("text_score", "choice", [True, True, False]))
    assert hits is not None and hits.tolist() == [True, True, False]
    assert hits_of(choices, result_of("text_score", "choice", [True, False, False])) is None


def test_recalls_are_paired_by_image() -> None:
    """Two images, of which the second has three captions; the second model finds one caption more of it."""
    keys = ["a.jpg", "b#.jpg", "a.jpg#0", "b#.jpg#0", "b#.jpg#1", "b#.jpg#2"]
    directions = ["image to text"] * 2 + ["text to image"] * 4
    first, second = (
        pa.table({"key": keys, "direction": directions, "rank": ranks})
        for ranks in ([4, 6, 1, 9, 9, 1], [4, 5, 1, 9, 2, 1])
    )

    def found(metric: str, values: tuple[float, float], n: int = 4) -> Difference | None:
        one, two = (Result(metric, value, 0, 1, n, 0.5, 0, "t", "d", 1, "c", kind="retrieval") for value in values)
        return paired_retrieval((first, second), (one, two))

    captions = found("image_retrieval_recall@5", (0.5, 0.75))
    assert captions is not None
    assert (captions.value, captions.only_first, captions.only_second, captions.n) == (0.25, 0, 1, 4)
    # One image drawn twice: the first has no gain, the second one of three captions.
    assert (captions.low, captions.high) == pytest.approx((0, 1 / 3))
    images = found("text_retrieval_recall@5", (0.5, 1.0))
    assert images is not None and (images.value, images.n) == (0.5, 2)
    mean = found("mean_recall@5", (0.5, 0.875))
    assert mean is not None and (mean.value, mean.n) == (0.375, 6)
    assert found("image_retrieval_recall@5", (0.5, 0.5)) is None, "these guesses don't make that number"
