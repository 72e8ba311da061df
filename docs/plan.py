"""Writes the tables of docs/plan.md; with --fit, chooses the strengths of the accuracy's effects again (minutes)."""

import json
import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clipkit.embedded import folder
from clipkit.train.catalogue import find_recipe
from clipkit.train.plan.accuracy import Z80, Array, Fit, evidence, groupings, known_runs, read_fit, validate
from clipkit.train.plan.command import fleet_of, plan_columns, plan_recipe
from clipkit.train.plan.published_times import published_times
from clipkit.train.plan.report import accuracy_text
from clipkit.train.plan.step import Calibration

PAGE = Path(__file__).with_suffix(".md")
JUDGES = ("data set", "model size", "paper", "series")
SEARCH_SECONDS = 600


# Top-1 in percent, and days on eight A100-80GB of the whole recipe.
HEADLINE = (
    ("clipa-b16-i50-t16", 63.2, 2.0),
    ("clipa-l16-i17-t16", 67.8, 3.0),
    ("clipa-l16-i37-t8", 69.3, 4.0),
    ("clipa-l14-datacomp", 80.3, 23.5),
    ("clipa-h14-laion2b", 79.1, 45.0),
    ("clipa-h14-datacomp", 81.8, 45.0),
)


# ---- The fit ---------------------------------------------------------------------------------------------------------


def loss(kernel: Mapping[str, float], doubt: Mapping[str, float]) -> float:
    """How badly left-out groups are told: Student's t (4) in logits, and points of accuracy."""
    known, ways = evidence(), groupings()
    total = 0.0
    for means, deviations in validate(
        {name: ways[name] for name in JUDGES}, Fit(dict(kernel), 1.0, 0.0, dict(doubt))
    ).values():
        z = (known.logits - means) / deviations
        points = 100 * np.abs(1 / (1 + np.exp(-means)) - known.top1)
        total += float(np.mean(np.log(deviations) + 2.5 * np.log1p(z**2 / 4) + 0.15 * np.minimum(points, 8)))
    return total


def search(start: Fit, seconds: float) -> Fit:
    """Each strength up and down in turn, in ever smaller steps; then the weights of runs that fit badly."""
    kernel, step, rng = dict(start.kernel), 0.3, np.random.default_rng(0)
    best, began = loss(kernel, start.doubt), time.monotonic()
    while time.monotonic() - began < seconds:
        for name in rng.permutation(sorted(kernel)):
            for sign in (1, -1):
                tried = kernel | {name: kernel[name] * math.exp(sign * step)}
                found = loss(tried, start.doubt)
                if found < best - 1e-5:
                    best, kernel = found, tried
                    break
        step = max(0.08, 0.85 * step)
        print(f"{time.monotonic() - began:.0f} s: {best:.4f}", flush=True)
    known = evidence()
    alone = {"run": list(known.ids)}
    means, deviations = validate(alone, Fit(kernel, 1.0, 0.0, {}))["run"]
    z = np.abs(known.logits - means) / deviations
    doubt = {each: round(float(value / 1.5), 3) for each, value in zip(known.ids, z, strict=True) if value > 1.5}
    kernel = {name: round(value, 5) for name, value in kernel.items()}
    fit = widened(Fit(kernel, 1.0, 0.0, doubt))
    tries = [fit._replace(unfamiliar=number / 50) for number in range(31)]
    return next((each for each in tries[::-1] if held("data set", each) <= 0.88), tries[0])


def widened(fit: Fit) -> Fit:
    """The fit with intervals that hold four fifths of the runs whose size of model is left out."""
    means, deviations = validate({"": groupings()["model size"]}, fit)[""]
    pulls = np.abs(evidence().logits - means) / deviations
    return fit._replace(widening=round(float(np.quantile(pulls, 0.8)) / Z80, 4))


def held(name: str, fit: Fit) -> float:
    """The share of runs that their 80% intervals hold."""
    return share_held(*validate({name: groupings()[name]}, fit)[name], fit)


def share_held(means: Array, deviations: Array, fit: Fit) -> float:
    """The share of the published runs that the 80% intervals of these predictions hold."""
    return float(np.mean(np.abs(evidence().logits - means) <= Z80 * fit.widening * deviations))


# ---- The tables ------------------------------------------------------------------------------------------------------


def accuracy_table(fit: Fit) -> str:
    """How well left-out groups are told."""
    lines = ["| left out at once | groups | median error, points | above 20% | 90% within | 80% interval holds |"]
    lines += ["|---|---|---|---|---|---|"]
    found = validate(groupings(), fit)
    return "\n".join([*lines, *(accuracy_row(name, *found[name], fit) for name in found)])


def accuracy_row(name: str, means: Array, deviations: Array, fit: Fit) -> str:
    """One way of leaving out."""
    top1 = evidence().top1
    points = 100 * np.abs(1 / (1 + np.exp(-means)) - top1)
    return (
        f"| a {name} | {len(set(groupings()[name]))} | {np.median(points):.2f} | {np.median(points[top1 > 0.2]):.2f} | "
        f"{np.quantile(points, 0.9):.1f} | {share_held(means, deviations, fit):.0%} |"
    )


def times_table() -> str:
    """Planned and published device-hours of the runs that the calibration is for."""
    lines = ["| run | published A100-hours | planned | ratio |", "|---|---|---|---|"]
    for row in published_times(Calibration()):
        lines.append(f"| {row.name} | {row.published:,.0f} | {row.planned:,.0f} | {row.ratio:.2f} |")
    return "\n".join(lines)


def others_table() -> str:
    """Planned to published hours of OpenCLIP's runs on A100s, of which the calibration knows nothing, by model."""
    ratios: dict[str, list[float]] = {}
    for run in known_runs():
        if {"hours", "device_count", "samples_seen"} <= set(run) and str(run.get("device", "")).startswith("A100"):
            values = plan_columns(run, fleet_of(f"{run['device_count']:.0f}xA100-40GB", None))
            if values["hours"] and "CLIPA" not in run["model"] and run["samples_seen"] >= 5e7:
                ratios.setdefault(run["model"], []).append(values["hours"] / run["hours"])
    lines = ["| model | runs | planned to published hours, median | least | most |", "|---|---|---|---|---|"]
    for model, found in sorted(ratios.items()):
        lines.append(f"| {model} | {len(found)} | {np.median(found):.2f} | {min(found):.2f} | {max(found):.2f} |")
    return "\n".join(lines)


def headline_table() -> str:
    """What was published of CLIPA's recipes, and what a plan says; `blind` from all runs but CLIPA's own."""
    columns = ("recipe", "ImageNet, published", "predicted", "blind", "A100 days, published", "planned")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    known, is_clipa = evidence(), ["CLIPA" in str(run.get("source")) for run in known_runs()]
    groups = ["CLIPA" if ours else each for ours, each in zip(is_clipa, known.ids, strict=True)]
    logits = validate({"": groups}, read_fit())[""][0]
    for name, published, days in HEADLINE:
        plan = plan_recipe(find_recipe(name), fleet_of("8xA100-80GB", None))
        own = [row for row, ours in enumerate(is_clipa) if ours and abs(known.top1[row] - published / 100) < 5e-4]
        blind = f"{100 / (1 + math.exp(-logits[own[0]])):.1f}" if own else "not in the table"
        lines.append(
            f"| {name} | {published} | {accuracy_text(plan.accuracies[-1])} | {blind} | {days:g} | "
            f"{plan.hours / 24:.1f} |"
        )
    return "\n".join(lines)


def write(name: str, table: str) -> None:
    """Put a table between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    PAGE.write_text(marked.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    if "--fit" in sys.argv:
        found = search(read_fit(), float(sys.argv[2]) if len(sys.argv) > 2 else SEARCH_SECONDS)
        path = folder("published") / "accuracy-fit.json"
        path.write_text(json.dumps(found._asdict(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write("accuracy", accuracy_table(read_fit()))
    write("times", times_table())
    write("others", others_table())
    write("headline", headline_table())
