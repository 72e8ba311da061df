"""Distillation of affinities (Vasu et al., "MobileCLIP", CVPR 2024): which texts a teacher takes for likely for an
image, and which images for a text, is what the student is to find too.

Where a batch has N pairs, a contrastive loss says of each only which one is its own; a teacher says how likely all N
are. The teachers' embeddings were computed before (`clipkit.train.teachers`), so a step costs two more products.

As in `loss`, no matrix of all logits is held, everything is float32, and with several processes the local rows meet
everyone's texts, gathered.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clipkit.model.exchange import sum_rows, total_logsumexp
from clipkit.model.loss import ABSENT, Loss, block_against_all, scaled_gradients


class TeacherSpace(NamedTuple):
    """A teacher's share of stored embeddings."""

    width: int
    scale: float
    """What its cosines are multiplied by before a softmax: the inverse of its temperature."""


def distillation(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    teacher_B2D: Tensor,
    teachers: Sequence[TeacherSpace],
    *,
    gather: bool = False,
) -> Tensor:
    """The KL divergence of the student's softmax from each teacher's: a scalar, the mean over rows, over both
    directions and over the teachers.

    `teacher_B2D` has image and text embeddings of all teachers, one behind another, of any length and type. The other
    arguments are as for `info_nce`.
    """
    with torch.autocast(image_BE.device.type, enabled=False):
        pairs = teacher_features(teacher_B2D, teachers)
        scales = [teacher.scale for teacher in teachers]
        loss: Tensor = Distillation.apply(image_BE, text_BE, logit_scale, pairs, scales, gather)
        return loss


def teacher_features(teacher_B2D: Tensor, teachers: Sequence[TeacherSpace]) -> list[tuple[Tensor, Tensor]]:
    """Each teacher's embeddings of the images and of the texts: float32 unit vectors."""
    parts = teacher_B2D.split([teacher.width for teacher in teachers], dim=2)
    pairs = [F.normalize(part_B2E.float(), dim=2).unbind(1) for part_B2E in parts]
    return [(image_BE, text_BE) for image_BE, text_BE in pairs]


def less_reference(
    image_BE: Tensor, text_BE: Tensor, teacher_B2D: Tensor, teachers: Sequence[TeacherSpace]
) -> tuple[Tensor, Tensor]:
    """Wider features, the products of which are the cosines less those of the teachers (their mean): float32.

    With them the global contrastive loss is DRRho's (Wei et al., 2025, arXiv 2505.06699), of scale * ((cos_ij - cos_ii)
    - (reference's cos_ij - cos_ii)): a negative that the reference confuses with the partner, too, counts less.
    """
    share = len(teachers) ** -0.5
    pairs = [(share * image_BD, -share * text_BD) for image_BD, text_BD in teacher_features(teacher_B2D, teachers)]
    images, texts = zip((image_BE.float(), text_BE.float()), *pairs, strict=True)
    return torch.cat(images, dim=1), torch.cat(texts, dim=1)


class Affinity:
    """A block of logits with the log of its softmax along the rows and along the columns."""

    def __init__(self, image_BE: Tensor, text_BE: Tensor, scale: Tensor, gather: bool) -> None:
        self.block = block_against_all(image_BE, text_BE, scale, None, "negative", gather)
        self.start = self.block.start
        self.tiles = list(self.block.tiles())
        self.row_B, columns = scale.new_full((len(image_BE),), ABSENT), []
        for tile in self.tiles:
            logits_BC, _ = self.block.logits(tile)
            # As torch.logaddexp, which a TPU leaves to the host.
            self.row_B = torch.stack((self.row_B, logits_BC.logsumexp(dim=1))).logsumexp(dim=0)
            columns.append(logits_BC.logsumexp(dim=0))
        self.column_N = torch.cat(columns)
        if gather:
            self.column_N = total_logsumexp(self.column_N)
        self.only_BC = logits_BC if len(self.tiles) == 1 else None

    def logits(self, tile: slice) -> Tensor:
        """The logits of a tile, which are computed again where there are several."""
        return self.block.logits(tile)[0] if self.only_BC is None else self.only_BC

    def shares(self, logits_BC: Tensor, tile: slice) -> Tensor:
        """The softmax of the rows and that of the columns of a tile, added."""
        return (logits_BC - self.row_B[:, None]).exp_().add_((logits_BC - self.column_N[tile]).exp_())

    def denominators(self) -> Tensor:
        """The sum of the logarithms of the local rows' and columns' denominators."""
        B = len(self.row_B)
        return self.row_B.sum() + self.column_N[self.start : self.start + B].sum()


class Distillation(Loss):
    """The loss with its gradients: the student's softmaxes less the mean of the teachers'."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        logit_scale: Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
        scales: Sequence[float],
        gather: bool,
    ) -> Tensor:
        B, scale = len(image_BE), logit_scale.float()
        student = Affinity(image_BE.detach().float(), text_BE.detach(), scale, gather)
        teachers = [
            Affinity(image_BD, text_BD, torch.full_like(scale, value), gather)
            for (image_BD, text_BD), value in zip(pairs, scales, strict=True)
        ]
        text_NE, loss = student.block.text_NE, student.denominators()
        for teacher in teachers:
            loss = loss - teacher.denominators() / len(teachers)
        sum_BE, grad_text_NE = torch.zeros_like(student.block.image_BE), torch.empty_like(text_NE, dtype=torch.float32)
        for tile in student.tiles:
            logits_BC = student.logits(tile)
            grad_BC = student.shares(logits_BC, tile)
            for teacher in teachers:
                theirs_BC = teacher.logits(tile)
                shares_BC = teacher.shares(theirs_BC, tile)
                loss = loss + (shares_BC * (theirs_BC - logits_BC)).sum() / len(teachers)
                grad_BC.sub_(shares_BC, alpha=1 / len(teachers))
            sum_BE.addmm_(grad_BC, text_NE[tile].float())
            grad_text_NE[tile] = grad_BC.T @ student.block.image_BE
        grad_text_BE = sum_rows(grad_text_NE) if gather else grad_text_NE
        ctx.gradients = scaled_gradients(image_BE, text_BE, logit_scale, sum_BE, grad_text_BE, 2 * B)
        return loss / (2 * B)
