"""Many models on many datasets on a Ray cluster: each pair is a job, and the results are those of one process.

The workers compute; this process writes, in the order of the command, so that names and files don't depend on which job
ends first.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clipkit.device import pick
from clipkit.eval.evaluation import Measured, keep, measure
from clipkit.eval.open import TaskKind, open_data
from clipkit.eval.results import Result
from clipkit.eval.suite import Entry, entries_of, main_number, measure_entry, write_average
from clipkit.interop.load import load
from clipkit.jobs.run import run_jobs


@dataclass(frozen=True)
class Unit:
    """A model on a dataset, and the run that it is for. Of a suite, what the run has isn't computed again."""

    model: str
    entry: Entry
    out: Path | None
    of_suite: bool = False

    def __str__(self) -> str:
        return f"{self.model} on {self.entry.data}"


def evaluate_fleet(
    kind: TaskKind,
    data: Sequence[Path],
    options: Mapping[str, Any],
    outs: Mapping[str, Path | None],
    how: Mapping[str, Any],
) -> Iterator[list[Result]]:
    """The results of each of the data for each of the models that `outs` names. `how` is what `zeroshot` takes, the
    device by its name.
    """
    entries = [Entry(path.name, path, kind, "", options) for path in data]
    for _, found in run([Unit(model, entry, out) for entry in entries for model, out in outs.items()], how):
        yield found


def evaluate_suites(
    suite: str, root: Path, outs: Mapping[str, Path | None], how: Mapping[str, Any]
) -> Iterator[list[Result]]:
    """The main number of each dataset, and the average, for each of the models; see `suite.evaluate_suite`."""
    entries, missing = entries_of(suite, root)
    found = run([Unit(model, entry, out, True) for model, out in outs.items() for entry in entries], how)
    for _ in outs:
        numbers, into = [], None
        for entry in entries:
            into, results = next(found)
            numbers.append(main_number(entry, results))
            yield [numbers[-1]]
        yield [write_average(into, suite, root, numbers, missing)]


def run(units: Sequence[Unit], how: Mapping[str, Any]) -> Iterator[tuple[Path | None, list[Result]]]:
    """The runs and results of the units, in their order, each written as soon as all before it are."""
    finished: dict[int, Measured] = {}
    written = 0
    for index, measured in run_jobs(partial(work, Path.cwd(), dict(how)), units, workers=None, engine="ray", gpu=True):
        finished[index] = measured
        while written in finished:
            each = finished.pop(written)
            written += 1
            yield each.run, keep(each)


def work(folder: Path, how: dict[str, Any], unit: Unit) -> Measured:
    """Measure a unit on a worker, where the paths are those of `folder`."""
    with contextlib.chdir(folder):
        where, settings = pick(how["device"]), {name: value for name, value in how.items() if name != "device"}
        if unit.of_suite:
            encoder = load(unit.model, ema=settings["ema"], vocabulary=settings["vocabulary"])
            return measure_entry(unit.model, unit.entry, encoder, where, out=unit.out, **settings)
        task = open_data(unit.entry.kind, unit.entry.data, **unit.entry.options)
        return measure(unit.model, task, where, out=unit.out, **settings)
