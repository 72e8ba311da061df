"""Class embeddings from prompts: the zero-shot classifier.

Each prompt's embedding is normalised, a class's are averaged, and the mean is normalised again (Radford et al., 2021),
as `build_zero_shot_classifier` of OpenCLIP does. A thousand classes in 80 templates are 80,000 sentences, mostly short:
they are tokenised once, sorted by length, and each batch is cut to its longest sentence. The text tower is causal and
pooled at the end token, so what stands behind that token can't change the embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from clipkit.device import Device, Precision
from clipkit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.model.clip import CLIP

Number = TypeVar("Number", bound=np.generic)

TOKENS_PER_BATCH = 8192


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


def batches(prompts: Prompts, device: Device) -> Iterator[slice]:
    """Runs of prompts of about equal numbers of tokens. On XLA all have one shape, as each new one is compiled."""
    total, width = prompts.ids_PT.shape
    start = 0
    while start < total:
        rows = TOKENS_PER_BATCH // width
        if device.kind != "xla":
            # The batch grows until its longest prompt, which is its last, makes it too large.
            lengths = prompts.length_P[start : start + TOKENS_PER_BATCH]
            fits = lengths * np.arange(1, len(lengths) + 1) <= TOKENS_PER_BATCH
            rows = int(fits.sum())
        stop = min(total, start + max(1, rows))
        yield slice(start, stop)
        start = stop


@torch.no_grad()
def class_embeddings(model: "CLIP", prompts: Prompts, device: Device, precision: Precision = "auto") -> torch.Tensor:
    """The classifier [C, E] in float32 on the device: row c is the unit embedding of class c."""
    width = prompts.ids_PT.shape[1]
    sum_CE: torch.Tensor | None = None
    for part in batches(prompts, device):
        ids_BT = prompts.ids_PT[part]
        if device.kind == "xla":
            ids_BT = pad_rows(ids_BT, -(-max(1, TOKENS_PER_BATCH // width) // device.shards) * device.shards)
        else:
            ids_BT = np.ascontiguousarray(ids_BT[:, : prompts.length_P[part].max()])
        with device.autocast(precision):
            text_BE = model.encode_text(device.batch({"ids": ids_BT})["ids"], normalize=False)
        text_BE = F.normalize(text_BE.float(), dim=-1)
        first, last = np.searchsorted(prompts.prompt_Q, [part.start, part.stop])
        row_Q = torch.from_numpy(prompts.prompt_Q[first:last] - part.start).to(text_BE.device)
        class_Q = torch.from_numpy(prompts.class_Q[first:last]).to(text_BE.device)
        if sum_CE is None:
            sum_CE = text_BE.new_zeros(prompts.classes, text_BE.shape[1])
        sum_CE.index_add_(0, class_Q, text_BE[row_Q])
        device.end_step()
    assert sum_CE is not None  # there is always a class, and a class has a name
    # The direction of the mean is that of the sum.
    return F.normalize(sum_CE, dim=-1)


def pad_rows(array: NDArray[Number], rows: int) -> NDArray[Number]:
    """Repeat the last row until there are `rows`."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)]) if len(array) < rows else array
