"""Zero-shot classification by prompt ensembles: as a command on a checkpoint, and as an evaluator while training."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from clipkit import checkpoint as checkpoints
from clipkit.device import Device, Precision, pick
from clipkit.errors import UserError
from clipkit.eval import predictions, results
from clipkit.eval.classifier import class_embeddings, pad_rows
from clipkit.eval.metrics import Measure, largest_class, measure
from clipkit.eval.results import Result
from clipkit.eval.task import Task, hashes, open_task
from clipkit.log import Progress
from clipkit.pixels.images import Preprocess, normalise
from clipkit.storage.files import require_writable
from clipkit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.model.clip import CLIP


@dataclass(frozen=True, eq=False)
class Guesses:
    """The best guesses for each readable image, best first. K is 5, or the number of classes when that is less."""

    index_N: NDArray[np.int64]
    top_NK: NDArray[np.int64]
    probability_NK: NDArray[np.float32]


@torch.no_grad()
def classify(
    model: "CLIP",
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    task: Task,
    device: Device,
    *,
    precision: Precision = "auto",
    batch_size: int = 256,
    also: Callable[[int, bytes], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Guesses:
    """Guess the class of every image. The model's mode (train or eval) is put back afterwards.

    `precision` is the arithmetic of the towers. Raises UserError when the model gives NaN.
    """
    training = model.training
    model.eval()
    try:
        asked = task.prompts(tokenizer, text_length(model))
        text_RE = class_embeddings(model, asked, device, precision)
        class_R = torch.tensor(task.classes.class_of_rows, device=text_RE.device)
        scale = model.logit_scale.exp().clamp(max=100.0)
        places, tops, probabilities = [], [], []
        for pixels in task.pixels(preprocess, batch_size, also):
            rows = len(pixels.index_B)
            image = pixels.image_BHWC if device.kind != "xla" else pad_rows(pixels.image_BHWC, batch_size)
            image_BHWC = device.batch({"image": image})["image"]
            with device.autocast(precision):
                image_BE = model.encode_image(normalise(image_BHWC, preprocess.mean, preprocess.std))
            share_BR = (scale * image_BE.float() @ text_RE.T).softmax(dim=-1)
            share_BC = share_BR.new_zeros(len(share_BR), len(task.classes)).index_add_(1, class_R, share_BR)
            probability_BK, top_BK = share_BC.topk(min(5, len(task.classes)))
            device.end_step()
            places.append(pixels.index_B)
            tops.append(top_BK.cpu().numpy()[:rows])
            probabilities.append(probability_BK.float().cpu().numpy()[:rows])
            if progress is not None:
                progress(int(pixels.index_B[-1]) + 1)
    finally:
        model.train(training)
    guesses = Guesses(np.concatenate(places), np.concatenate(tops), np.concatenate(probabilities))
    if not np.isfinite(guesses.probability_NK).all():
        raise UserError("the model gives NaN: its weights are broken; take an earlier checkpoint")
    return guesses


def text_length(model: "CLIP") -> int:
    """The number of text tokens that the model has positions for."""
    return int(model.config.text.context_length)


def evaluate(
    model: "CLIP",
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    task: Task,
    device: Device,
    *,
    precision: Precision = "auto",
    batch_size: int = 256,
) -> Iterator[tuple[str, float]]:
    """Yield `(task/metric, value)` for a model in training: `emoji-heldout/top1` and so on."""
    guesses = classify(
        model,
        tokenizer,
        preprocess,
        task,
        device,
        precision=precision,
        batch_size=batch_size,
    )
    for each in measures(task, guesses):
        yield f"{task.name}/{each.metric}", each.value


def measures(task: Task, guesses: Guesses) -> list[Measure]:
    """The task's metrics, each with interval and chance."""
    return measure(guesses.top_NK, task.labels_N[guesses.index_N], len(task.classes))


def zeroshot(
    checkpoint: Path,
    data: Path,
    *,
    label: str = "label",
    templates: str = "openai-80",
    classes: Path | None = None,
    pooling: str = "mean",
    split: str | None = None,
    task_name: str | None = None,
    batch_size: int = 256,
    device: str = "auto",
    out: Path | None = None,
) -> list[Result]:
    """Classify the images of `data` with a checkpoint; write numbers and guesses into the run, and return the numbers.

    `checkpoint` is a checkpoint's folder or a run's (its newest then). The run is `out`, or the one that the checkpoint
    lies in; outside of a run nothing is written. In the run, `results.jsonl` gets a line for each metric and
    `predictions-<task>.parquet` the guesses. Raises UserError for whatever is wrong with the input.
    """
    task = open_task(
        data, label=label, templates_name=templates, classes=classes, pooling=pooling, split=split, name=task_name
    )
    loaded = checkpoints.load(checkpoint)
    run = out or run_of(loaded.path)
    if run is not None:
        require_writable(run)
    where = pick(device)
    model = checkpoints.build_model(loaded).to(where.torch_device)
    thumbnails = predictions.Thumbnails(len(task.images))
    with Progress(f"zeroshot {task.name}", len(task.images), "images") as progress:
        guesses = classify(
            model,
            Tokenizer(),
            loaded.preprocess,
            task,
            where,
            precision=loaded.config["recipe"].get("precision", "auto"),
            batch_size=batch_size,
            also=thumbnails.take,
            progress=progress.update,
        )
    context = text_length(model)
    if cut := task.prompts(Tokenizer(), context).cut:
        say(f"{cut:,} prompts are longer than the {context} text tokens of the model and were cut")
    if task.unreadable:
        reason = next(iter(task.unreadable.values()))
        say(f"{len(task.unreadable):,} images can't be read and aren't counted, for example: {reason}")
    made_by = hashes(task, loaded.preprocess)
    found = [
        Result(
            **vars(each),
            classes=len(task.classes),
            task=task.name,
            data=str(data),
            samples_seen=loaded.samples_seen,
            checkpoint=relative(loaded.path, run),
            hashes=made_by,
            templates=task.templates.name,
            unreadable=len(task.unreadable),
            largest_class=largest_class(task.labels_N[guesses.index_N]),
        )
        for each in measures(task, guesses)
    ]
    if run is None:
        say(f"{loaded.path} lies in no run: the numbers aren't written anywhere; give --out to keep them")
        return found
    results.write(run, found)  # before the guesses, which may find no room
    about = {"task": task.name, "samples_seen": loaded.samples_seen, "classes": len(task.classes)}
    predictions.write(
        run / f"predictions-{file_name(task.name)}.parquet",
        predictions.rows(task, guesses, thumbnails.images),
        about={**about, "templates": task.templates.name},
    )
    return found


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint folder lies in, or None."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def relative(checkpoint: Path, run: Path | None) -> str:
    """The checkpoint as seen from the run, so that a run can be moved; the full path when it lies elsewhere."""
    path = checkpoint.resolve()
    if run is not None and path.is_relative_to(run.resolve()):
        return path.relative_to(run.resolve()).as_posix()
    return str(path)


def file_name(task: str) -> str:
    """A task's name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", task).strip("-.") or "task"


def say(note: str) -> None:
    """A remark beside the results, on stderr."""
    print(note, file=sys.stderr)
