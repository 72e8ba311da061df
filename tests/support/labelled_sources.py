"""Small ImageNets for tests, in the layouts that people have."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from image_shards import picture
from PIL import Image

# Among the names that TFDS knows as CMYK, and the one PNG among ImageNet's JPEGs.
CMYK_NAME, PNG_NAME = "n01739381_1309.JPEG", "n02105855_2933.JPEG"


def cmyk_picture(size: int = 24) -> bytes:
    """A JPEG of four components, as Adobe's programs write them."""
    pixels_HW4 = np.random.default_rng(5).integers(0, 255, (size, size + 3, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW4, "CMYK").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def train_images(per_class: int = 5) -> dict[str, dict[str, bytes]]:
    """Images by wnid: four classes, among them a CMYK JPEG and a PNG under a JPEG's name."""
    images: dict[str, dict[str, bytes]] = {}
    for number, wnid in enumerate(("n02105855", "n01440764", "n01739381", "n15075141")):
        images[wnid] = {f"{wnid}_{i}.JPEG": picture(number * per_class + i) for i in range(per_class)}
    images["n01739381"][CMYK_NAME] = cmyk_picture()
    images["n02105855"][PNG_NAME] = picture(77, "PNG")
    return images


def validation_images(count: int = 6) -> dict[str, bytes]:
    """The heap of ImageNet's validation set, its first images."""
    return {f"ILSVRC2012_val_{i + 1:08d}.JPEG": picture(100 + i) for i in range(count)}


def write_official(
    folder: Path, train: Mapping[str, Mapping[str, bytes]] | None, validation: Mapping[str, bytes] | None
) -> Path:
    """`ILSVRC2012_img_train.tar`, a tar of class tars, and `ILSVRC2012_img_val.tar`."""
    folder.mkdir(parents=True, exist_ok=True)
    if train is not None:
        inner = {f"{wnid}.tar": tar_of(files) for wnid, files in train.items()}
        (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    if validation is not None:
        (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict(reversed(validation.items()))))
    return folder


def write_class_folders(folder: Path, images: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A folder for each class."""
    for name, files in images.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
    return folder


def write_heap(folder: Path, images: Mapping[str, bytes]) -> Path:
    """All images in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return folder


def write_devkit(folder: Path, wnids: Sequence[str], ids: Sequence[int], truth: Sequence[int]) -> Path:
    """`ILSVRC2012_devkit_t12.tar.gz` as the official one is made: `wnids[i]` has the id `ids[i]`, and there are
    synsets with children among the rest.
    """
    from scipy.io import savemat

    rows = [(number, wnid, "words", "gloss", 0, np.zeros(0), 0.0, 9) for number, wnid in zip(ids, wnids, strict=True)]
    rows += [(1001, "n00001740", "entity", "all", 2, np.array([1.0, 2.0]), 3.0, 0)]
    names = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in names])
    for i, row in enumerate(rows):
        synsets[i, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets}, do_compression=True)
    path = folder / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in {
            "data/meta.mat": meta.getvalue(),
            "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{each}\n" for each in truth).encode(),
        }.items():
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
