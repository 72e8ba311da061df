"""Zero-shot classification by prompt ensembles: as a command on a checkpoint, and as an evaluator while training.

Each prompt's embedding is normalised, a class's are averaged, and the mean is normalised again (Radford et al., 2021),
as `build_zero_shot_classifier` of OpenCLIP does. A thousand classes in 80 templates are 80,000 sentences, mostly short:
they are tokenised once, sorted by length, and each batch is cut to its longest sentence where the text tower is causal
and pooled at the end token: what stands behind that token can't change the embedding. Other towers see the padding.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from clipkit import checkpoint as checkpoints
from clipkit.device import Device, Precision, pick
from clipkit.errors import UserError
from clipkit.eval import results
from clipkit.eval.metrics import largest_class, measure
from clipkit.eval.results import Result
from clipkit.eval.task import Prompts, Task, hashes
from clipkit.formats.folders import printable
from clipkit.log import Progress
from clipkit.pixels.images import Preprocess, normalise, thumbnail
from clipkit.storage.files import require_writable
from clipkit.text.tokenizer import WordTokenizer

if TYPE_CHECKING:
    from clipkit.model.clip import CLIP

Number = TypeVar("Number", bound=np.generic)

TOKENS_PER_BATCH = 8192
# The sample of pictures that go with the guesses.
SEED, PICTURES, PICTURE_PIXELS = 0, 400, 128


@dataclass(frozen=True, eq=False)
class Guesses:
    """The best guesses for each readable image, best first. K is 5, or the number of classes when that is less."""

    index_N: NDArray[np.int64]
    top_NK: NDArray[np.int64]
    probability_NK: NDArray[np.float32]


def prompt_batches(prompts: Prompts, fixed_length: bool) -> Iterator[slice]:
    """Slices of about equal numbers of tokens, all of one shape where the length of a prompt is fixed."""
    total, width = prompts.ids_PT.shape
    start = 0
    while start < total:
        rows = TOKENS_PER_BATCH // width
        if not fixed_length:
            # The batch grows until its longest prompt, which is its last, makes it too large.
            lengths = prompts.length_P[start : start + TOKENS_PER_BATCH]
            fits = lengths * np.arange(1, len(lengths) + 1) <= TOKENS_PER_BATCH
            rows = int(fits.sum())
        stop = min(total, start + max(1, rows))
        yield slice(start, stop)
        start = stop


@torch.no_grad()
def class_embeddings(model: "CLIP", prompts: Prompts, device: Device, precision: Precision = "auto") -> torch.Tensor:
    """The classifier [C, E] in float32 on the device: row c is the unit embedding of class c."""
    width = prompts.ids_PT.shape[1]
    fixed_length = device.static_shapes or model.text.fixed_length  # on XLA, as each new shape is compiled
    sum_CE: torch.Tensor | None = None
    for part in prompt_batches(prompts, fixed_length):
        ids_BT = prompts.ids_PT[part]
        if device.static_shapes:
            ids_BT = pad_rows(ids_BT, -(-max(1, TOKENS_PER_BATCH // width) // device.shards) * device.shards)
        elif not fixed_length:
            ids_BT = np.ascontiguousarray(ids_BT[:, : prompts.length_P[part].max()])
        with device.autocast(precision):
            text_BE = model.encode_text(device.batch({"ids": ids_BT})["ids"], normalize=False)
        text_BE = F.normalize(text_BE.float(), dim=-1)
        first, last = np.searchsorted(prompts.prompt_Q, [part.start, part.stop])
        row_Q = torch.from_numpy(prompts.prompt_Q[first:last] - part.start).to(text_BE.device)
        class_Q = torch.from_numpy(prompts.class_Q[first:last]).to(text_BE.device)
        if sum_CE is None:
            sum_CE = text_BE.new_zeros(prompts.classes, text_BE.shape[1])
        sum_CE.index_add_(0, class_Q, text_BE[row_Q])
        device.end_step()
    assert sum_CE is not None  # there is always a class, and a class has a name
    # The direction of the mean is that of the sum.
    return F.normalize(sum_CE, dim=-1)


def pad_rows(array: NDArray[Number], rows: int) -> NDArray[Number]:
    """Repeat the last row until there are `rows`."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)]) if len(array) < rows else array


@torch.no_grad()
def classify(
    model: "CLIP",
    tokenizer: WordTokenizer,
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
        asked = task.prompts(tokenizer, model.config.text.context_length)
        text_RE = class_embeddings(model, asked, device, precision)
        class_R = torch.tensor(task.classes.class_of_rows, device=text_RE.device)
        scale = model.logit_scale.exp().clamp(max=100.0)
        places, tops, probabilities = [], [], []
        for pixels in task.pixels(preprocess, batch_size, also):
            rows = len(pixels.index_B)
            image = pad_rows(pixels.image_BHWC, batch_size) if device.static_shapes else pixels.image_BHWC
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


def evaluate(
    model: "CLIP",
    tokenizer: WordTokenizer,
    preprocess: Preprocess,
    task: Task,
    device: Device,
    *,
    precision: Precision = "auto",
    batch_size: int = 256,
) -> Iterator[tuple[str, float]]:
    """Yield `(task/metric, value)` for a model in training: `emoji-heldout/top1` and so on."""
    guesses = classify(model, tokenizer, preprocess, task, device, precision=precision, batch_size=batch_size)
    for measured in measure(guesses.top_NK, task.labels_N[guesses.index_N], len(task.classes)):
        yield f"{task.name}/{measured.metric}", measured.value


def zeroshot(
    checkpoint: Path,
    task: Task,
    *,
    batch_size: int = 256,
    device: str = "auto",
    out: Path | None = None,
    ema: bool = False,
) -> list[Result]:
    """Classify a task's images with a checkpoint; write numbers and guesses into the run, and return the numbers.

    `checkpoint` is a checkpoint's folder or a run's (its newest then). The run is `out`, or the one that the checkpoint
    lies in; outside of a run nothing is written. `ema` takes the averages of the weights, and the task is then called
    `ema/<task>`. In the run, `results.jsonl` gets a line for each metric and
    `predictions-<task>.parquet` the guesses. Raises UserError for whatever is wrong with the input.
    """
    for text in task.notes:
        note(text)
    pictures = PictureSample(len(task.images))
    loaded = checkpoints.load(checkpoint, ema=ema)
    run = out or run_of(loaded.path)
    if run is not None:
        require_writable(run)
    where = pick(device)
    model, tokenizer = checkpoints.build_model(loaded).to(where.torch_device), checkpoints.tokenizer_of(loaded.path)
    with Progress(f"zeroshot {task.name}", len(task.images), "images") as progress:
        guesses = classify(
            model,
            tokenizer,
            loaded.preprocess,
            task,
            where,
            precision=loaded.config["recipe"].get("precision", "auto"),
            batch_size=batch_size,
            also=pictures.take,
            progress=progress.update,
        )
    context = model.config.text.context_length
    if cut := task.prompts(tokenizer, context).cut:
        note(f"{cut:,} prompts are longer than the {context} text tokens of the model and were cut")
    if task.unreadable:
        reason = next(iter(task.unreadable.values()))
        note(f"{len(task.unreadable):,} images can't be read and aren't counted, for example: {reason}")
    labels_N = task.labels_N[guesses.index_N]
    measures = measure(guesses.top_NK, labels_N, len(task.classes))
    task_hashes = hashes(task, loaded.preprocess)
    asked = f"ema/{task.name}" if ema else task.name
    found = [
        Result(
            **vars(measured),
            classes=len(task.classes),
            task=asked,
            data=printable(str(task.images.path.absolute())),
            samples_seen=loaded.samples_seen,
            checkpoint=relative(loaded.path, run),
            hashes=task_hashes,
            templates=task.templates.name,
            unreadable=len(task.unreadable),
            largest_class=largest_class(labels_N),
        )
        for measured in measures
    ]
    if run is None:
        note(f"{loaded.path} isn't in a run's folder, so the numbers aren't written anywhere: give --out to keep them")
        return found
    found = results.write_results(run, found)  # before the guesses, which may find no room
    name = found[0].task
    if name != asked:
        note(f"{run} has a task {asked!r} of other images, so this one is {name!r}: choose with --name")
    about = {"task": name, "samples_seen": loaded.samples_seen, "classes": len(task.classes)}
    results.write_predictions(
        results.predictions_path(run, name),
        prediction_rows(task, guesses, pictures.images),
        about={**about, "data": found[0].data, "templates": task.templates.name},
    )
    return found


class PictureSample:
    """Keeps the encoded images of a random sample of the places 0..total-1, seeded, so the same each time."""

    def __init__(self, total: int) -> None:
        chosen = np.random.default_rng(SEED).choice(total, size=min(PICTURES, total), replace=False)
        self.chosen = frozenset(chosen.tolist())
        self.images: dict[int, bytes] = {}

    def take(self, place: int, data: bytes) -> None:
        """Keep `data` if its place is in the sample."""
        if place in self.chosen:
            self.images[place] = data


def prediction_rows(task: Task, guesses: Guesses, pictures: Mapping[int, bytes]) -> list[dict[str, Any]]:
    """A row for each image in the order of the data: what it is, the best guesses, and for some the picture."""
    titles = task.classes.titles
    place_of = {int(index): row for row, index in enumerate(guesses.index_N)}
    rows = []
    for index, key in enumerate(task.images.keys):
        row = place_of.get(index)
        tops = guesses.top_NK[row].tolist() if row is not None else []
        rows.append(
            {
                "key": key,
                "label": titles[task.labels_N[index]],
                "correct": bool(tops and tops[0] == task.labels_N[index]),
                "guesses": [titles[number] for number in tops],
                "probabilities": guesses.probability_NK[row].tolist() if row is not None else [],
                "image": thumbnail(pictures[index], PICTURE_PIXELS) or None if index in pictures else None,
                "problem": task.unreadable.get(index),
            }
        )
    return rows


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


def note(text: str) -> None:
    """A remark beside the results, on stderr."""
    print(text, file=sys.stderr)
