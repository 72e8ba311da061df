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


def sample_cost(config: ModelConfig, image_keep: int | None = None, images: bool = True) -> SampleCost:
    """What one sample costs in training a model at its sizes, of whose patches `image_keep` (or all) are kept;
    without `images` the image tower isn't run, for its vectors are stored.

    Operations: 2 for each multiply-add, three times the forward pass; what is computed again to save memory isn't
    counted twice. The logits aren't counted: at CLIPA's batch of 65,536 they add under 1%.
    """
    with torch.device("meta"):
        clip = CLIP(config)
    trunk = clip.image.trunk
    text_tokens, image_tokens = config.text.context_length, 0
    towers = [(text_tokens, clip.text.blocks, config.text.width)]
    if not images:
        forward = 2.0 * (matrix_weights(clip.text.blocks) * text_tokens + matrix_weights(clip.text_projection))
        forward += 4.0 * text_tokens**2 * config.text.width * len(clip.text.blocks)
        return SampleCost(0, text_tokens, 3 * forward)
    counted = trunk
    if not isinstance(clip.image, TimmTower):
        image_tokens = (image_keep or int(trunk.patch_embed.num_patches)) + clip.image.prefix
        towers.append((image_tokens, trunk.blocks, clip.image.width))
        counted = trunk.patch_embed  # a stem's convolutions are of several sizes
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted.eval()(torch.empty(1, 3, config.image.image_size, config.image.image_size, device="meta"))
    forward = float(counter.get_total_flops())
    forward += 2.0 * (matrix_weights(clip.image_projection) + matrix_weights(clip.text_projection))
    for tokens, blocks, width in towers:
        forward += 2.0 * matrix_weights(blocks) * tokens + 4.0 * tokens**2 * width * len(blocks)
    if config.image.pooling == "attention" and not isinstance(clip.image, TimmTower):  # one query to all patches
        pool: Any = trunk.attn_pool
        seen = image_tokens - clip.image.prefix
        forward += 2.0 * (seen * matrix_weights(pool.kv) + sum(map(matrix_weights, (pool.q, pool.proj, pool.mlp))))
        forward += 4.0 * seen * clip.image.width
    return SampleCost(image_tokens, text_tokens, 3 * forward)


def weight_count(config: ModelConfig) -> int:
    """The number of a model's weights."""
    with torch.device("meta"):
        return sum(weights.numel() for weights in CLIP(config).parameters())


def matrix_weights(module: torch.nn.Module) -> int:
    """The number of weights in a module's matrices."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() >= 2)
