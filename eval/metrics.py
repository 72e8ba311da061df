"""Accuracy with its uncertainty, beside what guessing gives.

A zero-shot number without an interval and a chance level can't be told from luck, so each comes with both here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipkit.intervals import wilson

DRAWS = 200
BINS = 15


@dataclass(frozen=True)
class Measure:
    """One number: `value` with its 95% interval `low`..`high` over `n` images, and the `chance` level of guessing.

    All but `n` are shares, 0 to 1.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    chance: float


def mean_per_class_recall(correct_N: NDArray[np.bool_], labels_N: NDArray[np.int64]) -> tuple[float, float, float]:
    """The recall of each class that occurs, averaged over the classes, with a 95% interval: (value, low, high).

    The interval is for other images of the same classes. The variance of the mean of C recalls is the sum of
    p(1-p)/n over the classes, by C². A class with two images or more gives its own unbiased term; a class with a single
    image can't, and takes the variance at the mean recall. The interval is Wilson's at the number of trials that has
    this variance, and never at more than the number it has when all classes are equally hard; so with one image in
    each class it is exactly the interval of top-1.
    """
    classes, class_N = np.unique(labels_N, return_inverse=True)
    n_C = np.bincount(class_N, minlength=len(classes)).astype(np.float64)
    recall_C = np.bincount(class_N, weights=correct_N.astype(np.float64), minlength=len(classes)) / n_C
    value = float(recall_C.mean())
    pooled = value * (1 - value)
    variance_C = recall_C * (1 - recall_C) / np.maximum(n_C - 1, 1)
    variance = float(np.where(n_C > 1, variance_C, pooled).sum()) / len(classes) ** 2
    trials = len(classes) ** 2 / float((1 / n_C).sum())
    if variance > 0:
        trials = min(trials, pooled / variance)
    low, high = wilson(value, trials)
    return value, low, high


def measure(
    top_NK: NDArray[np.int64],
    labels_N: NDArray[np.int64],
    classes: int,
    confidence_N: NDArray[np.float32] | None = None,
) -> list[Measure]:
    """top-1, top-5, mean per-class recall and calibration error from the best guesses of each image, best first.

    `top_NK` holds class numbers, K at least min(5, classes). With five classes or fewer top-5 is right by necessity and
    is left out; so is the calibration error without the probabilities of the first guesses.
    """
    n = len(labels_N)
    hit_NK = top_NK[:, :5] == labels_N[:, None]
    measures = []
    for k in (1, 5):
        if k == 1 or classes > k:
            value = float(hit_NK[:, :k].any(axis=1).mean())
            measures.append(Measure(f"top{k}", value, *wilson(value, n), n, k / classes))
    measures.append(Measure("mean_per_class_recall", *mean_per_class_recall(hit_NK[:, 0], labels_N), n, 1 / classes))
    if confidence_N is not None:
        certain_N, right_N = confidence_N.astype(np.float64), hit_NK[:, 0]

        def error_of(index_N: NDArray[np.int64]) -> float:
            return calibration_error(certain_N[index_N], right_N[index_N])

        # Guessing at 1 in C is calibrated perfectly, so there is no level of chance to be better than.
        measures.append(bootstrapped("calibration_error", error_of, n, 0.0))
    return measures


def bootstrapped(metric: str, value_of: Callable[[NDArray[np.int64]], float], n: int, chance: float) -> Measure:
    """A number over images, with the 95% interval of a bootstrap over them (percentiles of 200 draws, seeded).

    `value_of` gives it for some of the n images, a few of them several times.
    """
    random = np.random.default_rng(0)
    value = value_of(np.arange(n))
    drawn = [value_of(random.integers(0, n, n)) for _ in range(DRAWS)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Measure(metric, value, min(value, float(low)), max(value, float(high)), n, chance)


def confidence_bins(confidence_N: NDArray[np.floating]) -> NDArray[np.int64]:
    """Which of BINS bins of equal width, closed at their upper ends, each confidence is in."""
    return np.clip(np.ceil(confidence_N * BINS).astype(np.int64) - 1, 0, BINS - 1)


def calibration_error(confidence_N: NDArray[np.float64], correct_N: NDArray[np.bool_]) -> float:
    """The expected calibration error: |accuracy − mean confidence| over 15 bins of equal width, weighted by their
    images (Guo et al., 2017).
    """
    bin_N = confidence_bins(confidence_N)
    gap_B = np.bincount(bin_N, weights=correct_N - confidence_N, minlength=BINS)
    return float(np.abs(gap_B).sum() / len(confidence_N))


def average_precision(score_N: NDArray[np.float32], truth_N: NDArray[np.bool_]) -> float:
    """The precision at each true one in order of the score, averaged; 0 where none is true, as in CLIP_benchmark."""
    truth_N = truth_N[np.argsort(-score_N, kind="stable")]
    precision_N = np.cumsum(truth_N) / np.arange(1, len(truth_N) + 1)
    return float(precision_N[truth_N].sum() / max(1, truth_N.sum()))


def measure_several(score_NC: NDArray[np.float32], truth_NC: NDArray[np.bool_]) -> list[Measure]:
    """Mean average precision over the classes of images that may have several labels."""

    def value_of(index_N: NDArray[np.int64]) -> float:
        scores_CN, truths_CN = score_NC[index_N].T, truth_NC[index_N].T
        return float(np.mean([average_precision(*each) for each in zip(scores_CN, truths_CN, strict=True)]))

    return [bootstrapped("mean_average_precision", value_of, len(score_NC), float(truth_NC.mean()))]


def worst_group(correct_N: NDArray[np.bool_], group_N: NDArray[np.int64]) -> float:
    """The lowest accuracy over the groups that occur (Koh et al., "WILDS", 2021)."""
    groups, number_N = np.unique(group_N, return_inverse=True)
    right_G = np.bincount(number_N, weights=correct_N, minlength=len(groups))
    return float((right_G / np.bincount(number_N)).min())


def measure_worst_group(
    top_NK: NDArray[np.int64], labels_N: NDArray[np.int64], group_N: NDArray[np.int64], k: int, chance: float
) -> Measure:
    """The top-k of the group that is worst by it."""
    hit_N = (top_NK[:, :k] == labels_N[:, None]).any(axis=1)

    def value_of(index_N: NDArray[np.int64]) -> float:
        return worst_group(hit_N[index_N], group_N[index_N])

    return bootstrapped(f"worst_group_top{k}", value_of, len(hit_N), chance)


def macro_f1(guess_N: NDArray[np.int64], labels_N: NDArray[np.int64], classes: int) -> float:
    """The F1 of each class that occurs among the labels, averaged (WILDS; DataComp's metric of iWildCam)."""
    true_C = np.bincount(labels_N, minlength=classes)
    guessed_C = np.bincount(guess_N, minlength=classes)
    right_C = np.bincount(labels_N[guess_N == labels_N], minlength=classes)
    occurs_C = true_C > 0
    return float((2 * right_C[occurs_C] / (true_C + guessed_C)[occurs_C]).mean())


def measure_macro_f1(guess_N: NDArray[np.int64], labels_N: NDArray[np.int64], classes: int) -> Measure:
    """Macro F1, beside that of guessing each class equally often."""

    def value_of(index_N: NDArray[np.int64]) -> float:
        return macro_f1(guess_N[index_N], labels_N[index_N], classes)

    share_C = np.bincount(labels_N) / len(labels_N)
    share_C = share_C[share_C > 0]
    chance = float((2 * share_C / classes / (share_C + 1 / classes)).mean())
    return bootstrapped("macro_f1", value_of, len(labels_N), chance)


def largest_class(labels_N: NDArray[np.int64]) -> float:
    """The share of the class with the most images: the top-1 of always guessing it."""
    return float(np.bincount(labels_N).max() / len(labels_N))
