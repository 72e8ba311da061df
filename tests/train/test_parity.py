"""Twenty steps beside OpenCLIP's own model, loss, optimizer groups and schedule: the same losses, the same weights."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from openclip_twin import (
    TINY,
    TINY_CLIPA_V2,
    TINY_SIGLIP,
    captions,
    clipa_v2_twin,
    load_openclip,
    openclip_twin,
    siglip_twin,
)

from clipkit.config import set_values
from clipkit.device import pick
from clipkit.interop.openclip import convert
from clipkit.model.config import ModelConfig
from clipkit.pixels.images import normalise
from clipkit.train.catalogue import debug, find_recipe
from clipkit.train.optimizer import learning_rate_at, make_optimizer
from clipkit.train.recipes import OptimizerConfig, Recipe
from clipkit.train.step import train_step

STEPS, BATCH, WARMUP, PEAK = 20, 8, 4, 1e-3


def openclip_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The groups of `open_clip_train.main`: what has fewer than two dimensions, and the logit scale, isn't decayed."""
    free, decayed = [], []
    for name, parameter in model.named_parameters():
        excluded = parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
        if parameter.requires_grad:
            (free if excluded else decayed).append(parameter)
    return [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def openclip_rate(step: int) -> float:
    """`open_clip_train.scheduler.cosine_lr`."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) * PEAK


def batches(vocab_size: int) -> list[dict[str, torch.Tensor]]:
    rng = np.random.default_rng(0)
    size = TINY.image.image_size
    return [
        {
            "image_BHWC": torch.from_numpy(rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)),
            "ids_BT": captions(BATCH, TINY.text.context_length, seed=step) % vocab_size,
            "caption_B": torch.arange(BATCH),
        }
        for step in range(STEPS)
    ]


@pytest.mark.parametrize(
    "optimizer",
    [find_recipe("clipa-b16-i50-t16").optimizer, OptimizerConfig(beta2=0.98), OptimizerConfig(grad_clip=0.5)],
    ids=["CLIPA's", "OpenCLIP's", "clipped"],
)
@pytest.mark.parametrize(
    ("image", "vision"),
    [
        ({}, {}),
        (
            {"pooling": "average", "pre_norm": False, "position": "sincos", "act": "gelu_tanh"},
            {
                "pool_type": "avg",
                "final_ln_after_pool": True,
                "no_ln_pre": True,
                "pos_embed_type": "sin_cos_2d",
                "act_kwargs": {"approximate": "tanh"},
            },
        ),
    ],
    ids=["CLIP", "CLIPA"],
)
def test_twenty_steps_equal_openclip(image, vision, optimizer: OptimizerConfig) -> None:
    torch.manual_seed(0)
    config = replace(TINY, image=replace(TINY.image, **image))
    train_twins(config, openclip_twin(config, **vision), optimizer, ClipLoss(), ())


@pytest.mark.parametrize(
    ("config", "twin", "recipe", "loss"),
    [
        (TINY_CLIPA_V2, clipa_v2_twin, "clipa-h14-datacomp", ClipLoss()),
        (TINY_SIGLIP, siglip_twin, "siglip-b16", SigLipLoss()),
    ],
    ids=["CLIPA-v2", "SigLIP"],
)
def test_twenty_steps_of_other_towers_equal_openclip(config, twin, recipe, loss) -> None:
    """Text without a mask, read at its last position; average and attention pooling; the sigmoid loss and its bias."""
    torch.manual_seed(0)
    made = find_recipe(recipe)
    # OpenCLIP has one kind of decay, and keeps all moments as they are computed.
    train_twins(
        config, twin(), replace(made.optimizer, decay="matrices", mu_dtype="float32"), loss, [f"loss={made.loss}"]
    )


def train_twins(
    config: ModelConfig,
    theirs: torch.nn.Module,
    optimizer: OptimizerConfig,
    loss_of: torch.nn.Module,
    settings: Sequence[str],
) -> None:
    """Twenty steps of `theirs` and of our model with its weights; fails where they part."""
    theirs.train()
    ours = load_openclip(config, theirs.state_dict()).train()
    bias = ours.image.trunk.patch_embed.proj.bias
    if bias is not None and not hasattr(theirs.visual, "trunk"):  # timm and big_vision have one; OpenCLIP never does
        bias.requires_grad_(False)
    device = pick("cpu")
    settings = ["precision=float32", "same_caption=negative", *settings]
    recipe: Recipe = replace(set_values(debug(), settings), optimizer=optimizer)
    ours_optimizer = make_optimizer(ours, optimizer, PEAK, device)
    theirs_optimizer = torch.optim.AdamW(
        openclip_groups(theirs, optimizer.weight_decay),
        lr=PEAK,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )
    for step, batch in enumerate(batches(config.text.vocab_size)):
        rate = learning_rate_at(step * BATCH, BATCH, peak=PEAK, warmup=WARMUP * BATCH, total=STEPS * BATCH)
        assert rate == pytest.approx(openclip_rate(step), rel=1e-6)
        device.set_learning_rate(ours_optimizer, rate)
        ours_loss = train_step(ours, ours_optimizer, batch, recipe, device).loss
        for group in theirs_optimizer.param_groups:
            group["lr"] = rate
        image_BCHW = normalise(batch["image_BHWC"], recipe.mean, recipe.std)
        theirs_loss = loss_of(*theirs(image_BCHW, batch["ids_BT"].long()))
        theirs_loss.backward()
        if optimizer.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), optimizer.grad_clip)
        theirs_optimizer.step()
        theirs_optimizer.zero_grad()
        with torch.no_grad():
            theirs.logit_scale.clamp_(0, math.log(100))
        assert ours_loss.item() == pytest.approx(theirs_loss.item(), abs=1e-4)
    expected = convert(theirs.state_dict(), config)
    for name, parameter in ours.named_parameters():
        pairs = [(parameter.detach(), expected[name].reshape(parameter.shape))]
        if name.endswith("kv.bias"):  # a key's bias has no gradient but rounding, which Adam makes a step of
            pairs = list(zip(*(each.chunk(3 if "qkv" in name else 2) for each in pairs[0]), strict=True))
            del pairs[-2]
        for one, other in pairs:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
