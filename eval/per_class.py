"""How well each class is recognised, and what it is taken for: counted from the guesses of a classification."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit.eval.results import file_name
from clipkit.intervals import wilson
from clipkit.storage.files import write_beside

COLUMNS = ("class", "images", "right", "recall", "low", "high", "taken_for", "times")


@dataclass(frozen=True)
class ClassCount:
    """The images of a class, how many of them were right, and the wrong guess that was made most often."""

    name: str
    n: int
    right: int
    low: float
    high: float
    """The ends of the 95% interval of the recall (Wilson)."""
    taken_for: str
    times: int

    @property
    def recall(self) -> float:
        """The share that was right."""
        return self.right / self.n


def count_classes(labels: Iterable[str], guesses: Iterable[Sequence[str]]) -> list[ClassCount]:
    """The classes from the worst recall to the best, equal ones by name. `guesses` are those of each image, best first;
    an image without, which couldn't be read, isn't counted.
    """
    guessed: dict[str, Counter[str]] = defaultdict(Counter)
    for label, best in zip(labels, guesses, strict=True):
        if best:
            guessed[label][best[0]] += 1
    found = []
    for name, times in guessed.items():
        n, right = times.total(), times[name]
        wrong = min(((-count, guess) for guess, count in times.items() if guess != name), default=(0, ""))
        found.append(ClassCount(name, n, right, *wilson(right / n, n), wrong[1], -wrong[0]))
    return sorted(found, key=lambda each: (each.recall, each.name))


def per_class_path(run: Path, task: str) -> Path:
    """Where a task's table of classes is."""
    return run / f"per-class-{file_name(task)}.csv"


def write_per_class(path: Path, classes: Iterable[ClassCount]) -> None:
    """Write a row for each class as CSV."""
    with write_beside(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for each in classes:
            shares = (f"{share:.6f}" for share in (each.recall, each.low, each.high))
            writer.writerow([each.name, each.n, each.right, *shares, each.taken_for, each.times])
