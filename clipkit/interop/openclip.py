"""OpenCLIP's weights under our names, so that its models run here and ours can start from them.

Takes the state dict of `open_clip.CLIP` and `open_clip.CustomTextCLIP` with a vision transformer, its own or timm's, or
with another of timm's image models; and OpenAI's own, which has the same names. OpenAI's ResNets and Hugging Face text
towers have no counterpart here.
"""

import math
import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.model.clip import CLIP, allocate, load_state
from clipkit.model.config import ModelConfig, Position
from clipkit.model.image_tower import sincos_2d

# Scalars that only OpenAI stores among the weights; and what aren't weights, with masks that can be computed.
OPENAI = {"input_resolution", "context_length", "vocab_size"}
NOT_WEIGHTS = {*OPENAI, "attn_mask"}

RENAMES = (
    (r"^visual\.conv1\.", "image.trunk.patch_embed.proj."),
    (r"^visual\.class_embedding$", "image.trunk.cls_token"),
    (r"^visual\.positional_embedding$", "image.trunk.pos_embed"),
    (r"^visual\.ln_pre\.", "image.trunk.norm_pre."),
    (r"^visual\.ln_post\.", "image.trunk.norm."),
    (r"^visual\.proj$", "image_projection.weight"),
    (r"^visual\.trunk\.head\.(?=weight$|bias$)", "image_projection."),
    (r"^visual\.trunk\.", "image.trunk."),
    (r"^visual\.head\.proj\.", "image_projection."),
    (r"^visual\.transformer\.resblocks\.", "image.trunk.blocks."),
    (r"^(text\.)?transformer\.resblocks\.", "text.blocks."),
    (r"^(text\.)?token_embedding\.", "text.token_embedding."),
    (r"^(text\.)?positional_embedding$", "text.pos_embed"),
    (r"^(text\.)?ln_final\.", "text.norm."),
    (r"^(text\.)?text_projection$", "text_projection.weight"),
    (r"^(text\.)?text_projection\.", "text_projection."),
)
BLOCK_RENAMES = (
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".ls_1.", ".ls1."),
    (".ls_2.", ".ls2."),
)


def convert(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """OpenCLIP's tensors as `load_state` takes them, float32. Raises UserError for a key that has no counterpart."""
    tensors = {}
    for key, tensor in state_dict.items():
        if key.rpartition(".")[2] in NOT_WEIGHTS:
            continue
        name = rename(key)
        value = tensor.detach().float()
        if key in ("visual.proj", "text_projection", "text.text_projection"):
            value = value.T  # OpenCLIP multiplies by the matrix, a linear layer by its transpose
        elif name in ("image.trunk.cls_token", "image.trunk.pos_embed"):
            value = value.reshape(1, -1, value.shape[-1])
        elif key.startswith("visual.ln_post.") and config.image.pooling == "average":
            name = name.replace(".norm.", ".fc_norm.")
        elif name in ("logit_scale", "logit_bias"):
            value = value.reshape(())
        tensors[name] = value
    check_sincos(tensors, config.image.position)
    bias = config.image.patch_bias
    if "visual.conv1.weight" in state_dict and (bias if bias is not None else not config.image.pre_norm):
        # OpenCLIP's own patch projection never has one.
        width = len(tensors["image.trunk.patch_embed.proj.weight"])
        tensors["image.trunk.patch_embed.proj.bias"] = torch.zeros(width)
    return tensors


def check_sincos(tensors: Mapping[str, Tensor], position: Position) -> None:
    """UserError when `position` is fixed and the tensors' image positions, those of a square grid at their end, aren't
    what it names: `load_state` would put ours in their place, and the features would be quietly wrong.
    """
    if position == "learnable":
        return
    position_1ND = tensors.get("image.trunk.pos_embed")
    if position_1ND is None or position_1ND.ndim != 3:
        raise UserError(f"these weights have no {position} image positions: set model.image.position=learnable")
    side = math.isqrt(position_1ND.shape[1])
    patches_ND = position_1ND[0, -side * side :]
    found: Position = "learnable"
    errors = {
        "sincos": (patches_ND - sincos_2d((side, side), patches_ND.shape[1])).abs(),
        "sincos_jax": (patches_ND - sincos_2d((side, side), patches_ND.shape[1], jax=True)).abs(),
    }
    nearest = min(errors, key=lambda kind: errors[kind].mean().item())
    if errors[nearest].max() < 5e-3:  # half precision rounds by up to 0.004
        found = cast(Position, nearest)
    if found != position:
        raise UserError(f"these weights have {found} image positions, not {position}: set model.image.position={found}")


def rename(key: str) -> str:
    """Our name for one of OpenCLIP's keys. Raises UserError when there is none."""
    if key in ("logit_scale", "logit_bias"):
        return key
    for pattern, replacement in RENAMES:
        name, found = re.subn(pattern, replacement, key)
        if found:
            for theirs, ours in BLOCK_RENAMES:
                name = name.replace(theirs, ours)
            return name
    raise UserError(
        f"{key} has no place in clipkit's model: take an OpenCLIP vision transformer with its own text tower"
    )


def load_openclip(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> CLIP:
    """A model of `config` with OpenCLIP's weights; positions are fitted as in `load_state`.

    The activation isn't in the weights: OpenAI's, and OpenCLIP's models named `-quickgelu`, need `act="quick_gelu"`,
    or the features are quietly wrong.
    """
    model = allocate(config)
    load_state(model, convert(state_dict, config))
    return model
