"""Seeded parts of the training images. What a probe has to choose it chooses by these, never by test images."""

import numpy as np
from numpy.typing import NDArray

HELD_OUT_SHARE, MOST_HELD_OUT = 0.2, 20_000


def ranks_in_class(labels_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random place, from 0, of each image among those of its class."""
    shuffled = rng.permutation(len(labels_N))
    by_class = shuffled[np.argsort(labels_N[shuffled], kind="stable")]
    first_C = np.concatenate([[0], np.cumsum(np.bincount(labels_N))])
    rank_N = np.empty_like(labels_N)
    rank_N[by_class] = np.arange(len(labels_N)) - first_C[labels_N[by_class]]
    return rank_N


def hold_out(labels_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which images to choose by: a fifth of each class, about 20,000 at most.

    Of each class with two images or more it is one at least; a class's only image is never held out.
    """
    n_C = np.bincount(labels_N)
    share = min(HELD_OUT_SHARE, MOST_HELD_OUT / len(labels_N))
    held_C = np.minimum(np.maximum(1, np.rint(share * n_C)), n_C - 1)
    return ranks_in_class(labels_N, rng) < held_C[labels_N]


def draw(labels_N: NDArray[np.int64], shots: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The places of `shots` random images of each class."""
    return np.flatnonzero(ranks_in_class(labels_N, rng) < shots)
