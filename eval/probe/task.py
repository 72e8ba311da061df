"""Test images to classify by a classifier that learned from a model's features of training images."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from clipkit.config import nearest
from clipkit.embedding.encoder import Compute, Encoder
from clipkit.embedding.vectors import ImageSet, image_matrix
from clipkit.errors import UserError
from clipkit.eval.classification.images import LabelledImages
from clipkit.eval.classification.labelled import open_labelled, refuse_option
from clipkit.eval.classification.labels import name_classes
from clipkit.eval.classification.prompts import Classes
from clipkit.eval.classification.task import Guesses, PictureSample, prediction_table
from clipkit.eval.evaluation import Outcome, unreadable_notes
from clipkit.eval.metrics import Measure, largest_class, measure
from clipkit.eval.probe import neighbours, ridge
from clipkit.eval.results import digest
from clipkit.eval.retrieval.task import ranking_device
from clipkit.formats.folders import printable
from clipkit.formatting import counted
from clipkit.pixels.images import Preprocess

ProbeKind = Literal["linear-probe", "few-shot", "knn"]
Guessing = tuple[NDArray[np.int64], NDArray[np.float32]]
"""The best classes of each image, best first, and what speaks for each: [N, at most 5]."""
SEED = 0
HELD_OUT_SHARE, MOST_HELD_OUT = 0.2, 20_000
DRAWS, T_95 = 10, 2.2621571627409915  # Student's t for 95% with one degree of freedom less than there are draws


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Readable images of one data set: places in the data, unit features float32[N, E] on the CPU, class numbers."""

    index_N: NDArray[np.int64]
    feature_NE: torch.Tensor
    labels_N: NDArray[np.int64]


class Probe:
    """Training and test images of the same classes, and what is to learn from the one for the other."""

    def __init__(self, kind: ProbeKind, test: LabelledImages, train: LabelledImages, shots: Sequence[int] = ()) -> None:
        """Raises UserError for a test class that has no training images, and where both are the same images."""
        self.kind: str = kind
        self.images, self.train, self.shots = test, train, tuple(shots)
        if test.path.resolve() == train.path.resolve():
            raise UserError(f"{test.path}: a {kind} can't be tested on its own training images: give --train-data")
        for each in (train, test):
            if each.targets_NC is not None:
                raise UserError(f"{each.path}: its images have several labels, which a {kind} can't learn")
        labels, self.train_labels_N, self.labels_N = match_labels(train, test)
        self.classes = Classes(labels, name_classes(labels, train.path).names)
        self.pictures, self.train_pictures = (ImageSet(each.path, each.keys, each.read) for each in (test, train))
        self.path, self.name = test.path, f"{test.name}-{kind}"
        self.notes = (*train.notes, *test.notes)
        require_shots(self.train_labels_N, labels, max(self.shots, default=0), train.path)
        self._overlap: int | None = None

    def __len__(self) -> int:
        return len(self.train) + len(self.images)

    def measure(self, encoder: Encoder, compute: Compute, keep_guesses: bool = False) -> Outcome:
        """Accuracies on the test images, and with `keep_guesses` a table with every guess.

        Raises UserError when the model gives NaN, and where all test images are training images too, to the byte.
        """
        sample = PictureSample(len(self.images)) if keep_guesses else None
        train, test = self._features(encoder, compute, sample)
        notes: list[str] = []
        for each in (self.train_pictures, self.pictures):
            notes += unreadable_notes(each, " and aren't counted", f" of {each.path}")
        if self._overlap:
            notes.append(f"{self._overlap:,} of {len(self.images):,} test images are training images too, to the byte")
        top, classes = min(5, len(self.classes)), len(self.classes)
        measures: list[Measure] = []
        match self.kind:
            case "linear-probe":
                held_N = hold_out(train.labels_N, np.random.default_rng(SEED))
                probe = ridge.fit(train.feature_NE, train.labels_N, classes, held_N)
                notes.append(chosen(f"penalty {probe.penalty:.2g}", held_N))
                guessed = probe.guess(test.feature_NE, top)
            case "knn":
                where, held_N = ranking_device(compute), hold_out(train.labels_N, np.random.default_rng(SEED))
                vote = neighbours.choose_vote(train.feature_NE, train.labels_N, classes, where, held_N)
                notes.append(chosen(vote_text(vote), held_N))
                among = neighbours.Neighbours(train.feature_NE, train.labels_N, classes, where)
                guessed = among.guess(test.feature_NE, vote, top)
            case _:
                measures, guessed = self._few_shot(train, test)
                notes.append(
                    f"means of {DRAWS} draws; the guesses are of the last with {self.shots[-1]} images a class"
                )
        return Outcome(
            measures or measure(guessed[0], test.labels_N, classes),
            classes=classes,
            unreadable=len(self.pictures.unreadable),
            largest_class=largest_class(test.labels_N),
            notes=tuple(notes),
            guesses=prediction_table(self, Guesses(test.index_N, *guessed), sample.images) if sample else None,
        )

    def _features(self, encoder: Encoder, compute: Compute, sample: PictureSample | None) -> tuple[Features, Features]:
        """Of the training and of the test images."""
        contents: tuple[set[bytes], set[bytes]] = set(), set()
        first = self._overlap is None

        def look(number: int, place: int, data: bytes) -> None:
            if first:
                contents[number].add(hashlib.blake2b(data, digest_size=16).digest())
            if sample is not None and number == 1:
                sample.take(place, data)

        with encoder.evaluating():
            index_N, feature_NE = image_matrix(
                encoder, self.train_pictures, compute, partial(look, 0) if first else None
            )
            train = Features(index_N, feature_NE, self.train_labels_N[index_N])
            if tell := compute.progress:
                compute = dataclasses.replace(compute, progress=lambda done: tell(len(self.train) + done))
            also = partial(look, 1) if first or sample else None
            index_N, feature_NE = image_matrix(encoder, self.pictures, compute, also)
        if first and contents[1] <= contents[0]:
            raise UserError(f"{self.path}: all test images are training images of {self.train.path} too")
        if first:
            self._overlap = len(contents[0] & contents[1])
        return train, Features(index_N, feature_NE, self.labels_N[index_N])

    def _few_shot(self, train: Features, test: Features) -> tuple[list[Measure], Guessing]:
        """The measures over all draws of so many images a class, and the guesses of the last one."""
        measures, classes = [], len(self.classes)
        for shots in self.shots:
            require_shots(train.labels_N, self.classes.labels, shots, self.train.path)
            drawn = []
            for number in range(DRAWS):
                rng = np.random.default_rng((SEED, shots, number))
                places = draw(train.labels_N, shots, rng)
                labels_N = train.labels_N[places]
                probe = ridge.fit(train.feature_NE[places], labels_N, classes, hold_out(labels_N, rng))
                guessed = probe.guess(test.feature_NE, min(5, classes))
                drawn.append(measure(guessed[0], test.labels_N, classes))
            measures += [mean_of_draws(each, f"{shots}-shot") for each in zip(*drawn, strict=True)]
        return measures, guessed

    def hashes(self, preprocess: Preprocess) -> dict[str, str]:
        """Of training and test images, their labels, the kind of probe and preprocessing."""

        def of(images: LabelledImages, pictures: ImageSet) -> str:
            labels = [images.label_names[number] for number in images.labels_N.tolist()]
            return digest([images.keys, labels, pictures.content])

        return {
            "classes": digest(self.classes.labels),
            "train": of(self.train, self.train_pictures),
            "split": of(self.images, self.pictures),
            "probe": digest([self.kind, SEED, DRAWS, self.shots]),
            "preprocessing": digest(vars(preprocess)),
        }


def match_labels(
    train: LabelledImages, test: LabelledImages
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64]]:
    """The labels that occur in training, and the places of training and test images among them.

    They are matched by their texts, where both list the same ones by number, so that two of one name stay apart.
    Raises UserError for a test label that doesn't occur in training, or may be either of two.
    """
    numbers, train_N = np.unique(train.labels_N, return_inverse=True)
    asked, test_N = np.unique(test.labels_N, return_inverse=True)
    labels = [train.label_names[number] for number in numbers.tolist()]
    wanted: list[str | int] = [test.label_names[number] for number in asked.tolist()]
    known: list[str | int] = [*labels]
    if test.label_names == train.label_names:
        wanted, known = asked.tolist(), numbers.tolist()
    elif len(set(known)) < len(known) or len(set(wanted)) < len(wanted):
        raise UserError(f"{train.path} and {test.path}: two classes have one name, and the lists of names differ")
    place = {label: number for number, label in enumerate(known)}
    lacking = [test.label_names[number] for number, label in zip(asked, wanted, strict=True) if label not in place]
    if lacking:
        others = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        raise UserError(
            f"{train.path} has no training images of the class {lacking[0]!r}{others} of {test.path}: "
            f"{nearest(lacking[0], labels)}"
        )
    return tuple(labels), train_N, np.array([place[label] for label in wanted], dtype=np.int64)[test_N]


def require_shots(labels_N: NDArray[np.int64], labels: Sequence[str], shots: int, where: Path) -> None:
    """Raise UserError for a class that has fewer images."""
    n_C = np.bincount(labels_N, minlength=len(labels))
    if n_C.min() < shots:
        few = labels[int(n_C.argmin())]
        raise UserError(
            f"{where}: the class {few!r} has {counted(int(n_C.min()), 'readable training image')}, fewer than {shots}: "
            "ask for fewer with --shots"
        )


# ---- Seeded parts of the training images: a probe chooses by these what it has to choose, never by test images ------


def ranks_in_class(labels_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random place, from 0, of each image among those of its class."""
    shuffled = rng.permutation(len(labels_N))
    by_class = shuffled[np.argsort(labels_N[shuffled], kind="stable")]
    first_C = np.concatenate([[0], np.cumsum(np.bincount(labels_N))])
    rank_N = np.empty_like(labels_N)
    rank_N[by_class] = np.arange(len(labels_N)) - first_C[labels_N[by_class]]
    return rank_N


def hold_out(labels_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which images to choose by: a fifth of each class, about 20,000 at most.

    Of each class with two images or more it is one at least; a class's only image is never held out.
    """
    n_C = np.bincount(labels_N)
    share = min(HELD_OUT_SHARE, MOST_HELD_OUT / len(labels_N))
    held_C = np.minimum(np.maximum(1, np.rint(share * n_C)), n_C - 1)
    return ranks_in_class(labels_N, rng) < held_C[labels_N]


def draw(labels_N: NDArray[np.int64], shots: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The places of `shots` random images of each class."""
    return np.flatnonzero(ranks_in_class(labels_N, rng) < shots)


# ---- Words and numbers -----------------------------------------------------------------------------------------------


def mean_of_draws(drawn: Sequence[Measure], name: str) -> Measure:
    """The mean over the draws. Its interval is for other draws and other test images: the two distances to its end,
    by Student's t and by the draws' own intervals, are added as independent ones are (Zou and Donner, 2008).
    """
    values = np.array([each.value for each in drawn])
    one, value = drawn[0], float(values.mean())
    half = T_95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    below, above = (float(np.mean([abs(getattr(each, end) - each.value) for each in drawn])) for end in ("low", "high"))
    low, high = max(0.0, value - math.hypot(half, below)), min(1.0, value + math.hypot(half, above))
    return Measure(f"{one.metric}:{name}", value, low, high, one.n, one.chance)


def chosen(what: str, held_N: NDArray[np.bool_]) -> str:
    """How a setting was chosen."""
    by = f"{held_N.sum():,} of {len(held_N):,} training images"
    return f"{what}, chosen by {by}" if held_N.any() else f"{what}: no class has a second training image to choose by"


def vote_text(vote: neighbours.Vote) -> str:
    """A vote in words."""
    weights = "equal weights" if math.isinf(vote.temperature) else f"temperature {vote.temperature:g}"
    return f"{counted(vote.count, 'neighbour')}, {weights}"


def open_probe(
    kind: ProbeKind,
    data: Path,
    *,
    train_data: Path | None = None,
    shots: str | None = None,
    label: str = "label",
    split: str | None = None,
    allow_empty_classes: bool = False,
    name: str | None = None,
) -> Probe:
    """Find the test images as for classification, and the training images: the split `train` of `train_data`, or of the
    same data. `shots` are rising numbers with commas between them, 1,5,10 unless said. No image is decoded yet.
    """
    refuse_option("--shots", shots is not None and kind != "few-shot", f"a {kind} learns from all training images")
    test = open_labelled(data, label=label, split=split, allow_empty_classes=allow_empty_classes)
    try:
        train = open_labelled(
            train_data or data, label=label, allow_empty_classes=allow_empty_classes, default_splits=("train",)
        )
    except UserError as error:
        raise UserError(f"no training images, which --train-data names: {error}") from error
    task = Probe(kind, test, train, parse_shots(str(shots or "1,5,10")) if kind == "few-shot" else ())
    task.name = printable(name or task.name)
    return task


def parse_shots(text: str) -> list[int]:
    """Numbers of images of each class. Raises UserError for what isn't a rising list of them."""
    counts = [int(each) for each in text.split(",") if each.strip().isdecimal()]
    if len(counts) <= text.count(",") or counts[0] < 1 or counts != sorted(set(counts)):
        raise UserError(f"--shots {text!r} isn't a list of rising numbers of images: write 1,5,10")
    return counts
