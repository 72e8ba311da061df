"""A linear probe in closed form: ridge regression from image features to classes (Hoerl and Kennard, 1970).

Of N images with features X and one-hot classes Y it minimises |X W + b - Y|² + N · penalty · |W|². The bias is free,
so W is that of centred features. With X'X = Q diag(v) Q', W is Q diag(1 / (v + N · penalty)) Q'X'Y, and with
XX' = Q diag(v) Q' it is X'Q diag(1 / (v + N · penalty)) Q'Y: one decomposition of the smaller of the two gives the
weights of every penalty. A penalty counts for each image, so what was chosen by a part of them fits all of them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PENALTIES = tuple(10.0**half for half in np.arange(-16, 3) / 2)  # 1e-8 to 10; unit features vary by less than 1
ROWS = 8192


class Ridge:
    """The solutions of all penalties, in float64."""

    def __init__(self, feature_NE: Tensor, labels_N: NDArray[np.int64], classes: int) -> None:
        labels = torch.from_numpy(labels_N)
        self.images, width = feature_NE.shape
        self.mean_E = feature_NE.mean(dim=0, dtype=torch.float64)
        self.mean_C = torch.bincount(labels, minlength=classes).double() / self.images
        if self.images > width:
            gram_EE = torch.zeros(width, width, dtype=torch.float64)
            sum_CE = torch.zeros(classes, width, dtype=torch.float64)
            for start in range(0, self.images, ROWS):
                part_BE = feature_NE[start : start + ROWS].double() - self.mean_E
                gram_EE += part_BE.T @ part_BE
                sum_CE.index_add_(0, labels[start : start + ROWS], part_BE)
            self.value_D, self.left_ED = torch.linalg.eigh(gram_EE)
            self.right_DC = self.left_ED.T @ sum_CE.T
        else:
            centred_NE = feature_NE.double() - self.mean_E
            self.value_D, vector_ND = torch.linalg.eigh(centred_NE @ centred_NE.T)
            self.left_ED = centred_NE.T @ vector_ND
            target_NC = torch.nn.functional.one_hot(labels, classes).double() - self.mean_C
            self.right_DC = vector_ND.T @ target_NC

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """The weights float64[E, C] and the bias [C]."""
        shrunk_DC = self.right_DC / (self.value_D.clamp(min=0) + self.images * penalty)[:, None]
        weight_EC = self.left_ED @ shrunk_DC
        return weight_EC, self.mean_C - self.mean_E @ weight_EC


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted probe."""

    weight_EC: Tensor
    bias_C: Tensor
    penalty: float

    def guess(self, feature_NE: Tensor, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best classes of each image and their scores [N, count], best first; equal ones in their order.

        A score estimates the probability of the class by least squares, and is cut to 0 to 1.
        """
        tops, scores = [], []
        for part_BE in feature_NE.split(ROWS):
            score_BC = part_BE.double() @ self.weight_EC + self.bias_C
            score_BC, top_BC = score_BC.sort(dim=1, descending=True, stable=True)
            tops.append(top_BC[:, :count].numpy())
            scores.append(score_BC[:, :count].clamp(0, 1).float().numpy())
        return np.concatenate(tops), np.concatenate(scores)


def fit(feature_NE: Tensor, labels_N: NDArray[np.int64], classes: int, held_N: NDArray[np.bool_]) -> LinearProbe:
    """Choose the penalty by the accuracy on held-out training images, then fit on all of them.

    Of equally good penalties, and without an image to choose by, it is the strongest, whose limit only compares with
    the means of the classes.
    """
    penalty = PENALTIES[-1]
    if held_N.any():
        ridge = Ridge(feature_NE[~held_N], labels_N[~held_N], classes)
        hits = [_hits(ridge.solve(each), feature_NE[held_N], labels_N[held_N]) for each in PENALTIES]
        penalty = max(zip(hits, PENALTIES, strict=True))[1]
    return LinearProbe(*Ridge(feature_NE, labels_N, classes).solve(penalty), penalty)


def _hits(solution: tuple[Tensor, Tensor], feature_NE: Tensor, labels_N: NDArray[np.int64]) -> int:
    weight_EC, bias_C = solution
    parts = zip(feature_NE.split(ROWS), torch.from_numpy(labels_N).split(ROWS), strict=True)
    return sum(int(((x_BE.double() @ weight_EC + bias_C).argmax(dim=1) == label_B).sum()) for x_BE, label_B in parts)
