"""Probes equal their definitions, choose by training images only, and refuse what would give a wrong number."""

import io
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small_encoder import small_encoder, small_run

from clipkit import embedded
from clipkit.cli.main import main
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, Encoder
from clipkit.embedding.script import LoadedModel
from clipkit.errors import UserError
from clipkit.eval.comparison.published import known_dataset
from clipkit.eval.evaluation import Outcome
from clipkit.eval.metrics import Measure
from clipkit.eval.open import open_data
from clipkit.eval.probe import neighbours
from clipkit.eval.probe.neighbours import Neighbours, Vote, choose_vote
from clipkit.eval.probe.ridge import PENALTIES, Ridge, fit
from clipkit.eval.probe.task import Probe, ProbeKind, draw, hold_out, match_labels, mean_of_draws, open_probe
from clipkit.eval.report.page import report
from clipkit.eval.results import Result, read_predictions, read_results
from clipkit.eval.suite import evaluate_suite

CPU = Compute(pick("cpu"), batch_size=64)
WHERE = torch.device("cpu")
TRAIN, TEST = 300, 90


def blobs(images: int, width: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """Unit features float32 in overlapping classes of unequal size, none of which is empty."""
    rng = np.random.default_rng(seed)
    labels_N = np.concatenate([np.arange(classes), rng.integers(0, classes, (2, images - classes)).min(axis=0)])
    feature_NE = rng.normal(size=(classes, width))[labels_N] + 2 * rng.normal(size=(images, width)) + 0.5
    feature_NE /= np.linalg.norm(feature_NE, axis=1, keepdims=True)
    return torch.from_numpy(feature_NE.astype(np.float32)), labels_N


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return small_encoder()


def colours(image: bytes) -> str:
    """A class that even random weights can tell."""
    red, green, blue = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).mean(axis=(0, 1)).tolist()
    brightness = ["dark", "middle", "bright"][int(np.digitize(red + green + blue, [470, 560]))]
    return f"{'warm' if red > blue + 30 else 'cold'} {brightness}"


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training and a test split of emoji, by their colours."""
    folder = tmp_path_factory.mktemp("data") / "groups"
    folder.mkdir()
    images = pq.read_table(embedded.emoji_parquet("heldout"))["image"].to_pylist()
    shuffled = [images[place] for place in np.random.default_rng(0).permutation(len(images))]
    for split, chosen in (("train", shuffled[:TRAIN]), ("test", shuffled[TRAIN : TRAIN + TEST])):
        table = pa.table({"image": chosen, "label": [colours(image) for image in chosen]})
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (number % 256, 40 * (number % 6), 9)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, labels: list[Any], first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [png(first + number) for number in range(len(labels))]
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


# ---- Ridge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "width"), [(90, 12), (12, 90), (40, 40)])
def test_every_penalty_equals_a_solution_of_its_own(images: int, width: int) -> None:
    feature_NE, labels_N = blobs(images, width, 4)
    ridge = Ridge(feature_NE, labels_N, 4)
    target_NC = np.eye(4)[labels_N]
    rows = np.concatenate([feature_NE.numpy().astype(np.float64), np.ones((images, 1))], axis=1)
    for penalty in PENALTIES:
        free_bias = np.diag([*[images * penalty] * width, 0.0])
        expected = np.linalg.solve(rows.T @ rows + free_bias, rows.T @ target_NC)
        weight_EC, bias_C = ridge.solve(penalty)
        np.testing.assert_allclose(weight_EC.numpy(), expected[:-1], atol=1e-6)
        np.testing.assert_allclose(bias_C.numpy(), expected[-1], atol=1e-6)


def test_rows_are_added_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    feature_NE, labels_N = blobs(90, 12, 4)
    whole = fit(feature_NE, labels_N, 4, hold_out(labels_N, rng()))
    monkeypatch.setattr("clipkit.eval.probe.ridge.ROWS", 7)
    parts = fit(feature_NE, labels_N, 4, hold_out(labels_N, rng()))
    assert parts.penalty == whole.penalty
    torch.testing.assert_close(parts.weight_EC, whole.weight_EC)
    for mine, other in zip(parts.guess(feature_NE, 3), whole.guess(feature_NE, 3), strict=True):
        np.testing.assert_allclose(mine, other)


def test_the_penalty_is_the_strongest_of_the_best_on_held_out_images() -> None:
    feature_NE, labels_N = blobs(200, 60, 4)
    held_N = hold_out(labels_N, rng())
    probe = fit(feature_NE, labels_N, 4, held_N)
    part = Ridge(feature_NE[~held_N], labels_N[~held_N], 4)
    right = []
    for penalty in PENALTIES:
        weight_EC, bias_C = part.solve(penalty)
        guess_N = (feature_NE[held_N].double() @ weight_EC + bias_C).argmax(dim=1).numpy()
        right.append((guess_N == labels_N[held_N]).sum())
    assert probe.penalty == max(penalty for penalty, n in zip(PENALTIES, right, strict=True) if n == max(right))
    assert PENALTIES[0] < probe.penalty < PENALTIES[-1]
    torch.testing.assert_close(probe.weight_EC, Ridge(feature_NE, labels_N, 4).solve(probe.penalty)[0])


def test_guesses_are_best_first_and_ties_in_order() -> None:
    feature_NE, labels_N = blobs(60, 9, 3)
    probe = fit(feature_NE, labels_N, 3, hold_out(labels_N, rng()))
    top_NK, score_NK = probe.guess(feature_NE, 3)
    score_NC = np.clip(feature_NE.double().numpy() @ probe.weight_EC.numpy() + probe.bias_C.numpy(), 0, 1)
    np.testing.assert_allclose(score_NK, np.take_along_axis(score_NC, top_NK, axis=1), atol=1e-6)
    assert (np.sort(top_NK, axis=1) == np.arange(3)).all()
    probe.weight_EC.zero_()
    probe.bias_C.zero_()
    assert probe.guess(feature_NE, 3)[0][0].tolist() == [0, 1, 2]


# ---- Parts of the training images ------------------------------------------------------------------------------------


def test_a_fifth_of_each_class_is_held_out() -> None:
    labels_N = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [1, 2, 10, 100]))
    held_N = hold_out(labels_N, rng())
    assert np.bincount(labels_N[held_N], minlength=4).tolist() == [0, 1, 2, 20]
    np.testing.assert_array_equal(held_N, hold_out(labels_N, rng()))
    assert (held_N != hold_out(labels_N, np.random.default_rng(4))).any()
    assert hold_out(np.zeros(200_000, np.int64), rng()).sum() == 20_000


def test_draws_are_seeded_and_of_every_class() -> None:
    labels_N = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [5, 9, 30]))
    places = draw(labels_N, 5, rng())
    assert Counter(labels_N[places].tolist()) == {0: 5, 1: 5, 2: 5}
    assert len(set(places.tolist())) == 15
    np.testing.assert_array_equal(places, draw(labels_N, 5, rng()))
    assert set(places.tolist()) != set(draw(labels_N, 5, np.random.default_rng(4)).tolist())


def test_the_interval_of_draws_is_for_other_draws_and_images() -> None:
    drawn = [Measure("top1", 0.5 + step, 0.4 + step, 0.62 + step, 50, 0.1) for step in np.linspace(-0.09, 0.09, 10)]
    found = mean_of_draws(drawn, "5-shot")
    half = 2.262157 * np.std([each.value for each in drawn], ddof=1) / math.sqrt(10)
    assert (found.metric, found.value, found.n, found.chance) == ("top1:5-shot", pytest.approx(0.5), 50, 0.1)
    assert (found.low, found.high) == pytest.approx((0.5 - math.hypot(half, 0.1), 0.5 + math.hypot(half, 0.12)))


# ---- Neighbours ------------------------------------------------------------------------------------------------------


def on_a_grid(rows: int, seed: int) -> torch.Tensor:
    """Features whose products are exact, so that many are equal."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-1, 2, (rows, 3)).astype(np.float32))


def by_hand(query_E: Any, train_NE: Any, labels_N: Any, count: int, temperature: float, all_counts: int) -> list[int]:
    """The classes in the order of their votes, then of their nearest images."""
    score_N = train_NE @ query_E
    order = sorted(range(len(score_N)), key=lambda place: (-score_N[place], place))[:all_counts]
    votes: dict[int, float] = {}
    for rank, place in enumerate(order):
        weight = math.exp((score_N[place] - score_N[order[0]]) / temperature) if rank < count else 0.0
        votes[int(labels_N[place])] = votes.get(int(labels_N[place]), 0.0) + weight
    return sorted(votes, key=lambda label: -votes[label])  # stable: of equal ones the nearer


@pytest.mark.parametrize(("count", "temperature"), [(1, math.inf), (3, math.inf), (10, 0.1), (50, 0.03)])
def test_neighbours_equal_brute_force_with_ties(count: int, temperature: float) -> None:
    train_NE, query_QE = on_a_grid(70, 0), on_a_grid(30, 1)
    labels_N = np.random.default_rng(2).integers(0, 4, 70)
    for tile in (8, 64, 4096):
        among = Neighbours(train_NE, labels_N, 6, WHERE, tile)
        top_QK, share_QK = among.guess(query_QE, Vote(count, temperature), 4)
        for query_E, top_K in zip(query_QE.numpy(), top_QK, strict=True):
            assert top_K.tolist() == by_hand(query_E, train_NE.numpy(), labels_N, count, temperature, 50)
        assert (np.diff(share_QK, axis=1) <= 0).all()
        assert (share_QK.sum(axis=1) < 1 + 1e-6).all()


def test_the_vote_is_chosen_on_held_out_images() -> None:
    feature_NE, labels_N = blobs(240, 20, 5)
    held_N = hold_out(labels_N, rng())
    vote = choose_vote(feature_NE, labels_N, 5, WHERE, held_N)
    others = Neighbours(feature_NE[~held_N], labels_N[~held_N], 5, WHERE)
    right = {
        (count, temperature): int(
            (others.guess(feature_NE[held_N], Vote(count, temperature), 1)[0][:, 0] == labels_N[held_N]).sum()
        )
        for count in others.counts
        for temperature in neighbours.TEMPERATURES
    }
    assert (vote.count, vote.temperature) == max(right, key=lambda each: right[each])  # the first of the best
    assert len(set(right.values())) > 3
    assert choose_vote(feature_NE[:3], np.arange(3), 3, WHERE, hold_out(np.arange(3), rng())) == Vote(1, math.inf)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(query_QE: torch.Tensor, candidates: Any, count: int, tile: int) -> Any:
        asked.append((len(query_QE), tile, count))
        return best_matches(query_QE, candidates, count, tile)

    best_matches = neighbours.best_matches
    monkeypatch.setattr(neighbours, "best_matches", spy)
    feature_NE, labels_N = blobs(2500, 4, 3)
    Neighbours(feature_NE, labels_N, 3, WHERE).guess(feature_NE, Vote(5, 0.1), 2)
    assert asked == [(1024, 4096, 200), (1024, 4096, 200), (452, 4096, 200)]
    asked.clear()
    list(Neighbours(feature_NE, labels_N, 1 << 20, WHERE).nearest(feature_NE[:40]))
    assert {rows for rows, _, _ in asked} == {16, 8}


# ---- As tasks --------------------------------------------------------------------------------------------------------


def features(encoder: Encoder, file: Path) -> tuple[torch.Tensor, list[str]]:
    table = pq.read_table(file)
    model = LoadedModel(encoder, CPU.device)
    return torch.from_numpy(model.encode_image(table["image"].to_pylist())), table["label"].to_pylist()


def test_a_linear_probe_of_a_model(encoder: Encoder, emoji: Path) -> None:
    task = open_data("linear-probe", emoji)
    assert (task.name, task.kind, len(task)) == ("groups-test-linear-probe", "linear-probe", TRAIN + TEST)
    done: list[int] = []
    outcome = task.measure(encoder, Compute(CPU.device, batch_size=64, progress=done.append), keep_guesses=True)
    assert done == sorted(done)
    assert done[-1] == TRAIN + TEST
    by_name = {measured.metric: measured for measured in outcome.measures}
    assert set(by_name) == {"top1", "top5", "mean_per_class_recall"}
    (train_NE, train_labels), (test_NE, test_labels) = (
        features(encoder, emoji / f"{s}.parquet") for s in ("train", "test")
    )
    names = sorted(set(train_labels))
    labels_N = np.array([names.index(label) for label in train_labels])
    held_N = hold_out(labels_N, np.random.default_rng(0))
    probe = fit(train_NE, labels_N, len(names), held_N)
    guesses = [names[number] for number in probe.guess(test_NE, 1)[0][:, 0]]
    assert by_name["top1"].value == np.mean([a == b for a, b in zip(guesses, test_labels, strict=True)])
    assert by_name["top1"].low > by_name["top1"].chance == 1 / len(names)
    assert outcome.notes == (f"penalty {probe.penalty:.2g}, chosen by {held_N.sum()} of {TRAIN} training images",)
    assert outcome.guesses is not None
    rows = outcome.guesses.to_pylist()
    assert [row["guesses"][0] for row in rows] == guesses
    assert [row["label"] for row in rows] == test_labels
    assert (len(rows[0]["guesses"]), rows[0]["image"][:4]) == (5, b"RIFF")


def test_few_shots_and_neighbours_of_a_model(encoder: Encoder, emoji: Path) -> None:
    few = open_data("few-shot", emoji, shots="1,4")
    outcome = few.measure(encoder, CPU)
    assert [each.metric for each in outcome.measures][::3] == ["top1:1-shot", "top1:4-shot"]
    assert outcome.measures[0].value < outcome.measures[3].value
    assert outcome.measures == few.measure(encoder, CPU).measures
    near = open_data("knn", emoji, name="near")
    knn = near.measure(encoder, CPU)
    assert knn.measures[0].low > knn.measures[0].chance
    assert "neighbour" in knn.notes[0]
    hashes = [each.hashes(encoder.preprocess) for each in (few, near, open_data("few-shot", emoji, shots="1"))]
    assert len({each["split"] for each in hashes}) == len({each["train"] for each in hashes}) == 1
    assert len({each["probe"] for each in hashes}) == 3


@pytest.mark.parametrize("kind", ["linear-probe", "knn", "few-shot"])
def test_nothing_is_chosen_by_test_images(encoder: Encoder, emoji: Path, tmp_path: Path, kind: ProbeKind) -> None:
    table = pq.read_table(emoji / "test.parquet")
    labels = np.random.default_rng(1).permutation(table["label"].to_pylist()).tolist()
    pq.write_table(table.set_column(1, "label", pa.array(labels)), tmp_path / "test.parquet")

    def measure(data: Path) -> tuple[Outcome, dict[str, str]]:
        task = open_probe(kind, data, train_data=emoji, shots="3" if kind == "few-shot" else None)
        return task.measure(encoder, CPU, keep_guesses=True), task.hashes(encoder.preprocess)

    (real, real_hashes), (permuted, permuted_hashes) = measure(emoji), measure(tmp_path / "test.parquet")
    assert real.notes == permuted.notes
    assert real.guesses is not None
    assert permuted.guesses is not None
    for column in ("guesses", "probabilities"):
        assert real.guesses[column].to_pylist() == permuted.guesses[column].to_pylist()
    assert real.measures[0].value > permuted.measures[0].value
    assert real_hashes["train"] == permuted_hashes["train"]
    assert real_hashes["split"] != permuted_hashes["split"]


def test_the_command_and_the_page(emoji: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    arguments = ["zeroshot", "--ckpt", run, "--data", emoji / "test.parquet", "--train-data", emoji / "train.parquet"]
    for options in (["--task", "knn"], ["--task", "few-shot", "--shots", "2"]):
        result = CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu", *options])
        assert result.exit_code == 0, result.output
        assert f"{options[1]}: {TEST} images, 6 classes" in result.stdout
    assert "top-1, 2-shot" in result.stdout
    assert {each.kind for each in read_results(run)} == {"knn", "few-shot"}
    rows, about = read_predictions(run / "predictions-test-knn.parquet")
    assert (len(rows), about["kind"], about["classes"]) == (TEST, "knn", 6)
    assert "What it sees: test-knn" in report(run).read_text(encoding="utf-8")


def test_a_suite_measures_a_probe_again_when_it_learns_from_other_images(emoji: Path, tmp_path: Path) -> None:
    run, half = small_run(tmp_path / "run"), tmp_path / "half.parquet"
    pq.write_table(pq.read_table(emoji / "train.parquet").slice(0, TRAIN // 2), half)
    notes = []
    for train in (emoji / "train.parquet", half):
        lines = ["[[dataset]]", 'data = "test.parquet"', 'task = "knn"', f'train_data = "{train}"']
        (tmp_path / "mine.toml").write_text("\n".join(lines), encoding="utf-8")
        result, _ = evaluate_suite(str(run), str(tmp_path / "mine.toml"), emoji, device="cpu")
        assert result.metric == "top1"
        notes += result.notes
    assert [note.rpartition(" of ")[2] for note in notes] == ["300 training images", "150 training images"]


def test_published_numbers_are_not_of_probes() -> None:
    measured = Measure("top1", 0.7, 0.69, 0.71, 10_000, 0.01)
    result = Result(**vars(measured), classes=100, task="cifar100", data="", samples_seen=0, checkpoint="")
    assert known_dataset(result) is not None
    assert known_dataset(replace(result, kind="knn")) is None


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_training_images_are_of_the_split_train(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 50), ("test", 100)):
        for number, label in enumerate("aabb"):
            path = tmp_path / "set" / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(first + number))
    task = open_probe("knn", tmp_path / "set", split="test")
    assert (task.path, task.train.path) == (tmp_path / "set" / "test", tmp_path / "set" / "train")
    assert open_probe("knn", tmp_path / "set").name == "set-val-knn"
    other = open_probe("knn", tmp_path / "set", train_data=tmp_path / "set" / "val", split="test")
    assert other.train.path == tmp_path / "set" / "val"
    (tmp_path / "set" / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"--train-data names: .*set has no split 'train': it has test, validation"):
        open_probe("knn", tmp_path / "set")


def test_labels_are_matched_by_their_texts(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", ["a", "c", "b", "c", "a", "b"])
    test = write(tmp_path / "test.parquet", ["c", "b"], first=50)
    task = open_probe("knn", test, train_data=train)
    assert (task.classes.labels, task.labels_N.tolist()) == (("a", "b", "c"), [2, 1])
    twice = replace(task.train, label_names=("b", "b", "a"))
    assert match_labels(twice, twice)[2].tolist() == twice.labels_N.tolist()
    with pytest.raises(UserError, match="two classes have one name, and the lists of names differ"):
        match_labels(twice, task.images)
    with pytest.raises(UserError, match="images have several labels, which a knn can't learn"):
        Probe("knn", task.images, replace(task.train, targets_NC=np.ones((6, 3), bool)))
    numbers = open_probe(
        "knn", write(tmp_path / "n.parquet", [7, 9], first=50), train_data=write(tmp_path / "m.parquet", [9, 7, 3])
    )
    assert (numbers.classes.labels, numbers.labels_N.tolist()) == (("3", "7", "9"), [1, 2])


def test_images_in_both_are_told(encoder: Encoder, tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", ["a", "b"] * 8)
    test = write(tmp_path / "test.parquet", ["b", "a", "b"], first=14)
    task = open_probe("linear-probe", test, train_data=train)
    for _ in range(2):
        assert "2 of 3 test images are training images too, to the byte" in task.measure(encoder, CPU).notes
    copy = write(tmp_path / "copy.parquet", ["a", "b"] * 4)
    with pytest.raises(UserError, match=r"copy\.parquet: all test images are training images of .*train\.parquet too"):
        open_probe("linear-probe", copy, train_data=train).measure(encoder, CPU)


def test_broken_images_are_counted(encoder: Encoder, tmp_path: Path) -> None:
    for name, first in (("train", 0), ("test", 200)):
        images = [png(first + number) for number in range(200)]
        images[7] = b"none"
        pq.write_table(pa.table({"image": images, "label": ["a", "b"] * 100}), tmp_path / f"{name}.parquet")
    outcome = open_probe("linear-probe", tmp_path).measure(encoder, CPU, keep_guesses=True)
    assert (outcome.unreadable, outcome.measures[0].n) == (1, 199)
    assert [note.partition(" can't")[0] for note in outcome.notes[:2]] == [
        f"1 image of {tmp_path}/train",
        f"1 image of {tmp_path}/test",
    ]
    assert outcome.guesses is not None
    assert outcome.guesses.to_pylist()[7]["problem"]


@pytest.mark.parametrize(
    ("kind", "train", "options", "says"),
    [
        ("knn", ["a", "c"], {}, r"has no training images of the class 'b' of .*test\.parquet: choose from a, c"),
        ("knn", ["x", "y"], {}, r"of the class 'a' and 1 more of"),
        ("knn", ["a", "b"], {"shots": "5"}, "--shots can't be heeded: a knn learns from all training images"),
        ("few-shot", ["a", "b", "b"], {"shots": "2"}, "class 'a' has 1 readable training image, fewer than 2"),
        ("few-shot", ["a", "b"], {"shots": "2,1"}, "--shots '2,1' isn't a list of rising numbers"),
        ("few-shot", ["a", "b"], {"shots": "0"}, "isn't a list of rising numbers"),
        ("few-shot", ["a", "b"], {"shots": "1,x"}, "isn't a list of rising numbers"),
        ("few-shot", ["a", "b"], {"shots": "1,"}, "isn't a list of rising numbers"),
        ("linear-probe", ["a", "b"], {"templates_name": "plain"}, "--templates can't be heeded"),
        ("linear-probe", ["a", "b"], {"label": "lable"}, "has no column 'lable'"),
        ("retrieval", ["a", "b"], {}, "--train-data can't be heeded: a retrieval task has no use for it"),
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path, kind: Any, train: list[str], options: dict[str, Any], says: str
) -> None:
    test = write(tmp_path / "test.parquet", ["a", "b"], first=50)
    with pytest.raises(UserError, match=says) as caught:
        open_data(kind, test, train_data=write(tmp_path / "train.parquet", train), **options)
    assert "\n" not in str(caught.value)


def test_test_images_are_never_learned_from(tmp_path: Path) -> None:
    data = write(tmp_path / "a" / "test.parquet", ["a", "b"])
    for given in (None, data, tmp_path / "a" / ".." / "a" / "test.parquet"):
        with pytest.raises(UserError, match="can't be tested on its own training images: give --train-data"):
            open_probe("knn", data, train_data=given)
    with pytest.raises(UserError, match="can't be tested on its own training images"):
        open_probe("knn", tmp_path / "a")
