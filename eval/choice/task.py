"""What a model chooses: questions of images and captions, ready for any model.

A choice is right when the right score is strictly above all others: equal scores are no choice, so a model that gives
the same score to everything gets nothing right.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipkit.embedding.encoder import Compute, Encoder
from clipkit.embedding.vectors import ImageSet, image_matrix, tokenise, tokenised_matrix
from clipkit.eval.choice.questions import Question, read_picture, read_questions
from clipkit.eval.evaluation import Outcome, cut_notes, unreadable_notes
from clipkit.eval.metrics import Measure, bootstrapped, mean_per_class_recall
from clipkit.eval.results import digest
from clipkit.formats.folders import printable
from clipkit.formatting import counted
from clipkit.intervals import wilson
from clipkit.pixels.images import ImageError, Preprocess, thumbnail

MOST_CATEGORIES = 60  # more of them get no number each
# WinoGAViL's numbers, by the candidates that a question has; DataComp's metric is the last one.
GROUPS = {"jaccard": (0, 1 << 30), "jaccard_5_6": (5, 6), "jaccard_10_12": (10, 12)}
CHANCE_OF_PAIRS = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}
SEED, EXAMPLES, PICTURE_PIXELS = 0, 200, 128

GUESSES = pa.schema(
    [
        ("key", pa.string()),
        ("category", pa.string()),
        ("correct", pa.bool_()),
        ("right", pa.list_(pa.string())),
        ("captions", pa.list_(pa.string())),
        ("scores", pa.list_(pa.list_(pa.float32()))),
        ("pictures", pa.list_(pa.binary())),
        ("associated", pa.list_(pa.int64())),
        ("problem", pa.string()),
    ]
)


class Choice:
    """Questions of one kind: one image with captions, two images with two captions, or images for one caption."""

    kind = "choice"
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, questions: Sequence[Question]) -> None:
        self.path, self.questions, self.name = path, questions, path.stem
        unique = list(dict.fromkeys(picture for question in questions for picture in question.pictures))
        place = {picture: number for number, picture in enumerate(unique)}
        self.places = [[place[picture] for picture in question.pictures] for question in questions]

        def read() -> Iterator[bytes | ImageError]:
            return map(read_picture, unique)

        self.pictures = ImageSet(path, [picture.key for picture in unique], read)

    def __len__(self) -> int:
        return len(self.pictures)

    def hashes(self, preprocess: Preprocess) -> dict[str, str]:
        """Of captions, questions, images and preprocessing."""
        keys = [[question.key, question.category] for question in self.questions]
        texts = [caption for question in self.questions for caption in question.captions]
        return {
            "texts": digest([question.captions for question in self.questions]),
            "split": digest([keys, texts, self.places, self.pictures.content]),
            "preprocessing": digest(vars(preprocess)),
        }

    def measure(self, encoder: Encoder, compute: Compute, keep_guesses: bool = False) -> Outcome:
        """The share of right choices, of all questions and of each category. Raises UserError when the model gives NaN.

        A question with an image that can't be read isn't counted.
        """
        texts = [caption for question in self.questions for caption in question.captions]
        with encoder.evaluating():
            index_N, image_NE = image_matrix(encoder, self.pictures, compute)
            tokenised = tokenise(texts, encoder.tokenizer, encoder.context_length)
            text_CE = tokenised_matrix(encoder, tokenised, compute).cpu()
        row_of = {place: row for row, place in enumerate(index_N.tolist())}
        scores: list[NDArray[np.float32] | None] = []
        first = 0
        for question, places in zip(self.questions, self.places, strict=True):
            stop = first + len(question.captions)
            rows = [row_of[place] for place in places if place in row_of]
            whole = len(rows) == len(places)
            scores.append((image_NE[rows] @ text_CE[first:stop].T).numpy() if whole else None)
            first = stop
        notes = cut_notes(tokenised.cut, "captions", encoder)
        left_out = counted(sum(each is None for each in scores), "question")
        notes += unreadable_notes(self.pictures, f", so {left_out} can't be counted")
        return Outcome(
            (association_measures if self.questions[0].associated else choice_measures)(self.questions, scores),
            unreadable=len(self.pictures.unreadable),
            notes=tuple(notes),
            guesses=guess_table(self, scores) if keep_guesses else None,
        )


def right_choices(score_IC: NDArray[np.float32]) -> dict[str, bool]:
    """Which choices are right, from the scores of a question's images and captions.

    `accuracy` is of one image with its caption first. Of as many images as captions in their order: `text_score`, each
    image has its own caption above the others; `image_score`, each caption its own image; `group_score`, both
    (Thrush et al., "Winoground", 2022).
    """
    images = len(score_IC)
    if images == 1:
        return {"accuracy": bool(score_IC[0, 0] > score_IC[0, 1:].max())}
    own_I = score_IC.diagonal()
    wrong_II = np.where(np.eye(images, dtype=bool), -np.inf, score_IC)
    text = bool((own_I > wrong_II.max(axis=1)).all())
    image = bool((own_I > wrong_II.max(axis=0)).all())
    return {"text_score": text, "image_score": image, "group_score": text and image}


def right_of(question: Question, score_IC: NDArray[np.float32]) -> dict[str, bool]:
    """Which choices of a question of any kind are right."""
    if question.associated:
        return {"jaccard": jaccard(score_IC[:, 0], question.associated) == 1}
    return right_choices(score_IC)


def choice_measures(questions: Sequence[Question], scores: Sequence[NDArray[np.float32] | None]) -> list[Measure]:
    """Each share with Wilson's interval: over all questions, as the mean over the categories, and of each category,
    as `accuracy:replace_obj`. A question without scores isn't counted.
    """
    asked = zip(questions, scores, strict=True)
    answered = [(question, right_choices(each)) for question, each in asked if each is not None]
    category_N = np.array([question.category for question, _ in answered])
    categories, number_N = np.unique(category_N, return_inverse=True)
    found = []
    for metric in answered[0][1]:
        right_N = np.array([right[metric] for _, right in answered])
        chance_N = np.array([CHANCE_OF_PAIRS.get(metric, 1 / len(question.captions)) for question, _ in answered])
        found.append(share(metric, right_N, chance_N))
        if len(categories) > 1:
            chance = float(np.mean([chance_N[number_N == number].mean() for number in range(len(categories))]))
            mean = mean_per_class_recall(right_N, number_N)
            found.append(Measure(f"mean_per_category_{metric}", *mean, len(answered), chance))
        if 1 < len(categories) <= MOST_CATEGORIES:
            for number, category in enumerate(categories.tolist()):
                own = number_N == number
                found.append(share(f"{metric}:{category}", right_N[own], chance_N[own]))
    return found


def share(metric: str, right_N: NDArray[np.bool_], chance_N: NDArray[np.float64]) -> Measure:
    """The share of right choices."""
    value, n = float(right_N.mean()), len(right_N)
    return Measure(metric, value, *wilson(value, n), n, float(chance_N.mean()))


# ---- WinoGAViL: the images among several candidates that people associated with a cue (Bitton et al., 2022) ----------


def jaccard(score_N: NDArray[np.float32], right: Sequence[int]) -> float:
    """Of the candidates with the best scores, of which as many are chosen as are right; of equal ones the later."""
    chosen = np.argsort(score_N, kind="stable")[len(score_N) - len(right) :]
    common = len(set(chosen.tolist()) & set(right))
    return common / (2 * len(right) - common)


def guessed(candidates: int, right: int) -> float:
    """The mean Jaccard index of choosing so many candidates blindly."""
    ways = [math.comb(right, common) * math.comb(candidates - right, right - common) for common in range(right + 1)]
    return sum(count * common / (2 * right - common) for common, count in enumerate(ways)) / sum(ways)


def association_measures(questions: Sequence[Question], scores: Sequence[NDArray[np.float32] | None]) -> list[Measure]:
    """The Jaccard index of the chosen and the right images, its mean over all questions, over those with 5 or 6
    candidates, and over those with 10 or 12. A question without scores isn't counted.
    """
    found = []
    for metric, (fewest, most) in GROUPS.items():
        of_group = [
            (question, score_IC[:, 0])
            for question, score_IC in zip(questions, scores, strict=True)
            if score_IC is not None and fewest <= len(question.pictures) <= most
        ]
        if of_group:
            value_N = np.array([jaccard(score_N, question.associated) for question, score_N in of_group])
            chances = [guessed(len(question.pictures), len(question.associated)) for question, _ in of_group]
            found.append(_mean(metric, value_N, float(np.mean(chances))))
    return found


def _mean(metric: str, value_N: NDArray[np.float64], chance: float) -> Measure:
    return bootstrapped(metric, lambda index_N: float(value_N[index_N].mean()), len(value_N), chance)


# ---- Guesses ---------------------------------------------------------------------------------------------------------


def guess_table(task: Choice, scores: Sequence[NDArray[np.float32] | None]) -> pa.Table:
    """A row for each question: scores (a list for each image), what is right, and for some the pictures."""
    total = len(task.questions)
    sample = np.random.default_rng(SEED).choice(total, min(EXAMPLES, total), replace=False).tolist()
    rows = []
    for number, (question, score_IC) in enumerate(zip(task.questions, scores, strict=True)):
        right = right_of(question, score_IC) if score_IC is not None else {}
        unread = [task.pictures.unreadable[place] for place in task.places[number] if place in task.pictures.unreadable]
        encoded = [read_picture(picture) for picture in question.pictures] if number in sample else []
        rows.append(
            {
                "key": question.key,
                "category": question.category,
                "correct": bool(right) and all(right.values()),
                "right": [metric for metric, is_right in right.items() if is_right],
                "captions": list(question.captions),
                "scores": score_IC.tolist() if score_IC is not None else [],
                "pictures": [thumbnail(each, PICTURE_PIXELS) for each in encoded if isinstance(each, bytes)],
                "associated": list(question.associated),
                "problem": next(iter(unread), None),
            }
        )
    return pa.Table.from_pylist(rows, schema=GUESSES)


def open_choice(data: Path, *, images: Path | None = None, name: str | None = None) -> Choice:
    """Find the questions of a file or a folder of files, and their images; see `questions`. No image is decoded yet."""
    task = Choice(data.resolve() if data.name in ("", "..") else data, read_questions(data, images))
    task.name = printable(name or task.name)
    return task
