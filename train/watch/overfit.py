"""A health check before a long run: can the recipe's towers learn a few samples of the data by heart?

One fixed batch is taken again and again. Where model, loss, optimizer and data work together, its loss goes to nearly
zero and every image finds its caption within some hundred steps. Where they don't, no run will learn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.log import Progress
from clipkit.model.clip import build
from clipkit.text.vocabulary import open_tokenizer
from clipkit.train.checks import check_recipe, check_tokenizer, loader_config
from clipkit.train.loader.loader import batches
from clipkit.train.optimizer import learning_rate_at, make_optimizer
from clipkit.train.recipes import Distill, Recipe, model_at
from clipkit.train.sources.open import CACHE_GB, open_source
from clipkit.train.step import train_step
from clipkit.train.watch.metrics import batch_accuracy

STEPS, LOOK_EVERY, WARMUP_STEPS = 500, 10, 20
MOST_LEARNING_RATE = 1e-3  # peaks are meant for batches of thousands
LEARNED_ACCURACY, LEARNED_LOSS = 0.95, 0.1  # the loss as a share of the first one


def overfit_recipe(recipe: Recipe, samples: int) -> Recipe:
    """The first stage only, as one batch and without teachers. Pairs of one caption, which nothing could tell apart,
    aren't negatives.
    """
    stage = replace(
        recipe.stages[0],
        samples=samples,
        batch_size=samples,
        learning_rate=min(recipe.stages[0].learning_rate, MOST_LEARNING_RATE),
        warmup_samples=0,
    )
    alone = replace(recipe.global_contrastive, reference=False)
    recipe = replace(recipe, distill=Distill(), global_contrastive=alone)
    return replace(recipe, stages=(stage,), same_caption="ignore", micro_batch=None)


@dataclass(frozen=True)
class Overfit:
    """How it went."""

    samples: int
    steps: int
    first_loss: float
    loss: float
    accuracy: float
    """The share of images and captions that found each other, whichever is lower."""
    is_first: bool
    """Whether this is the first rank, which prints the outcome."""

    @property
    def learned(self) -> bool:
        """Whether the samples were learned by heart."""
        return self.accuracy >= LEARNED_ACCURACY and self.loss <= LEARNED_LOSS * self.first_loss

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "is_first"} | {"learned": self.learned}

    def __str__(self) -> str:
        numbers = (
            f"loss {self.first_loss:.3f} -> {self.loss:.3f}, {self.accuracy:.0%} matched, "
            f"after {self.steps} steps on {self.samples} samples"
        )
        if self.learned:
            return f"good: {numbers}"
        return (
            f"not learned: {numbers}; look whether images or captions (or their first tokens) are the same, "
            "what is frozen, and whether the learning rate is far off"
        )


def overfit(
    recipe: Recipe,
    data: str | Path | Sequence[str | Path],
    samples: int,
    *,
    device_name: str = "auto",
    cache: Path | None = None,
    cache_gb: float = CACHE_GB,
    split: str = "train",
    vocabulary: Path | None = None,
) -> Overfit:
    """Train as in the recipe's first stage on the first `samples` that a run would see, cropped and shortened once and
    for all, until they are learned or STEPS are taken. Nothing is written. The rest is as for `train`.
    """
    found = open_source(data, cache=cache, cache_gb=cache_gb, block_size=recipe.block_size, split=split)
    if not found.has_images:
        raise UserError("this tries the whole model on images: give the data that clipkit embed was given")
    device = pick(device_name)
    recipe = overfit_recipe(recipe, min(samples, found.num_records) // device.shards * device.shards)
    check_recipe(recipe, found.source(), device)
    tokenizer = open_tokenizer(recipe.model.text.tokenizer, vocabulary)
    check_tokenizer(recipe, tokenizer)
    (stage,) = recipe.stages
    model = build(model_at(recipe, stage), seed=recipe.seed)
    model.freeze()
    model.to(device.torch_device).train()
    optimizer = make_optimizer(model, recipe.optimizer, stage.learning_rate, device)
    loader = batches(
        found.source(),
        loader_config(recipe, stage),
        0,
        stage.batch_size,
        rank=device.rank,
        world=device.world,
        workers=0,
        tokenizer=tokenizer,
    )
    wrapped, arrays = device.wrap(model), next(loader).arrays()
    first_loss = loss = accuracy = math.nan
    with Progress("overfit", STEPS, "steps", quiet=not device.is_first) as progress:
        for number in range(STEPS):
            rate = learning_rate_at(
                number, 1, peak=stage.learning_rate, warmup=WARMUP_STEPS, total=STEPS, schedule="constant"
            )
            device.set_learning_rate(optimizer, rate)
            batch = device.batch(arrays)
            step = train_step(wrapped, optimizer, batch, recipe, device)
            if number == 0 or (number + 1) % LOOK_EVERY == 0:
                shares = batch_accuracy(step, batch["caption_B"], recipe.same_caption, gather=device.gathers)
                loss, *both = (device.mean(each).item() for each in (step.loss, *shares))
                accuracy, first_loss = min(both), loss if number == 0 else first_loss
                result = Overfit(stage.batch_size, number + 1, first_loss, loss, accuracy, device.is_first)
                progress.update(number + 1, f"loss {loss:.3f} · {accuracy:.0%} matched")
                if result.learned or not math.isfinite(loss):
                    break
    device.close()
    return result
