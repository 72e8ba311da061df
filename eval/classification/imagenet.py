"""ImageNet and its relatives: which of the thousand classes each has, and in what order their labels are.

ImageNet-V2 and Sketch have all classes. ImageNet-A, -R and -O have 200 each, and a model chooses among those only
(Hendrycks et al., 2021). ObjectNet is scored as in DataComp: the 113 classes that it shares with ImageNet, by its own
names. ReaL gives ImageNet's validation images several labels or none (Beyer et al., 2020).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipkit import embedded
from clipkit.errors import UserError
from clipkit.eval.classification.images import LabelledImages, select
from clipkit.formatting import counted

_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")
RELATIVES = ("imagenet1k", "imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "imagenet-o", "objectnet")
IN_DISTRIBUTION = "imagenet_val_for_imagenet_o_ood"
"""The folder beside ImageNet-O's with ImageNet's validation images of the same classes, as its authors' code has it."""


def class_ids(name: str) -> tuple[str, ...]:
    """The wnids that one of ImageNet's relatives has, in label order; ObjectNet's folders."""
    relatives = embedded.imagenet_relatives()
    if name == "objectnet":
        return tuple(relatives["objectnet"])
    wnids = [entry["wnid"] for entry in embedded.imagenet_classes()]
    return tuple(wnids[place] for place in relatives.get(name, range(len(wnids))))


def as_relative(images: LabelledImages, name: str, allow_empty_classes: bool) -> LabelledImages:
    """The images of one of RELATIVES with its classes as their labels, all of them, in order.

    Labels may be wnids, places among the classes of the set, places among ImageNet's, or names that the data list.
    Raises UserError for a class too many, for one that is missing (of class folders), and for another number of names.
    """
    ids = class_ids(name)
    names = images.label_names
    if images.are_numbers:
        thousand = class_ids("imagenet1k")
        last = int(images.labels_N.max())
        if last >= len(thousand):
            raise UserError(f"{images.path}: label {last}, but {name} has {len(ids):,} classes: mend the labels")
        names = ids if last < len(ids) else thousand
    elif name == "objectnet" and set(ids) <= set(names):
        keep_N = np.isin(np.array(names)[images.labels_N], ids)
        note = f"{images.path}: {(~keep_N).sum():,} images of the classes that ImageNet doesn't have are left aside"
        images = replace(select(images, keep_N), notes=(*images.notes, note))
    elif not set(names) & set(ids):
        if len(names) != len(ids):
            raise UserError(f"{images.path}: {len(names):,} classes, but {name} has {len(ids):,}: mend the names")
        return images
    place = {each: number for number, each in enumerate(ids)}
    number_L = np.array([place.get(each, -1) for each in names], dtype=np.int64)
    labels_N = number_L[images.labels_N]
    if labels_N.min() < 0:
        foreign = names[int(images.labels_N[labels_N.argmin()])]
        raise UserError(f"{images.path}: {foreign} is not among the {len(ids):,} classes of {name}: remove it")
    missing = sorted(set(ids) - set(names))
    if missing and not allow_empty_classes:
        raise UserError(
            f"{images.path} lacks {counted(len(missing), 'class', 'classes')} of {name}, such as {missing[0]}: add the "
            "folders, or give --allow-empty-classes"
        )
    return replace(images, labels_N=labels_N, label_names=ids, named=True)


def objectnet_names(folders: Sequence[str]) -> tuple[str, ...]:
    """ObjectNet's own names of its folders."""
    known = embedded.imagenet_relatives()["objectnet"]
    return tuple(known[folder]["name"] for folder in folders)


def real_labels(keys: Sequence[str]) -> list[list[int]] | None:
    """The ReaL labels of validation images, by their file names; None where the keys aren't those."""
    numbers = [_VALIDATION.search(key) for key in keys]
    if not all(numbers):
        return None
    labels = embedded.imagenet_real()
    return [labels[int(match[1]) - 1] for match in numbers if match]


def in_distribution_folder(path: Path) -> Path | None:
    """ImageNet's images of ImageNet-O's classes, where they are beside it."""
    folder = path.absolute().parent / IN_DISTRIBUTION
    return folder if folder.is_dir() else None
