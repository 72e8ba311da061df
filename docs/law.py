"""Draws docs/law.png and writes the tables of docs/law.md, from docs/law.csv and docs/law-prediction.json.

Those are `table.csv` and `prediction.json` of `clipkit sweep sweeps/emoji-evening.toml --out runs/law`.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from clipkit.train.sweep.command import measured_points
from clipkit.train.sweep.law import drops, fit_law
from clipkit.train.sweep.pictures import means, pareto, sizes_of

HERE = Path(__file__).parent
INK, GRID = "#1f2933", "#d5dae0"
COLOURS, MARKERS = ("#2f6fb3", "#c2571a", "#2e8555"), ("o", "s", "^", "D")
NUMBERS = ("weights", "image_tokens", "text_tokens", "seed", "samples", "flops", "accuracy", "measured_on")


def read_rows() -> list[dict[str, Any]]:
    """The results of the sweep."""
    with (HERE / "law.csv").open(encoding="utf-8", newline="") as file:
        return [{**row, **{name: float(row[name]) for name in NUMBERS}} for row in csv.DictReader(file)]


def draw(rows: list[dict[str, Any]]) -> None:
    """Accuracy against compute with the front, and what fewer tokens cost."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for size, colour in zip(sizes_of(rows), COLOURS, strict=False):
        found = means([row for row in rows if row["size"] == size], "image_tokens", "flops")
        for tokens, marker in zip(sorted({key[0] for key in found}, reverse=True), MARKERS, strict=False):
            points = sorted((flops, 100 * value) for (each, flops), value in found.items() if each == tokens)
            left.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"{size}, {tokens:.0f} tokens")
        lost = [row for row in drops(rows, "image") if row["size"] == size]
        right.plot(
            [row["tokens"] for row in lost], [100 * row["drop"] for row in lost], color=colour, marker="o", label=size
        )
    front = [(flops, 100 * value) for flops, value in pareto(rows)]
    left.plot(*zip(*front, strict=True), color=INK, linestyle=":", linewidth=1, label="front")
    left.set(xscale="log", ylim=(0, 13), xlabel="training FLOPs", ylabel="top-5, %")
    right.set(xscale="log", xlabel="image tokens in training", ylabel="top-5 points lost")
    right.set_xticks([16, 9, 4, 1], ["16", "9", "4", "1"])
    right.minorticks_off()
    left.set_title("Accuracy against compute", loc="left", color=INK)
    right.set_title("Lost to fewer tokens, one seed", loc="left", color=INK)
    for axes in (left, right):
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=7, ncols=3, loc="upper left")
    right.legend(frameon=False, fontsize=7)
    figure.savefig(HERE / "law.png", dpi=130)


def results(rows: list[dict[str, Any]]) -> str:
    """Top-5 by size, tokens and budget."""
    found, sizes = means(rows, "size", "samples", "image_tokens"), sizes_of(rows)
    tokens = sorted({key[2] for key in found}, reverse=True)
    lines = ["| size | samples | " + " | ".join(f"{each:.0f} tokens" for each in tokens) + " |"]
    lines.append("|---|---" + "|---" * len(tokens) + "|")
    for size in sizes:
        for samples in sorted({key[1] for key in found}):
            cells = " | ".join(f"{found[size, samples, each]:.1%}" for each in tokens)
            lines.append(f"| {size} | {samples:,.0f} | {cells} |")
    return "\n".join(lines)


def terms(rows: list[dict[str, Any]]) -> str:
    """The fitted law."""
    law = fit_law(rows)
    assert law is not None
    lines = ["| term | logits | 95% interval |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {t.name} | {t.value:.2f} | {t.low:.2f} to {t.high:.2f} |" for t in law.terms)])


def held_out(rows: list[dict[str, Any]]) -> str:
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
    found = read_rows()
    draw(found)
    page = HERE / "law.md"
    text = page.read_text(encoding="utf-8")
    for name, table in (("results", results(found)), ("terms", terms(found)), ("held out", held_out(found))):
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text = marked.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    page.write_text(text, encoding="utf-8")
