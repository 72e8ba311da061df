"""Position embeddings: the fixed 2-D kind, and how stored ones fit a model of another size.

CLIPA trains on small images and short captions, then goes on with large and long ones: the positions learnt (or
computed) for one grid have to become those of another.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 10_000.0


def sincos_2d(grid: tuple[int, int], width: int) -> Tensor:
    """float32[h * w, width]: sine and cosine of the column, then of the row, at width / 4 frequencies each.

    As in MoCo v3 and MAE, hence in OpenCLIP and CLIPA's PyTorch code: frequency i of n is 10000 ** (-i / n). big_vision
    and CLIPA's JAX code divide by n - 1 instead, so their numbers differ slightly. `width` is a multiple of 4.
    """
    n = width // 4
    omega_F = TEMPERATURE ** (-torch.arange(n, dtype=torch.float64) / n)
    rows_N = torch.arange(grid[0], dtype=torch.float64).repeat_interleave(grid[1])
    columns_N = torch.arange(grid[1], dtype=torch.float64).repeat(grid[0])
    column_NF = columns_N[:, None] * omega_F
    row_NF = rows_N[:, None] * omega_F
    return torch.cat([column_NF.sin(), column_NF.cos(), row_NF.sin(), row_NF.cos()], dim=1).float()


def resize_image_positions(position_1ND: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """[1, prefix + n, D] of a square grid to [1, prefix + h * w, D], bicubic and antialiased as in timm and OpenCLIP.

    The first `prefix` positions (the class token's) are kept as they are.
    """
    tokens_ND, patches_ND = position_1ND[0, :prefix], position_1ND[0, prefix:]
    side = math.isqrt(len(patches_ND))
    if (side, side) == grid:
        return position_1ND
    image_1DHW = patches_ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image_1DHW = F.interpolate(image_1DHW, size=grid, mode="bicubic", antialias=True, align_corners=False)
    resized_ND = image_1DHW[0].flatten(1).T.to(patches_ND.dtype)
    return torch.cat([tokens_ND, resized_ND])[None]


def resize_text_positions(position_TD: Tensor, context_length: int) -> Tensor:
    """[T, D] to [context_length, D].

    Longer: linear interpolation, as OpenCLIP and CLIPA do from pre-training to fine-tuning. Shorter: the first
    positions, because token i of a truncated caption is still token i. OpenCLIP squeezes all positions together there,
    which moves every token; who needs that can do it before loading.
    """
    if context_length <= len(position_TD):
        return position_TD[:context_length].clone()
    line_1DT = F.interpolate(position_TD.float().T[None], size=context_length, mode="linear", align_corners=False)
    return line_1DT[0].T.to(position_TD.dtype).contiguous()
