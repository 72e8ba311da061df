"""Steps of a stage on pairs that are made up on the device: no data, but the shapes and the memory of the real ones."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from clipkit.device import Device
from clipkit.model.clip import build
from clipkit.model.distill import TeacherSpace
from clipkit.train.fit.setup import set_up
from clipkit.train.optimizer import copy_for_average, keep_average, make_optimizer
from clipkit.train.recipes import Recipe, Stage, model_at
from clipkit.train.step import train_step


def trial_step(recipe: Recipe, stage: Stage, pairs: int, device: Device) -> Callable[[Recipe], None]:
    """A function that takes two steps of the stage on so many pairs of this device, as a recipe says that differs from
    `recipe` in the arithmetic only, and waits for them. The second step has the optimizer's state.
    """
    model = build(model_at(recipe, stage), seed=recipe.seed)
    model.freeze()
    average = None if recipe.ema_decay is None else copy_for_average(model)
    for each in (model, average) if average else (model,):
        set_up(each, recipe, stage, device)
    wrapped = device.wrap(model)
    optimizer = make_optimizer(model, recipe.optimizer, stage.learning_rate, device)
    if average and recipe.ema_decay is not None:
        keep_average(average, model, optimizer, recipe.ema_decay)
    model.train()
    batch = made_up_batch(recipe, stage, pairs, device.torch_device)
    teachers = made_up_teachers(recipe)

    def step(tried: Recipe) -> None:
        for _ in range(2):
            loss = train_step(wrapped, optimizer, batch, tried, device, teachers).loss
        loss.item()

    return step


def step_times(recipe: Recipe, stage: Stage, pairs: int, device: Device, seconds: float) -> list[float]:
    """The seconds of a step, measured again and again for so long, with all `pairs` at once."""
    whole = replace(recipe, micro_batch=None)
    steps = trial_step(whole, stage, pairs, device)
    for _ in range(2):  # to warm up
        steps(whole)
    spent: list[float] = []
    while 2 * sum(spent) < seconds:
        began = time.perf_counter()
        steps(whole)
        spent.append((time.perf_counter() - began) / 2)
    return spent


def made_up_teachers(recipe: Recipe) -> tuple[TeacherSpace, ...]:
    """One of the model's own width where the recipe has teachers: theirs is a small part of a step at any width."""
    return (TeacherSpace(recipe.model.embed_dim, 100.0),) if recipe.has_teachers else ()


def made_up_batch(recipe: Recipe, stage: Stage, pairs: int, where: torch.device) -> dict[str, torch.Tensor]:
    """Pairs of random pixels and ids in a stage's shapes, made on the device, for `train_step`."""
    size, length, vocabulary = stage.image_size, stage.context_length, recipe.model.text.vocab_size
    ids_BT = torch.randint(1, vocabulary - 1, (pairs, length), device=where)
    ids_BT[:, -1] = vocabulary - 1  # the end token of clip-bpe is the largest id
    batch = {
        "image_BHWC": torch.randint(0, 256, (pairs, size, size, 3), dtype=torch.uint8, device=where),
        "ids_BT": ids_BT,
        "caption_B": torch.arange(pairs, device=where),
    }
    if teachers := made_up_teachers(recipe):
        widths = sum(teacher.width for teacher in teachers)
        batch["teacher_B2E"] = torch.randint(-127, 128, (pairs, 2, widths), dtype=torch.int8, device=where)
    if stage.image_keep is not None:
        batch["keep_BK"] = torch.arange(stage.image_keep, device=where).expand(pairs, -1)
    return batch
