"""Runs on frozen towers: the recipe, images of its model's size, files of their vectors, and what runs left."""

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import load_file
from small_encoder import PREPROCESS, SMALL

from clipkit import checkpoint
from clipkit.cli.search import open_pictures
from clipkit.eval.search.embed import embed
from clipkit.log import read_metrics
from clipkit.train.augmentation import Augmentation
from clipkit.train.catalogue import debug
from clipkit.train.loop import train

CPU = {"device_name": "cpu", "workers": 1}
WHOLE = dataclasses.replace(debug().stages[1], image_size=32, samples=96, position=None, augmentation=Augmentation())
FROZEN = dataclasses.replace(
    debug(),
    model=dataclasses.replace(SMALL, image=dataclasses.replace(SMALL.image, frozen=True)),
    stages=(WHOLE,),
    mean=PREPROCESS.mean,
    std=PREPROCESS.std,
)


def png(number):
    buffer = io.BytesIO()
    pixels_HWC = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder, captions):
    """Images of the model's own size with these captions; number 5 can't be read."""
    data = [b"no image" if number == 5 else png(number) for number in range(len(captions))]
    path = folder / "pairs.parquet"
    pq.write_table(pa.table({"image": data, "caption": captions}), path, row_group_size=1)
    return path


def trained_on(folder, recipe, model, *data):
    """The folder of a run on each of `data`, named after its file."""
    for each in data:
        assert train(recipe, each, folder / each.stem, init=model, **CPU).finished
    return folder


def embedded(images, model, folder, **options):
    """The file of vectors of some images."""
    out = folder / "features.parquet"
    embed(open_pictures(str(images), None, None), out, str(model), device="cpu", part_rows=100, **options)
    return out


def rewritten(features, path, **changes):
    """A copy of a file whose description says something else."""
    table = pq.read_table(features)
    about = json.loads(table.schema.metadata[b"clipkit"]) | changes
    pq.write_table(table.replace_schema_metadata({b"clipkit": json.dumps(about)}), path)
    return path


def weights(run):
    return load_file(checkpoint.find(run) / "model.safetensors")


def losses(run):
    return [line["loss"] for line in read_metrics(run) if "loss" in line]
