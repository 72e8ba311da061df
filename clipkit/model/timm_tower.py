"""Any other image model of timm's as the image tower: ConvNeXt, ResNet, hybrids. For training at full length.

The model is timm's own from pixels to its pooled vector, so nothing of it can be set, and no patch left out.
"""

from dataclasses import fields
from typing import Any, cast

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from clipkit.errors import UserError
from clipkit.model.config import ImageConfig
from clipkit.model.text_tower import Recompute

APPLY = ("name", "image_size", "projection", "frozen", "head", "head_input", "head_ratio")


class TimmTower(nn.Module):
    """Images to one vector each, by timm's model of that name and its own pooling.

    Batch norms, where it has them, see the images of one device, or of one micro-batch, as in OpenCLIP.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        check_fields(config)
        self.config = config
        self.image_size = config.image_size
        self.trunk = make_model(config)
        self.width = self.find_width()
        self.recompute: Recompute | None = None

    @torch.no_grad()
    def find_width(self) -> int:
        """The length of the vector, from a pass that costs nothing on the meta device. UserError where there is none"""
        parameter = next(self.trunk.parameters())
        image_BCHW = torch.empty(1, 3, self.image_size, self.image_size, device=parameter.device)
        try:
            shape = self.trunk.eval()(image_BCHW).shape
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.config.name} can't take images of {self.image_size} px ({str(error).splitlines()[0]}): "
                "set another image_size"
            ) from error
        if len(shape) != 2:
            raise UserError(f"{self.config.name} doesn't pool into one vector: set another model.image.name")
        self.trunk.train()
        return int(shape[1])

    def reset(self, seed: int) -> None:
        """timm's own initial weights as a function of the seed, and the buffers that no checkpoint holds; on the CPU.

        A model that was begun on the meta device has neither.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = make_model(self.config)

    def forward(self, image_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """float[B, 3, S, S] normalised -> [B, D]. Raises UserError where patches are to be left out."""
        if keep_BK is not None:
            raise UserError(f"image_keep isn't for {self.config.name}, which has no patches to leave out: unset it")
        out: Tensor = self.trunk(image_BCHW)
        return out


def check_fields(config: ImageConfig) -> None:
    """UserError, with the settings that mend it, where something is set that only vision transformers have."""
    default = ImageConfig()
    wrong = [
        each.name
        for each in fields(config)
        if each.name not in APPLY and getattr(config, each.name) != getattr(default, each.name)
    ]
    if wrong:
        values = (str(getattr(default, name)).lower() for name in wrong)
        remedy = " ".join(f"--set model.image.{name}={value}" for name, value in zip(wrong, values, strict=True))
        raise UserError(f"model.image.name={config.name} has its own {', '.join(wrong)}: {remedy}")
    if not isinstance(config.frozen, bool):
        raise UserError(f"model.image.frozen={config.frozen} isn't for {config.name}: take true or false")


def make_model(config: ImageConfig) -> Any:
    """timm's model without its classifier, and without dropout and stochastic depth: a resumed run couldn't repeat what
    they drew. Raises UserError for a size that it can't have.
    """
    known = timm.get_pretrained_cfg(config.name)
    size: dict[str, Any] = {"img_size": config.image_size} if known and known.fixed_input_size else {}
    try:
        model = timm.create_model(config.name, num_classes=0, **size)
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"timm can't build {config.name} for images of {config.image_size} px ({reason}): set another image_size"
        ) from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return cast(Any, model)
