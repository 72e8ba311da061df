"""k-nearest neighbours: the training images most like an image vote for its class.

Likeness is cosine similarity; of equally like ones the one that comes first in the data is nearer. A vote weighs
exp(similarity / temperature) (Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
2018), or the same for all where the temperature is infinite. Of classes with equal votes the one of the nearer
neighbour is ahead, and so are the neighbours behind the k nearest ahead of all other classes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipkit.eval.retrieval.ranks import TILE, Vectors, best_matches

COUNTS = (1, 3, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (math.inf, 0.1, 0.03, 0.01)
ROWS, VOTES = 1024, 1 << 24  # at once: images, and images × classes


@dataclass(frozen=True)
class Vote:
    """How many neighbours vote, and how their votes weigh."""

    count: int = 1
    temperature: float = math.inf


class Neighbours:
    """Training images to look among."""

    def __init__(
        self, feature_NE: Tensor, labels_N: NDArray[np.int64], classes: int, device: torch.device, tile: int = TILE
    ) -> None:
        self.train: Vectors = Vectors(feature_NE)
        self.labels_N, self.classes, self.device, self.tile = labels_N, classes, device, tile
        self.counts = [count for count in COUNTS if count <= len(labels_N)]

    def nearest(self, feature_QE: Tensor) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.float64]]]:
        """Some of the images at a time: the labels [B, K] of their neighbours, nearest first, and the similarities."""
        rows = max(1, min(ROWS, VOTES // self.classes))
        for start in range(0, len(feature_QE), rows):
            part = slice(start, min(start + rows, len(feature_QE)))
            place_BK, score_BK = best_matches(
                feature_QE[part].to(self.device), self.train, self.counts[-1], tile=self.tile
            )
            yield part, self.labels_N[place_BK], score_BK.astype(np.float64)

    def guess(self, feature_QE: Tensor, vote: Vote, top: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best classes of each image and their shares of the votes [Q, top], best first."""
        guessed = np.empty((len(feature_QE), top), np.int64)
        share = np.empty((len(feature_QE), top), np.float32)
        for part, label_BK, score_BK in self.nearest(feature_QE):
            first_BC = first_places(label_BK, self.classes)
            for votes_BC in count_votes(label_BK, score_BK, vote.temperature, [vote.count], self.classes):
                total_B = votes_BC.sum(axis=1)
                for place in range(top):
                    best_B = _leaders(votes_BC, first_BC)
                    guessed[part, place] = best_B
                    share[part, place] = votes_BC[np.arange(len(best_B)), best_B] / total_B
                    votes_BC[np.arange(len(best_B)), best_B] = -1
        return guessed, share


def first_places(label_BK: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """int64[B, classes]: the place of each class's nearest neighbour; K for one that has none."""
    rows = np.arange(len(label_BK))
    first_BC = np.full((len(label_BK), classes), label_BK.shape[1])
    for place in reversed(range(label_BK.shape[1])):
        first_BC[rows, label_BK[:, place]] = place
    return first_BC


def count_votes(
    label_BK: NDArray[np.int64],
    score_BK: NDArray[np.float64],
    temperature: float,
    counts: Sequence[int],
    classes: int,
) -> Iterator[NDArray[np.float64]]:
    """The votes float64[B, classes] of as many nearest as each of the rising `counts` says, in one array."""
    rows = np.arange(len(label_BK))
    weight_BK = np.exp((score_BK - score_BK[:, :1]) / temperature)
    votes_BC = np.zeros((len(label_BK), classes))
    for place in range(counts[-1]):
        votes_BC[rows, label_BK[:, place]] += weight_BK[:, place]
        if place + 1 in counts:
            yield votes_BC


def _leaders(votes_BC: NDArray[np.float64], first_BC: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class of most votes in each row; of several the one of the nearest neighbour."""
    best_B1 = votes_BC.max(axis=1, keepdims=True)
    leaders: NDArray[np.int64] = np.where(votes_BC == best_B1, first_BC, np.iinfo(np.int64).max).argmin(axis=1)
    return leaders


def choose_vote(
    feature_NE: Tensor, labels_N: NDArray[np.int64], classes: int, device: torch.device, held_N: NDArray[np.bool_]
) -> Vote:
    """The vote that is most often right on held-out training images; of several the one of fewest neighbours, and of
    those the most even one. Without an image to hold out the nearest neighbour decides.
    """
    if not held_N.any():
        return Vote()
    others = Neighbours(feature_NE[~held_N], labels_N[~held_N], classes, device)
    hits = np.zeros((len(others.counts), len(TEMPERATURES)), np.int64)
    right_Q = labels_N[held_N]
    for part, label_BK, score_BK in others.nearest(feature_NE[held_N]):
        first_BC = first_places(label_BK, classes)
        for column, temperature in enumerate(TEMPERATURES):
            counted = count_votes(label_BK, score_BK, temperature, others.counts, classes)
            for row, votes_BC in enumerate(counted):
                hits[row, column] += (_leaders(votes_BC, first_BC) == right_Q[part]).sum()
    best = int(hits.argmax())
    return Vote(others.counts[best // len(TEMPERATURES)], TEMPERATURES[best % len(TEMPERATURES)])
