"""From class names to a classifier: names in templates, and the mean of their embeddings.

Each prompt's embedding is normalised, a class's are averaged, and the mean is normalised again (Radford et al., 2021),
as `build_zero_shot_classifier` of OpenCLIP does.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from clipkit import embedded
from clipkit.config import did_you_mean, nearest
from clipkit.embedding.encoder import Compute, Encoder, TextTokenizer, check_finite
from clipkit.embedding.vectors import TokenisedTexts, embed_tokenised, tokenise
from clipkit.errors import UserError
from clipkit.eval.classification.labels import fill
from clipkit.storage.files import read_json, read_text, require_file

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
        """What a person is shown, of each class its own: the name where there is one, the label where there are
        several, and with the number what several classes are called.
        """
        titles = [names[0] if len(names) == 1 else label for label, names in zip(self.labels, self.names, strict=True)]
        times = Counter(titles)
        return tuple(title if times[title] == 1 else f"{title} (class {number})" for number, title in enumerate(titles))


def check_pooling(text: str) -> Pooling:
    """`mean` or `sum`. Raises UserError for anything else."""
    if text not in get_args(Pooling):
        raise UserError(f"unknown pooling {text!r} of a class's names: choose mean or sum")
    return cast(Pooling, text)


Sentences = Sequence[str] | Mapping[str, Sequence[str]]
"""Templates for all classes, or for each class its own, by its label or its name."""


@dataclass(frozen=True)
class Templates:
    """Sentences in which `{}` stands for the class name, and the name they were asked for by."""

    name: str
    sentences: Sentences


def templates(spec: str) -> Templates:
    """`openai-80`, `openai-7`, `plain` (the bare name), a file, or one literal template.

    A file is a sentence a line, a JSON list, or a JSON object {class: [sentences]}, whose sentences need no `{}` (as
    language models write them: Pratt et al., "CuPL", 2023). Raises UserError for an unknown name, with the nearest
    known ones, and for a template without `{}`.
    """
    known = {**embedded.prompt_templates(), "plain": ["{}"]}
    if spec in known:
        return Templates(spec, tuple(known[spec]))
    path = Path(spec)
    if "{}" in spec:
        sentences, name = [spec], spec
    elif path.suffix in (".json", ".txt") or path.is_file():
        found, name = _template_file(require_file(path, "templates file")), path.stem
        if isinstance(found, dict):
            return Templates(name, found)
        sentences = found
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


def _template_file(path: Path) -> list[str] | dict[str, list[str]]:
    if path.suffix == ".json":
        listed = read_json(path)
        if isinstance(listed, dict) and listed and all(map(_is_sentences, listed.values())):
            if empty := [each for each, sentences in listed.items() if not sentences]:
                raise UserError(f"{path} has no sentence for the class {empty[0]!r}: write one or more")
            return listed
        if not _is_sentences(listed):
            raise UserError(
                f"{path} isn't a JSON list of sentences or an object of lists: "
                'write ["a photo of a {}.", …] or {"class": ["a sentence", …], …}'
            )
        sentences: list[str] = listed
        return sentences
    lines = read_text(path, "templates file").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _is_sentences(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(sentence, str) for sentence in value)


def prompts(classes: Classes, sentences: Sentences) -> list[list[str]]:
    """For each embedding of the classifier every name in every template.

    Raises UserError for a class that has no sentences where each has its own.
    """
    rows = zip(classes.class_of_rows, classes.rows, strict=True)
    return [
        [fill(sentence, name) for name in names for sentence in sentences_of(sentences, classes.labels[number], name)]
        for number, names in rows
    ]


def sentences_of(sentences: Sentences, label: str, name: str) -> Sequence[str]:
    """The templates of a class, by its name or else its label."""
    if not isinstance(sentences, Mapping):
        return sentences
    found = sentences.get(name, sentences.get(label))
    if found is None:
        raise UserError(f"the templates have no sentences for the class {name!r}: {nearest(name, list(sentences))}")
    return found


@dataclass(frozen=True, eq=False)
class Prompts:
    """The different prompts of all classes, tokenised, shortest first."""

    texts: TokenisedTexts
    prompt_Q: NDArray[np.int64]
    """Q pairs of a prompt and a class it belongs to, in order of the prompt."""
    class_Q: NDArray[np.int64]
    classes: int


def tokenise_prompts(prompts: Sequence[Sequence[str]], tokenizer: TextTokenizer, context_length: int) -> Prompts:
    """Tokenise the prompts of each class. A sentence that occurs more than once is encoded once."""
    texts = tokenise([text for each in prompts for text in each], tokenizer, context_length)
    class_Q = np.repeat(np.arange(len(prompts), dtype=np.int64), [len(each) for each in prompts])
    by_prompt = np.argsort(texts.place_N, kind="stable")
    return Prompts(texts, texts.place_N[by_prompt], class_Q[by_prompt], len(prompts))


@torch.no_grad()
def class_embeddings(encoder: Encoder, prompts: Prompts, compute: Compute) -> torch.Tensor:
    """The classifier [C, E] in float32 on the device: row c is the unit embedding of class c.

    Raises UserError when the model gives NaN.
    """
    sum_CE: torch.Tensor | None = None
    for part, text_BE in embed_tokenised(encoder, prompts.texts, compute):
        first, last = np.searchsorted(prompts.prompt_Q, [part.start, part.stop])
        row_Q = torch.from_numpy(prompts.prompt_Q[first:last] - part.start).to(text_BE.device)
        class_Q = torch.from_numpy(prompts.class_Q[first:last]).to(text_BE.device)
        if sum_CE is None:
            sum_CE = text_BE.new_zeros(prompts.classes, text_BE.shape[1])
        sum_CE.index_add_(0, class_Q, text_BE[row_Q])
    assert sum_CE is not None  # there is always a class, and a class has a name
    # The direction of the mean is that of the sum.
    return check_finite(F.normalize(sum_CE, dim=-1))
