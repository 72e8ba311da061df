"""The losses against OpenCLIP's, against sums written out, in tiles against whole, over ranks against one process."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import open_clip.loss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_of_ranks import CAPTION_B, averages_of_ranks, features, features_of_ranks, losses_of_rank
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.model import loss as loss_module
from clipkit.model.global_loss import global_contrastive
from clipkit.model.loss import SameCaption, info_nce, sigmoid_loss

Loss = Callable[..., Tensor]


def assert_same_with_gradients(
    ours: Tensor, theirs: Tensor, our_leaves: list[Tensor], their_leaves: list[Tensor]
) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    gradients = zip(torch.autograd.grad(ours, our_leaves), torch.autograd.grad(theirs, their_leaves), strict=True)
    for our_gradient, their_gradient in gradients:
        torch.testing.assert_close(our_gradient, their_gradient, atol=1e-6, rtol=1e-5)


def test_info_nce_equals_openclip() -> None:
    ours, theirs = features()[:3], features()[:3]
    assert_same_with_gradients(info_nce(*ours), open_clip.loss.ClipLoss()(*theirs), list(ours), list(theirs))


def test_sigmoid_loss_equals_openclip() -> None:
    ours, theirs = features(), features()
    assert_same_with_gradients(sigmoid_loss(*ours), open_clip.loss.SigLipLoss()(*theirs), list(ours), list(theirs))


def written_out_info_nce(same_caption: SameCaption, *leaves: Tensor) -> Tensor:
    """InfoNCE pair by pair, as the definition reads."""
    image_BE, text_BE, scale, _ = leaves
    total = torch.zeros(())
    for rows, columns in ((image_BE, text_BE), (text_BE, image_BE)):
        for i in range(len(rows)):
            logits = [scale * rows[i] @ column for column in columns]
            alike = [j for j in range(len(rows)) if CAPTION_B[j] == CAPTION_B[i]]
            left_out = set(alike) - {i} if same_caption == "ignore" else set()
            targets = alike if same_caption == "positive" else [i]
            denominator = torch.stack([logit for j, logit in enumerate(logits) if j not in left_out]).logsumexp(0)
            total = total + denominator - sum(logits[j] for j in targets) / len(targets)
    return total / (2 * len(image_BE))


def written_out_sigmoid(same_caption: SameCaption, *leaves: Tensor) -> Tensor:
    image_BE, text_BE, scale, bias = leaves
    total = torch.zeros(())
    for i in range(len(image_BE)):
        for j in range(len(text_BE)):
            alike = bool(CAPTION_B[i] == CAPTION_B[j])
            if same_caption == "ignore" and alike and i != j:
                continue
            positive = i == j or (same_caption == "positive" and alike)
            logit = scale * image_BE[i] @ text_BE[j] + bias
            total = total - F.logsigmoid(logit if positive else -logit)
    return total / len(image_BE)


@pytest.mark.parametrize("same_caption", ["negative", "ignore", "positive"])
def test_pairs_with_the_same_caption(same_caption: SameCaption) -> None:
    ours, theirs = features(), features()
    assert_same_with_gradients(
        info_nce(*ours[:3], caption_B=CAPTION_B, same_caption=same_caption),
        written_out_info_nce(same_caption, *theirs),
        list(ours[:3]),
        list(theirs[:3]),
    )
    assert_same_with_gradients(
        sigmoid_loss(*ours, caption_B=CAPTION_B, same_caption=same_caption),
        written_out_sigmoid(same_caption, *theirs),
        list(ours),
        list(theirs),
    )


@pytest.mark.parametrize("same_caption", ["ignore", "positive"])
def test_different_captions_change_nothing(same_caption: SameCaption) -> None:
    leaves = features()
    distinct_B = torch.arange(8)
    plain = info_nce(*leaves[:3]), sigmoid_loss(*leaves)
    torch.testing.assert_close(info_nce(*leaves[:3], caption_B=distinct_B, same_caption=same_caption), plain[0])
    torch.testing.assert_close(sigmoid_loss(*leaves, caption_B=distinct_B, same_caption=same_caption), plain[1])


def test_one_caption_for_all_leaves_nothing_to_tell_apart() -> None:
    leaves = features()
    loss = info_nce(*leaves[:3], caption_B=torch.zeros(8, dtype=torch.int64), same_caption="ignore")
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves[:3]))


def test_float32_under_bfloat16_autocast() -> None:
    """Even when the features come as bfloat16: they are raised to float32 before any product is taken."""
    leaves = features()
    exact = info_nce(*leaves[:3]), sigmoid_loss(*leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(*leaves[:3]), sigmoid_loss(*leaves)
        rounded = info_nce(leaves[0].bfloat16(), leaves[1].bfloat16(), leaves[2])
    assert inside == exact
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact[0].item(), abs=0.05)


def test_extreme_temperatures_stay_finite() -> None:
    """A perfect batch and a batch that is all wrong, at the largest scale."""
    one_hot = torch.eye(8).requires_grad_()
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    for text_BE, expected in ((torch.eye(8), 0.0), (torch.eye(8).roll(1, 0), 100.0)):
        loss = info_nce(one_hot, text_BE, scale)
        assert loss.item() == pytest.approx(expected, abs=1e-4)
        sigmoid = sigmoid_loss(one_hot, text_BE, scale, bias)
        assert sigmoid.item() == pytest.approx(expected and 10 + 90, abs=1e-2)
        assert torch.autograd.grad(loss + sigmoid, one_hot)[0].isfinite().all()


def test_an_untrained_model_is_at_chance() -> None:
    same = torch.ones(32, 1)
    assert info_nce(same, same, torch.tensor(14.0)).item() == pytest.approx(math.log(32), rel=1e-6)


def test_wrong_arguments() -> None:
    leaves = features()
    with pytest.raises(ValueError, match="needs caption_B"):
        info_nce(*leaves[:3], same_caption="ignore")
    with pytest.raises(ValueError, match="negative, ignore or positive"):
        info_nce(*leaves[:3], caption_B=CAPTION_B, same_caption="neutral")


def plain_info_nce(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    """The loss out of one matrix of all logits."""
    logits_BB, label_B = scale * image_BE @ text_BE.T, torch.arange(len(image_BE))
    return (F.cross_entropy(logits_BB, label_B) + F.cross_entropy(logits_BB.T, label_B)) / 2


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 33),
    tile=st.integers(1, 300),
    captions=st.integers(1, 12),
    same_caption=st.sampled_from(["negative", "ignore", "positive"]),
)
def test_tiles_of_any_size_make_the_same_loss(rows: int, tile: int, captions: int, same_caption: SameCaption) -> None:
    caption_B = torch.arange(rows) * 7 % captions
    for loss, count in ((info_nce, 3), (sigmoid_loss, 4)):
        whole, tiled = features(rows)[:count], features(rows)[:count]
        expected = loss(*whole, caption_B=caption_B, same_caption=same_caption)
        with mock.patch.object(loss_module, "TILE", tile):
            found = loss(*tiled, caption_B=caption_B, same_caption=same_caption)
        assert_same_with_gradients(found, expected, list(tiled), list(whole))
        if loss is info_nce and same_caption == "negative":
            assert_same_with_gradients(found, plain_info_nce(*whole), list(tiled), list(whole))


@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
def test_nothing_of_the_size_of_all_logits_is_held(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor anything much larger than a tile, whatever an operation is for."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            sizes = [each.numel() for each in pytree.tree_leaves(result) if isinstance(each, Tensor)]
            largest = max(largest, *sizes, 0)
            return result

    monkeypatch.setattr(loss_module, "TILE", 2048)
    leaves = features(256, 4)[: 3 if loss is info_nce else 4]
    with Watch():
        value = loss(*leaves, caption_B=torch.arange(256), same_caption="ignore")
        torch.autograd.grad(value, leaves)
    assert largest == 2048


class RoundFactors(TorchDispatchMode):
    """Rounds what is multiplied to so many bits of mantissa, as tensor cores do for TF32 (10); sums stay float32."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            args = (*args[:-2], *(self.rounded(factor) for factor in args[-2:]))
        return func(*args, **(kwargs or {}))

    def rounded(self, x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)  # of 0.5 to 1: its first bit is the implicit one
        return torch.ldexp(torch.round(mantissa * 2 ** (self.bits + 1)) / 2 ** (self.bits + 1), exponent)


@pytest.mark.parametrize(("loss", "scale"), [(info_nce, 100.0), (info_nce, 14.0), (sigmoid_loss, 100.0)])
def test_the_error_of_tf32_products(loss: Loss, scale: float) -> None:
    """Features of pairs that a trained model has told apart: within 0.1% of the loss and 0.5% of the gradient at
    CLIP's scales. bfloat16's 7 bits would make it several times as much."""
    generator = torch.Generator().manual_seed(3)
    image_BE, noise_BE = torch.randn(2, 256, 512, generator=generator).unbind()
    text_BE = F.normalize(0.16 * image_BE + noise_BE, dim=-1)
    values = [F.normalize(image_BE, dim=-1), text_BE, torch.tensor(scale), torch.tensor(-10.0)]

    def run(bits: int | None) -> tuple[Tensor, Tensor]:
        leaves = [value.clone().requires_grad_() for value in values[: 3 if loss is info_nce else 4]]
        with RoundFactors(bits) if bits else contextlib.nullcontext():
            value = loss(*leaves)
        return value.detach(), torch.cat([each.flatten() for each in torch.autograd.grad(value, leaves[:2])])

    exact, gradient = run(None)
    errors = {}
    for bits in (10, 7):
        value, rounded = run(bits)
        errors[bits] = abs(value / exact - 1).item(), ((rounded - gradient).norm() / gradient.norm()).item()
    assert errors[10][0] < 1e-3
    assert errors[10][1] < 5e-3
    assert errors[7][1] > 4 * errors[10][1]


@pytest.fixture(scope="module", params=[1, 2, 4])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """What each of several processes found."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    run_ranks(losses_of_rank, str(folder), ranks=request.param)
    return [torch.load(folder / f"results-{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("same_caption", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
def test_several_processes_equal_one(
    parts: list[dict[str, list[Tensor]]], loss: Loss, same_caption: SameCaption
) -> None:
    """The mean of the losses is the loss of the whole batch, and so for the gradients after DDP's averaging."""
    values, caption_B = features_of_ranks()
    leaves = [value.requires_grad_() for value in values[: 3 if loss is info_nce else 4]]
    whole = loss(*leaves, caption_B=caption_B, same_caption=same_caption)
    found = [part[f"{loss.__name__} {same_caption}"] for part in parts]
    assert_ranks_have(found, whole, leaves)


def test_several_processes_keep_the_normalisers_of_one(parts: list[dict[str, list[Tensor]]]) -> None:
    values, caption_B = features_of_ranks()
    leaves, averages = [value.requires_grad_() for value in values[:3]], averages_of_ranks()
    given = {"caption_B": caption_B, "same_caption": "ignore"}
    whole = global_contrastive(*leaves, **averages, eps=1e-3, rho=2.0, **given)
    assert_ranks_have([part["global"] for part in parts], whole, leaves)
    kept_B2 = torch.cat([part["global"][-1] for part in parts])
    torch.testing.assert_close(kept_B2, averages["log_u_B2"], atol=1e-5, rtol=1e-6)


def assert_ranks_have(found: list[list[Tensor]], whole: Tensor, leaves: list[Tensor]) -> None:
    """That losses and gradients of the ranks have the mean that one process has."""
    gradients = torch.autograd.grad(whole, leaves)
    torch.testing.assert_close(sum(value for value, *_ in found) / len(found), whole.detach(), atol=1e-6, rtol=1e-6)
    assert len({round(float(value), 4) for value, *_ in found}) == len(found)  # they differ: no agreement by symmetry
    for place, gradient in enumerate(gradients, 1):
        if place <= 2:  # rows live in one process; the mean over processes divides them
            ours = torch.cat([each[place] for each in found]) / len(found)
        else:
            ours = sum(each[place] for each in found) / len(found)
        torch.testing.assert_close(ours, gradient, atol=1e-6, rtol=1e-5)
