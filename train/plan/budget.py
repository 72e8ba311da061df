"""What a budget buys: the recipes at several lengths on given devices, and those that no cheaper one beats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formatting import duration, print_table, short
from clipkit.page import render
from clipkit.page.charts import Line, line_chart
from clipkit.train.catalogue import DATASETS, find_recipe
from clipkit.train.plan.accuracy import Prediction, known_runs, predict_all
from clipkit.train.plan.columns import pairs_of
from clipkit.train.plan.command import columns_of
from clipkit.train.plan.cost import PAIR_BYTES, Fleet, Pairs, recipe_plan, teachers_cost
from clipkit.train.plan.report import accuracy_text
from clipkit.train.plan.step import Calibration
from clipkit.train.recipes import Recipe

SHORTEST, LONGEST = 1 / 64, 4.0  # of a recipe's own length
MOST_LINES = 6


@dataclass(frozen=True)
class Choice:
    """A recipe at a length; its time and money are with those of `clipkit reinforce` where it has teachers."""

    recipe: str
    dataset: str
    samples: int
    hours: float
    money: float
    accuracy: Prediction
    is_best: bool = False
    """Whether nothing as cheap is predicted to be better."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "accuracy": self.accuracy.to_json()}


def scaled(recipe: Recipe, scale: float, devices: int) -> Recipe:
    """A recipe whose stages and warm-ups are `scale` times as long, with batches that the devices can share."""
    stages = []
    for stage in recipe.stages:
        batch = -(-stage.batch_size // devices) * devices
        steps = max(1, round(stage.samples * scale / batch))
        warmup = min(int(stage.warmup_samples * scale), steps * batch)
        stages.append(replace(stage, batch_size=batch, samples=steps * batch, warmup_samples=warmup))
    return replace(recipe, stages=tuple(stages))


def choices(budget: float, fleet: Fleet, dataset: str | None) -> list[Choice]:
    """What of the published recipes, each on its own data or on `dataset`, costs at most `budget`, cheapest first.

    Each recipe comes at lengths that halve from the longest that the budget pays. Raises UserError where it pays for
    nothing.
    """
    found: list[tuple[Recipe, str, float, float]] = []
    least: tuple[float, str] | None = None
    for name, its_own in DATASETS.items():
        recipe, like = find_recipe(name), its_own if dataset is None else dataset
        if recipe.model.image.frozen or recipe.model.text.frozen:
            continue  # it begins with towers that others have paid for
        pairs = Pairs(pairs_of(like, known_runs()), PAIR_BYTES, like)
        try:
            stages = recipe_plan(scaled(recipe, 1.0, fleet.number), fleet, pairs, Calibration())
        except UserError:
            continue  # it doesn't fit into these devices
        before = 0.0
        if recipe.has_teachers:
            if (teachers := teachers_cost(recipe, fleet, pairs, Calibration())) is None:
                continue  # they see all pairs, and nobody says how many those are
            before = teachers[1] / 3600
        an_hour = fleet.number * fleet.price
        money = sum(stage.hours for stage in stages) * an_hour
        if not money:
            raise UserError("--budget needs a price: give --price, or other --devices")
        least_of_it = (before * an_hour + money * SHORTEST, name)
        least = min(least or least_of_it, least_of_it)
        scale = min(LONGEST, (budget - before * an_hour) / money)
        while scale >= SHORTEST:
            run = scaled(recipe, scale, fleet.number)
            hours = before + sum(stage.hours for stage in recipe_plan(run, fleet, pairs, Calibration()))
            found.append((run, like, hours, hours * an_hour))
            scale /= 2
    if not found:
        why = f"the least is {least[1]} at {SHORTEST:.1%} of its length, {least[0]:,.2f}" if least else "no recipe fits"
        raise UserError(f"--budget {budget:g} pays for no recipe on {fleet.number}x{fleet.chip.name}: {why}")
    accuracies = predict_all([columns_of(run, like, pairs_of(like, known_runs())) for run, like, _, _ in found])
    rows = [
        Choice(run.name, like, run.samples, hours, money, accuracy)
        for (run, like, hours, money), accuracy in zip(found, accuracies, strict=True)
        if accuracy.value is not None
    ]
    best, marked = 0.0, []
    for row in sorted(rows, key=lambda each: (round(each.money, 1), -value_of(each))):
        is_best = value_of(row) > best
        best = max(best, value_of(row))
        marked.append(replace(row, is_best=is_best))
    return marked


def print_choices(rows: Sequence[Choice], budget: float, fleet: Fleet) -> None:
    """The choices that nothing as cheap beats, best first, then the best of each other recipe."""
    front = [row for row in rows if row.is_best][::-1]
    others = [max((row for row in rows if row.recipe == name), key=value_of) for name in {row.recipe for row in rows}]
    others = sorted((row for row in others if row not in front), key=value_of, reverse=True)
    print(f"{budget:,.0f} on {fleet.number} × {fleet.chip.name} at {fleet.price:.2f} an hour")
    columns = ("recipe", "data like", "seen", "time", "money", "ImageNet, %", "")
    cells = [
        (row.recipe, row.dataset, short(row.samples), duration(row.hours * 3600), f"{row.money:,.0f}",
         percents(row.accuracy), "*" if row.is_best else "")
        for row in (*front, *others)
    ]  # fmt: skip
    print_table(columns, cells)
    print(
        "* nothing as cheap is predicted to be better. Assumed: each recipe on the data of its published run "
        "(--dataset for others), its stages in the same ratio; where it has teachers, clipkit reinforce is paid too",
    )


def percents(found: Prediction) -> str:
    """A prediction in percent."""
    return f"{100 * (found.value or 0):.1f} ({100 * (found.low or 0):.1f}–{100 * (found.high or 0):.1f})"


def value_of(row: Choice) -> float:
    """The predicted accuracy."""
    return row.accuracy.value or 0.0


def write_page(rows: Sequence[Choice], budget: float, fleet: Fleet, path: Path) -> None:
    """A page with the picture: accuracy by money, a line for each of the best recipes, dashed those best for it.

    Raises UserError where jinja2 isn't installed.
    """
    tops = {name: max(value_of(row) for row in rows if row.recipe == name) for name in {row.recipe for row in rows}}
    on_front = {row.recipe for row in rows if row.is_best}
    ranked = sorted(tops, key=lambda name: (name not in on_front, -tops[name]))
    lines = []
    for style, name in zip("abcdef", ranked[:MOST_LINES], strict=False):
        own = [row for row in rows if row.recipe == name]
        lines.append(Line(name, [math.log10(row.money) for row in own], [value_of(row) for row in own], style))
    front = [row for row in rows if row.is_best]
    lines.append(
        Line("best for its money", [math.log10(row.money) for row in front], [value_of(row) for row in front], "dashed")
    )
    x_name = f"money, {fleet.number} × {fleet.chip.name} at {fleet.price:.2f} an hour"
    title = "ImageNet zero-shot, predicted"
    chart = line_chart(title, lines, is_share=True, x_name=x_name, show_x=lambda x: short(10**x))
    shown = [(row, accuracy_text(row.accuracy), duration(row.hours * 3600)) for row in front[::-1]]
    render.write_page(path, "clipkit.train.plan", "budget.html.j2", {"chart": chart, "budget": budget, "rows": shown})
