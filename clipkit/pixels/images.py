"""From encoded bytes to pixels: the one way that training and evaluation share.

Images come from the open web, so the size is read from the header before anything is decoded, only formats of pictures
are opened, and whatever can't be decoded raises an `ImageError` that says why. JPEG goes through libjpeg-turbo
(simplejpeg), which can decode at a half, a quarter or an eighth of the size for less; WebP through OpenCV where that
gives Pillow's pixels; all else through Pillow. Pixels are uint8 until they are on the device.
"""

import io
import math
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

from clipkit.choices import CLIP_MEAN, CLIP_STD, Interpolation, ResizeMode
from clipkit.errors import UserError, one_line

if TYPE_CHECKING:
    import torch

UInt8Array = npt.NDArray[np.uint8]

Data = bytes | memoryview

MAX_PIXELS = 80_000_000
# What Pillow decoded is made RGB in strips of so many pixels.
STRIP_PIXELS = 2_000_000
# The longest image that evaluation resizes as a whole: its longer side in multiples of the shorter.
LONGEST_RESIZED = 64
# Only formats of pictures: Pillow would also start other programs (EPS) or read scientific files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")

# The header of each segment of a JPEG, and the first fields of a frame's segment (ITU-T T.81, B.2).
_MARKER = struct.Struct(">HH")
_FRAME = struct.Struct(">BHHB")
_FRAMES = frozenset((0xFFC0, 0xFFC1, 0xFFC2, 0xFFC9, 0xFFCA))  # baseline, extended, progressive; arithmetic coding
_PROGRESSIVE = frozenset((0xFFC2, 0xFFCA))

# EXIF's tag for how the image is to be turned, 1 for not at all, and the type it has.
ORIENTATION, _SHORT = 0x0112, 3


class ImageError(UserError):
    """Bytes that can't be decoded as an image; the message says why, without naming the sample."""


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes pixels at evaluation: part of a checkpoint, for another way gives another accuracy."""

    size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    """`shortest`: the shorter side to `size`, then the centre square. `squash`: both sides to `size`."""


# ---- Decoding --------------------------------------------------------------------------------------------------------


def read_encoded(path: Path) -> bytes | ImageError:
    """A file's encoded image, or the reason why there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        return ImageError(f"the file can't be read ({error.strerror})")


def decode(data: Data, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """An encoded image as uint8[H, W, 3] RGB, upright (EXIF), on white where it is transparent, its first frame.

    Raises ImageError for what isn't an image, is cut short, or has more than `max_pixels` pixels.
    """
    return decode_scaled(data, sys.maxsize, sys.maxsize, max_pixels)


def decode_scaled(data: Data, min_height: int, min_width: int, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """Like `decode`, but a JPEG may come at 1/2, 1/4 or 1/8 of its size, the smallest with at least these sides.

    Libjpeg drops the highest frequencies before it goes to pixels; only these scales are faster than a full decoding.
    """
    if size := plain_jpeg_size(data):
        check_size(*size, max_pixels)
        image = decode_plain_jpeg(data, *size, jpeg_scale(*size, min_height, min_width))
        if image is not None:
            return image
    elif size := header_size(data):
        check_size(*size, max_pixels)
        if is_plain_webp(data):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if pixels is not None:
                return pixels.astype(np.uint8, copy=False)
    return decode_with_pillow(data, max_pixels)


def jpeg_scale(height: int, width: int, min_height: int, min_width: int) -> int:
    """8, 4, 2 or 1: the most that a JPEG may shrink in decoding and still have at least these sides."""
    scale = 8
    while scale > 1 and (-(-height // scale) < min_height or -(-width // scale) < min_width):
        scale //= 2
    return scale


def decode_plain_jpeg(data: Data, height: int, width: int, scale: int, smooth_chroma: bool = True) -> UInt8Array | None:
    """A JPEG of the size that `plain_jpeg_size` found, at 1/`scale` of it; None where only Pillow may know what to do.

    `smooth_chroma` False repeats chroma where it has fewer pixels: 4% less time, and hardly seen in what is shrunk by
    half afterwards. Libjpeg's fast transform is never taken: it saves 2% and doubles the error of a crop.
    """
    rows, columns = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
    try:
        return simplejpeg.decode_jpeg(
            data,
            min_height=rows,
            min_width=columns,
            min_factor=scale,
            fastupsample=not smooth_chroma,
            strict=True,
        )
    except ValueError:
        return None  # Pillow forgives more, and has the better words for what it doesn't


def plain_jpeg_size(data: Data, exif: bool = True) -> tuple[int, int] | None:
    """(height, width) of a JPEG that libjpeg-turbo decodes right by itself: grey or colour, not turned by EXIF or XMP.

    None too for one with an EXIF block when `exif` is False. The headers are walked up to the image's data here, once
    for all: libjpeg would take as long for the size alone.
    """
    if data[:2] != b"\xff\xd8":
        return None
    size = None
    try:
        for marker, at, length in jpeg_segments(data):
            if marker in _FRAMES:
                precision, height, width, colours = _FRAME.unpack_from(data, at)
                if precision != 8 or colours not in (1, 3) or size:
                    return None
                size = height, width
            elif marker < 0xFFC4:  # a frame of a kind that libjpeg doesn't know
                return None
            elif marker == 0xFFE1:
                segment = bytes(data[at : at + length])
                is_exif = segment[:5] == b"Exif\0"
                if not (exif and is_upright(segment[6:]) if is_exif else b"tiff:Orientation" not in segment):
                    return None
    except struct.error:
        return None
    return size


def jpeg_segments(data: Data) -> Iterator[tuple[int, int, int]]:
    """(marker, place, length) of the contents of each segment of a JPEG, up to the first scan's header.

    Raises struct.error for a file that ends before, and for one with fill bytes or markers without a length in between:
    a guess about these could lead to other segments than libjpeg sees.
    """
    at = 2
    while True:
        marker, length = _MARKER.unpack_from(data, at)
        if not 0xFFC0 <= marker < 0xFFFF or 0xFFD0 <= marker < 0xFFDA or length < 2:
            raise struct.error
        yield marker, at + 4, length - 2
        if marker == 0xFFDA:  # the image's data follows
            return
        at += 2 + length


def is_upright(exif: bytes) -> bool:
    """Whether the TIFF structure that EXIF is says that nothing is to be turned; False where it can't be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return False
    try:
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for at in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", exif, at)
            if tag == ORIENTATION:
                return (kind, values, value) == (_SHORT, 1, 1)
    except struct.error:
        return False
    return True


def has_one_scan(data: Data) -> bool:
    """Whether this is a JPEG whose first scan holds all of it, so that libjpeg reads no other: the usual baseline."""
    colours = 0
    try:
        for marker, at, _ in jpeg_segments(data):
            if marker == 0xFFDA:
                return data[at] == colours
            if marker in _FRAMES:
                if marker in _PROGRESSIVE or colours:
                    return False
                colours = _FRAME.unpack_from(data, at)[3]
    except (struct.error, IndexError):
        pass
    return False


def header_size(data: Data) -> tuple[int, int] | None:
    """(height, width) as the header of a JPEG, PNG, WebP or GIF says; None where it says nothing of the kind."""
    try:
        if data[:2] == b"\xff\xd8":
            height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            return height, width
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height = struct.unpack_from(">II", data, 16)
            return height, width
        if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
            width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
            return height, width
        if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8L":
            both = struct.unpack_from("<I", data, 21)[0]
            return 1 + (both >> 14 & 0x3FFF), 1 + (both & 0x3FFF)
        if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return height & 0x3FFF, width & 0x3FFF
        if data[:4] == b"GIF8":
            width, height = struct.unpack_from("<HH", data, 6)
            return height, width
    except (ValueError, KeyError, struct.error):
        pass
    return None


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise ImageError for an image that is larger than anyone needs: decoding it could fill the memory."""
    if height * width > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than the {max_pixels:,} allowed")
    if not height or not width:
        raise ImageError("the image has no pixels")


def is_plain_webp(data: Data) -> bool:
    """Whether this is a single WebP image without transparency, animation, EXIF or XMP."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return False
    match data[12:16]:
        case b"VP8 ":
            return True
        case b"VP8L":
            return len(data) > 24 and not data[24] & 0x10
        case b"VP8X":
            return not data[20] & 0x1E  # ICC profiles (0x20) change nothing here
    return False


def decode_with_pillow(data: Data, max_pixels: int) -> UInt8Array:
    """Any picture format, any mode. Raises ImageError."""
    if not data:
        raise ImageError("the image has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.height, image.width, max_pixels)
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on broken bytes
        raise ImageError(describe_failure(data, error)) from error


def describe_failure(data: Data, error: Exception) -> str:
    """A short reason in words: most "images" that aren't are web pages."""
    start = bytes(data[:256]).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "not an image but an HTML page"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image (begins with {bytes(data[:8])!r})"
    return f"the image is damaged ({one_line(error)})"


def upright_rgb(image: Image.Image) -> UInt8Array:
    """What `decode` gives of the file that an image of Pillow's was opened from."""
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> UInt8Array:
    """uint8[H, W, 3] of any mode: 16 bits and floats scaled to 8, transparency laid on white."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            pixels *= 255 if pixels.max(initial=0) <= 1 else 1
        elif image.mode != "I" or pixels.max(initial=0) > 255:
            pixels /= 257
        grey = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.width * image.height <= STRIP_PIXELS:
        return opaque(image)
    # Pillow copies at each step, four bytes a pixel: of 80 million pixels that would be more than a gigabyte.
    whole, rows = np.empty((image.height, image.width, 3), np.uint8), max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        whole[top:bottom] = opaque(image.crop((0, top, image.width, bottom)))
    return whole


def opaque(image: Image.Image) -> UInt8Array:
    """uint8[H, W, 3], transparency laid on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def thumbnail(data: Data, side: int) -> bytes:
    """A copy of an encoded image that fits into a square, as WebP, which every browser shows; b"" for a damaged one."""
    try:
        picture = Image.fromarray(decode_scaled(data, side, side))
    except ImageError:
        return b""
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


# ---- Evaluation ------------------------------------------------------------------------------------------------------


def eval_transform(
    image: UInt8Array, size: int, interpolation: Interpolation = "bicubic", resize_mode: ResizeMode = "shortest"
) -> UInt8Array:
    """uint8[size, size, 3] as OpenCLIP evaluates it, bit for bit: Pillow's antialiased resize, then the centre.

    Of a strip longer than LONGEST_RESIZED to 1 only the part is resized that becomes the centre: 1 x 60,000 pixels
    would take gigabytes. That differs by the rounding between the two passes.

    Raises UserError for an unknown interpolation or resize mode.
    """
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    if interpolation not in filters or resize_mode not in ("shortest", "squash"):
        raise UserError(
            f"unknown preprocessing {interpolation!r}, {resize_mode!r}: choose bicubic or bilinear, shortest or squash"
        )
    height, width = image.shape[:2]
    if resize_mode == "squash":
        target = size, size
    elif width <= height:
        target = size, int(size * height / width)
    else:
        target = int(size * width / height), size
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    if max(target) > LONGEST_RESIZED * size:
        return middle_of_strip(image, size, target, filters[interpolation])
    pixels = Image.fromarray(image)
    if target != (width, height):
        pixels = pixels.resize(target, filters[interpolation])
    return np.asarray(pixels)[top : top + size, left : left + size]


def middle_of_strip(image: UInt8Array, size: int, target: tuple[int, int], by: Image.Resampling) -> UInt8Array:
    """What `eval_transform` makes of a long strip that would be resized to `target`."""
    is_tall = target[1] > target[0]
    length, longer = (image.shape[0], target[1]) if is_tall else (image.shape[1], target[0])
    scale, begin = length / longer, round((longer - size) / 2)
    reach = math.ceil(2 * max(scale, 1)) + 1  # of the filter
    first, last = max(0, int(begin * scale) - reach), min(length, math.ceil((begin + size) * scale) + reach)
    low, high = begin * scale - first, min((begin + size) * scale, length) - first
    pixels = Image.fromarray(image[first:last] if is_tall else image[:, first:last])
    if is_tall and scale < 1:  # Pillow would begin with the columns here, but begins with the rows of the whole
        pixels = pixels.resize((size, last - first), by)
    box = (0, low, pixels.width, high) if is_tall else (low, 0, high, pixels.height)
    return np.asarray(pixels.resize((size, size), by, box))


def normalise(
    image_BHWC: "torch.Tensor", mean: tuple[float, float, float], std: tuple[float, float, float]
) -> "torch.Tensor":
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W], scaled to 0 … 1, less `mean`, by `std`; on the tensor's device.

    Same values as torchvision's ToTensor and Normalize. The memory stays in NHWC order (channels last).
    """
    import torch

    # Plain numbers, channel by channel: a tensor of means made here would be copied to the device and waited for.
    channels = [(image_BHWC[..., c].float() / 255 - mean[c]) / std[c] for c in range(3)]
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)
