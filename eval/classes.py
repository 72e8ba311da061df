"""What the classes are called, in which sentences, and these as tokens.

Half of all wrong zero-shot numbers come from here: names in another order than the labels, or templates other than the
paper's. So names and templates are resolved once, checked, and hashed into every result.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from clipkit import embedded
from clipkit.config import did_you_mean
from clipkit.errors import UserError
from clipkit.storage.files import read_json, require_file
from clipkit.text.tokenizer import Tokenizer

Pooling = Literal["mean", "sum"]


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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} isn't UTF-8 text: give a text file with one template on each line") from error
    return [line.strip() for line in lines if line.strip()]


def fill(sentence: str, name: str) -> str:
    """The template with the class name in it; other braces stay as they are."""
    return sentence.replace("{}", name)


def prompts(classes: Classes, sentences: Sequence[str]) -> list[list[str]]:
    """For each embedding of the classifier every name in every template."""
    return [[fill(sentence, name) for name in names for sentence in sentences] for names in classes.rows]


def name_classes(labels: Sequence[str], where: Path, file: Path | None = None) -> Classes:
    """Names for the labels of a data set, whose order is that of the label numbers.

    Without a file: a wnid (`n01440764`) gets its ImageNet name as curated for CLIP, where all labels are wnids; any
    other label is its own name. With a file, a JSON object from label to a name or a list of names: its keys, in its
    order, are the classes, and may be more than occur in the data; or a JSON list of names in label order.
    Raises UserError for a label without a name.
    """
    if file is not None:
        return _named_by_file(labels, where, file)
    imagenet = {entry["wnid"]: entry["name"] for entry in embedded.imagenet_classes()}
    if labels and all(label in imagenet for label in labels):
        return Classes(tuple(labels), tuple((imagenet[label],) for label in labels))
    return Classes(tuple(labels), tuple((label,) for label in labels))


def _named_by_file(labels: Sequence[str], where: Path, file: Path) -> Classes:
    listed = read_json(file)
    if isinstance(listed, list) and listed and all(isinstance(name, str) for name in listed):
        if len(listed) != len(labels):
            raise UserError(
                f"{file} names {len(listed):,} classes, {where} has {len(labels):,}: give one for each label"
            )
        return Classes(tuple(labels), tuple((name,) for name in listed))
    if not isinstance(listed, dict) or not listed:
        raise UserError(
            f'{file} isn\'t a list of names or an object: write {{"label": "name"}} or {{"label": ["name", …]}}'
        )
    named: dict[str, tuple[str, ...]] = {}
    for label, value in listed.items():
        names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise UserError(f"{file}: class {label!r} has no name: give it a text or a list of texts")
        named[label] = names
    for label in labels:
        if label not in named:
            raise UserError(f"{file} has no class {label!r}, which occurs in {where}: {nearest(label, list(named))}")
    return Classes(tuple(named), tuple(named.values()))


def check_pooling(text: str) -> Pooling:
    """`mean` or `sum`. Raises UserError for anything else."""
    if text not in get_args(Pooling):
        raise UserError(f"unknown pooling {text!r} of a class's names: choose mean or sum")
    return cast(Pooling, text)


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of an error line: near misses, or a few examples where there are too many to list."""
    if len(known) <= 12 or difflib.get_close_matches(word, known, n=1, cutoff=0.5):
        return did_you_mean(word, known)
    return f"it has {len(known):,}, among them {', '.join(repr(name) for name in sorted(known)[:3])}"


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


def tokenise(prompts: Sequence[Sequence[str]], tokenizer: Tokenizer, context_length: int) -> Prompts:
    """Tokenise the prompts of each class. A sentence that occurs more than once is encoded once."""
    place: dict[str, int] = {}
    pairs = [(place.setdefault(text, len(place)), number) for number, texts in enumerate(prompts) for text in texts]
    ids_PT = np.asarray(tokenizer(list(place), context_length), dtype=np.int32)
    length_P = (ids_PT.argmax(axis=1) + 1).astype(np.int64)
    full = np.flatnonzero(length_P == context_length)
    whole = tokenizer.encode([list(place)[i] for i in full])
    cut = sum(len(ids) + 2 > context_length for ids in whole)
    order = np.argsort(length_P, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    prompt_Q, class_Q = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    by_prompt = np.argsort(rank[prompt_Q], kind="stable")
    return Prompts(ids_PT[order], length_P[order], rank[prompt_Q][by_prompt], class_Q[by_prompt], len(prompts), cut)
