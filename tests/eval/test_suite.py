"""Suites: which datasets are found, by what metric each counts, the average and of what it is, and a second run."""

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from image_shards import picture
from labelled_sources import tar_of, write_class_folders
from small_encoder import SMALL, small_run

from clipkit.cli.evaluate import evaluate_on_ray
from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.eval.datasets import published_datasets
from clipkit.eval.open import KINDS, open_data
from clipkit.eval.results import read_results
from clipkit.eval.suite import belongs, entries_of
from clipkit.interop.load import load
from clipkit.model.clip import build
from clipkit.text.tokenizer import Tokenizer


def webdataset(root: Path, labels: tuple[int, ...] = (0, 1, 1), first: int = 0) -> Path:
    files = {f"s{i}.jpg": picture(first + i) for i in range(len(labels))}
    files |= {f"s{i}.cls": str(label).encode() for i, label in enumerate(labels)}
    (root / "test").mkdir(parents=True)
    (root / "test" / "0.tar").write_bytes(tar_of(files))
    (root / "test" / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text("ant\nbee\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c}.\n")
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "run")


def zeroshot(run: Path, data: Path, suite: str, *options: str):
    arguments = ["zeroshot", "--ckpt", str(run), "--data", str(data), "--suite", suite, "--device", "cpu", "--no-cache"]
    return CliRunner().invoke(main, [*arguments, *options])


def test_what_is_there_is_measured_by_its_own_metric_once(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "sets"
    webdataset(root / "wds_vtab-pets_test")
    webdataset(root / "vtab-dtd")
    webdataset(root / "cars")
    (root / "mine").mkdir()
    done = zeroshot(run, root, "vtab", "--json")
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["task"], each["metric"]) for each in found] == [
        ("vtab-dtd", "top1"),
        ("vtab-pets", "mean_per_class_recall"),
        ("vtab", "average"),
    ]
    mean = found[2]
    assert (mean["kind"], mean["n"]) == ("suite", 2)
    assert mean["value"] == pytest.approx((found[0]["value"] + found[1]["value"]) / 2)
    assert 0 <= mean["low"] < mean["value"] < mean["high"] <= 1 and mean["chance"] == 0.5
    said = "vtab: average of the 2 of 13 datasets that are there: "
    assert mean["notes"][0].startswith(said) and "there are missing: Caltech-101" in mean["notes"][0]
    assert mean["notes"][0] in done.stderr
    assert found[1]["notes"][0].startswith("Oxford-IIIT Pet has 3,669 images, but here are 3")
    before = read_results(run)
    assert [result.metric for result in before].count("average") == 1
    again = zeroshot(run, root, "vtab")
    assert f"vtab-dtd: {run} has its results already" in again.stderr
    assert read_results(run) == before
    # Another precision, other images in the same place, other templates: computed again.
    other = zeroshot(run, root, "vtab", "--precision", "bfloat16")
    assert "has its results already" not in other.stderr
    assert {result.precision for result in read_results(run)} == {"bfloat16"}
    zeroshot(run, root, "vtab")
    shutil.rmtree(root / "wds_vtab-pets_test")
    webdataset(root / "wds_vtab-pets_test", first=1)
    changed = zeroshot(run, root, "vtab")
    assert f"vtab-dtd: {run} has" in changed.stderr and f"vtab-pets: {run} has" not in changed.stderr
    (root / "vtab-dtd" / "zeroshot_classification_templates.txt").write_text("one {c}.\n")
    changed = zeroshot(run, root, "vtab")
    assert f"vtab-dtd: {run} has" not in changed.stderr and f"vtab-pets: {run} has" in changed.stderr


def test_the_average_of_averaged_weights_does_not_replace_that_of_the_others(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", averages=2)
    webdataset(tmp_path / "sets" / "vtab-pets")
    for options in ((), ("--ema",)):
        assert zeroshot(run, tmp_path / "sets", "vtab", *options).exit_code == 0
    assert [each.task for each in read_results(run) if each.metric == "average"] == ["vtab", "ema/vtab"]


class Shouting(Tokenizer):
    """Another vocabulary."""

    def encode(self, texts):
        return super().encode([f"{text}!" for text in texts])


@pytest.mark.parametrize("other", ["activation", "tokenizer"])
def test_the_same_weights_that_run_otherwise_are_measured_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """As by `open_clip:ViT-B-32-quickgelu:FILE` after `FILE`, or by the right `--tokenizer` after a wrong one."""
    webdataset(tmp_path / "sets" / "vtab-pets")
    real = load

    def otherwise(source, **options):
        encoder = real(source, **options)
        if other == "tokenizer":
            return dataclasses.replace(encoder, tokenizer=Shouting())
        quick = {name: dataclasses.replace(getattr(SMALL, name), act="quick_gelu") for name in ("image", "text")}
        return dataclasses.replace(encoder, model=build(dataclasses.replace(SMALL, **quick), seed=1).eval())

    assert zeroshot(run, tmp_path / "sets", "vtab").exit_code == 0
    monkeypatch.setattr("clipkit.eval.suite.load", otherwise)
    again = zeroshot(run, tmp_path / "sets", "vtab")
    assert (again.exit_code, "has its results already" in again.stderr) == (0, False)
    fresh = zeroshot(run, tmp_path / "sets", "vtab", "--out", str(tmp_path / "fresh"))
    assert "has its results already" not in fresh.stderr
    values = [[each.value for each in read_results(folder)] for folder in (run, tmp_path / "fresh")]
    assert values[0] == values[1]
    assert len({each.weights for each in [*read_results(run), *read_results(tmp_path / "fresh")]}) == 1
    once_more = zeroshot(run, tmp_path / "sets", "vtab")
    assert "has its results already" in once_more.stderr


def test_a_suite_on_an_engine_has_the_results_of_one_process(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine itself is tested with the others, in `jobs/test_engines.py`."""

    def run_backwards(work, units, *, engine: str, **_):
        assert engine == "ray"
        yield from [(number, work(unit)) for number, unit in enumerate(units)][::-1]

    monkeypatch.setattr("clipkit.eval.fleet.run_jobs", run_backwards)
    for name in ("vtab-pets", "vtab-dtd"):
        webdataset(tmp_path / "sets" / name)
    expected = zeroshot(run, tmp_path / "sets", "vtab", "--json", "--out", str(tmp_path / "one"))
    for _ in range(2):
        done = zeroshot(run, tmp_path / "sets", "vtab", "--json", "--out", str(tmp_path / "two"), "--engine", "ray")
        assert (done.exit_code, done.stdout) == (0, expected.stdout)
        assert (tmp_path / "two" / "results.jsonl").read_text() == (tmp_path / "one" / "results.jsonl").read_text()
    assert f"vtab-dtd: {tmp_path / 'two'} has its results already" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without torchrun"):
        evaluate_on_ray("vtab", "classification", (tmp_path,), {}, {}, {})


def test_a_suite_of_ones_own(run: Path, tmp_path: Path) -> None:
    webdataset(tmp_path / "sets" / "cars")
    suite = tmp_path / "mine.toml"
    suite.write_text('[[dataset]]\ndata = "cars"\nmetric = "calibration_error"\ntemplates = "{}"\n')
    done = zeroshot(run, tmp_path / "sets", str(suite))
    assert done.exit_code == 0, done.output
    assert "average of 1 dataset: " in done.stderr and "calibration error" in done.stdout
    for text, says in (
        ('[[dataset]]\ndata = "cars"\nmetric = "aupr"\n', "cars has no metric 'aupr'"),
        ("[dataset]\n", "lists no dataset: write [[dataset]]"),
        ("[[dataset]]\ntask = 'x'\n", 'dataset 1: it needs data = "FOLDER"'),
        ("[[dataset", "isn't valid TOML"),
        ('[[dataset]]\ndata = "cars"\ncolour = 1\n', "dataset 1: a classification task has no use for 'colour'"),
        ('[[dataset]]\ndata = "cars"\nmetrik = "top1"\n', "no use for 'metrik': did you mean metric"),
        ('[[dataset]]\ndata = "cars"\nmetric = "top-1"\n', "unknown metric 'top-1': did you mean top1"),
        (
            '[[dataset]]\ndata = "cars"\ntask = "retrieval"\nmetric = "text_retrieval_median_rank"\n',
            "dataset 1: text_retrieval_median_rank is a rank, which has no average with shares",
        ),
        ('[[dataset]]\ndata = "cars"\ntask = "knn"\ntemplates = "plain"\n', "a knn task has no use for 'templates'"),
    ):
        suite.write_text(text)
        done = zeroshot(run, tmp_path / "sets", str(suite))
        assert (done.exit_code, says in done.stderr) == (2, True), done.stderr


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "imagenet-a").mkdir()
    with pytest.raises(UserError, match="unknown suite 'vtap': did you mean vtab"):
        entries_of("vtap", tmp_path)
    with pytest.raises(UserError, match="holds no dataset of the suite retrieval"):
        entries_of("retrieval", tmp_path)
    (tmp_path / "wds_imagenet-a_test").mkdir()
    with pytest.raises(UserError, match="are both ImageNet-A: remove or rename one"):
        entries_of("imagenet", tmp_path)
    done = zeroshot(run, tmp_path, "vtab", "--templates", "{}")
    assert (done.exit_code, "--templates can't be heeded: a suite has its own" in done.stderr) == (2, True)


def parquet(root: Path) -> Path:
    root.mkdir(parents=True)
    pq.write_table(pa.table({"image": [picture(0)], "label": ["ant"], "caption": ["an ant"]}), root / "0.parquet")
    return root


def class_folders(root: Path) -> Path:
    return write_class_folders(root, {name: {"0.jpg": picture(0)} for name in ("ant", "bee")})


def by_splits(root: Path) -> Path:
    class_folders(root / "train")
    return class_folders(root / "val").parent


@pytest.mark.parametrize(
    ("first", "second"),
    [(webdataset, class_folders), (parquet, webdataset), (by_splits, by_splits), (parquet, by_splits)],
)
@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_a_folder_of_datasets_is_not_one_of_them(run: Path, tmp_path: Path, first, second, task: str) -> None:
    """What one of them says isn't what was asked for."""
    first(tmp_path / "sets" / "cars")
    second(tmp_path / "sets" / "pets")
    command = ["zeroshot", "--ckpt", str(run), "--data", str(tmp_path / "sets"), "--task", task, "--no-cache"]
    done = CliRunner().invoke(main, command)
    said = (
        f"Error: {tmp_path / 'sets'} holds several datasets (cars, pets): give one of them, or measure them all with "
    )
    assert (done.exit_code, done.stderr) == (2, said + "zeroshot --suite NAME or FILE.toml\n")


def test_class_folders_of_published_names_are_datasets(tmp_path: Path) -> None:
    for name in ("imagenet-a", "imagenet-r"):
        class_folders(tmp_path / name)
    with pytest.raises(UserError, match=r"several datasets \(imagenet-a, imagenet-r\)"):
        open_data("classification", tmp_path)


def test_what_lies_beside_a_dataset_is_none(tmp_path: Path) -> None:
    """Archives that class folders were unpacked from, what TFDS downloaded, folders of pictures."""
    by_splits(tmp_path / "a" / "pets")
    (tmp_path / "a" / "archives").mkdir()
    (tmp_path / "a" / "archives" / "images.tar").write_bytes(tar_of({"ant/0.jpg": picture(0)}))
    parquet(tmp_path / "a" / "downloads")
    assert open_data("classification", tmp_path / "a").name == "a-val"
    parquet(tmp_path / "b" / "data")
    (tmp_path / "b" / "assets").mkdir()
    (tmp_path / "b" / "assets" / "page.jpg").write_bytes(picture(0))
    assert open_data("classification", tmp_path / "b").name == "b"


def test_the_published_suites() -> None:
    sizes = {suite: sum(belongs(each, suite) for each in published_datasets().values()) for suite in
             ("imagenet", "vtab", "retrieval", "datacomp-38")}  # fmt: skip
    assert sizes == {"imagenet": 7, "vtab": 13, "retrieval": 2, "datacomp-38": 38}


def test_all_of_datacomps_datasets_can_be_measured() -> None:
    assert {each.kind for each in published_datasets().values()} <= set(KINDS)
