"""What is to be classified into what: labelled images, class names and templates, for any model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from clipkit.embedding.encoder import Compute, Encoder, TextTokenizer, check_finite
from clipkit.embedding.vectors import ImageSet, embed_images
from clipkit.errors import UserError
from clipkit.eval.classification.imagenet import (
    IN_DISTRIBUTION,
    RELATIVES,
    as_relative,
    class_ids,
    in_distribution_folder,
    objectnet_names,
    real_labels,
)
from clipkit.eval.classification.images import LabelledImages
from clipkit.eval.classification.labelled import open_labelled
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
from clipkit.eval.classification.webdataset import number_rows
from clipkit.eval.datasets import PublishedDataset, find_published
from clipkit.eval.evaluation import Outcome, cut_notes, unreadable_notes
from clipkit.eval.metrics import (
    Measure,
    average_precision,
    bootstrapped,
    largest_class,
    measure,
    measure_macro_f1,
    measure_several,
    measure_worst_group,
)
from clipkit.eval.results import digest
from clipkit.formats.folders import printable
from clipkit.intervals import wilson
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
    logit_NC: NDArray[np.float32] | None = None
    """Where an image may have several labels."""


class Guessed(Protocol):
    """Labelled images of which the class is guessed."""

    images: LabelledImages
    classes: Classes
    labels_N: NDArray[np.int64]
    """Of each image its place among the classes."""
    pictures: ImageSet


class Classification:
    """Labelled images and the classes to choose from. The tokenised prompts and the decoded images are kept."""

    kind = "classification"

    def __init__(
        self, images: LabelledImages, classes: Classes, sentences: Templates, published: PublishedDataset | None = None
    ) -> None:
        """`published` is the dataset that this is said to be."""
        self.images, self.classes, self.templates, self.published = images, classes, sentences, published
        self.pictures = ImageSet(images.path, images.keys, images.read)
        self.name = images.name
        self.labels_N = images.labels_N
        # Where names repeat, as ImageNet's do, only the order tells them apart.
        if classes.labels != images.label_names:
            place = {label: number for number, label in enumerate(classes.labels)}
            number_L = np.array([place.get(label, -1) for label in images.label_names], dtype=np.int64)
            self.labels_N = number_L[images.labels_N]
        self.notes = images.notes
        self.real = real_labels(images.keys) if published and published.key == "imagenet1k" else None
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

    def hashes(self, preprocess: Preprocess) -> dict[str, str]:
        """What makes a number. Two numbers with equal hashes are comparable."""
        names = [[label, *names] for label, names in zip(self.classes.labels, self.classes.names, strict=True)]
        if self.classes.pooling != "mean":
            names.append(["pooling", self.classes.pooling])
        labels = [self.images.label_names[number] for number in self.images.labels_N.tolist()]
        return {
            "classes": digest(names),
            "templates": digest(self.templates.sentences),
            "split": digest([self.images.keys, labels, self.pictures.content]),
            "preprocessing": digest(vars(preprocess)),
        }

    def measure(self, encoder: Encoder, compute: Compute, keep_guesses: bool = False) -> Outcome:
        """Accuracies, and with `keep_guesses` a table with every guess. Raises UserError when the model gives NaN."""
        sample = PictureSample(len(self)) if keep_guesses else None
        guesses = classify(encoder, self, compute, sample.take if sample else None)
        cut = self.prompts(encoder.tokenizer, encoder.context_length).texts.cut
        notes = [*count_notes(self), *cut_notes(cut, "prompts", encoder)]
        notes += unreadable_notes(self.pictures, " and aren't counted")
        measures = measures_of(self, guesses)
        if self.published is not None and self.published.key == "imagenet-o":
            extra, note = detection(self, encoder, compute, guesses)
            measures += extra
            notes.append(note)
        return Outcome(
            measures,
            classes=len(self.classes),
            templates=self.templates.name,
            unreadable=len(self.pictures.unreadable),
            largest_class=largest_class(self.labels_N[guesses.index_N]),
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
    places, tops, probabilities, logits = [], [], [], []
    with encoder.evaluating():
        text_RE = class_embeddings(encoder, task.prompts(encoder.tokenizer, encoder.context_length), compute)
        class_R = torch.tensor(task.classes.class_of_rows, device=text_RE.device)
        for index_B, image_BE in embed_images(encoder, task.pictures, compute, also):
            logit_BR = encoder.scale * image_BE @ text_RE.T
            if task.images.targets_NC is not None:
                logits.append(logit_BR.cpu().numpy())
            share_BR = logit_BR.softmax(dim=-1)
            share_BC = share_BR.new_zeros(len(share_BR), len(task.classes)).index_add_(1, class_R, share_BR)
            probability_BK, top_BK = share_BC.topk(min(5, len(task.classes)))
            places.append(index_B)
            tops.append(top_BK.cpu().numpy())
            probabilities.append(check_finite(probability_BK.float().cpu()).numpy())
    return Guesses(
        np.concatenate(places),
        np.concatenate(tops),
        np.concatenate(probabilities),
        np.concatenate(logits) if logits else None,
    )


def measures_of(task: Classification, guesses: Guesses) -> list[Measure]:
    """All numbers of a task; of a published dataset also the metric that it is quoted by."""
    index_N, top_NK, classes = guesses.index_N, guesses.top_NK, len(task.classes)
    if task.images.targets_NC is not None:
        assert guesses.logit_NC is not None
        return measure_several(guesses.logit_NC, task.images.targets_NC[index_N])
    labels_N = task.labels_N[index_N]
    found = measure(top_NK, labels_N, classes, guesses.probability_NK[:, 0])
    if task.real is not None:
        right = [int(top) in task.real[i] for top, i in zip(top_NK[:, 0], index_N, strict=True) if task.real[i]]
        if right:
            chance = sum(map(len, task.real)) / len(right) / classes
            value = sum(right) / len(right)
            found.append(Measure("real_top1", value, *wilson(value, len(right)), len(right), chance))
    metric = task.published.main_metric if task.published else ""
    if metric == "macro_f1":
        found.append(measure_macro_f1(top_NK[:, 0], labels_N, classes))
    if metric.startswith("worst_group"):
        if task.images.metadata is None:
            raise UserError(
                f"{task.path}: its samples have no .npy with their groups, which {metric} needs: mend the tars"
            )
        group_N = number_rows(task.images.metadata, f"{task.path} .npy")[index_N, 0]
        k = int(metric[-1])
        found.append(measure_worst_group(top_NK, labels_N, group_N, k, k / classes))
    return found


def detection(task: Classification, encoder: Encoder, compute: Compute, guesses: Guesses) -> tuple[list[Measure], str]:
    """ImageNet-O's own metric: the area under precision and recall of telling its images, whose classes aren't among
    the 200, from ImageNet's of those classes by a low probability of the best guess; and a line on it.
    """
    folder = in_distribution_folder(task.path)
    if folder is None:
        return [], (
            "no AUPR, ImageNet-O's own metric: it needs ImageNet's validation images of the same classes, in "
            f"{IN_DISTRIBUTION} beside it"
        )
    inside = as_relative(open_labelled(folder), "imagenet-o", allow_empty_classes=True)
    known = classify(encoder, Classification(inside, task.classes, task.templates), compute)
    score_N = -np.concatenate([guesses.probability_NK[:, 0], known.probability_NK[:, 0]])
    is_out_N = np.arange(len(score_N)) < len(guesses.index_N)

    def value_of(index_N: NDArray[np.int64]) -> float:
        return average_precision(score_N[index_N], is_out_N[index_N])

    return [
        bootstrapped("aupr", value_of, len(score_N), float(is_out_N.mean()))
    ], f"AUPR against the images of {folder}"


def count_notes(task: Classification) -> Iterator[str]:
    """Where the images are other than a published dataset's name promises."""
    known = task.published
    if known is None or (known.key == "objectnet" and task.images.label_names != class_ids("objectnet")):
        return
    if len(task) != known.images:
        yield f"{known.title} has {known.images:,} images, but here are {len(task):,}: the numbers aren't comparable"
    if len(task.classes) != known.classes:
        yield f"{known.title} has {known.classes:,} classes, but here are {len(task.classes):,}"


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


def prediction_table(task: Guessed, guesses: Guesses, pictures: Mapping[int, bytes]) -> pa.Table:
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
    templates_name: str | None = None,
    classes: Path | None = None,
    pooling: str = "mean",
    split: str | None = None,
    allow_empty_classes: bool = False,
    name: str | None = None,
    published: PublishedDataset | None = None,
) -> Classification:
    """Find the labelled images, their class names and the templates. No image is decoded yet.

    Without `templates_name` those beside the data are taken, else `openai-80`. `published` is the dataset that this is;
    unsaid, the one that its folder is called after. Raises UserError when the labels are
    bare numbers and no file of names is given.
    """
    sentences = None if templates_name is None else templates(templates_name)
    images = open_labelled(data, label=label, split=split, allow_empty_classes=allow_empty_classes)
    if published is None:
        published = find_published(images.path) if label == "label" and "train" not in images.path.name else None
    if published is not None and published.key in RELATIVES and classes is None:
        images = as_relative(images, published.key, allow_empty_classes)
    if not images.named and classes is None:
        raise UserError(
            f"{data}: the labels are numbers, which can't be written into a prompt: give names with --classes"
        )
    if images.label_names == class_ids("objectnet"):
        images = replace(images, label_names=objectnet_names(images.label_names))
    occurring = [images.label_names[number] for number in np.unique(images.labels_N)]
    named = name_classes(images.label_names, data, classes, numbers=not images.named, occurring=occurring)
    if len(set(images.label_names)) < len(images.label_names) and named.labels != images.label_names:
        raise UserError(f"{classes}: {data} has two classes of one name: list the names in label order, one a line")
    if images.targets_NC is not None and pooling != "mean":
        raise UserError(f"{data}: its images have several labels, which --pooling {pooling} doesn't do: leave it out")
    notes = named.notes
    if sentences is None and images.templates is not None:
        sentences = templates(str(images.templates))
        notes += (f"{data}: templates from {images.templates}",)
    chosen = Classes(named.labels, named.names, check_pooling(pooling))
    task = Classification(images, chosen, sentences or templates("openai-80"), published)
    prompts(chosen, task.templates.sentences)  # each class has its sentences
    task.notes += notes
    if images.named and images.are_numbers and classes is None:
        title = published.title if published else "ImageNet-1K"
        task.notes += (f"{data}: labels 0 to {len(named.labels) - 1} are taken for {title}'s classes in its order",)
    task.name = printable(name or images.name)
    return task
