"""The data that ships inside the package: emoji pairs for the demo, the files that define CLIP's benchmarks, and what
was published about them.

Licences and sources are in the README beside each set.
"""

import csv
import gzip
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal


def folder(name: str) -> Path:
    """The folder of an embedded set as a real path (the package is never imported from a zip)."""
    return Path(str(files("clipkit"))) / "data" / name


def emoji_parquet(split: Literal["train", "heldout"]) -> Path:
    """8,548 training pairs in six drawing styles, or 1,096 held-out pairs in a seventh."""
    return folder("emoji") / f"emoji-{split}.parquet"


def emoji_groups() -> Path:
    """The ten Unicode groups, each described by the captions that it has in the training pairs: class names in JSON."""
    return folder("emoji") / "emoji-groups.json"


def bert_vocabulary() -> Path:
    """The `vocab.txt` of bert-base-uncased (30,522 ids), which CLIPA-v2's models have."""
    return folder("clip") / "bert-uncased-vocab.txt"


def imagenet_classes() -> list[dict[str, str]]:
    """1,000 `{"wnid": …, "name": …}` in label order; the names are those curated for CLIP."""
    classes: list[dict[str, str]] = json.loads((folder("clip") / "imagenet1k-classes.json").read_text(encoding="utf-8"))
    return classes


def imagenet_relatives() -> dict[str, Any]:
    """Of `imagenet-a`, `imagenet-o`, `imagenet-r`: the places of their classes among ImageNet's. Of `objectnet`: the
    folders of the classes that it shares with ImageNet, each with its name and the places of ImageNet's classes.
    """
    relatives: dict[str, Any] = json.loads((folder("clip") / "imagenet-relatives.json").read_text(encoding="utf-8"))
    return relatives


def imagenet_real() -> list[list[int]]:
    """The reassessed labels of ImageNet's 50,000 validation images in the order of their numbers; some have none."""
    labels: list[list[int]] = json.loads(gzip.decompress((folder("clip") / "imagenet-real.json.gz").read_bytes()))
    return labels


def prompt_templates() -> dict[str, list[str]]:
    """OpenAI's prompt templates by name (`openai-80`, `openai-7`); `{}` stands for the class name."""
    templates: dict[str, list[str]] = json.loads(
        (folder("clip") / "imagenet-templates.json").read_text(encoding="utf-8")
    )
    return templates


def published(name: Literal["datacomp-38", "openclip-evals", "published-runs"]) -> list[dict[str, str]]:
    """The rows of a table of published facts, by column: DataComp's tasks, 121 OpenCLIP models' numbers on them, or
    training runs with their accuracies."""
    with (folder("published") / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
