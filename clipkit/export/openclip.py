"""OpenCLIP's folder: `open_clip_config.json` and `open_clip_model.safetensors`, which `local-dir:` loads.

OpenCLIP's own vision transformer, or one of timm's models by its name; the towers of CLIP and of CLIPA-v2.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import LayerScale

from clipkit.embedding.encoder import Encoder
from clipkit.errors import UserError
from clipkit.export.parity import Peer, check_shapes
from clipkit.interop.openclip import to_theirs
from clipkit.interop.openclip_config import native_config
from clipkit.model.clip import CLIP
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig, exact_ratio
from clipkit.model.timm_tower import TimmTower
from clipkit.storage.files import write_json


def write(encoder: Encoder, model: CLIP, folder: Path) -> None:
    """Write the folder of a model that passes `check`."""
    settings = {"model_cfg": their_config(model), "preprocess_cfg": their_preprocess(encoder)}
    write_json(folder / "open_clip_config.json", settings)
    save_file(to_theirs(model), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    vocabulary = getattr(encoder.tokenizer, "vocabulary", None)
    if vocabulary is not None:
        (folder / "vocab.txt").write_bytes(vocabulary)
        about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        write_json(folder / "tokenizer_config.json", about)


def check(model: CLIP) -> None:
    """Raise UserError for a model that OpenCLIP can't build."""
    settings = their_config(model)
    if isinstance(model.image, TimmTower):
        return
    with torch.device("meta"):
        built = CLIP(native_config(settings)).image.trunk.state_dict()
    own = model.image.trunk.state_dict()
    own.pop("patch_embed.proj.bias", None)  # zeros: `own_vision` has seen to that
    check_shapes(own, built, "OpenCLIP's vision transformer")


def open_peer(folder: Path) -> Peer:
    """The model in a folder as OpenCLIP runs it."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    model.eval()
    return Peer(
        f"open_clip {open_clip.__version__}",
        model.encode_image,
        model.encode_text,
        pixels=lambda images: torch.stack([preprocess(image) for image in images]),
        ids=open_clip.get_tokenizer(f"local-dir:{folder}"),
        exact_pixels=True,
    )


def their_config(model: CLIP) -> dict[str, Any]:
    """The `model_cfg` of a model. Raises UserError for what OpenCLIP doesn't have."""
    config = model.config
    acts = {config.text.act, *([] if isinstance(model.image, TimmTower) else [config.image.act])}
    if "quick_gelu" in acts and len(acts) > 1:
        raise UserError("OpenCLIP has quick_gelu in both towers or in none, this model in one")
    vision = timm_vision(config) if isinstance(model.image, TimmTower) else own_vision(model, config.image)
    return {
        "embed_dim": config.embed_dim,
        **({"quick_gelu": True} if "quick_gelu" in acts else {}),
        **({"init_logit_bias": config.logit_bias_init} if config.logit_bias_init is not None else {}),
        "vision_cfg": vision,
        "text_cfg": text(config.text),
    }


def own_vision(model: CLIP, config: ImageConfig) -> dict[str, Any]:
    """The `vision_cfg` of OpenCLIP's own vision transformer."""
    trunk: Any = model.image.trunk
    wrong = {
        "pooling by attention": config.pooling == "attention",
        "no class token": not config.class_token,
        "a convolutional stem": config.stem == "conv",
        f"the image projection {config.projection!r}": config.projection != "linear",
        "a bias in the patch embedding": trunk.patch_embed.proj.bias is not None
        and bool(trunk.patch_embed.proj.bias.any()),
    }
    if any(wrong.values()):
        has = ", ".join(name for name, is_so in wrong.items() if is_so)
        raise UserError(f"OpenCLIP's vision transformer can't have {has}, as this model's has")
    first, width = trunk.blocks[0], trunk.embed_dim
    return {
        "image_size": config.image_size,
        "patch_size": trunk.patch_embed.patch_size[0],
        "width": width,
        "layers": len(trunk.blocks),
        "head_width": width // first.attn.num_heads,
        "mlp_ratio": exact_ratio(first.mlp.fc1.out_features, width),
        **({"ls_init_value": first.ls1.init_values} if isinstance(first.ls1, LayerScale) else {}),
        **({} if config.pre_norm else {"no_ln_pre": True}),
        **({"pool_type": "avg", "final_ln_after_pool": True} if config.pooling == "average" else {}),
        **kwargs(config),
    }


def timm_vision(config: ModelConfig) -> dict[str, Any]:
    """The `vision_cfg` of one of timm's models."""
    return {
        "image_size": config.image.image_size,
        "timm_model_name": config.image.name,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "none" if config.image.projection == "none" else "linear",
        "timm_proj_bias": config.image.projection == "bias",
    }


def text(config: TextConfig) -> dict[str, Any]:
    """The `text_cfg`. Raises UserError for a tokenizer that goes into no folder of OpenCLIP's."""
    if config.tokenizer == "sentencepiece":
        raise UserError("OpenCLIP's folders hold no SentencePiece model as SigLIP's")
    if config.projection == "bias":
        raise UserError("OpenCLIP's CLIP has no bias in its text projection")
    bert = {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}
    return {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.width,
        "heads": config.heads,
        "layers": config.depth,
        "mlp_ratio": exact_ratio(int(config.width * config.mlp_ratio), config.width),
        **({"proj_type": "none"} if config.projection == "none" else {}),
        **({} if config.causal else {"no_causal_mask": True}),
        **({"pool_type": "last"} if config.pooling == "last" else {}),
        **(bert if config.tokenizer == "wordpiece" else {}),
        **kwargs(config),
    }


def kwargs(config: ImageConfig | TextConfig) -> dict[str, Any]:
    """What both towers have beside OpenCLIP's defaults."""
    return {
        **({"act_kwargs": {"approximate": "tanh"}} if config.act == "gelu_tanh" else {}),
        **({"norm_kwargs": {"eps": config.norm_eps}} if config.norm_eps != 1e-5 else {}),
    }


def their_preprocess(encoder: Encoder) -> dict[str, Any]:
    """The `preprocess_cfg`."""
    how = encoder.preprocess
    return {
        "mean": list(how.mean),
        "std": list(how.std),
        "interpolation": how.interpolation,
        "resize_mode": how.resize_mode,
    }
