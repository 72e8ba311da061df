"""From ImageNet as people have it, or any folder of labelled images, to a TFDS dataset: `clipkit build-imagenet`.

The result is what `tfds.builder("imagenet2012")` would have made of the official tars: the same records in the same
order, in files of the same names. That order is by a hash of the file name, so a shard holds all classes and a loader
that shuffles within a window sees no class-sorted data; and it is known before anything is read, so that shards can be
made side by side and each be found finished, or not, by the next run.

A label's number is the place of its class among the sorted wnids, which is the order of CLIP's class names too. Counts
are checked before anything is written: a set with classes or images missing gives an accuracy that looks like a result.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clipkit import embedded
from clipkit.errors import UserError
from clipkit.formats.dataset import VERSION
from clipkit.formats.features import Feature, parse_features
from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest, read_manifest, write_manifest
from clipkit.formatting import counted
from clipkit.jobs.run import Engine, run_jobs
from clipkit.log import Progress
from clipkit.storage.files import clear_leftovers, is_remote, lock, read_json, remove
from clipkit.tfrecord_tools.account.purged import refuse_unfinished_purge
from clipkit.tfrecord_tools.labelled.labels import label_images
from clipkit.tfrecord_tools.labelled.listing import Image, Part, SplitSource, find_splits, list_part
from clipkit.tfrecord_tools.labelled.shard import LabelledShardJob
from clipkit.tfrecord_tools.labelled.split import build_split, check_same, plan_shards, work_folder
from clipkit.tfrecord_tools.labelled.summary import LabelledSummary
from clipkit.tfrecord_tools.writing.metadata import write_metadata
from clipkit.tfrecord_tools.writing.summary import summarise

IMAGENET, IMAGENET_VERSION = "imagenet2012", "5.1.0"
IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}
IMAGENET_SHARDS = {"train": 1024, "validation": 64}
SHARD_MEGABYTES = 128  # what TFDS's own ImageNet has


@dataclass(frozen=True)
class _Plan:
    """What is to be made: a whole ImageNet, a subset of it, or another set, into `folder`."""

    source: Path
    folder: Path
    name: str
    imagenet: bool
    subset: bool
    workers: int | None
    engine: Engine


def build_imagenet(
    source: Path,
    out: Path,
    *,
    name: str = IMAGENET,
    split: str | None = None,
    labels: Path | None = None,
    classes: Path | None = None,
    subset: bool = False,
    max_bad: int = 0,
    workers: int | None = 1,
    engine: Engine = "local",
) -> LabelledSummary:
    """Make `out/imagenet2012/5.1.0`, or `out/name/1.0.0` of another set, and go on where a killed run stopped.

    `source` is a folder with the official tars, with a folder for each split, or a split itself (`split`, or train);
    a split is tars of classes, class folders, or a heap with `labels`. `classes` lists another set's classes in label
    order (lines, or a JSON list); without it they are the sorted names of the class folders. Splits that are there
    already stay, so a validation set can be joined by its training set later.
    ImageNet must have its 1,000 classes and all its images unless `subset`; even then a label's number is that of the
    whole set. Broken images are left out and named, `max_bad` of them at most. The bytes don't depend on `workers`
    (None: one a core) and `engine` (see `run_jobs`).
    Raises UserError for a source that lacks something, an output that holds other data, and names that TFDS doesn't
    allow.
    """
    if not re.fullmatch(r"[a-zA-Z]\w*", name, re.ASCII):
        raise UserError(f"dataset name {name!r}: TFDS wants a letter, then letters, digits and _ alone")
    if split is not None and not re.fullmatch(r"[a-zA-Z]\w*", split, re.ASCII):
        raise UserError(f"split {split!r}: give a letter, then letters, digits and _ alone, such as train or test")
    imagenet = name == IMAGENET
    if imagenet and classes is not None:
        raise UserError("ImageNet's classes are known: leave --classes out, or give another --name")
    if imagenet and max_bad and not subset:
        raise UserError("ImageNet without some of its images is a subset: give --subset with --max-bad")
    # Absolute, for the workers of an engine may start in another folder.
    source, out = source.absolute(), out if is_remote(out) else out.absolute()
    folder = out / name / (IMAGENET_VERSION if imagenet else VERSION)
    plan = _Plan(source, folder, name, imagenet, subset, workers, engine)
    listed, notes = _list(plan, find_splits(source, split), labels, _given_classes(imagenet, classes))
    class_names = _class_names(imagenet, classes, listed)
    notes += _check(plan, listed, class_names)
    with lock(folder / CLIPKIT_FOLDER):
        refuse_unfinished_purge(folder)
        clear_leftovers(folder, folder / CLIPKIT_FOLDER)
        splits = _splits_there(plan, class_names)
        there = set(splits)
        job_lists = {part.split: _jobs(plan, part, images, class_names) for part, images in listed}
        sizes = {part.split: sum(image.size for image in images) for part, images in listed}
        before, total = 0, sum(size for part, size in sizes.items() if part not in there)
        with Progress("build-imagenet", total // 1_000_000, "MB") as line:
            for part, job_list in job_lists.items():
                if part in there:
                    check_same(folder, part, splits[part], job_list)
                    continue
                splits[part] = build_split(
                    folder,
                    part,
                    job_list,
                    max_bad=max_bad,
                    allow="--subset --max-bad" if imagenet else "--max-bad",
                    workers=workers,
                    engine=engine,
                    tell=partial(_tell, line, before),
                )
                before += sizes[part]
        if set(splits) != there:
            splits = dict(sorted(splits.items()))
            write_manifest(folder, splits)
            write_metadata(
                folder,
                name,
                _features(imagenet, len(class_names)),
                splits,
                version=folder.name,
                description=_description(plan),
                label_names={"label": class_names},
                supervised=("image", "label"),
            )
        for part in job_lists:
            remove(work_folder(folder, part))
    return LabelledSummary(
        path=folder,
        name=name,
        classes=len(class_names),
        subset=imagenet and subset,
        splits=tuple(summarise(folder, name, part, splits[part], part not in there) for part in job_lists),
        notes=tuple(notes),
    )


def _tell(line: Progress, before: int, done: int, note: str) -> None:
    line.update((before + done) // 1_000_000, note)


def _given_classes(imagenet: bool, file: Path | None) -> list[str]:
    """The classes that are known beforehand, in label order; [] when the folders are to tell."""
    if imagenet:
        return [entry["wnid"] for entry in embedded.imagenet_classes()]
    if file is None:
        return []
    names = read_json(file) if file.suffix == ".json" else _lines(file)
    if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
        raise UserError(f"{file} isn't a list of classes: write one a line, or a JSON list")
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise UserError(f"{file} names the class {twice!r} twice: each has one place")
    return names


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"classes {file} don't exist: check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} isn't UTF-8 text: write one class a line") from error


Listed = list[tuple[SplitSource, list[Image]]]


def _list(plan: _Plan, found: Sequence[SplitSource], labels: Path | None, known: list[str]) -> tuple[Listed, list[str]]:
    """The images of each split with their classes, and where labels came from."""
    listed: Listed = []
    notes: list[str] = []
    parts = [part for split in found for part in split.parts]
    by_part: dict[int, list[Image]] = {}
    with Progress("list images", len(parts), "classes") as line:
        for index, images in run_jobs(
            list_part, parts, workers=plan.workers, engine=plan.engine, describe=_describe_part
        ):
            by_part[index] = images
            line.update(len(by_part), counted(sum(map(len, by_part.values())), "image"))
    first = 0
    for split in found:
        of_split = [image for index in range(first, first + len(split.parts)) for image in by_part[index]]
        first += len(split.parts)
        if not of_split:
            raise UserError(f"{split.path} holds no images: give class folders, or the official tars")
        if not all(image.label for image in of_split):
            of_split, where = label_images(of_split, known, plan.source, labels)
            notes.append(f"{split.split}: labels from {where}")
        listed.append((split, of_split))
    return listed, notes


def _describe_part(part: Part) -> str:
    return f"{part.path} {part.label}".strip()


def _class_names(imagenet: bool, classes: Path | None, listed: Listed) -> list[str]:
    """All classes in label order. Numbers are in the order of their value, as no number list has 10 before 2."""
    occurring = {image.label for _, images in listed for image in images}
    known = _given_classes(imagenet, classes)
    if not known:
        return sorted(occurring, key=int if all(label.isdecimal() for label in occurring) else None)
    foreign = sorted(occurring - set(known))
    if foreign:
        where = "ImageNet-1K's 1,000" if imagenet else f"those of {classes}"
        remedy = "give another --name for another set" if imagenet else "complete the list"
        lacking = "class isn't" if len(foreign) == 1 else "classes aren't"
        such = "" if len(foreign) == 1 else "such as "
        raise UserError(f"{len(foreign):,} {lacking} among {where}, {such}{foreign[0]!r}: {remedy}")
    return known


def _check(plan: _Plan, listed: Listed, class_names: Sequence[str]) -> list[str]:
    """Refuse an ImageNet with something missing, and twins. The notes say out loud what a subset lacks."""
    notes = []
    for split, images in listed:
        names = {_file_name(plan.imagenet, image) for image in images}
        if len(names) < len(images):
            twice = counted(len(images) - len(names), "file name")
            raise UserError(f"{split.path} holds {twice} twice: remove the copies")
        if not plan.imagenet:
            continue
        wanted = IMAGENET_COUNTS.get(split.split)
        missing = sorted(set(class_names) - {image.label for image in images})
        if len(images) == wanted and not missing:
            continue
        lacks = f", {counted(len(missing), 'class', 'classes')} missing, such as {missing[0]}" if missing else ""
        whole = f"{wanted:,}" if wanted else "none"
        counts = f"{split.split} has {counted(len(images), 'image')} where ImageNet's has {whole}{lacks}"
        if not plan.subset:
            other = next((each for each, count in IMAGENET_COUNTS.items() if count == len(images)), None)
            remedy = f"give --split {other}" if other else "complete it, or give --subset for a part of ImageNet"
            raise UserError(f"{split.path}: {counts}: {remedy}")
        notes.append(f"SUBSET: {counts}; its numbers can't be compared with those of the whole")
    return notes


def _file_name(imagenet: bool, image: Image) -> str:
    """What the record's `file_name` says: ImageNet's names are unique without their class."""
    return image.name.rpartition("/")[2] if imagenet else image.name


def _splits_there(plan: _Plan, class_names: Sequence[str]) -> dict[str, SplitManifest]:
    """The splits that are whole. Raises UserError for a dataset of another kind, or with other classes."""
    info_path = plan.folder / "dataset_info.json"
    if not info_path.exists():
        return {}
    whole = {part["name"] for part in read_json(info_path).get("splits", [])}
    splits = {name: manifest for name, manifest in read_manifest(plan.folder).items() if name in whole}
    features = _features(plan.imagenet, len(class_names))
    if whole - set(splits) or parse_features(read_json(plan.folder / "features.json")) != features:
        raise UserError(f"{plan.folder} holds a dataset of other columns or classes: choose another output or --name")
    there = (plan.folder / "label.labels.txt").read_text(encoding="utf-8").split("\n")[:-1]
    if there != list(class_names):
        raise UserError(f"{plan.folder} has other classes: build all splits at once, or give --classes")
    return splits


def _features(imagenet: bool, classes: int) -> dict[str, Feature]:
    return {
        "image": Feature("image", encoding="jpeg" if imagenet else None),
        "label": Feature("label", num_classes=classes),
        "file_name": Feature("text"),
    }


def _description(plan: _Plan) -> str:
    if not plan.imagenet:
        return "Labelled images written by clipkit."
    return f"{'A subset of ' if plan.subset else ''}ILSVRC 2012, commonly known as ImageNet, written by clipkit."


def _jobs(
    plan: _Plan, split: SplitSource, images: Sequence[Image], class_names: Sequence[str]
) -> list[LabelledShardJob]:
    number_of = {name: number for number, name in enumerate(class_names)}
    if plan.imagenet and len(images) == IMAGENET_COUNTS.get(split.split):
        count = IMAGENET_SHARDS[split.split]
    else:
        size = sum(image.size for image in images)
        count = min(max(round(size / (SHARD_MEGABYTES * 1_000_000)), 1), len(images))
    return plan_shards(
        plan.folder,
        plan.name,
        split.split,
        split.path.name,
        images,
        [number_of[image.label] for image in images],
        [_file_name(plan.imagenet, image) for image in images],
        count,
        plan.imagenet,
    )
