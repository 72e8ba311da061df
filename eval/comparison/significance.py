"""Whether two numbers differ by more than chance.

Two models that were shown the same images are compared image by image, which sees differences that two intervals side
by side don't: most images are right or wrong for both. Where no guesses are at hand, or these don't make exactly the
number that they stand for, the two intervals have to do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipkit.eval import results
from clipkit.eval.metrics import mean_per_class_recall
from clipkit.eval.results import Result

if TYPE_CHECKING:
    import pyarrow as pa

RESAMPLES, SEED = 2_000, 0
GUESSED = ("key", "label", "correct", "guesses", "problem", "direction", "rank", "right")
DIRECTIONS = {"text": "image to text", "image": "text to image"}


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


# ---- By the guesses in two runs --------------------------------------------------------------------------------------


def paired(runs: tuple[Path, Path], chosen: tuple[Result, Result]) -> Difference | None:
    """The second result minus the first, by the guesses in their runs; None where those aren't at hand or don't make
    the two numbers.
    """
    first, second = (guesses(run, result) for run, result in zip(runs, chosen, strict=True))
    if first is None or second is None or first["key"] != second["key"]:
        return None
    metric = chosen[0].metric
    if "_recall@" in metric:
        return paired_retrieval((first, second), chosen)
    hits = [hits_of(table, result) for table, result in zip((first, second), chosen, strict=True)]
    if hits[0] is None or hits[1] is None:
        return None
    if metric == "mean_per_class_recall":
        return paired_recall(hits[0], hits[1], class_numbers(first))
    return paired_accuracy(hits[0], hits[1])


def guesses(run: Path, result: Result) -> "pa.Table | None":
    """The readable rows of a task's guesses, if the file is of this result's model."""
    import pyarrow.compute as pc

    path = results.predictions_path(run, result.task)
    if not path.is_file():
        return None
    table, about = results.read_guesses(path, GUESSED)
    model = about.get("weights", result.weights), about.get("samples_seen")
    if model != (result.weights, result.samples_seen) or not {"key", "correct"} <= set(table.column_names):
        return None
    return table.filter(pc.is_null(table["problem"])) if "problem" in table.column_names else table


def hits_of(table: "pa.Table", result: Result) -> NDArray[np.bool_] | None:
    """For each image or question whether it counts as right in a result's metric; None unless these make exactly the
    number.
    """
    hits = np.asarray(table["correct"].to_numpy(), dtype=bool)
    if result.metric == "top5":
        pairs = zip(table["label"].to_pylist(), table["guesses"].to_pylist(), strict=True)
        hits = np.array([label in five[:5] for label, five in pairs], dtype=bool)
    elif result.kind == "choice":
        hits = np.array([result.metric in right for right in table["right"].to_pylist()], dtype=bool)
    if len(hits) != result.n:
        return None
    value = float(hits.mean())
    if result.metric == "mean_per_class_recall":
        value = mean_per_class_recall(hits, class_numbers(table))[0]
    return hits if is_same(value, result) else None


def is_same(value: float, result: Result) -> bool:
    """Whether the guesses make a result's number, but for rounding."""
    return abs(value - result.value) < 1e-9


def class_numbers(table: "pa.Table") -> NDArray[np.int64]:
    """The true class of each row as a number."""
    numbers = table["label"].combine_chunks().dictionary_encode().indices
    return np.asarray(numbers.to_numpy(zero_copy_only=False), dtype=np.int64)


def paired_retrieval(tables: tuple["pa.Table", "pa.Table"], chosen: tuple[Result, Result]) -> Difference | None:
    """The difference of two recalls@k of one direction, or of both; None unless the ranks make exactly the numbers."""
    name, _, k = chosen[0].metric.partition("_recall@")
    names = DIRECTIONS.values() if name == "mean" else [DIRECTIONS[name.removesuffix("_retrieval")]]
    directions = [tuple(queries(table, direction, int(k)) for table in tables) for direction in names]
    for number, result in enumerate(chosen):
        if any(not len(each[number][0]) for each in directions):
            return None
        if not is_same(float(np.mean([each[number][0].mean() for each in directions])), result):
            return None
    if name == "text_retrieval":  # an image is one query
        return paired_accuracy(*(each[0] for each in directions[0]))
    return paired_queries([(first[0], second[0], first[1]) for first, second in directions])


def queries(table: "pa.Table", direction: str, k: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Of each query of a direction whether it succeeds at k, and the number of the image that it is of."""
    rows = table.filter(np.asarray(table["direction"].to_numpy(zero_copy_only=False)) == direction)
    keys = rows["key"].to_pylist()
    if direction == DIRECTIONS["image"]:  # KEY#0, KEY#1 … are the captions of one image
        keys = [key.rpartition("#")[0] for key in keys]
    number_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    image_Q = np.array([number_of[key] for key in keys], dtype=np.int64)
    return np.asarray(rows["rank"].to_numpy(), dtype=np.int64) <= k, image_Q


# ---- The tests -------------------------------------------------------------------------------------------------------


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
