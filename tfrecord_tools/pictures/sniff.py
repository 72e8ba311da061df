"""What an image file is, and whether it is whole, by its bytes, because decoders differ.

Some versions of OpenCV fill the missing part of a JPEG with grey and call it a success; a model would learn the grey.
TensorFlow's decoder, on the other hand, fails on such a file.
"""

import re

# In JPEG's entropy-coded data a 0xFF byte is followed by 0 or by a restart marker; anything else is the next marker.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
JPEG_END = 0xD9
END_OF_FILE = bytes((0xFF, JPEG_END))


def is_truncated(data: bytes) -> bool:
    """Whether a JPEG, PNG or WebP file ends before its own end marker or length says.

    Of any other format the decoder is to judge.
    """
    match image_format(data):
        case "jpeg":
            return is_truncated_jpeg(data)
        case "png":
            return is_truncated_png(data)
        case "webp":
            return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return False


def is_truncated_jpeg(data: bytes) -> bool:
    """Walk the segments (ITU-T T.81, annex B) to the end marker. A thumbnail's own end marker lies inside a segment.

    Nearly every file ends in the marker, or in zeros behind it, and need not be walked.
    """
    if data.endswith(END_OF_FILE) or (data.endswith(b"\0") and data.rstrip(b"\0").endswith(END_OF_FILE)):
        return False
    position = 2
    while match := JPEG_MARKER.search(data, position):
        marker = data[match.start() + 1]
        if marker == JPEG_END:
            return False
        length = int.from_bytes(data[match.end() : match.end() + 2], "big")
        position = match.end() + max(length, 2)
    return True


def is_truncated_png(data: bytes) -> bool:
    """Walk the chunks (length, type, data, CRC) to IEND."""
    position = 8
    while position + 8 <= len(data):
        if data[position + 4 : position + 8] == b"IEND":
            return False
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return True


# The formats that `image_format` tells, by the numbers that notes have for them: all that `clipkit.pixels` decodes.
FORMATS = ("jpeg", "png", "bmp", "webp", "gif", "tiff", "avif", "jpeg2000", "ppm", "ico")
# PBM, PGM and PPM as text and as bytes, and PFM: two letters and a white space.
PPM = re.compile(rb"P[1-6fF]\s")


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
    if data.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):  # with a plus, BigTIFF
        return "tiff"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):  # the last two may be HEIF as well
        return "avif"
    if data.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "jpeg2000"
    if data.startswith(b"\0\0\1\0"):
        return "ico"
    return "ppm" if PPM.match(data) else None
