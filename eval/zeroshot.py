"""Zero-shot classification by prompt ensembles: as a command on a checkpoint, and as an evaluator while training."""

import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from clipkit import checkpoint as checkpoints
from clipkit.device import Device, pick
from clipkit.errors import UserError
from clipkit.eval import predictions, results
from clipkit.eval.classes import Classes, Templates, name_classes, prompts, templates
from clipkit.eval.classifier import Prompts, class_embeddings, pad_rows, tokenise
from clipkit.eval.labelled import LabelledImages, open_labelled
from clipkit.eval.metrics import Measure, largest_class, measure
from clipkit.eval.results import Result, digest
from clipkit.images import Preprocess, decode, eval_transform, normalise
from clipkit.log import Progress
from clipkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.model import CLIP

KEEP_PIXELS_BYTES = 1 << 30
UNREADABLE_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Pixels:
    """Some of a task's images as the model's input before normalising. `index_B` are their places in the task."""

    index_B: NDArray[np.int64]
    image_BHWC: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Guesses:
    """The best guesses for each readable image, best first. K is 5, or the number of classes when that is less."""

    index_N: NDArray[np.int64]
    top_NK: NDArray[np.int64]
    probability_NK: NDArray[np.float32]


class Task:
    """What is to be classified into what. It keeps what is costly to make again while training goes on: the tokenised
    prompts and, up to 1 GiB, the decoded images, both for the latest preprocessing alone.
    """

    def __init__(self, images: LabelledImages, classes: Classes, sentences: Templates) -> None:
        self.images, self.classes, self.templates = images, classes, sentences
        self.name = images.name
        place = {label: number for number, label in enumerate(classes.labels)}
        number_L = np.array([place[label] for label in images.label_names], dtype=np.int64)
        self.labels_N = number_L[images.labels_N]
        self.unreadable: dict[int, str] = {}
        self._prompts: tuple[int, Prompts] | None = None
        self._pixels: tuple[Preprocess, list[Pixels]] | None = None

    def prompts(self, tokenizer: Tokenizer, context_length: int) -> Prompts:
        """The prompts for this context length."""
        if self._prompts is None or self._prompts[0] != context_length:
            texts = prompts(self.classes, self.templates.sentences)
            self._prompts = context_length, tokenise(texts, tokenizer, context_length)
        return self._prompts[1]

    def pixels(
        self, preprocess: Preprocess, batch_size: int, also: Callable[[int, bytes], None] | None = None
    ) -> Iterator[Pixels]:
        """The images, decoded on all cores a little ahead of the model; `also` is shown each place and encoded image.

        An image that can't be decoded is noted in `unreadable`. Raises UserError when those are more than 1%.
        """
        if self._pixels is not None and self._pixels[0] == preprocess and also is None:
            yield from self._pixels[1]
            return
        self.unreadable, self._pixels = {}, None
        keep = len(self.images) * preprocess.size**2 * 3 <= KEEP_PIXELS_BYTES
        kept: list[Pixels] = []
        with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:
            waiting: deque[tuple[int, Future[NDArray[np.uint8]]]] = deque()
            done: list[tuple[int, NDArray[np.uint8]]] = []
            for place, data in enumerate(self.images.read()):
                if also is not None:
                    also(place, data)
                waiting.append((place, pool.submit(model_input, data, preprocess)))
                if len(waiting) > batch_size:
                    self._take(waiting.popleft(), done)
                if len(done) == batch_size:
                    kept.append(stack(done))
                    yield kept[-1] if keep else kept.pop()
                    done = []
            while waiting:
                self._take(waiting.popleft(), done)
            for start in range(0, len(done), batch_size):
                kept.append(stack(done[start : start + batch_size]))
                yield kept[-1] if keep else kept.pop()
        if keep:
            self._pixels = preprocess, kept

    def _take(self, job: "tuple[int, Future[NDArray[np.uint8]]]", done: list[tuple[int, NDArray[np.uint8]]]) -> None:
        place, future = job
        try:
            done.append((place, future.result()))
        except UserError as error:
            self.unreadable[place] = str(error)
            count, total = len(self.unreadable), len(self.images)
            if count > UNREADABLE_SHARE * total:
                raise UserError(
                    f"{self.images.path}: {count:,} of {total:,} images can't be read, the last one "
                    f"{self.images.keys[place]} ({error}): mend or remove them"
                ) from error


def stack(images: list[tuple[int, NDArray[np.uint8]]]) -> Pixels:
    """One batch of single images."""
    return Pixels(np.array([place for place, _ in images], dtype=np.int64), np.stack([image for _, image in images]))


def model_input(data: bytes, preprocess: Preprocess) -> NDArray[np.uint8]:
    """An encoded image as uint8 [size, size, 3]. Raises ImageError when it isn't an image."""
    return eval_transform(
        decode(data), preprocess.size, interpolation=preprocess.interpolation, resize_mode=preprocess.resize_mode
    )


def open_task(
    data: Path,
    *,
    label: str = "label",
    templates_name: str = "openai-80",
    classes: Path | None = None,
    split: str | None = None,
    name: str | None = None,
) -> Task:
    """Find the labelled images, their class names and the templates. No image is decoded yet.

    Raises UserError when the labels are bare numbers and no file of names is given.
    """
    sentences = templates(templates_name)
    images = open_labelled(data, label=label, split=split)
    if not images.named and classes is None:
        raise UserError(
            f"{data}: the labels are numbers, which can't be written into a prompt: give names with --classes"
        )
    task = Task(images, name_classes(images.label_names, data, classes), sentences)
    task.name = name or images.name
    return task


@torch.no_grad()
def classify(
    model: "CLIP",
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    task: Task,
    device: Device,
    *,
    context_length: int | None = None,
    batch_size: int = 256,
    also: Callable[[int, bytes], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Guesses:
    """Guess the class of every image. The model's mode (train or eval) is put back afterwards.

    `context_length` is the model's own unless given. Raises UserError when the model gives NaN.
    """
    training = model.training
    model.eval()
    try:
        text_CE = class_embeddings(model, task.prompts(tokenizer, context_length or text_length(model)), device)
        scale = model.logit_scale.exp().clamp(max=100.0)
        places, tops, probabilities = [], [], []
        for pixels in task.pixels(preprocess, batch_size, also):
            rows = len(pixels.index_B)
            image = pixels.image_BHWC if device.kind != "xla" else pad_rows(pixels.image_BHWC, batch_size)
            image_BHWC = device.batch({"image": image})["image"]
            with device.autocast("auto"):
                image_BE = model.encode_image(normalise(image_BHWC, preprocess.mean, preprocess.std))
            share_BC = (scale * image_BE.float() @ text_CE.T).softmax(dim=-1)
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
    context_length: int | None = None,
    batch_size: int = 256,
) -> Iterator[tuple[str, float]]:
    """Yield `(task/metric, value)` for a model in training: `emoji-heldout/top1` and so on."""
    guesses = classify(model, tokenizer, preprocess, task, device, context_length=context_length, batch_size=batch_size)
    for each in measures(task, guesses):
        yield f"{task.name}/{each.metric}", each.value


def measures(task: Task, guesses: Guesses) -> list[Measure]:
    """The task's metrics, each with interval and chance."""
    return measure(guesses.top_NK, task.labels_N[guesses.index_N], len(task.classes))


def hashes(task: Task, preprocess: Preprocess) -> dict[str, str]:
    """What made a number. Two numbers with equal hashes are comparable."""
    names = [[label, *names] for label, names in zip(task.classes.labels, task.classes.names, strict=True)]
    labels = [task.images.label_names[number] for number in task.images.labels_N.tolist()]
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(preprocess).items()}
    return {
        "classes": digest(names),
        "templates": digest(task.templates.sentences),
        "split": digest([task.images.keys, labels]),
        "preprocessing": digest(shown),
    }


def zeroshot(
    checkpoint: Path,
    data: Path,
    *,
    label: str = "label",
    templates: str = "openai-80",
    classes: Path | None = None,
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
    task = open_task(data, label=label, templates_name=templates, classes=classes, split=split, name=task_name)
    loaded = checkpoints.load(checkpoint)
    run = out or run_of(loaded.path)
    where = pick(device)
    model = checkpoints.build_model(loaded).to(where.torch)
    thumbnails = predictions.Thumbnails(len(task.images))
    with Progress(f"zeroshot {task.name}", len(task.images), "images") as progress:
        guesses = classify(
            model,
            Tokenizer(),
            loaded.preprocess,
            task,
            where,
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
    predictions.write(
        run / f"predictions-{file_name(task.name)}.parquet",
        predictions.rows(task, guesses, thumbnails.images),
        about={"task": task.name, "samples_seen": loaded.samples_seen, "templates": task.templates.name},
    )
    results.write(run, found)
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
