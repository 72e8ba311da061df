"""Training from stored vectors against training through the frozen image tower: B/16 at 224 px, on this machine.

Both sides read, make batches and take steps as a run does, in float32: one decodes JPEGs of 256 px and runs the image
tower, the other reads a file as `clipkit embed` writes it. Captions have some six words. The sides work in turn, round
after round, each on its own number of steps. Figures are samples/s as median (smallest to largest); so is the ratio, of
a round. What is trained is the text tower (B/16's, of 16 tokens), then only what follows its blocks, then a head (a
gated linear unit) on each tower, both frozen: then the one side runs both towers, and the other reads both vectors.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from support.pictures import jpegs

from clipkit.device import pick
from clipkit.eval.search.pictures import Picture
from clipkit.eval.search.vectors import KIND, open_writer, vector_schema, vector_table, write_rows
from clipkit.model.clip import build
from clipkit.model.config import HeadKind, ImageConfig, ModelConfig, TextConfig
from clipkit.train.augmentation import Augmentation
from clipkit.train.catalogue import debug
from clipkit.train.checks import loader_config, take_texts
from clipkit.train.loader.loader import batches
from clipkit.train.optimizer import make_optimizer
from clipkit.train.recipes import Recipe, model_at
from clipkit.train.sources.open import open_source
from clipkit.train.step import train_step

WORDS = [
    "a",
    "photo",
    "drawing",
    "of",
    "the",
    "small",
    "red",
    "old",
    "dog",
    "cat",
    "car",
    "house",
    "tree",
    "on",
    "in",
    "near",
    "water",
    "street",
]
WIDTH = 512
SIDES: tuple[tuple[str, int | bool, int], ...] = (
    ("text tower", 0, 8),
    ("what follows the text tower's blocks", 12, 24),
    ("heads on both towers", True, 96),
)


def recipe_of(frozen_text: int | bool, batch_size: int) -> Recipe:
    """B/16 with a frozen image tower, and so many frozen blocks of the text tower; or with heads on both."""
    head: HeadKind = "glu" if frozen_text is True else "none"
    text = TextConfig(context_length=16, frozen=frozen_text, head=head)
    model = ModelConfig(WIDTH, ImageConfig(frozen=True, head=head), text)
    stage = replace(
        debug().stages[1], image_size=224, context_length=16, batch_size=batch_size, position=None,
        augmentation=Augmentation(),
    )  # fmt: skip
    return replace(debug(), model=model, stages=(stage,), block_size=64)


def write_data(folder: Path, rows: int) -> tuple[Path, Path]:
    """Pairs, and vectors of as many."""
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(WORDS, 6)) + f" {number}" for number in range(rows)]
    pictures = jpegs(16)
    pairs, features = folder / "pairs.parquet", folder / "features.parquet"
    table = pa.table({"image": [pictures[number % 16] for number in range(rows)], "caption": captions})
    pq.write_table(table, pairs, row_group_size=256)
    schema = vector_schema(WIDTH, "float16", captioned=True)
    about = {
        "kind": KIND,
        "captioned": True,
        "image_weights": "random",
        "model": "random",
        "identity": "",
        "records": rows,
    }
    vector_NE = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    said = [Picture(b"", (caption,)) for caption in captions]
    with open_writer(features, schema, about) as writer:
        write_rows(writer, vector_table(schema, captions, said, vector_NE, vector_NE, {}))
    return pairs, features


class Side:
    """One side: its model and its loader stay from round to round."""

    def __init__(self, recipe: Recipe, data: Path) -> None:
        (stage,) = recipe.stages
        self.recipe, self.device = recipe, pick("cpu")
        self.model = build(model_at(recipe, stage)).train()
        self.model.freeze()
        self.optimizer = make_optimizer(self.model, recipe.optimizer, 1e-4, self.device)
        source = take_texts(open_source(data), recipe).source()
        self.loader = batches(source, loader_config(recipe, stage), workers=1)
        self.rates: list[float] = []

    def take(self, steps: int) -> float:
        """Samples/s over so many steps."""
        began = time.perf_counter()
        for batch in (next(self.loader) for _ in range(steps)):
            tensors = self.device.batch(batch.arrays())
            if "ids_BT" in tensors:
                tensors["length_B"] = torch.from_numpy(batch.length_B)
            train_step(self.model, self.optimizer, tensors, self.recipe, self.device).loss.item()
        return steps * self.recipe.stages[0].batch_size / (time.perf_counter() - began)


def shown(values: list[float]) -> str:
    """Median and spread."""
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds, batches of {options.batch_size}")
    with tempfile.TemporaryDirectory() as name:
        pairs, features = write_data(Path(name), 4096)
        for what, frozen, steps in SIDES:
            recipe = recipe_of(frozen, options.batch_size)
            uncached, cached = Side(recipe, pairs), Side(recipe, features)
            for side in (uncached, cached):
                side.take(1)
            ratios = []
            for _ in range(options.rounds):
                uncached.rates.append(uncached.take(1))
                cached.rates.append(cached.take(steps))
                ratios.append(cached.rates[-1] / uncached.rates[-1])
            print(f"{what}: through the image tower {shown(uncached.rates)}, from vectors {shown(cached.rates)}")
            print(f"{what}: ratio {shown(ratios)}", flush=True)
            uncached.loader.close()
            cached.loader.close()


if __name__ == "__main__":
    main()
