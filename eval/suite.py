"""Many datasets in one command: the published suites, or one of a person's own in TOML.

Each dataset found is evaluated with its own templates and gives the metric that it is quoted by; the suite's number is
their mean. A dataset that the run has results of already, of the same model, precision and hashes, is not computed
again; its images are read for that, but neither decoded nor embedded.
"""

import inspect
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from clipkit.config import did_you_mean, nearest
from clipkit.device import Device, Precision, pick
from clipkit.embedding.encoder import Encoder
from clipkit.errors import UserError, one_line
from clipkit.eval import results
from clipkit.eval.datasets import PublishedDataset, name_published, published_datasets
from clipkit.eval.evaluation import EvaluationTask, Measured, keep, measure, note, run_of
from clipkit.eval.open import KINDS, NAMES, TaskKind, open_data, opener_of
from clipkit.eval.results import METRICS, RANKS, Result, digest
from clipkit.formats.folders import printable
from clipkit.formatting import counted, percent
from clipkit.interop.load import load
from clipkit.storage.files import read_text

SUITES = ("imagenet", "vtab", "datacomp-38", "retrieval")
_MAIN_METRICS: dict[TaskKind, str] = {
    "classification": "top1",
    "retrieval": "mean_recall@1",
    "choice": "accuracy",
    "linear-probe": "top1",
    "few-shot": "top1:5-shot",
    "knn": "top1",
}


@dataclass(frozen=True)
class Entry:
    """One dataset of a suite: what it is called, where it is, how it is evaluated, and the metric that counts."""

    name: str
    data: Path
    kind: TaskKind
    metric: str
    options: Mapping[str, Any]


def entries_of(suite: str, root: Path) -> tuple[list[Entry], list[str]]:
    """The datasets of a suite that are there, and the names of those that aren't.

    Raises UserError for an unknown suite, an invalid file, two folders of one dataset, and where none is there.
    """
    if Path(suite).suffix == ".toml":
        return entries_of_file(Path(suite), root), []
    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}: {did_you_mean(suite, SUITES)}, or give a FILE.toml")
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder: give the one that holds a folder for each dataset")
    folders: dict[str, Path] = {}
    for folder in sorted(each for each in root.iterdir() if each.is_dir()):
        found = name_published(folder.name)
        if found is not None and found.key in folders:
            raise UserError(f"{folders[found.key]} and {folder} are both {found.title}: remove or rename one")
        if found is not None:
            folders[found.key] = folder
    members = [each for each in published_datasets().values() if belongs(each, suite)]
    there = [entry_of(each, folders[each.key]) for each in members if each.key in folders]
    if not there:
        such = ", ".join(each.folder for each in members[:3])
        raise UserError(f"{root} holds no dataset of the suite {suite}: name its folders {such}, … or wds_{such[:8]}…")
    named = {entry.name for entry in there}
    return there, [each.title for each in members if each.folder not in named]


def belongs(dataset: PublishedDataset, suite: str) -> bool:
    """Whether a dataset is part of a suite."""
    match suite:
        case "imagenet":
            return dataset.group in ("ImageNet", "ImageNet dist. shifts")
        case "vtab":
            return dataset.group == "VTAB"
        case "retrieval":
            return dataset.kind == "retrieval"
    return True


def entry_of(dataset: PublishedDataset, folder: Path) -> Entry:
    """A published dataset in a folder."""
    kind = cast(TaskKind, dataset.kind)
    options = {"name": dataset.folder, **({"published": dataset} if kind == "classification" else {})}
    return Entry(dataset.folder, folder, kind, dataset.main_metric, options)


def entries_of_file(path: Path, root: Path) -> list[Entry]:
    """The datasets of a TOML file: `[[dataset]]` with `data` (below `root`), `task`, `metric`, and zeroshot's options
    for the data by their names.
    """
    try:
        tables = tomllib.loads(read_text(path, "suite")).get("dataset")
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} isn't valid TOML ({one_line(error)}): mend it") from error
    if not isinstance(tables, list) or not tables or not all(isinstance(each, dict) for each in tables):
        raise UserError(f'{path} lists no dataset: write [[dataset]] and data = "FOLDER" for each')
    entries: list[Entry] = []
    for number, table in enumerate(tables, 1):
        options = dict(table)
        data, kind = options.pop("data", None), options.pop("task", "classification")
        if not isinstance(data, str) or kind not in KINDS:
            raise UserError(f'{path}, dataset {number}: it needs data = "FOLDER", and as its task {" or ".join(KINDS)}')
        metric = options.pop("metric", _MAIN_METRICS[kind])
        if not isinstance(metric, str) or metric.partition(":")[0] not in METRICS:
            raise UserError(f"{path}, dataset {number}: unknown metric {metric!r}: {nearest(str(metric), METRICS)}")
        if metric in RANKS:
            raise UserError(
                f"{path}, dataset {number}: {metric} is a rank, which has no average with shares: take a recall"
            )
        options = {"templates_name" if name == "templates" else name: value for name, value in options.items()}
        heeded = inspect.signature(opener_of(kind)).parameters.keys() - {"published"}
        if wrong := min(options.keys() - heeded, default=None):
            names = ["data", "task", "metric", *(NAMES.get(name, name) for name in heeded)]
            raise UserError(
                f"{path}, dataset {number}: a {kind} task has no use for {NAMES.get(wrong, wrong)!r}: "
                f"{nearest(wrong, names)}"
            )
        options |= {name: Path(options[name]) for name in ("classes", "images", "train_data") if name in options}
        options.setdefault("name", Path(data).name)
        entries.append(Entry(options["name"], root / data, kind, metric, options))
    return entries


def evaluate_suite(
    source: str,
    suite: str,
    root: Path,
    *,
    device: str | Device = "auto",
    out: Path | None = None,
    ema: bool = False,
    precision: Precision = "float32",
    **options: Any,
) -> Iterator[Result]:
    """The main number of each dataset of a suite below `root`, computed or as the run has it, and then their average,
    which goes into the run too. `options` are those of `evaluation.measure`.

    Raises UserError as `entries_of` does, for unreadable data, and for a metric that the dataset's task doesn't give.
    """
    entries, missing = entries_of(suite, root)
    where = pick(device) if isinstance(device, str) else device
    encoder = load(source, ema=ema, vocabulary=options.get("vocabulary"))
    found = []
    for entry in entries:
        measured = measure_entry(source, entry, encoder, where, out=out, ema=ema, precision=precision, **options)
        found.append(main_number(entry, where.on_first(partial(keep, measured))))
        yield found[-1]
    run = out or run_of(encoder)
    yield where.on_first(partial(write_average, run, suite, root, found, missing))


def measure_entry(
    source: str,
    entry: Entry,
    encoder: Encoder,
    where: Device,
    *,
    out: Path | None = None,
    precision: Precision = "float32",
    **options: Any,
) -> Measured:
    """What a dataset says about a model, of which `encoder` is loaded already; computed or as the run has it."""
    task, run = open_data(entry.kind, entry.data, **entry.options), out or run_of(encoder)
    arithmetic = where.arithmetic(precision)
    # Only the first rank looks, since the others may see what it writes.
    done = where.on_first(partial(done_before, task, encoder, arithmetic, run))
    if done:
        return Measured(run, done, None)
    return measure(source, task, where, encoder=encoder, out=out, precision=precision, **options)


def main_number(entry: Entry, found: Sequence[Result]) -> Result:
    """The number by which a dataset is quoted. Raises UserError where there is none."""
    by_metric = {result.metric: result for result in found}
    if entry.metric not in by_metric:
        raise UserError(f"{entry.name} has no metric {entry.metric!r}: {nearest(entry.metric, by_metric)}")
    return by_metric[entry.metric]


def done_before(task: EvaluationTask, encoder: Encoder, arithmetic: str, run: Path | None) -> list[Result]:
    """What a run has of a task: of the same weights in the same architecture, with the same tokenizer and arithmetic,
    of the same name, place of the data, and hashes.
    """
    model = encoder.weights, encoder.computation, arithmetic
    candidates = [
        result
        for result in (results.read_results(run) if run is not None else ())
        if (result.weights, result.computation, result.precision) == model
        and result.task.removeprefix("ema/") == task.name
        and result.data == printable(str(task.path.absolute()))
    ]
    hashes = task.hashes(encoder.preprocess) if candidates else {}
    return [result for result in candidates if result.hashes == hashes]


def write_average(run: Path | None, suite: str, root: Path, found: Sequence[Result], missing: Sequence[str]) -> Result:
    """The average of a suite, said and written into the run."""
    mean = average(Path(suite).stem, root, found, missing)
    note(mean.notes[0])
    if run is not None:
        results.write_results(run, [mean])
    return mean


def average(suite: str, root: Path, found: Sequence[Result], missing: Sequence[str]) -> Result:
    """The mean of some datasets' numbers as a result, whose note says of how many. Its interval is for other images of
    each dataset: the distances to its ends are added as independent ones are.
    """
    values, count = [result.value for result in found], len(found)
    mean = sum(values) / count
    below, above = (
        math.hypot(*(getattr(result, end) - result.value for result in found)) / count for end in ("low", "high")
    )
    said = f"{suite}: average of {counted(count, 'dataset')}: {percent(mean)}"
    if missing:
        said = (
            f"{suite}: average of the {count} of {counted(count + len(missing), 'dataset')} that are there: "
            f"{percent(mean)}; not the suite's own average, for there are missing: {', '.join(missing)}"
        )
    members = [(each.task, each.metric, {**each.hashes, "preprocessing": ""}) for each in found]
    return replace(
        found[0],
        metric="average",
        value=mean,
        low=max(0.0, mean - below),
        high=min(1.0, mean + above),
        n=count,
        chance=sum(result.chance for result in found) / count,
        classes=0,
        task=f"ema/{suite}" if found[0].task.startswith("ema/") else suite,
        data=printable(str(root.absolute())),
        hashes={"datasets": digest(members), "preprocessing": found[0].hashes.get("preprocessing", "")},
        templates="",
        unreadable=sum(result.unreadable for result in found),
        largest_class=0.0,
        kind="suite",
        notes=(said,),
    )
