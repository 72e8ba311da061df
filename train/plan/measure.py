"""The calibration of the machine at hand, from a few optimizer steps of two small models: one wide, whose
time goes into matrix products, and one narrow, whose time goes into moving bytes.

This part of the plan needs torch.
"""

from collections.abc import Sequence
from dataclasses import replace

from clipkit.device import Device, pick
from clipkit.errors import UserError
from clipkit.hardware import Chip, find_chip, this_cpu
from clipkit.jobs.worker import cores
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.train.fit.trial import step_times
from clipkit.train.plan.step import Calibration, Step, towers_of
from clipkit.train.recipes import Recipe, Stage, model_at

SECONDS = 3.0
HALF_WIDTHS = (64.0, 32.0, 16.0, 0.0)


def small_recipe(width: int, depth: int, image_size: int, text_tokens: int, batch: int = 64) -> Recipe:
    """Towers of one width and depth, on patches of 16 px."""
    image = ImageConfig("vit_tiny_patch16_224", image_size, width=width, depth=depth, heads=width // 64)
    text = TextConfig(text_tokens, vocab_size=8192, width=width, depth=depth, heads=width // 64)
    stage = Stage("full", batch, batch, 1e-4, 0, image_size, text_tokens)
    return Recipe(f"{width}x{depth} at {image_size} px", ModelConfig(width, image, text), (stage,))


PROBES = (small_recipe(512, 4, 64, 16), small_recipe(128, 6, 112, 16))


def here() -> tuple[Device, Chip]:
    """This machine's device and its data sheet. Raises UserError for a chip that isn't in the table."""
    device = pick()
    chip = this_cpu(cores()) if device.kind == "cpu" else find_chip(device.hardware())
    if chip is None:
        raise UserError(f"--measure: no data sheet of {device.hardware()} in clipkit's table")
    return device, chip


def step_of(recipe: Recipe, device: Device, chip: Chip, calibration: Calibration) -> Step:
    """The first stage of a recipe on one device."""
    stage, is_float32 = recipe.stages[0], device.arithmetic(recipe.precision) == "float32"
    towers = towers_of(model_at(recipe, stage), stage.image_keep)
    return Step(
        towers, recipe.model.embed_dim, stage.image_size, chip, 1, stage.batch_size,
        recipe.checkpoint_activations is True, is_float32, calibration,
    )  # fmt: skip


def measure_step(recipe: Recipe, device: Device, seconds: float = SECONDS) -> float:
    """The seconds of a step of the recipe's first stage: the lower quartile, since others may use the machine too."""
    stage = recipe.stages[0]
    spent = sorted(step_times(recipe, stage, stage.batch_size, device, seconds))
    return spent[len(spent) // 4]


def calibrate(steps: Sequence[Step], seconds: Sequence[float]) -> Calibration:
    """The shares of the peak and of the bandwidth at which two steps take the seconds that they took.

    What comes on top is in both. Small products are taken to lose the most at which two positive shares exist; where
    none do, both shares are one number.
    """
    for half_width in HALF_WIDTHS:
        whole = Calibration(1.0, 1.0, half_width, overhead=0.0)
        least = replace(whole, memory=1e9)
        products = [sum(replace(step, calibration=least).seconds()) for step in steps]
        both = [sum(replace(step, calibration=whole).seconds()) for step in steps]
        moving = [all_of - product for all_of, product in zip(both, products, strict=True)]
        determinant = products[0] * moving[1] - products[1] * moving[0]
        slower = (seconds[0] * moving[1] - seconds[1] * moving[0]) / determinant  # than at the peak
        waiting = (products[0] * seconds[1] - products[1] * seconds[0]) / determinant
        if slower > 0 and waiting > 0:
            return Calibration(1 / slower, 1 / waiting, half_width, 0.0)
    either = sum(both) / sum(seconds)
    return Calibration(either, either, half_width, 0.0)


def measured_calibration(asked: Chip) -> Calibration:
    """The calibration of this machine's device, which must be the one asked for. Raises UserError where it isn't."""
    device, chip = here()
    if chip.name != asked.name:
        raise UserError(f"--measure: this machine has {chip.name}, not {asked.name}: give --devices {chip.name}")
    steps = [step_of(recipe, device, chip, Calibration()) for recipe in PROBES]
    return calibrate(steps, [measure_step(recipe, device) for recipe in PROBES])
