"""Models side by side: which numbers can be compared, and which differences are more than chance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipkit.errors import UserError
from clipkit.eval.comparison.published import Published, Relative, published, robustness
from clipkit.eval.comparison.significance import Difference, paired, unpaired
from clipkit.eval.results import Result, read_results

EXPECTED = "preprocessing"  # each model has its own
WORDS = {
    "classes": "other class names",
    "templates": "other templates",
    "texts": "other captions",
    "split": "other images, or other labels",
    "train": "other training images, or other labels of them",
    "datasets": "other datasets",
    "probe": "another kind of probe, or other draws",
}


@dataclass(frozen=True)
class Entry:
    """One model of a comparison, with the newest result of each of its measurements."""

    label: str
    """As short as tells it from the others."""
    place: str
    """What tells it from another of the same parts."""
    model: str
    """As `--ckpt` named it."""
    run: Path
    """The folder that has the guesses."""
    results: tuple[Result, ...]
    parts: tuple[str, ...] = ()
    """What labels are made of: the last ones of the run's path with the samples seen, or of the model's name."""


@dataclass(frozen=True)
class Pair:
    """One number of two models. `reasons` say why they can't be compared; `difference` is None then."""

    task: str
    metric: str
    first: Entry
    second: Entry
    results: tuple[Result, Result]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    """What differs and may."""
    difference: Difference | None


@dataclass(frozen=True)
class Comparison:
    """All that is known about some models together."""

    entries: tuple[Entry, ...]
    rows: tuple[tuple[str, str, tuple[Result | None, ...]], ...]
    """Task, metric, and the result of each entry."""
    pairs: tuple[Pair, ...]
    """Each further entry against the first."""
    published: tuple[tuple[Entry, Published], ...]
    robustness: tuple[tuple[Entry, Relative], ...]


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare the results of runs, checkpoints of runs, or `results.jsonl` files.

    A run's own checkpoints are one model, of which each task's newest result counts; every other checkpoint that a file
    names is a model for itself. Raises UserError for a path without results, and one that is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        if resolved[place] in resolved[:place]:
            raise UserError(f"{path} is given twice: name each run once")
    found = [entry for path in paths for entry in read_entries(path)]
    entries = distinguish(found)
    measured = [by_measurement(entry, entries[0]) for entry in entries]
    rows, pairs = [], []
    for task, metric in dict.fromkeys(key for each in measured for key in each):
        chosen = choose([each.get((task, metric), []) for each in measured])
        rows.append((task, metric, tuple(chosen)))
        for entry, result in zip(entries[1:], chosen[1:], strict=True):
            if chosen[0] is not None and result is not None:
                pairs.append(pair_of(task, metric, (entries[0], entry), (chosen[0], result)))
    return Comparison(
        tuple(entries),
        tuple(rows),
        tuple(pairs),
        tuple((entry, each) for entry in entries for each in published(entry.model, entry.results)),
        tuple((entry, each) for entry in entries for each in robustness(entry.results)),
    )


def read_entries(path: Path) -> list[Entry]:
    """The models that a run, a checkpoint of a run, or a results file has numbers of."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if not path.exists():
        raise UserError(f"{path} doesn't exist: give runs, or their results.jsonl")
    found = read_results(run)
    if run != path:
        found = [result for result in found if result.checkpoint == f"checkpoints/{path.name}"]
    if not found:
        raise UserError(
            f"{path} has no results: evaluate first, with clipkit zeroshot --ckpt MODEL --data DATA --out RUN"
        )
    folder = run.parent if run.is_file() else run
    models: dict[str, list[Result]] = {}
    for result in found:
        own = result.checkpoint.startswith("checkpoints/")
        models.setdefault("" if own else result.checkpoint, []).append(result)
    entries = []
    for name, of_model in models.items():
        last = {(each.task, each.metric): 0 for each in of_model}
        for each in of_model:
            last[each.task, each.metric] = max(last[each.task, each.metric], each.samples_seen)
        newest = tuple(each for each in of_model if each.samples_seen == last[each.task, each.metric])
        place = f"{path}: {name}" if name else str(path)
        full = Path(name) if name else folder.resolve() if run == path else path.resolve()
        # Of a checkpoint the run is named, too: all runs have checkpoints of some samples.
        is_checkpoint = full.parent.name == "checkpoints"
        parts = (*full.parts[:-2], full.name) if is_checkpoint else full.parts
        label = "/".join(parts[-2:] if is_checkpoint else parts[-1:])
        entries.append(Entry(label, place, newest[-1].model or name, folder, newest, parts))
    return entries


def distinguish(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, those of one label with as many more parts of their paths as tell them apart, all equally many."""
    found = list(entries)
    for label in {entry.label for entry in entries}:
        same = [number for number, entry in enumerate(entries) if entry.label == label]
        ways = ([entries[number].parts[-length:] for number in same] for length in range(1, 100))
        apart = next((way for way in ways if len(set(way)) == len(same)), None) if len(same) > 1 else None
        for place, number in enumerate(same):
            if len(same) > 1:
                name = "/".join(apart[place]) if apart else entries[number].place
                found[number] = replace(entries[number], label=name)
    return found


def by_measurement(entry: Entry, first: Entry) -> dict[tuple[str, str], list[Result]]:
    """An entry's results by task and metric, of which there are several where templates or images were others.

    A task that the first entry calls otherwise has its name there: it is known by its images.
    """
    found: dict[tuple[str, str], list[Result]] = {}
    for result in entry.results:
        found.setdefault((task_in(first, entry, result), result.metric), []).append(result)
    return found


def task_in(first: Entry, entry: Entry, result: Result) -> str:
    """What the first entry calls the task of an entry's result: the same where it has a task of that name, else what it
    calls one of that kind on the same images. What was measured on averages of weights goes with what was so there.
    """

    def on_same_images(other: Entry) -> list[str]:
        known = (each for each in other.results if each.kind == result.kind and each.hashes.get("split"))
        return [each.task for each in known if each.hashes["split"] == result.hashes.get("split")]

    if result.task in {each.task for each in first.results}:
        return result.task
    own = {each.task for each in entry.results}
    theirs = [task for task in on_same_images(first) if task not in own]
    alike = [task for task in theirs if is_of_averages(task) == is_of_averages(result.task)]
    if not alike and len(set(map(is_of_averages, on_same_images(entry)))) == 1:
        alike = theirs
    return alike[0] if alike else result.task


def is_of_averages(task: str) -> bool:
    """Whether a task's results are of averages of the weights (`zeroshot --ema`)."""
    return task.startswith("ema/")


def choose(candidates: Sequence[Sequence[Result]]) -> list[Result | None]:
    """One result an entry: of the first the one that most can be compared with, of the others what fits it; the newest
    among equals.
    """

    def cost(one: Result, other: Result) -> int:
        return len(differing(one, other)[0])

    def cost_to_all(one: Result) -> int:
        return sum(min(cost(one, each) for each in other) for other in candidates[1:] if other)

    if not candidates[0]:
        return [each[-1] if each else None for each in candidates]
    first = min(reversed(candidates[0]), key=cost_to_all)
    rest = [min(reversed(each), key=lambda one: cost(first, one)) if each else None for each in candidates[1:]]
    return [first, *rest]


def differing(first: Result, second: Result) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Why two results can't be compared, and what else differs, in words."""
    reasons, notes = [], []
    for name in dict.fromkeys([*first.hashes, *second.hashes]):
        one, other = first.hashes.get(name), second.hashes.get(name)
        if one is None or other is None:
            reasons.append(f"{name} unknown, for one result has no hash of it")
        elif one != other and name == EXPECTED:
            notes.append("other preprocessing, which is expected between models")
        elif one != other:
            reasons.append(WORDS.get(name, f"other {name}") + detail(name, first, second))
    if first.precision != second.precision:
        notes.append(
            f"computed in {first.precision or 'an unknown precision'} and {second.precision or 'an unknown one'}"
        )
    if not first.hashes and not second.hashes:
        reasons.append("neither result has hashes")
    if first.weights and first.weights == second.weights:
        notes.append("the same weights")
    elif first.weights and second.weights:
        notes.append("other weights")
    return tuple(reasons), tuple(notes)


def detail(name: str, first: Result, second: Result) -> str:
    """The two values behind a hash that differs, where a result has them and they tell the two apart."""
    values = {
        "classes": (f"{first.classes:,}", f"{second.classes:,}"),
        "templates": (first.templates, second.templates),
        "split": (f"{first.n:,} images", f"{second.n:,} images"),
    }.get(name, ("", ""))
    return f" ({values[0]} and {values[1]})" if all(values) and values[0] != values[1] else ""


def pair_of(task: str, metric: str, entries: tuple[Entry, Entry], chosen: tuple[Result, Result]) -> Pair:
    """Compare one number of two models, by their guesses where both have them."""
    reasons, notes = differing(*chosen)
    difference = None
    if not reasons:
        first, second = chosen
        difference = paired((entries[0].run, entries[1].run), chosen) or unpaired(
            (first.value, first.low, first.high), (second.value, second.low, second.high)
        )
    return Pair(task, metric, *entries, chosen, reasons, notes, difference)
