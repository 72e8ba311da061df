"""A run: what it shares and where it stands, and what it does beside its steps: save, evaluate, describe itself.

The steps themselves are in `loop`.
"""

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from clipkit import __version__, checkpoint
from clipkit.config import to_json
from clipkit.device import Device
from clipkit.embedding.encoder import Compute, clip_encoder
from clipkit.errors import UserError, one_line
from clipkit.eval.evaluation import EvaluationTask, evaluate
from clipkit.eval.results import RANKS
from clipkit.log import Progress, Writer, read_metrics, warn_on_stderr
from clipkit.model.clip import CLIP, allocate, load_state
from clipkit.model.global_loss import Normalisers
from clipkit.pixels.images import Preprocess
from clipkit.storage.files import read_json
from clipkit.text.tokenizer import WordTokenizer
from clipkit.text.vocabulary import vocabulary_hash
from clipkit.train.checks import preprocess_at
from clipkit.train.fit.stages import Fit
from clipkit.train.fit.stages import to_json as fits_to_json
from clipkit.train.recipes import Recipe, Stage, model_at
from clipkit.train.saving import CheckpointWriter, Parts, bytes_of, require_space
from clipkit.train.sources.open import Data
from clipkit.train.start import Start
from clipkit.train.stopping import Stop, StopNowError
from clipkit.train.watch.captions import FirstCaptions

# What an evaluation may raise for its data, or for want of memory.
EVALUATION_ERRORS = (UserError, OSError, RuntimeError, ValueError, LookupError, MemoryError)
LESS_IS_BETTER = RANKS | {"calibration_error"}


@dataclass
class Run:
    """What the parts of the loop share, and where the run stands. `seconds` counts all its resumes together."""

    recipe: Recipe
    fits: dict[str, Fit]
    """How this machine runs each stage, those aside that were over before the run began here."""
    folder: Path
    data: Data
    tokenizer: WordTokenizer
    device: Device
    writer: Writer
    task: EvaluationTask | None
    workers: int | None
    stop: Stop
    captions: FirstCaptions
    checkpoints: CheckpointWriter
    samples_seen: int = 0
    seconds: float = 0.0
    bad_samples: int = 0
    bad_reasons: dict[str, str] = field(default_factory=dict)
    """The records that couldn't be used and were reported, with the reasons."""
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """The stretches of samples that the run leaves out, since they once broke it: from the first to before the last."""
    saved_at: float = 0.0
    saved: int | None = None
    """The samples seen of the latest checkpoint that this process began."""
    evaluation_missing: bool = False
    """A signal came in the way of the latest evaluation; a resumed run makes it."""
    normalisers: Normalisers | None = None
    """The running ones of the global contrastive loss, where that is the recipe's."""


@dataclass(frozen=True)
class Summary:
    """What `train` says at its end; `loss` is NaN when no step was taken."""

    run: Path
    checkpoint: Path | None
    samples_seen: int
    seconds: float
    loss: float
    finished: bool
    is_first: bool
    """Whether this is the first rank, which prints the summary."""
    signal: int | None = None
    """The signal that this process got, if any."""
    bad_samples: int = 0
    """Records that couldn't be used and were replaced, each time that they came."""

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {
            "run": str(self.run),
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "samples_seen": self.samples_seen,
            "seconds": self.seconds,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "finished": self.finished,
            "bad_samples": self.bad_samples,
        }


def is_due(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of `every` samples lies in (before, now]. None means never."""
    return every is not None and now // every > before // every


def is_checkpoint_due(run: Run, before: int) -> bool:
    """Whether a checkpoint is due by samples or by minutes, whichever comes first, or is one of those to stay."""
    cadence = run.recipe.cadence
    by_clock = cadence.checkpoint_minutes is not None and (
        time.monotonic() - run.saved_at >= 60 * cadence.checkpoint_minutes
    )
    by_samples = (cadence.checkpoint_samples, cadence.keep_every_samples)
    return by_clock or any(is_due(every, before, run.samples_seen) for every in by_samples)


def is_evaluation_missing(run: Run, start: checkpoint.Checkpoint) -> bool:
    """Whether the run was to evaluate the checkpoint that it goes on from, and didn't come to it."""
    seen, stage_start = start.samples_seen, 0
    for stage in run.recipe.stages:
        stage_end = stage_start + stage.samples
        if stage_start < seen <= stage_end:
            is_asked = seen == stage_end or is_due(run.recipe.cadence.evaluate_samples, seen - stage.batch_size, seen)
            lines = [line for line in read_metrics(run.folder) if line["samples_seen"] == seen]
            return is_asked and not any("/" in name for line in lines for name in line)  # task/metric
        stage_start = stage_end
    return False


def evaluate_now(run: Run, stage: str, model: CLIP, preprocess: Preprocess, average: CLIP | None = None) -> None:
    """Write the numbers of the run's task, if it has one, with those of the averaged weights as `ema/…`. All ranks take
    part. Where it fails that is reported, and training goes on.
    """
    if run.task is None:
        return
    run.checkpoints.wait()
    place: dict[str, float | int | str] = {"samples_seen": run.samples_seen, "stage": stage}
    found: dict[str, float] = {}
    precision = run.fits[stage].precision if stage in run.fits else run.recipe.precision
    compute = Compute(run.device, check=partial(run.stop.check, run.device))
    try:
        with run.stop.while_evaluating():
            for prefix, each in (("", model), ("ema/", average)):
                if each is not None:
                    whole = whole_model(each, run.device)
                    encoder = clip_encoder(whole, run.tokenizer, preprocess, precision=precision)
                    pairs = evaluate(encoder, run.task, compute)
                    found |= {prefix + name: value for name, value in pairs}
        run.writer.write({**place, **found})
        best = run.recipe.cadence.keep_best
        if best is not None and named(best, found) is None and run.device.is_first:
            names = ", ".join(found)
            warn_on_stderr(f"no best checkpoint is kept: cadence.keep_best={best} doesn't name exactly one of {names}")
    except StopNowError:
        run.evaluation_missing = True
    except EVALUATION_ERRORS as error:
        reason = one_line(error)
        if run.device.is_first:
            warn_on_stderr(f"no evaluation at {run.samples_seen:,} samples, training goes on: {reason}")
        run.writer.write({**place, "evaluation_error": reason})


def open_normalisers(run: Run, start: Start) -> Normalisers | None:
    """The running normalisers of the global contrastive loss where the run starts, if that is its loss."""
    if run.recipe.loss != "global_contrastive":
        return None
    config, records = run.recipe.global_contrastive, run.data.num_records
    found = Normalisers(records, run.device, config.gamma, run.recipe.gamma_samples)
    if start.own:
        found.log_u_R2[:] = start.own.normalisers["log_u_R2"].numpy()
    return found


def on_cpu(model: CLIP) -> dict[str, torch.Tensor]:
    """The model's weights by their names, on the CPU."""
    return {name: checkpoint.whole(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}


def whole_model(model: CLIP, device: Device) -> CLIP:
    """The model itself, or a whole copy of one that is sharded, on each rank: embedding then needs no other rank."""
    if not any(isinstance(each, DTensor) for each in model.parameters()):
        return model
    copied = allocate(model.config)
    load_state(copied, on_cpu(model))
    return copied.to(device.torch_device)


def evaluate_at_start(run: Run, start: checkpoint.Checkpoint) -> None:
    """Make the evaluation that the checkpoint was to have."""
    found = [start, replace(start, tensors=start.ema)] if start.ema else [start]
    model, *average = [checkpoint.build_model(each).to(run.device.torch_device) for each in found]
    evaluate_now(run, start.state["stage"], model, start.preprocess, *average)


def expect_checkpoints(
    run: Run, stage: Stage, model: CLIP, average: CLIP | None, optimizer: torch.optim.Optimizer
) -> None:
    """Get ready to save in a stage. Raises UserError where the disk has too little space for even one checkpoint."""
    now = bytes_of(parts(model, average, optimizer, run.normalisers))
    if not optimizer.state:  # which the first update makes
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        now += run.recipe.optimizer.state_bytes * trained
    if run.device.is_first:
        require_space(checkpoint.folder_of(run.folder, run.samples_seen), now)
    if any(isinstance(each, DTensor) for each in model.parameters()):
        run.checkpoints.share(run.folder / "checkpoints")
    run.checkpoints.follow(optimizer, partial(parts, model, average, optimizer, run.normalisers))


def save(run: Run, stage: Stage, model: CLIP, average: CLIP | None, optimizer: torch.optim.Optimizer) -> None:
    """Begin the checkpoint of now, of which `diagnosis.check_steps` has found that no step ruined the weights."""
    run.saved_at = time.monotonic()
    if run.saved == run.samples_seen:
        return
    run.saved, cadence = run.samples_seen, run.recipe.cadence
    ends = itertools.accumulate(stage.samples for stage in run.recipe.stages)
    kept = frozenset((*ends, *best_of(run)))
    run.checkpoints.save(
        checkpoint.folder_of(run.folder, run.samples_seen),
        parts(model, average, optimizer, run.normalisers),
        partial(checkpoint.prune, run.folder, cadence.keep_checkpoints, kept, cadence.keep_every_samples),
        vocabulary=run.tokenizer.vocabulary,
        config=checkpoint.describe(
            model_at(run.recipe, stage),
            preprocess_at(run.recipe, stage),
            run.recipe,
            vocabulary_hash(run.tokenizer),
        ),
        state={
            "samples_seen": run.samples_seen,
            "stage": stage.name,
            "seconds": run.seconds,
            "bad_samples": run.bad_samples,
            "skipped": list(run.skipped),
            "fits": fits_to_json(run.fits),
            "dataset": run.data.identity(),
        },
    )


def parts(
    model: CLIP, average: CLIP | None, optimizer: torch.optim.Optimizer, normalisers: Normalisers | None = None
) -> Parts:
    """The tensors of a checkpoint, where and as they are, by `checkpoint.save`'s names for them."""
    more = {"ema": average.state_dict()} if average else {}
    if normalisers:
        more["normalisers"] = normalisers.tensors()
    return {"tensors": model.state_dict(), "optimizer": checkpoint.optimizer_tensors(model, optimizer), **more}


def named(metric: str, names: Iterable[str]) -> str | None:
    """The name `task/metric` among `names` that `metric` is, or the only one, averages aside, that ends in it."""
    evaluated = [name for name in names if "/" in name]
    found = [name for name in evaluated if name.endswith(f"/{metric}") and not name.startswith("ema/")]
    return metric if metric in evaluated else found[0] if len(found) == 1 else None


def best_of(run: Run) -> list[int]:
    """The samples seen of the best checkpoint so far by `cadence.keep_best`, if there is one; the first of equals."""
    metric = run.recipe.cadence.keep_best
    if metric is None or not run.device.is_first:
        return []
    sign = -1 if metric.rpartition("/")[2] in LESS_IS_BETTER else 1
    lines = [(line, named(metric, line)) for line in read_metrics(run.folder)]
    values = [(sign * line[name], -line["samples_seen"]) for line, name in lines if name is not None]
    return [-max(values)[1]] if values else []


def progress_line(run: Run, label: str, total: int, start: int) -> Progress:
    """The first rank's line of progress; the other ranks draw none."""
    return Progress(label, total, start=start, quiet=not run.device.is_first)


def describe_run(
    folder: Path, recipe: Recipe, data: Data, device: Device, start: Start, init: Path | None
) -> dict[str, Any]:
    """The `config.json` of a run's folder: what was trained, on what, where, and what changed on the way."""
    path = folder / "config.json"
    before: dict[str, Any] = {
        "init": str(init) if init else None,
        "start": {"samples_seen": start.samples_seen, "seconds": start.own.state["seconds"] if start.own else 0.0},
    }
    if start.own and path.exists():
        before = read_json(path)
    changes = [{"samples_seen": start.samples_seen, "changed": start.changes}] if start.changes else []
    return {
        "clipkit": __version__,
        "torch": torch.__version__,
        "recipe": to_json(recipe),
        "data": data.places(),
        "dataset": data.identity(),
        "device": {
            "kind": device.kind,
            "hardware": device.hardware(),
            "devices": device.shards,
            "arithmetic": device.arithmetic(recipe.precision),
        },
        "init": before.get("init"),
        "start": before.get("start"),
        "changes": [*before.get("changes", []), *changes],
    }
