"""What a sample costs: tokens that enter the transformers, and floating-point operations.

Counted from the model's own matrices, built without memory for its weights, and held to PyTorch's counter by a test.
Image towers other than vision transformers are counted by PyTorch's counter.
"""

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from clipkit.model.clip import CLIP
from clipkit.model.config import ModelConfig
from clipkit.model.timm_tower import TimmTower


class SampleCost(NamedTuple):
    """Tokens of one sample, class token, start and end included, and the operations of one training step on it.

    An image tower that isn't a vision transformer has no image tokens.
    """

    image_tokens: int
    text_tokens: int
    flops: float


def sample_cost(
    config: ModelConfig, image_keep: int | None = None, images: bool = True, texts: bool = True
) -> SampleCost:
    """What one sample costs in training a model at its sizes, of whose patches `image_keep` (or all) are kept;
    without `images` the image tower isn't run, for its vectors are stored, and likewise the text tower without `texts`.

    Operations: 2 for each multiply-add, three times the forward pass, or once where a part is frozen; what is computed
    again to save memory isn't counted twice. The logits aren't counted: at CLIPA's batch of 65,536 they add under 1%.
    """
    with torch.device("meta"):
        clip = CLIP(config)
    clip.freeze()
    trunk = clip.image.trunk
    text_tokens, image_tokens = config.text.context_length if texts else 0, 0
    towers: list[tuple[int, Any, int]] = []
    flops = sum(passes(head) * 2.0 * matrix_weights(head) for head in (clip.image_head, clip.text_head))
    if texts:
        towers.append((text_tokens, clip.text.blocks, config.text.width))
        flops += passes(clip.text_projection) * 2.0 * matrix_weights(clip.text_projection)
    if images:
        counted = trunk
        if not isinstance(clip.image, TimmTower):
            image_tokens = (image_keep or int(trunk.patch_embed.num_patches)) + clip.image.prefix
            towers.append((image_tokens, trunk.blocks, clip.image.width))
            counted = trunk.patch_embed  # a stem's convolutions are of several sizes
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            counted.eval()(torch.empty(1, 3, config.image.image_size, config.image.image_size, device="meta"))
        flops += passes(counted) * float(counter.get_total_flops())
        flops += passes(clip.image_projection) * 2.0 * matrix_weights(clip.image_projection)
        if config.image.pooling == "attention" and not isinstance(clip.image, TimmTower):  # one query to all patches
            pool: Any = trunk.attn_pool
            seen = image_tokens - clip.image.prefix
            once = 2.0 * (seen * matrix_weights(pool.kv) + sum(map(matrix_weights, (pool.q, pool.proj, pool.mlp))))
            flops += passes(pool) * (once + 4.0 * seen * clip.image.width)
    for tokens, blocks, width in towers:
        for block in blocks:
            flops += passes(block) * (2.0 * matrix_weights(block) * tokens + 4.0 * tokens**2 * width)
    return SampleCost(image_tokens, text_tokens, flops)


def passes(part: torch.nn.Module) -> int:
    """How many times a part's forward operations a training step takes: the gradients of input and weights cost as
    much each, and of a frozen part neither is computed.
    """
    return 3 if any(parameter.requires_grad for parameter in part.parameters()) else 1


def weight_count(config: ModelConfig) -> int:
    """The number of a model's weights."""
    with torch.device("meta"):
        return sum(weights.numel() for weights in CLIP(config).parameters())


def matrix_weights(module: torch.nn.Module) -> int:
    """The number of weights in a module's matrices."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() >= 2)
