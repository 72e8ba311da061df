"""One configuration trained: its trunk, and the branch of each budget as soon as the trunk has come to its fork.

So the trunk needs no checkpoint but its newest, and at any moment one run is under way, which `train` takes up where a
kill left it. A result is written when its branch has been measured, and is never made again.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipkit import checkpoint
from clipkit.config import did_you_mean, differences, to_json
from clipkit.device import gpus
from clipkit.embedded import emoji_parquet
from clipkit.errors import UserError
from clipkit.eval.evaluation import EvaluationTask
from clipkit.eval.open import KINDS, open_data
from clipkit.log import read_metrics
from clipkit.storage.files import lock, read_json, write_beside, write_json
from clipkit.train.checks import loader_config, stage_cost
from clipkit.train.loader.loader import check_loader
from clipkit.train.loop import train
from clipkit.train.recipes import Recipe, check_ranges
from clipkit.train.run import Summary, named
from clipkit.train.sources.open import open_source
from clipkit.train.sweep.branches import Branch, branch_of, trunk_to
from clipkit.train.sweep.grid import Configuration, Sweep

# The embedded pairs as data: the training styles with the held-out style, and five of them with the sixth, by which
# hyper-parameters are chosen.
CHOICE_STYLE = "fxemoji"
EMBEDDED = ("embedded:emoji", "embedded:emoji-choice")
ROWS = 256  # of a row group, which is read as one


@dataclass(frozen=True)
class How:
    """How a configuration is trained, beside what decides what it learns."""

    folder: Path
    """Of the whole sweep."""
    place: Path
    """Where the sweep's relative paths begin."""
    device: str = "auto"
    workers: int | None = None
    """The loader's."""


def train_configuration(sweep: Sweep, how: How, configuration: Configuration) -> list[dict[str, Any]]:
    """The rows of a configuration's budgets, each made unless it is there.

    Raises UserError for a run that was begun otherwise, and SystemExit where a signal ended the training.
    """
    folder = how.folder / configuration.name / f"seed{configuration.seed}"
    places = {branch: folder / f"{branch.samples}.json" for branch in configuration.branches}
    if not all(place.exists() for place in places.values()):
        with contextlib.chdir(how.place), one_gpu(how):
            task = open_task(sweep, how.folder)
            for branch, place in places.items():
                if not place.exists():
                    write_json(place, train_branch(sweep, how, configuration, branch, task, folder))
    rows = []
    for branch, place in places.items():
        row: dict[str, Any] = read_json(place)
        changed = differences(row.pop("made_of"), made_of(sweep, configuration, branch))
        if changed:
            raise UserError(
                f"{place} was made by another sweep ({changed[0]}): give another --out, or the sweep that began it"
            )
        rows.append(row)
    return rows


def train_branch(
    sweep: Sweep, how: How, configuration: Configuration, branch: Branch, task: EvaluationTask, folder: Path
) -> dict[str, Any]:
    """The row of one budget, after the trunk to its fork and the branch. Raises as `train_configuration`."""
    recipe, trunk, run = configuration.recipe, folder / "trunk", folder / str(branch.samples)
    newest = checkpoint.latest(trunk)
    if newest is not None and int(newest.name) > branch.fork:
        raise UserError(
            f"{trunk} is {int(newest.name):,} samples long already, beyond the fork of the budget "
            f"{branch.samples:,}: add longer budgets only, or give another --out"
        )
    options: dict[str, Any] = {"device_name": how.device, "resume": True, "workers": how.workers}
    data = training_data(sweep, how.folder)
    start = finished(train(keep_newest(trunk_to(recipe, branch.fork)), data, trunk, **options))
    options |= {"task": task, "branch": True, "init": checkpoint.latest(trunk)}
    end = finished(train(keep_newest(branch_of(recipe, branch)), data, run, **options))
    last = [line for line in read_metrics(run) if line["samples_seen"] == branch.samples]
    name = next((found for line in last if (found := named(sweep.metric, line))), None)
    if name is None:
        wrong = next((str(line["evaluation_error"]) for line in last if "evaluation_error" in line), "no such number")
        raise UserError(f"{run} has no {sweep.metric} ({wrong}): mend [eval] of the sweep, and give another --out")
    stage = recipe.stages[0]
    return {
        "configuration": configuration.name,
        "size": configuration.size,
        "weights": configuration.weights,
        "image_tokens": configuration.image.tokens,
        "image_way": configuration.image.way,
        "text_tokens": configuration.text.tokens,
        "text_way": configuration.text.way,
        "seed": configuration.seed,
        "samples": branch.samples,
        "flops": stage_cost(recipe, stage).flops * branch.samples,
        "accuracy": next(line[name] for line in last if name in line),
        "measured_on": len(task),
        "trunk_seconds": start,
        "seconds": end - start,  # a branch's own count goes on from the trunk's
        "made_of": made_of(sweep, configuration, branch),
    }


def finished(summary: Summary) -> float:
    """The seconds of a training that came to its end. Raises SystemExit where a signal ended it."""
    if not summary.finished:
        print(f"{summary.run} stopped at {summary.samples_seen:,} samples: the same command goes on", file=sys.stderr)
        raise SystemExit(128 + (summary.signal or signal.SIGTERM))
    return summary.seconds


def made_of(sweep: Sweep, configuration: Configuration, branch: Branch) -> dict[str, Any]:
    """All that decides a result."""
    recipe = to_json(branch_of(configuration.recipe, branch))
    recipe.pop("cadence")
    return {"recipe": recipe, "data": list(sweep.data), "eval": dict(sweep.evaluation)}


def keep_newest(recipe: Recipe) -> Recipe:
    """The recipe with as few checkpoints as going on needs."""
    return replace(recipe, cadence=replace(recipe.cadence, evaluate_samples=None, keep_best=None, keep_checkpoints=1))


@contextlib.contextmanager
def one_gpu(how: How) -> Iterator[None]:
    """Where this machine has several GPUs: one that no other configuration of the sweep has.

    On Ray each configuration sees only the GPU that it was given.
    """
    if gpus() < 2 or how.device not in ("auto", "gpu"):
        yield
        return
    with contextlib.ExitStack() as stack:
        for number in range(gpus()):
            with contextlib.suppress(UserError):  # it is taken
                stack.enter_context(lock(how.folder / "gpus" / str(number)))
                break
        else:
            raise UserError(f"all {gpus()} GPUs are taken by configurations of {how.folder}: wait for them")
        before = os.environ.get("LOCAL_RANK")
        os.environ["LOCAL_RANK"] = str(number)
        stack.callback(restore, "LOCAL_RANK", before)
        yield


def restore(name: str, before: str | None) -> None:
    """Give an environment variable the value that it had."""
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before


# ---- Data ------------------------------------------------------------------------------------------------------------


def prepare_data(sweep: Sweep, folder: Path) -> None:
    """Write the embedded pairs that the sweep names, once, before any worker asks for them."""
    import pyarrow.parquet as pq

    for name in {*sweep.data, sweep.evaluation["data"]} & set(EMBEDDED):
        training, measuring = embedded_paths(folder, name)
        if training.exists() and measuring.exists():
            continue
        pairs, heldout = pq.read_table(emoji_parquet("train")), pq.read_table(emoji_parquet("heldout"))
        if name.endswith("-choice"):
            vendors, labels = pairs["vendor"].to_pylist(), pairs["label"].to_pylist()
            is_left = [vendor == CHOICE_STYLE for vendor in vendors]
            known = {label for label, left in zip(labels, is_left, strict=True) if not left}
            heldout = pairs.filter([left and label in known for label, left in zip(labels, is_left, strict=True)])
            pairs = pairs.filter([not left for left in is_left])
        for path, rows in ((training / "pairs.parquet", pairs), (measuring, heldout)):
            with write_beside(path) as beside:
                pq.write_table(rows, beside, row_group_size=ROWS)


def embedded_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a sweep has embedded pairs: a folder to train on, and a file to measure. Raises UserError."""
    if name not in EMBEDDED:
        raise UserError(f"data {name!r}: {did_you_mean(name, EMBEDDED)}")
    own = folder / "data" / name.partition(":")[2]
    return own / "train", own / f"{own.name}-heldout.parquet"


def training_data(sweep: Sweep, folder: Path) -> list[str]:
    """What `train` takes for the sweep's data."""
    return [str(embedded_paths(folder, each)[0]) if each.startswith("embedded:") else each for each in sweep.data]


def check_sweep(sweep: Sweep, folder: Path) -> None:
    """Refuse, before any training, what would fail only when its turn comes. Raises UserError."""
    open_task(sweep, folder)
    source = open_source(training_data(sweep, folder)).source()
    for configuration in sweep.configurations:
        recipe, stage = configuration.recipe, configuration.recipe.stages[0]
        try:
            check_ranges(recipe)
            check_loader(source, loader_config(recipe, stage), 0, stage.samples, 1)
        except UserError as error:
            raise UserError(f"{configuration.name}: {error}") from error


def open_task(sweep: Sweep, folder: Path) -> EvaluationTask:
    """What the sweep measures. Raises UserError."""
    given: dict[str, Any] = dict(sweep.evaluation)
    data, kind = given.pop("data"), given.pop("task", KINDS[0])
    given.pop("metric", None)
    if kind not in KINDS:
        raise UserError(f"eval.task: unknown task {kind!r}; {did_you_mean(kind, KINDS)}")
    if "templates" in given:
        given["templates_name"] = given.pop("templates")
    if "classes" in given:
        given["classes"] = Path(given["classes"])
    return open_data(kind, embedded_paths(folder, data)[1] if data.startswith("embedded:") else Path(data), **given)
