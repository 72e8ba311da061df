"""What suits the machine: the arithmetic and the micro-batch of each stage, found by real steps before the run starts.

Where a processor has fast bfloat16, whether it pays depends on the shapes, so the recipe's own step is timed both ways.
Where a device says that it has no memory left, the largest part of the batch that fits is found by halving what is in
question. What was found is stored with each checkpoint: a run that is resumed on the same machine goes on with it,
and its weights are those of the unbroken run.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from clipkit.device import Device
from clipkit.errors import UserError
from clipkit.train.fit.setup import has_blocks, is_sharding, weights_of
from clipkit.train.fit.trial import trial_step
from clipkit.train.recipes import Recipe, Stage

Arithmetic = Literal["float32", "bfloat16"]

TRIAL_PAIRS = 32
TRIAL_TURNS = 3
LARGE = 200_000_000
"""From so many weights on, activations are computed again on a device whose memory can't be tried."""
FASTER = 0.95
"""bfloat16 is taken where its step needs at most this part of the time of float32's."""


@dataclass(frozen=True)
class Fit:
    """How a machine runs a stage."""

    precision: Arithmetic
    micro_batch: int | None
    """Pairs at once on one device; None is the whole of its share."""
    checkpoint_activations: bool
    hardware: str
    devices: int
    note: str = ""
    """What was found, for the user; empty where there was nothing to find."""

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with nothing left to find."""
        return replace(
            recipe,
            precision=self.precision,
            micro_batch=self.micro_batch,
            checkpoint_activations=self.checkpoint_activations,
        )


def fit_stages(
    recipe: Recipe, samples_seen: int, device: Device, stored: Mapping[str, Mapping[str, Any]]
) -> dict[str, Fit]:
    """The fit of each stage by its name; as `stored` where it was found on such a machine, or where the stage is over
    after `samples_seen`. All ranks call this together. Raises UserError where not even one pair fits.
    """
    fits, end = {}, 0
    for stage in recipe.stages:
        end += stage.samples
        before = Fit(**stored[stage.name]) if stage.name in stored else None
        if samples_seen < end:
            (is_new,) = device.agree(before is None or not is_as_asked(before, recipe, device))
            fits[stage.name] = fit_stage(recipe, stage, device) if is_new or before is None else before
        elif before is not None:
            fits[stage.name] = before
    return fits


def is_as_asked(fit: Fit, recipe: Recipe, device: Device) -> bool:
    """Whether a fit was found on such a machine, and says what the recipe asks for or leaves open."""
    return (
        (fit.hardware, fit.devices) == (device.hardware(), device.shards)
        and fit.precision in device.arithmetic_choices(recipe.precision)
        and recipe.micro_batch in ("auto", fit.micro_batch)
        and recipe.checkpoint_activations in ("auto", fit.checkpoint_activations)
    )


def fit_stage(recipe: Recipe, stage: Stage, device: Device) -> Fit:
    """Find what the recipe leaves open for a stage."""
    precision, timed = find_precision(recipe, stage, device)
    recipe = replace(recipe, precision=precision)
    micro_batch = None if recipe.micro_batch == "auto" else recipe.micro_batch
    recompute, searched = recipe.checkpoint_activations, ""
    if recompute == "auto":
        recompute = device.static_shapes and weights_of(recipe, stage) > LARGE and has_blocks(recipe, stage)
    if recipe.micro_batch == "auto" and device.survives_want_of_memory:
        micro_batch, recompute = find_micro_batch(recipe, stage, device)
        pairs = f"{micro_batch:,} pairs" if micro_batch else "the whole batch"
        searched = f"{pairs} at once, activations {'computed again' if recompute else 'kept'}"
    notes = [note for note in (timed, searched) if note]
    note = f"stage {stage.name}: {'; '.join(notes)}" if notes else ""
    return Fit(precision, micro_batch, recompute, device.hardware(), device.shards, note)


def to_json(fits: Mapping[str, Fit]) -> dict[str, dict[str, Any]]:
    """What a checkpoint stores of the fits."""
    return {name: asdict(fit) for name, fit in fits.items()}


# ---- Arithmetic ------------------------------------------------------------------------------------------------------


def find_precision(recipe: Recipe, stage: Stage, device: Device) -> tuple[Arithmetic, str]:
    """The arithmetic in which the stage's step is faster, and a note on it where it was timed."""
    choices = min(device.gather(device.arithmetic_choices(recipe.precision)), key=len)
    if len(choices) == 1:
        return choices[0], ""
    ratio = device.on_first(partial(time_bfloat16, recipe, stage, device.alone()))
    if ratio <= FASTER:
        return "bfloat16", f"bfloat16, {1 / ratio:.2f} times as fast as float32 here"
    return "float32", "float32: bfloat16 isn't faster here"


def time_bfloat16(recipe: Recipe, stage: Stage, device: Device) -> float:
    """The time of a step of a few pairs in bfloat16, as a part of that in float32: the best of a few, in turn."""
    small = replace(recipe, micro_batch=None, checkpoint_activations=False)
    step = trial_step(small, stage, min(TRIAL_PAIRS, stage.batch_size), device)
    best: dict[Arithmetic, float] = {}
    precisions: tuple[Arithmetic, ...] = ("float32", "bfloat16")
    for turn in range(TRIAL_TURNS + 1):
        for precision in precisions:
            start = time.perf_counter()
            step(replace(small, precision=precision))
            if turn:  # the first warms up
                best[precision] = min(time.perf_counter() - start, best.get(precision, float("inf")))
    return best["bfloat16"] / best["float32"]


# ---- Memory ----------------------------------------------------------------------------------------------------------


def find_micro_batch(recipe: Recipe, stage: Stage, device: Device) -> tuple[int | None, bool]:
    """How many pairs of a device's share go at once (None: all of them), and whether activations are computed again.

    Either costs a second forward pass, so the whole share is tried both ways before a part of it. Raises UserError
    where not even one pair fits.
    """
    share = stage.batch_size // device.shards
    # Where the weights are sharded a step needs all ranks. They have the same shapes, and come to the same end.
    tried_on = device if is_sharding(recipe, stage, device) else device.alone()
    asked = recipe.checkpoint_activations
    ways = (asked,) if asked != "auto" else (False, True) if has_blocks(recipe, stage) else (False,)

    def fits(micro_batch: int, recompute: bool) -> bool:
        # Not compiled, which would take a minute for each try and needs no more memory.
        tried = replace(recipe, micro_batch=micro_batch, checkpoint_activations=recompute, compile=False)
        has_room = device.has_memory_for(partial(take_steps, tried, stage, share, tried_on))
        return not any(device.agree(not has_room))

    for recompute in ways:
        if fits(share, recompute):
            return None, recompute
    parts = [size for size in range(1, share) if share % size == 0]
    for recompute in ways:
        largest = find_largest(parts, partial(fits, recompute=recompute))
        if largest is not None:
            return largest, recompute
    raise UserError(
        f"recipe {recipe.name}, stage {stage.name}: not even one pair at a time fits into the memory of "
        f"{device.hardware()}: use a larger device or a smaller model"
    )


def take_steps(recipe: Recipe, stage: Stage, pairs: int, device: Device) -> None:
    """Two steps with all that they need, from the model on: what has run out of memory is of no further use."""
    trial_step(recipe, stage, pairs, device)(recipe)


def find_largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of the sizes, which rise, that fits; where one does, all below it do."""
    low, high = 0, len(sizes)  # below `low` all fit, from `high` on none does
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None
