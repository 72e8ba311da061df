"""Towers other than CLIP's own against OpenCLIP's models of the same name, shallow and with the same random weights."""

import dataclasses
import json

import open_clip
import pytest
import torch

from clipkit.errors import UserError
from clipkit.interop.openclip import load_openclip
from clipkit.model.clip import CLIP, build
from clipkit.model.config import ModelConfig, vit_b16, vit_bigg14, vit_h14, vit_h14_clipa, vit_l14_clipa, vit_s16

TOWERS = {
    "ViT-S-16": vit_s16,
    "ViT-L-14-CLIPA": vit_l14_clipa,
    "ViT-H-14-CLIPA": vit_h14_clipa,
    "ViT-H-14": vit_h14,
    "ViT-bigG-14": vit_bigg14,
}
TANH = {"act_kwargs": {"approximate": "tanh"}}


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
    model = open_clip.CLIP(**theirs).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no bias is zero and no norm is the identity
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
    """CLIPA's with the tanh GELU that it was trained with, and sin-cos positions as in its scripts."""
    deep = 1 if "bigG" in name else 2
    config = shallow(TOWERS[name](), deep, image_size=64 if name == "ViT-S-16" else 56)
    tanh = TANH if name.endswith("CLIPA") else {}
    vision = {"pos_embed_type": "sin_cos_2d"} if name.endswith("CLIPA") else {}
    theirs = openclip_model(name, config, {**tanh, **vision}, tanh)
    ours = load_openclip(config, theirs.state_dict()).eval()
    assert_same_features(ours, theirs)
    bias = ours.image.width if name.endswith("CLIPA") else 0  # of the patches: zero here
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + bias


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


def test_published_clipa_weights_keep_the_positions_they_have() -> None:
    """OpenCLIP's CLIPA has them among the weights: JAX's, which aren't quite ours."""
    config = shallow(vit_l14_clipa("gelu"), 1, image_size=56)
    theirs = openclip_model("ViT-L-14-CLIPA", config)
    with pytest.raises(UserError, match=r"aren't fixed sin-cos ones: set model\.image\.position=learnable"):
        load_openclip(config, theirs.state_dict())
    learnable = shallow(config, 1, position="learnable")
    assert_same_features(load_openclip(learnable, theirs.state_dict()).eval(), theirs)


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

    assert bias() is not None and bias(pre_norm=True, patch_bias=True) is not None
    assert bias(patch_bias=False) is None and bias(pre_norm=True) is None


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


@pytest.mark.parametrize("config", [vit_h14_clipa(), vit_bigg14(), small_clipa(patch_bias=False)])
def test_a_configuration_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
