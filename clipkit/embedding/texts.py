"""Many texts to unit vectors: each different text is encoded once, in batches of about equal length.

A thousand classes in 80 templates are 80,000 sentences, mostly short. They are tokenised once, sorted by length and
then by ids. Where the text tower is causal and read at the end token, what stands behind a token can't change its
vector. So each batch is cut to its longest text, and a beginning that several texts of a batch have is computed once:
4 tokens a sentence remain of 10, and of 77 with padding. Other towers see the padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipkit.embedding.cached import Piece, key_of, read_piece
from clipkit.embedding.encoder import Compute, Encoder, TextTokenizer, check_finite
from clipkit.embedding.images import full_rows
from clipkit.model.text_tower import Prefixes, shared_prefixes

TOKENS_PER_BATCH = 8192


@dataclass(frozen=True, eq=False)
class TokenisedTexts:
    """P different texts, tokenised, of N that were given: shortest first, those of one length by their ids."""

    ids_PT: NDArray[np.int32]
    length_P: NDArray[np.int64]
    """Tokens of each text, start and end included."""
    place_N: NDArray[np.int64]
    """Where each of the given texts is among the different ones."""
    cut: int
    """Different texts that lose words to the context length."""


def tokenise(texts: Sequence[str], tokenizer: TextTokenizer, context_length: int) -> TokenisedTexts:
    """Tokenise texts, each different one once."""
    first: dict[str, int] = {}
    place_N = np.array([first.setdefault(text, len(first)) for text in texts], dtype=np.int64)
    encoded = tokenizer.encode(list(first))
    ids_PT = tokenizer.rows(encoded, context_length)
    whole_P = np.array([len(ids) + tokenizer.specials for ids in encoded], dtype=np.int64)
    length_P = whole_P.clip(max=context_length)
    order = np.lexsort((*ids_PT.T[::-1], length_P))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return TokenisedTexts(ids_PT[order], length_P[order], rank[place_N], int((whole_P > context_length).sum()))


def text_batches(texts: TokenisedTexts, fixed_length: bool) -> Iterator[slice]:
    """Slices of about equal numbers of tokens, all of one shape where the length of a text is fixed."""
    total, width = texts.ids_PT.shape
    start = 0
    while start < total:
        rows = TOKENS_PER_BATCH // width
        if not fixed_length:
            # The batch grows until its longest text, which is its last, makes it too large.
            lengths = texts.length_P[start : start + TOKENS_PER_BATCH]
            fits = lengths * np.arange(1, len(lengths) + 1) <= TOKENS_PER_BATCH
            rows = int(fits.sum())
        stop = min(total, start + max(1, rows))
        yield slice(start, stop)
        start = stop


def embed_tokenised(encoder: Encoder, texts: TokenisedTexts, compute: Compute) -> Iterator[tuple[slice, Tensor]]:
    """Unit vectors float32[rows, E] on the device, for one slice of the different texts after another. The ranks share
    the work.
    """
    device = compute.device
    width = texts.ids_PT.shape[1]
    fixed_length = device.static_shapes or encoder.fixed_length  # on XLA, as each new shape is compiled
    parts = list(text_batches(texts, fixed_length))

    def work(part: slice) -> Tensor:
        ids_BT = texts.ids_PT[part]
        if fixed_length:
            ids_BT = full_rows(ids_BT, max(1, TOKENS_PER_BATCH // width), device)
        else:
            ids_BT = np.ascontiguousarray(ids_BT[:, : texts.length_P[part].max()])
        text_BE = _embed(encoder, ids_BT, part.stop - part.start, fixed_length, compute)
        device.end_step()
        return text_BE if device.world == 1 else text_BE.cpu()

    for part, text_BE in zip(parts, compute.deal(len(parts), lambda _, own: parts[own], work), strict=True):
        yield part, text_BE.to(device.torch_device)


def _embed(encoder: Encoder, ids_BT: NDArray[np.int32], rows: int, fixed_length: bool, compute: Compute) -> Tensor:
    """The first `rows` of a batch, from the cache where there is one that has them."""

    def features() -> Tensor:
        if not fixed_length:
            return encoder.prefix_features(Prefixes(**compute.device.batch(shared_prefixes(ids_BT))), compute)
        return encoder.text_features(compute.device.common_batch({"ids": ids_BT})["ids"], compute)[:rows]

    cache = compute.own_cache
    if cache is None:
        return features()
    key = key_of(encoder, compute, str(ids_BT.shape).encode() + ids_BT.tobytes())
    piece = read_piece(cache, key, lambda: Piece(features().cpu().numpy(), np.arange(rows), {}))
    return torch.from_numpy(piece.vector_NE).to(compute.device.torch_device)


@torch.no_grad()
def tokenised_matrix(encoder: Encoder, texts: TokenisedTexts, compute: Compute) -> Tensor:
    """Unit vectors float32[N, E] of the texts in the order in which they were given, on the device.

    Raises UserError when the model gives NaN.
    """
    matrix_PE = check_finite(torch.cat([text_BE for _, text_BE in embed_tokenised(encoder, texts, compute)]))
    return matrix_PE[torch.from_numpy(texts.place_N).to(matrix_PE.device)]


def text_matrix(encoder: Encoder, texts: Sequence[str], compute: Compute) -> Tensor:
    """Unit vectors float32[N, E] of the texts in their order, on the device."""
    return tokenised_matrix(encoder, tokenise(texts, encoder.tokenizer, encoder.context_length), compute)
