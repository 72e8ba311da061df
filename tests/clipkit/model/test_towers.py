"""Towers other than CLIP's own against OpenCLIP's models of the same name, shallow and with the same random weights."""

import dataclasses
import json
import math

import open_clip
import pytest
import torch
from openclip_twin import load_openclip

from clipkit.errors import UserError
from clipkit.model.clip import CLIP, build
from clipkit.model.config import (
    Activation,
    ImageConfig,
    ModelConfig,
    TextConfig,
    vit_b16,
    vit_b16_siglip,
    vit_bigg14,
    vit_h14,
    vit_h14_clipa,
    vit_l14_clipa,
    vit_s16,
)
from clipkit.model.image_tower import sincos_2d

TOWERS = {
    "ViT-S-16": vit_s16,
    "ViT-L-14-CLIPA": vit_l14_clipa,
    "ViT-H-14-CLIPA": vit_h14_clipa,
    "ViT-H-14": vit_h14,
    "ViT-bigG-14": vit_bigg14,
}
TANH = {"act_kwargs": {"approximate": "tanh"}}
JAX = {**TANH, "norm_kwargs": {"eps": 1e-6}}


def shallow(config: ModelConfig, depth: int = 2, **image: object) -> ModelConfig:
    """All of a configuration's widths; fewer blocks, a smaller image and fewer words save seconds."""
    return dataclasses.replace(
        config,
        image=dataclasses.replace(config.image, depth=depth, **image),
        text=dataclasses.replace(config.text, depth=depth),
    )


def openclip_model(
    name: str, config: ModelConfig, vision: dict | None = None, text: dict | None = None
) -> open_clip.CLIP:
    """OpenCLIP's model of this name as deep and with images as large as `config`, randomly initialised."""
    theirs = json.loads(json.dumps(open_clip.get_model_config(name)))
    for key in ("custom_text", "init_logit_bias"):
        theirs.pop(key, None)
    theirs["vision_cfg"] |= {"layers": config.image.depth, "image_size": config.image.image_size, **(vision or {})}
    theirs["text_cfg"] |= {"layers": config.text.depth, **(text or {})}
    torch.manual_seed(0)
    return shake(open_clip.CLIP(**theirs).eval())


@torch.no_grad()
def shake(model: torch.nn.Module) -> torch.nn.Module:
    """So that no bias is zero and no norm is the identity."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def images(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def words(count: int, config: ModelConfig) -> torch.Tensor:
    """Ids, more and more of them zero towards the end, as padding is."""
    generator = torch.Generator().manual_seed(2)
    ids_BT = torch.randint(1, config.text.vocab_size, (count, config.text.context_length), generator=generator)
    for row, length in zip(ids_BT, range(3, 3 + 5 * count, 5), strict=True):
        row[length:] = 0
    return ids_BT


@torch.no_grad()
def assert_same_features(ours: CLIP, theirs: torch.nn.Module) -> None:
    """Unnormalised, so that lengths are compared too."""
    image, ids = images(2, ours.config.image.image_size), words(3, ours.config)
    for one, other in (
        (ours.encode_image(image, normalize=False), theirs.encode_image(image)),
        (ours.encode_text(ids.int(), normalize=False), theirs.encode_text(ids)),
    ):
        assert other.std() > 0.01
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TOWERS)
def test_towers_equal_openclip(name: str) -> None:
    """CLIPA's with the GELU, the norms and the positions that it was trained with."""
    config = shallow(TOWERS[name](), 1 if "bigG" in name else 2, image_size=64 if name == "ViT-S-16" else 56)
    jax = JAX if name.endswith("CLIPA") else {}
    theirs = openclip_model(name, config, jax, jax)
    if jax:
        with torch.no_grad():
            theirs.visual.positional_embedding.copy_(build(config).image.fixed_positions()[0])
    ours = load_openclip(config, theirs.state_dict()).eval()
    assert_same_features(ours, theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", TOWERS)
def test_towers_have_openclips_depth_and_heads(name: str) -> None:
    theirs = open_clip.get_model_config(name)
    config = TOWERS[name]()
    with torch.device("meta"):
        model = CLIP(config)
    vision, text = theirs["vision_cfg"], theirs["text_cfg"]
    trunk = model.image.trunk
    assert len(trunk.blocks) == vision["layers"]
    assert trunk.blocks[0].attn.head_dim == vision.get("head_width", 64)
    assert trunk.blocks[0].mlp.fc1.out_features == int(vision["width"] * vision.get("mlp_ratio", 4))
    assert trunk.patch_embed.patch_size[0] == vision["patch_size"]
    assert (config.text.depth, config.text.heads) == (text["layers"], text["heads"])
    assert config.text.context_length == text["context_length"]
    assert config.embed_dim == theirs["embed_dim"]


def small_clipa(**image: object) -> ModelConfig:
    """CLIPA-v2's towers, two blocks of 64 channels each."""
    config = shallow(vit_l14_clipa(), image_size=56, width=64, heads=2, **image)
    text = dataclasses.replace(config.text, context_length=8, vocab_size=99, width=64, heads=2)
    return dataclasses.replace(config, embed_dim=16, text=text)


def test_clipa_runs_as_in_openclip_where_asked() -> None:
    """With the exact GELU and OpenCLIP's epsilon, and with whatever positions are among the weights."""
    config = shallow(vit_l14_clipa("gelu"), 1, image_size=56, norm_eps=1e-5)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, norm_eps=1e-5))
    theirs = openclip_model("ViT-L-14-CLIPA", config)
    with pytest.raises(UserError, match=r"learnable image positions.*set model\.image\.position=learnable"):
        load_openclip(config, theirs.state_dict())
    learnable = shallow(config, 1, position="learnable")
    assert_same_features(load_openclip(learnable, theirs.state_dict()).eval(), theirs)


def test_the_two_kinds_of_fixed_positions_are_told_apart() -> None:
    """In half precision too, and on another grid than the model's."""
    for position, other in (("sincos", "sincos_jax"), ("sincos_jax", "sincos")):
        config = shallow(vit_l14_clipa(), 1, image_size=56, position=position)
        theirs = openclip_model("ViT-L-14-CLIPA", config, JAX, JAX)
        with torch.no_grad():
            theirs.visual.positional_embedding.copy_(build(config).image.fixed_positions()[0].bfloat16())
        load_openclip(shallow(config, 1, image_size=84), theirs.state_dict())
        with pytest.raises(UserError, match=f"{position} image positions, not {other}"):
            load_openclip(shallow(config, 1, position=other), theirs.state_dict())


def test_jax_positions_are_big_visions() -> None:
    """Its frequencies run from 1 to 1/10000, both included."""
    position_ND = sincos_2d((2, 3), 16, jax=True)
    omega = [10_000 ** (-i / 3) for i in range(4)]
    column, row = 2, 1  # of the last patch
    expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in omega]
    torch.testing.assert_close(position_ND[-1], torch.tensor(expected))


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_siglip_equals_openclip(act: Activation) -> None:
    """With the exact GELU as OpenCLIP has it, and with the tanh one of its training."""
    config = shallow(vit_b16_siglip(act))
    theirs = open_clip.CustomTextCLIP(**siglip_arguments(config, TANH if act == "gelu_tanh" else {})).eval()
    trunk = theirs.visual.trunk
    trunk.blocks = trunk.blocks[:2]
    shake(theirs)
    if act == "gelu_tanh":
        for module in trunk.modules():
            if isinstance(module, torch.nn.GELU):
                module.approximate = "tanh"
    ours = load_openclip(config, theirs.state_dict()).eval()
    assert_same_features(ours, theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert ours.logit_bias is not None and ours.logit_bias.item() == theirs.logit_bias.item()


def siglip_arguments(config: ModelConfig, text: dict) -> dict:
    """What OpenCLIP makes its ViT-B-16-SigLIP of."""
    theirs = json.loads(json.dumps(open_clip.get_model_config("ViT-B-16-SigLIP")))
    theirs.pop("custom_text")
    theirs["text_cfg"] |= {"layers": config.text.depth, **text}
    return theirs


def test_the_other_starting_values_of_siglip() -> None:
    model = build(shallow(vit_b16_siglip(), 1))
    assert model.clamped_logit_scale().item() == pytest.approx(10)
    assert model.logit_bias is not None and model.logit_bias.item() == -10
    pool = model.image.trunk.attn_pool
    for weight, fan_in in ((pool.latent, 768), (pool.kv.weight, 768), (pool.mlp.fc2.weight, 3072)):
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1)


def test_attention_pooling_sees_the_kept_patches_only() -> None:
    model = build(small_clipa(pooling="attention", class_token=False)).eval()
    image, changed = images(1, 56), images(1, 56)
    changed[:, :, :, 28:] += 1  # the last two columns of patches
    keep = torch.tensor([[0, 1, 4]])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(changed, keep), model.encode_image(image, keep))
        assert (model.encode_image(changed) - model.encode_image(image)).abs().max() > 1e-3
        everything = model.encode_image(image, torch.arange(16)[None])
        torch.testing.assert_close(everything, model.encode_image(image))


def test_a_timm_tower_of_openclip_with_a_class_token_and_a_projection() -> None:
    theirs = open_clip.CustomTextCLIP(
        16,
        {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"},
        {"context_length": 8, "vocab_size": 99, "width": 64, "layers": 1, "heads": 2},
    ).eval()
    image = ImageConfig("vit_tiny_patch16_224", pre_norm=False, norm_eps=1e-6)
    text = TextConfig(context_length=8, vocab_size=99, width=64, depth=1, heads=2)
    assert_same_features(load_openclip(ModelConfig(16, image, text), theirs.state_dict()).eval(), theirs)


def test_no_projection_needs_the_width_of_the_shared_space() -> None:
    with pytest.raises(UserError, match=r"projection=none needs a width of model\.embed_dim, 16, not 64"):
        build(small_clipa(projection="none"))


def test_text_without_a_mask_sees_its_padding() -> None:
    model = build(small_clipa()).eval()
    ids_BT = words(1, model.config)
    changed = ids_BT.clone()
    changed[0, -1] = 1
    with torch.no_grad():
        assert (model.encode_text(changed) - model.encode_text(ids_BT)).abs().max() > 1e-3
    with pytest.raises(UserError, match="6 text tokens, but the model takes 8"):
        model.encode_text(ids_BT[:, :6])


def test_a_bias_of_the_patches_is_kept_or_left_out() -> None:
    def bias(**image: object) -> torch.Tensor | None:
        return build(small_clipa(**image)).image.trunk.patch_embed.proj.bias

    assert bias(patch_bias=True) is not None and bias(patch_bias=None) is not None
    assert bias() is None and bias(pre_norm=True, patch_bias=None) is None


def test_a_configuration_of_an_older_clipkit_still_loads() -> None:
    """Its config.json has none of the fields that came later."""
    old = {
        "embed_dim": 512,
        "image": {
            "name": "vit_base_patch16_224", "image_size": 224, "patch_size": None, "width": None, "depth": None,
            "heads": None, "mlp_ratio": None, "pooling": "token", "class_token": True, "position": "learnable",
            "pre_norm": True, "act": "gelu", "norm_eps": 1e-05, "stem": "patch",
        },
        "text": {
            "context_length": 77, "vocab_size": 49408, "width": 512, "depth": 12, "heads": 8, "mlp_ratio": 4.0,
            "act": "gelu", "norm_eps": 1e-05,
        },
        "logit_scale_init": 14.285714285714285,
        "logit_bias_init": None,
    }  # fmt: skip
    assert ModelConfig.from_dict(old) == vit_b16()


@pytest.mark.parametrize("config", [vit_h14_clipa(), vit_bigg14(), small_clipa(patch_bias=True), vit_b16_siglip()])
def test_a_configuration_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
