"""Random resized crops for training, from encoded bytes where that is cheaper.

A JPEG is decoded only as far as its crop needs, and resized in the same pass, by compiled code (`clipkit/pixels/csrc`).
What that doesn't read (progressive files, other formats), and everything where it couldn't be compiled, is decoded by a
library, a JPEG shrunk while decoding, and resized by OpenCV.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from clipkit.pixels.images import (
    MAX_PIXELS,
    Data,
    UInt8Array,
    check_size,
    decode,
    decode_plain_jpeg,
    decode_with_pillow,
    jpeg_scale,
    plain_jpeg_size,
)

try:
    from clipkit.pixels.jpeg_crop import crop as crop_jpeg

    COMPILED = True
except ImportError:  # installed where there is no C compiler
    COMPILED = False

    def crop_jpeg(
        data: Data, box: tuple[float, float, float, float], size: int, out: UInt8Array, plain: bool = False, /
    ) -> bool:
        return False


Box = tuple[int, int, int, int]

# How a crop is resized depends on how much it shrinks: by cubic interpolation up to a factor of CUBIC, by linear up to
# LINEAR. Beyond, it is interpolated to twice the output's size (cubic up to SHARP, else linear), and that is halved.
# Above SMOOTH along either axis that would skip pixels, so areas are averaged.
CUBIC, LINEAR, SHARP, SMOOTH = 1.15, 1.25, 1.7, 2.6


def crop_box(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], uniforms: Sequence[float]
) -> Box:
    """(top, left, height, width) of a random crop, chosen as torchvision's RandomResizedCrop does.

    The share of the area is uniform in `area`, the aspect ratio log-uniform in `ratio`; a crop that doesn't fit is
    drawn again, and after ten tries the largest central one of a permitted ratio is taken. `uniforms` are 22 numbers in
    [0, 1): two a try, then two for the place. An `area` of (1, 1) gives the central square.
    """
    if area == (1.0, 1.0):
        return central_box(height, width)
    # Plain numbers: for one image numpy takes ten times as long.
    pixels, spread = height * width, area[1] - area[0]
    low, octave = math.log(ratio[0]), math.log(ratio[1] / ratio[0])
    for at in range(0, 20, 2):
        target = pixels * (area[0] + uniforms[at] * spread)
        form = math.exp(low + uniforms[at + 1] * octave)
        w, h = round(math.sqrt(target * form)), round(math.sqrt(target / form))
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms[20] * (height - h + 1)), int(uniforms[21] * (width - w + 1)), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def central_box(height: int, width: int) -> Box:
    """The largest central square, as `crop_box` gives a crop."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def crop_resize(image: UInt8Array, box: Box, size: int, out: UInt8Array | None = None) -> UInt8Array:
    """The box of an image as uint8[size, size, 3], in `out` where that is given.

    Nearer to Pillow's antialiased bicubic than the mean of an area is (test_crop.py), for half of its time and a
    seventh of Pillow's.
    """
    top, left, height, width = box
    part = image[top : top + height, left : left + width]
    shrinks, most = math.sqrt(height * width) / size, max(height, width) / size
    if most > SMOOTH:
        resized = cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_AREA)
    elif shrinks > LINEAR:
        first = cv2.INTER_CUBIC if shrinks <= SHARP else cv2.INTER_LINEAR
        double = cv2.resize(part, (2 * size, 2 * size), interpolation=first)
        resized = cv2.resize(double, (size, size), dst=out, interpolation=cv2.INTER_AREA)
    else:
        first = cv2.INTER_CUBIC if shrinks <= CUBIC else cv2.INTER_LINEAR
        resized = cv2.resize(part, (size, size), dst=out, interpolation=first)
    return resized.astype(np.uint8, copy=False)


def exact_crop_resize(image: UInt8Array, box: Box, size: int) -> UInt8Array:
    """The same by Pillow's antialiased bicubic, as torchvision and OpenCLIP resize. Slow."""
    top, left, height, width = box
    part = Image.fromarray(image[top : top + height, left : left + width])
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))


def random_resized_crop(
    data: Data,
    size: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    uniforms: Sequence[float],
    out: UInt8Array | None = None,
    *,
    exact: bool = False,
) -> UInt8Array:
    """The crop of an encoded image that `crop_box` chooses, as uint8[size, size, 3], in `out` where that is given.

    A JPEG is decoded no larger than the crop needs, unless it is to be `exact`: then all of it is decoded, and `out`
    isn't used. Raises ImageError.
    """
    full = None if exact else plain_jpeg_size(data)
    if full is not None:
        return crop_of_jpeg(data, full, crop_box(*full, area, ratio, uniforms), size, out)
    image = decode(data)
    box = crop_box(image.shape[0], image.shape[1], area, ratio, uniforms)
    return exact_crop_resize(image, box, size) if exact else crop_resize(image, box, size, out)


def crop_of_jpeg(data: Data, full: tuple[int, int], box: Box, size: int, out: UInt8Array | None = None) -> UInt8Array:
    """The box of a JPEG of the size that `plain_jpeg_size` found. Raises ImageError."""
    check_size(*full, MAX_PIXELS)
    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    return out if crop_jpeg(data, box, size, out) else crop_of_shrunk_jpeg(data, full, box, size, out)


def crop_of_shrunk_jpeg(data: Data, full: tuple[int, int], box: Box, size: int, out: UInt8Array) -> UInt8Array:
    """The same by the library, for what the compiled code doesn't do.

    The crop is then the nearest one whose edges are whole pixels of the shrunk image (`scaled_crop`).
    """
    box, scale = scaled_crop(*full, box, size)
    image = decode_plain_jpeg(data, *full, scale, smooth_chroma=min(box[2:]) <= SHARP * scale * size)
    if image is None:
        return crop_resize(decode_with_pillow(data, MAX_PIXELS), box, size, out)
    top, left, rows, columns = box
    return crop_resize(image, (top // scale, left // scale, rows // scale, columns // scale), size, out)


def scaled_crop(height: int, width: int, box: Box, size: int) -> tuple[Box, int]:
    """How far a JPEG may shrink in decoding for a crop to `size`, and the crop with its edges on that grid.

    Each edge moves by half a pixel of the shrunk image at the most, and still lies on the same pixels in both.
    """
    top, left, h, w = box
    scale = jpeg_scale(height, width, -(-height * size // h), -(-width * size // w))
    first, last = round(top / scale), min(round((top + h) / scale), -(-height // scale))
    begin, end = round(left / scale), min(round((left + w) / scale), -(-width // scale))
    rows, columns = max(1, last - first), max(1, end - begin)
    first, begin = min(first, -(-height // scale) - rows), min(begin, -(-width // scale) - columns)
    return (first * scale, begin * scale, rows * scale, columns * scale), scale


def shrink(image: UInt8Array, side: int) -> UInt8Array:
    """The image with its shorter side reduced to `side`, where it is larger."""
    scale = side / min(image.shape[:2])
    if scale >= 1:
        return image
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
