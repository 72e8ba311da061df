"""What a recipe's stages cost on given chips: hours, money, memory, data, cores and disk, and what limits them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from clipkit.errors import UserError
from clipkit.hardware import Chip
from clipkit.train.plan.step import HOST, Calibration, Parts, Step, moving_seconds, towers_of
from clipkit.train.recipes import Recipe, Stage, model_at

# The loader's processor time a sample, in µs, of 256 px JPEGs at the input's side: docs/performance.md, one EPYC core.
LOADER_US, LOADER_US_PER_PIXEL = 177.0, 0.48
PAIR_BYTES = 35_000  # an image of 256 px at quality 95, its caption and its columns: docs/scaling.md
COMPACT_BYTES = 9_000  # of 128 px at quality 90
# Stored teachers: two ViT-L/14 at 224 px, a byte a number, forward passes.
TEACHER_VIEWS, TEACHER_WIDTH, TEACHER_IMAGE_FLOPS, TEACHER_TEXT_FLOPS = 10, 2 * 768, 2 * 162e9, 2 * 13e9


class Fleet(NamedTuple):
    """The chips of a run and what one costs an hour."""

    number: int
    chip: Chip
    price: float


class Pairs(NamedTuple):
    """What a run trains on: so many pairs of so many bytes."""

    total: float | None
    bytes_each: float
    where: str


@dataclass(frozen=True)
class StageCost:
    """One stage; times include the calibration's overhead."""

    name: str
    samples: int
    step: Step
    micro_batch: int
    """Pairs that go through the towers of a chip at once; the recipe's own, or the most that fits."""
    operations: Parts
    """Of the whole stage."""
    seconds: Parts
    """Of the whole stage, by part."""
    moving: float
    """Seconds of the towers' parts that go into moving bytes."""
    loader_us: float
    bytes_each: float

    @property
    def hours(self) -> float:
        """Wall clock."""
        return sum(self.seconds) / 3600

    @property
    def samples_per_s(self) -> float:
        """Over all chips."""
        return self.samples / sum(self.seconds)

    @property
    def mfu(self) -> float:
        """Model operations (towers, three times forward) to the chips' dense bfloat16 peak."""
        towers = self.operations.image + self.operations.text
        return towers / sum(self.seconds) / (self.step.chips * self.step.chip.tflops * 1e12)

    @property
    def cores(self) -> int:
        """Loader cores that keep up, over all hosts."""
        return max(1, math.ceil(self.samples_per_s * self.loader_us * 1e-6))

    @property
    def data_mb_per_s(self) -> float:
        """Read from disk or network."""
        return self.samples_per_s * self.bytes_each / 1e6

    def limit(self) -> str:
        """What most of the time goes into."""
        parts, towers = self.seconds, self.seconds.image + self.seconds.text + self.seconds.recomputation
        shares = {
            "matrix products": towers - self.moving,
            "element-wise work (memory bandwidth)": self.moving,
            "the loss": parts.loss,
            "the optimizer": parts.optimizer,
            "the links between chips": parts.collectives,
        }
        name = max(shares, key=lambda each: shares[each])
        return f"{name}, {shares[name] / sum(parts):.0%} of the time"


def stage_plan(recipe: Recipe, stage: Stage, fleet: Fleet, pairs: Pairs, calibration: Calibration) -> StageCost:
    """One stage on the fleet. Raises UserError where a batch can't be divided over the chips or nothing fits."""
    where = f"recipe {recipe.name}, stage {stage.name}"
    if stage.batch_size % fleet.number or stage.batch_size < fleet.number:
        raise UserError(f"{where}: batch_size {stage.batch_size} can't be divided over {fleet.number} devices")
    model, is_cpu = model_at(recipe, stage), fleet.chip.name == "cpu"
    try:
        towers = towers_of(model, stage.image_keep)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    is_float32 = recipe.precision == "float32" or (recipe.precision == "auto" and is_cpu)
    asked = None if recipe.micro_batch == "auto" else recipe.micro_batch
    step = Step(
        towers, model.embed_dim, stage.image_size, fleet.chip, fleet.number, stage.batch_size,
        recipe.checkpoint_activations is True, is_float32, calibration, asked,
        recipe.optimizer.state_bytes,
    )  # fmt: skip
    if recipe.checkpoint_activations == "auto":
        step = with_activations(step)
    fits = step.micro_batch()
    if not fits:
        raise UserError(
            f"{where}: not one pair fits into {fleet.chip.memory_gb:.0f} GB beside {step.fixed_bytes() / 1e9:.0f} GB "
            "of weights, optimizer, features and logits: use more or larger devices, or a smaller batch_size"
        )
    steps = stage.samples / stage.batch_size
    forwards = [(1 if tower.frozen else 3 + step.extra_forwards()) for tower in towers]
    moving = sum(
        count * moving_seconds(tower, fleet.chip, calibration, is_float32)
        for count, tower in zip(forwards, towers, strict=True)
    )
    return StageCost(
        stage.name,
        stage.samples,
        step,
        min(fits, asked or fits),
        Parts(*(part * steps for part in step.operations())),
        Parts(*(part * steps for part in step.seconds())),
        moving * step.share * steps * (1 + calibration.overhead),
        LOADER_US + LOADER_US_PER_PIXEL * stage.image_size,
        pairs.bytes_each,
    )


def with_activations(step: Step) -> Step:
    """The step with its activations kept, or computed again where that lets more of a share go at once: as training
    decides it (`train/fit`).
    """
    kept, again = step, replace(step, recompute=True)
    needed = min(step.micro_asked or step.share, step.share)
    is_better = again.micro_batch() >= needed > kept.micro_batch() or not kept.micro_batch()
    return again if is_better else kept


def found_by_training(recipe: Recipe, stages: Sequence[StageCost]) -> list[str]:
    """What the recipe leaves to the machine, and what the plan takes it to find."""
    if "auto" not in (recipe.micro_batch, recipe.checkpoint_activations):
        return []
    return [
        f"stage {cost.name}: training finds that {cost.micro_batch:,} of a device's {cost.step.share:,} pairs go at "
        f"once, activations {'computed again' if cost.step.recompute else 'kept'} (yours: --set micro_batch, "
        "checkpoint_activations)"
        for cost in stages
    ]


def recipe_plan(recipe: Recipe, fleet: Fleet, pairs: Pairs, calibration: Calibration) -> tuple[StageCost, ...]:
    """All stages of a recipe. Raises as `stage_plan`."""
    return tuple(stage_plan(recipe, stage, fleet, pairs, calibration) for stage in recipe.stages)


def checkpoint_bytes(recipe: Recipe, stages: Sequence[StageCost]) -> float:
    """What a run's checkpoints take at the end: the newest ones and the last of each stage."""
    weight, state = 8 if recipe.ema_decay else 4, recipe.optimizer.state_bytes
    each = max(weight * cost.step.weights + state * cost.step.trained for cost in stages)
    return float(each) * (recipe.cadence.keep_checkpoints + len(stages) - 1)


def teachers_cost(recipe: Recipe, fleet: Fleet, pairs: Pairs, calibration: Calibration) -> tuple[float, float] | None:
    """Bytes and seconds of `clipkit reinforce` with MobileCLIP's two teachers; None for an unknown number of pairs.

    Each source of captions is taken to have one of each image.
    """
    if not pairs.total:
        return None
    captions = max(1, sum(weight > 0 for weight in recipe.captions.values()))
    numbers = pairs.total * (TEACHER_VIEWS + captions) * TEACHER_WIDTH
    operations = pairs.total * (TEACHER_VIEWS * TEACHER_IMAGE_FLOPS + captions * TEACHER_TEXT_FLOPS)
    rate = fleet.number * fleet.chip.tflops * 1e12 * calibration.matrix
    return numbers, operations / rate * (1 + calibration.overhead)


def advice(recipe: Recipe, stages: Sequence[StageCost]) -> list[str]:
    """What to change, by what it brings; an empty list where nothing stands out."""
    lines = []
    for cost in stages:
        step, name = cost.step, f"stage {cost.name}"
        fits = step.micro_batch()
        if fits < step.share and not step.micro_asked:
            more = step.chips * 2 ** math.ceil(math.log2(step.share / fits))
            by = "micro_batch=auto" if recipe.micro_batch == "auto" else f"set micro_batch={fits}, which"
            lines.append(
                f"{name}: a device's {step.share:,} pairs don't fit at once: {by} costs one forward pass more, or take "
                f"{more} devices"
            )
        elif step.micro_asked and fits < step.micro_asked:
            lines.append(f"{name}: micro_batch={recipe.micro_batch} doesn't fit: set micro_batch={fits}")
        kept = replace(step, recompute=False)
        if step.recompute and kept.micro_batch() >= step.share:
            saved = 1 - sum(kept.seconds()) / sum(step.seconds())
            lines.append(f"{name}: checkpoint_activations=false fits and saves {saved:.0%} of the time")
        hosts = math.ceil(step.chips / HOST)
        if cost.cores > 16 * min(step.chips, HOST) * hosts:
            lines.append(f"{name}: {cost.cores} loader cores are many: a compact copy of the data halves them")
        if cost.seconds.collectives > 0.2 * sum(cost.seconds):
            lines.append(
                f"{name}: the gradients take {cost.seconds.collectives / sum(cost.seconds):.0%}: fewer devices"
            )
    return lines
