"""The contrastive losses: CLIP's symmetric InfoNCE and SigLIP's sigmoid loss.

On one device (or in one SPMD program, where the compiler does the rest) they see the whole batch. With several
processes each asks for `gather=True`: local rows against everyone's columns, so that nothing of size (global batch)^2
exists anywhere. The value is then the mean over the local rows; DistributedDataParallel's average of the gradients
over processes makes it the gradient of the mean over all rows.

Everything here is float32, autocast or not: with a logit scale of 100, bfloat16 would round logits to steps of 0.5.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

SameCaption = Literal["negative", "ignore", "positive"]
"""What a pair of different samples with the same caption counts as. `negative` is CLIP's own loss; `ignore` leaves such
pairs out of the sums; `positive` makes them targets beside the sample's own partner, each with the same weight."""


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
    captions) is needed when `same_caption` isn't `negative`.
    """
    with torch.autocast(image_BE.device.type, enabled=False):
        # The scale multiplies the small matrix. For the gradient one copy of each matrix of logits is kept, no softmax.
        image_BE, text_BE = image_BE.float() * logit_scale.float(), text_BE.float()
        B, start = len(image_BE), first_row(len(image_BE), gather)
        ignored_BN, positive_BN = caption_masks(caption_B, B, same_caption, gather)
        if not gather:
            logits_BB = masked_logits(image_BE, text_BE, ignored_BN)
            return (cross_entropy(logits_BB, start, positive_BN) + cross_entropy(logits_BB.T, start, positive_BN)) / 2
        from_image = cross_entropy(masked_logits(image_BE, gather_features(text_BE), ignored_BN), start, positive_BN)
        from_text = cross_entropy(masked_logits(text_BE, gather_features(image_BE), ignored_BN), start, positive_BN)
        return (from_image + from_text) / 2


def masked_logits(x_BE: Tensor, y_NE: Tensor, ignored_BN: Tensor | None) -> Tensor:
    """All dot products, -inf where a pair is to count as absent."""
    logits_BN = x_BE @ y_NE.T
    # In place: the gradient of a product doesn't need the product.
    return logits_BN if ignored_BN is None else logits_BN.masked_fill_(ignored_BN, -torch.inf)


def cross_entropy(logits_BN: Tensor, start: int, positive_BN: Tensor | None) -> Tensor:
    """Mean cross-entropy of the rows. Their targets are `positive_BN`, or their own partners from column `start` on."""
    if positive_BN is None:
        target_B = logits_BN[:, start : start + len(logits_BN)].diagonal()
    else:
        target_B = logits_BN.masked_fill(~positive_BN, 0.0).sum(dim=1) / positive_BN.sum(dim=1)
    return (logits_BN.logsumexp(dim=1) - target_B).mean()


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
    with torch.autocast(image_BE.device.type, enabled=False):
        B, start = len(image_BE), first_row(len(image_BE), gather)
        all_text_NE = gather_features(text_BE.float()) if gather else text_BE.float()
        logits_BN = (image_BE.float() * logit_scale.float()) @ all_text_NE.T + logit_bias.float()
        ignored_BN, positive_BN = caption_masks(caption_B, B, same_caption, gather)
        if positive_BN is None:
            positive_BN = partner_mask(B, start, len(all_text_NE), image_BE.device)
        signed_BN = torch.where(positive_BN, -logits_BN, logits_BN)
        if ignored_BN is not None:
            signed_BN = signed_BN.masked_fill(ignored_BN, -torch.inf)
        return F.softplus(signed_BN).sum() / B


def caption_masks(
    caption_B: Tensor | None, rows: int, same_caption: SameCaption, gather: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Which pairs to ignore and which are positive, each bool[B, N], or None: none ignored, own partners positive."""
    if same_caption == "negative":
        return None, None
    if same_caption not in ("ignore", "positive"):
        raise ValueError(f"same_caption is negative, ignore or positive, not {same_caption!r}")
    if caption_B is None:
        raise ValueError(f"same_caption={same_caption!r} needs caption_B")
    all_caption_N = gather_features(caption_B) if gather else caption_B
    same_BN = caption_B[:, None] == all_caption_N
    if same_caption == "positive":
        return None, same_BN
    return same_BN & ~partner_mask(rows, first_row(rows, gather), len(all_caption_N), caption_B.device), None


def partner_mask(rows: int, start: int, columns: int, device: torch.device) -> Tensor:
    """bool[rows, columns]: True where a row meets its own partner."""
    row_B = torch.arange(rows, device=device) + start
    return row_B[:, None] == torch.arange(columns, device=device)


def first_row(rows: int, gather: bool) -> int:
    """The place of this process's first row among all processes' rows, which are equally many everywhere."""
    return dist.get_rank() * rows if gather else 0


def gather_features(x_BE: Tensor) -> Tensor:
    """All processes' rows in the order of their ranks: [B, ...] -> [W * B, ...]. Gradients flow back to the owners.

    Needs `torch.distributed` initialised, and as many rows in every process.
    """
    gathered: Tensor = GatherRows.apply(x_BE.contiguous())
    return gathered


class GatherRows(torch.autograd.Function):
    """all_gather forward; backward, each process gets the sum of everyone's gradient for its own rows."""

    @staticmethod
    def forward(ctx: Any, x_BE: Tensor) -> Tensor:
        world = dist.get_world_size()
        gathered = x_BE.new_empty((world * len(x_BE), *x_BE.shape[1:]))
        dist.all_gather(list(gathered.chunk(world)), x_BE)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad_NE: Tensor) -> Tensor:
        grad_NE = grad_NE.contiguous()
        if dist.get_backend() == "gloo":  # which can't scatter a sum
            dist.all_reduce(grad_NE)
            return grad_NE.chunk(dist.get_world_size())[dist.get_rank()].clone()
        grad_BE = grad_NE.new_empty((len(grad_NE) // dist.get_world_size(), *grad_NE.shape[1:]))
        dist.reduce_scatter_tensor(grad_BE, grad_NE)
        return grad_BE
