"""Results replace their own older line and no other; the words beside a number are true."""

import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clipkit import formatting
from clipkit.eval import results
from clipkit.eval.results import Result
from clipkit.eval.tables import table
from clipkit.intervals import wilson

PATHS = ["a/x", "b/x", "a/y", "b", "x", "a/x/val", "a-x", "x.parquet", "b/x.parquet", "x.parquet/fine"]
HASHES = {"classes": "a", "templates": "b", "split": "c", "preprocessing": "d"}


def result(value: float = 0.5, *, n: int = 1000, chance: float = 0.001, **changes: object) -> Result:
    low, high = wilson(value, n)
    made = Result(
        "top1", value, low, high, n, chance, 1000, "emoji", "emoji.parquet", 100, "checkpoints/000000000100", HASHES
    )
    return dataclasses.replace(made, **changes)


def test_lines_hold_what_the_design_asks_for(tmp_path: Path) -> None:
    assert results.write_results(tmp_path / "run", [result()]) == [result()]
    line = json.loads((tmp_path / "run" / "results.jsonl").read_text(encoding="utf-8"))
    assert set(line) >= {
        "metric",
        "value",
        "low",
        "high",
        "n",
        "chance",
        "classes",
        "task",
        "samples_seen",
        "checkpoint",
    }
    assert set(line["hashes"]) == {"classes", "templates", "split", "preprocessing"}
    assert results.read_results(tmp_path / "run") == [result()]


def test_a_repeated_measurement_replaces_its_line(tmp_path: Path) -> None:
    results.write_results(tmp_path, [result(0.5), result(0.7, metric="top5")])
    results.write_results(tmp_path, [result(0.6)])
    assert [(each.metric, each.value) for each in results.read_results(tmp_path)] == [("top1", 0.6), ("top5", 0.7)]


@pytest.mark.parametrize(
    "change",
    [{"task": "other"}, {"checkpoint": "checkpoints/000000000200"}, {"hashes": HASHES | {"templates": "z"}}],
    ids=["task", "checkpoint", "templates"],
)
def test_another_measurement_is_added(tmp_path: Path, change: dict[str, object]) -> None:
    results.write_results(tmp_path, [result(0.5)])
    results.write_results(tmp_path, [result(0.6, **change)])
    assert [each.value for each in results.read_results(tmp_path)] == [0.5, 0.6]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (["noise/3", "blur/3", "noise/1/3"], ["3", "blur-3", "1-3"]),
        (["a/test.parquet", "b/test.parquet"], ["test", "b-test"]),
        (["a/x/test", "b/x/test", "a/y/test"], ["test", "b-test", "y-test"]),
        (["a.parquet", "b.parquet"], ["test", "b-test"]),
        (["x/shapes/1.0.0", "y/shapes/1.0.0"], ["shapes", "y-shapes"]),
        (["a/t est", "b/t-est"], ["t est", "t-est-t-est"]),
    ],
)
def test_two_sets_of_one_name_are_both_kept(tmp_path: Path, data: list[str], name: list[str]) -> None:
    def line(place: int, **changes: object) -> Result:
        own = {"data": str(tmp_path / data[place]), "hashes": HASHES | {"split": f"split {place}"}}
        asked = "t-est" if data[place] == "b/t-est" else name[0]
        return result(place / 10, task=asked, **(own | changes))

    for _ in range(2):  # the second time each replaces its own line
        written = [results.write_results(tmp_path / "run", [line(place)])[0] for place in range(len(data))]
        assert [each.task for each in written] == name
        assert results.read_results(tmp_path / "run") == written
    # A copy is the same set, and so is the same path with other images in it.
    copy = line(0, data=str(tmp_path / "copy"))
    assert results.write_results(tmp_path / "run", [copy])[0].task == name[0]
    changed = line(1, hashes=HASHES | {"split": "changed"})
    assert results.write_results(tmp_path / "run", [changed])[0].task == name[1]


@given(st.lists(st.tuples(st.sampled_from(PATHS), st.integers(0, 4)), min_size=1, max_size=8))
def test_no_two_sets_share_a_file_of_guesses(measured: list[tuple[str, int]]) -> None:
    """Whatever sets are called, and in whatever order they are measured."""
    there: list[Result] = []
    owner: dict[Path, tuple[str, int]] = {}
    for path, split in measured:
        new = result(data=f"/data/{path}", task="t", hashes=HASHES | {"split": str(split)})
        new = dataclasses.replace(new, task=results.distinct_name(new, there))
        file = results.predictions_path(Path("run"), new.task)
        before = owner.get(file, (path, split))
        assert before[0] == path or before[1] == split
        owner[file] = path, split
        there.append(new)


def test_no_results_yet_and_foreign_lines(tmp_path: Path) -> None:
    assert results.read_results(tmp_path) == []
    (tmp_path / "results.jsonl").write_text('{"note": "mine"}\n[1]\n{"metric": "top1"}\n', encoding="utf-8")
    assert results.read_results(tmp_path) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    results.write_results(tmp_path, [result(0.5)])
    with pytest.raises(TypeError):
        results.write_results(tmp_path, [result(0.6, data=object())])
    assert [each.value for each in results.read_results(tmp_path)] == [0.5]
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", ".results.lock"}


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    """Each opens the lock for itself, so threads stand for processes."""
    tasks = [f"task {number}" for number in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda task: results.write_results(tmp_path, [result(task=task)]), tasks))
    assert {each.task for each in results.read_results(tmp_path)} == set(tasks)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (result(0.5), ""),
        (result(0.002, n=500), "not distinguishable from chance"),
        (result(0.0, n=5000, chance=0.1), "worse than chance"),
        (result(0.25, chance=0.1, largest_class=0.26), "no better than always guessing the commonest class (26.0%)"),
        (result(0.25, chance=0.1, largest_class=0.26, metric="mean_per_class_recall"), ""),
    ],
)
def test_verdict(made: Result, says: str) -> None:
    assert results.verdict(made).startswith(says)
    assert bool(results.verdict(made)) == bool(says)


def test_table_shows_value_interval_chance_and_the_warning() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table([result(0.0712), result(0.001, metric="top5", chance=0.005)]))
    text = console.export_text()
    for shown in ("7.1%", "5.7% – 8.9%", "0.10%", "0.50%", "not distinguishable from chance", "top-5"):
        assert shown in text


def test_a_table_says_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """rich takes square brackets and words between colons for its own markup."""
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table([result(0.5, task="pets[small]", metric="accuracy:swap[/obj]:x:")]))
    shown = console.export_text()
    assert "pets[small]: " in shown and "swap[/obj]:x:" in shown
    formatting.print_table(("stage[a]", "n"), [("b[bold]:x:", "1")])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["stage[a]", "n"], ["b[bold]:x:", "1"]]


def test_percent() -> None:
    assert [formatting.percent(share) for share in (0, 0.00091, 0.0712, 0.5, 1)] == [
        "0.00%",
        "0.09%",
        "7.1%",
        "50.0%",
        "100.0%",
    ]


def test_digest_depends_on_content_alone() -> None:
    assert results.digest({"a": 1, "b": ["ü"]}) == results.digest({"b": ["ü"], "a": 1})
    assert results.digest(["a", "b"]) != results.digest(["b", "a"])
