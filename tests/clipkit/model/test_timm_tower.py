"""Image towers that aren't vision transformers, against timm's models and OpenCLIP's ConvNeXt."""

import dataclasses

import open_clip
import pytest
import timm
import torch
from openclip_twin import assert_same_features, captions, images, load_openclip
from torch.utils.flop_counter import FlopCounterMode

from clipkit.config import set_values
from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.model.clip import allocate, build, load_state
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.model.flops import sample_cost
from clipkit.train.catalogue import debug
from clipkit.train.loop import train
from clipkit.train.optimizer import copy_for_average, keep_average

TINY = ModelConfig(
    embed_dim=16,
    image=ImageConfig("test_convnext", image_size=64),
    text=TextConfig(context_length=12, width=32, depth=1, heads=2),
)


def with_image(**changes: object) -> ModelConfig:
    return dataclasses.replace(TINY, image=dataclasses.replace(TINY.image, **changes))


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_convnext", 64), ("test_resnet", 64), ("swin_tiny_patch4_window7_224", 64)],
)
@torch.no_grad()
def test_a_tower_is_timms_and_a_function_of_the_seed(name: str, size: int) -> None:
    """Its buffers too, of which swin's are in no state dict."""
    state = torch.get_rng_state()
    config = with_image(name=name, image_size=size)
    model = build(config, seed=3).eval()
    copy = allocate(config).eval()
    load_state(copy, model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    fixed = {"img_size": size} if name.startswith("swin") else {}
    theirs = timm.create_model(name, num_classes=0, **fixed).eval()
    image = images(2, size)
    expected = theirs(image)
    assert expected.std() > 1e-3
    for ours in (model, copy):
        torch.testing.assert_close(ours.image(image), expected, atol=1e-5, rtol=0)
        assert ours.encode_image(image).shape == (2, 16)
    assert not torch.equal(build(config, seed=4).image(image), expected)
    model.train()
    if name != "test_resnet":  # nothing is dropped at random, which a resumed run couldn't repeat
        assert torch.equal(model.image(image), model.image(image))


@torch.no_grad()
def test_openclips_convnext_has_the_same_features() -> None:
    """OpenCLIP's model of that kind, with the smallest of timm's ConvNeXts."""
    theirs = open_clip.CLIP(
        16,
        vision_cfg={"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
        text_cfg={"context_length": 12, "width": 32, "layers": 1, "heads": 2},
    ).eval()
    ours = load_openclip(TINY, theirs.state_dict()).eval()
    assert_same_features(ours, theirs)


@pytest.mark.parametrize(("name", "macs"), [("resnet50", 4.09e9), ("convnext_tiny", 4.46e9)])
def test_flops_are_counted(name: str, macs: float) -> None:
    """As timm's tables have them, which count multiply-adds of the forward pass."""
    config = with_image(name=name, image_size=224)
    cost, small = sample_cost(config), sample_cost(TINY)
    assert (cost.image_tokens, cost.text_tokens) == (0, 12)
    assert cost.flops == pytest.approx(6 * macs, rel=0.02)
    model = build(TINY).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(1, 64), captions(1, 12))
    assert small.flops == pytest.approx(3 * counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 64, "depth": 2}, "has its own width, depth: --set model.image.width=none --set model.image.depth"),
        ({"class_token": False}, "has its own class_token: --set model.image.class_token=true"),
        ({"position": "sincos", "stem": "conv"}, "--set model.image.position=learnable --set model.image.stem=patch"),
        ({"frozen": 2}, "model.image.frozen=2 isn't for test_convnext: take true or false"),
        ({"image_size": 8}, "can't take images of 8 px .*: set another image_size"),
        ({"name": "swin_tiny_patch4_window7_224", "act": "quick_gelu"}, "has its own act: --set model.image.act=gelu"),
    ],
)
def test_what_only_vision_transformers_have_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(with_image(**changes))


CONVNEXT = [
    *("model.image.name=test_convnext", "model.image.patch_size=none", "model.image.width=none"),
    *("model.image.depth=none", "model.image.heads=none", "model.image.pooling=token", "model.image.class_token=true"),
    *("model.image.position=learnable", "stages.0.image_keep=none", "stages.0.image_reduction=none"),
    *("stages.0.samples=32", "stages.1.samples=32", "stages.0.warmup_samples=16", "stages.1.warmup_samples=0"),
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stages.0.image_keep=8", "stages.0.image_reduction=random"], "stage reduced: image_keep isn't for test_conv"),
        (["checkpoint_activations=true"], "checkpoint_activations isn't for test_convnext: set it to false"),
        (["stages.1.position=sincos"], "has its own position"),
        (
            ["model.image.name=swin_tiny_patch4_window7_224", "stages.0.image_size=32", "stages.1.image_size=224"],
            "stage full: swin_tiny_patch4_window7_224 has other weights at other sizes: give all stages one image_size",
        ),
    ],
)
def test_recipes_that_do_not_fit_are_refused(pairs_dataset, tmp_path, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        train(set_values(debug(), [*CONVNEXT, *settings]), pairs_dataset, tmp_path, device_name="cpu", workers=0)


def test_an_average_of_weights_follows_batch_norms() -> None:
    model = build(with_image(name="test_resnet")).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = copy_for_average(model)
    keep_average(average, model, optimizer, 0.9)
    model.encode_image(images(4, 64)).sum().backward()
    optimizer.step()
    name = "image.trunk.conv1.1.running_mean"
    assert torch.equal(average.state_dict()[name], model.state_dict()[name])
    assert average.state_dict()[name].abs().max() > 0


def test_a_frozen_tower_keeps_its_batch_norms() -> None:
    model = build(with_image(name="test_resnet", frozen=True))
    model.freeze()
    before = {name: tensor.clone() for name, tensor in model.image.state_dict().items()}
    model.train().encode_image(images(4, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.image.state_dict().items())
    model.recompute_activations(None)
    with pytest.raises(UserError, match="checkpoint_activations"):
        model.recompute_activations(pick("cpu").recompute())
