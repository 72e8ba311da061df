"""What a model is made of, as plain data: it goes into every checkpoint and is all that is needed to build it again.

Nothing here imports torch, so that recipes can be listed and changed at once. `clip.build` makes the model.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from clipkit.config import from_json
from clipkit.errors import UserError

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
Pooling = Literal["token", "average", "attention"]
TextPooling = Literal["end", "last"]
Position = Literal["learnable", "sincos", "sincos_jax"]
Stem = Literal["patch", "conv"]
Projection = Literal["linear", "bias", "none"]
HeadKind = Literal["none", "linear", "mlp", "glu"]
TokenizerName = Literal["clip-bpe", "wordpiece", "sentencepiece"]


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The image tower: a timm vision transformer by name, and what differs from it (None keeps timm's own number).

    Any other model of timm's (ConvNeXt, ResNet, …) is taken as it is: it has its own size, pooling and activation, and
    only `image_size`, `projection`, `frozen` (wholly or not) and the head may be set.
    """

    name: str = "vit_base_patch16_224"
    image_size: int = 224
    """Side of the square input in pixels, a multiple of the patch size."""
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    pooling: Pooling = "token"
    """`token`: the class token, normed. `average`: the mean of the patches without the class token, then the norm
    (as in CLIPA and big_vision's `gap`). `attention`: a learned query attends to the normed patches (as in SigLIP and
    big_vision's `map`)."""
    class_token: bool = True
    position: Position = "learnable"
    """`sincos` and `sincos_jax` are fixed: computed from the grid and never trained. They differ a little in their
    frequencies; the second is CLIPA-v2's (`image_tower.sincos_2d`)."""
    pre_norm: bool = True
    """A layer norm before the first block, as in CLIP."""
    patch_bias: bool | None = None
    """A bias in the patch embedding. None: only where no norm follows it (`pre_norm=False`)."""
    layer_scale: float | None = None
    """What the learned factors of each block's two outputs begin with (Touvron et al., 2021)."""
    act: Activation = "gelu"
    """OpenAI's own weights need `quick_gelu`."""
    norm_eps: float = 1e-5
    stem: Stem = "patch"
    """`conv`: strided 3 x 3 convolutions in place of the one big patch projection (Xiao et al., 2021)."""
    projection: Projection = "linear"
    """Into the shared space: a matrix, with a `bias` or without; `none` where the width is `embed_dim` already."""
    frozen: int | bool = False
    """What `CLIP.freeze` keeps from being trained. True: the tower and its projection (as in LiT). A number: the
    embeddings and that many blocks, the first ones."""
    head: HeadKind = "none"
    """What follows the unit vector of the tower and its projection, and is trained although they are frozen
    (`model.heads`): a matrix, two with a GELU, or a gated linear unit as in SAIL."""
    head_input: int | None = None
    """The numbers of that unit vector, which the head reads. None: `embed_dim`."""
    head_ratio: float = 4.0
    """The hidden width of `mlp` and `glu` by that number."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower: a pre-norm transformer, causal and read at the end token as in CLIP, or neither."""

    context_length: int = 77
    """The most text tokens, start and end included, that the position embedding has room for."""
    vocab_size: int = 49408
    """At least the ids of the tokenizer's vocabulary. CLIPA-v2's models have more than the 30,522 of BERT's."""
    tokenizer: TokenizerName = "clip-bpe"
    """`clip-bpe` is CLIP's; `wordpiece` BERT's, as in CLIPA-v2; `sentencepiece` SigLIP's (`clipkit.text`)."""
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    causal: bool = True
    """A token sees only itself and those before it."""
    pooling: TextPooling = "end"
    """`end`: the end token, which has the largest id. `last`: the last of `context_length` positions, padding included
    (as in CLIPA-v2 and SigLIP)."""
    act: Activation = "gelu"
    norm_eps: float = 1e-5
    projection: Projection = "linear"
    frozen: int | bool = False
    """As for the image tower."""
    head: HeadKind = "none"
    head_input: int | None = None
    head_ratio: float = 4.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Two towers and the embedding space that they share."""

    embed_dim: int = 512
    image: ImageConfig = ImageConfig()
    text: TextConfig = TextConfig()
    logit_scale_init: float = 1 / 0.07
    """The factor itself, not its logarithm. SigLIP starts at 10."""
    logit_bias_init: float | None = None
    """None: no bias, as InfoNCE has no use for it. SigLIP starts at -10."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `dataclasses.asdict`. Fields left out take their defaults; UserError on unknown ones."""
        config = from_json(cls, values, "model")
        check_choices(config, "model")
        return config


def tower_dim(config: ImageConfig | TextConfig, embed_dim: int) -> int:
    """The numbers of a tower's own vector: the shared space's, unless a head leads there from elsewhere."""
    return embed_dim if config.head == "none" or config.head_input is None else config.head_input


def check_choices(config: Any, where: str) -> None:
    """UserError for a field whose value isn't among those its type lists, in `config` or in what it holds."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check_choices(value, f"{where}.{name}")
        elif typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            raise UserError(f"{where}.{name} {value!r}: choose from {', '.join(typing.get_args(hint))}")


def vit_s16(act: Activation = "gelu") -> ModelConfig:
    """OpenCLIP's ViT-S/16 at 224 px."""
    return _clip("vit_small_patch16_224", 384, TextConfig(width=384, heads=6, act=act))


def vit_b32(act: Activation = "gelu") -> ModelConfig:
    """CLIP's ViT-B/32 at 224 px."""
    return _clip("vit_base_patch32_224", 512, TextConfig(act=act))


def vit_b16(act: Activation = "gelu") -> ModelConfig:
    """CLIP's ViT-B/16 at 224 px."""
    return _clip("vit_base_patch16_224", 512, TextConfig(act=act))


def vit_l16(act: Activation = "gelu") -> ModelConfig:
    """ViT-L/16 at 224 px with the text tower of CLIP's ViT-L/14, as in CLIPA."""
    return _clip("vit_large_patch16_224", 768, TextConfig(width=768, heads=12, act=act))


def vit_l14(act: Activation = "gelu") -> ModelConfig:
    """CLIP's ViT-L/14 at 224 px."""
    return _clip("vit_large_patch14_224", 768, TextConfig(width=768, heads=12, act=act))


def vit_h14(act: Activation = "gelu") -> ModelConfig:
    """OpenCLIP's ViT-H/14 at 224 px. The image tower's heads are 80 wide."""
    return _clip("vit_huge_patch14_224", 1024, TextConfig(width=1024, depth=24, heads=16, act=act))


def vit_bigg14(act: Activation = "gelu") -> ModelConfig:
    """OpenCLIP's ViT-bigG/14 at 224 px. The image tower's heads are 104 wide."""
    return _clip("vit_gigantic_patch14_clip_224", 1280, TextConfig(width=1280, depth=32, heads=20, act=act))


def vit_l14_clipa(act: Activation = "gelu_tanh") -> ModelConfig:
    """CLIPA-v2's ViT-L/14 at 224 px and 32 text tokens."""
    return _clipa_v2(vit_l14(act))


def vit_h14_clipa(act: Activation = "gelu_tanh") -> ModelConfig:
    """CLIPA-v2's ViT-H/14 at 224 px and 32 text tokens."""
    return _clipa_v2(vit_h14(act))


def vit_bigg14_clipa(act: Activation = "gelu_tanh") -> ModelConfig:
    """CLIPA-v2's ViT-bigG/14 at 224 px and 32 text tokens."""
    return _clipa_v2(vit_bigg14(act))


def vit_b16_siglip(act: Activation = "gelu_tanh") -> ModelConfig:
    """SigLIP's ViT-B/16 at 224 px and 64 text tokens (Zhai et al., 2023). Its weights were trained with the tanh GELU;
    OpenCLIP runs them with the exact one."""
    image = ImageConfig(
        pooling="attention", class_token=False, pre_norm=False, act=act, norm_eps=1e-6, projection="none"
    )
    text = TextConfig(
        context_length=64, vocab_size=32_000, tokenizer="sentencepiece", width=768, heads=12, causal=False,
        pooling="last", act=act, norm_eps=1e-6, projection="bias",
    )  # fmt: skip
    return ModelConfig(embed_dim=768, image=image, text=text, logit_scale_init=10.0, logit_bias_init=-10.0)


def _clip(name: str, embed_dim: int, text: TextConfig) -> ModelConfig:
    return ModelConfig(embed_dim=embed_dim, image=ImageConfig(name, act=text.act), text=text)


def _clipa_v2(config: ModelConfig) -> ModelConfig:
    """What CLIPA-v2 changes in CLIP's towers (Li, Wang & Xie, 2023), after its JAX code. Its published weights went
    through tanh GELUs and norms with this epsilon; OpenCLIP runs them with the exact GELU and 1e-5."""
    image = dataclasses.replace(
        config.image, pooling="average", pre_norm=False, patch_bias=False, position="sincos_jax", norm_eps=1e-6
    )
    text = dataclasses.replace(
        config.text,
        context_length=32,
        vocab_size=32_000,
        tokenizer="wordpiece",
        causal=False,
        pooling="last",
        norm_eps=1e-6,
    )
    return dataclasses.replace(config, image=image, text=text)


def exact_ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` that gives `hidden` when `width` is multiplied by it and rounded down, as towers do."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
