"""A comparison for people and for scripts: tables, CSV and JSON."""

from typing import Any

from clipkit.config import to_json
from clipkit.eval.comparison.compare import Comparison, Entry, Pair
from clipkit.eval.comparison.published import Published, Relative
from clipkit.eval.comparison.significance import Difference
from clipkit.eval.results import RANKS, metric_title, shown
from clipkit.eval.tables import Grid, TableFormat, csv_text, grid_text
from clipkit.formatting import percent


def comparison_text(comparison: Comparison, style: TableFormat) -> str:
    """All tables of a comparison that have rows; of CSV one, with a row for each number of each model."""
    if style == "csv":
        return csv_text(csv_records(comparison))
    shown = [numbers(comparison), differences(comparison), known(comparison), relatives(comparison)]
    return "\n\n".join(grid_text(grid, style) for grid in shown if grid.rows)


def numbers(comparison: Comparison) -> Grid:
    """Tasks and metrics by models."""
    header = ["task", "metric", "n", *(entry.label for entry in comparison.entries)]
    rows = []
    for task, metric, found in comparison.rows:
        counts = list(dict.fromkeys(f"{result.n:,}" for result in found if result))
        words = [[shown(metric, each) for each in (one.value, one.low, one.high)] if one else [] for one in found]
        cells = ["{} ({} – {})".format(*each) if each else "" for each in words]
        rows.append([task, metric_title(metric), " / ".join(counts), *cells])
    return Grid("Results with 95% intervals", header, rows)


def differences(comparison: Comparison) -> Grid:
    """Each model against the first: the difference, or why there is none."""
    rows = []
    for pair in comparison.pairs:
        names = f"{pair.second.label} − {pair.first.label}"
        cells = ["", "", ""]
        if pair.difference is not None:
            interval = f"{points(pair.metric, pair.difference.low)} to {points(pair.metric, pair.difference.high)}"
            p = pair.difference.p
            said = "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
            cells = [points(pair.metric, pair.difference.value), interval, said]
        rows.append([pair.task, metric_title(pair.metric), names, *cells, outcome(pair)])
    return Grid(
        "Differences in points, with 95% intervals", ["task", "metric", "models", "", "interval", "p", ""], rows
    )


def outcome(pair: Pair) -> str:
    """What a pair comes to, in words."""
    notes = f" ({'; '.join(pair.notes)})" if pair.notes else ""
    if pair.difference is None:
        return f"not comparable: {'; '.join(pair.reasons)}"
    counts = ""
    if pair.difference.n:
        counts = f", {pair.difference.only_second:,} images against {pair.difference.only_first:,}"
    return f"{verdict_of(pair.difference)}: {pair.difference.test}{counts}{notes}"


def verdict_of(difference: Difference) -> str:
    """Whether a difference is more than chance."""
    return "significant" if difference.is_significant else "not significant"


def known(comparison: Comparison) -> Grid:
    """Models that are known by their names, beside the numbers that were published."""
    rows = []
    for entry, each in comparison.published:
        said = "within the interval"
        if each.deviates:
            said = "deviates by more than the interval: check templates, activation, preprocessing and images"
        found, value = each.result, f"{percent(each.result.low)} – {percent(each.result.high)}"
        metric = metric_title(found.metric)
        rows.append([entry.label, each.dataset, metric, percent(found.value), value, percent(each.value), said])
    return Grid("Against OpenCLIP's published numbers", ["model", "", "metric", "", "interval", "published", ""], rows)


def relatives(comparison: Comparison) -> Grid:
    """Accuracy on ImageNet's relatives against the line of the published models."""
    rows = []
    for entry, each in comparison.robustness:
        result = each.result
        ends = result.value, result.low, result.high
        distance, low, high = (points(result.metric, end - each.expected) for end in ends)
        where = "above" if result.low > each.expected else "below" if result.high < each.expected else "on"
        shares = [percent(value) for value in (each.imagenet, result.value, each.expected)]
        cells = [*shares, distance, f"{low} to {high}"]
        rows.append([entry.label, each.dataset, *cells, f"{where} the line of 121 published models"])
    header = ["model", "", "ImageNet", "top-1", "expected", "points", "interval", ""]
    return Grid("Effective robustness", header, rows)


def points(metric: str, difference: float) -> str:
    """A difference of shares in percentage points; of ranks as it is."""
    return f"{difference:+,.0f}" if metric in RANKS else f"{difference * 100:+.1f}"


def csv_records(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each number of each model; the difference is to the first model's."""
    pairs = {(pair.task, pair.metric, pair.second.label): pair for pair in comparison.pairs}
    records = []
    for task, metric, found in comparison.rows:
        for entry, result in zip(comparison.entries, found, strict=True):
            if result is not None:
                record = {"task": task, "metric": metric, "model": entry.label, "value": result.value}
                record |= {"low": result.low, "high": result.high, "n": result.n, "chance": result.chance}
                records.append(record | difference_record(pairs.get((task, metric, entry.label))))
    return records


def difference_record(pair: Pair | None) -> dict[str, Any]:
    """The columns of a pair; empty ones for what has none."""
    found = pair.difference if pair else None
    return {
        "comparable": "" if pair is None else found is not None,
        "why_not": "; ".join(pair.reasons) if pair else "",
        "difference": found.value if found else "",
        "difference_low": found.low if found else "",
        "difference_high": found.high if found else "",
        "p": found.p if found and found.p is not None else "",
        "test": found.test if found else "",
        "significant": found.is_significant if found else "",
    }


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON values."""
    return {
        "models": [{"label": each.label, "model": each.model, "run": str(each.run)} for each in comparison.entries],
        "results": [
            {"task": task, "metric": metric, "model": entry.label, "result": to_json(result)}
            for task, metric, found in comparison.rows
            for entry, result in zip(comparison.entries, found, strict=True)
            if result is not None
        ],
        "pairs": [pair_json(pair) for pair in comparison.pairs],
        "published": [published_json(*each) for each in comparison.published],
        "robustness": [relative_json(*each) for each in comparison.robustness],
    }


def pair_json(pair: Pair) -> dict[str, Any]:
    found = pair.difference
    about: dict[str, Any] = {
        "task": pair.task,
        "metric": pair.metric,
        "first": pair.first.label,
        "second": pair.second.label,
    }
    about |= {"comparable": found is not None, "reasons": list(pair.reasons), "notes": list(pair.notes)}
    return about | {"difference": {**to_json(found), "significant": found.is_significant} if found else None}


def published_json(entry: Entry, each: Published) -> dict[str, Any]:
    about = {"model": entry.label, "dataset": each.dataset, "metric": each.result.metric, "value": each.result.value}
    return about | {"published": each.value, "deviates": each.deviates}


def relative_json(entry: Entry, each: Relative) -> dict[str, Any]:
    about = {"model": entry.label, "dataset": each.dataset, "imagenet": each.imagenet, "value": each.result.value}
    return about | {"expected": each.expected, "distance": each.distance, "spread_in_logits": each.spread}
