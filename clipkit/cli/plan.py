"""`clipkit plan`, which loads neither torch nor the libraries of images and texts."""

from pathlib import Path

import click

from clipkit.cli.options import AnyPath, FiniteRange, Folder, as_json, assignments, print_json
from clipkit.errors import UserError

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
    from rich.console import Console

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
    devices, console = "8xA100-80GB" if devices is None else devices, Console()
    if columns is not None:
        values = plan_columns(read_run(columns), fleet_of(devices, price))
        print_json(values) if as_json else print_columns(values, console)
    elif against is not None:
        planned, rows = plan_against(against)
        print_json({**planned.to_json(), "against": rows}) if as_json else print_difference(planned, rows, console)
    elif budget is not None:
        from clipkit.train.plan.budget import choices, print_choices, write_page

        fleet = fleet_of(devices, price)
        bought = choices(budget, fleet, dataset)
        if page is not None:
            write_page(bought, budget, fleet, page)
        if as_json:
            print_json({"budget": budget, "choices": [row.to_json() for row in bought]})
        else:
            print_choices(bought, budget, fleet, console)
    else:
        recipe = set_values(find_recipe(str(recipe_name)), assignments)
        fleet, calibration = fleet_of(devices, price), None
        if measure:
            from clipkit.train.plan.measure import measured_calibration

            calibration = measured_calibration(fleet.chip)
        planned = plan_recipe(recipe, fleet, data=data, dataset=dataset, calibration=calibration)
        print_json(planned.to_json()) if as_json else print_plan(planned, console)
