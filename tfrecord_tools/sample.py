"""One image–text pair on its way from an image shard into a dataset, and the reasons not to take it."""

from typing import Any, NamedTuple

NO_IMAGE = "no image"
NOT_AN_IMAGE = "not an image"
TRUNCATED_IMAGE = "truncated image"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"
BAD_TEXT = "text is not UTF-8"
BAD_METADATA = "metadata is not JSON"
NOT_WANTED = "where"
DUPLICATE = "duplicate"

# What img2dataset says about its own work: the same for all samples that reach a shard.
DROPPED_COLUMNS = frozenset({"status", "error_message"})


class Sample(NamedTuple):
    """A pair as its shard holds it. `problem` is set by a reader that couldn't make sense of a part."""

    key: str
    image: bytes | None
    caption: str | None
    columns: dict[str, Any]
    problem: str | None = None


def caption_problem(caption: str | None) -> str | None:
    """The reason not to take a sample for its caption, or None."""
    if caption is None:
        return NO_CAPTION
    return None if caption.strip() else EMPTY_CAPTION


def image_format(data: bytes) -> str | None:
    """The image format that the first bytes tell, or None when they tell none."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in (12, 40, 52, 56, 64, 108, 124):
        return "bmp"
    if data.startswith((b"II*\x00", b"MM\x00*")):
        return "tiff"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "avif"
    return None
