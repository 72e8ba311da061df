"""What the guesses of a task show: pictures, classes, how far probabilities can be believed, what is found, chosen."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.eval import results
from clipkit.eval.metrics import BINS, confidence_bins
from clipkit.formatting import share
from clipkit.intervals import wilson
from clipkit.page.charts import Bin, calibration_chart, histogram, interval_strip
from clipkit.page.render import data_url

SEED = 0
TILES, MORE_RIGHT, MISTAKES, FOUND = 12, 6, 8, 6
# Of more classes than twice this many, the worst and the best are shown.
SHOWN_CLASSES = 12

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ClassBar:
    """How many images of a class were right."""

    name: str
    right: int
    n: int
    strip: str


def task_sections(run: Path) -> list[dict[str, Any]]:
    """A section for each file of guesses that can be pictured; tasks with the most classes first."""
    sections = []
    for path in sorted(run.glob("predictions-*.parquet")):
        rows, about = results.read_predictions(path)
        known: dict[str, Any] = {
            "task": path.stem.removeprefix("predictions-"),
            "kind": "classification",
            "classes": 0,
        } | about
        if known["kind"] == "retrieval":
            sections.append(known | retrieval_section(rows))
        elif rows and {"pictures", "scores"} <= rows[0].keys():
            sections.append(known | choice_section(rows))
        elif rows and {"label", "guesses", "probabilities"} <= rows[0].keys():
            sections.append(known | classification_section(rows, known["classes"]))
    return sorted(sections, key=lambda section: -section["classes"])


# ---- Classification --------------------------------------------------------------------------------------------------


def classification_section(rows: Rows, classes: int) -> dict[str, Any]:
    """A wall of pictures: some taken at random, some more that were right, the most confident mistakes; and the charts
    of all guesses."""
    readable = [row for row in rows if row["guesses"]]
    pictured = [row for row in readable if row["image"]]
    rng = random.Random(SEED)
    blind = rng.sample(pictured, min(TILES, len(pictured)))
    right = [row for row in pictured if row["correct"] and row not in blind]
    more = rng.sample(right, min(MORE_RIGHT, len(right)))
    classes = classes or len({row["label"] for row in rows})
    wrong = [row for row in pictured if not row["correct"] and row["probabilities"]]
    wrong.sort(key=lambda row: -row["probabilities"][0])
    return {
        "blind": [tile(row) for row in blind],
        "right": [tile(row) for row in more],
        "blind_right": sum(row["correct"] for row in blind),
        "mistakes": [tile(row) for row in wrong[:MISTAKES]],
        "pictured": len(pictured),
        "n": len(readable),
        "classes": classes,
        "confused": confused(readable),
        "per_class": class_bars(class_counts(readable), 1 / classes),
        "calibration": calibration(readable),
        "problems": [row for row in rows if row["problem"]][:5],
        "unreadable": sum(bool(row["problem"]) for row in rows),
    }


def tile(row: Mapping[str, Any]) -> dict[str, Any]:
    """One picture with its guesses for the wall."""
    guesses = list(zip(row["guesses"], row["probabilities"], strict=False))
    return {**row, "image": data_url(row["image"]), "guesses": guesses}


def confused(readable: Rows, most: int = 10) -> list[tuple[str, str, int, int]]:
    """Which class is taken for which most often: (label, guess, times, images with this label).

    Where each class has an image or two, no pair can repeat; then there is nothing to list.
    """
    images = Counter(row["label"] for row in readable)
    pairs = Counter((row["label"], row["guesses"][0]) for row in readable if row["guesses"][0] != row["label"])
    repeated = sorted((-times, *pair) for pair, times in pairs.items() if times > 1)
    return [(label, guess, -times, images[label]) for times, label, guess in repeated[:most]]


def class_counts(rows: Rows) -> list[results.ClassCount]:
    """The classes of some rows."""
    return results.count_classes((row["label"] for row in rows), (row["guesses"] for row in rows))


def class_bars(classes: Sequence[results.ClassCount], chance: float) -> list[tuple[str, list[ClassBar]]]:
    """The accuracy of each class with its interval, under a heading each: all from the worst to the best, or of many
    the worst and the best. [] where no class has two images.

    The worst are those that are surely bad, by the upper end of the interval, and the best those that are surely good:
    a class with few images doesn't come first by luck.
    """
    if max((each.n for each in classes), default=0) < 2:
        return []

    def bars(some: Sequence[results.ClassCount]) -> list[ClassBar]:
        return [
            ClassBar(each.name, each.right, each.n, interval_strip(each.recall, each.low, each.high, chance, 1.0))
            for each in some
        ]

    if len(classes) <= 2 * SHOWN_CLASSES:
        half = -(-len(classes) // 2)
        return [("", bars(part)) for part in (classes[:half], classes[half:]) if part]
    worst = sorted(classes, key=lambda each: (each.high, each.name))[:SHOWN_CLASSES]
    best = sorted(classes, key=lambda each: (-each.low, each.name))[:SHOWN_CLASSES]
    return [
        (f"the {SHOWN_CLASSES} worst of {len(classes):,}", bars(worst)),
        (f"the {SHOWN_CLASSES} best of {len(classes):,}", bars(best)),
    ]


def calibration(readable: Rows) -> dict[str, Any] | None:
    """How far the probability of the first guess can be believed: charts and words; None without probabilities."""
    if not readable or not all(row["probabilities"] for row in readable):
        return None
    confidence_N = np.array([row["probabilities"][0] for row in readable], dtype=np.float64)
    correct_N = np.array([row["correct"] for row in readable], dtype=bool)
    bins = reliability(confidence_N, correct_N)
    error = sum(each.n * abs(each.accuracy - each.confidence) for each in bins) / len(readable)
    accuracy, confidence = float(correct_N.mean()), float(confidence_N.mean())
    counts = [0] * BINS
    for each in bins:
        counts[round(each.start * BINS)] = each.n
    return {
        "charts": [
            calibration_chart("accuracy by confidence (%)", bins, "probability of the first guess"),
            histogram(
                "pictures by confidence (% of pictures)",
                counts,
                [number / BINS for number in range(BINS + 1)],
                x_name="probability of the first guess",
                show_x=share,
            ),
        ],
        "error": error,
        "accuracy": accuracy,
        "confidence": confidence,
        "verdict": "too sure of itself" if confidence > accuracy else "less sure than it could be",
    }


def reliability(confidence_N: np.ndarray, correct_N: np.ndarray) -> list[Bin]:
    """The bins of a reliability diagram that hold guesses: 15 of equal width, open below (Guo et al., 2017)."""
    bin_N = confidence_bins(confidence_N)
    bins = []
    for number in np.unique(bin_N).tolist():
        inside = bin_N == number
        n, accuracy = int(inside.sum()), float(correct_N[inside].mean())
        confidence = float(confidence_N[inside].mean())
        bins.append(Bin(number / BINS, (number + 1) / BINS, confidence, accuracy, *wilson(accuracy, n), n))
    return bins


# ---- Retrieval -------------------------------------------------------------------------------------------------------


def retrieval_section(rows: Rows) -> dict[str, Any]:
    """What was found for some images and for some captions, taken at random among those that have pictures."""
    shown = [row for row in rows if row["guesses"] and row["image"]]
    rng = random.Random(SEED)
    sections: dict[str, Any] = {}
    for direction, name in (("image to text", "texts"), ("text to image", "images")):
        there = [row for row in shown if row["direction"] == direction]
        chosen = rng.sample(there, min(FOUND, len(there)))
        sections[name] = [found(row) for row in chosen]
    return {
        **sections,
        "problems": [row for row in rows if row["problem"]][:5],
        "unreadable": sum(bool(row["problem"]) for row in rows),
    }


def found(row: Mapping[str, Any]) -> dict[str, Any]:
    """A query with its first answers: (answer, whether it is right, its picture)."""
    pictures = [data_url(picture) for picture in row["pictures"] or [None] * len(row["guesses"])]
    answers = list(zip(row["guesses"], row["right"], pictures, strict=True))
    return {**row, "image": data_url(row["image"]), "answers": answers}


# ---- Choice ----------------------------------------------------------------------------------------------------------


def choice_section(rows: Rows) -> dict[str, Any]:
    """Some questions, taken at random among those that have pictures, with what the model gave each answer."""
    there = [row for row in rows if row["pictures"] and row["scores"]]
    chosen = random.Random(SEED).sample(there, min(FOUND, len(there)))
    return {
        "questions": [question(row) for row in chosen],
        "problems": [{"key": row["key"], "problem": row["problem"]} for row in rows if row["problem"]][:5],
        "unreadable": sum(bool(row["problem"]) for row in rows),
    }


def question(row: Mapping[str, Any]) -> dict[str, Any]:
    """A question with its pictures (address, whether it is right, score) and its captions (text, whether it is right,
    score): of one picture the first caption is right, of two each belongs to the caption in its place.
    """
    scores, is_one = row["scores"], len(row["pictures"]) == 1
    associated = row.get("associated") or []
    pictures = [
        (data_url(picture), number in associated, scores[number][0] if associated else None)
        for number, picture in enumerate(row["pictures"])
    ]
    captions = [
        (text, is_one and number == 0, scores[0][number] if is_one else None)
        for number, text in enumerate(row["captions"])
    ]
    return {**row, "pictures": pictures, "captions": captions}
