"""The contrastive losses: CLIP's symmetric InfoNCE and SigLIP's sigmoid loss, in memory linear in the batch.

The matrix of all logits is never held: a process takes its own images against a block of texts at a time, with running
sums, and computes the logits once more for the gradients. Where one tile holds them all, they are computed once.

On one device (or in one SPMD program, where the compiler does the rest) the losses see the whole batch. With several
processes each asks for `gather=True`, and takes its own images against everyone's texts: gathered for InfoNCE, which
needs each of them twice, and passed round a ring for the sigmoid loss. The value is then the mean over the local rows;
DistributedDataParallel's average of the gradients over processes makes it the gradient of the mean over all rows. All
processes must go backward from it by the same factor.

Everything here is float32, autocast or not: with a logit scale of 100, bfloat16 would round logits to steps of 0.5.
Gradients are computed with the value, so what a device does to the products of float32 holds for both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from clipkit.model.exchange import first_row, gather_features, pass_on, sum_rows, total_logsumexp

SameCaption = Literal["negative", "ignore", "positive"]
"""What a pair of different samples with the same caption counts as. `negative` is CLIP's own loss; `ignore` leaves such
pairs out of the sums; `positive` makes them targets beside the sample's own partner, each with the same weight."""

# Logits in a tile, of which two are held at a time (three with captions): 32 MB.
TILE = 2**23
# The logit of a pair that counts as absent. Its exponential is 0; minus infinity would give NaN when subtracted.
ABSENT = -1e30


def info_nce(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    *,
    caption_B: Tensor | None = None,
    same_caption: SameCaption = "negative",
    gather: bool = False,
) -> Tensor:
    """Symmetric InfoNCE (Radford et al., 2021): a scalar, the mean over rows and over both directions.

    `image_BE` and `text_BE` are unit vectors, `logit_scale` the factor itself. `caption_B` (int64 hashes of the
    captions) is needed when `same_caption` isn't `negative`. With `positive` the targets of this process's images stand
    for those of its texts too, which the mean over the processes doesn't tell apart.
    """
    check_captions(caption_B, same_caption)
    with torch.autocast(image_BE.device.type, enabled=False):
        loss: Tensor = InfoNCE.apply(image_BE, text_BE, logit_scale, caption_B, same_caption, gather)
        return loss


def sigmoid_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    caption_B: Tensor | None = None,
    same_caption: SameCaption = "negative",
    gather: bool = False,
) -> Tensor:
    """SigLIP's loss (Zhai et al., 2023): every pair is its own yes-or-no question. The sum over pairs, divided by the
    number of local rows. Arguments as for `info_nce`."""
    check_captions(caption_B, same_caption)
    with torch.autocast(image_BE.device.type, enabled=False):
        loss: Tensor = Sigmoid.apply(image_BE, text_BE, logit_scale, logit_bias, caption_B, same_caption, gather)
        return loss


def check_captions(caption_B: Tensor | None, same_caption: SameCaption) -> None:
    """Raise ValueError for arguments that don't go together."""
    if same_caption not in ("negative", "ignore", "positive"):
        raise ValueError(f"same_caption is negative, ignore or positive, not {same_caption!r}")
    if caption_B is None and same_caption != "negative":
        raise ValueError(f"same_caption={same_caption!r} needs caption_B")


@dataclass(frozen=True)
class Block:
    """This process's images against some texts, tile by tile: all rows × as many columns as a tile has place for."""

    image_BE: Tensor
    """float32."""
    text_NE: Tensor
    scale: Tensor
    caption_B: Tensor | None
    caption_N: Tensor | None
    """Of the rows and of the columns; None: equal captions don't matter."""
    same_caption: SameCaption
    start: int
    """The column of the first row's partner, which may lie outside the block."""

    def tiles(self) -> Iterator[slice]:
        """The columns of each tile."""
        columns = max(1, TILE // len(self.image_BE))
        for first in range(0, len(self.text_NE), columns):
            yield slice(first, min(first + columns, len(self.text_NE)))

    def logits(self, tile: slice) -> tuple[Tensor, Tensor | None]:
        """The logits of a tile, [B, C], ABSENT where ignored; and where further positives are, bool[B, C] or None."""
        logits_BC = self.image_BE @ (self.text_NE[tile].float() * self.scale).T
        if self.caption_B is None or self.caption_N is None or self.same_caption == "negative":
            return logits_BC, None
        same_BC = self.caption_B[:, None] == self.caption_N[tile]
        if self.same_caption == "positive":
            return logits_BC, same_BC
        self.partners(same_BC, tile).fill_(False)
        return logits_BC.masked_fill_(same_BC, ABSENT), None

    def partners(self, values_BC: Tensor, tile: slice) -> Tensor:
        """A view of those values of a tile where a row meets its own partner."""
        return values_BC.diagonal(self.start - tile.start)


def block_against_all(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor,
    caption_B: Tensor | None,
    same_caption: SameCaption,
    gather: bool,
) -> Block:
    """This process's images against the texts of all processes."""
    text_NE, caption_N = text_BE.detach(), caption_B
    if gather:
        text_NE = gather_features(text_NE)
        caption_N = None if caption_B is None else gather_features(caption_B)
    start = first_row(len(image_BE), gather)
    return Block(image_BE.detach().float(), text_NE, scale, caption_B, caption_N, same_caption, start)


class Loss(torch.autograd.Function):
    """A loss whose `forward` leaves the gradients of its first arguments in `ctx.gradients`; the others have none."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient * grad for gradient in ctx.gradients]
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))


class InfoNCE(Loss):
    """The loss with its gradients in two passes over the tiles: first the denominators, then the softmax by them."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        logit_scale: Tensor,
        caption_B: Tensor | None,
        same_caption: SameCaption,
        gather: bool,
    ) -> Tensor:
        B, scale = len(image_BE), logit_scale.float()
        block = block_against_all(image_BE, text_BE, scale, caption_B, same_caption, gather)
        text_NE, start = block.text_NE, block.start
        tiles = list(block.tiles())

        # ---- The denominators of the rows and of the columns, and the targets --------------------------------------
        row_B, columns = scale.new_full((B,), ABSENT), []
        target, same_B = scale.new_zeros(()), scale.new_zeros(B)
        for tile in tiles:
            logits_BC, same_BC = block.logits(tile)
            # As torch.logaddexp, which a TPU leaves to the host, in the middle of the step.
            row_B = torch.stack((row_B, logits_BC.logsumexp(dim=1))).logsumexp(dim=0)
            columns.append(logits_BC.logsumexp(dim=0))
            if same_BC is None:
                target = target + block.partners(logits_BC, tile).sum()
            else:
                same_B = same_B + same_BC.sum(dim=1)
        column_N = torch.cat(columns)
        if gather:
            column_N = total_logsumexp(column_N)

        # ---- The gradients: the softmax of the rows and that of the columns, less the targets -----------------------
        sum_BE, grad_text_NE = torch.zeros_like(block.image_BE), torch.empty_like(text_NE, dtype=torch.float32)
        for tile in tiles:
            if len(tiles) > 1:
                logits_BC, same_BC = block.logits(tile)
            grad_BC = (logits_BC - row_B[:, None]).exp_()
            if same_BC is None:
                block.partners(grad_BC, tile).sub_(2.0)
            else:
                target_BC = same_BC / same_B[:, None]
                target = target + (target_BC * logits_BC).sum()
                grad_BC.sub_(target_BC, alpha=2.0)
            grad_BC += logits_BC.sub_(column_N[tile]).exp_()
            sum_BE.addmm_(grad_BC, text_NE[tile].float())
            grad_text_NE[tile] = grad_BC.T @ block.image_BE
        grad_text_BE = sum_rows(grad_text_NE) if gather else grad_text_NE
        ctx.gradients = scaled_gradients(image_BE, text_BE, logit_scale, sum_BE, grad_text_BE, 2 * B)
        return (row_B.sum() + column_N[start : start + B].sum() - 2 * target) / (2 * B)


class Sigmoid(Loss):
    """The loss with its gradients in one pass over the tiles of each process's texts, which come round a ring."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        caption_B: Tensor | None,
        same_caption: SameCaption,
        gather: bool,
    ) -> Tensor:
        B, scale, rows_BE = len(image_BE), logit_scale.float(), image_BE.float()
        rank, captions = 0, [caption_B]
        if gather:
            rank = dist.get_rank()
            if caption_B is not None:
                captions = list(gather_features(caption_B).chunk(dist.get_world_size()))
        loss, grad_bias, sum_BE = scale.new_zeros(()), scale.new_zeros(()), torch.zeros_like(rows_BE)

        def meet(owner: int, text_BE: Tensor) -> Tensor:
            """Take in the texts of a process; returns their gradient from this process's images."""
            nonlocal loss, grad_bias
            caption_N = captions[owner] if caption_B is not None else None
            block = Block(rows_BE, text_BE, scale, caption_B, caption_N, same_caption, (rank - owner) * B)
            grad_text_BE = torch.empty_like(text_BE, dtype=torch.float32)
            for tile in block.tiles():
                signed_BC, same_BC = block.logits(tile)
                signed_BC += logit_bias.float()
                sign_BC = None if same_BC is None else 1.0 - 2.0 * same_BC
                flip_positives(block, signed_BC, sign_BC, tile)
                loss = loss + F.softplus(signed_BC).sum()
                grad_BC = signed_BC.sigmoid_()
                flip_positives(block, grad_BC, sign_BC, tile)
                grad_bias = grad_bias + grad_BC.sum()
                sum_BE.addmm_(grad_BC, text_BE[tile].float())
                grad_text_BE[tile] = grad_BC.T @ rows_BE
            return grad_text_BE

        grad_text_BE = pass_on(text_BE.detach(), meet) if gather else meet(0, text_BE.detach())
        gradients = scaled_gradients(image_BE, text_BE, logit_scale, sum_BE, grad_text_BE, B)
        ctx.gradients = (*gradients, (grad_bias / B).to(logit_bias.dtype))
        return loss / B


def flip_positives(block: Block, values_BC: Tensor, sign_BC: Tensor | None, tile: slice) -> None:
    """Change the sign of a tile's positives: those of `sign_BC`, or without it the rows' own partners."""
    if sign_BC is None:
        block.partners(values_BC, tile).neg_()
    else:
        values_BC *= sign_BC


def scaled_gradients(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, grad_image_BE: Tensor, grad_text_BE: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of images, texts and scale, from those of the cosines' images and texts, over `count`.

    A logit is the scale times a cosine, so the scale's gradient is the product of the images with theirs.
    """
    grad_scale = (grad_image_BE * image_BE).sum() / count
    factor = logit_scale.float() / count
    return (
        grad_image_BE.mul_(factor).to(image_BE.dtype),
        grad_text_BE.mul_(factor).to(text_BE.dtype),
        grad_scale.to(logit_scale.dtype),
    )
