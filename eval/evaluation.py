"""One model on one task: the numbers, and what they were made from.

A task of any kind is evaluated here in the same way, as a command on a checkpoint or while training.
"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clipkit.device import Device, Precision, pick
from clipkit.embedding.encoder import Compute, Encoder
from clipkit.embedding.vectors import ImageSet
from clipkit.eval import results
from clipkit.eval.metrics import Measure
from clipkit.eval.results import Result
from clipkit.formats.folders import printable
from clipkit.formatting import counted
from clipkit.interop.load import load
from clipkit.log import Progress, warn_on_stderr
from clipkit.pixels.images import Preprocess
from clipkit.storage.cache import BlockCache
from clipkit.storage.files import require_writable

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Outcome:
    """What a task found out about a model."""

    measures: list[Measure]
    classes: int = 0
    """How many there are to choose from, where it is always the same number."""
    templates: str = ""
    unreadable: int = 0
    """Images that can't be decoded; they aren't counted."""
    largest_class: float = 0.0
    notes: tuple[str, ...] = ()
    """What belongs with the numbers, wherever they go."""
    guesses: "pa.Table | None" = None
    """A row for each image or question: what was guessed, and for some the picture."""


class EvaluationTask(Protocol):
    """Something to measure models on. It may keep what is costly to make again while training goes on."""

    name: str
    kind: str
    """`classification`, `retrieval` …"""
    notes: tuple[str, ...]
    """What to know about the data."""

    @property
    def path(self) -> Path:
        """Where the data is."""
        ...

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def hashes(self, preprocess: Preprocess) -> dict[str, str]:
        """Of all that the numbers depend on beside the model. The images are read for it unless they were before."""
        ...

    def measure(self, encoder: Encoder, compute: Compute, keep_guesses: bool = False) -> Outcome:
        """Evaluate. Raises UserError for data that can't be read, and for a model that gives NaN."""
        ...


def evaluate(encoder: Encoder, task: EvaluationTask, compute: Compute) -> Iterator[tuple[str, float]]:
    """Yield `(task/metric, value)` for a model in training: `emoji-heldout/top1` and so on."""
    for measured in task.measure(encoder, compute).measures:
        yield f"{task.name}/{measured.metric}", measured.value


@dataclass(frozen=True)
class Measured:
    """What was found out about a model, before it is written into `run`."""

    run: Path | None
    results: list[Result]
    outcome: Outcome | None
    """None where the run has the results already."""


def zeroshot(
    source: str | Path, task: EvaluationTask, *, device: str | Device = "auto", **options: Any
) -> list[Result]:
    """Evaluate a model on a task; write numbers and guesses into the run, and return the numbers. `options` are those
    of `measure`.

    In the run, `results.jsonl` gets a line for each metric and `predictions-<task>.parquet` the guesses, which
    `per-class-<task>.csv` counts by class where each image has one; outside of a run nothing is written. Of several
    ranks, which share the work, the first one writes. Raises UserError for whatever is wrong with the input.
    """
    where = pick(device) if isinstance(device, str) else device
    return where.on_first(partial(keep, measure(source, task, where, **options)))


def measure(
    source: str | Path,
    task: EvaluationTask,
    where: Device,
    *,
    encoder: Encoder | None = None,
    batch_size: int = 256,
    precision: Precision = "float32",
    out: Path | None = None,
    ema: bool = False,
    vocabulary: Path | None = None,
    cache: BlockCache | None = None,
) -> Measured:
    """Evaluate a model on a task.

    `source` and `vocabulary` are what `clipkit.interop.load` takes; `encoder` is what it gave, where it was called
    already. The run is `out`, or the one that a checkpoint of clipkit's lies in. `ema` takes the averages of the
    weights, and the task is then called `ema/<task>`. Embeddings that `cache` has aren't computed again. Raises
    UserError for whatever is wrong with the input.
    """
    for text in task.notes:
        note(text)
    encoder = encoder or load(source, ema=ema, vocabulary=vocabulary)
    note(encoder.summary)
    run = out or run_of(encoder)
    if run is not None:
        where.on_first(partial(require_writable, run))
    encoder = encoder.to(where.torch_device)
    for text in encoder.notes:
        note(text)
    with Progress(f"zeroshot {task.name}", len(task), "images", quiet=not where.is_first) as progress:
        compute = Compute(where, precision, batch_size, progress.update, cache)
        outcome = task.measure(encoder, compute, keep_guesses=run is not None and where.is_first)
    common: dict[str, Any] = {
        "classes": outcome.classes,
        "task": f"ema/{task.name}" if ema else task.name,
        "data": printable(str(task.path.absolute())),
        "samples_seen": encoder.samples_seen,
        "checkpoint": relative(encoder.path, run) if encoder.path else encoder.name,
        "hashes": task.hashes(encoder.preprocess),
        "templates": outcome.templates,
        "unreadable": outcome.unreadable,
        "largest_class": outcome.largest_class,
        "kind": task.kind,
        "weights": encoder.weights,
        "model": encoder.name,
        "notes": (*encoder.notes, *outcome.notes),
        "precision": where.arithmetic(precision),
        "computation": encoder.computation,
    }
    return Measured(run, [Result(**dataclasses.asdict(each), **common) for each in outcome.measures], outcome)


def keep(measured: Measured) -> list[Result]:
    """Say what is to be known about some results, and write them and the guesses into their run; returns the results as
    they were written.
    """
    run, found, outcome = measured.run, measured.results, measured.outcome
    asked = found[0].task
    if outcome is None:
        note(f"{asked}: {run} has its results already")
        return found
    for text in outcome.notes:
        note(text)
    for result in found:
        if doubt := results.verdict(result):
            warn_on_stderr(f"{asked}: {results.metric_title(result.metric)} is {doubt}")
    model = found[0].model
    if run is None:
        note(f"{model} isn't in a run's folder, so the numbers aren't written anywhere: give --out to keep them")
        return found
    found = results.write_results(run, found)  # before the guesses, which may find no room
    first = found[0]
    if first.task != asked:
        note(f"{run} has a task {asked!r} of other images, so this one is {first.task!r}: choose with --name")
    if outcome.guesses is not None:
        names = ("task", "kind", "samples_seen", "weights", "classes", "data", "templates")
        about = {name: getattr(first, name) for name in names}
        results.write_predictions(results.predictions_path(run, first.task), outcome.guesses, about=about)
        if any(each.metric == "top1" for each in found):
            labels, guesses = (outcome.guesses[name].to_pylist() for name in ("label", "guesses"))
            results.write_per_class(results.per_class_path(run, first.task), results.count_classes(labels, guesses))
    return found


def cut_notes(cut: int, noun: str, encoder: Encoder) -> list[str]:
    """The note that so many texts lost words to the context length; none if no text did."""
    if not cut:
        return []
    return [f"{cut:,} {noun} are longer than the {encoder.context_length} text tokens of the model and were cut"]


def unreadable_notes(pictures: ImageSet, so: str, of: str = "") -> list[str]:
    """The note that so many images can't be read, and what becomes of them; none if all can."""
    if not pictures.unreadable:
        return []
    count = counted(len(pictures.unreadable), "image")
    return [f"{count}{of} can't be read{so}, for example: {next(iter(pictures.unreadable.values()))}"]


def run_of(encoder: Encoder) -> Path | None:
    """The run that a checkpoint of clipkit's lies in, or None. OpenCLIP keeps its own in folders of the same name."""
    folder = encoder.path.resolve().parent if encoder.path and encoder.origin == "clipkit" else None
    return folder.parent if folder is not None and folder.name == "checkpoints" else None


def relative(checkpoint: Path, run: Path | None) -> str:
    """The checkpoint as seen from the run, so that a run can be moved; the full path when it lies elsewhere."""
    path = checkpoint.resolve()
    if run is not None and path.is_relative_to(run.resolve()):
        return path.relative_to(run.resolve()).as_posix()
    return str(path)


def note(text: str) -> None:
    """A remark beside the results, on stderr."""
    print(text, file=sys.stderr)
