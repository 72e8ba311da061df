"""`clipkit sweep`."""

from pathlib import Path
from typing import Literal

import click

from clipkit.cli.options import AnyPath, FiniteRange, Folder, as_json, device, loader_workers, print_json
from clipkit.errors import UserError


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
    from rich.console import Console

    from clipkit.train.plan.command import fleet_of
    from clipkit.train.sweep.command import price_json, prices, print_prices, print_result, run_sweep
    from clipkit.train.sweep.grid import read_sweep

    console, read = Console(), read_sweep(path)
    if dry_run:
        fleet, calibration = fleet_of(devices or "cpu", price), None
        if measure:
            from clipkit.train.plan.measure import measured_calibration

            calibration = measured_calibration(fleet.chip)
        values = price_json(read, prices(read, fleet, calibration), fleet)
        print_json(values) if as_json else print_prices(values, console)
        return
    if out is None:
        raise UserError("--out names the folder of the sweep: give it, or --dry-run")
    if measure or price is not None or devices is not None:
        raise UserError("--devices, --price and --measure are for --dry-run: leave them out, or add it")
    result = run_sweep(read, out, engine=engine, device=device, workers=workers)
    print_json(result) if as_json else print_result(result, console)
