"""Classes are counted from guesses, and written as a spreadsheet reads them."""

import csv

from clipkit.eval.results import count_classes, per_class_path, write_per_class
from clipkit.intervals import wilson


def test_classes_come_from_the_worst_with_what_they_are_taken_for(tmp_path) -> None:
    labels = ["crane", "crane", "crane", "crane", "drake, male", "drake, male", "missile", "broken"]
    firsts = ["heron", "crane", "heron", "goose", "drake, male", "drake, male", "goose"]
    counted = count_classes(labels, [*([first, "other"] for first in firsts), []])
    path = per_class_path(tmp_path, "pets")
    write_per_class(path, counted)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["images"], row["right"], row["taken_for"], row["times"]) for row in rows] == [
        ("missile", "1", "0", "goose", "1"),
        ("crane", "4", "1", "heron", "2"),
        ("drake, male", "2", "2", "", "0"),
    ]
    assert [float(rows[1][name]) for name in ("recall", "low", "high")] == [
        0.25,
        *(round(end, 6) for end in wilson(0.25, 4)),
    ]
