"""Crops of JPEGs, decoded and resized in one pass (clipkit/pixels/csrc)."""

from clipkit.pixels.images import Data, UInt8Array

def crop(
    data: Data, box: tuple[float, float, float, float], size: int, out: UInt8Array, plain: bool = False, /
) -> bool:
    """Write a box (top, left, height, width) of a JPEG to `out`, a contiguous uint8[size, size, 3] RGB.

    The pixels are those of a full decoding and Pillow's antialiased bicubic but for a level or less on average
    (docs/pixels.md).
    Returns False, and leaves anything in `out`, where another decoder has to look: at what isn't a baseline JPEG, grey
    or YCbCr, in one scan, at damaged data, and at a box that isn't within the image. What lies below the box isn't
    read, so damage there isn't seen. EXIF isn't heeded. `plain` does without the processor's wider instructions, for
    the same pixels. Raises ValueError for an `out` of another size.
    """
