"""Intervals cover what they promise, and each metric equals its plain definition."""

import numpy as np
import pytest

from clipkit.eval.metrics import largest_class, mean_per_class_recall, measure
from clipkit.intervals import wilson


def coverage(recall_C: np.ndarray, images_C: np.ndarray, rounds: int = 600) -> float:
    rng = np.random.default_rng(1)
    labels_N = np.repeat(np.arange(len(images_C)), images_C)
    hits = 0
    for _ in range(rounds):
        _, low, high = mean_per_class_recall(rng.random(len(labels_N)) < recall_C[labels_N], labels_N)
        hits += low <= recall_C.mean() <= high
    return hits / rounds


@pytest.mark.parametrize(
    ("recall", "images"),
    [
        ([0.07] * 300, [1] * 300),
        ([0.6] * 10, [110] * 10),
        ([0.9, 0.3, 0.5, 0.7, 0.2, 0.6, 0.4, 0.5, 0.8, 0.1], [199, 191, 188, 117, 116, 102, 88, 62, 31, 2]),
        ([0.5] * 40 + [0.98] * 40, [2] * 40 + [200] * 40),
        (list(np.linspace(0, 1, 100)), [50] * 100),
        ([0.02] * 50, [30] * 50),
    ],
    ids=["one image each", "balanced", "emoji groups", "small classes are hard", "spread recalls", "near nothing"],
)
def test_mean_per_class_interval_covers(recall: list[float], images: list[int]) -> None:
    # 600 rounds of a true 95% have a standard error of 0.9%.
    assert coverage(np.array(recall), np.array(images)) >= 0.93


def test_mean_per_class_interval_is_not_idle() -> None:
    labels_N = np.repeat(np.arange(1000), 50)
    value, low, high = mean_per_class_recall(np.random.default_rng(0).random(50_000) < 0.63, labels_N)
    assert value == pytest.approx(0.63, abs=0.01)
    assert 0.006 < high - low < 0.01


def test_mean_per_class_recall_with_one_image_each_is_top1() -> None:
    correct_N = np.arange(50) % 7 == 0
    assert mean_per_class_recall(correct_N, np.arange(50)) == pytest.approx(
        (correct_N.mean(), *wilson(correct_N.mean(), 50))
    )


def test_measure_by_hand() -> None:
    top_N5 = np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 1, 2, 3, 4], [5, 4, 3, 2, 1]])
    labels_N = np.array([0, 0, 5, 0])
    found = {each.metric: each for each in measure(top_N5, labels_N, 6)}
    assert {name: each.value for name, each in found.items()} == pytest.approx(
        {"top1": 2 / 4, "top5": 3 / 4, "mean_per_class_recall": (1 / 3 + 1) / 2}
    )
    assert {name: each.chance for name, each in found.items()} == pytest.approx(
        {"top1": 1 / 6, "top5": 5 / 6, "mean_per_class_recall": 1 / 6}
    )
    assert all(each.n == 4 for each in found.values())
    assert largest_class(labels_N) == 3 / 4


def test_top5_is_left_out_where_it_is_always_right() -> None:
    assert [each.metric for each in measure(np.array([[0, 1], [1, 0]]), np.array([0, 0]), 2)] == [
        "top1",
        "mean_per_class_recall",
    ]


def test_guessing_is_seen_as_chance() -> None:
    rng = np.random.default_rng(3)
    seen = [
        each.low < each.chance < each.high
        for _ in range(100)
        for each in measure(np.argsort(rng.random((400, 100)))[:, :5], rng.integers(0, 100, 400), 100)
    ]
    assert np.mean(seen) > 0.92
