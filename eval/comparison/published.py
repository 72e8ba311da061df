"""What was published about 121 OpenCLIP models, and how a result compares with it.

A model that is known by its name, on a dataset that is known by its name, should give the published number: where it
doesn't, something is other than it was (templates, preprocessing, the activation, the images).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from clipkit import embedded
from clipkit.eval.results import PROBES, Result

IMAGENET = "ImageNet 1k"
RELATIVES = ("ImageNet v2", "ImageNet-A", "ImageNet-R", "ImageNet Sketch", "ObjectNet")
METRICS = {"top1": "acc1", "mean_per_class_recall": "mean_per_class_recall"}
# What a task's name may have around that of its dataset.
AROUND = re.compile(r"^(wds|vtab|clipbenchmark)|(test|validation|val)$")
ALIASES = {
    "imagenet": IMAGENET,
    "imagenet2012": IMAGENET,
    "imagenetv2matchedfrequency": "ImageNet v2",
    "datasetcoco": "MSCOCO",
    "coco": "MSCOCO",
    "mscococaptions": "MSCOCO",
    "datasetflickr30k": "Flickr",
    "flickr30k": "Flickr",
}
MOST_CAPTIONS = 5.01  # of an image, on average: COCO has 25,010 for 5,000


@dataclass(frozen=True)
class Published:
    """A result of a known model on a known dataset, beside the number that was published."""

    result: Result
    dataset: str
    value: float

    @property
    def deviates(self) -> bool:
        """Whether the published number lies outside of the result's interval."""
        return not self.result.low <= self.value <= self.result.high


@dataclass(frozen=True)
class Relative:
    """Accuracy on a relative of ImageNet, beside what its accuracy on ImageNet lets expect (of published models)."""

    dataset: str
    imagenet: float
    result: Result
    expected: float
    spread: float
    """The root mean square of the published models' own distances, in logits."""

    @property
    def distance(self) -> float:
        """Effective robustness (Taori et al., 2020): above or below what is expected, a share."""
        return self.result.value - self.expected


@cache
def models() -> dict[str, dict[str, str]]:
    """The published rows by `model:pretrained`, in lower case."""
    return {f"{row['model']}:{row['pretrained']}".lower(): row for row in embedded.published("openclip-evals")}


@cache
def datasets() -> dict[str, dict[str, str]]:
    """DataComp's tasks by each of their names, with letters and digits only."""
    found = {}
    for row in embedded.published("datacomp-38"):
        for name in (row["key"], row["key"].rpartition("/")[2], row["name"]):
            found[plain(name)] = row
    return found | {alias: found[plain(name)] for alias, name in ALIASES.items()}


def plain(name: str) -> str:
    """A name's letters and digits, in lower case."""
    return re.sub(r"[\W_]+", "", name.lower())


def known_model(name: str) -> str | None:
    """The key in `models` of what a `--ckpt` names, `open_clip:NAME:TAG`; None for a model that isn't known."""
    parts = name.split(":")
    if parts[0] not in ("open_clip", "open-clip") or len(parts) != 3:
        return None
    key = f"{parts[1].replace('/', '-')}:{parts[2]}".lower()
    return key if key in models() else None


def known_dataset(result: Result) -> dict[str, str] | None:
    """DataComp's task that a result's name is that of; None for none, and where the images are fewer or more."""
    name, before = plain(result.task), ""
    while name != before and name not in datasets():
        before, name = name, AROUND.sub("", name)
    found = datasets().get(name)
    if found is None or result.kind in PROBES:  # what was published is zero-shot
        return None
    size, n = int(found["size"]), result.n + result.unreadable
    is_whole = size <= n <= MOST_CAPTIONS * size if result.kind == "retrieval" else n == size  # n may count captions
    return found if is_whole else None


def published(model: str, results: Sequence[Result]) -> list[Published]:
    """The results of a known model for which a number was published."""
    key = known_model(model)
    found = []
    for result in results if key is not None else ():
        dataset = known_dataset(result)
        if dataset is not None:
            value = models()[key or ""].get(f"{dataset['name']}/{METRICS.get(result.metric, result.metric)}")
            found += [Published(result, dataset["name"], float(value))] if value else []
    return found


# ---- The robustness line ---------------------------------------------------------------------------------------------


def logit(share: float) -> float:
    """log(p / (1 - p))."""
    return math.log(share / (1 - share))


@cache
def line(dataset: str) -> tuple[float, float, float]:
    """Slope, intercept and root mean square distance, in logits, of accuracy on `dataset` against that on ImageNet."""
    rows = models().values()
    x_M = np.array([logit(float(row[f"{IMAGENET}/acc1"])) for row in rows])
    y_M = np.array([logit(float(row[f"{dataset}/acc1"])) for row in rows])
    slope, intercept = np.polyfit(x_M, y_M, 1)
    return float(slope), float(intercept), float(np.sqrt(np.mean((y_M - slope * x_M - intercept) ** 2)))


def robustness(results: Sequence[Result]) -> list[Relative]:
    """How far a model's accuracy on ImageNet's relatives is from the line of the published models.

    Empty without its top-1 accuracy on ImageNet.
    """
    known = {dataset["name"]: each for each in results if each.metric == "top1" and (dataset := known_dataset(each))}
    imagenet = known[IMAGENET].value if IMAGENET in known else 0.0
    if not 0 < imagenet < 1:
        return []
    found = []
    for name in (name for name in RELATIVES if name in known):
        slope, intercept, spread = line(name)
        expected = 1 / (1 + math.exp(-slope * logit(imagenet) - intercept))
        found.append(Relative(name, imagenet, known[name], expected, spread))
    return found
