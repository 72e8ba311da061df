"""A run's results as its pages show them: the newest numbers of each model on each task, and how they came about."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipkit.eval.report import run_data
from clipkit.eval.results import RANKS, Result, chance_shown, counted_on, metric_title, shown, verdict
from clipkit.page.charts import Band, Line, interval_strip, line_chart

# What stands for a task in a headline and in a curve, the first of these that it has; and what is drawn beside it.
HEADLINES = {
    "top1": "top5",
    "mean_average_precision": "",
    "mean_recall@1": "",
    "group_score": "",
    "accuracy": "",
}

Points = dict[float, float]
Variant = tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """The newest results of one model on one task."""

    task: str
    model: str
    """A checkpoint outside of the run, as its results name it; "" for the run's own."""
    results: tuple[Result, ...]

    @property
    def headline(self) -> Result:
        """The number that stands for the task."""
        by_metric = {result.metric: result for result in self.results}
        return by_metric[headline(by_metric)]

    @property
    def counted(self) -> str:
        """What the numbers were counted on."""
        return counted_on(self.results)

    @property
    def notes(self) -> list[str]:
        """What belongs with the numbers."""
        notes = list(dict.fromkeys(note for result in self.results for note in result.notes))
        # Older results have the count only.
        unreadable = self.results[0].unreadable
        return notes or ([f"{unreadable:,} images can’t be read and aren’t counted"] if unreadable else [])


def headline(metrics: Iterable[str]) -> str:
    """The metric that stands for a task among those it has."""
    there = list(metrics)
    return next((metric for metric in HEADLINES if metric in there), there[0])


def blocks(found: Sequence[Result]) -> list[Block]:
    """The newest results of each task with each set of names and templates: the run's own model first, and then tasks
    with the most classes."""
    grouped: dict[tuple[str, Variant], list[Result]] = {}
    for result in found:
        grouped.setdefault(("" if is_own(result) else result.checkpoint, variant(result)), []).append(result)
    listed = []
    for (model, _), results in grouped.items():
        last = max(result.samples_seen for result in results)
        newest = {result.metric: result for result in results if result.samples_seen == last}
        listed.append(Block(results[0].task, model, tuple(newest.values())))
    return sorted(listed, key=lambda block: (block.model, -block.results[0].classes, block.task))


def is_own(result: Result) -> bool:
    """Whether a number is of a checkpoint of the run itself."""
    return result.checkpoint.startswith("checkpoints/")


def variant(result: Result) -> Variant:
    """What makes two numbers of a task the same measurement at another time."""
    same = (item for item in result.hashes.items() if item[0] not in ("preprocessing", "split"))
    return (result.task, *(f"{name}={value}" for name, value in sorted(same)))


def rows(block: Block) -> list[dict[str, Any]]:
    """The lines of a task in the table: each number in words and as a picture on a scale that the task's share."""
    shares = [result for result in block.results if result.metric not in RANKS]
    top = min(1.0, max((bound for each in shares for bound in (each.high, each.chance)), default=1.0) * 1.05) or 1.0
    listed: list[dict[str, Any]] = []
    for result in block.results:
        bounds = {name: getattr(result, name) for name in ("value", "low", "high", "chance")}
        strip = interval_strip(**bounds, top=top) if result.metric not in RANKS else ""
        words = {name: shown(result.metric, bound) for name, bound in bounds.items()}
        words["chance"] = chance_shown(result)
        about = {"result": result, "metric": metric_title(result.metric), "note": verdict(result), "strip": strip}
        listed.append(about | words)
    return listed


def history(metrics: Sequence[Mapping[str, Any]], found: Sequence[Result]) -> dict[str, dict[str, Points]]:
    """{task: {metric: {samples seen: value}}} of the run's own model, from the evaluations while it was training and
    from the results of its checkpoints."""
    points: dict[str, dict[str, Points]] = {}
    for task, names in run_data.evaluations(metrics).items():
        for name in names:
            xs, ys = run_data.series(metrics, name)
            points.setdefault(task, {}).setdefault(name.rpartition("/")[2], {}).update(zip(xs, ys, strict=True))
    newest = {block.task: variant(block.results[0]) for block in reversed(blocks(found)) if not block.model}
    for result in found:
        if is_own(result) and newest[result.task] == variant(result):
            by_metric = points.setdefault(result.task, {})
            by_metric.setdefault(result.metric, {})[float(result.samples_seen)] = result.value
    return points


def over_training(metrics: Sequence[Mapping[str, Any]], bands: Sequence[Band], found: Sequence[Result]) -> list[str]:
    """Each task's main metric over samples seen, a chart a task, beside chance."""
    drawn = []
    for task, by_metric in history(metrics, found).items():
        main = headline(by_metric)
        # One point isn't a curve: the table has it.
        if len(by_metric[main]) < 2:
            continue
        lines = []
        for metric, style in ((main, "a"), (HEADLINES.get(main, ""), "b")):
            if metric in by_metric:
                xs, ys = zip(*sorted(by_metric[metric].items()), strict=True)
                lines.append(Line(metric_title(metric), xs, ys, style))
        chance = next((each.chance for each in found if (each.task, each.metric) == (task, main)), None)
        if chance is not None:
            ends = [lines[0].xs[0], lines[0].xs[-1]]
            lines.append(Line(f"chance of {metric_title(main)}", ends, [chance] * 2, "dashed"))
        is_share = main not in RANKS
        name = f"{task} (%)" if is_share else task
        drawn.append(line_chart(name, lines, bands=bands, is_share=is_share, from_zero=True))
    return drawn
