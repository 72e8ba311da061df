"""WinoGAViL: the images among several candidates that people associated with a cue (Bitton et al., 2022).

As many images are chosen as there are right ones, those nearest to "A cue" or "An cue". What counts is the Jaccard
index of the chosen and the right ones, a mean over the questions; DataComp's metric takes those of 10 or 12 candidates.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clipkit.eval.choice.questions import Question
from clipkit.eval.metrics import Measure, bootstrapped

GROUPS = {"jaccard": (0, 1 << 30), "jaccard_5_6": (5, 6), "jaccard_10_12": (10, 12)}


def jaccard(score_N: NDArray[np.float32], right: Sequence[int]) -> float:
    """Of the candidates with the best scores, of which as many are chosen as are right; of equal ones the later."""
    chosen = np.argsort(score_N, kind="stable")[len(score_N) - len(right) :]
    common = len(set(chosen.tolist()) & set(right))
    return common / (2 * len(right) - common)


def guessed(candidates: int, right: int) -> float:
    """The mean Jaccard index of choosing so many candidates blindly."""
    ways = [math.comb(right, common) * math.comb(candidates - right, right - common) for common in range(right + 1)]
    return sum(count * common / (2 * right - common) for common, count in enumerate(ways)) / sum(ways)


def association_measures(questions: Sequence[Question], scores: Sequence[NDArray[np.float32] | None]) -> list[Measure]:
    """The mean Jaccard index of all questions, of those with 5 or 6 candidates, and of those with 10 or 12.

    A question without scores isn't counted.
    """
    found = []
    for metric, (fewest, most) in GROUPS.items():
        of_group = [
            (question, score_IC[:, 0])
            for question, score_IC in zip(questions, scores, strict=True)
            if score_IC is not None and fewest <= len(question.pictures) <= most
        ]
        if of_group:
            value_N = np.array([jaccard(score_N, question.associated) for question, score_N in of_group])
            chances = [guessed(len(question.pictures), len(question.associated)) for question, _ in of_group]
            found.append(_mean(metric, value_N, float(np.mean(chances))))
    return found


def _mean(metric: str, value_N: NDArray[np.float64], chance: float) -> Measure:
    return bootstrapped(metric, lambda index_N: float(value_N[index_N].mean()), len(value_N), chance)
