"""What is to be classified into what: labelled images, class names and templates, ready for any model."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import cpu_count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import UserError
from clipkit.eval.classes import Classes, Prompts, Templates, check_pooling, name_classes, prompts, templates, tokenise
from clipkit.eval.labelled import LabelledImages, open_labelled
from clipkit.eval.results import digest
from clipkit.formats.folders import printable
from clipkit.pixels.images import ImageError, Preprocess, UInt8Array, decode, eval_transform
from clipkit.text.tokenizer import Tokenizer

KEEP_PIXELS_BYTES = 1 << 30
UNREADABLE_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Pixels:
    """Some of a task's images as the model's input before normalising. `index_B` are their places in the task."""

    index_B: NDArray[np.int64]
    image_BHWC: UInt8Array


class Task:
    """What is to be classified into what. It keeps what is costly to make again while training goes on: the tokenised
    prompts and, up to 1 GiB, the decoded images, both for the latest preprocessing only.
    """

    def __init__(self, images: LabelledImages, classes: Classes, sentences: Templates) -> None:
        self.images, self.classes, self.templates = images, classes, sentences
        self.name = images.name
        place = {label: number for number, label in enumerate(classes.labels)}
        number_L = np.array([place[label] for label in images.label_names], dtype=np.int64)
        self.labels_N = number_L[images.labels_N]
        self.unreadable: dict[int, str] = {}
        self.notes = (*images.notes, *classes.notes)
        self.content = ""
        """A hash of all encoded images, once they were read."""
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

        An image that can't be read or decoded is noted in `unreadable`. Raises UserError when those are more than 1%.
        """
        if self._pixels is not None and self._pixels[0] == preprocess and also is None:
            yield from self._pixels[1]
            return
        self.unreadable, self._pixels = {}, None
        keep = len(self.images) * preprocess.size**2 * 3 <= KEEP_PIXELS_BYTES
        decoded: list[Pixels] = []
        images = self._decode_ahead(preprocess, batch_size, also)
        while batch := list(itertools.islice(images, batch_size)):
            pixels = stack(batch)
            if keep:
                decoded.append(pixels)
            yield pixels
        if keep:
            self._pixels = preprocess, decoded

    def _decode_ahead(
        self, preprocess: Preprocess, ahead: int, also: Callable[[int, bytes], None] | None
    ) -> Iterator[tuple[int, UInt8Array]]:
        """Places and pixels of the readable images, so many of them decoded ahead."""
        content = hashlib.blake2b(digest_size=16)
        with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:
            waiting: deque[tuple[int, Future[tuple[bytes, UInt8Array | ImageError]]]] = deque()

            def result() -> Iterator[tuple[int, UInt8Array]]:
                place, future = waiting.popleft()
                image_digest, image = future.result()
                content.update(image_digest)
                if isinstance(image, ImageError):
                    self._note_unreadable(place, image)
                else:
                    yield place, image

            for place, data in enumerate(self.images.read()):
                if also is not None and isinstance(data, bytes):
                    also(place, data)
                waiting.append((place, pool.submit(digest_and_decode, data, preprocess)))
                if len(waiting) > ahead:
                    yield from result()
            while waiting:
                yield from result()
        self.content = content.hexdigest()

    def _note_unreadable(self, place: int, error: ImageError) -> None:
        self.unreadable[place] = str(error)
        count, total = len(self.unreadable), len(self.images)
        if count > UNREADABLE_SHARE * total:
            raise UserError(
                f"{self.images.path}: {count:,} of {total:,} images can't be read, the last one "
                f"{self.images.keys[place]} ({error}): repair or remove them"
            ) from error


def stack(images: list[tuple[int, UInt8Array]]) -> Pixels:
    """One batch of single images."""
    return Pixels(np.array([place for place, _ in images], dtype=np.int64), np.stack([image for _, image in images]))


def digest_and_decode(data: bytes | ImageError, preprocess: Preprocess) -> tuple[bytes, UInt8Array | ImageError]:
    """A hash of an encoded image, and its pixels as uint8 [size, size, 3], or the reason why there are none."""
    if isinstance(data, ImageError):
        return b"", data
    try:
        image: UInt8Array | ImageError = eval_transform(
            decode(data), preprocess.size, interpolation=preprocess.interpolation, resize_mode=preprocess.resize_mode
        )
    except ImageError as error:
        image = error
    return hashlib.blake2b(data, digest_size=16).digest(), image


def open_task(
    data: Path,
    *,
    label: str = "label",
    templates_name: str = "openai-80",
    classes: Path | None = None,
    pooling: str = "mean",
    split: str | None = None,
    allow_empty_classes: bool = False,
    name: str | None = None,
) -> Task:
    """Find the labelled images, their class names and the templates. No image is decoded yet.

    Raises UserError when the labels are bare numbers and no file of names is given.
    """
    sentences = templates(templates_name)
    images = open_labelled(data, label=label, split=split, allow_empty_classes=allow_empty_classes)
    if not images.named and classes is None:
        raise UserError(
            f"{data}: the labels are numbers, which can't be written into a prompt: give names with --classes"
        )
    named = name_classes(images.label_names, data, classes, numbers=not images.named)
    task = Task(images, replace(named, pooling=check_pooling(pooling)), sentences)
    if images.named and images.are_numbers and classes is None:
        task.notes += (f"{data}: labels 0 to 999 are taken for ImageNet-1K's classes in its order",)
    task.name = printable(name or images.name)
    return task


def hashes(task: Task, preprocess: Preprocess) -> dict[str, str]:
    """What made a number, once the images were read. Two numbers with equal hashes are comparable."""
    names = [[label, *names] for label, names in zip(task.classes.labels, task.classes.names, strict=True)]
    if task.classes.pooling != "mean":
        names.append(["pooling", task.classes.pooling])
    labels = [task.images.label_names[number] for number in task.images.labels_N.tolist()]
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(preprocess).items()}
    return {
        "classes": digest(names),
        "templates": digest(task.templates.sentences),
        "split": digest([task.images.keys, labels, task.content]),
        "preprocessing": digest(shown),
    }
