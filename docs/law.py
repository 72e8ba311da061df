"""Draws docs/law.png and law-ways.png, and writes the tables of docs/law.md.

They are made of docs/law.csv, law-prediction.json and law-ways.csv. The first two are `table.csv` and
`prediction.json` of `clipkit sweep sweeps/emoji.toml --out runs/law`, the third is the `table.csv` of `clipkit sweep
sweeps/emoji-ways.toml --out runs/ways`.
"""

import csv
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from clipkit.train.sweep.command import measured_points
from clipkit.train.sweep.law import TOWERS, drops, fit_law, sizes_of
from clipkit.train.sweep.pictures import means, pareto

HERE = Path(__file__).parent
INK, GRID = "#1f2933", "#d5dae0"
WAYS = {"image": "resize", "text": "truncate"}  # of the law, as in sweeps/emoji.toml
COLOURS, MARKERS = ("#2f6fb3", "#c2571a", "#2e8555", "#7a4fa3"), ("o", "s", "^", "D")
NUMBERS = ("weights", "image_tokens", "text_tokens", "seed", "samples", "flops", "accuracy", "measured_on")

Rows = list[dict[str, Any]]


def read_rows(name: str) -> Rows:
    """The results of a sweep."""
    with (HERE / name).open(encoding="utf-8", newline="") as file:
        return [{**row, **{name: float(row[name]) for name in NUMBERS}} for row in csv.DictReader(file)]


def draw(rows: Rows) -> None:
    """Accuracy against compute with the front, and what fewer tokens cost: a line for each size."""
    figure, (left, *right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=(1.3, 1, 1))
    whole_text = [row for row in rows if row["text_way"] == "all"]
    for size, colour in zip(sizes_of(rows), COLOURS, strict=False):
        found = means([row for row in whole_text if row["size"] == size], "image_tokens", "flops")
        for tokens, marker in zip(sorted({key[0] for key in found}, reverse=True), MARKERS, strict=False):
            points = sorted((flops, 100 * value) for (each, flops), value in found.items() if each == tokens)
            left.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"{size}, {tokens:.0f}")
    front = [(flops, 100 * value) for flops, value in pareto(rows)]
    left.plot(*zip(*front, strict=True), color=INK, linestyle=":", linewidth=1, label="front of all runs")
    left.set(xscale="log", ylim=(0, 27), xlabel="training FLOPs", ylabel="top-5, %")
    left.set_title("Accuracy by size and image tokens", loc="left", color=INK, fontsize=10)
    left.legend(frameon=False, fontsize=6, ncols=3, loc="upper left")
    for tower, axes in zip(TOWERS, right, strict=True):
        lost = drops(rows, tower, WAYS)
        for size, colour in zip(sizes_of(rows), COLOURS, strict=False):
            own = [row for row in lost if row["size"] == size]
            axes.errorbar(
                [row["tokens"] for row in own], [100 * row["drop"] for row in own],
                yerr=[100 * (row["error"] or 0.0) for row in own], color=colour, marker="o", capsize=3, label=size,
            )  # fmt: skip
        ticks = sorted({row["tokens"] for row in lost})
        axes.set(xscale="log", xlabel=f"{tower} tokens in training", ylabel="top-5 points lost")
        axes.set_xticks(ticks, [f"{each:.0f}" for each in ticks])
        axes.minorticks_off()
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_title(f"Lost to fewer {tower} tokens", loc="left", color=INK, fontsize=10)
        axes.legend(frameon=False, fontsize=7)
    for axes in (left, *right):
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "law.png", dpi=130)


def share(accuracies: Sequence[float]) -> str:
    """The mean over seeds, and its standard error."""
    mean = f"{100 * statistics.fmean(accuracies):.1f}"
    if len(accuracies) < 2:
        return mean
    return f"{mean} ± {100 * statistics.stdev(accuracies) / math.sqrt(len(accuracies)):.1f}"


def results(rows: Rows, tower: str, by: str, names: Sequence[str]) -> str:
    """Top-5 in percent by what each row is named after (a column, `by`), samples and a tower's tokens."""
    other = TOWERS[1 - TOWERS.index(tower)]
    rows = [row for row in rows if row[f"{other}_way"] == "all"]
    lengths = sorted({row[f"{tower}_tokens"] for row in rows}, reverse=True)
    lines = [f"| {by.rpartition('_')[2]} | samples | " + " | ".join(f"{n:.0f} {tower} tokens" for n in lengths) + " |"]
    lines.append("|---|---" + "|---" * len(lengths) + "|")
    for name in names:
        for samples in sorted({row["samples"] for row in rows}):
            own = [row for row in rows if row[by] == name and row["samples"] == samples]
            found = [[row["accuracy"] for row in own if row[f"{tower}_tokens"] == each] for each in lengths]
            cells = [share(accuracies) if accuracies else "" for accuracies in found]
            lines.append(f"| {name} | {samples:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reductions(rows: Rows, tower: str) -> list[str]:
    """The ways in which a tower's tokens were reduced."""
    return sorted({row[f"{tower}_way"] for row in rows} - {"all"})


def draw_ways(rows: Rows) -> None:
    """Accuracy against tokens after the most samples, a line for each way."""
    figure, axes_of_towers = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    rows = [row for row in rows if row["samples"] == max(each["samples"] for each in rows)]
    for tower, axes in zip(TOWERS, axes_of_towers, strict=True):
        other = TOWERS[1 - TOWERS.index(tower)]
        own = [row for row in rows if row[f"{other}_way"] == "all"]
        for way, colour, marker in zip(reductions(own, tower), COLOURS, MARKERS, strict=True):
            lengths = sorted({row[f"{tower}_tokens"] for row in own})
            found = [
                [
                    100 * row["accuracy"]
                    for row in own
                    if row[f"{tower}_tokens"] == each and row[f"{tower}_way"] in (way, "all")
                ]
                for each in lengths
            ]
            errors = [statistics.stdev(each) / math.sqrt(len(each)) for each in found]
            axes.errorbar(
                lengths, [statistics.fmean(each) for each in found], yerr=errors, color=colour, marker=marker,
                capsize=3, label=way,
            )  # fmt: skip
        axes.set(xscale="log", ylim=(0, 18), xlabel=f"{tower} tokens in training")
        axes.set_xticks(lengths, [f"{each:.0f}" for each in lengths])
        axes.minorticks_off()
        axes.set_title(f"Ways of keeping fewer {tower} tokens", loc="left", color=INK, fontsize=10)
        axes.legend(frameon=False, fontsize=7)
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes_of_towers[0].set_ylabel("top-5, %")
    figure.savefig(HERE / "law-ways.png", dpi=130)


def terms(rows: Rows) -> str:
    """The fitted law."""
    law = fit_law(rows, WAYS)
    assert law is not None
    lines = ["| term | logits | 95% interval |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {t.name} | {t.value:.2f} | {t.low:.2f} to {t.high:.2f} |" for t in law.terms)])


def held_out(rows: Rows) -> str:
    """The prediction beside what was measured."""
    prediction = json.loads((HERE / "law-prediction.json").read_text(encoding="utf-8"))
    lines = ["| configuration | samples | predicted, 80% interval | measured |", "|---|---|---|---|"]
    for point in measured_points(prediction, rows):
        lines.append(
            f"| {prediction['configuration']} | {point['samples']:,} | {point['value']:.1%}, {point['low']:.1%} to "
            f"{point['high']:.1%} | {point['measured']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    found = read_rows("law.csv")
    by_way = read_rows("law-ways.csv")
    draw(found)
    draw_ways(by_way)
    page = HERE / "law.md"
    text = page.read_text(encoding="utf-8")
    tables = {
        "results": "\n\n".join(results(found, tower, "size", sizes_of(found)) for tower in TOWERS),
        "ways": "\n\n".join(
            results(by_way, tower, f"{tower}_way", ["all", *reductions(by_way, tower)]) for tower in TOWERS
        ),
        "terms": terms(found),
        "held out": held_out(found),
    }
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text = marked.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    page.write_text(text, encoding="utf-8")
