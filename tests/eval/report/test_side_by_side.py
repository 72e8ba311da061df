"""Several runs on one page."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from browser import Browser
from click.testing import CliRunner
from written_run import write_run

from clipkit.cli.main import main
from clipkit.eval.comparison.compare import Entry, pair_of
from clipkit.eval.report.evaluations import Block
from clipkit.eval.report.side_by_side import cell, chosen_blocks
from clipkit.eval.results import Result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: the second has other numbers, the third has other templates and hasn't logged anything."""
    folder = tmp_path_factory.mktemp("runs")
    listed = [write_run(folder / name, folder) for name in ("one", "two", "three")]
    lines = [json.loads(line) for line in (listed[1] / "results.jsonl").read_text().splitlines()]
    changed = [line | {"value": 0.7, "low": 0.6, "high": 0.8} for line in lines]
    (listed[1] / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    others = [line | {"hashes": line["hashes"] | {"templates": "z"}, "templates": "openai-7"} for line in lines]
    (listed[2] / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in others))
    (listed[2] / "metrics.jsonl").unlink()
    return listed


def make(*arguments: object) -> str:
    """What `clipkit report` prints."""
    found = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert found.exit_code == 0, found.output
    return found.output.strip()


def test_a_browser_shows_the_runs_side_by_side(runs: list[Path], tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    assert make(*runs, "--out", page) == str(page)
    for width, scheme in ((1400, "light"), (400, "dark")):
        browser.open(page, width, scheme)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        scrolling = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert browser.evaluate(scrolling) == 0
        assert browser.problems() == []
        assert browser.requests() == [page.as_uri()]
    text = browser.evaluate("document.body.innerText")
    for words in ("one, two and three", "15.8% – 37.2%", "70.0%", "significant", "not comparable: other templates"):
        assert words in text, words
    # The loss of the two runs that have one, each in its colour.
    lines = (
        "[...document.querySelector('#learning svg').querySelectorAll('polyline')].map(e => e.getAttribute('class'))"
    )
    assert browser.evaluate(lines) == ["line a", "line b"]
    assert browser.evaluate("document.querySelectorAll('#cost tbody tr').length") == 3


def test_the_page_goes_where_out_says(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make(runs[0]) == str(runs[0] / "report.html")
    assert make(runs[0], "--out", "one.html") == "one.html"
    assert "What they cost" not in (tmp_path / "one.html").read_text(encoding="utf-8")
    assert make(runs[0], runs[1]) == "side-by-side.html"
    assert "What they cost" in (tmp_path / "side-by-side.html").read_text(encoding="utf-8")


def test_runs_of_one_name_are_told_apart_by_their_paths(runs: list[Path], tmp_path: Path) -> None:
    copies = [tmp_path / folder / "run" for folder in ("a", "b")]
    for copy in copies:
        shutil.copytree(runs[0], copy)
    make(*copies, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(f"</span>{copy}</th>" in text for copy in copies)


def test_runs_without_results_have_a_page(runs: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(runs[0] / "config.json", tmp_path / name)
    make(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No results yet" in text
    assert "No metrics yet" in text
    make(tmp_path / "a", runs[0], "--out", tmp_path / "page.html")
    assert "25.0%" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_cannot_be_put_side_by_side_is_refused(runs: list[Path], tmp_path: Path) -> None:
    def refusal(*arguments: object) -> str:
        found = CliRunner().invoke(main, ["report", *map(str, arguments)])
        assert found.exit_code == 2
        return found.output

    assert "is given twice: name each run once" in refusal(runs[0], runs[1] / ".." / "one")
    assert "isn't a run: give the folder" in refusal(runs[0], tmp_path)
    assert "is a folder: give the page's file" in refusal(*runs, "--out", tmp_path)
    many = [shutil.copytree(runs[2], tmp_path / f"run{number}") for number in range(7)]
    assert "at most 6 runs" in refusal(*many)
    assert "Missing argument 'RUN...'" in refusal()


def test_a_cell_says_how_it_stands_to_the_first() -> None:
    hashes = {"texts": "a", "split": "b", "preprocessing": "c"}
    rank = Result("text_retrieval_median_rank", 4, 3, 5, 9, 50, 0, "coco", "x", 1, "checkpoints/1", hashes)
    entries = Entry("a", "", "", Path("a"), ()), Entry("b", "", "", Path("b"), ())

    def told(second: Result, first: Result = rank) -> Mapping[str, str]:
        return cell(second, pair_of("coco", first.metric, entries, (first, second)))

    assert cell(None, None) == {}
    assert cell(rank, None) == {"value": "4", "low": "3", "high": "5"}
    other = dataclasses.replace(rank, hashes={"texts": "z", "preprocessing": "c"})
    assert told(other)["note"] == "not comparable: other captions; split unknown, for one result has no hash of it"
    better = dataclasses.replace(rank, value=1, low=1, high=2, hashes=hashes | {"preprocessing": "z"})
    assert told(better)["difference"] == "-3, significant"
    share = dataclasses.replace(rank, metric="top1", value=0.5, low=0.4, high=0.6)
    found = told(dataclasses.replace(share, value=0.55, low=0.45, high=0.65), share)
    assert (found["difference"], "note" in found) == ("+5.0, not significant", False)


def test_of_several_templates_those_are_shown_that_can_be_compared() -> None:
    def block(templates: str) -> Block:
        hashes = {"classes": "c", "templates": templates, "split": "s"}
        result = Result("top1", 0.5, 0.4, 0.6, 100, 0.1, 10, "t", "d", 1, "checkpoints/1", hashes, templates)
        return Block("t", "", (result,))

    plain, seven, eighty = block("plain"), block("seven"), block("eighty")
    assert chosen_blocks([[plain], [seven, plain], [plain, eighty], []]) == [plain, plain, plain, None]
    assert chosen_blocks([[plain, seven], [seven]]) == [seven, seven]
    assert chosen_blocks([[plain, seven], [eighty]]) == [seven, eighty], "the newest where none can be compared"
