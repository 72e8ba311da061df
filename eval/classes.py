"""What the classes are called, in which sentences, and these as tokens.

Half of all wrong zero-shot numbers come from here: names in another order than the labels, or templates other than the
paper's. So names and templates are resolved once, checked, and hashed into every result.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from clipkit import embedded
from clipkit.config import did_you_mean, nearest
from clipkit.errors import UserError, one_line
from clipkit.storage.files import read_json, read_text, require_file
from clipkit.text.tokenizer import Tokenizer

Pooling = Literal["mean", "sum"]
# A WordNet id, and what some sets have behind it.
_WNID = re.compile(r"(n\d{8})(?:[-_. ]+(\S.*))?")


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
    notes: tuple[str, ...] = ()
    """What may be wrong with the names."""

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


def fill(sentence: str, name: str) -> str:
    """The template with the class name in it; other braces stay as they are."""
    return sentence.replace("{}", name)


def prompts(classes: Classes, sentences: Sequence[str]) -> list[list[str]]:
    """For each embedding of the classifier every name in every template."""
    return [[fill(sentence, name) for name in names for sentence in sentences] for names in classes.rows]


def class_name(text: str) -> str:
    """A class's name as sentences have it: `dog_face`, as folders are called, is a dog face."""
    return " ".join(text.replace("_", " ").split()) or text


def name_classes(labels: Sequence[str], where: Path, file: Path | None = None, *, numbers: bool = False) -> Classes:
    """Names for the labels of a data set, whose order is that of the label numbers.

    Without a file a wnid (`n01440764`) gets its ImageNet name as curated for CLIP, what stands behind another one
    (`n02085620-Chihuahua`) is its name, and any other label is its own. With a file, a JSON object from label to a name
    or a list of names: its keys, in its order, are the classes, and may be more than occur in the data; or a list of
    names, in JSON or a line each: of the labels themselves, or else in label order. `numbers` says that the labels are
    bare numbers, of which there may be more names than occur.
    Raises UserError for a label without a name, and for a file that may mean two things.
    """
    if file is not None:
        named = _named_by_file(labels, where, file, numbers)
        return replace(named, notes=_twice_note(named, file))
    imagenet = {entry["wnid"]: entry["name"] for entry in embedded.imagenet_classes()}
    names: list[str] = []
    unknown: list[str] = []
    wnids = False
    for label in labels:
        wnid, words = match.groups() if (match := _WNID.fullmatch(label)) else ("", None)
        wnids = wnids or bool(wnid)
        names.append(imagenet.get(wnid) or class_name(words or label))
        if wnid not in imagenet and not words:
            unknown.append(label)
    classes = Classes(tuple(labels), tuple((name,) for name in names))
    if not wnids:
        return replace(classes, notes=_twice_note(classes, where))
    if not unknown:
        return classes
    such = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
    text = f"{len(unknown):,} of {len(labels):,} classes aren't among ImageNet's, and are prompted as they are called"
    return replace(classes, notes=(f"{where}: {text} ({such}): name them with --classes",))


def _twice_note(classes: Classes, where: Path) -> tuple[str, ...]:
    """A remark on a name that several classes have."""
    counts = Counter(name for names in classes.names for name in {name.lower() for name in names})
    twice = [name for name, count in counts.items() if count > 1]
    if not twice:
        return ()
    more = f" and {len(twice) - 1:,} more names are" if len(twice) > 1 else " is"
    return (f"{where}: {twice[0]!r}{more} of several classes, which no prompt can tell apart",)


def _named_by_file(labels: Sequence[str], where: Path, file: Path, numbers: bool) -> Classes:
    listed = _read_names(file)
    if not isinstance(listed, dict | list) or not listed:
        raise UserError(
            f'{file} isn\'t a list of names or an object: write {{"label": "name"}} or {{"label": ["name", …]}}'
        )
    items = list(listed.items()) if isinstance(listed, dict) else list(enumerate(listed))
    names = tuple(_names(file, label, value) for label, value in items)
    if isinstance(listed, dict):
        keys = tuple(listed)
    else:
        keys = _labels_of_list(labels, [each[0] for each in names], where, file, numbers)
    for label in labels:
        if label not in keys:
            raise UserError(f"{file} has no class {label!r}, which occurs in {where}: {nearest(label, keys)}")
    return Classes(keys, names)


def _names(file: Path, label: str | int, value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        which = f"class {label!r}" if isinstance(label, str) else f"place {label + 1:,}"
        raise UserError(f"{file}: {which} has no name: give it a text or a list of texts")
    return tuple(map(class_name, names))


def _labels_of_list(labels: Sequence[str], names: list[str], where: Path, file: Path, numbers: bool) -> tuple[str, ...]:
    """The labels that a list of names is for. It is in label order, unless it lists the labels themselves."""
    if numbers and len(names) >= len(labels):
        return tuple(map(str, range(len(names))))
    called = {class_name(label): label for label in labels}
    listed = called.keys() & names
    if not numbers and len(listed) == len(labels):
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise UserError(f"{file} gives the class {twice!r} twice: remove one")
        return tuple(called.get(name, name) for name in names)
    if listed and not numbers:
        lacking = next(label for name, label in called.items() if name not in listed)
        raise UserError(
            f"{file} lists some labels of {where}, such as {min(listed)!r}, but not {lacking!r}: list all of them, or "
            'write an object {"label": "name"}'
        )
    if len(names) != len(labels):
        raise UserError(f"{file} names {len(names):,} classes, {where} has {len(labels):,}: give one for each label")
    return tuple(labels)


def _read_names(file: Path) -> Any:
    """What a file of class names holds: JSON, or a list of lines. Raises UserError for a key that it has twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for label, value in pairs:
            if label in found:
                raise UserError(f"{file} has the class {label!r} twice, as {found[label]!r} and {value!r}: remove one")
            found[label] = value
        return found

    text = read_text(file, "classes file")
    if file.suffix.lower() != ".json" and not text.lstrip().startswith(("[", "{")):
        return text.split("\n")
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} isn't valid JSON ({one_line(error)}): mend it, or write a name a line into a .txt"
        ) from error


def check_pooling(text: str) -> Pooling:
    """`mean` or `sum`. Raises UserError for anything else."""
    if text not in get_args(Pooling):
        raise UserError(f"unknown pooling {text!r} of a class's names: choose mean or sum")
    return cast(Pooling, text)


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
