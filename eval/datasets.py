"""What the name of a published dataset promises: its classes, its number of images, and the metric it is quoted by.

The 38 datasets are those of DataComp's average (Gadre et al., 2023), by its names for them.
"""

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clipkit import embedded
from clipkit.errors import UserError
from clipkit.formats.folders import holds_class_folders, printable, split_of
from clipkit.formats.tables import is_hidden

# Of tars that hold samples; archives that were unpacked have other names.
_NUMBERED = re.compile(r"(.*[-_])?\d+")
# What TFDS fetched lies beside the datasets that it made.
_NOT_DATASETS = ("downloads",)

# DataComp's names of the metrics, and ours.
METRICS = {
    "acc1": "top1",
    "mean_per_class_recall": "mean_per_class_recall",
    "F1-macro_all": "macro_f1",
    "acc_wg": "worst_group_top1",
    "acc_worst_region": "worst_group_top1",
    "acc_top5_wg": "worst_group_top5",
    "mean_recall@1": "mean_recall@1",
    "jaccard_score_10-12": "jaccard_10_12",
}
# What people call ImageNet, its relatives and WinoGAViL, beside the names that DataComp has.
_ALIASES = {
    **dict.fromkeys(("imagenet", "imagenet-1k", "imagenet2012", "ilsvrc2012", "imagenet1k-unverified"), "imagenet1k"),
    **dict.fromkeys(("imagenet-v2", "imagenetv2-matched-frequency-format"), "imagenetv2"),
    **dict.fromkeys(("imagenet-sketch", "imagenetsketch"), "imagenet_sketch"),
    **{f"imagenet{letter}": f"imagenet-{letter}" for letter in "aor"},
    "objectnet-1.0": "objectnet",
    "winogavil": "misc/winogavil",
}  # fmt: skip


@dataclass(frozen=True)
class PublishedDataset:
    """One of DataComp's datasets."""

    key: str
    """As DataComp calls it: `vtab/caltech101`."""
    title: str
    main_metric: str
    """Ours, of METRICS."""
    classes: int
    """0 where it has none."""
    images: int
    group: str
    """DataComp's: `ImageNet`, `ImageNet dist. shifts`, `VTAB`, `Retrieval`, `Other`."""
    kind: str
    """`classification` or `retrieval`; `choice` for WinoGAViL."""

    @property
    def folder(self) -> str:
        """What CLIP_benchmark and DataComp call its folder, without a prefix and the split."""
        return self.key.removeprefix("fairness/").replace("/", "-")


@cache
def published_datasets() -> dict[str, PublishedDataset]:
    """The 38 by key."""
    found = {}
    for row in embedded.published("datacomp-38"):
        if row["in_average"] == "yes":
            key, is_retrieval = row["key"], row["key"].startswith("retrieval/")
            found[key] = PublishedDataset(
                key,
                row["name"],
                METRICS[row["main_metric"]],
                int(row["num_classes"] or 0),
                int(row["size"]),
                row["group"],
                "retrieval" if is_retrieval else "choice" if key.startswith("misc/") else "classification",
            )
    return found


def plain_name(name: str) -> str:
    """A folder's name as it is compared: `wds_vtab-caltech101_test` is `vtab-caltech101`."""
    name = re.sub(r"[_/ ]", "-", name.lower()).removeprefix("wds-")
    head, _, tail = name.rpartition("-")
    return head if head and split_of(tail) else name


def name_published(name: str) -> PublishedDataset | None:
    """The dataset that a folder's name says; None for an unknown one."""
    published, plain = published_datasets(), plain_name(name)
    if plain in _ALIASES:
        return published[_ALIASES[plain]]
    return next((each for each in published.values() if plain_name(each.folder) == plain), None)


def find_published(path: Path) -> PublishedDataset | None:
    """The dataset that a folder of data is called after, or the folder around its splits; None for an unknown one.

    Other names than ImageNet's and its relatives' are common words (`cars`), and count in a folder called `wds_…` only.
    """
    for name in reversed([part for part in path.parts[-3:] if not split_of(part)]):
        found = name_published(name)
        if found is not None and (name.startswith("wds_") or found.group.startswith("ImageNet")):
            return found
    return None


def refuse_several(data: Path) -> None:
    """Raise UserError for a folder that holds a folder for each of several datasets: one of them isn't all of them.

    Folders of class folders may be groups of classes, too. They count beside a dataset of another kind, and where their
    names are those of published datasets.
    """
    if not data.is_dir():
        return
    files, folders = _look(data)
    if any(map(_is_shard, files)) or any(map(split_of, folders)):
        return
    inner = [data / name for name in folders if name not in _NOT_DATASETS]
    certain = [each for each in inner if _is_certain(each)]
    others = [each for each in inner if each not in certain and holds_class_folders(each)]
    found = sorted([*certain, *others]) if certain else [each for each in others if name_published(each.name)]
    if len(found) > 1:
        names = ", ".join(printable(each.name) for each in found[:5]) + (", …" if len(found) > 5 else "")
        raise UserError(
            f"{data} holds several datasets ({names}): give one of them, or measure them all with zeroshot --suite "
            "NAME or FILE.toml"
        )


def _is_certain(folder: Path) -> bool:
    """Whether a folder is a dataset for certain: it, or a folder in it, has shards, or it has folders of splits."""
    files, folders = _look(folder)
    if any(map(_is_shard, files)):
        return True
    return any(
        any(map(_is_shard, _look(folder / name)[0])) or (split_of(name) and holds_class_folders(folder / name))
        for name in folders
    )


def _is_shard(name: str) -> bool:
    """Whether a file of this name is parquet, a tar of samples, or a TFDS directory's."""
    stem, _, suffix = name.rpartition(".")
    return name == "dataset_info.json" or suffix == "parquet" or (suffix == "tar" and bool(_NUMBERED.fullmatch(stem)))


def _look(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the files and of the folders in a folder, sorted. The kinds are the listing's own: a folder of a
    million images is looked through as well.
    """
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_hidden(entry.name):
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(files), sorted(folders)
