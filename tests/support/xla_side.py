"""Runs in the environment of torch_xla, and prints one line of JSON: what the trainer does there.

`python xla_side.py four DATA OUT` on several devices, and then `python xla_side.py one DATA OUT` on one: each process
takes seconds to begin, so it makes several runs.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch

from clipkit import embedded
from clipkit.cli.main import main
from clipkit.config import set_values
from clipkit.device import Device, pick
from clipkit.embedding.encoder import Compute, clip_encoder
from clipkit.errors import UserError
from clipkit.eval.classification.task import Classification, open_task
from clipkit.eval.evaluation import evaluate
from clipkit.model.clip import CLIP, build
from clipkit.text.tokenizer import Tokenizer
from clipkit.train.catalogue import debug
from clipkit.train.checks import preprocess_at
from clipkit.train.fit.setup import is_sharding, set_up
from clipkit.train.loop import train
from clipkit.train.optimizer import make_optimizer
from clipkit.train.recipes import Recipe, model_at
from clipkit.train.step import train_step

ROUNDED = "optimizer.mu_dtype=bfloat16"
SMALL = ("model.image.depth=1", "stages.0.samples=96", "stages.1.samples=96")
SHARDED = ("--set=shard_weights=true", f"--set={ROUNDED}")


def small() -> Recipe:
    """The debug recipe with half as many blocks and steps: XLA takes a while to compile for a CPU, and to compute."""
    return set_values(debug(), SMALL)


def train_by_command(data: Path, out: Path, *options: str) -> int:
    """`clipkit train` as it is typed; how often this process has compiled by its end."""
    arguments = ["train", "--data", str(data), "--recipe", "debug", "--device", "tpu", "--workers", "1"]
    arguments += [f"--set={setting}" for setting in SMALL]
    main([*arguments, "--out", str(out), *options], standalone_mode=False)
    return pick("tpu").compilations()


def last_stage() -> Recipe:
    """Its last stage, as all of a run."""
    return replace(small(), stages=small().stages[-1:])


def train_on_smaller_batches(data: Path, out: Path) -> str:
    """The error of a run whose last batch is smaller."""
    place, batches, steps = Device.batch, 0, last_stage().samples // 16

    def shrink(self: Device, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        nonlocal batches
        batches += 1
        return place(self, {name: array[: 8 if batches == steps else None] for name, array in arrays.items()})

    try:
        with patch.object(Device, "batch", shrink):
            train(last_stage(), data, out, device_name="tpu", workers=0)
    except UserError as error:
        return str(error)
    return ""


def small_model() -> CLIP:
    """The recipe's at its last stage."""
    return build(model_at(small(), small().stages[-1]), seed=1)


def made_up_batch() -> dict[str, np.ndarray]:
    """Sixteen pairs."""
    random = np.random.default_rng(0)
    return {
        "image_BHWC": random.integers(0, 256, (16, 48, 48, 3), dtype=np.uint8),
        "ids_BT": random.integers(1, 49408, (16, 16), dtype=np.int32),
        "caption_B": np.arange(16) // 2,
    }


def gradients(device: Device, micro_batch: int | None) -> torch.Tensor:
    """float32[N], all gradients of one step after each other."""
    model, found = small_model().to(device.torch_device).train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.extend(each.grad.flatten() for each in model.parameters()))
    recipe = replace(small(), micro_batch=micro_batch, optimizer=replace(small().optimizer, grad_clip=None))
    train_step(model, optimizer, device.batch(made_up_batch()), recipe, device)
    return torch.cat(found).cpu()


def shards_by_itself(device: Device, memory: float | None) -> bool:
    """Whether weights are sharded where nobody says so, on chips with so many bytes of memory."""
    with patch.object(Device, "memory", lambda _: memory):
        return is_sharding(small(), small().stages[-1], device)


def sharded_shares(device: Device) -> list[float]:
    """Of the matrices of a model on chips that it would fill, and of each of AdamW's moments after two steps, the part
    that is sharded.
    """
    import torch_xla

    model, (stage,) = small_model().train(), small().stages[-1:]
    with patch.object(Device, "memory", lambda _: 100e6):
        set_up(model, small(), stage, device)
    optimizer = make_optimizer(model, small().optimizer, stage.learning_rate, device)
    for _ in range(2):
        train_step(model, optimizer, device.batch(made_up_batch()), replace(small(), micro_batch=None), device)
    matrices = [each for each in model.parameters() if each.dim() > 1]
    kept = [[optimizer.state[each][name] for each in matrices] for name in ("exp_avg", "exp_avg_sq")]
    specs = [[torch_xla._XLAC._get_xla_sharding_spec(each) for each in tensors] for tensors in (matrices, *kept)]
    return [sum("devices=" in spec for spec in each) / len(each) for each in specs]


def emoji_task(folder: Path) -> Classification:
    """To tell 70 emoji apart."""
    data = folder / "emoji.parquet"
    pq.write_table(pq.read_table(embedded.emoji_parquet("heldout")).slice(0, 70), data)
    return open_task(data, templates_name="openai-7")


def counts(device: Device, out: Path) -> list[object]:
    """What an evaluation finds."""
    encoder = clip_encoder(small_model(), Tokenizer(), preprocess_at(small(), small().stages[-1]))
    return list(evaluate(encoder.to(device.torch_device), emoji_task(out), Compute(device, batch_size=32)))


def on_several_devices(data: Path, out: Path) -> dict[str, object]:
    """A run with sharded weights, one with whole ones, and what else is done there."""
    compilations = train_by_command(data, out / "sharded", *SHARDED)
    device, cpu = pick("tpu"), pick("cpu")
    whole = gradients(cpu, None)
    return {
        "compilations": compilations,
        "smaller_batches": train_on_smaller_batches(data, out / "smaller"),
        "largest_gradient": float(whole.abs().max()),
        "micro_batch_error": float((gradients(device, 2) - whole).abs().max()),
        "sharded_shares": sharded_shares(device),
        "shards_by_itself": [shards_by_itself(device, memory) for memory in (None, 100e6, 16e9)],
        "counts": counts(device, out),
        "counts_on_cpu": counts(cpu, out),
    }


def on_one_device(data: Path, out: Path) -> dict[str, object]:
    """A run in micro-batches; and the sharded run, of which the end is missing by now."""
    # torch's own way of computing activations again doesn't know XLA. Micro-batches are compiled by themselves: the
    # cut, the features, the loss, and the first, the middle and the last one's gradients.
    settings = ("--set", "checkpoint_activations=true", "--set", "micro_batch=4")
    compilations = train_by_command(data, out / "parts", *settings)
    train_by_command(data, out / "sharded", *SHARDED, "--resume")
    return {"compilations": compilations}


if __name__ == "__main__":
    found = {"four": on_several_devices, "one": on_one_device}[sys.argv[1]](*map(Path, sys.argv[2:]))
    print(json.dumps(found))
