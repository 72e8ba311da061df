"""Small copies of images: a record at 128 px is a quarter of the size and decodes four times as fast.

Training on few image tokens sees small pictures, so most of what a record of 256 px holds is read and decoded in vain.
Large JPEGs are decoded at a half, a quarter or an eighth of their size, which costs less than the whole, and what is
left is reduced by averaging areas. The same bytes in give the same bytes out, with the same versions of the libraries.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from clipkit.errors import UserError
from clipkit.pixels.images import MAX_PIXELS, UInt8Array, check_size, decode, jpeg_scale, plain_jpeg_size

# How much larger than the copy libjpeg's reduced image has to be: its way of reducing, within blocks of 8 x 8, leaves
# edges in the picture that averaging then takes out (mean error at 64 px: 1.6 of 255 in place of 3.9).
MARGIN = 1.5


@dataclass(frozen=True)
class Compacted:
    """A small JPEG and its sides in pixels."""

    jpg: bytes
    width: int
    height: int


def compact(image: bytes, size: int, quality: int) -> Compacted:
    """An encoded image of any format as a JPEG, upright, its shorter side `size` pixels, or its own where that is less.

    A JPEG that is upright and no larger keeps its bytes. `quality` is libjpeg's, 1 to 100; chroma is halved (4:2:0).
    Raises ImageError for an image that can't be decoded, UserError for an invalid size or quality.
    """
    if size < 1 or not 1 <= quality <= 100:
        raise UserError(f"can't resize to {size} px at quality {quality}: give 1 px or more, and a quality of 1 to 100")
    sides = plain_jpeg_size(image)
    if sides and min(sides) <= size:
        read_jpeg(image, *sides, scale=8)  # whether it can be read at all
        return Compacted(image, sides[1], sides[0])
    if sides:
        height, width = fit(*sides, size)
        pixels = read_jpeg(image, *sides, jpeg_scale(*sides, int(MARGIN * height), int(MARGIN * width)))
    else:
        pixels = decode(image)
        height, width = fit(pixels.shape[0], pixels.shape[1], size)
    if pixels.shape[:2] != (height, width):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return Compacted(simplejpeg.encode_jpeg(pixels, quality, "RGB", "420"), width, height)


def fit(height: int, width: int, size: int) -> tuple[int, int]:
    """The sides when the shorter is reduced to `size`; neither is enlarged, nor reduced to nothing."""
    shorter = min(height, width)
    if shorter <= size:
        return height, width
    return max(1, round(height * size / shorter)), max(1, round(width * size / shorter))


def read_jpeg(image: bytes, height: int, width: int, scale: int) -> UInt8Array:
    """uint8[H, W, 3] RGB of an upright JPEG of these sides, at 1 / `scale` of them, which is one of 1, 2, 4, 8.

    At full size where libjpeg has a complaint and Pillow forgives. Raises ImageError.
    """
    check_size(height, width, MAX_PIXELS)
    rows, columns = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
    try:
        return simplejpeg.decode_jpeg(image, min_height=rows, min_width=columns, min_factor=scale, strict=True)
    except ValueError:
        return decode(image)
