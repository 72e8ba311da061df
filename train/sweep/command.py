"""`clipkit sweep`: a sweep from its file to its report. Finished runs are never made again, wherever it was stopped.

All configurations but the held-out one come first; then the law of them predicts that one, and the prediction is
written before it is trained.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from clipkit.errors import UserError
from clipkit.formatting import duration, print_table, share, short
from clipkit.jobs.run import run_jobs
from clipkit.storage.files import lock, read_json, write_beside, write_json
from clipkit.train.plan.cost import PAIR_BYTES, Fleet, Pairs, stage_plan
from clipkit.train.plan.step import Calibration
from clipkit.train.sweep.branches import samples_trained
from clipkit.train.sweep.grid import Configuration, Sweep
from clipkit.train.sweep.law import fit_law, predict
from clipkit.train.sweep.pictures import write_page

PAGE, TABLE, PREDICTION = "sweep.html", "table.csv", "prediction.json"
# What doesn't differ when a sweep was killed and went on.
COLUMNS = (
    "configuration", "size", "weights", "image_tokens", "image_way", "text_tokens", "text_way", "seed", "samples",
    "flops", "accuracy", "measured_on",
)  # fmt: skip


# ---- Before it -------------------------------------------------------------------------------------------------------


def price_json(sweep: Sweep, fleet: Fleet, calibration: Calibration | None) -> dict[str, Any]:
    """What the sweep is predicted to cost, as JSON values; loading and measuring aren't in it.

    Of each row the time is that of one device. `shared` is what trunks are worth: samples trained to those of the
    longest runs alone. Raises UserError for a model that `plan` doesn't know or that doesn't fit.
    """
    one, pairs = Fleet(1, fleet.chip, fleet.price), Pairs(None, PAIR_BYTES, "unknown")
    rows: list[dict[str, Any]] = []
    for configuration in sweep.configurations:
        samples, recipe = samples_trained(configuration.branches), configuration.recipe
        stage = replace(recipe.stages[0], samples=samples)
        hours = stage_plan(recipe, stage, one, pairs, calibration or Calibration()).hours
        rows.append(
            {"configuration": configuration.name, "seed": configuration.seed, "samples": samples, "hours": hours}
        )
    device_hours, samples = sum(row["hours"] for row in rows), sum(row["samples"] for row in rows)
    return {
        "sweep": sweep.name,
        "devices": f"{fleet.number}x{fleet.chip.name}",
        "configurations": len(rows),
        "runs": sum(len(configuration.branches) for configuration in sweep.configurations),
        "samples": samples,
        "shared": samples / sum(configuration.branches[-1].samples for configuration in sweep.configurations),
        "hours": max(device_hours / fleet.number, *(row["hours"] for row in rows)),
        "device_hours": device_hours,
        "money": device_hours * fleet.price,
        "rows": rows,
    }


def print_prices(values: Mapping[str, Any]) -> None:
    """The predicted cost for people: a line for each configuration, all its seeds together."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in values["rows"]:
        rows.setdefault(row["configuration"], []).append(row)
    cells = [
        (
            name,
            str(len(own)),
            short(sum(row["samples"] for row in own)),
            duration(3600 * sum(row["hours"] for row in own)),
        )
        for name, own in rows.items()
    ]
    print_table(("configuration", "seeds", "samples", "device time"), cells)
    print(
        f"{values['runs']} runs from {values['configurations']} trunks, {values['shared']:.2f} times the longest runs; "
        f"{duration(3600 * values['hours'])} on {values['devices']}, {values['device_hours']:.3g} device-hours, "
        f"{values['money']:,.2f}. Not in it: loading data where that is slower, and measuring",
    )


# ---- The sweep -------------------------------------------------------------------------------------------------------


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    engine: Literal["local", "ray"] = "local",
    device: str = "auto",
    workers: int | None = None,
) -> dict[str, Any]:
    """Train what isn't trained yet, write table, law and page into `folder`, and return them as JSON values.

    On this machine configurations are trained in turn, or one on each GPU; on Ray as many as the cluster has room for.
    Raises UserError for a folder with other results.
    """
    from clipkit.train.sweep.run import How, check_sweep, prepare_data

    with lock(folder):
        how = How(folder.resolve(), Path.cwd(), device, workers)
        prepare_data(sweep, folder)
        check_sweep(sweep, folder)
        first = [each for each in sweep.configurations if each.name != sweep.held_out]
        last = [each for each in sweep.configurations if each.name == sweep.held_out]
        rows = train_all(sweep, how, first, engine)
        prediction = prediction_of(sweep, rows, last, folder) if last else None
        rows += train_all(sweep, how, last, engine)
        return finish(sweep, rows, prediction, folder)


def train_all(
    sweep: Sweep, how: Any, configurations: Sequence[Configuration], engine: Literal["local", "ray"]
) -> list[dict[str, Any]]:
    """The rows of the configurations, in their order."""
    from clipkit.device import gpus
    from clipkit.train.sweep.run import train_configuration

    workers = None if engine == "ray" else max(1, gpus() if how.device in ("auto", "gpu") else 0)
    found: dict[int, list[dict[str, Any]]] = {}
    jobs = run_jobs(
        partial(train_configuration, sweep, how),
        configurations, workers=workers, describe=describe, engine=engine, gpu=True,
    )  # fmt: skip
    for index, rows in jobs:
        found[index] = rows
        accuracies = ", ".join(f"{short(row['samples'])} {share(row['accuracy'])}" for row in rows)
        print(f"{len(found)}/{len(configurations)} {describe(configurations[index])}: {accuracies}", flush=True)
    return [row for index in sorted(found) for row in found[index]]


def describe(configuration: Configuration) -> str:
    """A configuration in messages."""
    return f"{configuration.name} seed {configuration.seed}"


def prediction_of(
    sweep: Sweep, rows: Sequence[Mapping[str, Any]], last: Sequence[Configuration], folder: Path
) -> dict[str, Any] | None:
    """What the law of all others says of the held-out configuration: as written before it was trained, or written now.

    None where they are too few for a law. Raises UserError where it was trained before anything was predicted.
    """
    path, configuration = folder / PREDICTION, last[0]
    if path.exists():
        found: dict[str, Any] = read_json(path)
        if found["configuration"] != configuration.name:
            raise UserError(f"{path} is of {found['configuration']}: set held_out to that, or give another --out")
        return found
    if (folder / configuration.name).exists():
        raise UserError(
            f"{configuration.name} was trained before it was predicted: hold out another one, or give another --out"
        )
    law = fit_law(rows, sweep.ways)
    if law is None:
        return None
    points = []
    for branch in configuration.branches:
        place = {
            "weights": configuration.weights, "samples": branch.samples, "image_tokens": configuration.image.tokens,
            "text_tokens": configuration.text.tokens,
        }  # fmt: skip
        points.append({"samples": branch.samples, **predict(law, place)})
    prediction = {"configuration": configuration.name, "fitted_on": len(rows), "points": points}
    write_json(path, prediction)
    return prediction


def finish(sweep: Sweep, rows: list[dict[str, Any]], prediction: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """Table, law and page of a sweep that is trained."""
    rows = sorted(rows, key=lambda row: (row["configuration"], row["seed"], row["samples"]))
    with write_beside(folder / TABLE) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    law = fit_law(rows, sweep.ways)
    result: dict[str, Any] = {
        "sweep": sweep.name,
        "ways": dict(sweep.ways),
        "rows": rows,
        "law": law.to_json() if law else None,
        "held_out": {**prediction, "points": list(measured_points(prediction, rows))} if prediction else None,
        "page": str(folder / PAGE),
    }
    write_page(result, folder / PAGE)
    return result


def measured_points(prediction: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The points of a prediction with what was measured, in the mean over seeds; without budgets that the sweep no
    longer has.
    """
    for point in prediction["points"]:
        own = [
            row["accuracy"] for row in rows
            if (row["configuration"], row["samples"]) == (prediction["configuration"], point["samples"])
        ]  # fmt: skip
        if own:
            yield {**point, "measured": sum(own) / len(own)}


def print_result(result: Mapping[str, Any]) -> None:
    """Law and held-out point for people, and where the page is."""
    law, held_out = result["law"], result["held_out"]
    if law:
        cells = [
            (term["name"], f"{term['value']:.3f}", f"{term['low']:.3f} to {term['high']:.3f}") for term in law["terms"]
        ]
        print_table(("term", "logits", "95% interval"), cells)
        for tower, holds in law["holds"].items():
            print(f"does a halving of {tower} tokens cost larger encoders less? {holds}")
    for point in held_out["points"] if held_out else ():
        print(
            f"{held_out['configuration']} at {short(point['samples'])}: predicted {share(point['value'])} "
            f"({share(point['low'])} to {share(point['high'])}), measured {share(point['measured'])}",
        )
    print(f"the page: {result['page']}")
