"""A training step against OpenCLIP's: its own `train_one_epoch` in clipkit's arithmetic, and as it runs by default.

Data are made on the device, so nothing but the step counts. All sides have the same towers and batch and work in turn
in one process, round after round; ratios are those of a round, as median (smallest to largest). On a GPU clipkit runs
as a recipe's `auto` has it, compiled, and OpenCLIP with `--torchcompile`. Without one, figures are the CPU's and say
nothing about GPUs.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import open_clip
import torch
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch

from clipkit.device import Device, pick
from clipkit.model.clip import build
from clipkit.train.catalogue import find_recipe
from clipkit.train.fit.setup import set_up
from clipkit.train.fit.stages import fit_stages
from clipkit.train.fit.trial import made_up_batch
from clipkit.train.optimizer import make_optimizer
from clipkit.train.recipes import Recipe, model_at
from clipkit.train.step import train_step

Step = Callable[[], object]
# OpenCLIP's name of the towers of each recipe, which is taken at its first stage.
MODELS = {
    "clipa-b16-i50-t16": "ViT-B-16",
    "clipa-l16-i17-t16": "ViT-L-16",
    "clipa-l16-i37-t8": "ViT-L-16",
    "clipa-h14-laion2b": "ViT-H-14",
}


class Batches:
    """What OpenCLIP takes for its data: the same batch, once."""

    num_batches = 1

    def __init__(self, image_BCHW: torch.Tensor, ids_BT: torch.Tensor) -> None:
        self.batch, self.num_samples, self.dataloader = (image_BCHW, ids_BT), len(ids_BT), self

    def set_epoch(self, epoch: int) -> None:
        """Nothing to shuffle."""

    def __iter__(self) -> Any:
        return iter([self.batch])


def our_step(recipe: Recipe, batch: dict[str, torch.Tensor], device: Device) -> tuple[Step, str]:
    """clipkit's step on this device as a run takes it, and its arithmetic."""
    stage = recipe.stages[0]
    fitted = fit_stages(recipe, 0, device, {})[stage.name].apply(recipe)
    model = build(model_at(recipe, stage))
    set_up(model, fitted, stage, device)
    model.train()
    optimizer = make_optimizer(model, recipe.optimizer, stage.learning_rate, device)
    return lambda: train_step(model, optimizer, batch, fitted, device).loss.item(), str(fitted.precision)


def their_step(recipe: Recipe, name: str, batch: dict[str, torch.Tensor], device: Device, *flags: str) -> Step:
    """OpenCLIP's step at the recipe's sizes, with its trainer's flags."""
    stage = recipe.stages[0]
    args = parse_args(["--model", name, "--batch-size", str(stage.batch_size), "--skip-scheduler", *flags])
    args.device, args.rank, args.world_size = str(device.torch_device), 0, 1
    args.distill = args.wandb = False
    model = open_clip.create_model(
        name, force_image_size=stage.image_size, force_context_length=stage.context_length, output_dict=True,
        load_weights=False,
    ).to(device.torch_device)  # fmt: skip
    if args.torchcompile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device=args.device) if args.precision == "amp" else None
    images_BCHW = batch["image_BHWC"].permute(0, 3, 1, 2).float() / 255
    data, loss = {"train": Batches(images_BCHW, batch["ids_BT"].long())}, open_clip.ClipLoss()
    return lambda: train_one_epoch(model, data, loss, 0, optimizer, scaler, None, None, args)


def measure(sides: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's steps, in turn, after two steps to warm up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            if number >= 2:
                found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=tuple(MODELS), default="clipa-b16-i50-t16")
    parser.add_argument("--batch", type=int, default=16, help="pairs")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--default", action="store_true", help="OpenCLIP's float16 on a CPU too: minutes for a step")
    options = parser.parse_args()
    logging.disable()
    device, recipe = pick(), find_recipe(options.recipe)
    stage = replace(recipe.stages[0], batch_size=options.batch, image_keep=None, image_reduction=None)
    recipe = replace(recipe, stages=(stage,))
    batch = made_up_batch(recipe, stage, options.batch, device.torch_device)
    ours, arithmetic = our_step(recipe, batch, device)
    same = "fp32" if arithmetic == "float32" else "amp_bf16"
    best = ["--torchcompile"] if device.compiles("auto") else []
    name = MODELS[options.recipe]
    sides = {
        f"clipkit, {arithmetic}": ours,
        f"openclip, {same}": their_step(recipe, name, batch, device, "--precision", same, *best),
    }
    if options.default or device.survives_want_of_memory:
        sides["openclip, amp (its default)"] = their_step(recipe, name, batch, device)
    print(f"{options.recipe}: {device.hardware()}, batches of {options.batch} pairs, {options.rounds} rounds")
    found = measure(sides, options.rounds)
    own, *_ = found.values()
    for name, seconds in found.items():
        ratios = [theirs / mine for theirs, mine in zip(seconds, own, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rate = options.batch / statistics.median(seconds)
        print(f"{name:28}{rate:8.2f} samples/s" + ("" if seconds is own else f"   clipkit is {spread} times as fast"))
    if not device.survives_want_of_memory:
        print("no GPU here: figures of GPUs, of L/16, H/14 and full-length B/16, and their MFU are missing")


if __name__ == "__main__":
    main()
