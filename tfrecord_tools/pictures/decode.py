"""From a fetched body to pixels as img2dataset's Resizer gets them, in silence, with the damage told from the oddities.

OpenCV, which the Resizer decodes with, fills lost parts of a JPEG with grey and calls it a success, clips 16 bits to
white, ignores EXIF's rotation, and prints libjpeg's complaints. Wherever OpenCV's pixels are right, these are the same.
"""

import io
import json
import re
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg

from clipkit.pixels.images import ImageError, UInt8Array, decode, has_one_scan

START_OF_SCAN = b"\xff\xda"
# A progressive JPEG has some ten scans, each over all pixels; a file made to waste time has thousands.
MAX_SCANS = 50
# What libjpeg says when data in the middle are lost. It then goes on with grey or with shifted colours. It says the
# like of bytes between header segments and of some padding at the end, which do no harm.
DAMAGE = re.compile(r"premature end|bad Huffman|\d{3,} extraneous bytes before marker 0xd[0-79]")
# BITMAPFILEHEADER and BITMAPINFOHEADER, the last fields of which may all be 0; the greys are a palette.
BMP_HEADER = struct.Struct("<2sI4xIIiiHH24x")
GREYS = bytes(channel for grey in range(256) for channel in (grey, grey, grey, 0))


@dataclass(frozen=True)
class Header:
    """What is known of a body before it is decoded; the sides are those before any rotation."""

    format: str
    exif: str | None
    height: int
    width: int
    is_odd: bool = False
    """Anything but a JPEG that libjpeg-turbo decodes right by itself: grey or colour, and not to be rotated."""
    is_grey: bool = False


class Bitmap:
    """Pixels as a stream of a BMP file, which the Resizer decodes to the same pixels. It reads all at once.

    Written here, for OpenCV's own writer takes twice the memory: of 80 million pixels that is half a gigabyte.
    """

    def __init__(self, pixels: UInt8Array) -> None:
        """`pixels` is uint8[H, W, 3] BGR or uint8[H, W] grey."""
        self.height, self.width = pixels.shape[0], pixels.shape[1]
        channels = 1 if pixels.ndim == 2 else 3
        palette = GREYS if channels == 1 else b""
        start, stride = BMP_HEADER.size + len(palette), -(-self.width * channels // 4) * 4
        self.data = np.zeros(start + stride * self.height, np.uint8)
        sizes = (self.data.size, start, 40, self.width, self.height, 1, 8 * channels)
        self.data[: BMP_HEADER.size] = np.frombuffer(BMP_HEADER.pack(b"BM", *sizes), np.uint8)
        self.data[BMP_HEADER.size : start] = np.frombuffer(palette, np.uint8)
        rows = self.data[start:].reshape(self.height, stride)  # the lowest first
        rows[:, : self.width * channels] = pixels.reshape(self.height, -1)[::-1]

    def seek(self, position: int) -> None:
        """Nothing: the Resizer only ever goes back to the start."""

    def read(self) -> memoryview:
        """The whole file."""
        return self.data.data


def check_jpeg(body: bytes, height: int, width: int) -> bool:
    """Whether libjpeg decodes it without a complaint. At an eighth of the size, that is by reading it and little else.

    Raises ImageError for a damaged one; False is for what looks right but has something odd in the file.
    """
    check_scans(body)
    try:
        # Without the minima simplejpeg would not scale at all.
        rows, columns = -(-height // 8), -(-width // 8)
        simplejpeg.decode_jpeg(body, "GRAY", min_height=rows, min_width=columns, min_factor=8, strict=True)
    except ValueError as error:
        check_complaint(error)
        return False
    return True


def decode_jpeg(body: bytes) -> UInt8Array:
    """uint8[H, W, 3] BGR, or uint8[H, W] of a grey one: OpenCV's pixels, without its words on standard error.

    Raises ImageError for a damaged one.
    """
    check_scans(body)
    colour = "GRAY" if simplejpeg.decode_jpeg_header(body, strict=False)[2] == "Gray" else "BGR"
    try:
        pixels = simplejpeg.decode_jpeg(body, colour, strict=True)
    except ValueError as error:
        check_complaint(error)
        try:
            pixels = simplejpeg.decode_jpeg(body, colour, strict=False)
        except ValueError as fatal:
            raise ImageError(f"the image is damaged ({fatal})") from fatal
    return pixels[:, :, 0] if colour == "GRAY" else pixels


def check_complaint(error: ValueError) -> None:
    """Raise ImageError where libjpeg's complaint means that a part of the picture is lost."""
    if DAMAGE.search(str(error)):
        raise ImageError(f"the image is damaged ({error})") from error


def check_scans(body: bytes) -> None:
    """Raise ImageError for a JPEG that would be decoded over and over."""
    if has_one_scan(body):  # to count in the whole body takes a twentieth of all that is done to a picture
        return
    scans = body.count(START_OF_SCAN)
    if scans > MAX_SCANS:
        raise ImageError(f"the image is damaged ({scans} scans)")


def decode_odd(body: bytes, is_grey: bool, max_pixels: int) -> UInt8Array:
    """uint8[H, W, 3] BGR, or uint8[H, W] of a grey one, of any format: upright, on white. Raises ImageError."""
    check_scans(body)
    pixels = decode(body, max_pixels)
    return np.ascontiguousarray(pixels[:, :, 0] if is_grey else pixels[:, :, ::-1])


def read_exif(block: bytes) -> str | None:
    """EXIF's tags as JSON, as img2dataset writes them: through exifread, without thumbnails and makers' notes.

    `block` is the TIFF file that EXIF is, as it stands in files of other formats, or a whole TIFF file.
    """
    import exifread

    try:
        tags = exifread.process_file(io.BytesIO(block.removeprefix(b"Exif\0\0")), details=False)
    except Exception:  # exifread raises nearly every built-in exception on broken tags, and a picture needs none
        return None
    return json.dumps({name: str(tag).strip() for name, tag in tags.items() if tag is not None}) if tags else None
