"""`clipkit reinforce`: what teachers say of a few views of each image and of each caption, computed once and stored.

Part after part, each written beside and renamed: a run that was killed goes on behind its last whole part, and the
files are the same to the byte. Under torchrun each rank makes every so many-th part.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from clipkit.config import differences, to_json
from clipkit.device import Precision, pick
from clipkit.embedding.encoder import Compute, Encoder, check_finite, other_towers, towers_of
from clipkit.embedding.vectors import pad_rows, text_matrix
from clipkit.errors import UserError
from clipkit.formats.manifest import reinforced_folder
from clipkit.formatting import counted, size_text
from clipkit.interop.load import load
from clipkit.jobs.worker import cores
from clipkit.log import Progress
from clipkit.pixels.images import ImageError, UInt8Array
from clipkit.storage.files import clear_leftovers, lock, read_json, require_writable, save_array, write_json
from clipkit.train.augmentation import Augmentation
from clipkit.train.loader.augment import cut, geometry_draws, recolour
from clipkit.train.recipes import Recipe
from clipkit.train.sources.open import CACHE_GB, open_source
from clipkit.train.sources.source import Pair, Source
from clipkit.train.teachers.stored import (
    MANIFEST,
    PART_RECORDS,
    Manifest,
    Teacher,
    checksum,
    part_path,
    quantise,
)


@dataclass(frozen=True)
class ReinforceSummary:
    """What `reinforce` made."""

    path: Path
    records: int
    unreadable: int
    """Records without embeddings: the loader replaces them by others, as it does without teachers."""
    views: int
    teachers: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}

    def text(self) -> str:
        lost = f", {self.unreadable:,} that can't be read" if self.unreadable else ""
        what = f"{self.views} views of {self.records:,} records{lost}"
        return f"{self.path}: {what}, by {counted(self.teachers, 'teacher')}, in {size_text(self.bytes)}"


class Views(NamedTuple):
    """A record as teachers see it: its checksum, its captions, and its views, of each teacher's size."""

    checksum: int
    captions: tuple[str, ...]
    image_VHWC: dict[int, UInt8Array]


def reinforce(
    data: str | Path,
    out: Path | None,
    sources: Sequence[str],
    recipe: Recipe,
    *,
    views: int = 10,
    seed: int = 0,
    split: str = "train",
    cache: Path | None = None,
    cache_gb: float = CACHE_GB,
    ema: bool = False,
    precision: Precision = "float32",
    batch_size: int = 256,
    device: str = "auto",
    part_records: int = PART_RECORDS,
) -> ReinforceSummary:
    """Store the embeddings of all records of `data` by the models that `sources` name, under the recipe's augmentation.

    They go into `out`, or beside the dataset; `ema` takes the averages of the models' weights. The same command goes on
    where a killed one stopped. Raises UserError for other embeddings in that folder, and for what can't be read or
    loaded.
    """
    found = open_source(data, cache=cache, cache_gb=cache_gb, split=split)
    (part,) = found.parts
    if not found.has_images:
        raise UserError(f"{part.path} has stored vectors and no images: give the data that clipkit embed was given")
    augmentation = augmentation_of(recipe)
    where = pick(device)
    if where.world > 1 and where.mesh is not None:
        raise UserError("clipkit reinforce works on the chips of one TPU host: start it on one host of the pod")
    folder = require_writable(out or reinforced_folder(part.path))
    encoders = [load(source, ema=ema).to(where.torch_device) for source in sources]
    compute = Compute(replace(where, rank=0, world=1), precision, batch_size)
    described = tuple(describe(encoder, compute) for encoder in encoders)
    records = found.num_records
    manifest = Manifest(part.identity, records, described, augmentation, views, seed, part_records)
    if where.is_first:
        with lock(folder):
            begin(folder, manifest)
            clear_leftovers(folder)
    where.barrier()
    source = found.source()
    own = range(where.rank, manifest.parts, where.world)
    with Progress("reinforce", records, "records", quiet=not where.is_first) as progress:
        for number in own:
            if not part_path(folder, number).exists():
                rows = make_part(source, manifest, manifest.records_of(number), encoders, compute)
                save_array(part_path(folder, number), rows)
            progress.update(min(records, (number + 1) * part_records))
    where.barrier()
    paths = [part_path(folder, number) for number in range(manifest.parts)]
    unreadable = sum(int((~np.load(path, mmap_mode="r")["text"].any(axis=(1, 2))).sum()) for path in paths)
    size = sum(path.stat().st_size for path in paths)
    where.close()
    return ReinforceSummary(folder, records, unreadable, views, len(encoders), size)


def augmentation_of(recipe: Recipe) -> Augmentation:
    """What all stages of a recipe do to images. Raises UserError where they differ."""
    first, *others = recipe.stages
    for stage in others:
        other = differences(to_json(first.augmentation), to_json(stage.augmentation))
        if other:
            raise UserError(
                f"recipe {recipe.name}: stage {stage.name} has another augmentation than {first.name} ({other[0]}): "
                "give them one, for one set of views"
            )
    first.augmentation.check()
    return first.augmentation


def describe(encoder: Encoder, compute: Compute) -> Teacher:
    """A teacher as the manifest names it."""
    width = text_matrix(encoder, ["a"], compute).shape[1]
    precision = compute.device.arithmetic(compute.precision or encoder.precision)
    scale, preprocessing = float(encoder.scale), to_json(encoder.preprocess)
    length, towers = encoder.context_length, towers_of(encoder)
    return Teacher(encoder.name, encoder.weights, width, scale, preprocessing, length, precision, towers)


def begin(folder: Path, manifest: Manifest) -> None:
    """Write what the folder is to hold. Raises UserError where it holds something else."""
    path, wanted = folder / MANIFEST, to_json(manifest)
    if not path.exists():
        write_json(path, wanted)
        return
    there = read_json(path)
    for value in (there, wanted):
        for teacher in value["teachers"]:
            teacher.pop("name")
    towers = [[teacher.pop("towers", None) for teacher in value["teachers"]] for value in (there, wanted)]
    other = differences(there, wanted)
    if not other:
        found = [other_towers(*both) for both in zip(*towers, strict=True)]
        other = [f"teachers.{number}: {how}" for number, how in enumerate(found) if how]
    if other:
        raise UserError(f"{folder} has other embeddings ({other[0]}): choose another --out, or remove it")


def make_part(
    source: Source, manifest: Manifest, records: range, encoders: Sequence[Encoder], compute: Compute
) -> NDArray[Any]:
    """The rows of a part. A record that can't be read has zeros."""
    seen: list[Views] = []
    image_RVE = np.zeros((len(records), manifest.views, manifest.width), np.int8)
    for first, views in read_views(source, manifest, records, encoders, compute.batch_size):
        readable = [place for place, each in enumerate(views) if each.image_VHWC]
        seen += [each._replace(image_VHWC={}) for each in views]
        if readable:
            parts = []
            for encoder in encoders:
                size = encoder.preprocess.size
                image_BHWC = np.concatenate([views[place].image_VHWC[size] for place in readable])
                parts.append(quantise(embed(encoder, image_BHWC, compute)))
            found_BE = np.concatenate(parts, axis=1)
            image_RVE[[first + place for place in readable]] = found_BE.reshape(-1, *image_RVE.shape[1:])
    rows = np.zeros(len(records), manifest.dtype(max(1, *(len(each.captions) for each in seen))))
    rows["checksum"], rows["image"] = [each.checksum for each in seen], image_RVE
    places = [(row, number) for row, each in enumerate(seen) for number in range(len(each.captions))]
    if places:
        captions = [caption for each in seen for caption in each.captions]
        texts = [quantise(check_finite(text_matrix(each, captions, compute)).cpu().numpy()) for each in encoders]
        rows["text"][tuple(np.transpose(places))] = np.concatenate(texts, axis=1)
    return rows


def embed(encoder: Encoder, image_BHWC: UInt8Array, compute: Compute) -> NDArray[np.float32]:
    """Unit vectors of images, a batch at a time."""
    parts = []
    with encoder.evaluating():
        for start in range(0, len(image_BHWC), compute.batch_size):
            some_BHWC = image_BHWC[start : start + compute.batch_size]
            rows = pad_rows(some_BHWC, compute.batch_size) if compute.device.static_shapes else some_BHWC
            image_BE = encoder.image_features(compute.device.batch({"image": rows})["image"], compute)
            parts.append(image_BE[: len(some_BHWC)])
    return check_finite(torch.cat(parts)).cpu().numpy()


def read_views(
    source: Source, manifest: Manifest, records: range, encoders: Sequence[Encoder], batch_size: int
) -> Iterator[tuple[int, list[Views]]]:
    """The records a few at a time, with the place of the first; the next ones are decoded meanwhile on all cores."""
    sizes = sorted({encoder.preprocess.size for encoder in encoders})
    at_once = max(1, batch_size // manifest.views)
    with ThreadPoolExecutor(cores()) as pool:
        ahead: list[tuple[int, list[Future[Views]]]] = []
        for first in range(0, len(records), at_once):
            some = records[first : first + at_once]
            pairs = zip(some, source.pairs(some), strict=True)
            ahead.append((first, [pool.submit(view, manifest, sizes, record, pair) for record, pair in pairs]))
            if len(ahead) > 1:
                place, views = ahead.pop(0)
                yield place, [each.result() for each in views]
        for place, views in ahead:
            yield place, [each.result() for each in views]


def view(manifest: Manifest, sizes: Sequence[int], record: int, pair: Pair | UserError) -> Views:
    """A record's views, as the loader makes them. None, and no captions, where it can't be read."""
    if isinstance(pair, UserError):
        return Views(0, (), {})
    keys_V = manifest.view_keys(np.full(manifest.views, record), np.arange(manifest.views))
    image_VHWC = {size: np.empty((manifest.views, size, size, 3), np.uint8) for size in sizes}
    try:
        for size, out_VHWC in image_VHWC.items():
            for draws, out_HWC in zip(geometry_draws(keys_V).tolist(), out_VHWC, strict=True):
                cut(pair.image, size, manifest.augmentation, draws, out_HWC)
            recolour(out_VHWC, manifest.augmentation, keys_V)
    except (ImageError, cv2.error):
        return Views(checksum(pair), (), {})
    return Views(checksum(pair), pair.captions, image_VHWC)
