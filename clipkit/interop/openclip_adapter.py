"""Models that run in OpenCLIP's own code: ResNets, CoCa, EVA, ConvNeXt and others that ours doesn't cover."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.errors import UserError, one_line
from clipkit.interop.openclip import NOT_WEIGHTS
from clipkit.model.clip import float32_maths

PACKAGE = 'pip install "clipkit[openclip]"'


class OpenClipTowers(nn.Module):
    """One of open_clip's models with the face of `Towers`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def logit_scale(self) -> Tensor:
        """The natural logarithm of the factor."""
        scale: Tensor = self.model.logit_scale
        return scale.reshape(())

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """float[B, 3, S, S] normalised pixels -> unit float32[B, E]."""
        return unit(self.model.encode_image(image_BCHW, normalize=False))

    def encode_text(self, ids_BT: Tensor) -> Tensor:
        """int[B, T] -> unit float32[B, E]."""
        return unit(self.model.encode_text(ids_BT.long(), normalize=False))


def unit(x_BE: Tensor) -> Tensor:
    """Rows of length one, in float32 whatever autocast says."""
    with float32_maths(x_BE.device):
        return F.normalize(x_BE.float(), dim=-1)


def adapted(name: str, model_cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], reason: str) -> OpenClipTowers:
    """The model that `model_cfg` describes with these weights, in evaluation mode.

    `reason` says why it isn't clipkit's own. Raises UserError where open_clip isn't installed or can't build it, and
    for a tensor that is missing, left over or of another shape.
    """
    try:
        import open_clip
        from open_clip.convert import convert_state_dict
        from open_clip.model import convert_to_custom_text_state_dict
    except ImportError as error:
        raise UserError(f"{name} has {reason}, for which the package open_clip_torch is needed: {PACKAGE}") from error
    settings: dict[str, Any] = deepcopy(dict(model_cfg))
    settings["vision_cfg"]["timm_model_pretrained"] = False
    custom = settings.pop("custom_text", False)
    kind = open_clip.CoCa if "multimodal_cfg" in settings else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    try:
        with torch.random.fork_rng(devices=[]):
            model = kind(**settings)
    except Exception as error:  # of a configuration: any
        raise UserError(f"open_clip can't build {name} ({one_line(error)[:200]}): check its configuration") from error
    state = {key: tensor.float() for key, tensor in tensors.items() if key.rpartition(".")[2] not in NOT_WEIGHTS}
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for key in {"logit_scale", "logit_bias"} & set(state):
        state[key] = state[key].reshape(getattr(model, key).shape)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the weights don't fit {name} ({one_line(error)[:200]}): name another architecture") from error
    return OpenClipTowers(model.eval())
