"""From ImageNet as people have it, or any folder of labelled images, to a TFDS dataset: `clipkit build-imagenet`.

The result is what `tfds.builder("imagenet2012")` would have made of the official tars: the same records in the same
order, in files of the same names. That order is by a hash of the file name, so a shard holds all classes and a loader
that shuffles within a window sees no class-sorted data; and it is known before anything is read, so that shards can be
made side by side and each be found finished, or not, by the next run.

A label's number is the place of its class among the sorted wnids, which is the order of CLIP's class names too. Counts
are checked before anything is written: a set with classes or images missing gives an accuracy that looks like a result.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit import embedded
from clipkit.errors import UserError
from clipkit.formats.dataset import VERSION, check_name, refuse_unfinished_rewrite
from clipkit.formats.features import Feature, parse_features
from clipkit.formats.folders import aside_text, empty_classes_text, printable
from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest, read_manifest
from clipkit.formatting import counted, counts_text, size_text
from clipkit.jobs.passes import Runner
from clipkit.jobs.run import Engine
from clipkit.storage.files import clear_leftovers, is_remote, load_array, lock, read_json, remove
from clipkit.tfrecord_tools.labelled.labels import label_images
from clipkit.tfrecord_tools.labelled.listing import Image, SplitSource, find_splits, list_part
from clipkit.tfrecord_tools.labelled.shard import LabelledJob
from clipkit.tfrecord_tools.labelled.split import build_split, check_same, plan_shards, work_folder
from clipkit.tfrecord_tools.writing.finish import finish_dataset
from clipkit.tfrecord_tools.writing.summary import BuildSummary, summarise

IMAGENET, IMAGENET_VERSION = "imagenet2012", "5.1.0"
IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}
IMAGENET_SHARDS = {"train": 1024, "validation": 64}
SHARD_MEGABYTES = 128  # what TFDS's own ImageNet has


@dataclass(frozen=True)
class LabelledSummary:
    """What was made, split by split. `subset`: it isn't the whole of ImageNet-1K; `notes` say what else to know."""

    path: Path
    name: str
    classes: int
    subset: bool
    splits: tuple[BuildSummary, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The counts, and paths as text."""
        return {
            "path": str(self.path),
            "name": self.name,
            "classes": self.classes,
            "subset": self.subset,
            "splits": {split.split: split.to_json() for split in self.splits},
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """A few lines for a person."""
        lines = [f"{self.path}: {counted(self.classes, 'class', 'classes')}"]
        for split in self.splits:
            there = "" if split.built else " (there already)"
            lines.append(
                f"{split.split}: {counted(split.records, 'image')}, {size_text(split.bytes)} in "
                f"{counted(split.shards, 'shard')}{there}"
            )
            if split.skipped:
                listed = self.path / CLIPKIT_FOLDER / f"skipped-{split.split}.jsonl"
                lines.append(f"{split.split}: left out as broken: {counts_text(split.skipped)}; each in {listed}")
            if split.converted:
                lines.append(f"{split.split}: stored as RGB JPEG, as TFDS does: {counts_text(split.converted)}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class _Target:
    """What is to be made: a whole ImageNet, a subset of it, or another set, from `source` into `folder`."""

    source: Path
    folder: Path
    name: str
    imagenet: bool
    subset: bool


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
    allow_empty_classes: bool = False,
    workers: int | None = 1,
    engine: Engine = "local",
) -> LabelledSummary:
    """Make `out/imagenet2012/5.1.0`, or `out/name/1.0.0` of another set, and go on where a killed run stopped.

    `source` is a folder with the official tars, with a folder for each split, or a split itself (`split`, or train);
    a split is tars of classes, class folders, or a heap with `labels`. `classes` lists another set's classes in label
    order (lines, or a JSON list); without it they are the sorted names of the class folders. Splits that are there
    already stay, so a validation set can be joined by its training set later.
    ImageNet must have its 1,000 classes and all its images unless `subset`; even then a label's number is that of the
    whole set. A class folder without images stops another set's build, as the labels after it would shift, unless
    `allow_empty_classes` keeps its number. Broken images are left out and named, `max_bad` of them at most.
    The bytes don't depend on `workers` (None: one a core) and `engine` (see `run_jobs`).
    Raises UserError for a source that lacks something, an output that holds other data, and names that TFDS doesn't
    allow.
    """
    check_name(name)
    if split is not None:
        check_name(split, "split")
    imagenet = name == IMAGENET
    if imagenet and classes is not None:
        raise UserError("ImageNet's classes are known: leave --classes out, or give another --name")
    if imagenet and max_bad and not subset:
        raise UserError("ImageNet without some of its images is a subset: give --subset with --max-bad")
    # Absolute, for the workers of an engine may start in another folder.
    source, out = source.absolute(), out if is_remote(out) else out.absolute()
    folder = out / name / (IMAGENET_VERSION if imagenet else VERSION)
    target = _Target(source, folder, name, imagenet, subset)
    runner = Runner(workers, engine)
    given = _given_classes(imagenet, classes)
    listed, empty, notes = _list(target, find_splits(source, split), labels, given, runner)
    if empty and not (imagenet or classes or allow_empty_classes):
        raise UserError(
            f"{empty_classes_text(empty)}: put images there, remove the folder, or give --allow-empty-classes"
        )
    if empty and not imagenet:
        notes.append(f"{empty_classes_text(empty)}; {'it has' if len(empty) == 1 else 'they have'} a label of no image")
    class_names = _class_names(imagenet, given, classes, listed, empty)
    notes += _check(target, listed, class_names)
    with lock(folder / CLIPKIT_FOLDER):
        refuse_unfinished_rewrite(folder)
        clear_leftovers(folder, folder / CLIPKIT_FOLDER)
        splits = _splits_there(target, class_names)
        there = set(splits)
        split_jobs = {part.split: _jobs(target, part, images, class_names) for part, images in listed}
        allow = "--subset --max-bad" if imagenet else "--max-bad"
        for part, jobs in split_jobs.items():
            if part in there:
                check_same(folder, part, splits[part], jobs)
            else:
                splits[part] = build_split(folder, part, jobs, max_bad=max_bad, allow=allow, runner=runner)
        if set(splits) != there:
            finish_dataset(
                folder,
                name,
                _features(imagenet, len(class_names)),
                dict(sorted(splits.items())),
                {part: (load_array(job.offsets) for job in split_jobs[part]) for part in splits if part not in there},
                version=folder.name,
                description=_description(target),
                label_names={"label": class_names},
                supervised=("image", "label"),
            )
        for part in split_jobs:
            remove(work_folder(folder, part))
    return LabelledSummary(
        path=folder,
        name=name,
        classes=len(class_names),
        subset=imagenet and subset,
        splits=tuple(summarise(folder, name, {part: splits[part]}, part not in there) for part in split_jobs),
        notes=tuple(notes),
    )


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
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"classes {file} don't exist: check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} isn't UTF-8 text: write one class a line") from error


Listed = list[tuple[SplitSource, list[Image]]]


def _list(
    target: _Target, found: Sequence[SplitSource], labels: Path | None, known: list[str], runner: Runner
) -> tuple[Listed, dict[str, str], list[str]]:
    """The images of each split with their classes; classes without any, each with what else is there; and notes.

    A class is empty when it has a folder (or a tar) in some split, and images in none.
    """
    listed: Listed = []
    empty: dict[str, str] = {}
    notes: list[str] = []
    by_part = iter(
        runner.run(
            "list images",
            list_part,
            [part for split in found for part in split.parts],
            describe=lambda part: f"{part.path} {part.label}".strip(),
            counts=lambda listed: {"images": len(listed.images)},
        )
    )
    for split in found:
        parts = [(part, next(by_part)) for part in split.parts]
        of_split = [image for _, images in parts for image in images.images]
        aside = sum((images.aside for _, images in parts), Counter(split.aside))
        if not of_split:
            found_there = f" (only {aside_text(aside)})" if aside else ""
            raise UserError(f"{split.path} holds no images{found_there}: give class folders, or the official tars")
        notes += split.notes
        if aside:
            notes.append(f"{split.split}: files left aside: {aside_text(aside)}")
        empty |= {
            part.label: f"{part.path} has {aside_text(images.aside) or 'no files'}"
            for part, images in parts
            if part.label and not images.images
        }
        if not all(image.label for image in of_split):
            of_split, where = label_images(of_split, known, target.source, labels)
            notes.append(f"{split.split}: labels from {where}")
        listed.append((split, of_split))
    if labels is not None and all(part.label for split in found for part in split.parts):
        raise UserError(
            f"--labels {labels} is for images in one heap, and those of {target.source} lie in folders (or tars) of "
            "classes: leave it out, or put the images into one folder"
        )
    occurring = {image.label for _, images in listed for image in images}
    return listed, {label: there for label, there in empty.items() if label not in occurring}, notes


def _class_names(
    imagenet: bool, known: list[str], classes: Path | None, listed: Listed, empty: dict[str, str]
) -> list[str]:
    """All classes in label order. Numbers are in the order of their value, as no number list has 10 before 2."""
    occurring = {image.label for _, images in listed for image in images}
    if not imagenet:
        occurring |= set(empty)
    if not known:
        return sorted(sorted(occurring), key=int if all(label.isdecimal() for label in occurring) else None)
    foreign = sorted(occurring - set(known))
    if foreign:
        where = "ImageNet-1K's 1,000" if imagenet else f"those of {classes}"
        remedy = "give another --name for another set" if imagenet else "complete the list"
        lacking = "class isn't" if len(foreign) == 1 else "classes aren't"
        such = "" if len(foreign) == 1 else "such as "
        raise UserError(f"{len(foreign):,} {lacking} among {where}, {such}{foreign[0]!r}: {remedy}")
    return known


def _check(target: _Target, listed: Listed, class_names: Sequence[str]) -> list[str]:
    """Refuse an ImageNet with something missing, and twins. The notes say out loud what a subset or a split lacks."""
    notes = []
    occurring = {image.label for _, images in listed for image in images}
    for split, images in listed:
        names = {_file_name(target.imagenet, image) for image in images}
        if len(names) < len(images):
            twice = counted(len(images) - len(names), "file name")
            raise UserError(f"{split.path} holds {twice} twice: remove the copies")
        missing = sorted((set(class_names) if target.imagenet else occurring) - {image.label for image in images})
        if not target.imagenet:
            if missing:
                lacking = counted(len(missing), "class", "classes")
                notes.append(f"{split.split} has no image of {lacking} that another split has, such as {missing[0]!r}")
            continue
        wanted = IMAGENET_COUNTS.get(split.split)
        if len(images) == wanted and not missing:
            continue
        lacks = f", {counted(len(missing), 'class', 'classes')} missing, such as {missing[0]}" if missing else ""
        whole = f"{wanted:,}" if wanted else "none"
        counts = f"{split.split} has {counted(len(images), 'image')} where ImageNet's has {whole}{lacks}"
        if not target.subset:
            other = next((each for each, count in IMAGENET_COUNTS.items() if count == len(images)), None)
            remedy = f"give --split {other}" if other else "complete it, or give --subset for a part of ImageNet"
            raise UserError(f"{split.path}: {counts}: {remedy}")
        notes.append(f"SUBSET: {counts}; its numbers can't be compared with those of the whole")
    return notes


def _file_name(imagenet: bool, image: Image) -> str:
    """What the record's `file_name` says: ImageNet's names are unique without their class."""
    name = printable(image.name)
    return name.rpartition("/")[2] if imagenet else name


def _splits_there(target: _Target, class_names: Sequence[str]) -> dict[str, SplitManifest]:
    """The splits that are whole. Raises UserError for a dataset of another kind, or with other classes."""
    info_path = target.folder / "dataset_info.json"
    if not info_path.exists():
        return {}
    whole = {part["name"] for part in read_json(info_path).get("splits", [])}
    splits = {name: manifest for name, manifest in read_manifest(target.folder).items() if name in whole}
    features = _features(target.imagenet, len(class_names))
    if whole - set(splits) or parse_features(read_json(target.folder / "features.json")) != features:
        raise UserError(f"{target.folder} holds a dataset of other columns or classes: choose another output or --name")
    there = (target.folder / "label.labels.txt").read_text(encoding="utf-8").split("\n")[:-1]
    if there != list(class_names):
        raise UserError(f"{target.folder} has other classes: build all splits at once, or give --classes")
    return splits


def _features(imagenet: bool, classes: int) -> dict[str, Feature]:
    return {
        "image": Feature("image", encoding="jpeg" if imagenet else None),
        "label": Feature("label", num_classes=classes),
        "file_name": Feature("text"),
    }


def _description(target: _Target) -> str:
    if not target.imagenet:
        return "Labelled images written by clipkit."
    return f"{'A subset of ' if target.subset else ''}ILSVRC 2012, commonly known as ImageNet, written by clipkit."


def _jobs(
    target: _Target, split: SplitSource, images: Sequence[Image], class_names: Sequence[str]
) -> list[LabelledJob]:
    number_of = {name: number for number, name in enumerate(class_names)}
    if target.imagenet and len(images) == IMAGENET_COUNTS.get(split.split):
        count = IMAGENET_SHARDS[split.split]
    else:
        size = sum(image.size for image in images)
        count = min(max(round(size / (SHARD_MEGABYTES * 1_000_000)), 1), len(images))
    return plan_shards(
        target.folder,
        target.name,
        split.split,
        split.path.name,
        images,
        [number_of[image.label] for image in images],
        [_file_name(target.imagenet, image) for image in images],
        count,
        target.imagenet,
    )
