"""Recall and median rank in both directions, each with its interval and with what guessing gives.

Recall@k is the share of queries with a right answer among the first k: of an image any of its captions, as CLIP's paper
and CLIP_benchmark have it. The captions of one image are no independent trials, so the intervals come from a bootstrap
over images (Efron, 1979).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipkit.eval.metrics import Measure
from clipkit.eval.retrieval.ranks import Ranks
from clipkit.intervals import wilson

RECALL_AT = (1, 5, 10)
RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True, eq=False)
class Direction:
    """The ranks of Q queries of one kind among as many candidates, lowest rank first."""

    name: str
    rank_Q: NDArray[np.int64]
    image_Q: NDArray[np.int64]
    """The image that each query is of."""
    right_Q: NDArray[np.int64]
    """How many of the candidates are right."""
    candidates: int

    @property
    def recalls(self) -> list[int]:
        """Each k of a recall; one that all candidates fulfil says nothing."""
        return [k for k in RECALL_AT if k < self.candidates]

    @property
    def metrics(self) -> list[str]:
        """The names of what `numbers` gives."""
        return [f"{self.name}_retrieval_{each}" for each in (*(f"recall@{k}" for k in self.recalls), "median_rank")]

    def numbers(self, times_N: NDArray[np.int64]) -> list[float]:
        """Recalls and the median rank when each image is there so many times."""
        until_Q = np.cumsum(times_N[self.image_Q])
        ends = np.searchsorted(self.rank_Q, self.recalls, side="right")
        recalls = [float(until_Q[end - 1] / until_Q[-1]) if end else 0.0 for end in ends]
        middle = np.searchsorted(until_Q, [(until_Q[-1] - 1) // 2, until_Q[-1] // 2], side="right")
        return [*recalls, float(self.rank_Q[middle].sum() // 2)]

    def chances(self) -> list[float]:
        """The same of a model that guesses."""
        return [*(self.chance(k) for k in self.recalls), float(self._middle())]

    def chance(self, k: int) -> float:
        """That one of the right answers is among k drawn at random, over all queries."""
        right_U, count_U = np.unique(self.right_Q, return_counts=True)
        total = 0.0
        for right, count in zip(right_U.tolist(), count_U.tolist(), strict=True):
            total += count * (1 - _share_without(right, k, self.candidates))
        return total / len(self.right_Q)

    def _middle(self) -> int:
        """The smallest rank that half of the guessed ranks don't exceed."""
        low, high = 1, self.candidates
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.chance(middle) > 0.5 - 1e-9 else (middle + 1, high)
        return low


def _share_without(right: int, k: int, candidates: int) -> float:
    """The probability that k candidates drawn at random are all wrong."""
    if k > candidates - right:
        return 0.0
    ways = math.lgamma(candidates - right + 1) - math.lgamma(candidates - right - k + 1)
    return math.exp(ways - math.lgamma(candidates + 1) + math.lgamma(candidates - k + 1))


def directions(ranks: Ranks, image_of_C: NDArray[np.int64]) -> tuple[Direction, Direction]:
    """From images to their captions, and from captions to their image."""
    images, captions = len(ranks.text_N), len(ranks.image_C)
    by_text, by_image = np.argsort(ranks.text_N, kind="stable"), np.argsort(ranks.image_C, kind="stable")
    captions_N = np.bincount(image_of_C, minlength=images)
    return (
        Direction("text", ranks.text_N[by_text], by_text, captions_N[by_text], captions),
        Direction("image", ranks.image_C[by_image], image_of_C[by_image], np.ones_like(image_of_C), images),
    )


def retrieval_measures(ranks: Ranks, image_of_C: NDArray[np.int64]) -> list[Measure]:
    """recall@1, 5, 10 and the median rank: `text_retrieval_…` from image to text, `image_retrieval_…` from text to
    image (CLIP_benchmark's names), and `mean_recall@1` of the two.

    `n` counts the queries, of the mean the images. The median rank is rounded down, as OpenCLIP's.
    """
    images = len(ranks.text_N)
    both = directions(ranks, image_of_C)
    names = [name for each in both for name in each.metrics]
    counts = [len(each.rank_Q) for each in both for _ in each.metrics]
    chances = [chance for each in both for chance in each.chances()]
    values = [value for each in both for value in each.numbers(np.ones(images, dtype=np.int64))]
    rng = np.random.default_rng(SEED)
    drawn = np.empty((RESAMPLES, len(names)))
    for number in range(RESAMPLES):
        times_N = np.bincount(rng.integers(images, size=images), minlength=images)
        drawn[number] = [value for each in both for value in each.numbers(times_N)]
    first = [number for number, name in enumerate(names) if name.endswith("recall@1")]
    if len(first) == 2:
        names, counts = [*names, "mean_recall@1"], [*counts, images]
        values, chances = [*values, sum(values[i] for i in first) / 2], [*chances, sum(chances[i] for i in first) / 2]
        drawn = np.concatenate([drawn, drawn[:, first].mean(axis=1, keepdims=True)], axis=1)
    found = []
    for name, value, n, chance, drawn_R in zip(names, values, counts, chances, drawn.T, strict=True):
        low, high = np.percentile(drawn_R, (2.5, 97.5)).tolist()
        if "recall" in name and value in (0, 1):  # nothing varies in the bootstrap
            low, high = wilson(value, images)
        found.append(Measure(name, value, min(low, value), max(high, value), n, chance))
    return found
