"""A sweep's charts, after the figures of CLIPA's paper, and its page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.formatting import duration, short
from clipkit.page import render
from clipkit.page.charts import Line, line_chart
from clipkit.train.sweep.law import TOWERS, Row, drops, main_rows, sizes_of

STYLES = "abcdef"


def means(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], float]:
    """Mean accuracy over seeds by the values of `keys`."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row["accuracy"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def pareto(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(FLOPs, accuracy) of the runs that nothing as cheap beats, in means over seeds, cheapest first."""
    front: list[tuple[float, float]] = []
    for (_, _, flops), accuracy in sorted(
        means(rows, "configuration", "samples", "flops").items(), key=lambda a: a[0][2]
    ):
        if not front or accuracy > front[-1][1]:
            front.append((flops, accuracy))
    return front


def line(name: str, points: Sequence[tuple[float, float]], style: str, base: float) -> Line:
    """Points in order of x, which is drawn as a logarithm."""
    ordered = sorted(points)
    return Line(name, [math.log(x, base) for x, _ in ordered], [y for _, y in ordered], style)


def compute_charts(rows: Sequence[Row], ways: Mapping[str, str]) -> list[str]:
    """Accuracy against compute: a chart for each size with a line for each length, and the front of all of them."""
    front, rows = pareto(rows), main_rows(rows, ways)
    charts = []
    for size in sizes_of(rows):
        found = means([row for row in rows if row["size"] == size], "image_tokens", "text_tokens", "flops")
        lengths = sorted({key[:2] for key in found}, reverse=True)
        lines = [
            line(f"{image}+{text}", [(key[2], value) for key, value in found.items() if key[:2] == (image, text)],
                 STYLES[number % len(STYLES)], 10)
            for number, (image, text) in enumerate(lengths)
        ]  # fmt: skip
        lines.append(line("front of all sizes", front, "dashed", 10))
        title = f"{size}: accuracy by image+text tokens"
        charts.append(line_chart(title, lines, is_share=True, x_name="training FLOPs", show_x=lambda x: short(10**x)))
    return charts


def drop_charts(rows: Sequence[Row], ways: Mapping[str, str]) -> list[str]:
    """The inverse law: what fewer tokens cost, a line for each size."""
    charts = []
    for tower in TOWERS:
        found = [each for each in drops(rows, tower, ways) if each["drop"] is not None]
        if len({each["tokens"] for each in found}) < 2:
            continue
        lines = [
            line(size, [(each["tokens"], each["drop"]) for each in found if each["size"] == size], style, 2)
            for size, style in zip(sizes_of(rows), STYLES, strict=False)
        ]
        charts.append(token_chart(f"accuracy lost to fewer {tower} tokens", tower, lines))
    return charts


def study_charts(rows: Sequence[Row]) -> list[str]:
    """The studies of ways: for each tower and size that has several, accuracy by tokens at the longest budget."""
    charts = []
    longest = max(row["samples"] for row in rows)
    for tower in TOWERS:
        for size in sizes_of(rows):
            other = TOWERS[1 - TOWERS.index(tower)]
            own = [row for row in rows if (row["size"], row["samples"], row[f"{other}_way"]) == (size, longest, "all")]
            found = means(own, f"{tower}_way", f"{tower}_tokens")
            ways = list(dict.fromkeys(way for way, _ in found if way != "all"))
            if len(ways) < 2:
                continue
            lines = [
                line(
                    name, [(tokens, value) for (way, tokens), value in found.items() if way in (name, "all")], style, 2
                )
                for name, style in zip(ways, STYLES, strict=False)
            ]
            charts.append(token_chart(f"{size}: ways to fewer {tower} tokens", tower, lines))
    return charts


def token_chart(title: str, tower: str, lines: Sequence[Line]) -> str:
    """Lines over a tower's tokens, whose logarithm to base 2 is drawn."""
    x_name = f"{tower} tokens in training"
    return line_chart(title, lines, is_share=True, x_name=x_name, show_x=lambda x: short(round(2**x)))


def seconds_of(rows: Sequence[Row]) -> float:
    """What all trunks, as far as their last forks, and all branches took."""
    trunks: dict[tuple[str, int], float] = {}
    for row in rows:
        place = row["configuration"], row["seed"]
        trunks[place] = max(trunks.get(place, 0.0), row["trunk_seconds"])
    return sum(trunks.values()) + sum(row["seconds"] for row in rows)


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """The page of a finished sweep. Raises UserError where jinja2 isn't installed."""
    rows: Sequence[Row] = result["rows"]
    table = [
        (configuration, samples, flops, value)
        for (configuration, samples, flops), value in means(rows, "configuration", "samples", "flops").items()
    ]
    contents = {
        **result,
        "compute": compute_charts(rows, result["ways"]),
        "drops": drop_charts(rows, result["ways"]),
        "studies": study_charts(rows),
        "table": sorted(table, key=lambda row: -row[3]),
        "seeds": len({row["seed"] for row in rows}),
        "time": duration(seconds_of(rows)),
    }
    render.write_page(path, "clipkit.train.sweep", "sweep.html.j2", contents)
