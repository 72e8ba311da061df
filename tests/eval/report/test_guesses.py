"""What the page makes of the guesses: classes, calibration, mistakes, and what retrieval found."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from browser import Browser
from PIL import Image
from written_run import write_run

from clipkit.eval import results
from clipkit.eval.choice.task import GUESSES as CHOICES
from clipkit.eval.report.guesses import SHOWN_CLASSES, calibration, class_bars, class_counts, reliability, task_sections
from clipkit.eval.report.page import report
from clipkit.eval.retrieval.task import GUESSES
from clipkit.intervals import wilson


def answer(label: str, guess: str, confidence: float = 0.5) -> dict[str, Any]:
    """A row with one guess."""
    return {"label": label, "guesses": [guess], "correct": label == guess, "probabilities": [confidence]}


def write_retrieval(run: Path) -> None:
    """Guesses of a retrieval task with two images and two captions each, of which the page shows all."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(buffer, "WEBP")
    image = buffer.getvalue()
    row: dict[str, Any] = {"scores": [0.3, 0.1], "image": image, "problem": None}
    first = {"key": "a.jpg", "direction": "image to text", "rank": 1, "correct": True}
    first |= {"guesses": ["a <red> dot", "a dog"], "right": [True, False]}
    second = {"key": "b.jpg#0", "direction": "text to image", "caption": "a dog & a cat", "rank": 1234}
    second |= {"correct": False, "guesses": ["a.jpg", "c.jpg"], "right": [False, False], "pictures": [image, None]}
    rows = [row | first, row | second, {"key": "broken.jpg", "problem": "not an image"}]
    about = {"task": "coco", "kind": "retrieval", "samples_seen": 10_000, "classes": 0}
    results.write_predictions(run / "predictions-coco.parquet", pa.Table.from_pylist(rows, GUESSES), about)


def test_bins_are_open_below_and_closed_above() -> None:
    confidence_N = np.array([0.0, 1 / 15, 1 / 15 + 1e-6, 0.5, 1.0])
    found = reliability(confidence_N, np.array([True, False, True, True, False]))
    assert [(round(each.start * 15), each.n, each.accuracy) for each in found] == [
        (0, 2, 0.5), (1, 1, 1.0), (7, 1, 1.0), (14, 1, 0.0)
    ]  # fmt: skip
    assert (found[0].low, found[0].high) == wilson(0.5, 2)


def test_the_calibration_error_is_the_one_by_hand() -> None:
    # 0.7: 3 of 4 right; 0.9: 1 of 2 right. (4 · |0.75 − 0.7| + 2 · |0.5 − 0.9|) / 6
    sure = [answer("a", "a", 0.7)] * 3 + [answer("a", "b", 0.7), answer("a", "a", 0.9), answer("a", "b", 0.9)]
    found = calibration(sure)
    assert found is not None
    assert found["error"] == pytest.approx((4 * 0.05 + 2 * 0.4) / 6)
    assert found["verdict"] == "too sure of itself"
    assert found["charts"][0].count('class="whisker"') == 2
    unsure = calibration([answer("a", "a", 0.4)])
    assert unsure is not None
    assert unsure["verdict"] == "less sure than it could be"
    assert calibration([{**answer("a", "a"), "probabilities": []}]) is None
    assert calibration([]) is None


def test_few_classes_are_all_shown_from_the_worst() -> None:
    rows = [answer("a", "a"), answer("a", "a"), answer("b", "a"), answer("b", "b"), answer("c", "a")]
    bars = [bar for _, part in class_bars(class_counts(rows), 1 / 3) for bar in part]
    assert [(bar.name, bar.right, bar.n) for bar in bars] == [("c", 0, 1), ("b", 1, 2), ("a", 2, 2)]
    assert "chance 33.3%" in bars[0].strip


def test_of_many_classes_the_surely_worst_and_best_are_shown() -> None:
    """One image, right or wrong, doesn't make a class the best or the worst."""
    rows = [answer(f"single {n}", f"single {n}" if n % 2 else "x") for n in range(40)]
    rows += [answer("bad", "x")] * 20 + [answer("good", "good")] * 20
    (first, worst), (second, best) = class_bars(class_counts(rows), 0.1)
    assert (worst[0].name, best[0].name) == ("bad", "good")
    assert (len(worst), len(best)) == (SHOWN_CLASSES, SHOWN_CLASSES)
    assert (first, second) == ("the 12 worst of 42", "the 12 best of 42")


def test_classes_with_an_image_each_have_no_bars() -> None:
    assert class_bars(class_counts([answer("a", "a"), answer("b", "a")]), 0.5) == []


def test_mistakes_come_in_order_of_confidence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    path = run / "predictions-shapes.parquet"
    rows, about = results.read_predictions(path)
    for number, row in enumerate(rows):
        row["probabilities"] = [number / 100] if row["guesses"] else []
    results.write_predictions(path, pa.Table.from_pylist(rows), about)
    (section,) = task_sections(run)
    wrong = [int(row["key"]) for row in rows if row["guesses"] and not row["correct"]]
    assert [int(row["key"]) for row in section["mistakes"]] == sorted(wrong, reverse=True)[:8]
    assert "The most confident mistakes" in report(run).read_text(encoding="utf-8")


def test_retrieval_shows_examples_in_both_directions(tmp_path: Path, browser: Browser) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    write_retrieval(run)
    browser.open(report(run), 400, "dark")
    text = browser.evaluate("document.body.innerText")
    for words in ("What it finds: coco", "a <red> dot ✓", "“a dog & a cat”", "first right answer is number 1,234"):
        assert words in text, words
    assert "broken.jpg: not an image" in text
    assert browser.evaluate("document.querySelectorAll('.found img').length") == 2
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400
    assert browser.problems() == []


def write_choices(run: Path) -> None:
    """Guesses of a question of one picture with captions, one of two pictures, and one of WinoGAViL's."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (0, 120, 0)).save(buffer, "WEBP")
    image = buffer.getvalue()
    rows: list[dict[str, Any]] = [
        {"key": "a", "category": "swap_att", "correct": True, "captions": ["a <red> dog", "no dog"]},
        {"key": "b", "category": "", "correct": False, "captions": ["some plants", "plants some"]},
        {"key": "c", "category": "5", "correct": False, "captions": ["An owl"], "associated": [1, 4]},
    ]
    for row, scores in zip(rows, ([[0.31, 0.2]], [[0.1, 0.2], [0.2, 0.1]], [[0.1]] * 5), strict=True):
        row |= {"right": [], "scores": scores, "pictures": [image] * len(scores)}
    rows.append({"key": "broken", "scores": [], "pictures": [], "problem": "not an image"})
    about = {"task": "sugar", "kind": "choice", "samples_seen": 10_000, "classes": 0}
    results.write_predictions(run / "predictions-sugar.parquet", pa.Table.from_pylist(rows, CHOICES), about)


def test_choices_are_shown_with_their_scores(tmp_path: Path, browser: Browser) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    write_choices(run)
    for width, scheme in ((1400, "light"), (400, "dark")):
        browser.open(report(run), width, scheme)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.problems() == []
    text = browser.evaluate("document.body.innerText")
    for words in ("What it chooses: sugar", "a <red> dog 0.310 ✓", "✗ wrong", "An owl", "broken: not an image"):
        assert words in text, words
    assert browser.evaluate("document.querySelectorAll('.found img').length") == 8
    assert browser.evaluate("document.querySelectorAll('.found img.hit').length") == 2


def test_guesses_of_other_kinds_are_left_to_the_table(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"key": "0", "captions": ["a", "b"]}])
    results.write_predictions(tmp_path / "predictions-x.parquet", table, {"task": "x", "kind": "choice"})
    assert task_sections(tmp_path) == []
