"""Whether two numbers differ by more than chance.

Two models that were shown the same images are compared image by image, which sees differences that two intervals side
by side don't: most images are right or wrong for both. Where no guesses are at hand, the two intervals have to do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED = 2_000, 0


@dataclass(frozen=True)
class Difference:
    """Second minus first, a share, with its 95% interval; what says so, and its p-value where it has one."""

    value: float
    low: float
    high: float
    test: str
    p: float | None = None
    only_first: int = 0
    """Images or captions that only the first has right."""
    only_second: int = 0
    n: int = 0

    @property
    def is_significant(self) -> bool:
        """At the level of 5%."""
        return self.p < 0.05 if self.p is not None else not self.low <= 0 <= self.high


def mcnemar(only_first: int, only_second: int) -> tuple[float, float]:
    """The two-sided p-values of McNemar's test, (exact, mid-p), from the images that only one of two models has right.

    The mid-p counts half of the observed outcome's probability; the exact test is conservative, and more so the fewer
    images differ (Fagerland, Lydersen and Laake, 2013).
    """
    n, least = only_first + only_second, min(only_first, only_second)
    if only_first == only_second:
        return 1.0, 1.0
    log_half = n * math.log(0.5) + math.lgamma(n + 1)
    terms = [math.exp(log_half - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(least + 1)]
    return min(1.0, 2 * math.fsum(terms)), min(1.0, 2 * math.fsum(terms) - terms[-1])


def paired_accuracy(first_N: NDArray[np.bool_], second_N: NDArray[np.bool_]) -> Difference:
    """The difference of two accuracies on the same images: McNemar's mid-p, and a bootstrap's interval."""
    only_first, only_second = int((first_N & ~second_N).sum()), int((second_N & ~first_N).sum())
    value, low, high, _ = _bootstrap(first_N, second_N, np.zeros(len(first_N), dtype=np.int64))
    _, p = mcnemar(only_first, only_second)
    return Difference(value, low, high, "McNemar, mid-p", p, only_first, only_second, len(first_N))


def paired_recall(first_N: NDArray[np.bool_], second_N: NDArray[np.bool_], class_N: NDArray[np.int64]) -> Difference:
    """The difference of two mean per-class recalls on the same images: a bootstrap's interval and p-value."""
    value, low, high, p = _bootstrap(first_N, second_N, class_N)
    only_first, only_second = int((first_N & ~second_N).sum()), int((second_N & ~first_N).sum())
    return Difference(value, low, high, "paired bootstrap", p, only_first, only_second, len(first_N))


def paired_queries(
    directions: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]],
) -> Difference:
    """The difference of two recalls whose queries are of images: a bootstrap's interval and p-value over the images.

    A direction is whether each of Q queries succeeds with the first model and with the second, and the number of the
    image that it is of, 0 to N - 1; of two directions it is the mean. The captions of one image succeed and fail
    together, so a resample draws images, each with all its queries.
    """
    images = max(int(image_Q.max()) for _, _, image_Q in directions) + 1
    gain_DN = np.stack(
        [
            np.bincount(image_Q, second_Q.astype(float) - first_Q.astype(float), minlength=images)
            for first_Q, second_Q, image_Q in directions
        ]
    )
    queries_DN = np.stack([np.bincount(image_Q, minlength=images) for _, _, image_Q in directions])
    # Images of equal gains and numbers of queries are exchangeable, as in `_bootstrap`.
    kind_DK, count_K = np.unique(np.concatenate([gain_DN, queries_DN]), axis=1, return_counts=True)
    gain_DK, queries_DK = np.split(kind_DK, 2)

    def difference(count_RK: NDArray[np.int64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (count_RK @ gain_DK.T / np.maximum(count_RK @ queries_DK.T, 1)).mean(axis=1)
        return found

    random = np.random.default_rng(SEED)
    low, high, p = _interval(difference(random.multinomial(images, count_K / images, size=RESAMPLES)))
    only_first, only_second, n = (
        sum(int(each) for each in counts)
        for counts in zip(
            *((np.sum(one & ~two), np.sum(two & ~one), len(one)) for one, two, _ in directions), strict=True
        )
    )
    value = float(difference(count_K[None])[0])
    return Difference(value, low, high, "paired bootstrap over images", p, only_first, only_second, n)


def _bootstrap(
    first_N: NDArray[np.bool_], second_N: NDArray[np.bool_], class_N: NDArray[np.int64]
) -> tuple[float, float, float, float]:
    """Value, 95% percentile interval and two-sided p of the difference of recalls, averaged over the classes.

    Images of one class, right or wrong for either model, are exchangeable, so a resample is a multinomial draw of how
    many of each kind there are: the same distribution as drawing the images, in a fraction of the time.
    """
    classes, place_N = np.unique(class_N, return_inverse=True)
    kind_N = place_N * 3 + 1 + second_N.astype(np.int64) - first_N.astype(np.int64)
    count_K = np.bincount(kind_N, minlength=3 * len(classes))

    def difference(count_RK: NDArray[np.int64]) -> NDArray[np.float64]:
        lost_RC, same_RC, won_RC = np.moveaxis(count_RK.reshape(len(count_RK), len(classes), 3), 2, 0)
        n_RC = lost_RC + same_RC + won_RC
        found: NDArray[np.float64] = ((won_RC - lost_RC) / np.maximum(n_RC, 1)).sum(axis=1) / (n_RC > 0).sum(axis=1)
        return found

    random = np.random.default_rng(SEED)
    some = max(1, min(RESAMPLES, 4_000_000 // len(count_K)))
    drawn = [
        difference(random.multinomial(len(class_N), count_K / len(class_N), size=min(some, RESAMPLES - done)))
        for done in range(0, RESAMPLES, some)
    ]
    return float(difference(count_K[None])[0]), *_interval(np.concatenate(drawn))


def _interval(found_R: NDArray[np.float64]) -> tuple[float, float, float]:
    """The 95% percentile interval of resampled differences and their two-sided p-value."""
    low, high = np.quantile(found_R, (0.025, 0.975))
    p = min(1.0, 2 * min(float((found_R <= 0).mean()), float((found_R >= 0).mean())))
    return float(low), float(high), max(p, 1 / RESAMPLES)


def unpaired(first: tuple[float, float, float], second: tuple[float, float, float]) -> Difference:
    """The difference of two (value, low, high) from their intervals alone, by Newcombe's hybrid method (1998).

    Of two models on the same images this interval is too wide, as a rule: their mistakes go together.
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    value = b - a
    low = value - math.hypot(b - b_low, a_high - a)
    return Difference(value, low, value + math.hypot(b_high - b, a - a_low), "unpaired intervals")
