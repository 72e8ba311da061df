"""FastCLIP's loss against its estimator written out pair by pair, and against InfoNCE where the two are one."""

import math

import numpy as np
import pytest
import torch
from loss_of_ranks import CAPTION_B, features
from torch import Tensor
from torch.nn import functional as F

from clipkit.device import pick
from clipkit.model import loss as loss_module
from clipkit.model.distill import TeacherSpace, less_reference
from clipkit.model.global_loss import Normalisers, gamma_at, global_contrastive
from clipkit.model.loss import ABSENT, info_nce

U_B2 = torch.tensor(
    [[0.5, 2.0], [1e-6, 3.0], [7.0, 0.1], [1.0, 1.0], [40.0, 0.02], [0.3, 0.3], [2.0, 2.0], [9.0, 1e-3]]
)
GAMMA_B = torch.tensor([0.3, 0.3, 1.0, 0.3, 0.3, 1.0, 0.3, 0.3])


def written_out(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor,
    eps: float,
    rho: float | None,
    ignore: bool,
    reference_BB: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The value, the gradients and the averages of algorithm 1 of the paper, with a loss for each batch's g.

    `reference_BB` are DRRho's cosines of images and texts by the reference model.
    """
    theirs_BB = torch.zeros(len(image_BE), len(image_BE)) if reference_BB is None else reference_BB
    leaves, B = [image_BE, text_BE, scale], len(image_BE)
    value, surrogate, u_B2 = torch.zeros(()), torch.zeros(()), torch.zeros(B, 2)
    for side, (rows, columns) in enumerate(((image_BE, text_BE), (text_BE, image_BE))):
        for i in range(B):
            others = [j for j in range(B) if j != i and not (ignore and CAPTION_B[j] == CAPTION_B[i])]
            excess = [rows[i] @ columns[j] - rows[i] @ columns[i] for j in others]
            usual_BB = theirs_BB.T if side else theirs_BB
            usual = [usual_BB[i, j] - usual_BB[i, i] for j in others]
            g = (scale * (torch.stack(excess) - torch.stack(usual))).exp().mean()
            u_B2[i, side] = u = (1 - GAMMA_B[i]) * U_B2[i, side] + GAMMA_B[i] * g.detach()
            value = value + torch.log(eps + u) / (2 * B)
            surrogate = surrogate + g / (eps + u) / (2 * B)
    gradients = [each.clone() for each in torch.autograd.grad(surrogate, leaves)]
    if rho is None:
        return value, gradients, u_B2
    # FastCLIP-v3: the gradient of tau * (that + rho) by the product rule, tau = 1 / scale.
    gradients = [gradient / scale.detach() for gradient in gradients]
    gradients[2] = gradients[2] - (value + rho) / scale.detach() ** 2
    return (value + rho) / scale.detach(), gradients, u_B2


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize(("eps", "rho"), [(1e-14, None), (0.2, None), (1e-14, 6.5)])
@pytest.mark.parametrize("tile", [24, 2**23])
def test_it_is_the_papers_estimator(tile: int, eps: float, rho: float | None, ignore: bool, monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "TILE", tile)
    leaves, log_u_B2 = features()[:3], U_B2.log()
    same_caption = "ignore" if ignore else "negative"
    found = global_contrastive(
        *leaves, log_u_B2=log_u_B2, gamma_B=GAMMA_B, eps=eps, rho=rho, caption_B=CAPTION_B, same_caption=same_caption
    )
    value, gradients, u_B2 = written_out(*features()[:3], eps, rho, ignore)
    torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(list(torch.autograd.grad(found, leaves)), gradients, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(log_u_B2.exp(), u_B2, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("widths", [[5], [5, 3]])
def test_with_a_reference_it_is_drrhos(widths: list[int]) -> None:
    """Of several references the mean of their cosines counts."""
    teacher_B2D = torch.randn(8, 2, sum(widths), generator=torch.Generator().manual_seed(3))
    parts = [F.normalize(part_B2E, dim=2) for part_B2E in teacher_B2D.split(widths, dim=2)]
    reference_BB = torch.stack([part_B2E[:, 0] @ part_B2E[:, 1].T for part_B2E in parts]).mean(dim=0)
    image_BE, text_BE, scale = leaves = features()[:3]
    wider = less_reference(image_BE, text_BE, teacher_B2D, [TeacherSpace(width, 1.0) for width in widths])
    log_u_B2 = U_B2.log()
    found = global_contrastive(*wider, scale, log_u_B2=log_u_B2, gamma_B=GAMMA_B, eps=1e-14, rho=6.5)
    value, gradients, u_B2 = written_out(*features()[:3], 1e-14, 6.5, False, reference_BB)
    torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(list(torch.autograd.grad(found, leaves)), gradients, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(log_u_B2.exp(), u_B2, atol=1e-7, rtol=1e-5)


def test_of_new_records_it_can_be_info_nce() -> None:
    ours, theirs = features()[:3], features()[:3]
    found, expected = global_contrastive(*ours, eps=1 / 7), info_nce(*theirs)
    torch.testing.assert_close(found + math.log(7), expected)
    for one, other in zip(torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_extremes_stay_finite() -> None:
    """A batch that is all wrong at the largest scale, one that is all right, and one caption for all."""
    image_BE, scale, same = torch.eye(8).requires_grad_(), torch.tensor(100.0), {"same_caption": "ignore"}
    log_u_B2, gamma_B = torch.full((8, 2), ABSENT), torch.ones(8)
    for text_BE, expected in ((torch.eye(8).roll(1, 0), 100 - math.log(7)), (torch.eye(8), math.log(1e-14))):
        loss = global_contrastive(image_BE, text_BE, scale, eps=1e-14)
        assert loss.item() == pytest.approx(expected, abs=1e-4)
        assert torch.autograd.grad(loss, image_BE)[0].isfinite().all()
    averages = {"log_u_B2": log_u_B2, "gamma_B": gamma_B}
    loss = global_contrastive(image_BE, torch.eye(8), scale, **averages, eps=1e-3, caption_B=torch.zeros(8), **same)
    assert not torch.autograd.grad(loss, image_BE)[0].any()
    assert (log_u_B2 == ABSENT).all()  # nothing was learned of them


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="no same_caption='positive'"):
        global_contrastive(*features()[:3], eps=1.0, caption_B=CAPTION_B, same_caption="positive")


def test_gamma_falls_by_half_a_cosine() -> None:
    assert [gamma_at(seen, 100, 0.2) for seen in (0, 50, 100, 1000)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_each_record_has_its_own_average() -> None:
    kept = Normalisers(6, pick("cpu"), gamma=0.2, decay_samples=100)
    batch = {name: torch.from_numpy(array) for name, array in kept.rows(np.array([4, 1, 4]), 1000).items()}
    assert batch["gamma_B"].tolist() == [1.0, 1.0, 1.0]
    batch["log_u_B2"].copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    kept.keep(batch)
    again = kept.rows(np.array([1, 0, 4]), 1000)
    assert again["gamma_B"].tolist() == pytest.approx([0.2, 1.0, 0.2])
    assert again["log_u_B2"][[0, 2]].tolist() == [[3.0, 4.0], [5.0, 6.0]]
    assert (kept.tensors()["log_u_R2"] > ABSENT / 2).any(dim=1).tolist() == [False, True, False, False, True, False]
