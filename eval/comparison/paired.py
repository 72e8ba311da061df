"""The difference of two numbers by the guesses that they were counted from, question by question.

Most images are right or wrong for both of two models, so a paired difference is far surer than two intervals. Guesses
that don't make exactly the number that they stand for aren't used.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipkit.eval import results
from clipkit.eval.comparison.significance import Difference, paired_accuracy, paired_queries, paired_recall
from clipkit.eval.metrics import mean_per_class_recall
from clipkit.eval.results import Result

if TYPE_CHECKING:
    import pyarrow as pa

GUESSED = ("key", "label", "correct", "guesses", "problem", "direction", "rank", "right")
DIRECTIONS = {"text": "image to text", "image": "text to image"}


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
    is_others = about.get("weights", result.weights) != result.weights
    if (
        is_others
        or about.get("samples_seen") != result.samples_seen
        or not {"key", "correct"} <= set(table.column_names)
    ):
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
