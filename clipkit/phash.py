"""A perceptual hash: 64 bits that stay nearly the same when a picture is re-encoded or resized."""

import numpy as np
import numpy.typing as npt


def perceptual_hash(image_HWC: npt.NDArray[np.uint8]) -> int:
    """The DCT hash of uint8[H, W, 3] RGB, as an int below 2**64."""
    raise NotImplementedError


def perceptual_hash_of(data: bytes) -> int:
    """The same of an encoded image, decoded no larger than it has to be. Raises clipkit.images.ImageError."""
    raise NotImplementedError


def distance(a: int, b: int) -> int:
    """How many of the 64 bits differ."""
    return (a ^ b).bit_count()
