"""OpenCLIP's weights under our names, so that its models run here and ours can start from them, and ours under theirs.

Takes the state dict of `open_clip.CLIP` and `open_clip.CustomTextCLIP` with a vision transformer, its own or timm's, or
with another of timm's image models; and OpenAI's own, which has the same names. OpenAI's ResNets and Hugging Face text
towers have no counterpart here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.model.clip import CLIP
from clipkit.model.config import ModelConfig, Position
from clipkit.model.image_tower import sincos_2d
from clipkit.model.timm_tower import TimmTower

# Scalars that only OpenAI stores among the weights; and what aren't weights, with masks that can be computed.
OPENAI = {"input_resolution", "context_length", "vocab_size"}
NOT_WEIGHTS = {*OPENAI, "attn_mask"}
PATCH_BIAS = "image.trunk.patch_embed.proj.bias"

# Our parts and theirs; of both, the first that a name begins with counts.
PARTS = (
    ("image.trunk.patch_embed.proj.", "visual.conv1."),
    ("image.trunk.cls_token", "visual.class_embedding"),
    ("image.trunk.pos_embed", "visual.positional_embedding"),
    ("image.trunk.norm_pre.", "visual.ln_pre."),
    ("image.trunk.norm.", "visual.ln_post."),
    ("image.trunk.blocks.", "visual.transformer.resblocks."),
    ("image_projection.weight", "visual.proj"),
)
TIMM_PARTS = (
    ("image_projection.", "visual.head.proj."),
    ("image_projection.weight", "visual.trunk.head.weight"),
    ("image_projection.bias", "visual.trunk.head.bias"),
    ("image.trunk.", "visual.trunk."),
)
TEXT_PARTS = (
    ("text.blocks.", "transformer.resblocks."),
    ("text.token_embedding.", "token_embedding."),
    ("text.pos_embed", "positional_embedding"),
    ("text.norm.", "ln_final."),
    ("text_projection.", "text_projection."),
    ("text_projection.weight", "text_projection"),
    ("logit_", "logit_"),
)
# Of their blocks and ours.
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
        tensors[PATCH_BIAS] = torch.zeros(width)
    return tensors


def to_theirs(model: CLIP) -> dict[str, Tensor]:
    """A model's tensors under OpenCLIP's names, the inverse of `convert`; without a bias of the patch projection."""
    is_timms = isinstance(model.image, TimmTower)
    parts = (TIMM_PARTS if is_timms else PARTS) + TEXT_PARTS
    found = {}
    for name, tensor in model.state_dict().items():
        if name == PATCH_BIAS and not is_timms:
            continue
        key = replace_part(name if is_timms else name.replace(".fc_norm.", ".norm."), parts)
        assert key is not None
        if "resblocks." in key:
            for theirs, ours in BLOCK_RENAMES:
                key = key.replace(ours, theirs)
        if key in ("visual.proj", "text_projection.weight"):
            key, tensor = key.removesuffix(".weight"), tensor.T
        elif key == "visual.class_embedding":
            tensor = tensor.reshape(-1)
        elif key == "visual.positional_embedding":
            tensor = tensor[0]
        found[key] = tensor.contiguous()
    return found


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
    # With a text tower of its own class its parts are under `text`.
    name = replace_part(key.removeprefix("text."), [(theirs, ours) for ours, theirs in PARTS + TIMM_PARTS + TEXT_PARTS])
    if name is None:
        raise UserError(
            f"{key} has no place in clipkit's model: take an OpenCLIP vision transformer with its own text tower"
        )
    for theirs, ours in BLOCK_RENAMES:
        name = name.replace(theirs, ours)
    return name


def replace_part(name: str, parts: Sequence[tuple[str, str]]) -> str | None:
    """A name with its beginning replaced by that of the same part; None where it has none of these parts."""
    return next((new + name.removeprefix(old) for old, new in parts if name.startswith(old)), None)
