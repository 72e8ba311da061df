"""A tiny configuration, inputs for it, and OpenCLIP's own model of the same sizes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import open_clip
import timm
import torch

from clipkit.interop.openclip import convert
from clipkit.model.clip import CLIP, allocate, build, load_state
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig, vit_b16_siglip, vit_h14_clipa
from clipkit.text.tokenizer import EOT, SOT

TINY = ModelConfig(
    embed_dim=16,
    image=ImageConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2),
    text=TextConfig(context_length=12, width=32, depth=2, heads=2),
)
# The towers of CLIPA-v2 and of SigLIP in all but their sizes.
_SIZES = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
_TEXT_SIZES = {"context_length": 12, "width": 32, "depth": 2, "heads": 2}
TINY_CLIPA_V2, TINY_SIGLIP = (
    replace(
        config,
        embed_dim=size,
        image=replace(config.image, name="vit_tiny_patch16_224", **_SIZES),
        text=replace(config.text, **_TEXT_SIZES),
    )
    for config, size in ((vit_h14_clipa(), 16), (vit_b16_siglip(), 32))
)


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def captions(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Captions of 1 to length - 2 random tokens, the last of them as long as can be."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((count, length), np.int32)
    for row, words in zip(ids, [*rng.integers(1, length - 1, count - 1), length - 2], strict=True):
        row[: words + 2] = [SOT, *rng.integers(1, 49000, words), EOT]
    return torch.from_numpy(ids)


def load_openclip(config: ModelConfig, state_dict: Mapping[str, torch.Tensor]) -> CLIP:
    """A model of `config` with OpenCLIP's weights; the activation isn't among them."""
    model = allocate(config)
    load_state(model, convert(state_dict, config))
    return model


@torch.no_grad()
def assert_same_features(ours: CLIP, theirs: torch.nn.Module) -> None:
    """The same vectors, before they are normalised, from OpenCLIP's model and from ours with its weights."""
    image, ids = images(2, ours.image.image_size), captions(3, ours.config.text.context_length)
    for one, other in (
        (ours.encode_image(image, normalize=False), theirs.encode_image(image)),
        (ours.encode_text(ids, normalize=False), theirs.encode_text(ids.long())),
    ):
        assert other.std() > 0.01
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def openclip_twin(config: ModelConfig, text: Mapping[str, object] | None = None, **vision: object) -> open_clip.CLIP:
    """OpenCLIP's own model with the sizes of a tiny configuration, randomly initialised."""
    return open_clip.CLIP(
        config.embed_dim,
        vision_cfg={
            "image_size": config.image.image_size,
            "patch_size": config.image.patch_size,
            "width": config.image.width,
            "layers": config.image.depth,
            "head_width": config.image.width // config.image.heads,
            **vision,
        },
        text_cfg={
            "context_length": config.text.context_length,
            "width": config.text.width,
            "layers": config.text.depth,
            "heads": config.text.heads,
            **(text or {}),
        },
    ).eval()


def clipa_v2_twin() -> open_clip.CLIP:
    """OpenCLIP's model of TINY_CLIPA_V2, with the GELU, the norms and the positions of CLIPA-v2's JAX code."""
    jax = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
    text = {"vocab_size": 32_000, "pool_type": "last", "no_causal_mask": True, **jax}
    average = {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "pos_embed_type": "sin_cos_2d"}
    theirs = openclip_twin(TINY_CLIPA_V2, text, **average, **jax)
    with torch.no_grad():
        theirs.visual.positional_embedding.copy_(build(TINY_CLIPA_V2).image.fixed_positions()[0])
    return theirs


def siglip_twin() -> open_clip.CustomTextCLIP:
    """OpenCLIP's model of TINY_SIGLIP, around timm's own tower, made small."""
    text = dict(open_clip.get_model_config("ViT-B-16-SigLIP")["text_cfg"], act_kwargs={"approximate": "tanh"})
    text |= {"layers" if name == "depth" else name: size for name, size in _TEXT_SIZES.items()}
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "none"}
    theirs = open_clip.CustomTextCLIP(32, vision, text, init_logit_scale=math.log(10), init_logit_bias=-10)
    theirs.visual.trunk = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0,
        global_pool="map", class_token=False, act_layer="gelu_tanh", norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    return theirs.eval()
