"""`clipkit plan`, and `clipkit sweep`, which plans many runs and trains them.

A plan loads neither torch nor the libraries of images and texts.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from clipkit.cli.options import (
    AnyPath,
    FiniteRange,
    Folder,
    as_json,
    assignments,
    device,
    loader_workers,
    print_json,
)
from clipkit.errors import UserError

if TYPE_CHECKING:
    from clipkit.train.plan.cost import Fleet
    from clipkit.train.plan.step import Calibration

# What goes with each way to say what is planned, beside --page and --measure.
TAKES = {
    "--recipe": ("--set", "--devices", "--price", "--data", "--dataset"),
    "--run": ("--devices", "--price"),
    "--against": (),
    "--budget": ("--devices", "--price", "--dataset"),
}


@click.command()
@click.option("--recipe", "recipe_name", metavar="NAME", help="A recipe (see `clipkit recipes`), or a TOML file.")
@assignments
@click.option("--run", "columns", type=AnyPath, help="JSON with columns of published-runs.csv, in place of a recipe.")
@click.option("--against", type=Folder, help="A run of clipkit train: what it took beside what is planned for it.")
@click.option(
    "--budget", type=FiniteRange(min=0, min_open=True), help="Money: what recipes and lengths give most for it."
)
@click.option("--page", type=AnyPath, help="With --budget: an HTML page with the picture.")
@click.option("--devices", help="How many of what, such as 8xH100-SXM; cpu is this machine. [default: 8xA100-80GB]")
@click.option("--price", type=FiniteRange(min=0), help="Of one device an hour. [default: a usual rent]")
@click.option("--data", type=Folder, help="The dataset, for its number of pairs and its size.")
@click.option("--dataset", metavar="NAME", help="The published data set that the data are like, such as LAION-400M.")
@click.option("--measure", is_flag=True, help="Calibrate on a few steps of this machine, whose --devices it must be.")
@as_json
def plan(
    recipe_name: str | None,
    assignments: tuple[str, ...],
    columns: Path | None,
    against: Path | None,
    budget: float | None,
    page: Path | None,
    devices: str | None,
    price: float | None,
    data: Path | None,
    dataset: str | None,
    measure: bool,
    as_json: bool,
) -> None:
    """Say before a run what it will cost and score: time, money, memory, data, and ImageNet accuracy with an interval.

    Calibrated on published times and fitted to 519 published runs (docs/plan.md); every assumption is printed.
    """
    ways = dict(zip(TAKES, (recipe_name, columns, against, budget), strict=True))
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) != 1:
        raise UserError(
            "plan takes one of --recipe, --run, --against and --budget at a time: clipkit recipes lists the recipes"
        )
    from clipkit.config import set_values
    from clipkit.train.catalogue import find_recipe
    from clipkit.train.plan.columns import read_run
    from clipkit.train.plan.command import fleet_of, plan_against, plan_columns, plan_recipe
    from clipkit.train.plan.report import print_columns, print_difference, print_plan

    if page is not None and budget is None:
        raise UserError("--page draws what a budget buys: give --budget with it")
    if measure and recipe_name is None:
        raise UserError("--measure calibrates the plan of a recipe: give --recipe with it")
    options = {
        "--set": assignments or None,
        "--devices": devices,
        "--price": price,
        "--data": data,
        "--dataset": dataset,
    }
    for name, value in options.items():
        if value is not None and name not in TAKES[chosen[0]]:
            raise UserError(f"{name} doesn't go with {chosen[0]}: leave it out")
    devices = "8xA100-80GB" if devices is None else devices
    if columns is not None:
        values = plan_columns(read_run(columns), fleet_of(devices, price))
        print_json(values) if as_json else print_columns(values)
    elif against is not None:
        planned, rows = plan_against(against)
        print_json({**planned.to_json(), "against": rows}) if as_json else print_difference(planned, rows)
    elif budget is not None:
        from clipkit.train.plan.budget import choices, print_choices, write_page

        fleet = fleet_of(devices, price)
        bought = choices(budget, fleet, dataset)
        if page is not None:
            write_page(bought, budget, fleet, page)
        if as_json:
            print_json({"budget": budget, "choices": [row.to_json() for row in bought]})
        else:
            print_choices(bought, budget, fleet)
    else:
        recipe = set_values(find_recipe(str(recipe_name)), assignments)
        fleet, calibration = calibrated(devices, price, measure)
        planned = plan_recipe(recipe, fleet, data=data, dataset=dataset, calibration=calibration)
        print_json(planned.to_json()) if as_json else print_plan(planned)


def calibrated(devices: str, price: float | None, measure: bool) -> "tuple[Fleet, Calibration | None]":
    """The devices, and with `measure` what this machine measures of them."""
    from clipkit.train.plan.command import fleet_of

    fleet = fleet_of(devices, price)
    if not measure:
        return fleet, None
    from clipkit.train.plan.measure import measured_calibration

    return fleet, measured_calibration(fleet.chip)


@click.command()
@click.argument("path", metavar="SWEEP.toml", type=AnyPath)
@click.option("--out", type=Folder, help="Folder of the sweep. Needed but for --dry-run.")
@click.option("--dry-run", is_flag=True, help="Only say what the sweep is predicted to take.")
@click.option("--devices", help="For --dry-run, as plan's: how many of what. [default: cpu, which is this machine]")
@click.option("--price", type=FiniteRange(min=0), help="Of one device an hour, for --dry-run.")
@click.option("--measure", is_flag=True, help="For --dry-run: calibrate on a few steps of this machine.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="Where to train: this machine, one run on each GPU, or a Ray cluster that you have.",
)
@device
@loader_workers
@as_json
def sweep(
    path: Path,
    out: Path | None,
    dry_run: bool,
    devices: str | None,
    price: float | None,
    measure: bool,
    engine: Literal["local", "ray"],
    device: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Train sizes x token lengths x budgets on your own data, and fit the law that they follow.

    Budgets share a trunk at a constant rate and cool down from it, so four cost less than one and a half of the
    longest. Killed at any moment, the same command goes on; finished runs are never made again. docs/law.md
    """
    from clipkit.train.sweep.command import price_json, print_prices, print_result, run_sweep
    from clipkit.train.sweep.grid import read_sweep

    read = read_sweep(path)
    if dry_run:
        fleet, calibration = calibrated(devices or "cpu", price, measure)
        values = price_json(read, fleet, calibration)
        print_json(values) if as_json else print_prices(values)
        return
    if out is None:
        raise UserError("--out names the folder of the sweep: give it, or --dry-run")
    if measure or price is not None or devices is not None:
        raise UserError("--devices, --price and --measure are for --dry-run: leave them out, or add it")
    result = run_sweep(read, out, engine=engine, device=device, workers=workers)
    print_json(result) if as_json else print_result(result)
