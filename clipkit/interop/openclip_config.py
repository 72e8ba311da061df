"""An OpenCLIP configuration as clipkit's: both towers, how an image becomes pixels, and the tokenizer.

OpenCLIP describes a model in JSON (`model_cfg`, `preprocess_cfg`). Its own vision transformers, and timm's plain ones
that CLIP and SigLIP have, become a `ModelConfig`; what else it can describe has no counterpart here, and
`NotNativeError` says which part of it.
"""

from collections.abc import Mapping
from typing import Any, cast

import timm
import torch
from timm.layers import GELUTanh
from timm.models import is_model_in_modules
from torch import nn

from clipkit.errors import UserError
from clipkit.model.config import Activation, ImageConfig, ModelConfig, Pooling, Projection, TextConfig, TokenizerName
from clipkit.model.image_tower import is_plain
from clipkit.pixels.images import CLIP_MEAN, CLIP_STD, Interpolation, Preprocess, ResizeMode

# Settings that say how a model is trained, initialised or exported: the same weights give the same features.
WITHOUT_EFFECT = {"patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "output_tokens", "eos_id"}
NATIVE_TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_bias", "init_logit_scale"}
NATIVE_VISION = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "no_ln_pre"),
    *("pos_embed_type", "final_ln_after_pool", "pool_type", "act_kwargs", "norm_kwargs"),
}
NATIVE_TIMM = {"image_size", "timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias"}
NATIVE_TEXT = {
    *("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads", "layers"),
    *("mlp_ratio", "no_causal_mask", "pad_id", "pool_type", "proj_bias", "proj_type", "act_kwargs", "norm_kwargs"),
}


class NotNativeError(Exception):
    """A model that clipkit's own doesn't cover; the message says what it has that ours hasn't."""


def native_config(model_cfg: Mapping[str, Any]) -> ModelConfig:
    """The same model as clipkit's own, with OpenCLIP's features. Raises NotNativeError where there is none.

    Positions are `learnable` even where they were computed: they come with the weights.
    """
    if "multimodal_cfg" in model_cfg:
        raise NotNativeError("CoCa")
    require_only(model_cfg, NATIVE_TOP)
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    quick_gelu = bool(model_cfg.get("quick_gelu"))
    image = timm_image(vision) if vision.get("timm_model_name") else own_image(vision, quick_gelu)
    return ModelConfig(
        embed_dim=model_cfg["embed_dim"],
        image=image,
        text=text_config(text, quick_gelu),
        logit_bias_init=model_cfg.get("init_logit_bias"),
    )


def require_only(settings: Mapping[str, Any], known: set[str]) -> None:
    """NotNativeError for a setting that isn't known to be covered, unless it is switched off."""
    for name, value in settings.items():
        if name not in known | WITHOUT_EFFECT and value not in (None, False, ""):
            raise NotNativeError(f"{name}={value}")


def own_image(vision: Mapping[str, Any], quick_gelu: bool) -> ImageConfig:
    """The image tower that is OpenCLIP's own vision transformer."""
    layers, width, image_size = vision.get("layers", 12), vision.get("width", 768), square(vision)
    if not isinstance(layers, int):
        raise NotNativeError("a ResNet of OpenAI's")
    require_only(vision, NATIVE_VISION)
    pooling = vision.get("pool_type", "tok")
    if pooling not in ("tok", "avg") or (pooling == "avg" and not vision.get("final_ln_after_pool")):
        raise NotNativeError(f"pool_type={pooling} after the norm")
    return ImageConfig(
        name="vit_base_patch16_224",
        image_size=image_size,
        patch_size=vision.get("patch_size", 16),
        width=width,
        depth=layers,
        heads=width // vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        pooling="average" if pooling == "avg" else "token",
        pre_norm=not vision.get("no_ln_pre", False),
        patch_bias=False,
        layer_scale=vision.get("ls_init_value"),
        act=activation(vision, quick_gelu),
        norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
    )


def timm_image(vision: Mapping[str, Any]) -> ImageConfig:
    """The image tower that is timm's vision transformer of a name. Its activation is timm's, whatever `quick_gelu`."""
    require_only(vision, NATIVE_TIMM)
    name, pool = vision["timm_model_name"], vision.get("timm_pool", "avg")
    if not is_model_in_modules(name, ["vision_transformer"]):
        raise NotNativeError(f"timm's {name}")
    with torch.device("meta"):  # one block tells what all are like
        trunk = cast(Any, timm.create_model)(name, num_classes=0, depth=1, **({"global_pool": pool} if pool else {}))
    pooling = {"token": "token", "avg": "average", "map": "attention"}.get(trunk.global_pool)
    if not is_plain(trunk) or pooling is None or (pooling == "average" and not isinstance(trunk.norm, nn.Identity)):
        raise NotNativeError(f"timm's {name}")
    block: Any = trunk.blocks[0]
    return ImageConfig(
        name=name,
        image_size=square(vision),
        pooling=cast(Pooling, pooling),
        class_token=trunk.has_class_token,
        pre_norm=not isinstance(trunk.norm_pre, nn.Identity),
        patch_bias=trunk.patch_embed.proj.bias is not None,
        act=timm_activation(block.mlp.act),
        norm_eps=block.norm1.eps,
        projection=timm_projection(vision),
    )


def timm_activation(act: nn.Module) -> Activation:
    """What stands in timm's blocks. Raises NotNativeError for what ours don't have."""
    if isinstance(act, GELUTanh):
        return "gelu_tanh"
    if isinstance(act, nn.GELU) and act.approximate == "none":
        return "gelu"
    raise NotNativeError(f"the activation {type(act).__name__}")


def timm_projection(vision: Mapping[str, Any]) -> Projection:
    """What stands between timm's tower and the shared space: where nothing is named, timm's classifier does."""
    match vision.get("timm_proj", "linear"):
        case "none":
            return "none"
        case "linear":
            return "bias" if vision.get("timm_proj_bias") else "linear"
        case None | "":
            return "bias"
        case other:
            raise NotNativeError(f"timm_proj={other}")


def text_config(text: Mapping[str, Any], quick_gelu: bool) -> TextConfig:
    """The text tower. Raises NotNativeError for one of Hugging Face's and for what only CoCa has."""
    if text.get("hf_model_name"):
        raise NotNativeError(f"the text tower {text['hf_model_name']}")
    require_only(text, NATIVE_TEXT)
    pooling = text.get("pool_type", "argmax")
    if pooling not in ("argmax", "last"):
        raise NotNativeError(f"the text's pool_type={pooling}")
    projection: Projection = "bias" if text.get("proj_bias") else "linear"
    return TextConfig(
        context_length=text.get("context_length", 77),
        vocab_size=text.get("vocab_size", 49408),
        tokenizer=tokenizer_name(text),
        width=text.get("width", 512),
        depth=text.get("layers", 12),
        heads=text.get("heads", 8),
        mlp_ratio=text.get("mlp_ratio", 4.0),
        causal=not text.get("no_causal_mask", False),
        pooling="last" if pooling == "last" else "end",
        act=activation(text, quick_gelu),
        norm_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
        projection="none" if text.get("proj_type") == "none" else projection,
    )


def activation(tower: Mapping[str, Any], quick_gelu: bool) -> Activation:
    """What OpenCLIP puts between the layers of an MLP."""
    extra = dict(tower.get("act_kwargs") or {})
    if extra == {"approximate": "tanh"} and not quick_gelu:
        return "gelu_tanh"
    if extra not in ({}, {"approximate": "none"}):
        raise NotNativeError(f"act_kwargs={extra}")
    return "quick_gelu" if quick_gelu else "gelu"


def tokenizer_name(text: Mapping[str, Any]) -> TokenizerName:
    """Which of clipkit's tokenizers gives OpenCLIP's ids. Raises NotNativeError where none does."""
    name, options = text.get("hf_tokenizer_name") or "", dict(text.get("tokenizer_kwargs") or {})
    if not name and options in ({}, {"clean": "lower"}):
        return "clip-bpe"
    if name == "bert-base-uncased" and options == {"strip_sep_token": True}:
        return "wordpiece"
    if "siglip" in name.lower() and options == {"clean": "canonicalize"}:
        return "sentencepiece"
    raise NotNativeError(f"the tokenizer {name or options}")


def pads_with_zero(text: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer pads as SigLIP 2's, with 0, and not as SigLIP's, with the end."""
    return "siglip2" in (text.get("hf_tokenizer_name") or "").lower()


def square(vision: Mapping[str, Any]) -> int:
    """The side of the model's images. Raises UserError where they aren't square."""
    size = vision.get("image_size", 224)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"the model takes images of {size} px: clipkit evaluates square ones only")
    return int(sides.pop())


def preprocess_of(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]) -> Preprocess:
    """How an image becomes pixels: the model's size, and what else `preprocess_cfg` says or OpenCLIP assumes.

    Raises UserError for what can't be had here: `longest`, other filters, modes and sizes.
    """
    for name, known in (
        ("resize_mode", ("shortest", "squash")),
        ("interpolation", ("bicubic", "bilinear")),
        ("mode", ("RGB",)),
    ):
        if preprocess_cfg.get(name) not in (None, *known):
            raise UserError(
                f"the model's preprocess_cfg has {name}={preprocess_cfg[name]}: clipkit has {' and '.join(known)} only"
            )
    mean, std = (
        tuple(float(value) for value in preprocess_cfg.get(name) or default)
        for name, default in (("mean", CLIP_MEAN), ("std", CLIP_STD))
    )
    if len(mean) != 3 or len(std) != 3:
        raise UserError(f"the model's preprocess_cfg has mean {mean} and std {std}: three numbers each are needed")
    return Preprocess(
        size=square(model_cfg["vision_cfg"]),
        mean=mean,
        std=std,
        interpolation=cast(Interpolation, preprocess_cfg.get("interpolation") or "bicubic"),
        resize_mode=cast(ResizeMode, preprocess_cfg.get("resize_mode") or "shortest"),
    )
