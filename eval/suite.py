"""Many datasets in one command: the published suites, or one of a person's own in TOML.

Each dataset found is evaluated with its own templates and gives the metric that it is quoted by; the suite's number is
their mean. A dataset that the run has results of already, of the same weights, classes and templates, is not computed
again.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from clipkit.config import did_you_mean, nearest
from clipkit.device import Device, pick
from clipkit.errors import UserError, one_line
from clipkit.eval import results
from clipkit.eval.classification.task import Classification, known_hashes
from clipkit.eval.datasets import PublishedDataset, name_published, published_datasets
from clipkit.eval.evaluation import EvaluationTask, note, run_of, zeroshot
from clipkit.eval.open import KINDS, TaskKind, open_data
from clipkit.eval.results import Result
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
    there = [entry_of(each, folders[each.key]) for each in members if each.key in folders and each.kind in KINDS]
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
        options = {"templates_name" if name == "templates" else name: value for name, value in options.items()}
        options |= {name: Path(options[name]) for name in ("classes", "images", "train_data") if name in options}
        options.setdefault("name", Path(data).name)
        entries.append(Entry(options["name"], root / data, kind, metric, options))
    return entries


def evaluate_suite(
    source: str,
    entries: Sequence[Entry],
    *,
    device: str | Device = "auto",
    out: Path | None = None,
    ema: bool = False,
    **options: Any,
) -> list[Result]:
    """The main number of each dataset, computed or as the run has it. `options` are those of `zeroshot`.

    Raises UserError for data that can't be read, and for a metric that a dataset doesn't have.
    """
    where = pick(device) if isinstance(device, str) else device
    encoder = load(source, ema=ema, vocabulary=options.get("vocabulary"))
    run = out or run_of(encoder)
    found = []
    for entry in entries:
        task = open_data(entry.kind, entry.data, **entry.options)
        done = where.on_first(partial(done_before, task, encoder.weights, run)) if run is not None else []
        if done:
            note(f"{entry.name}: {run} has its results already")
        else:
            done = zeroshot(source, task, device=where, out=out, ema=ema, **options)
        by_metric = {result.metric: result for result in done}
        if entry.metric not in by_metric:
            raise UserError(f"{entry.name} has no metric {entry.metric!r}: {nearest(entry.metric, by_metric)}")
        found.append(by_metric[entry.metric])
    return found


def done_before(task: EvaluationTask, weights: str, run: Path) -> list[Result]:
    """What a run has of a task: of the same weights, name, place of the data, and hashes that need no image."""
    if task.kind in results.PROBES:  # which depend on training images that aren't known before they are read
        return []
    known = known_hashes(task) if isinstance(task, Classification) else {}
    return [
        result
        for result in results.read_results(run)
        if result.weights == weights
        and result.task.removeprefix("ema/") == task.name
        and result.data == printable(str(task.path.absolute()))
        and all(result.hashes.get(name) == value for name, value in known.items())
    ]


def summary(suite: str, found: Sequence[Result], missing: Sequence[str]) -> tuple[float, str]:
    """The mean of the numbers, and a line that says of how many."""
    mean = sum(result.value for result in found) / len(found)
    if not missing:
        return mean, f"{suite}: average of {counted(len(found), 'dataset')}: {percent(mean)}"
    return mean, (
        f"{suite}: average of the {counted(len(found), 'dataset')} that are there: {percent(mean)}; not the suite's "
        f"own average, for {len(missing)} of {len(found) + len(missing)} are missing: {', '.join(missing)}"
    )
