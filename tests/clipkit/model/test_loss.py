"""The losses against OpenCLIP's, against sums written out, and over two processes against one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import open_clip.loss
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipkit.model.loss import SameCaption, info_nce, sigmoid_loss

CAPTION_B = torch.tensor([11, 22, 11, 33, 44, 33, 11, 55])


def features(count: int = 8, width: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors of images and texts, a logit scale and a bias, all of them leaves that want gradients."""
    generator = torch.Generator().manual_seed(7)
    image_BE, text_BE = F.normalize(torch.randn(2, count, width, generator=generator), dim=-1).unbind()
    leaves = image_BE.clone(), text_BE.clone(), torch.tensor(9.0), torch.tensor(-3.0)
    return tuple(leaf.requires_grad_() for leaf in leaves)


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


# One of two processes: its half of the batch goes in, its loss and its gradients come out.
WORKER = """
import sys
import torch
import torch.distributed as dist
from clipkit.model.loss import info_nce, sigmoid_loss

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
image_BE, text_BE, scale, bias, caption_B = torch.load(f"{folder}/inputs.pt", weights_only=True)
mine = slice(rank * 4, rank * 4 + 4)
results = {}
for same_caption in ("negative", "ignore", "positive"):
    for loss_name in ("info_nce", "sigmoid_loss"):
        leaves = [image_BE[mine].clone(), text_BE[mine].clone(), scale.clone()]
        leaves += [bias.clone()] if loss_name == "sigmoid_loss" else []
        leaves = [leaf.requires_grad_() for leaf in leaves]
        loss = {"info_nce": info_nce, "sigmoid_loss": sigmoid_loss}[loss_name](
            *leaves, caption_B=caption_B[mine], same_caption=same_caption, gather=True
        )
        results[f"{loss_name} {same_caption}"] = [loss.detach(), *torch.autograd.grad(loss, leaves)]
torch.save(results, f"{folder}/results-{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    torch.save([*(leaf.detach() for leaf in features()), CAPTION_B], folder / "inputs.pt")
    # Named, because gloo would otherwise look this machine's own name up in the DNS.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", WORKER, str(folder), str(rank)] for rank in range(2)]
    workers = [subprocess.Popen(each, env=environment, stderr=subprocess.PIPE, text=True) for each in commands]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return [torch.load(folder / f"results-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("same_caption", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
def test_two_processes_equal_one(halves: list[dict[str, list[Tensor]]], loss: object, same_caption: str) -> None:
    """The mean of both losses is the loss of the whole batch, and so for the gradients after DDP's averaging."""
    name = loss.__name__
    leaves = features()[: 3 if name == "info_nce" else 4]
    whole = loss(*leaves, caption_B=CAPTION_B, same_caption=same_caption)
    gradients = torch.autograd.grad(whole, leaves)
    (first, *first_gradients), (second, *second_gradients) = (half[f"{name} {same_caption}"] for half in halves)
    torch.testing.assert_close((first + second) / 2, whole.detach())
    assert abs(first - second) > 1e-4  # the halves differ, so agreement of the mean isn't by symmetry
    for place in (0, 1):  # rows live in one process; the mean over processes halves them
        both = torch.cat([first_gradients[place], second_gradients[place]]) / 2
        torch.testing.assert_close(both, gradients[place], atol=1e-6, rtol=1e-5)
    for place in range(2, len(leaves)):
        torch.testing.assert_close(
            (first_gradients[place] + second_gradients[place]) / 2, gradients[place], atol=1e-6, rtol=1e-5
        )
