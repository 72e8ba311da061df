"""The global contrastive loss, for batches that are too small: its normalisers are those of the whole dataset.

InfoNCE compares a pair with the others of its batch. SogCLR (Yuan et al., 2022) and FastCLIP (Wei et al., 2024,
arXiv 2407.01445) compare it with all others of the dataset: the loss of an image i with its text is

    log(eps + g_i),  g_i = the mean over the other texts j of exp(scale * (cos_ij - cos_ii)),

and likewise of a text against all images. A batch estimates g_i badly, and the logarithm of a bad estimate is biased.
So each record keeps a moving average of its own normaliser, u_i = (1 - gamma) u_i + gamma g_i(batch), once for each
direction, and the gradient is that of g_i(batch) / (eps + u_i), u_i held. With gamma = 1 and eps = 1 / (B - 1) this is
InfoNCE of the batch, but for a constant.

The averages are kept as logarithms, since g_i reaches exp(200) at a logit scale of 100, and on the host, where a table
for 10 million records takes 80 MB. Tiles, ranks and float32 are as in `loss`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipkit.device import Device
from clipkit.model.exchange import gather_features, sum_rows, total_logsumexp
from clipkit.model.loss import ABSENT, Loss, SameCaption, block_against_all, check_captions, scaled_gradients

# Bytes of the table for each record.
RECORD_BYTES = 8


def global_contrastive(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    *,
    log_u_B2: Tensor | None = None,
    gamma_B: Tensor | None = None,
    eps: float,
    rho: float | None = None,
    caption_B: Tensor | None = None,
    same_caption: SameCaption = "negative",
    gather: bool = False,
) -> Tensor:
    """FastCLIP's loss: a scalar, the mean over rows and over both directions of log(eps + u).

    `log_u_B2` are the averages so far of each row's image and of its text, and are changed to those with this batch;
    `gamma_B` is this batch's share in them, 1 for a record that has none yet. Without both, all records are new. A pair
    of equal captions is left out with `ignore`, which also doesn't count in the mean; `positive` isn't defined here.
    With `rho` the loss is (that + rho) / scale, by which FastCLIP-v3 learns the scale; without, it is that of v0.
    Other arguments as for `info_nce`.
    """
    check_captions(caption_B, same_caption)
    if same_caption == "positive":
        raise ValueError("the global contrastive loss has no same_caption='positive'")
    if log_u_B2 is None or gamma_B is None:
        log_u_B2 = image_BE.new_full((len(image_BE), 2), ABSENT, dtype=torch.float32)
        gamma_B = torch.ones_like(log_u_B2[:, 0])
    with torch.autocast(image_BE.device.type, enabled=False):
        loss: Tensor = GlobalContrastive.apply(
            image_BE, text_BE, logit_scale, log_u_B2, gamma_B, math.log(eps), caption_B, same_caption, gather
        )
        return loss if rho is None else (loss + rho) / logit_scale.float()


class GlobalContrastive(Loss):
    """The loss with the gradients of FastCLIP's estimator, in two passes over the tiles as `loss.InfoNCE`."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        logit_scale: Tensor,
        log_u_B2: Tensor,
        gamma_B: Tensor,
        log_eps: float,
        caption_B: Tensor | None,
        same_caption: SameCaption,
        gather: bool,
    ) -> Tensor:
        B, scale = len(image_BE), logit_scale.float()
        block = block_against_all(image_BE, text_BE, scale, caption_B, same_caption, gather)
        text_NE, start = block.text_NE, block.start
        tiles = list(block.tiles())

        def negatives(tile: slice) -> Tensor:
            """The logits of a tile, ABSENT for a row's own partner and what is ignored."""
            logits_BC, _ = block.logits(tile)
            block.partners(logits_BC, tile).fill_(ABSENT)
            return logits_BC

        # ---- The normalisers of this batch, and the averages with them -----------------------------------------------
        row_B, columns, count_B = scale.new_full((B,), ABSENT), [], scale.new_zeros(B)
        for tile in tiles:
            logits_BC = negatives(tile)
            row_B = torch.logaddexp(row_B, logits_BC.logsumexp(dim=1))
            columns.append(logits_BC.logsumexp(dim=0))
            count_B += (logits_BC > ABSENT / 2).sum(dim=1)
        column_N = torch.cat(columns)
        if gather:
            column_N = total_logsumexp(column_N)
        partner_B = (block.image_BE * text_BE.detach().float()).sum(dim=1) * scale
        base_B1 = (partner_B + count_B.clamp(min=1).log())[:, None]
        log_g_B2 = torch.stack((row_B, column_N[start : start + B]), dim=1) - base_B1
        gamma_B1 = gamma_B[:, None]
        mixed_B2 = torch.logaddexp(log_u_B2 + torch.log1p(-gamma_B1), log_g_B2 + gamma_B1.log())
        log_u_B2.copy_(torch.where(count_B[:, None] > 0, mixed_B2, log_u_B2))
        log_B2 = torch.logaddexp(log_u_B2, torch.full_like(log_u_B2, log_eps))

        # ---- The gradients: each negative by its exponential over the averages, the partner by all of them -----------
        below_B2 = base_B1 + log_B2
        below_N = gather_features(below_B2[:, 1]) if gather else below_B2[:, 1]
        sum_BE, grad_text_NE = torch.zeros_like(block.image_BE), torch.empty_like(text_NE, dtype=torch.float32)
        for tile in tiles:
            if len(tiles) > 1:
                logits_BC = negatives(tile)
            grad_BC = (logits_BC - below_B2[:, :1]).exp_()
            grad_BC += logits_BC.sub_(below_N[tile]).exp_()
            sum_BE.addmm_(grad_BC, text_NE[tile].float())
            grad_text_NE[tile] = grad_BC.T @ block.image_BE
        grad_text_BE = sum_rows(grad_text_NE) if gather else grad_text_NE
        partner_B1 = (log_g_B2 - log_B2).exp().sum(dim=1, keepdim=True)
        sum_BE -= partner_B1 * text_BE.detach()
        grad_text_BE -= partner_B1 * block.image_BE
        ctx.gradients = scaled_gradients(image_BE, text_BE, logit_scale, sum_BE, grad_text_BE, 2 * B)
        return log_B2.mean()


def gamma_at(seen: int, decay_samples: int, last: float) -> float:
    """FastCLIP's inner learning rate: half a cosine from 1 to `last` over `decay_samples`, then `last`.

    In samples seen, where FastCLIP takes whole epochs: a record's first batch counts with 1 in any case.
    """
    return last + 0.5 * (1 - last) * (1 + math.cos(math.pi * min(1.0, seen / decay_samples)))


class Normalisers:
    """The moving averages of all records, of which every rank has the same.

    A step's are written when the next one asks for its own, so that nothing waits for the device in between.
    """

    def __init__(self, records: int, device: Device, gamma: float, decay_samples: int) -> None:
        self.log_u_R2 = np.full((records, 2), ABSENT, np.float32)
        self.device, self.gamma, self.decay_samples = device, gamma, decay_samples
        self.coming: tuple[Callable[[], Tensor], Callable[[], Tensor]] | None = None

    def rows(self, record_B: npt.NDArray[np.int64], seen: int) -> dict[str, npt.NDArray[Any]]:
        """What the step at `seen` samples needs in its batch, by name: the averages and shares of these records."""
        self.write()
        log_u_B2 = self.log_u_R2[record_B]
        gamma = gamma_at(seen, self.decay_samples, self.gamma)
        gamma_B = np.where(log_u_B2[:, 0] > ABSENT / 2, gamma, 1.0).astype(np.float32)
        return {"record_B": record_B, "log_u_B2": log_u_B2, "gamma_B": gamma_B}

    def keep(self, batch: dict[str, Tensor]) -> None:
        """Take a step's averages out of its batch, those of all ranks."""
        found = [batch["record_B"], batch["log_u_B2"]]
        if self.device.gathers:
            found = [gather_features(each) for each in found]
        record_N, log_u_N2 = (self.device.to_host(each) for each in found)
        self.coming = record_N, log_u_N2

    def write(self) -> None:
        """Write what the step before left. The last of several rows of one record stays."""
        if self.coming is not None:
            record_N, log_u_N2 = (wait().numpy() for wait in self.coming)
            self.log_u_R2[record_N] = log_u_N2
            self.coming = None

    def tensors(self) -> dict[str, Tensor]:
        """The table for a checkpoint, with the last step's in it."""
        self.write()
        return {"log_u_R2": torch.from_numpy(self.log_u_R2)}
