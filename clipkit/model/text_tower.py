"""The text tower: a pre-norm transformer (Radford et al., 2021), with PyTorch's own fused attention.

At 32 and 77 tokens most of a batch of captions is padding. Where attention is causal and the tower is read at the end
token, padding changes nothing, so it is left out: all captions lie one behind another in a single sequence [N, D] for
the linear layers and norms, and attention runs on each bucket of captions of about equal length. That is faster than a
pass of the tower for each bucket. PyTorch 2.15's nested tensors have no attention without a GPU, and its `varlen_attn`
needs CUDA and half precision; this is the same code on every device in every precision.

Prompts begin alike, too ("a photo of a"), and what stands before a token is all that decides about its vector. So where
no gradients are needed, each different beginning is computed once (`shared_prefixes`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import Mlp, get_act_layer
from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.errors import UserError
from clipkit.model.config import TextConfig

Recompute = Callable[..., Tensor]
"""Calls a function so that its activations are computed again in the backward pass: `recompute(function, x)`."""


# Of the tokens of each bucket, at most this share is padding.
MAX_PADDING = 0.045
# At so few tokens there is little padding, and fixed shapes are faster.
FIXED_TOKENS = 16


class Bucket(NamedTuple):
    """Captions of about equal length, which are padded to the longest of them."""

    rows: int
    tokens: int


Buckets = tuple[Bucket, ...]


def length_buckets(length_B: np.ndarray) -> Buckets:
    """The buckets for captions of `length_B` tokens (at least one), the longest captions first.

    On the host, from the host's ids: sizes that are known before the step never have to be read from the device.
    """
    length_B = np.sort(length_B)[::-1]
    buckets = []
    while len(length_B):
        tokens = int(length_B[0])
        padding_B = np.cumsum(tokens - length_B)
        # The share of padding only grows with each shorter caption.
        rows = int(np.sum(padding_B <= MAX_PADDING * tokens * np.arange(1, len(length_B) + 1)))
        buckets.append(Bucket(rows, tokens))
        length_B = length_B[rows:]
    return tuple(buckets)


class Prefixes(NamedTuple):
    """The N different beginnings of B texts, each with its last token, and of what beginnings each text consists."""

    ids_N: Tensor
    position_N: Tensor
    """Where the last token of each beginning stands in its text."""
    prefix_BT: Tensor
    """int64: the beginning that ends with this token; behind a text's end token any."""
    first_N: Tensor
    """Where in all B * T tokens each beginning stands first."""
    end_B: Tensor
    """The beginning that is all of the text."""


def shared_prefixes(ids_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of `Prefixes`, of int[B, T] ids whose rows are sorted: equal beginnings in rows that aren't neighbours
    are computed more than once. On the host, as `length_buckets`."""
    B, T = ids_BT.shape
    row_BT, position_BT = np.indices((B, T))
    end_B = ids_BT.argmax(axis=1)
    is_new_BT = np.ones((B, T), dtype=bool)
    is_new_BT[1:] = np.logical_or.accumulate(ids_BT[1:] != ids_BT[:-1], axis=1)
    # The row in which this beginning stands first.
    row_BT = np.maximum.accumulate(np.where(is_new_BT, row_BT, 0), axis=0)
    first_N = np.flatnonzero(is_new_BT & (position_BT <= end_B[:, None]))
    number_P = np.zeros(B * T, dtype=np.int64)
    number_P[first_N] = np.arange(len(first_N))
    prefix_BT = number_P[row_BT * T + position_BT]
    return {
        "ids_N": ids_BT.reshape(-1)[first_N],
        "position_N": position_BT.reshape(-1)[first_N],
        "prefix_BT": prefix_BT,
        "first_N": first_N,
        "end_B": prefix_BT[np.arange(B), end_B],
    }


class Attention(nn.Module):
    """Multi-head attention; if `causal`, a token sees only itself and those before it. [B, T, D] -> [B, T, D]; or, with
    buckets or prefixes, all their tokens one behind another: [N, D] -> [N, D]."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Buckets | Prefixes | None = None) -> Tensor:
        qkv = self.qkv(x)
        if layout is None:
            attended = self.attend(qkv)
        elif isinstance(layout, Prefixes):
            attended = self.attend(qkv[layout.prefix_BT]).flatten(0, 1)[layout.first_N]
        else:
            parts = split(qkv, layout)
            attended = torch.cat([self.attend(part).flatten(0, 1) for part in parts])
        out: Tensor = self.proj(attended)
        return out

    def attend(self, qkv_BTC: Tensor) -> Tensor:
        """Queries, keys and values [B, T, 3 * D] -> [B, T, D]."""
        B, T, _ = qkv_BTC.shape
        qkv = qkv_BTC.reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHTK, k_BHTK, v_BHTK = qkv.unbind(0)
        x_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=self.causal)
        return x_BHTK.transpose(1, 2).reshape(B, T, -1)


class TextBlock(nn.Module):
    """One pre-norm block. Its parameters carry the names that timm gives to those of the image tower's blocks."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads, config.causal)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), act_layer=get_act_layer(config.act))

    def forward(self, x: Tensor, layout: Buckets | Prefixes | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), layout)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TextTower(nn.Module):
    """Token ids to one vector, read at one of the tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.heads < 1 or config.width % config.heads:
            raise UserError(
                f"model.text.width {config.width} isn't a multiple of its heads, {config.heads}: set either"
            )
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fixed_length = config.pooling == "last" or not config.causal
        self.skips_padding = not self.fixed_length and config.context_length > FIXED_TOKENS
        """Whether `buckets` give the same vectors in less time."""
        self.pooling = config.pooling
        self.recompute: Recompute | None = None

    def forward(self, ids_BT: Tensor, buckets: Buckets | None = None) -> Tensor:
        """int[B, T] ids -> [B, D].

        The end token has the largest id of all, so it is found as the largest id of each row. Where attention is
        causal, padding comes after it and never reaches it, so T may be less than the context length. Elsewhere padding
        is seen: the model learned with all of it, and T must be the context length.

        With `buckets`, the `length_buckets` of exactly these rows, padding isn't computed, with the same result. Shapes
        differ from batch to batch then, which eager PyTorch doesn't mind and a compiler does: XLA takes the ids only.
        """
        T = ids_BT.shape[1]
        if len(self.pos_embed) < T or (self.fixed_length and len(self.pos_embed) != T):
            raise UserError(
                f"{T} text tokens, but the model takes {len(self.pos_embed)}: set model.text.context_length"
            )
        end_B = ids_BT.argmax(dim=1)
        if buckets is not None and not self.fixed_length:
            return self.without_padding(ids_BT, end_B, buckets)
        x_BTD = self.token_embedding(ids_BT) + self.pos_embed[:T]
        x_BTD = run_blocks(self.blocks, x_BTD, self.recompute if self.training else None)
        x_BD = x_BTD[:, -1] if self.pooling == "last" else take_tokens(x_BTD, end_B)
        out: Tensor = self.norm(x_BD)
        return out

    def by_prefixes(self, prefixes: Prefixes) -> Tensor:
        """The vectors [B, D] of texts by way of their different beginnings, where attention is causal."""
        assert not self.fixed_length
        x_ND = self.token_embedding(prefixes.ids_N) + self.pos_embed[prefixes.position_N]
        x_ND = run_blocks(self.blocks, x_ND, None, prefixes)
        out: Tensor = self.norm(x_ND[prefixes.end_B])
        return out

    def without_padding(self, ids_BT: Tensor, end_B: Tensor, buckets: Buckets) -> Tensor:
        """The captions' vectors [B, D] by way of their tokens in buckets."""
        # Where the rows belong is found on the device: the host's buckets only say how many there are of each length.
        order_B = end_B.argsort(descending=True, stable=True)
        rows = [bucket.rows for bucket in buckets]
        parts = zip(ids_BT[order_B].split(rows), buckets, strict=True)
        ids_N = torch.cat([part_BT[:, : bucket.tokens].flatten() for part_BT, bucket in parts])
        positions = [self.pos_embed[:tokens].expand(rows, -1, -1).flatten(0, 1) for rows, tokens in buckets]
        x_ND = self.token_embedding(ids_N) + torch.cat(positions)
        x_ND = run_blocks(self.blocks, x_ND, self.recompute if self.training else None, buckets)
        ends = zip(split(x_ND, buckets), end_B[order_B].split(rows), strict=True)
        x_BD = torch.cat([take_tokens(x_BTD, end_B) for x_BTD, end_B in ends])
        out: Tensor = self.norm(x_BD[order_B.argsort()])
        return out


def split(x_ND: Tensor, buckets: Buckets) -> list[Tensor]:
    """All tokens [N, D] as one [rows, tokens, D] a bucket."""
    parts = x_ND.split([rows * tokens for rows, tokens in buckets])
    return [part.unflatten(0, bucket) for part, bucket in zip(parts, buckets, strict=True)]


def take_tokens(x_BTD: Tensor, index_B: Tensor) -> Tensor:
    """One token of each row: [B, T, D] and int64[B] -> [B, D]."""
    return x_BTD.gather(1, index_B[:, None, None].expand(-1, 1, x_BTD.shape[-1]))[:, 0]


def run_blocks(
    blocks: nn.ModuleList | nn.Sequential, x_BND: Tensor, recompute: Recompute | None, *extra: Any
) -> Tensor:
    """`x_BND` through the blocks in order, each called with `extra` too; with `recompute` each block's inside is
    computed again in the backward pass instead of being kept (Chen et al., 2016). Of frozen blocks, which are in
    evaluation mode, nothing is kept."""
    for block in blocks:
        # XLA's way of it wants a bound method, to find the weights behind it; hooks gather those that are sharded.
        x_BND = recompute(block.__call__, x_BND, *extra) if recompute and block.training else block(x_BND, *extra)
    return x_BND
