"""Training images: cut, turned and coloured at random, each choice a function of the sample's key.

Geometry is done sample by sample, straight from the encoded bytes (`cut`). All colour changes of a sample are affine in
(R, G, B), so they are composed into one 3 x 4 matrix, for a whole batch at once, and each image is touched once
(`recolour`). Nothing here draws from a generator's state: `clipkit.counter_rng` gives the numbers.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from clipkit.counter_rng import uniform
from clipkit.pixels.images import Data, ImageError, UInt8Array, decode_scaled
from clipkit.train.augmentation import Augmentation
from clipkit.train.loader.crop import random_resized_crop, shrink

# Streams of random numbers, each for one use (see counter_rng).
GEOMETRY, COLOUR, ERASING = range(100, 103)
GEOMETRY_DRAWS, COLOUR_DRAWS, ERASING_DRAWS = 23, 16, 8

LUMA = (0.299, 0.587, 0.114)
# Brightness and two colour axes (NTSC): saturation scales the colour plane, hue turns it.
RGB_TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)

# OpenCV's limit.
LONGEST_WARPED = (1 << 15) - 2

FloatArray = npt.NDArray[np.float64]


# ---- Geometry --------------------------------------------------------------------------------------------------------


def geometry_draws(keys_B: npt.ArrayLike) -> FloatArray:
    """The random numbers for `cut`, one row a sample."""
    return uniform(keys_B, GEOMETRY_DRAWS, GEOMETRY)


def cut(
    data: Data | UInt8Array,
    size: int,
    augmentation: Augmentation,
    draws: Sequence[float],
    out: UInt8Array | None = None,
) -> UInt8Array:
    """One encoded image as uint8[size, size, 3], in `out` where that is given. Raises ImageError.

    `draws` is a row of `geometry_draws`. An affine augmentation also takes what `warpable` made of the bytes.
    """
    flip = draws[22] < augmentation.flip
    if augmentation.is_affine or isinstance(data, np.ndarray):
        image = data if isinstance(data, np.ndarray) else warpable(data, size)
        pixels = warp(image, size, augmentation, draws, flip, out)
    else:
        area, ratio = augmentation.crop_area, augmentation.crop_ratio
        pixels = random_resized_crop(data, size, area, ratio, draws, out, exact=augmentation.exact)
    if flip and not augmentation.is_affine:
        pixels = cv2.flip(pixels, 1, dst=out).astype(np.uint8, copy=False)
    if out is not None and pixels is not out:
        out[:] = pixels
    return pixels


def warpable(data: Data, size: int) -> UInt8Array:
    """An image decoded for `warp`, which takes the same pixels each time: two to three times the size of the output.

    Raises ImageError, for a strip that OpenCV can't warp too.
    """
    image = decode_scaled(data, 2 * size, 2 * size)
    # Beyond three times the size, bilinear sampling would skip pixels.
    image = shrink(image, 2 * size) if min(image.shape[:2]) > 3 * size else image
    height, width = image.shape[:2]
    if max(height, width) > LONGEST_WARPED:
        raise ImageError(f"{width} x {height} pixels are longer than the {LONGEST_WARPED:,} that can be warped")
    return image


def warp(
    image: UInt8Array,
    size: int,
    augmentation: Augmentation,
    draws: Sequence[float],
    flip: bool,
    out: UInt8Array | None = None,
) -> UInt8Array:
    """Crop, turn, shear and shift in one bilinear warp.

    The crop's area and ratio are log-uniform; it is placed anywhere inside the image (or around it, where it is larger)
    and shifted by up to `translation`, whichever reaches further.
    """
    height, width = image.shape[:2]
    across, down, angle, slant, right, below = (2 * draw - 1 for draw in draws[:6])
    low, high = augmentation.crop_area
    area = low * (high / low) ** ((across + 1) / 2)
    narrow, wide = augmentation.crop_ratio
    ratio = narrow * (wide / narrow) ** ((down + 1) / 2)

    # Source pixels per output pixel along each axis, then turned and sheared about the centre.
    step_x, step_y = (math.sqrt(area * form * height * width) / size for form in (ratio, 1 / ratio))
    free_x, free_y = abs(width - step_x * size) / 2, abs(height - step_y * size) / 2
    centre_x = (width - 1) / 2 + right * max(free_x, augmentation.translation * width)
    centre_y = (height - 1) / 2 + below * max(free_y, augmentation.translation * height)
    turn = math.radians(angle * augmentation.rotation)
    shear = math.tan(math.radians(slant * augmentation.shear))
    cosine, sine = math.cos(turn), math.sin(turn)
    step_x = -step_x if flip else step_x
    a, b = cosine * step_x, (cosine * shear - sine) * step_y
    c, d = sine * step_x, (sine * shear + cosine) * step_y
    middle = (size - 1) / 2
    matrix = np.array([[a, b, centre_x - (a + b) * middle], [c, d, centre_y - (c + d) * middle]])
    warped = cv2.warpAffine(
        image,
        matrix,
        (size, size),
        dst=out,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(augmentation.fill,) * 3,
    )
    return warped.astype(np.uint8, copy=False)


# ---- Colour ----------------------------------------------------------------------------------------------------------


def recolour(images_BHWC: UInt8Array, augmentation: Augmentation, keys_B: npt.ArrayLike) -> None:
    """Change the colours of contiguous uint8 images in place, each by its key, and erase from them."""
    if augmentation.recolours:
        draws_BN = uniform(keys_B, COLOUR_DRAWS, COLOUR)
        means_B3 = np.zeros((len(images_BHWC), 3))
        if augmentation.contrast and augmentation.fixed == "black":
            means_B3 = np.array([cv2.mean(image)[:3] for image in images_BHWC]).reshape(-1, 3)
        for image, matrix in zip(images_BHWC, colour_matrices(augmentation, draws_BN, means_B3), strict=True):
            cv2.transform(image, matrix, dst=image)
    if augmentation.erase:
        erase(images_BHWC, augmentation, uniform(keys_B, ERASING_DRAWS, ERASING))


def colour_matrices(augmentation: Augmentation, draws_BN: FloatArray, means_B3: FloatArray) -> FloatArray:
    """float64[B, 3, 4]: what becomes of (R, G, B, 1). `means_B3` are the images' mean colours."""
    size = len(draws_BN)
    jittered_B = draws_BN[:, 0] < augmentation.jitter
    spread_B4 = 2 * draws_BN[:, 1:5] - 1
    amounts = np.array([augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue])
    factor_B4 = np.maximum(spread_B4 * amounts + [1, 1, 1, 0], [0, 0, 0, -np.inf])
    factor_B4[draws_BN[:, 5] >= augmentation.hue_jitter, 3] = 0
    factor_B4[~jittered_B] = [1, 1, 1, 0]
    grey_B = draws_BN[:, 6] < augmentation.grey

    matrix_B34 = np.zeros((size, 3, 4))
    if augmentation.fixed == "white":
        saturation_B = np.where(grey_B, 0, factor_B4[:, 2])
        colour_B33 = turn_and_saturate(saturation_B, factor_B4[:, 3])
        permute(colour_B33, augmentation.permute_channels, draws_BN)
        colour_B33 = colour_B33 * (factor_B4[:, 0] * factor_B4[:, 1])[:, None, None]
        matrix_B34[:, :, :3] = colour_B33
        matrix_B34[:, :, 3] = 255 * (1 - colour_B33.sum(axis=2))
    else:
        matrix_B34[:, :, :3] = np.eye(3)
        steps_B4 = np.stack(
            [
                np.eye(3) * factor_B4[:, 0, None, None],
                np.eye(3) * factor_B4[:, 1, None, None],
                turn_and_saturate(factor_B4[:, 2], np.zeros(size)),
                turn_and_saturate(np.ones(size), factor_B4[:, 3]),
            ],
            axis=1,
        )
        order_B4 = draws_BN[:, 7:11].argsort(axis=1)
        for step in range(4):
            which_B = order_B4[:, step]
            now_B3 = np.einsum("bij,bj->bi", matrix_B34[:, :, :3], means_B3) + matrix_B34[:, :, 3]
            matrix_B34 = steps_B4[np.arange(size), which_B] @ matrix_B34
            # Contrast moves away from the mean brightness that the image has by now.
            matrix_B34[:, :, 3] += ((which_B == 1) * (1 - factor_B4[:, 1]) * (now_B3 @ LUMA))[:, None]
        matrix_B34[grey_B] = np.array([LUMA] * 3) @ matrix_B34[grey_B]
        permute(matrix_B34, augmentation.permute_channels, draws_BN)
    inverted_B = draws_BN[:, 15] < augmentation.invert
    matrix_B34[inverted_B] *= -1
    matrix_B34[inverted_B, :, 3] += 255
    return matrix_B34


def turn_and_saturate(saturation_B: FloatArray, hue_B: FloatArray) -> FloatArray:
    """float64[B, 3, 3]: the colour plane scaled by `saturation` and turned by `hue` turns, brightness kept."""
    cosine, sine = np.cos(2 * np.pi * hue_B) * saturation_B, np.sin(2 * np.pi * hue_B) * saturation_B
    turn_B33 = np.zeros((len(hue_B), 3, 3))
    turn_B33[:, 0, 0] = 1
    turn_B33[:, 1, 1] = turn_B33[:, 2, 2] = cosine
    turn_B33[:, 1, 2], turn_B33[:, 2, 1] = sine, -sine
    product: FloatArray = YIQ_TO_RGB @ turn_B33 @ RGB_TO_YIQ
    return product


def permute(matrix_B3N: FloatArray, probability: float, draws_BN: FloatArray) -> None:
    """Shuffle the rows of some matrices in place."""
    for index in np.nonzero(draws_BN[:, 11] < probability)[0]:
        matrix_B3N[index] = matrix_B3N[index][draws_BN[index, 12:15].argsort()]


def erase(images_BHWC: UInt8Array, augmentation: Augmentation, draws_BN: FloatArray) -> None:
    """Paint one rectangle over some images."""
    height, width = images_BHWC.shape[1:3]
    for index in np.nonzero(draws_BN[:, 0] < augmentation.erase)[0]:
        _, tall, broad, top, left, *colour = draws_BN[index].tolist()
        rows = int(height / 6 + tall * height * (0.4 - 1 / 6))
        columns = int(width / 6 + broad * width * (0.4 - 1 / 6))
        y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        images_BHWC[index, y : y + rows, x : x + columns] = [int(256 * value) for value in colour]
