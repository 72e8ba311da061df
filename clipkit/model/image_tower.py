"""The image tower: any plain timm vision transformer, fed with all patches or with a chosen few.

`make_image_tower` takes timm's other models too; those are in `timm_tower`.
"""

import difflib
import math
from functools import partial
from typing import Any, TypeGuard, cast

import timm
import torch
from timm.layers import LayerNorm2d, PatchEmbed
from timm.models import get_deprecated_models, is_model_in_modules
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from clipkit.errors import UserError
from clipkit.model.config import ImageConfig
from clipkit.model.text_tower import Recompute, run_blocks
from clipkit.model.timm_tower import TimmTower
from clipkit.text.tokens import gather_tokens


class ConvStem(nn.Module):
    """Strided convolutions in place of the patch projection (Xiao et al., "Early convolutions help transformers see
    better", 2021), through timm's `embed_layer` hook.

    One layer for each prime factor of the patch size (16: four of stride 2), each a convolution, a norm over the
    channels and a GELU; the channels double up to the width; a 1 x 1 convolution ends it. The paper has batch norm;
    a layer norm keeps a sample's features independent of its batch, hence of the number of devices.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int = 3, embed_dim: int = 768, bias: bool = True, **unused: Any
    ) -> None:
        super().__init__()
        side = img_size // patch_size
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (side, side)
        self.num_patches = side * side
        strides = prime_factors(patch_size)
        layers: list[nn.Module] = []
        channels = in_chans
        for index, stride in enumerate(strides):
            wider = max(8, embed_dim >> (len(strides) - 1 - index))
            # Stride 2 takes a 3 x 3 window with a border; odd strides tile the image exactly.
            layers.append(nn.Conv2d(channels, wider, max(3, stride), stride, padding=int(stride == 2), bias=False))
            layers.append(LayerNorm2d(wider))
            layers.append(nn.GELU())
            channels = wider
        self.layers = nn.Sequential(*layers)
        self.proj = nn.Conv2d(channels, embed_dim, 1, bias=bias)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BND: Tensor = self.proj(self.layers(image_BCHW)).flatten(2).transpose(1, 2)
        return x_BND


def prime_factors(number: int) -> list[int]:
    """12 -> [2, 2, 3]."""
    factors = []
    divisor = 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def sincos_2d(grid: tuple[int, int], width: int, jax: bool = False) -> Tensor:
    """float32[h * w, width]: sine and cosine of the column, then of the row, at width / 4 frequencies each.

    As in MoCo v3 and MAE, hence in OpenCLIP and CLIPA's PyTorch code: frequency i of n is 10000 ** (-i / n). big_vision
    and CLIPA's JAX code divide by n - 1 instead (`jax`), so their numbers differ slightly. `width` is a multiple of 4.
    """
    n = width // 4
    omega_F = 10_000.0 ** (-torch.arange(n, dtype=torch.float64) / (n - 1 if jax else n))
    rows_N = torch.arange(grid[0], dtype=torch.float64).repeat_interleave(grid[1])
    columns_N = torch.arange(grid[1], dtype=torch.float64).repeat(grid[0])
    column_NF = columns_N[:, None] * omega_F
    row_NF = rows_N[:, None] * omega_F
    return torch.cat([column_NF.sin(), column_NF.cos(), row_NF.sin(), row_NF.cos()], dim=1).float()


class ImageTower(nn.Module):
    """Images to one vector each, by a timm vision transformer."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.trunk = cast(Any, make_trunk(config))
        self.pooling = config.pooling
        self.image_size = config.image_size
        self.grid: tuple[int, int] = tuple(self.trunk.patch_embed.grid_size)
        self.width: int = self.trunk.embed_dim
        self.prefix: int = self.trunk.num_prefix_tokens
        self.position_prefix: int = self.trunk.pos_embed.shape[1] - self.grid[0] * self.grid[1]
        """How many positions belong to the tokens before the patches: 1 for a class token, or 0."""
        self.recompute: Recompute | None = None
        self.position = config.position
        self.fixed = config.position != "learnable"
        if self.fixed:
            self.trunk.pos_embed.requires_grad_(False)

    def fixed_positions(self) -> Tensor:
        """[1, prefix + N, D]: the 2-D sin-cos embedding of this tower's grid, zero for the class token."""
        patches_ND = sincos_2d(self.grid, self.width, jax=self.position == "sincos_jax")
        return torch.cat([torch.zeros(self.position_prefix, self.width), patches_ND])[None]

    def forward(self, image_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """float[B, 3, H, W] normalised, and optionally int64[B, K] indices of the patches to keep -> [B, D].

        Patches are chosen after the position embedding is added, so that a patch knows where it was; the class token
        always stays.
        """
        x_BND = self.trunk._pos_embed(self.trunk.patch_embed(image_BCHW))
        if keep_BK is not None:
            x_BKD = gather_tokens(x_BND[:, self.prefix :], keep_BK)
            x_BND = torch.cat([x_BND[:, : self.prefix], x_BKD], dim=1)
        x_BND = self.trunk.norm_pre(x_BND)
        x_BND = run_blocks(self.trunk.blocks, x_BND, self.recompute if self.training else None)
        if self.pooling == "attention":
            pooled_BD: Tensor = self.trunk.attn_pool(self.trunk.norm(x_BND[:, self.prefix :]))
            return pooled_BD
        # Of `norm` and `fc_norm` one is the identity: timm norms the class token before pooling, an average after it.
        x_BD = x_BND[:, 0] if self.pooling == "token" else x_BND[:, self.prefix :].mean(dim=1)
        out: Tensor = self.trunk.fc_norm(self.trunk.norm(x_BD))
        return out


def make_image_tower(config: ImageConfig) -> ImageTower | TimmTower:
    """The tower of that name, its weights not yet set. UserError for what timm doesn't have or can't build."""
    # timm itself also takes a name with a tag of its weights, and names that it has given up.
    if not timm.is_model(config.name) or "." in config.name or config.name in get_deprecated_models():
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3) or timm.list_models("vit_*")[:3]
        raise UserError(f"timm has no model {config.name!r} for model.image.name: did you mean {', '.join(near)}?")
    return (ImageTower if is_model_in_modules(config.name, "vision_transformer") else TimmTower)(config)


def is_plain(trunk: nn.Module) -> TypeGuard[VisionTransformer]:
    """Whether this is timm's VisionTransformer of ordinary blocks, with absolute positions and ordinary patches."""
    return (
        isinstance(trunk, VisionTransformer)
        and all(isinstance(block, Block) for block in trunk.blocks)
        and isinstance(trunk.patch_embed, PatchEmbed | ConvStem)
        and trunk.pos_embed is not None
    )


def make_trunk(config: ImageConfig) -> VisionTransformer:
    """timm's model for a configuration, its weights not yet set. UserError for what timm can't build."""
    overrides: dict[str, Any] = {
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "init_values": config.layer_scale,
    }
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if config.stem == "conv":
        overrides["embed_layer"] = ConvStem
    if config.pooling == "token" and not config.class_token:
        raise UserError("model.image.pooling=token needs model.image.class_token=true: set one of them")
    try:
        trunk = timm.create_model(
            config.name,
            img_size=config.image_size,
            num_classes=0,
            global_pool={"token": "token", "average": "avg", "attention": "map"}[config.pooling],
            class_token=config.class_token,
            pre_norm=config.pre_norm,
            act_layer=config.act,
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
            weight_init="skip",
            **overrides,
        )
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"timm can't build {config.name} as model.image asks ({reason}): change it") from error
    if not is_plain(trunk):
        raise UserError(f"{config.name} isn't a plain vision transformer in timm: set another model.image.name")
    if config.patch_bias is not None:
        bias = nn.Parameter(torch.empty(trunk.embed_dim)) if config.patch_bias else None
        trunk.patch_embed.proj.register_parameter("bias", bias)
    patch = trunk.patch_embed.patch_size[0]
    # vit_so400m_patch14_siglip_384 is published with 384 px, of which it doesn't see the last six.
    known = timm.get_pretrained_cfg(config.name) if config.patch_size is None else None
    if config.image_size % patch and not (known and config.image_size == known.input_size[1]):
        near_sizes = config.image_size // patch * patch, math.ceil(config.image_size / patch) * patch
        raise UserError(
            f"model.image.image_size {config.image_size} isn't a multiple of the patch size {patch}: "
            f"take {near_sizes[0] or patch} or {near_sizes[1]}"
        )
    if config.position != "learnable" and (trunk.embed_dim % 4 or trunk.embed_dim < 8):
        raise UserError(
            f"sincos positions need a model.image.width that is a multiple of 4, not {trunk.embed_dim}: change it"
        )
    return trunk
