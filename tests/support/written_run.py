"""A run's folder with every part that a report shows, without training. The numbers are invented."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from clipkit.config import to_json
from clipkit.eval import results
from clipkit.eval.classification.task import GUESSES, PICTURE_PIXELS
from clipkit.eval.results import Result
from clipkit.intervals import wilson
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.pixels.images import thumbnail

MODEL = ModelConfig(
    embed_dim=16,
    image=ImageConfig(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2, class_token=True
    ),
    text=TextConfig(context_length=16, width=32, depth=1, heads=2),
)
STAGES = [
    {"name": "reduced", "samples": 8000, "batch_size": 100, "image_size": 32, "context_length": 8, "image_keep": 6},
    {"name": "full", "samples": 2000, "batch_size": 100, "image_size": 64, "context_length": 16, "image_keep": None},
]


def picture(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(run: Path, data: Path) -> Path:
    """A run with every part of the page filled. The numbers are invented."""
    run.mkdir(parents=True)
    config = {
        "clipkit": "0.1.0",
        "torch": "2.15.0",
        "recipe": {"name": "invented <recipe>", "model": to_json(MODEL), "stages": STAGES},
        "data": str(data),
        "dataset": {"name": "shapes", "split": "train", "records": 4},
        "device": {"kind": "cpu", "hardware": "CPU, 1 threads", "devices": 1, "arithmetic": "float32"},
    }
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = []
    for number in range(1, 101):
        seen = number * 100
        line = {
            "samples_seen": seen,
            "stage": "reduced" if seen <= 8000 else "full",
            "loss": 5 / number,
            "lr": 1e-3 / number,
        }
        line |= {
            "logit_scale": 14.0 + number,
            "grad_norm": 1.0,
            "samples_per_s": 50.0,
            "data_wait": 0.25,
            "seconds": number * 2.0,
        }
        lines.append(line)
        if number % 50 == 0:
            lines.append({"samples_seen": seen, "stage": "x", "shapes/top1": number / 400, "shapes/top5": number / 200})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rng = np.random.default_rng(0)
    names = [f"shape & <{number}>" for number in range(20)]
    rows: list[dict[str, Any]] = []
    for number in range(60):
        label, guesses = names[number % 20], [names[place] for place in rng.permutation(20)[:5]]
        image = thumbnail(picture((number * 4, 90, 200)), PICTURE_PIXELS)
        rows.append(
            {"key": str(number), "label": label, "correct": guesses[0] == label, "guesses": guesses, "image": image}
            | {"probabilities": [0.4, 0.2, 0.1, 0.05, 0.01], "problem": None}
        )
    bad = {"key": "bad.jpg", "label": names[0], "correct": False, "guesses": [], "image": None, "probabilities": []}
    rows.append(bad | {"problem": "not an image"})
    results.write_predictions(
        run / "predictions-shapes.parquet",
        pa.Table.from_pylist(rows, GUESSES),
        {"task": "shapes", "samples_seen": 10_000, "classes": 20},
    )
    hashes = {"classes": "0123456789abcdef", "templates": "b", "split": "c", "preprocessing": "d"}
    for metric, value, chance in (("top1", 0.25, 1 / 20), ("top5", 0.26, 5 / 20)):
        low, high = wilson(value, 60)
        made = Result(
            metric, value, low, high, 60, chance, 20, "shapes", "x", 10_000, "checkpoints/000000010000", hashes
        )
        results.write_results(run, [made])
    stages = [{"name": "download", "command": "x", "seconds": 12.0, "peak_memory_bytes": 10**8}]
    (run / "demo.json").write_text(json.dumps({"stages": stages}), encoding="utf-8")
    return run
