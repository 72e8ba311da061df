"""Random resized crops for training, from encoded bytes where that is cheaper (a JPEG is shrunk while decoding)."""

import cv2
import numpy as np
import numpy.typing as npt

from clipkit.images import UInt8Array, decode, decode_scaled, jpeg_scale, plain_jpeg_size

Box = tuple[int, int, int, int]

# Up to here cubic interpolation of four pixels equals the antialiased one better than the mean of an area does.
CUBIC_UP_TO = 1.15


def crop_box(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], uniforms: npt.ArrayLike
) -> Box:
    """(top, left, height, width) of a random crop, chosen as torchvision's RandomResizedCrop does.

    The share of the area is uniform in `area`, the aspect ratio log-uniform in `ratio`; a crop that doesn't fit is
    drawn again, and after ten tries the largest central one of a permitted ratio is taken. `uniforms` are 22 numbers in
    [0, 1): two a try, then two for the place.
    """
    draws = np.asarray(uniforms, np.float64)
    logs = np.log(ratio[0]), np.log(ratio[1])
    target_10 = height * width * (area[0] + draws[0:20:2] * (area[1] - area[0]))
    ratio_10 = np.exp(logs[0] + draws[1:20:2] * (logs[1] - logs[0]))
    for w, h in np.rint(np.sqrt((target_10 * ratio_10, target_10 / ratio_10))).T.astype(int).tolist():
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(image: UInt8Array, box: Box, size: int) -> UInt8Array:
    """The box of an image as uint8[size, size, 3]: the mean of an area where it shrinks, cubic where it hardly does.

    Close to Pillow's antialiased bicubic (tests/test_images.py) for a fifth of its time.
    """
    top, left, height, width = box
    shrinks = min(height, width) > CUBIC_UP_TO * size
    resized = cv2.resize(
        image[top : top + height, left : left + width],
        (size, size),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC,
    )
    return resized.astype(np.uint8, copy=False)


def random_resized_crop(
    image: UInt8Array, size: int, area: tuple[float, float], ratio: tuple[float, float], uniforms: npt.ArrayLike
) -> UInt8Array:
    """A random crop of a decoded image as uint8[size, size, 3]; arguments as in `crop_box`."""
    return crop_resize(image, crop_box(image.shape[0], image.shape[1], area, ratio, uniforms), size)


def random_resized_crop_of(
    data: bytes, size: int, area: tuple[float, float], ratio: tuple[float, float], uniforms: npt.ArrayLike
) -> UInt8Array:
    """The same from encoded bytes: a JPEG is decoded no larger than the crop needs.

    The crop is then the nearest one whose edges are whole pixels of the shrunk image (`scaled_crop`).
    """
    full = plain_jpeg_size(data)
    if full is None:
        return random_resized_crop(decode(data), size, area, ratio, uniforms)
    box, scale = scaled_crop(*full, crop_box(*full, area, ratio, uniforms), size)
    image = decode_scaled(data, -(-full[0] // scale), -(-full[1] // scale))
    if image.shape[:2] == full:  # a JPEG that only Pillow decodes
        return crop_resize(image, box, size)
    top, left, rows, columns = (edge // scale for edge in box)
    return crop_resize(image, (top, left, rows, columns), size)


def scaled_crop(height: int, width: int, box: Box, size: int) -> tuple[Box, int]:
    """How far a JPEG may shrink in decoding for a crop to `size`, and the crop with its edges on that grid.

    The crop moves by half a pixel of the shrunk image at the most, and still lies on the same pixels in both.
    """
    top, left, h, w = box
    scale = jpeg_scale(height, width, -(-height * size // h), -(-width * size // w))
    rows, columns = max(1, round(h / scale)), max(1, round(w / scale))
    top, left = (
        min(round(top / scale), -(-height // scale) - rows),
        min(round(left / scale), -(-width // scale) - columns),
    )
    return (top * scale, left * scale, rows * scale, columns * scale), scale
