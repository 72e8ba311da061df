"""Runs in the environment of torch_xla, and prints one line of JSON: what the trainer does there on several devices.

python xla_side.py DATA OUT
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
from clipkit.train.recipes import model_at
from clipkit.train.step import train_step


def train_on_smaller_batches(data: Path, out: Path) -> str:
    """The error of a run whose last batch is smaller."""
    place, batches = Device.batch, 0

    def shrink(self: Device, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        nonlocal batches
        batches += 1
        return place(self, {name: array[: 8 if batches > 19 else None] for name, array in arrays.items()})

    try:
        with patch.object(Device, "batch", shrink):
            train(debug(), data, out, device_name="tpu", workers=0)
    except UserError as error:
        return str(error)
    return ""


def small_model() -> CLIP:
    """The debug recipe's at its last stage."""
    return build(model_at(debug(), debug().stages[-1]), seed=1)


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
    recipe = replace(debug(), micro_batch=micro_batch, optimizer=replace(debug().optimizer, grad_clip=None))
    train_step(model, optimizer, device.batch(made_up_batch()), recipe, device)
    return torch.cat(found).cpu()


def shards_by_itself(device: Device, memory: float | None) -> bool:
    """Whether weights are sharded where nobody says so, on chips with so many bytes of memory."""
    with patch.object(Device, "memory", lambda _: memory):
        return is_sharding(debug(), debug().stages[-1], device)


def sharded_shares(device: Device) -> list[float]:
    """Of the matrices of a model on chips that it would fill, and of each of AdamW's moments after two steps, the part
    that is sharded.
    """
    import torch_xla

    model, (stage,) = small_model().train(), debug().stages[-1:]
    with patch.object(Device, "memory", lambda _: 100e6):
        set_up(model, debug(), stage, device)
    optimizer = make_optimizer(model, debug().optimizer, stage.learning_rate, device)
    for _ in range(2):
        train_step(model, optimizer, device.batch(made_up_batch()), replace(debug(), micro_batch=None), device)
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
    encoder = clip_encoder(small_model(), Tokenizer(), preprocess_at(debug(), debug().stages[-1]))
    return list(evaluate(encoder.to(device.torch_device), emoji_task(out), Compute(device, batch_size=32)))


if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    device, cpu = pick("tpu"), pick("cpu")
    whole = gradients(cpu, None)
    print(
        json.dumps(
            {
                "smaller_batches": train_on_smaller_batches(data, out / "smaller"),
                "largest_gradient": float(whole.abs().max()),
                "micro_batch_error": float((gradients(device, 2) - whole).abs().max()),
                "sharded_shares": sharded_shares(device),
                "shards_by_itself": [shards_by_itself(device, memory) for memory in (None, 100e6, 16e9)],
                "counts": counts(device, out),
                "counts_on_cpu": counts(cpu, out),
            }
        )
    )
