"""The text tower: a pre-norm transformer (Radford et al., 2021), with PyTorch's own fused attention."""

from collections.abc import Callable

import torch
from timm.layers import Mlp, get_act_layer
from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.errors import UserError
from clipkit.model.config import TextConfig

Recompute = Callable[..., Tensor]
"""Calls a function so that its activations are computed again in the backward pass: `recompute(function, x)`."""


class Attention(nn.Module):
    """Multi-head attention; if `causal`, a token sees only itself and those before it. [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).reshape(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q_BHTK, k_BHTK, v_BHTK = qkv.unbind(0)
        x_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=self.causal)
        out: Tensor = self.proj(x_BHTK.transpose(1, 2).reshape(B, T, D))
        return out


class TextBlock(nn.Module):
    """One pre-norm block. Its parameters carry the names that timm gives to those of the image tower's blocks."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads, config.causal)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), act_layer=get_act_layer(config.act))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        out: Tensor = x_BTD + self.mlp(self.norm2(x_BTD))
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
        self.pooling = config.pooling
        self.recompute: Recompute | None = None

    def forward(self, ids_BT: Tensor) -> Tensor:
        """int[B, T] ids -> [B, D].

        The end token has the largest id of all, so it is found as the largest id of each row. Where attention is
        causal, padding comes after it and never reaches it, so T may be less than the context length. Elsewhere padding
        is seen: the model learned with all of it, and T must be the context length.
        """
        T = ids_BT.shape[1]
        if len(self.pos_embed) < T or (self.fixed_length and len(self.pos_embed) != T):
            raise UserError(
                f"{T} text tokens, but the model takes {len(self.pos_embed)}: set model.text.context_length"
            )
        x_BTD = self.token_embedding(ids_BT) + self.pos_embed[:T]
        x_BTD = run_blocks(self.blocks, x_BTD, self.recompute if self.training else None)
        if self.pooling == "last":
            x_BD = x_BTD[:, -1]
        else:
            end_B = ids_BT.argmax(dim=1)
            x_BD = x_BTD.gather(1, end_B[:, None, None].expand(-1, 1, x_BTD.shape[-1]))[:, 0]
        out: Tensor = self.norm(x_BD)
        return out


def run_blocks(blocks: nn.ModuleList | nn.Sequential, x_BND: Tensor, recompute: Recompute | None) -> Tensor:
    """`x_BND` through the blocks in order; with `recompute` each block's inside is computed again in the backward pass
    instead of being kept (Chen et al., 2016). Of frozen blocks, which are in evaluation mode, nothing is kept."""
    for block in blocks:
        # XLA's way of it wants a bound method, to find the weights behind it.
        x_BND = recompute(block.forward, x_BND) if recompute and block.training else block(x_BND)
    return x_BND
