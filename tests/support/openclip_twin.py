"""A tiny configuration, inputs for it, and OpenCLIP's own model of the same sizes."""

import numpy as np
import open_clip
import torch

from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.text.tokenizer import EOT, SOT

TINY = ModelConfig(
    embed_dim=16,
    image=ImageConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2),
    text=TextConfig(context_length=12, width=32, depth=2, heads=2),
)


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def captions(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Captions of 1 to length - 2 random tokens, the last of them as long as can be."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((count, length), np.int32)
    for row, words in zip(ids, [*rng.integers(1, length - 1, count - 1), length - 2], strict=True):
        row[: words + 2] = [SOT, *rng.integers(1, 49000, words), EOT]
    return torch.from_numpy(ids)


def openclip_twin(config: ModelConfig, **vision: object) -> open_clip.CLIP:
    """OpenCLIP's own model with the sizes of a tiny configuration, randomly initialised."""
    return open_clip.CLIP(
        config.embed_dim,
        vision_cfg={
            "image_size": config.image.image_size,
            "patch_size": config.image.patch_size,
            "width": config.image.width,
            "layers": config.image.depth,
            "head_width": config.image.width // config.image.heads,
            **vision,
        },
        text_cfg={
            "context_length": config.text.context_length,
            "width": config.text.width,
            "layers": config.text.depth,
            "heads": config.text.heads,
        },
    ).eval()
