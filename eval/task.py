"""What is to be classified into what: labelled images, class names and templates, ready for any model."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from clipkit import embedded
from clipkit.config import did_you_mean
from clipkit.errors import UserError
from clipkit.eval.labelled import LabelledImages, open_labelled
from clipkit.eval.labels import fill, name_classes
from clipkit.eval.results import digest
from clipkit.formats.folders import printable
from clipkit.pixels.images import ImageError, Preprocess, UInt8Array, decode, eval_transform
from clipkit.storage.files import read_json, read_text, require_file
from clipkit.text.tokenizer import WordTokenizer

Pooling = Literal["mean", "sum"]

KEEP_PIXELS_BYTES = 1 << 30
UNREADABLE_SHARE = 0.01


@dataclass(frozen=True)
class Classes:
    """The classes of a task in label order."""

    labels: tuple[str, ...]
    """What stands in the data: a label's text, a folder's name, a wnid."""
    names: tuple[tuple[str, ...], ...]
    """What goes into the templates: one name or more."""
    pooling: Pooling = "mean"
    """How several names make one class. `mean`: one embedding, the mean over the prompts of all names. `sum`: each name
    is a class of its own, and the class's probability is the sum over its names (as the hierarchical label sets of
    Novack et al., "CHiLS", 2023): for classes that are unions of unlike things."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The names behind each embedding of the classifier."""
        return self.names if self.pooling == "mean" else tuple((name,) for names in self.names for name in names)

    @property
    def class_of_rows(self) -> tuple[int, ...]:
        """The class that each embedding of the classifier stands for."""
        if self.pooling == "mean":
            return tuple(range(len(self)))
        return tuple(number for number, names in enumerate(self.names) for _ in names)

    @property
    def titles(self) -> tuple[str, ...]:
        """What a person is shown: the name where there is one, the label where there are several."""
        return tuple(
            names[0] if len(names) == 1 else label for label, names in zip(self.labels, self.names, strict=True)
        )


def check_pooling(text: str) -> Pooling:
    """`mean` or `sum`. Raises UserError for anything else."""
    if text not in get_args(Pooling):
        raise UserError(f"unknown pooling {text!r} of a class's names: choose mean or sum")
    return cast(Pooling, text)


# ---- Prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Templates:
    """Sentences in which `{}` stands for the class name, and the name they were asked for by."""

    name: str
    sentences: tuple[str, ...]


def templates(spec: str) -> Templates:
    """`openai-80`, `openai-7`, `plain` (the bare name), a file (a JSON list, or a line each), or one literal template.

    Raises UserError for an unknown name, with the nearest known ones, and for a sentence without `{}`.
    """
    known = {**embedded.prompt_templates(), "plain": ["{}"]}
    if spec in known:
        return Templates(spec, tuple(known[spec]))
    path = Path(spec)
    if "{}" in spec:
        sentences, name = [spec], spec
    elif path.suffix in (".json", ".txt") or path.is_file():
        sentences, name = _template_file(require_file(path, "templates file")), path.stem
    else:
        raise UserError(
            f"unknown templates {spec!r}: {did_you_mean(spec, known)}, or give a file or 'a photo of a {{}}'"
        )
    sentences = [sentence.replace("{c}", "{}") for sentence in sentences]  # as CLIP_benchmark's files have it
    for sentence in sentences:
        if sentence.count("{}") < 1:
            raise UserError(f"template {sentence!r} in {name} has no {{}}: write {{}} where the class name goes")
    if not sentences:
        raise UserError(f"{path} holds no template: write one sentence with {{}} on each line")
    return Templates(name, tuple(sentences))


def _template_file(path: Path) -> list[str]:
    if path.suffix == ".json":
        listed = read_json(path)
        if not (isinstance(listed, list) and all(isinstance(sentence, str) for sentence in listed)):
            raise UserError(f'{path} isn\'t a JSON list of sentences: write ["a photo of a {{}}.", …]')
        return listed
    lines = read_text(path, "templates file").splitlines()
    return [line.strip() for line in lines if line.strip()]


def prompts(classes: Classes, sentences: Sequence[str]) -> list[list[str]]:
    """For each embedding of the classifier every name in every template."""
    return [[fill(sentence, name) for name in names for sentence in sentences] for names in classes.rows]


@dataclass(frozen=True, eq=False)
class Prompts:
    """The different prompts of all classes, tokenised, shortest first."""

    ids_PT: NDArray[np.int32]
    length_P: NDArray[np.int64]
    """Tokens of each prompt, start and end included."""
    prompt_Q: NDArray[np.int64]
    """Q pairs of a prompt and a class it belongs to, in order of the prompt."""
    class_Q: NDArray[np.int64]
    classes: int
    cut: int
    """Prompts that lose words to the context length."""


def tokenise(prompts: Sequence[Sequence[str]], tokenizer: WordTokenizer, context_length: int) -> Prompts:
    """Tokenise the prompts of each class. A sentence that occurs more than once is encoded once."""
    place: dict[str, int] = {}
    pairs = [(place.setdefault(text, len(place)), number) for number, texts in enumerate(prompts) for text in texts]
    encoded = tokenizer.encode(list(place))
    ids_PT = tokenizer.rows(encoded, context_length)
    whole_P = np.array([len(ids) + tokenizer.specials for ids in encoded], dtype=np.int64)
    length_P = whole_P.clip(max=context_length)
    cut = int((whole_P > context_length).sum())
    order = np.argsort(length_P, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    prompt_Q, class_Q = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    by_prompt = np.argsort(rank[prompt_Q], kind="stable")
    return Prompts(ids_PT[order], length_P[order], rank[prompt_Q][by_prompt], class_Q[by_prompt], len(prompts), cut)


# ---- Task ------------------------------------------------------------------------------------------------------------


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
        number_L = np.array([place.get(label, -1) for label in images.label_names], dtype=np.int64)
        self.labels_N = number_L[images.labels_N]
        self.unreadable: dict[int, str] = {}
        self.notes = images.notes
        self.content = ""
        """A hash of all encoded images, once they were read."""
        self._prompts: tuple[tuple[WordTokenizer, int], Prompts] | None = None
        self._pixels: tuple[Preprocess, list[Pixels]] | None = None

    def prompts(self, tokenizer: WordTokenizer, context_length: int) -> Prompts:
        """The prompts for this tokenizer and context length."""
        asked = tokenizer, context_length
        if self._prompts is None or self._prompts[0] != asked:
            texts = prompts(self.classes, self.templates.sentences)
            self._prompts = asked, tokenise(texts, tokenizer, context_length)
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
    occurring = [images.label_names[number] for number in np.unique(images.labels_N)]
    named = name_classes(images.label_names, data, classes, numbers=not images.named, occurring=occurring)
    task = Task(images, Classes(named.labels, named.names, check_pooling(pooling)), sentences)
    task.notes += named.notes
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
