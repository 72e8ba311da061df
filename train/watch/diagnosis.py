"""What happens when the loss goes wrong: a diagnosis is written, and the run stops, or goes back and skips the data.

A loss or a gradient that isn't finite is found when the steps since the last log line are read, which happens before
anything is saved. By `on_bad_loss` the run then stops, or goes back to its newest checkpoint and leaves out the steps
from the first bad one up to where the log line was due. Skipped samples count as seen: the order of the data, the
schedule and the end of the run stay where they were. A loss that stays at that of chance has no data to blame: by
`on_stuck_loss` the run stops, or a warning is printed.
"""

import itertools
import math
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipkit import checkpoint
from clipkit.counter_rng import sample_keys
from clipkit.device import Device
from clipkit.errors import UserError, one_line
from clipkit.log import warn_on_stderr
from clipkit.model.clip import CLIP
from clipkit.pixels.images import UInt8Array, normalise
from clipkit.storage.files import read_json, write_json
from clipkit.text.tokenizer import WordTokenizer
from clipkit.train.checks import loader_config
from clipkit.train.loader.captions import draw_sentence, drawn_captions, sentence_draws, used_weights
from clipkit.train.loader.loader import Batch, batches
from clipkit.train.recipes import Recipe, Stage
from clipkit.train.run import EVALUATION_ERRORS, Run, whole_model
from clipkit.train.sources.source import Pair, Source
from clipkit.train.step import Step

MOST_SKIPPED = 10  # a run that needs more than so many is beyond help
# A loss so near to that of chance, over so many steps and log lines after the warm-up, is stuck.
STUCK_MARGIN, STUCK_STEPS, STUCK_LINES = 0.01, 1000, 10
SHOWN, SHOWN_IN_ROW = 64, 8
HISTORY = 200


class RollBackError(Exception):
    """The run is to go back to its newest checkpoint."""


@dataclass(frozen=True)
class Reading:
    """What was read of one step. `loss` is the mean over all ranks."""

    before: int
    """Samples seen before the step."""
    learning_rate: float
    loss: float
    grad_norm: float

    @property
    def problem(self) -> str | None:
        """What is wrong with the step."""
        if not math.isfinite(self.loss):
            return f"the loss became {self.loss}"
        return None if math.isfinite(self.grad_norm) else "the loss or its gradient isn't finite"


class Window:
    """The steps since the last log line: what they found stays on the device until it is read."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.history: deque[Reading] = deque(maxlen=HISTORY)

    def take(self, before: int, learning_rate: float, step: Step) -> None:
        """Add a step. Its features would take too much memory."""
        self.steps.append((before, learning_rate, step.loss, step.grad_norm, step.grad_norms_P))

    def read(self, device: Device) -> list[Reading]:
        """The steps so far; waits for the device. All ranks call this together, and get the same."""
        if not self.steps:
            return []
        befores, learning_rates, losses, grad_norms, _ = zip(*self.steps, strict=True)
        numbers = torch.stack((device.mean(torch.stack(losses)), torch.stack(grad_norms))).tolist()
        return [Reading(*each) for each in zip(befores, learning_rates, *numbers, strict=True)]

    def restart(self, readings: list[Reading]) -> None:
        """Begin the next one; what was read of this one stays for a diagnosis."""
        self.steps.clear()
        self.history.extend(readings)


def check_steps(run: Run, stage: Stage, model: CLIP, window: Window) -> list[Reading]:
    """What the steps since the last log line found, when all of it is finite.

    Else raises UserError, or RollBackError after adding to what the run skips, by the recipe's policy.
    """
    readings = window.read(run.device)
    number = next((number for number, reading in enumerate(readings) if reading.problem), None)
    if number is None:
        return readings
    bad, log = readings[number], run.recipe.cadence.log_samples
    path = diagnose(run, stage, model, window, readings, number, str(bad.problem))
    if run.recipe.on_bad_loss == "skip" and len(run.skipped) < MOST_SKIPPED:
        # Where the skipping begins and ends mustn't depend on when the run was saved or stopped. Each stage logs at its
        # end.
        ends = itertools.accumulate(each.samples for each in run.recipe.stages)
        stage_end = next(end for end in ends if end > bad.before)
        run.skipped.append((bad.before, min(stage_end, (bad.before // log + 1) * log)))
        raise RollBackError(f"{bad.problem} at {bad.before:,} samples ({path})")
    raise UserError(explain_bad_loss(run, str(bad.problem), path))


def explain_bad_loss(run: Run, problem: str, path: Path) -> str:
    """The error line for a run whose loss or gradient isn't finite."""
    good = checkpoint.latest(run.folder)
    again = f"begin a new run with --init {good} and" if good else "begin again with"
    skip = ", or leave these batches out by --resume --set on_bad_loss=skip"
    if run.skipped:
        skip = f"; {len(run.skipped)} stretches of the data were skipped before"
    return (
        f"{problem} before {run.samples_seen:,} samples: {again} a lower learning rate or --set precision=float32"
        f"{skip}; {path} has the batch and the norms"
    )


def log_roll_back(run: Run, why: str) -> None:
    """Say on the terminal, in the metrics and in `config.json` from where the run goes on, and what it will skip."""
    first, last = run.skipped[-1]
    change = f"samples from {first:,} to {last:,} skipped: {why}"
    warn_on_stderr(f"going back to {run.samples_seen:,} samples; {change}")
    run.writer.rewind(run.samples_seen)
    run.writer.write({"samples_seen": run.samples_seen, "skipped_from": first, "skipped_to": last})
    config = read_json(run.folder / "config.json")
    config["changes"].append({"samples_seen": run.samples_seen, "changed": [change]})
    write_json(run.folder / "config.json", config)


def is_skipped(run: Run, before: int) -> bool:
    """Whether the step at `before` samples is one that the run leaves out."""
    return any(first <= before < last for first, last in run.skipped)


# ---- Stuck at chance -------------------------------------------------------------------------------------------------


class StuckLoss:
    """Watches for a loss that stays at what guessing gives, which is ln(batch) for InfoNCE; where that isn't known, for
    nothing.
    """

    def __init__(self, recipe: Recipe, stage: Stage) -> None:
        B = stage.batch_size
        # The sigmoid loss of equal features is least where each pair counts as a match with probability 1/B.
        by_sigmoid = math.log(B) - (B - 1) * math.log1p(-1 / B)
        # The normalisers of equal features are 1; divided by the scale that is learned, their loss is at no level.
        by_normalisers = 0.0 if recipe.global_contrastive.rho is None else math.nan
        self.chance = {"sigmoid": by_sigmoid, "global_contrastive": by_normalisers}.get(recipe.loss, math.log(B))
        if recipe.has_teachers:  # what those make of equal features depends on how sure they are
            self.chance = math.nan
        self.margin = STUCK_MARGIN * (self.chance or math.log(B))
        self.warmup = stage.warmup_samples
        self.steps = self.lines = 0
        self.is_told = False

    def look(self, loss: float, steps: int, seen: int) -> bool:
        """Whether the loss, the mean over the last `steps`, is stuck at `seen` samples of the stage: true only once."""
        if seen > self.warmup and abs(loss - self.chance) < self.margin:
            self.steps, self.lines = self.steps + steps, self.lines + 1
        else:
            self.steps = self.lines = 0
        is_stuck = self.steps >= STUCK_STEPS and self.lines >= STUCK_LINES and not self.is_told
        self.is_told |= is_stuck
        return is_stuck


def meet_stuck_loss(
    run: Run, stage: Stage, model: CLIP, window: Window, readings: list[Reading], stuck: StuckLoss
) -> None:
    """Stop with a diagnosis, or warn with one and look on, by the recipe's policy. Raises UserError."""
    problem = f"the loss has stayed at {stuck.chance:.2f}, that of chance, for {stuck.steps:,} steps"
    path = diagnose(run, stage, model, window, readings, len(readings) - 1, problem)
    message = (
        f"{problem} up to {run.samples_seen:,} samples: look at {path} whether captions and images belong together, "
        "lower the learning rate or warm up longer"
    )
    if run.recipe.on_stuck_loss == "stop":
        raise UserError(f"{message}, or go on all the same by --resume --set on_stuck_loss=warn")
    if run.device.is_first:
        warn_on_stderr(message)


# ---- The diagnosis ---------------------------------------------------------------------------------------------------


def diagnose(
    run: Run, stage: Stage, model: CLIP, window: Window, readings: list[Reading], number: int, problem: str
) -> Path:
    """Write `diagnosis-SAMPLES.json` and a PNG of the first images of the batch; returns the path of the first.

    It is about step `number` of the window. The first rank writes, the others wait for it, or take part where their
    chips share its batches.
    """
    bad = readings[number]
    path = run.folder / f"diagnosis-{bad.before + stage.batch_size:012d}.json"
    model = whole_model(model, run.device)
    if run.device.is_first or run.device.shares_batches:
        norms = [norms_P.tolist() for *_, norms_P in (window.steps[max(0, number - 1)], window.steps[number])]
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        gradient = {name: values for name, *values in zip(trained, *norms, strict=True)}
        report: dict[str, Any] = {
            "problem": problem,
            "stage": stage.name,
            "samples_seen": bad.before + stage.batch_size,
            "logit_scale": model.logit_scale.exp().item(),
            "steps": [asdict(reading) for reading in (*window.history, *readings[: number + 1])],
            "norms": {
                name: {"weight": parameter.detach().norm().item()}
                | dict(zip(("gradient_one_step_before", "gradient"), gradient.get(name, ()), strict=False))
                for name, parameter in model.named_parameters()
            },
        }
        try:
            source = run.data.source()
            shown = first_samples(source, run.tokenizer, run.recipe, stage, bad.before)
            report |= describe_batch(source, run.recipe, stage, bad.before, shown, run.tokenizer)
            if run.data.has_images:
                recipe = run.fits[stage.name].apply(run.recipe)
                report["features"] = describe_features(model, recipe, run.device, shown)
                if run.device.is_first:
                    Image.fromarray(contact_sheet(shown.image_BHWC)).save(path.with_suffix(".png"))
        except EVALUATION_ERRORS as error:
            report["incomplete"] = one_line(error)
        if run.device.is_first:
            write_json(path, finite(report))
    run.checkpoints.wait()  # on the one to go back to, or to name
    run.device.barrier()
    return path


def first_samples(source: Source, tokenizer: WordTokenizer, recipe: Recipe, stage: Stage, before: int) -> Batch:
    """The first samples of the step at `before`, made again: each follows from its position."""
    config = replace(loader_config(recipe, stage), batch_size=min(SHOWN, stage.batch_size), max_bad=1.0)
    stop = before + config.batch_size
    return next(batches(source, config, before, stop, workers=0, warn=lambda line: None, tokenizer=tokenizer))


def describe_batch(
    source: Source, recipe: Recipe, stage: Stage, before: int, shown: Batch, tokenizer: WordTokenizer
) -> dict[str, Any]:
    """The keys of all samples of the step, and of each that is shown the key and the caption that was drawn, or the
    sentence of it.
    """
    positions_B = np.arange(before, before + stage.batch_size, dtype=np.uint64)
    records = source.records_at(positions_B, recipe.seed, recipe.block_size).tolist()
    used = shown.records_B.tolist()
    keys_B = sample_keys(recipe.seed, positions_B[: len(used)])
    pairs = [pair if isinstance(pair, Pair) else None for pair in source.pairs(used)]
    captions = drawn_captions(pairs, keys_B, used_weights(recipe.captions), tokenizer.clean)
    if stage.text_reduction == "sentence":
        room = stage.context_length - tokenizer.specials
        captions = [
            draw_sentence(caption, draw, tokenizer.clean) if len(tokenizer.encode([caption])[0]) > room else caption
            for caption, draw in zip(captions, sentence_draws(keys_B).tolist(), strict=True)
        ]
    return {
        "shown": [
            {"key": source.key(record), "caption": caption} for record, caption in zip(used, captions, strict=True)
        ],
        "keys": [source.key(record) for record in records],
    }


@torch.no_grad()
def describe_features(model: CLIP, recipe: Recipe, device: Device, shown: Batch) -> dict[str, Any]:
    """Norms of the features before they are normalised, and how alike those of different samples are (1: the same)."""
    part = device.common_batch(shown.arrays())
    with device.autocast(recipe.precision):
        features = {
            "image": model.encode_image(
                normalise(part["image_BHWC"], recipe.mean, recipe.std), part.get("keep_BK"), normalize=False
            ),
            "text": model.encode_text(part["ids_BT"], normalize=False),
        }
    described = {}
    for side, x_BE in features.items():
        norm_B = x_BE.norm(dim=1)
        unit_BE = x_BE / norm_B[:, None]
        cosines_BB = unit_BE @ unit_BE.T
        others = (cosines_BB.sum() - len(x_BE)) / (len(x_BE) * (len(x_BE) - 1))
        described[side] = {
            "norm_least": norm_B.amin().item(),
            "norm_mean": norm_B.mean().item(),
            "norm_most": norm_B.amax().item(),
            "cosine_mean": others.item(),
        }
    return described


def contact_sheet(image_BHWC: UInt8Array, gap: int = 2) -> UInt8Array:
    """All images in rows, in their order."""
    B, H, W, _ = image_BHWC.shape
    rows = -(-B // SHOWN_IN_ROW)
    sheet_HWC = np.full((rows * (H + gap), min(B, SHOWN_IN_ROW) * (W + gap), 3), 255, np.uint8)
    for number, image_HWC in enumerate(image_BHWC):
        top, left = number // SHOWN_IN_ROW * (H + gap), number % SHOWN_IN_ROW * (W + gap)
        sheet_HWC[top : top + H, left : left + W] = image_HWC
    return sheet_HWC


def finite(value: Any) -> Any:
    """The same for JSON, which has no word for numbers that aren't finite: "nan", "inf"."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
