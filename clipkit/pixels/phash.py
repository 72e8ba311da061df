"""A perceptual hash: 64 bits that stay nearly the same when a picture is re-encoded or resized.

The web serves the same picture in many encodings, and re-encodes it over the years: a digest of the bytes says that
all of them differ. This is the DCT hash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions" (2010), bit for bit as `phash` of the Python package ImageHash has it, so that its hashes compare with ours.
"""

import math
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipkit.pixels.images import UInt8Array, decode_scaled

SIDE = 32
KEPT = 8
# Decoding to at least this many pixels a side moves a bit or two of the hash.
MIN_DECODED_SIDE = 4 * SIDE
SAME_PICTURE = 10
"""Up to this distance two pictures are taken for one: re-encoded or resized ones lie below, different ones about 32."""


def perceptual_hash(image_HWC: UInt8Array) -> int:
    """The DCT hash of uint8[H, W, 3] RGB: an int below 2**64, whose 16 hex digits are those of `imagehash.phash`.

    In grey, 32 x 32 pixels, the DCT's 8 x 8 lowest frequencies, row by row from the highest bit: 1 above their median.
    All pictures of one colour have the hash 2**63, except black, which has 0: their hashes say nothing.
    """
    grey = Image.fromarray(image_HWC).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    rows = dct_rows()
    # Rounded, so that a 0 is 0 on every machine, whatever the order of additions.
    low = np.round(rows @ np.asarray(grey, dtype=np.float64) @ rows.T, 6)
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def perceptual_hash_of(data: bytes) -> int:
    """The same of an encoded image. A JPEG is decoded no larger than it has to be, which may turn a bit or two.

    Raises clipkit.pixels.images.ImageError for what can't be decoded.
    """
    return perceptual_hash(decode_scaled(data, MIN_DECODED_SIDE, MIN_DECODED_SIDE))


def distance(a: int, b: int) -> int:
    """How many of the 64 bits differ."""
    return (a ^ b).bit_count()


@cache
def dct_rows() -> npt.NDArray[np.float64]:
    """float64[8, 32]: the first rows of the DCT-II, in SciPy's scale."""
    n, k = np.arange(SIDE), np.arange(KEPT)[:, None]
    return 2 * np.cos(math.pi * k * (2 * n + 1) / (2 * SIDE))
