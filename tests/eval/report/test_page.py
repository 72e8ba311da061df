"""The page is whole in a real browser: it renders, logs no error, loads nothing, and every picture shows."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from browser import Browser
from written_run import write_run

from clipkit import log
from clipkit.errors import UserError
from clipkit.eval import results
from clipkit.eval.classification.task import GUESSES
from clipkit.eval.report import run_data
from clipkit.eval.report.guesses import confused, task_sections
from clipkit.eval.report.page import report
from clipkit.formatting import short
from clipkit.page import charts


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return report(write_run(folder / "run", folder / "nowhere"))


def assert_readable(browser: Browser) -> None:
    """No part of the page scrolls sideways, text in scaled charts stays readable, and every picture has a name."""
    scrolling = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert browser.evaluate(scrolling) == 0
    heights = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height).filter(h => h > 0)"
    assert min(browser.evaluate(heights)) >= 10
    assert browser.evaluate("document.querySelectorAll('svg:not([aria-label]), img:not([alt])').length") == 0
    assert browser.evaluate('document.querySelectorAll(\'[aria-label=""], [alt=""]\').length') == 0


def test_a_browser_shows_the_page(page: Path, browser: Browser) -> None:
    shots = []
    for width, scheme in ((1400, "light"), (400, "light"), (1400, "dark"), (400, "dark")):
        browser.open(page, width, scheme)
        pictures = browser.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert len(pictures) >= 12
        assert all(pictures)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
        assert browser.evaluate("document.querySelectorAll('figure.chart svg polyline').length") >= 6
        assert_readable(browser)
        shots.append(browser.screenshot())
        assert browser.problems() == []
        assert browser.requests() == [page.as_uri()]
    assert shots[0].std() > 5, "the picture of the page is blank"
    assert shots[0].mean() > 180 > 90 > shots[2].mean(), "light is light and dark is dark"


def test_the_pointer_reads_a_curve(page: Path, browser: Browser) -> None:
    browser.open(page, 1200, "light")
    browser.evaluate(
        "{const s = document.querySelector('.chart svg'), b = s.getBoundingClientRect();"
        "s.dispatchEvent(new PointerEvent('pointermove', {clientX: b.right - 20, clientY: b.top + 50}))}"
    )
    assert browser.evaluate("document.querySelector('.chart .said').textContent").startswith("9.")


def test_the_page_says_what_the_run_holds(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    numbers = ["25.0%", "15.8% – 37.2%", "chance 5.0%", "10,000 samples seen", "3m 20s"]
    words = [
        "invented &lt;recipe&gt;",
        "not distinguishable from chance",
        "reduced",
        "shape &amp; &lt;3&gt;",
        "bad.jpg",
    ]
    for shown in [*numbers, *words, "download"]:
        assert shown in text, shown
    assert "<3>" not in text
    for outside in ("http://", "https://", 'src="/', "url("):
        assert outside not in text, outside


@pytest.mark.parametrize(
    "files", [["config.json"], ["metrics.jsonl"], ["results.jsonl"], ["config.json", "metrics.jsonl"]]
)
def test_a_run_with_parts_missing_has_a_page(tmp_path: Path, browser: Browser, files: list[str]) -> None:
    whole = write_run(tmp_path / "whole", tmp_path / "nowhere")
    run = tmp_path / "run"
    run.mkdir()
    for name in files:
        shutil.copy(whole / name, run)
    browser.open(report(run), 1200, "light")
    text = browser.evaluate("document.body.innerText")
    assert ("No metrics yet" in text) == ("metrics.jsonl" not in files)
    assert ("No results yet" in text) == ("results.jsonl" not in files)
    assert "No guesses yet" in text
    assert "NaN" not in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="isn't a run: give the folder that clipkit train wrote"):
        report(tmp_path)
    with pytest.raises(UserError, match="doesn't exist"):
        report(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_the_data_that_is_gone_is_named(page: Path) -> None:
    assert "The data isn’t in reach: dataset" in page.read_text(encoding="utf-8")


def test_costs_add_up(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    metrics = run_data.read_metrics(run)
    reduced, full = run_data.stage_costs(run_data.read_config(run), metrics)
    assert (reduced.done, full.done) == (8000, 2000)
    assert (reduced.seconds, full.seconds) == (160.0, 40.0)
    assert (reduced.image_tokens, reduced.text_tokens) == (6 + 1, 8)
    assert (full.image_tokens, full.text_tokens) == (64 + 1, 16)
    # By hand for the full stage: 12 D² weights a layer, D = 32; two layers and one; patches of 8 × 8 × 3.
    image = 2 * (2 * 12 * 32**2) * 65 + 4 * 65**2 * 32 * 2 + 2 * (32 * 8 * 8 * 3) * 64
    text = 2 * (12 * 32**2) * 16 + 4 * 16**2 * 32
    projections = 2 * (32 * 16 + 32 * 16)
    assert full.flops == 3 * (image + text + projections)


def test_an_unfinished_stage_counts_what_is_done(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    reduced, full = run_data.stage_costs(run_data.read_config(run), run_data.read_metrics(run)[:40])
    assert (reduced.done, full.done, full.seconds) == (4000, 0, 0.0)


def started_at(run: Path, samples: int, seconds: float) -> dict[str, Any]:
    """The run's description, beginning elsewhere."""
    return run_data.read_config(run) | {"start": {"samples_seen": samples, "seconds": seconds}}


def test_a_run_that_begins_at_a_later_stage_did_nothing_of_the_earlier_ones(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    metrics = [line | {"seconds": line["seconds"] - 160} for line in run_data.read_metrics(run)[80:]]
    reduced, full = run_data.stage_costs(started_at(run, 8000, 0.0), metrics)
    assert (reduced.done, reduced.seconds, full.done, full.seconds) == (0, 0.0, 2000, 40.0)


def test_a_branch_counts_what_it_did_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    metrics = run_data.read_metrics(run)[90:]
    metrics[0]["data_wait"] = 0.75
    config = started_at(run, 9000, 180.0)
    reduced, full = run_data.stage_costs(config, metrics)
    assert (reduced.done, reduced.seconds) == (0, 0.0)
    assert (full.start, full.done, full.seconds) == (9000, 1000, 20.0)
    assert run_data.waiting(config, metrics) == pytest.approx((0.75 + 9 * 0.25) / 10)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2.5, 5, 7.5, 10]),
        (0.1, 0.9, [0.2, 0.4, 0.6, 0.8]),
        (3, 3, [3]),
        (0, 312_320, [0, 100_000, 200_000, 300_000]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high, 4) == pytest.approx(expected)


def test_short_numbers() -> None:
    shown = [short(value) for value in (0, 0.0002, 0.5, 12, 999.9, 12_800, 3.2e6, 1.28e10, 999_999)]
    assert shown == ["0", "2e-4", "0.5", "12", "1k", "12.8k", "3.2M", "12.8B", "1M"]


def test_a_sample_of_a_great_many_records_takes_no_room_for_each() -> None:
    places = run_data.sample_places(10**13)
    assert len(places) == run_data.SAMPLE
    assert places == sorted(set(places)) == run_data.sample_places(10**13)
    assert (run_data.sample_places(4), run_data.sample_places(0)) == ([0, 1, 2, 3], [])


def test_the_wall_counts_the_classes_of_the_task(tmp_path: Path) -> None:
    """Not those that occur: of many classes a small data set has a few."""
    row = {"key": "0", "label": "a", "correct": False, "guesses": ["b"], "image": None, "probabilities": [0.4]}
    for name, about in (("new", {"classes": 1000}), ("old", {})):
        (tmp_path / name).mkdir()
        results.write_predictions(
            tmp_path / name / "predictions-x.parquet",
            pa.Table.from_pylist([row | {"problem": None}], GUESSES),
            {"task": "x"} | about,
        )
    assert [task_sections(tmp_path / name)[0]["classes"] for name in ("new", "old")] == [1000, 1]


def test_confused_pairs_are_counted_from_the_commonest() -> None:
    pairs = ["ab", "ab", "aa", "bc", "bc", "cc", "ba", "ac", "ac", "ac", "ca", "ca"]
    rows = [{"label": label, "guesses": [guess, "z"]} for label, guess in pairs]
    assert confused(rows) == [("a", "c", 3, 6), ("a", "b", 2, 6), ("b", "c", 2, 3), ("c", "a", 2, 3)]
    assert confused(rows, most=1) == [("a", "c", 3, 6)]
    assert confused([{"label": "a", "guesses": ["a"]}]) == []


def test_metrics_of_one_moment_are_one_point(tmp_path: Path) -> None:
    log.append_json_line(tmp_path / "metrics.jsonl", {"samples_seen": 5, "loss": 1.0})
    log.append_json_line(tmp_path / "metrics.jsonl", {"samples_seen": 5, "task/top1": 0.5})
    assert run_data.read_metrics(tmp_path) == [{"samples_seen": 5, "loss": 1.0, "task/top1": 0.5}]
    assert run_data.evaluations(run_data.read_metrics(tmp_path)) == {"task": ["task/top1"]}


def test_thinning_keeps_the_mean_and_leaves_nan_out() -> None:
    xs, ys = charts.thin(list(range(1001)), [*range(1000), float("nan")])
    assert len(xs) <= charts.POINTS
    assert xs == ys
    assert xs[0] == 2.0


# ---- Where the data came from ----------------------------------------------------------------------------------------


def page_of(run: Path, data: object, dataset: dict[str, Any] | None) -> str:
    """The page of a run whose config.json says so."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": data, "dataset": dataset}))
    return report(run).read_text(encoding="utf-8")


def mixture(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"mixture": list(parts)}


def test_a_mixture_is_told_part_by_part(tmp_path: Path, pairs_dataset: Path, browser: Browser) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    text = page_of(
        run,
        [str(pairs_dataset), str(tmp_path / "gone"), str(tmp_path / "shards")],
        mixture(
            {"name": "colours", "split": "train", "records": 96, "weight": "7/10"},
            {"name": "gone", "split": "train", "records": 1000, "weight": "1/5"},
            {"name": "shards", "kind": "tars", "records": 2000, "files": "0", "weight": "1/10"},
        ),
    )
    assert "on colours and gone and shards" in text
    assert "trained on 3,096 image–caption pairs" in text
    assert "colours: 70.0% of the samples, 72.9 passes" in text
    assert "gone: 20.0% of the samples, 2 passes" in text
    assert f"The data isn’t in reach: dataset {tmp_path}/gone doesn&#39;t exist" in text
    assert "2,000 pairs, read from webdataset tars" in text
    browser.open(run / "report.html", 1200, "light")
    assert browser.problems() == []


@pytest.mark.parametrize("kind", ["tars", "parquet", "folder", "something new"])
def test_data_that_was_read_as_it_was_are_told_in_a_line(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    text = page_of(run, str(tmp_path), {"name": "x", "kind": kind, "records": 2000, "files": "0"})
    assert "2,000 pairs, read from " in text
    assert "The data isn’t in reach" not in text


@pytest.mark.parametrize("place", ["s3://nowhere/data", "gs://nowhere/data", "nothing://data", "memory://nowhere"])
@pytest.mark.parametrize("several", [False, True])
def test_a_store_that_is_out_of_reach_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, several: bool
) -> None:
    def refuse(path: Path, split: str) -> None:
        raise ConnectionError(f"no route to {path}")

    if place.startswith(("s3", "gs")):
        monkeypatch.setattr(run_data, "open_dataset", refuse)
    run = write_run(tmp_path / "run", tmp_path)
    part = {"name": "far", "split": "train", "records": 500}
    dataset = mixture({**part, "weight": "1/2"}, {**part, "weight": "1/2"}) if several else part
    text = page_of(run, [place, place] if several else place, dataset)
    assert text.count("The data isn’t in reach: ") == 1 + several
    assert place.partition("://")[2] in text
    assert "It had 500 pairs." in text


@pytest.mark.parametrize(("data", "dataset"), [(None, None), ([], {}), (["x"], None), ("x", {"records": 3})])
def test_a_run_that_says_little_of_its_data_has_a_page(tmp_path: Path, data: object, dataset: Any) -> None:
    assert "The data isn’t in reach: " in page_of(write_run(tmp_path / "run", tmp_path), data, dataset)
