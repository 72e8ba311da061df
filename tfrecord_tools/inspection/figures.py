"""What is in a dataset, in numbers: `clipkit inspect`.

Counts of records and bytes are of the whole, from the metadata. All else is of a sample, drawn with a fixed seed over
all shards, so that a look at 400 million pairs takes no longer than at ten thousand, and no more memory. Repeats are
therefore of the sample: a caption that half a million records share is found in any, one of two records hardly ever.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.formats.captions import ORIGINAL, captions_of, source_columns
from clipkit.formats.dataset import Dataset, DatasetLayout, open_dataset, read_layout
from clipkit.formats.features import Feature, find_caption, find_image
from clipkit.formats.manifest import CLIPKIT_FOLDER, read_manifest
from clipkit.formats.records import RecordError
from clipkit.log import Progress
from clipkit.storage.files import as_path, local_copy
from clipkit.tfrecord_tools.inspection.captions import CaptionFacts, SourceFacts, caption_facts, source_facts
from clipkit.tfrecord_tools.inspection.histogram import Histogram, histogram_of
from clipkit.tfrecord_tools.inspection.pictures import PictureFacts, Pictures

SEED = 0
SAMPLE = 10_000
MOST_VALUES = 12


@dataclass(frozen=True)
class Column:
    """One column: its type as features.json has it, and the share of the sample's records without a value."""

    name: str
    type: str
    missing: float


@dataclass(frozen=True)
class Inspection:
    """The numbers of one split. `records`, `bytes` and `shards` are of all, the rest of `sampled` records.

    `places` are the numbers of the sampled records. `values` counts those of columns with few (NSFW, labels), `scores`
    are the columns that judge a pair. `failed` and `skipped` count rows and samples that didn't become records;
    `choice` is what `build-tfds --keep-best` and `--balance` did, as the manifest has it. `sources` are those of the
    captions, where there are others than `original`.
    """

    path: Path
    name: str
    split: str
    records: int
    shards: int
    bytes: int
    sampled: int
    seed: int
    damaged: int
    columns: tuple[Column, ...]
    captions: CaptionFacts | None
    pictures: PictureFacts | None
    scores: dict[str, Histogram]
    values: dict[str, dict[str, int]]
    failed: dict[str, int]
    skipped: dict[str, int]
    choice: dict[str, Any]
    sources: tuple[SourceFacts, ...]
    places: tuple[int, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, without the places."""
        told = {**asdict(self), "path": str(self.path)}
        del told["places"]
        if self.captions:
            del told["captions"]["examples"]
        return told


def inspect(path: Path, *, split: str | None = None, sample: int = SAMPLE) -> Inspection:
    """Look at `sample` records of a split of the dataset at `path`; `split` None takes the only one, or `train`.

    Raises UserError where there is no such dataset or split, or it holds nothing.
    """
    layout = read_layout(as_path(path))
    split = split or usual_split(layout)
    dataset = open_dataset(layout.folder, split)
    if not dataset.num_records:
        raise UserError(f"split {split!r} of {layout.folder} holds no records: choose another split or dataset")
    places = sample_places(dataset.num_records, sample)
    seen = _Seen(dataset.features)
    with Progress("inspect", len(places), "records") as progress:
        for number, place in enumerate(places):
            seen.look(place, dataset)
            progress.update(number + 1)
    manifest = read_manifest(layout.folder).get(split)
    return Inspection(
        path=layout.folder,
        name=dataset.name,
        split=split,
        records=dataset.num_records,
        shards=len(dataset.shards),
        bytes=sum(shard.bytes for shard in dataset.shards),
        sampled=len(places),
        seed=SEED,
        damaged=seen.damaged,
        columns=seen.columns(len(places) - seen.damaged),
        captions=seen.caption_facts(),
        pictures=seen.pictures.facts() if seen.pictures else None,
        scores=seen.score_histograms(),
        values=seen.value_counts(dataset),
        failed=_failed(layout.folder) if split == "train" else {},
        skipped=manifest.skipped if manifest else {},
        choice=manifest.choice if manifest else {},
        sources=seen.source_facts(),
        places=tuple(places),
    )


def usual_split(layout: DatasetLayout) -> str:
    """The split that is meant where none is named: the only one, or `train`."""
    return next(iter(layout.lengths)) if len(layout.lengths) == 1 else "train"


def sample_places(total: int, sample: int) -> list[int]:
    """Up to `sample` of the places 0..total-1 in order, drawn at random; memory doesn't grow with `total`."""
    rng = np.random.default_rng(SEED)
    chosen: list[int] = np.sort(rng.choice(total, min(sample, total), replace=False, shuffle=False)).tolist()
    return chosen


class _Seen:
    """What is kept of the records of a sample."""

    def __init__(self, features: Mapping[str, Feature]) -> None:
        self.features = features
        self.caption, image = find_caption(features), find_image(features)
        self.pictures = Pictures(image) if image else None
        self.captions: list[str] = []
        self.places: list[int] = []
        self.added = {source: (name, list[list[str]]()) for source, name in source_columns(features).items()}
        self.present: Counter[str] = Counter()
        self.scores: dict[str, list[float]] = {name: [] for name in features if _is_score(name, features[name])}
        self.values: dict[str, Counter[str]] = {name: Counter() for name in features if _is_kind(name, features[name])}
        self.damaged = 0

    def look(self, place: int, dataset: Dataset) -> None:
        """Read one record. A damaged one is counted: verify says more of it."""
        try:
            example = dataset.example(place)
        except RecordError:
            self.damaged += 1
            return
        self.present.update(name for name, value in example.items() if value is not None)
        if self.caption:
            self.captions.append(example[self.caption] or "")
            self.places.append(place)
        for name, texts in self.added.values():
            texts.append(captions_of(example[name], name))
        if self.pictures and isinstance(example[self.pictures.column], bytes):
            self.pictures.add(place, example[self.pictures.column])
        for name, numbers in self.scores.items():
            if example[name] is not None:
                numbers.append(example[name])
        for name, counts in self.values.items():
            counts["missing" if example[name] is None else str(example[name])] += 1

    def columns(self, read: int) -> tuple[Column, ...]:
        """Every column with its type and what is missing."""
        return tuple(
            Column(name, _type(feature), 1 - self.present[name] / read if read else 0.0)
            for name, feature in self.features.items()
        )

    def caption_facts(self) -> CaptionFacts | None:
        """The captions, where there are any."""
        return caption_facts(self.caption, self.captions, self.places) if self.caption and self.captions else None

    def source_facts(self) -> tuple[SourceFacts, ...]:
        """The captions of each source, where there are several."""
        if not self.added:
            return ()
        original = source_facts(ORIGINAL, [[text] if text.strip() else [] for text in self.captions])
        return original, *(source_facts(source, texts) for source, (_, texts) in self.added.items())

    def score_histograms(self) -> dict[str, Histogram]:
        """The distribution of each score that any record has."""
        drawn = {name: histogram_of(numbers) for name, numbers in self.scores.items()}
        return {name: histogram for name, histogram in drawn.items() if histogram is not None}

    def value_counts(self, dataset: Dataset) -> dict[str, dict[str, int]]:
        """The commonest values of the columns with few, labels by their names."""
        told = {}
        for name, counts in self.values.items():
            names = dataset.label_names(name) if self.features[name].kind == "label" else None
            common = counts.most_common(MOST_VALUES)
            told[name] = {_label(value, names): count for value, count in common}
            rest = sum(counts.values()) - sum(count for _, count in common)
            if rest:
                told[name][f"{len(counts) - len(common):,} others"] = rest
        return told


def _is_score(name: str, feature: Feature) -> bool:
    """Whether a column judges the pair: similarity, aesthetics, the probability of NSFW."""
    words = ("similarity", "score", "aesthetic", "unsafe", "nsfw", "watermark")
    return feature.kind == "float" and not feature.is_list and any(word in name.lower() for word in words)


def _is_kind(name: str, feature: Feature) -> bool:
    """Whether a column puts the pair into one of a few classes."""
    word = feature.kind in ("text", "int", "bool") and "nsfw" in name.lower()
    return not feature.is_list and (word or feature.kind == "label")


def _label(value: str, names: Sequence[str] | None) -> str:
    return names[int(value)] if names and value.isdigit() and int(value) < len(names) else value


def _type(feature: Feature) -> str:
    kind = f"label of {feature.num_classes:,} classes" if feature.num_classes else feature.kind
    return f"list of {kind}" if feature.is_list else f"{kind}, optional" if feature.optional else kind


def _failed(folder: Path) -> dict[str, int]:
    """Rows of the download, whose split is `train`, by the reason why they gave no image, most first."""
    path = folder / CLIPKIT_FOLDER / "failures.parquet"
    if not path.exists():
        return {}
    counts: Counter[str] = Counter()
    with local_copy(path) as local, pq.ParquetFile(local) as file:
        for batch in file.iter_batches(columns=["reason"]):
            counts.update({each["values"]: each["counts"] for each in batch.column(0).value_counts().to_pylist()})
    return dict(counts.most_common())
