"""Accuracy with its uncertainty, beside what guessing gives.

A zero-shot number without an interval and a chance level can't be told from luck, so each comes with both here.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipkit.intervals import wilson


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


def measure(top_NK: NDArray[np.int64], labels_N: NDArray[np.int64], classes: int) -> list[Measure]:
    """top-1, top-5 and mean per-class recall from the best guesses of each image, best first.

    `top_NK` holds class numbers, K at least min(5, classes). With five classes or fewer top-5 is right by necessity and
    is left out.
    """
    n = len(labels_N)
    hit_NK = top_NK[:, :5] == labels_N[:, None]
    measures = []
    for k in (1, 5):
        if k == 1 or classes > k:
            value = float(hit_NK[:, :k].any(axis=1).mean())
            measures.append(Measure(f"top{k}", value, *wilson(value, n), n, k / classes))
    measures.append(Measure("mean_per_class_recall", *mean_per_class_recall(hit_NK[:, 0], labels_N), n, 1 / classes))
    return measures


def largest_class(labels_N: NDArray[np.int64]) -> float:
    """The share of the class with the most images: the top-1 of always guessing it."""
    return float(np.bincount(labels_N).max() / len(labels_N))
