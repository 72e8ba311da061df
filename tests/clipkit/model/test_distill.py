"""Distillation against PyTorch's own KL divergence, in tiles against whole, over ranks against one process."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from distillation_of_ranks import ROWS, TEACHERS, distillation_of_rank, teacher_features
from loss_of_ranks import features
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional as F

from clipkit.model import loss as loss_module
from clipkit.model.distill import TeacherSpace, distillation


def plain(image_BE: Tensor, text_BE: Tensor, scale: Tensor, teacher_B2D: Tensor) -> Tensor:
    """The definition, out of whole matrices."""
    ours_BB, terms = scale * image_BE @ text_BE.T, []
    for part_B2E, teacher in zip(teacher_B2D.split([t.width for t in TEACHERS], dim=2), TEACHERS, strict=True):
        image_BD, text_BD = F.normalize(part_B2E, dim=2).unbind(1)
        theirs_BB = teacher.scale * image_BD @ text_BD.T
        for ours, theirs in ((ours_BB, theirs_BB), (ours_BB.T, theirs_BB.T)):
            softmaxes = ours.log_softmax(1), theirs.log_softmax(1)
            terms.append(F.kl_div(*softmaxes, reduction="batchmean", log_target=True))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("tile", [1, 24, 100, loss_module.TILE])
def test_it_is_the_divergence_of_the_softmaxes_with_its_gradients(tile: int) -> None:
    ours, theirs = features(ROWS)[:3], features(ROWS)[:3]
    with mock.patch.object(loss_module, "TILE", tile):
        found = distillation(*ours, teacher_features(), TEACHERS)
    expected = plain(*theirs, teacher_features())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(2 * found, ours), torch.autograd.grad(2 * expected, theirs)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    """At the same temperature, from whole numbers or from eight bits of them; not at another temperature."""
    leaves = features(ROWS)[:3]
    stored_B2E = torch.stack(leaves[:2], dim=1).detach()
    same, other = [TeacherSpace(6, leaves[2].item())], [TeacherSpace(6, leaves[2].item() / 2)]
    loss = distillation(*leaves, stored_B2E, same)
    assert abs(loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in torch.autograd.grad(loss, leaves))
    rounded_B2E = (stored_B2E * 127 / stored_B2E.abs().amax(2, keepdim=True)).round().to(torch.int8)
    assert 0 < distillation(*leaves, rounded_B2E, same).item() < 1e-3 < distillation(*leaves, stored_B2E, other).item()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_find_the_loss_and_the_gradients_of_one_process(ranks: int, tmp_path: Path) -> None:
    leaves = features(ROWS)[:3]
    expected = distillation(*leaves, teacher_features(), TEACHERS)
    image_BE, text_BE, scale = torch.autograd.grad(expected, leaves)
    run_ranks(distillation_of_rank, str(tmp_path), ranks=ranks)
    parts = [torch.load(tmp_path / f"results-{rank}.pt", weights_only=True) for rank in range(ranks)]
    values, images, texts, scales = zip(*parts, strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), expected.detach(), atol=1e-6, rtol=1e-5)
    # DistributedDataParallel averages over the ranks.
    torch.testing.assert_close(torch.cat(images) / ranks, image_BE, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(torch.cat(texts) / ranks, text_BE, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(torch.stack(scales).mean(), scale, atol=1e-6, rtol=1e-4)
