"""What becomes of a fetched body: a JPEG of the size asked for, or the reason why not.

The pixels are img2dataset's: its Resizer makes what has to be resized or encoded, byte for byte the same. Around it
stand our checks (the size is read from the header before anything is decoded; a body that is cut off, damaged or a web
page says so) and our decoding, for the Resizer clips 16 bits to white, ignores EXIF's rotation and prints the decoder's
complaints. A JPEG that needs no change keeps its bytes: that is better than encoding it again, and twice as fast.

Colour profiles are left alone: kept with the bytes where those are kept, dropped without conversion elsewhere.
"""

import contextlib
import hashlib
import io
import logging
import threading
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
from PIL import Image

from clipkit.errors import UserError
from clipkit.pixels.images import (
    FORMATS,
    MAX_PIXELS,
    ORIENTATION,
    ImageError,
    check_size,
    describe_failure,
    header_size,
    plain_jpeg_size,
)
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.pictures.decode import Bitmap, Header, check_jpeg, decode_jpeg, decode_odd, read_exif
from clipkit.tfrecord_tools.pictures.resizer import import_resizer
from clipkit.tfrecord_tools.pictures.sniff import is_truncated

ResizeMode = Literal["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"]

JPEG_MAX_SIDE = 65_500
OPENCV_MAX_PIXELS = 1 << 30
# On its way a picture takes about nine bytes a pixel; the largest of several threads together would fill a worker's
# memory, so those above this size are made one at a time.
LARGE_PIXELS = 8_000_000
ROTATED = range(2, 9)


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are resized and encoded, as img2dataset names it, and which are refused."""

    image_size: int = 256
    resize_mode: ResizeMode = "keep_ratio"
    resize_only_if_bigger: bool = True
    quality: int = 95
    reencode: bool = False
    """Encode again also what needs no change, as img2dataset does unless told otherwise (`skip_reencode`)."""
    min_image_size: int = 0
    max_pixels: int = MAX_PIXELS
    max_aspect_ratio: float = float("inf")

    def check(self) -> None:
        """Raise UserError for invalid settings."""
        if self.resize_mode not in get_args(ResizeMode):
            raise UserError(f"unknown resize mode {self.resize_mode!r}: choose {', '.join(get_args(ResizeMode))}")
        if self.image_size < 1:
            raise UserError(f"image size {self.image_size} is too small: give a number of pixels, such as 256")
        if not 1 <= self.quality <= 100:
            raise UserError(f"JPEG quality {self.quality} is out of range: give 1 to 100")
        if not 1 <= self.max_pixels <= OPENCV_MAX_PIXELS:
            raise UserError(f"max pixels {self.max_pixels} is out of range: give 1 to {OPENCV_MAX_PIXELS:,}")
        if self.max_aspect_ratio < 1:
            raise UserError(
                f"max aspect ratio {self.max_aspect_ratio} is below 1: it is the longer side by the shorter"
            )

    def keeps_size(self, height: int, width: int) -> bool:
        """Whether the Resizer would give an image of these sides back as it is."""
        if self.resize_mode == "no":
            return True
        by_shorter = self.resize_mode in ("keep_ratio", "center_crop")
        side = min(height, width) if by_shorter else max(height, width)
        if side != self.image_size:
            return side < self.image_size and self.resize_only_if_bigger
        keeps_ratio = self.resize_mode in ("keep_ratio", "keep_ratio_largest")
        return keeps_ratio or self.resize_only_if_bigger or height == width


@dataclass(frozen=True)
class Picture:
    """A picture ready to be stored. Sides in pixels; `original_*` are those of the upright picture as fetched."""

    jpg: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    exif: str | None
    """EXIF's tags of the body as JSON, named and written as img2dataset does; None where there are none.

    The orientation among them is the body's: `jpg` is upright."""
    sha256: str
    """Of the body as fetched, in hex digits."""
    format: str
    """What was fetched, as Pillow names it: JPEG, PNG, WEBP …"""


class PictureError(Exception):
    """A body that gave no picture: `reason` is one of clipkit.tfrecord_tools.reasons, `message` says it to a person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class PictureMaker:
    """Makes pictures under one set of settings. May be called from several threads at once."""

    def __init__(self, settings: PictureSettings) -> None:
        """Raises UserError for invalid settings.

        Takes OpenCV's threads from the process, and silences what Pillow and exifread say about odd files: a worker
        has threads of its own, and sees a million odd files.
        """
        settings.check()
        self.settings = settings
        self.large = threading.Lock()
        self.resize = import_resizer()(
            image_size=settings.image_size,
            resize_mode=settings.resize_mode,
            resize_only_if_bigger=settings.resize_only_if_bigger,
            encode_quality=settings.quality,
        )
        cv2.setNumThreads(1)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", message="value is deprecated, use fill")  # img2dataset to albumentations
        logging.getLogger("exifread").setLevel(logging.CRITICAL)

    def __call__(self, body: bytes) -> Picture:
        """The picture in a body. Raises PictureError, and nothing else, for any bytes."""
        try:
            return self.make(body)
        except ImageError as error:
            reason = reasons.TRUNCATED if "truncated" in str(error) else reasons.NOT_AN_IMAGE
            raise PictureError(reason, str(error)) from error
        except MemoryError as error:
            raise PictureError(reasons.OTHER, "the memory is too small to decode the image") from error

    def make(self, body: bytes) -> Picture:
        """The same, but raises ImageError where `clipkit.pixels.images` does."""
        if not body:
            raise PictureError(reasons.EMPTY, "the answer has no bytes")
        if is_truncated(body):
            raise PictureError(reasons.TRUNCATED, "the image ends before its end")
        if sides := header_size(body):
            self.check_sides(*sides)
        # A JPEG whose chroma has a size that TurboJPEG knows no name for looks plain, but only Pillow decodes it.
        plain = plain_jpeg_size(body, exif=False) if sides else None
        found = Header("JPEG", None, *plain) if plain else self.read_header(body)
        with self.large if found.height * found.width > LARGE_PIXELS else contextlib.nullcontext():
            return self.decoded(body, found)

    def decoded(self, body: bytes, found: Header) -> Picture:
        """The picture of a body whose header is known."""
        changes = self.settings.reencode or not self.settings.keeps_size(found.height, found.width)
        if found.is_odd:
            if found.format == "JPEG":
                check_jpeg(body, found.height, found.width)
            jpg, sides = self.resized(Bitmap(decode_odd(body, found.is_grey, self.settings.max_pixels)))
        elif not changes and check_jpeg(body, found.height, found.width):
            jpg, sides = body, (found.width, found.height, found.width, found.height)
        else:
            jpg, sides = self.resized(Bitmap(decode_jpeg(body)))
        return Picture(jpg, *sides, found.exif, hashlib.sha256(body).hexdigest(), found.format)

    def read_header(self, body: bytes) -> Header:
        """What Pillow says of a file before it decodes it. Raises PictureError and ImageError."""
        try:
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                self.check_sides(image.height, image.width)
                block = body if image.format == "TIFF" else image.info.get("exif", b"")
                may_turn = block or "xmp" in image.info or "XML:com.adobe.xmp" in image.info
                rotated = image.getexif().get(ORIENTATION) in ROTATED if may_turn else False
                # An MPO is a JPEG with more behind it.
                kind = "JPEG" if image.format == "MPO" else image.format or ""
                return Header(
                    format=kind,
                    exif=read_exif(block) if block else None,
                    height=image.height,
                    width=image.width,
                    is_odd=kind != "JPEG" or image.mode not in ("L", "RGB") or rotated or header_size(body) is None,
                    is_grey=image.mode == "L" and not image.has_transparency_data,
                )
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise PictureError(reasons.TOO_MANY_PIXELS, f"the image has too many pixels ({error})") from error
        except (PictureError, UserError, MemoryError):
            raise
        except Exception as error:  # Pillow's readers raise nearly every built-in exception on broken bytes
            raise ImageError(describe_failure(body, error)) from error

    def check_sides(self, height: int, width: int) -> None:
        """Raise PictureError for an image that the settings refuse, ImageError for one without pixels."""
        limit = self.settings
        if height * width > limit.max_pixels:
            message = f"{width} x {height} pixels are more than the {limit.max_pixels:,} allowed"
            raise PictureError(reasons.TOO_MANY_PIXELS, message)
        check_size(height, width, limit.max_pixels)
        if min(height, width) < limit.min_image_size:
            message = f"{width} x {height} pixels: the shorter side is below {limit.min_image_size}"
            raise PictureError(reasons.TOO_SMALL, message)
        if max(height, width) > min(height, width) * limit.max_aspect_ratio:
            message = f"{width} x {height} pixels: longer than {limit.max_aspect_ratio:g} to 1"
            raise PictureError(reasons.ASPECT_RATIO, message)

    def resized(self, bitmap: Bitmap) -> tuple[bytes, tuple[int, int, int, int]]:
        """The picture as img2dataset's Resizer resizes and encodes it: its width and height, and those before."""
        self.check_result(bitmap.height, bitmap.width)
        jpg, width, height, original_width, original_height, error = self.resize(bitmap)
        if error is not None:
            message = f"img2dataset can't resize it: {' '.join(str(error).split())}"
            raise PictureError(reasons.OTHER, message)
        return jpg, (width, height, original_width, original_height)

    def check_result(self, height: int, width: int) -> None:
        """Raise PictureError where a long strip would be enlarged beyond all measure, or beyond what a JPEG holds."""
        scale = 1.0
        if not self.settings.keeps_size(height, width):
            by_shorter = self.settings.resize_mode in ("keep_ratio", "center_crop")
            scale = self.settings.image_size / (min(height, width) if by_shorter else max(height, width))
        longer, pixels = max(height, width) * scale, height * width * scale * scale
        if longer > JPEG_MAX_SIDE or (scale > 1 and pixels > self.settings.max_pixels):
            message = f"{width} x {height} pixels would become {longer:.0f} long, more than a JPEG should be"
            raise PictureError(reasons.ASPECT_RATIO, message)
