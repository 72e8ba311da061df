"""What is to be classified into what: labelled images, class names and templates, for any model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from clipkit.embedding.encoder import Compute, Encoder, TextTokenizer
from clipkit.embedding.images import ImageSet, embed_images
from clipkit.errors import UserError
from clipkit.eval.classification.labelled import LabelledImages, open_labelled
from clipkit.eval.classification.labels import name_classes
from clipkit.eval.classification.prompts import (
    Classes,
    Prompts,
    Templates,
    check_pooling,
    class_embeddings,
    prompts,
    templates,
    tokenise_prompts,
)
from clipkit.eval.evaluation import Outcome
from clipkit.eval.metrics import largest_class, measure
from clipkit.eval.results import digest, preprocessing_digest
from clipkit.formats.folders import printable
from clipkit.pixels.images import Preprocess, thumbnail

# The sample of pictures that go with the guesses.
SEED, PICTURES, PICTURE_PIXELS = 0, 400, 128

GUESSES = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("correct", pa.bool_()),
        ("guesses", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float32())),
        ("image", pa.binary()),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class Guesses:
    """The best guesses for each readable image, best first. K is 5, or the number of classes when that is less."""

    index_N: NDArray[np.int64]
    top_NK: NDArray[np.int64]
    probability_NK: NDArray[np.float32]


class Classification:
    """Labelled images and the classes to choose from. The tokenised prompts and the decoded images are kept."""

    kind = "classification"

    def __init__(self, images: LabelledImages, classes: Classes, sentences: Templates) -> None:
        self.images, self.classes, self.templates = images, classes, sentences
        self.pictures = ImageSet(images.path, images.keys, images.read)
        self.name = images.name
        place = {label: number for number, label in enumerate(classes.labels)}
        number_L = np.array([place.get(label, -1) for label in images.label_names], dtype=np.int64)
        self.labels_N = number_L[images.labels_N]
        self.notes = images.notes
        self._prompts: tuple[tuple[TextTokenizer, int], Prompts] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def path(self) -> Path:
        """Where the images are."""
        return self.images.path

    def prompts(self, tokenizer: TextTokenizer, context_length: int) -> Prompts:
        """The prompts for this tokenizer and context length."""
        asked = tokenizer, context_length
        if self._prompts is None or self._prompts[0] != asked:
            texts = prompts(self.classes, self.templates.sentences)
            self._prompts = asked, tokenise_prompts(texts, tokenizer, context_length)
        return self._prompts[1]

    def measure(self, encoder: Encoder, compute: Compute, keep_guesses: bool = False) -> Outcome:
        """Accuracies, and with `keep_guesses` a table with every guess. Raises UserError when the model gives NaN."""
        sample = PictureSample(len(self)) if keep_guesses else None
        guesses = classify(encoder, self, compute, sample.take if sample else None)
        labels_N = self.labels_N[guesses.index_N]
        notes = []
        if cut := self.prompts(encoder.tokenizer, encoder.context_length).texts.cut:
            notes.append(
                f"{cut:,} prompts are longer than the {encoder.context_length} text tokens of the model and were cut"
            )
        unreadable = self.pictures.unreadable
        if unreadable:
            reason = next(iter(unreadable.values()))
            notes.append(f"{len(unreadable):,} images can't be read and aren't counted, for example: {reason}")
        return Outcome(
            measure(guesses.top_NK, labels_N, len(self.classes)),
            hashes(self, encoder.preprocess),
            classes=len(self.classes),
            templates=self.templates.name,
            unreadable=len(unreadable),
            largest_class=largest_class(labels_N),
            notes=tuple(notes),
            guesses=prediction_table(self, guesses, sample.images) if sample else None,
        )


@torch.no_grad()
def classify(
    encoder: Encoder, task: Classification, compute: Compute, also: Callable[[int, bytes], None] | None = None
) -> Guesses:
    """Guess the class of every image; `also` is shown each place and encoded image.

    Raises UserError when the model gives NaN.
    """
    places, tops, probabilities = [], [], []
    with encoder.evaluating():
        text_RE = class_embeddings(encoder, task.prompts(encoder.tokenizer, encoder.context_length), compute)
        class_R = torch.tensor(task.classes.class_of_rows, device=text_RE.device)
        for index_B, image_BE in embed_images(encoder, task.pictures, compute, also):
            share_BR = (encoder.scale * image_BE @ text_RE.T).softmax(dim=-1)
            share_BC = share_BR.new_zeros(len(share_BR), len(task.classes)).index_add_(1, class_R, share_BR)
            probability_BK, top_BK = share_BC.topk(min(5, len(task.classes)))
            places.append(index_B)
            tops.append(top_BK.cpu().numpy())
            probabilities.append(probability_BK.float().cpu().numpy())
    guesses = Guesses(np.concatenate(places), np.concatenate(tops), np.concatenate(probabilities))
    if not np.isfinite(guesses.probability_NK).all():
        raise UserError("the model gives NaN: its weights are broken; take an earlier checkpoint")
    return guesses


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


def prediction_table(task: Classification, guesses: Guesses, pictures: Mapping[int, bytes]) -> pa.Table:
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
                "problem": task.pictures.unreadable.get(index),
            }
        )
    return pa.Table.from_pylist(rows, schema=GUESSES)


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
) -> Classification:
    """Find the labelled images, their class names and the templates. No image is decoded yet.

    Raises UserError when the labels are bare numbers and no file of names is given.
    """
    sentences = templates(templates_name)
    images = open_labelled(data, label=label, split=split, allow_empty_classes=allow_empty_classes)
    if not images.named and classes is None:
        raise UserError(
            f"{data}: the labels are numbers, which can't be written into a prompt: give names with --classes"
        )
    occurring = [images.label_names[number] for number in np.unique(images.labels_N)]
    named = name_classes(images.label_names, data, classes, numbers=not images.named, occurring=occurring)
    task = Classification(images, Classes(named.labels, named.names, check_pooling(pooling)), sentences)
    task.notes += named.notes
    if images.named and images.are_numbers and classes is None:
        task.notes += (f"{data}: labels 0 to 999 are taken for ImageNet-1K's classes in its order",)
    task.name = printable(name or images.name)
    return task


def hashes(task: Classification, preprocess: Preprocess) -> dict[str, str]:
    """What made a number, once the images were read. Two numbers with equal hashes are comparable."""
    names = [[label, *names] for label, names in zip(task.classes.labels, task.classes.names, strict=True)]
    if task.classes.pooling != "mean":
        names.append(["pooling", task.classes.pooling])
    labels = [task.images.label_names[number] for number in task.images.labels_N.tolist()]
    return {
        "classes": digest(names),
        "templates": digest(task.templates.sentences),
        "split": digest([task.images.keys, labels, task.pictures.content]),
        "preprocessing": preprocessing_digest(preprocess),
    }
