"""What a run's folder and its dataset tell, as plain values for the page.

Everything here copes with what isn't there yet: a run without metrics, results or its dataset still has a report.
"""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit import checkpoint, log
from clipkit.errors import UserError, one_line
from clipkit.eval.results import METRICS
from clipkit.formats.dataset import open_dataset
from clipkit.formats.features import find_caption
from clipkit.formats.manifest import read_manifest
from clipkit.model.config import ModelConfig
from clipkit.model.flops import sample_cost, weight_count
from clipkit.storage.files import as_path, is_remote, read_json
from clipkit.storage.stores import store_message
from clipkit.text.tokenizer import Tokenizer, clean

SAMPLE, REMOTE_SAMPLE = 20_000, 500
SIZES = 2_000
SEED = 0


@dataclass(frozen=True)
class StageCost:
    """What one stage asks of each sample, and what it has cost so far. `flops` are for one sample, forward and back."""

    name: str
    start: int
    """The samples seen at its beginning, or where the run began in it."""
    samples: int
    done: int
    seconds: float
    image_size: int
    context_length: int
    image_tokens: int
    text_tokens: int
    batch_size: int
    flops: float

    @property
    def total_flops(self) -> float:
        """What all of its samples so far have cost."""
        return self.flops * self.done


@dataclass(frozen=True)
class DataFacts:
    """The dataset's own numbers. Lengths, sizes and repeats are of `read` captions taken at random."""

    path: str
    name: str
    records: int
    bytes: int
    read: int
    lengths: list[int]
    """Tokens of each caption, start and end included."""
    repeated: int
    empty: int
    sides: list[int]
    """Shorter sides of the stored images in pixels."""
    formats: dict[str, int]
    skipped: dict[str, int]
    downloads: dict[str, int]
    """URLs by how they ended, when the shards' own account is in reach; `downloaded` are the good ones."""


@dataclass(frozen=True)
class TrainingData:
    """One of the places that a run's data came from, with what can be read there now."""

    path: str
    name: str
    records: int
    kind: str
    """`tars`, `parquet` or `folder` for what was read as it was; "" for a dataset."""
    share: float
    """Of the samples; 1 where the run had one place only."""
    facts: DataFacts | None
    missing: str
    """Why there are no facts."""


def read_config(run: Path) -> dict[str, Any]:
    """The run's own description; {} when training hasn't begun."""
    path = run / "config.json"
    config = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise UserError(f"{path} isn't a run's description: give a folder that clipkit train wrote")
    return config


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Metrics in order of samples seen; lines of the same moment (training, evaluation) are put together."""
    merged: dict[int, dict[str, Any]] = {}
    for line in log.read_metrics(run):
        merged.setdefault(line["samples_seen"], {}).update(line)
    return [merged[seen] for seen in sorted(merged)]


def series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Samples seen and values of one metric where it was logged as a number."""
    points = [(line["samples_seen"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    return [x for x, _ in finite], [y for _, y in finite]


def evaluations(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The tasks that were evaluated during training, with the names of their metrics."""
    found: dict[str, list[str]] = {}
    for line in metrics:
        for name in line:
            task, slash, metric = name.rpartition("/")
            if slash and metric in METRICS and name not in found.setdefault(task, []):
                found[task].append(name)
    return found


def beginning(config: Mapping[str, Any]) -> tuple[int, float]:
    """The samples seen and the seconds trained where a run began: at 0, at a later stage, or where it branched off."""
    start = config.get("start") or {}  # absent in older runs
    return int(start.get("samples_seen", 0)), float(start.get("seconds", 0.0))


def stage_costs(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[StageCost]:
    """The recipe's stages with what they have cost this run so far; [] when it has no recipe."""
    recipe, (begun, before) = config.get("recipe") or {}, beginning(config)
    seen = int(metrics[-1]["samples_seen"]) if metrics else 0
    costs: list[StageCost] = []
    start = 0
    for stage in recipe.get("stages") or []:
        stop = start + int(stage["samples"])
        image_tokens, text_tokens, flops = sample_cost(config_at(recipe["model"], stage), stage.get("image_keep"))
        first, last = min(max(start, begun), stop), min(stop, seen)
        seconds = clock(metrics, last, before) - clock(metrics, min(first, seen), before)
        costs.append(
            StageCost(
                name=str(stage["name"]),
                start=first,
                samples=int(stage["samples"]),
                done=max(0, last - first),
                seconds=max(0.0, seconds),
                image_size=int(stage["image_size"]),
                context_length=int(stage["context_length"]),
                image_tokens=image_tokens,
                text_tokens=text_tokens,
                batch_size=int(stage["batch_size"]),
                flops=flops,
            )
        )
        start = stop
    return costs


def clock(metrics: Sequence[Mapping[str, Any]], samples: int, before: float = 0.0) -> float:
    """Seconds of training when `samples` were seen, from the last line logged by then; `before` where there is none."""
    times = [float(line["seconds"]) for line in metrics if line["samples_seen"] <= samples and "seconds" in line]
    return times[-1] if times else before


def parameters(config: Mapping[str, Any]) -> int:
    """The number of trained weights in the run's last stage, 0 when the run has no recipe."""
    recipe = config.get("recipe") or {}
    stages = recipe.get("stages") or []
    return weight_count(config_at(recipe["model"], stages[-1])) if stages else 0


def config_at(model: Mapping[str, Any], stage: Mapping[str, Any]) -> ModelConfig:
    """The model at the sizes of a run's stage."""
    config = ModelConfig.from_dict(model)
    image = replace(config.image, image_size=int(stage["image_size"]))
    text = replace(config.text, context_length=int(stage["context_length"]))
    return replace(config, image=image, text=text)


def training_data(config: Mapping[str, Any], run: Path) -> list[TrainingData]:
    """The places that the run's data came from; [] when the run doesn't say. Where one can't be read, it says why."""
    places, dataset = config.get("data") or [], config.get("dataset") or {}
    places = [places] if isinstance(places, str) else places
    parts = dataset.get("mixture") or [dataset] * len(places)
    found = []
    for place, part in zip(places, parts, strict=False):
        facts, missing, kind = None, "", str(part.get("kind", ""))
        try:
            facts = None if kind else data_facts(as_path(place), part.get("split", "train"), run)
        except Exception as error:  # a disk, a store, a dataset that was changed: the rest of the page stands
            missing = store_message(error, place) or one_line(error)
        weight = float(Fraction(part.get("weight", "1")))
        name, records = str(part.get("name", Path(place).name)), int(part.get("records", 0))
        found.append(TrainingData(place, name, records, kind, weight, facts, missing))
    return found


def data_facts(path: Path, split: str, run: Path) -> DataFacts:
    """Read the dataset's metadata and a random sample of its records; captions are as long as the run's tokenizer makes
    them. Raises UserError when the dataset isn't in reach."""
    newest = checkpoint.latest(run)
    tokenizer = checkpoint.tokenizer_of(newest) if newest else Tokenizer()
    dataset = open_dataset(path, split=split)
    total = dataset.num_records
    chosen = sample_places(total, REMOTE_SAMPLE if is_remote(path) else SAMPLE)
    column = find_caption(dataset.features)
    captions: list[str] = []
    sides: list[int] = []
    for number, index in enumerate(chosen):
        example = dataset.example(index)
        if column:
            value = example[column]
            captions.append(value if isinstance(value, str) else str(value[0]) if value else "")
        side = shorter_side(example, number < SIZES)
        if side is not None:
            sides.append(side)
    manifest = read_manifest(dataset.path).get(split)
    sources = manifest.source_files if manifest else []
    cleaned = [clean(caption) for caption in captions]
    counts = Counter(caption for caption in cleaned if caption)
    return DataFacts(
        path=str(dataset.path),
        name=dataset.name,
        records=total,
        bytes=sum(shard.bytes for shard in dataset.shards),
        read=len(chosen),
        lengths=[len(ids) + tokenizer.specials for ids in tokenizer.encode(captions)],
        repeated=sum(count for count in counts.values() if count > 1),
        empty=sum(not caption for caption in cleaned),
        sides=sides,
        formats=manifest.formats if manifest else {},
        skipped=manifest.skipped if manifest else {},
        downloads=downloads(dataset.path, sources),
    )


def sample_places(total: int, most: int = SAMPLE) -> list[int]:
    """Up to `most` of the places 0..total-1 in order, drawn at random; memory doesn't grow with `total`."""
    rng = np.random.default_rng(SEED)
    chosen: list[int] = np.sort(rng.choice(total, min(most, total), replace=False, shuffle=False)).tolist()
    return chosen


def shorter_side(example: Mapping[str, Any], read_header: bool) -> int | None:
    """The shorter side of a record's image: from its columns, or else with `read_header` from the file's header."""
    width, height = example.get("width"), example.get("height")
    if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0:
        return min(width, height)
    data = example.get("jpg") or example.get("image")
    if not read_header or not isinstance(data, bytes):
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return min(image.size)
    except (OSError, ValueError):
        return None


def downloads(dataset: Path, sources: Sequence[tuple[str, int]]) -> dict[str, int]:
    """URLs by how they ended, `downloaded` first, from the account that clipkit download leaves with its shards.

    The shards are looked for near the dataset: a folder is theirs when it holds the files that the dataset was made of,
    by name and size. {} when there is none, or the shards came from elsewhere.
    """
    for parent in list(dataset.resolve().parents)[:4]:
        for account in sorted([*parent.glob("clipkit/download.json"), *parent.glob("*/clipkit/download.json")]):
            folder = account.parent.parent
            files = [(folder / name, size) for name, size in sources]
            if files and all(file.is_file() and file.stat().st_size == size for file, size in files):
                summary = read_json(account)
                return {"downloaded": int(summary["downloaded"]), **{k: int(n) for k, n in summary["failed"].items()}}
    return {}


def pipeline(run: Path) -> list[dict[str, Any]]:
    """What each command of `clipkit demo` took: name, command, seconds, peak_memory_bytes; [] for other runs."""
    path = run / "demo.json"
    demo = read_json(path) if path.exists() else {}
    return [stage for stage in demo.get("stages", []) if {"name", "seconds", "peak_memory_bytes"} <= stage.keys()]


def waiting(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of a run's training time that was spent waiting for data."""
    total, waited, (_, before) = 0.0, 0.0, beginning(config)
    for line in metrics:
        if "seconds" in line and "data_wait" in line:
            total += line["seconds"] - before
            waited += (line["seconds"] - before) * line["data_wait"]
            before = line["seconds"]
    return waited / total if total > 0 else None
