"""What becomes of a fetched body: a JPEG of the size asked for, or the reason why not."""

from dataclasses import dataclass
from typing import Any, Literal

ResizeMode = Literal["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"]
MAX_PIXELS = 80_000_000


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are resized and encoded, as img2dataset names it, and which are refused."""

    image_size: int = 256
    resize_mode: ResizeMode = "keep_ratio"
    resize_only_if_bigger: bool = True
    quality: int = 95
    reencode: bool = False
    """Encode anew also what needs no change, as img2dataset does by default; else such JPEGs keep their bytes."""
    min_image_size: int = 0
    max_pixels: int = MAX_PIXELS
    max_aspect_ratio: float = float("inf")


@dataclass(frozen=True)
class Picture:
    """A picture ready to be stored. Sides in pixels; `original_*` as the upright picture had them."""

    jpg: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    exif: str | None
    """The EXIF tags as JSON, None where the file has none."""
    sha256: str
    """Of the body as fetched."""
    format: str
    """What was fetched, as Pillow names it: JPEG, PNG, WEBP …"""


class PictureError(Exception):
    """A body that gave no picture: `reason` is one of clipkit.tfrecord_tools.reasons, `message` says it to a person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class PictureMaker:
    """Makes pictures under one set of settings. May be called from several threads at once."""

    def __init__(self, settings: PictureSettings) -> None:
        """Raises UserError for settings that can't be."""
        raise NotImplementedError

    def __call__(self, body: bytes) -> Picture:
        """Raises PictureError."""
        raise NotImplementedError


def make_picture(body: bytes, settings: PictureSettings) -> Picture:
    """One picture; for many make a PictureMaker once. Raises PictureError."""
    return PictureMaker(settings)(body)


def import_resizer() -> Any:
    """img2dataset's Resizer class, without what its package drags in."""
    raise NotImplementedError
