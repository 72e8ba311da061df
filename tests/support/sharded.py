"""Training on any number of ranks, of which each has the whole model (DDP) or a part of it (FSDP2), for
`ranks.run_ranks`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, Encoder
from clipkit.model.clip import CLIP, build
from clipkit.train import run
from clipkit.train.catalogue import debug
from clipkit.train.fit.setup import set_up
from clipkit.train.fit.trial import made_up_batch
from clipkit.train.loop import train
from clipkit.train.optimizer import make_optimizer
from clipkit.train.recipes import Recipe, model_at
from clipkit.train.step import train_step

WAYS = {
    "ddp": ["shard_weights=false"],
    "fsdp": ["shard_weights=true"],
    "fsdp in parts": ["shard_weights=true", "micro_batch=2", "checkpoint_activations=true"],
}
STEPS = 20


def take_steps(folder: Path) -> None:
    """Twenty steps of a batch of 16 in each of WAYS; writes their losses, gradient norms and first gradients."""
    device = pick("cpu")
    for way, settings in WAYS.items():
        small = ["model.text.vocab_size=99", "model.text.depth=1", "model.image.depth=1"]
        recipe = set_values(debug(), ["optimizer.grad_clip=1", *small, *settings])
        stage = recipe.stages[0]
        model = build(model_at(recipe, stage), seed=1)
        set_up(model, recipe, stage, device)
        is_sharded = any(isinstance(each, DTensor) for each in model.parameters())
        assert is_sharded == (device.world > 1 and recipe.shard_weights is True)
        optimizer, wrapped = make_optimizer(model, recipe.optimizer, 1e-4, device), device.wrap(model.train())
        gradients: dict[str, torch.Tensor] = {}

        handle = optimizer.register_step_pre_hook(partial(note_gradients, model, gradients))
        losses, norms = [], []
        for number in range(STEPS):
            torch.manual_seed(number)
            batch = made_up_batch(recipe, stage, 16, device.torch_device)
            rows = slice(device.rank * 16 // device.world, (device.rank + 1) * 16 // device.world)
            step = train_step(wrapped, optimizer, {name: all_B[rows] for name, all_B in batch.items()}, recipe, device)
            losses.append(device.mean(step.loss).item())
            norms.append(step.grad_norm.item())
            handle.remove()
        if device.is_first:
            torch.save({"losses": losses, "norms": norms, "gradients": gradients}, folder / f"{device.world} {way}")
    device.close()


def note_gradients(model: CLIP, gradients: dict[str, torch.Tensor], *_: object) -> None:
    """Keep the whole gradients by name."""
    for name, parameter in model.named_parameters():
        gradients[name] = checkpoint.whole(parameter.grad)


def sharded_recipe(*settings: str) -> Recipe:
    """A stage of six steps with all that is sharded: weights, moments, averages."""
    # Keys have no bias that matters: with a small eps, AdamW would learn it from the noise in its gradient.
    settings = ("stages.0.samples=96", "ema_decay=0.5", "optimizer.grad_clip=1", "optimizer.eps=0.001", *settings)
    recipe = set_values(debug(), ["shard_weights=true", "cadence.checkpoint_samples=32", *settings])
    return replace(recipe, stages=recipe.stages[:1], cadence=replace(recipe.cadence, keep_checkpoints=9))


def train_sharded(data: Path, folder: Path, *settings: str) -> None:
    """Begin a run of `sharded_recipe`, or go on with it. An evaluation is what the model makes of one grey image."""

    def grey(encoder: Encoder, _: object, compute: Compute) -> Iterator[tuple[str, Any]]:
        size = encoder.preprocess.size
        yield "grey/feature", encoder.model.encode_image(torch.ones(1, 3, size, size))[0, 0].item()
        yield "grey/ranks", len(set(compute.device.gather(encoder.weights)))

    run.evaluate = grey
    options = {"device_name": "cpu", "workers": 0, "resume": True, "task": object()}
    assert train(sharded_recipe(*settings), data, folder, **options).finished
