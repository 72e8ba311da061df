"""Several runs on one page: their curves over each other, their results beside each other, and what they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.eval import results
from clipkit.eval.comparison.compare import Entry, Pair, choose, pair_of
from clipkit.eval.comparison.text import points, verdict_of
from clipkit.eval.report import run_data
from clipkit.eval.report.evaluations import Block, blocks, headline, history
from clipkit.eval.report.page import CURVES, costs, report, require_run, write_page
from clipkit.eval.results import RANKS, Result, chance_shown, metric_title, shown
from clipkit.page.charts import Line, line_chart

STYLES = "abcdef"


@dataclass(frozen=True)
class Run:
    """What a page of several runs needs of each."""

    name: str
    path: Path
    style: str
    """Of its lines."""
    config: dict[str, Any]
    parameters: int
    metrics: list[dict[str, Any]]
    results: list[Result]
    costs: dict[str, Any]

    @property
    def recipe(self) -> str:
        return str((self.config.get("recipe") or {}).get("name", ""))


def report_all(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run (see `report`), or one page of several: to `out`, or `side-by-side.html` here.

    Raises UserError for what is no run, a run that is given twice, and more than six of them.
    """
    if len(runs) == 1:
        return report(runs[0], out)
    resolved = [run.resolve() for run in runs]
    for number, run in enumerate(runs):
        require_run(run)
        if resolved[number] in resolved[:number]:
            raise UserError(f"{run} is given twice: name each run once")
    if len(runs) > len(STYLES):
        raise UserError(f"a page shows at most {len(STYLES)} runs beside each other, not {len(runs)}: give fewer")
    names = [path.name for path in resolved]
    listed = [
        read_run(run, names[number] if names.count(names[number]) == 1 else str(run), STYLES[number])
        for number, run in enumerate(runs)
    ]
    return write_page(out or Path("side-by-side.html"), "side_by_side.html.j2", contents(listed))


def read_run(path: Path, name: str, style: str) -> Run:
    """All that a run has written so far."""
    config, metrics = run_data.read_config(path), run_data.read_metrics(path)
    spent = costs(config, metrics)
    return Run(name, path, style, config, run_data.parameters(config), metrics, results.read_results(path), spent)


def contents(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the template shows."""
    return {"runs": runs, "curves": curves(runs), "over_training": over_training(runs), **matrix(runs)}


def curves(runs: Sequence[Run]) -> list[str]:
    """The training curves that any of the runs has, a line a run."""
    drawn = []
    for metric, name, is_share, from_zero in CURVES:
        lines = [Line(run.name, *run_data.series(run.metrics, metric), run.style) for run in runs]
        if any(line.xs for line in lines):
            drawn.append(line_chart(name, lines, is_share=is_share, from_zero=from_zero))
    return drawn


def over_training(runs: Sequence[Run]) -> list[str]:
    """Each task's main metric over samples seen, a line a run, where at least one has a curve."""
    found = [(run, history(run.metrics, run.results)) for run in runs]
    drawn = []
    for task in dict.fromkeys(task for _, tasks in found for task in tasks):
        main = headline(dict.fromkeys(metric for _, tasks in found for metric in tasks.get(task, {})))
        lines = []
        for run, tasks in found:
            points = sorted(tasks.get(task, {}).get(main, {}).items())
            lines.append(Line(run.name, [x for x, _ in points], [y for _, y in points], run.style))
        if max(len(line.xs) for line in lines) > 1:
            is_share = main not in RANKS
            name = f"{task}: {metric_title(main)}{' (%)' if is_share else ''}"
            drawn.append(line_chart(name, lines, is_share=is_share, from_zero=True))
    return drawn


def matrix(runs: Sequence[Run]) -> dict[str, Any]:
    """The newest results of all models, a row for each number and a column for each model. A cell compares its number
    with that of the first model that has one."""
    found: dict[tuple[str, str], dict[str, list[Block]]] = {}
    models: dict[tuple[str, str], tuple[str, str]] = {}
    entries: dict[tuple[str, str], Entry] = {}
    for run in runs:
        for block in blocks(run.results):
            models[run.name, block.model] = (block.model, "") if block.model else (run.name, run.style)
            entries[run.name, block.model] = Entry(run.name, "", block.model, run.path, block.results)
            found.setdefault((run.name, block.model), {}).setdefault(block.task, []).append(block)
    tasks: dict[str, list[dict[str, Any]]] = {}
    counted: dict[str, str] = {}
    for task in dict.fromkeys(task for by_task in found.values() for task in by_task):
        there = chosen_blocks([found[model].get(task, []) for model in models])
        counted[task] = next(block.counted for block in there if block)
        results_of = [{result.metric: result for result in block.results} if block else {} for block in there]
        # The categories of a task, behind a colon, may be many.
        for metric in dict.fromkeys(name for by_metric in results_of for name in by_metric if ":" not in name):
            numbers = [by_metric.get(metric) for by_metric in results_of]
            first_entry, first = next((e, r) for e, r in zip(entries.values(), numbers, strict=True) if r)
            cells = []
            for entry, result in zip(entries.values(), numbers, strict=True):
                pair = None
                if result is not None and entry is not first_entry:
                    pair = pair_of(task, metric, (first_entry, entry), (first, result))
                cells.append(cell(result, pair))
            row = {"metric": metric_title(metric), "chance": chance_shown(first), "cells": cells}
            tasks.setdefault(task, []).append(row)
    return {"models": list(models.values()), "tasks": tasks, "counted": counted}


def chosen_blocks(candidates: Sequence[Sequence[Block]]) -> list[Block | None]:
    """One block of each model on a task; of several, with other templates or images, the one that `compare` takes."""
    there = [result.metric for blocks in candidates for block in blocks for result in block.results]
    main = headline(dict.fromkeys(there))
    numbers = [
        [(result, block) for block in blocks for result in block.results if result.metric == main]
        for blocks in candidates
    ]
    chosen = choose([[result for result, _ in each] for each in numbers])
    return [
        next((block for result, block in each if result is one), blocks[-1] if blocks else None)
        for blocks, each, one in zip(candidates, numbers, chosen, strict=True)
    ]


def cell(result: Result | None, pair: Pair | None) -> Mapping[str, str]:
    """A number with its interval, and how it stands to the first model's: the difference, and whether it is more than
    chance; or in words what makes it another measurement.
    """
    if result is None:
        return {}
    words = {name: shown(result.metric, getattr(result, name)) for name in ("value", "low", "high")}
    if pair is None:
        return words
    if pair.difference is None:
        return words | {"note": f"not comparable: {'; '.join(pair.reasons)}"}
    # Where the guesses of both are at hand, the two are compared image by image.
    return words | {
        "difference": f"{points(result.metric, pair.difference.value)}, {verdict_of(pair.difference)}",
        "test": pair.difference.test,
    }
