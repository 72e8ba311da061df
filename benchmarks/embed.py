"""`embed` against the image tower's own rate: B/32 at 224 px in float32, on all cores of this machine.

The tower runs on random pixels that lie in memory, batch after batch; `embed` reads JPEGs of 256 px from class folders,
decodes and resizes them, and writes the file of vectors. Both work in turn on the same number of images, round after
round, the tower's half before and half after, so that a machine that slows down slows both. Figures are images/s; the
ratio is that of a round, as median (smallest to largest).
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from support.pictures import jpegs

from clipkit.device import pick
from clipkit.embedding.encoder import Compute, Encoder, clip_encoder
from clipkit.eval.classification.labelled import open_labelled
from clipkit.eval.search import embed as command
from clipkit.eval.search.pictures import labelled_pictures
from clipkit.model.clip import build
from clipkit.model.config import ImageConfig, ModelConfig
from clipkit.pixels.images import Preprocess
from clipkit.text.tokenizer import Tokenizer


def tower_seconds(encoder: Encoder, images: int, batch_size: int) -> float:
    """The tower alone, on pixels that are there."""
    compute = Compute(pick("cpu"), batch_size=batch_size)
    pixels = torch.randint(0, 256, (batch_size, 224, 224, 3), dtype=torch.uint8)
    start = time.perf_counter()
    with encoder.evaluating():
        for first in range(0, images, batch_size):
            encoder.image_features(pixels[: min(batch_size, images - first)], compute)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    config = ModelConfig(512, ImageConfig("vit_base_patch32_224", image_size=224, patch_size=32))
    encoder = clip_encoder(build(config, seed=0).eval(), Tokenizer(), Preprocess(), precision="float32", name="B/32")
    command.load = lambda *arguments, **how: encoder  # the rate doesn't include loading
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images" / "a"
        folder.mkdir(parents=True)
        for number, data in enumerate(jpegs(16)):
            for copy in range(number, options.images, 16):
                (folder / f"{copy:06d}.jpg").write_bytes(data)
        pictures = labelled_pictures(open_labelled(folder.parent))
        rates, ratios = np.zeros((options.rounds, 2)), []
        tower_seconds(encoder, options.batch_size, options.batch_size)
        for number in range(options.rounds):
            before = tower_seconds(encoder, options.images // 2, options.batch_size)
            start = time.perf_counter()
            out = Path(name) / f"{number}.parquet"
            command.embed(pictures, out, "B/32", device="cpu", batch_size=options.batch_size)
            seconds = time.perf_counter() - start
            tower = before + tower_seconds(encoder, options.images - options.images // 2, options.batch_size)
            rates[number] = options.images / tower, options.images / seconds
            ratios.append(tower / seconds)
    tower_rate, embed_rate = np.median(rates, axis=0)
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds of {options.images} images")
    print(f"tower {tower_rate:.1f} images/s   embed {embed_rate:.1f} images/s")
    print(f"embed / tower {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
