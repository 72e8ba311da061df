"""What an evaluation leaves in a run: its numbers, every guess, and the guesses counted by class.

A number is a JSON line that says what it was made from, so that two can be seen to be comparable, or not. The guesses
show which image was taken for what, and how sure the model was; a seeded random sample of them carries a small picture.
"""

import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.errors import UserError
from clipkit.eval.metrics import Measure
from clipkit.formatting import count, counted, percent
from clipkit.intervals import wilson
from clipkit.storage.files import disk_errors, read_json_lines, write_beside, write_json_lines

if TYPE_CHECKING:
    import pyarrow as pa

CHOICES = ("accuracy", "text_score", "image_score", "group_score")
METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class_recall": "mean per-class recall",
    "calibration_error": "calibration error",
    "mean_average_precision": "mean average precision",
    "real_top1": "top-1 by the ReaL labels",
    "worst_group_top1": "top-1 of the worst group",
    "worst_group_top5": "top-5 of the worst group",
    "macro_f1": "macro F1",
    "average": "average",
    "aupr": "AUPR of what is out of distribution",
    **{f"text_retrieval_recall@{k}": f"image to text, recall@{k}" for k in (1, 5, 10)},
    "text_retrieval_median_rank": "image to text, median rank",
    **{f"image_retrieval_recall@{k}": f"text to image, recall@{k}" for k in (1, 5, 10)},
    "image_retrieval_median_rank": "text to image, median rank",
    "mean_recall@1": "recall@1, mean of both",
    "jaccard": "Jaccard index",
    "jaccard_5_6": "Jaccard index, 5 or 6 candidates",
    "jaccard_10_12": "Jaccard index, 10 or 12 candidates",
    **{name: name.replace("_", " ") for name in CHOICES},
    **{f"mean_per_category_{name}": f"{name.replace('_', ' ')}, mean of categories" for name in CHOICES},
}
PROBES = frozenset(("linear-probe", "few-shot", "knn"))  # kinds of tasks that learn from training images
RANKS = frozenset(("text_retrieval_median_rank", "image_retrieval_median_rank"))  # no shares, and less is better


@dataclass(frozen=True)
class Result(Measure):
    """One line of `results.jsonl`."""

    classes: int
    task: str
    data: str
    samples_seen: int
    checkpoint: str
    hashes: dict[str, str] = field(default_factory=dict)
    """Of the class names, templates, split (image ids, labels and the images themselves) and preprocessing."""
    templates: str = ""
    """The name the templates were asked for by."""
    unreadable: int = 0
    """Images that can't be decoded; they aren't counted in `n`."""
    largest_class: float = 0.0
    """The share of the commonest class: the top-1 of a model that always guesses it."""
    kind: str = "classification"
    """Of the task."""
    weights: str = ""
    """A hash of the model's weights."""
    model: str = ""
    """The model's name as it was asked for."""
    notes: tuple[str, ...] = ()
    """What belongs with the number: prompts that were cut, images that can't be read."""
    precision: str = ""
    """The towers' arithmetic."""
    computation: str = ""
    """A hash of what the weights ran with: the architecture with its activation, and the tokenizer."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes two lines the same measurement: a repeated one replaces the older."""
        # Of a suite there is one average, however many of its datasets there were.
        hashes = () if self.kind == "suite" else tuple(sorted(self.hashes.items()))
        return self.metric, self.task, self.checkpoint, hashes


def digest(value: Any) -> str:
    """A short hash (16 hex digits of SHA-256) of anything JSON can hold."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def read_results(run: Path) -> list[Result]:
    """The results of a run, or of a file of them, in the order written; [] when there are none yet. Lines of other
    programs are left out.
    """
    known = [field.name for field in dataclasses.fields(Result)]
    needed = set(known[: known.index("hashes")])
    return [
        Result(
            **{name: value for name, value in line.items() if name in known} | {"notes": tuple(line.get("notes", ()))}
        )
        for line in read_json_lines(run if run.is_file() else run / "results.jsonl")
        if isinstance(line, dict) and needed <= line.keys()
    ]


def write_results(run: Path, results: Iterable[Result]) -> list[Result]:
    """Add results to `results.jsonl`, whole at all times; a repeated measurement replaces its older line.

    A task whose name other images have in this run gets the name of the folder in front that tells the two apart.
    Returns the results as they were written. Several processes may write into one run: each waits for its turn.
    """
    with results_lock(run):
        there = read_results(run)
        named = [dataclasses.replace(result, task=distinct_name(result, there)) for result in results]
        lines = {result.identity: result for result in [*there, *named]}
        write_json_lines(run / "results.jsonl", map(dataclasses.asdict, lines.values()))
    return named


def distinct_name(result: Result, there: Sequence[Result]) -> str:
    """The task's name, with a folder of its data in front for each other set of the run that has the same name."""
    mine, split = Path(result.data).absolute(), result.hashes.get("split")
    others: dict[str, Path] = {}
    earlier = ""
    for each in {file_name(each.task): each for each in there}.values():
        path = Path(each.data).absolute()
        # The same path may hold other images today, and a copy elsewhere holds the same ones: both keep the name.
        # Older results have the folder without its split.
        if path != mine and each.hashes.get("split") != split and not (mine.is_relative_to(path) and path.is_dir()):
            others[file_name(each.task)] = path
        elif each.task.endswith(f"-{result.task}"):
            earlier = each.task
    name = result.task
    if earlier and file_name(name) in others:
        return earlier
    while other := others.pop(file_name(name), None):
        parts = zip(reversed(mine.parts), reversed(other.parts), strict=False)
        differing = next((part for part, theirs in parts if part != theirs), split or "other")
        name = f"{differing.removesuffix('.parquet')}-{name}"
    return name


def file_name(task: str) -> str:
    """A task's name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", task).strip("-.") or "task"


def predictions_path(run: Path, task: str) -> Path:
    """Where a task's guesses are."""
    return run / f"predictions-{file_name(task)}.parquet"


@contextlib.contextmanager
def results_lock(run: Path) -> Iterator[None]:
    """Wait until no other process writes the run's results; the kernel lets go when we die."""
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".results.lock").open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def verdict(result: Result) -> str:
    """What the number is worth, in words: "" when it is clearly better than guessing."""
    if result.metric == "calibration_error":  # the lower, the better, and guessing has none
        return ""
    if result.low <= result.chance <= result.high:
        return "not distinguishable from chance"
    if result.low > result.chance if result.metric in RANKS else result.high < result.chance:
        are_labels = result.kind in PROBES | {"classification", "suite"}
        wrong = "the labels and the class names" if are_labels else "which captions are of which image"
        return f"worse than chance: check {wrong}"
    # Mean per-class recall gains nothing by guessing the commonest class, and top-5 is not comparable with its share.
    if result.metric == "top1" and result.low <= result.largest_class:
        return f"no better than always guessing the commonest class ({percent(result.largest_class)})"
    return ""


def metric_title(metric: str) -> str:
    """What a metric is called, a category behind a colon with it."""
    name, _, category = metric.partition(":")
    return METRICS.get(name, name) + (f", {category}" if category else "")


def shown(metric: str, value: float) -> str:
    """A value of a metric as people read it."""
    return count(value) if metric in RANKS else percent(value)


def chance_shown(result: Result) -> str:
    """What guessing gives, as people read it; "" where guessing has no such number."""
    return "" if result.metric == "calibration_error" else shown(result.metric, result.chance)


def counted_on(results: Sequence[Result]) -> str:
    """What the results of one task were counted on."""
    one = results[0]
    match one.kind:
        case "retrieval":
            n = {result.metric.partition("_")[0]: result.n for result in results}
            return f"{counted(n['text'], 'image')}, {counted(n['image'], 'caption')}"
        case "choice":
            return counted(one.n, "question")
        case "suite":
            return counted(one.n, "dataset")
        case "linear-probe" | "few-shot" | "knn":
            return f"{one.n:,} images, {one.classes:,} classes"
    return f"{one.n:,} images, {one.classes:,} classes, templates {one.templates}"


def result_cells(result: Result, dash: str = "–") -> list[str]:
    """A result as people read it: metric, value, interval, chance, and what the number is worth."""
    value, low, high = (shown(result.metric, each) for each in (result.value, result.low, result.high))
    return [metric_title(result.metric), value, f"{low} {dash} {high}", chance_shown(result), verdict(result)]


def write_predictions(path: Path, guesses: "pa.Table", about: Mapping[str, Any]) -> None:
    """Write the guesses as parquet, with `about` in the file's metadata."""
    import pyarrow.parquet as pq

    with write_beside(path) as temporary:
        table = guesses.replace_schema_metadata({"clipkit": json.dumps(dict(about))})
        pq.write_table(table, temporary, compression="zstd")


def read_predictions(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a predictions file and what it is about. Raises UserError when it is damaged."""
    guesses, about = read_guesses(path)
    return guesses.to_pylist(), about


def read_guesses(path: Path, columns: Sequence[str] | None = None) -> tuple["pa.Table", dict[str, Any]]:
    """A predictions file as a table, of those `columns` that it has, and what it is about. Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            table = file.read(columns=[name for name in columns if name in there] if columns else None)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged: remove it and run zeroshot again") from error
    return table, json.loads((table.schema.metadata or {}).get(b"clipkit", b"{}"))


# ---- By class --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassCount:
    """The images of a class, how many of them were right, and the wrong guess that was made most often."""

    name: str
    n: int
    right: int
    low: float
    high: float
    """The ends of the 95% interval of the recall (Wilson)."""
    taken_for: str
    times: int

    @property
    def recall(self) -> float:
        """The share that was right."""
        return self.right / self.n


def count_classes(labels: Iterable[str], guesses: Iterable[Sequence[str]]) -> list[ClassCount]:
    """The classes from the worst recall to the best, equal ones by name. `guesses` are those of each image, best first;
    an image without, which couldn't be read, isn't counted.
    """
    guessed: dict[str, Counter[str]] = defaultdict(Counter)
    for label, best in zip(labels, guesses, strict=True):
        if best:
            guessed[label][best[0]] += 1
    found = []
    for name, times in guessed.items():
        n, right = times.total(), times[name]
        wrong = min(((-count, guess) for guess, count in times.items() if guess != name), default=(0, ""))
        found.append(ClassCount(name, n, right, *wilson(right / n, n), wrong[1], -wrong[0]))
    return sorted(found, key=lambda each: (each.recall, each.name))


def per_class_path(run: Path, task: str) -> Path:
    """Where a task's table of classes is."""
    return run / f"per-class-{file_name(task)}.csv"


def write_per_class(path: Path, classes: Iterable[ClassCount]) -> None:
    """Write a row for each class as CSV."""
    with write_beside(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("class", "images", "right", "recall", "low", "high", "taken_for", "times"))
        for each in classes:
            shares = (f"{share:.6f}" for share in (each.recall, each.low, each.high))
            writer.writerow([each.name, each.n, each.right, *shares, each.taken_for, each.times])
