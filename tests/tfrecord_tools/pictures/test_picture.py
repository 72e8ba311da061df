"""Pictures are img2dataset's, byte for byte; what is odd comes out right, and what is bad says why."""

import hashlib
import io
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from natural_images import encoded, natural
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from clipkit.errors import UserError
from clipkit.pixels.images import ImageError, decode, has_one_scan, plain_jpeg_size
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.pictures import picture
from clipkit.tfrecord_tools.pictures.picture import Picture, PictureError, PictureMaker, PictureSettings
from clipkit.tfrecord_tools.pictures.resizer import import_resizer

PIXELS = natural(200, 300)
COLOUR = Image.fromarray(PIXELS)
WHOLE = PictureSettings(image_size=1000)
"""Settings under which nothing has to be resized."""


def make_picture(body: bytes, settings: PictureSettings) -> Picture:
    return PictureMaker(settings)(body)


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


def failure(body: bytes, wanted: PictureSettings = WHOLE) -> tuple[str, str]:
    with pytest.raises(PictureError) as caught:
        make_picture(body, wanted)
    assert caught.value.reason in reasons.REASONS
    assert str(caught.value) == caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.reason, caught.value.message


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = value, "Canon"
    return exif


# ---- img2dataset's pixels --------------------------------------------------------------------------------------------

MODES = ["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("RGB", {"kind": "JPEG", "quality": 90}),
    "progressive": ("RGB", {"kind": "JPEG", "progressive": True, "subsampling": 0}),
    "grey jpeg": ("L", {"kind": "JPEG"}),
    "png": ("RGB", {"kind": "PNG"}),
    "grey png": ("L", {"kind": "PNG"}),
    "webp": ("RGB", {"kind": "WEBP", "lossless": True}),
    "bmp": ("RGB", {"kind": "BMP"}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("only_if_bigger", [False, True])
def test_equals_img2dataset(mode: Any, only_if_bigger: bool) -> None:
    maker = PictureMaker(PictureSettings(128, mode, only_if_bigger, quality=90, reencode=True))
    resizer = import_resizer()(128, mode, only_if_bigger, encode_quality=90)
    for (height, width), kind in itertools.product([(100, 150), (128, 128), (120, 300), (301, 150)], KINDS):
        colours, options = KINDS[kind]
        body = encoded(Image.fromarray(natural(height, width)).convert(colours), **options)
        picture = maker(body)
        expected = resizer(io.BytesIO(body))
        assert expected == (*sides(picture), None), (kind, height, width)


def sides(picture: Picture) -> tuple[bytes, int, int, int, int]:
    return picture.jpg, picture.width, picture.height, picture.original_width, picture.original_height


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("only_if_bigger", [False, True])
def test_bytes_are_kept_where_nothing_changes(mode: Any, only_if_bigger: bool) -> None:
    """As img2dataset's skip_reencode keeps them, and also where it would only copy the pixels."""
    maker = PictureMaker(PictureSettings(128, mode, only_if_bigger))
    resizer = import_resizer()(128, mode, only_if_bigger, skip_reencode=True)
    for height, width in [(100, 150), (128, 128), (128, 300), (64, 128), (301, 150)]:
        body = encoded(natural(height, width), quality=90)
        picture = maker(body)
        expected = resizer(io.BytesIO(body))
        assert (picture.width, picture.height) == expected[1:3]
        unchanged = (picture.width, picture.height) == (width, height)
        assert (picture.jpg == body) == unchanged
        if not unchanged:
            assert sides(picture) == expected[:5]
        elif picture.jpg != expected[0]:
            np.testing.assert_array_equal(decode(expected[0]).shape, decode(body).shape)
            assert not only_if_bigger


def test_what_is_told_beside_the_picture() -> None:
    body = encoded(COLOUR, quality=80)
    picture = make_picture(body, PictureSettings(image_size=100))
    assert (picture.original_width, picture.original_height) == (300, 200)
    assert (picture.width, picture.height) == (150, 100)
    assert (picture.format, picture.exif) == ("JPEG", None)
    assert picture.sha256 == hashlib.sha256(body).hexdigest()


def test_exif_is_written_as_img2dataset_writes_it() -> None:
    import exifread

    body = encoded(COLOUR, exif=with_orientation(1), quality=95)
    picture = make_picture(body, WHOLE)
    assert picture.jpg == body
    expected = {name: str(tag).strip() for name, tag in exifread.process_file(io.BytesIO(body), details=False).items()}
    assert picture.exif is not None
    assert json.loads(picture.exif) == expected
    assert expected["Image Make"] == "Canon"


# ---- Odd pictures that come out right --------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_baked_in(orientation: int, kind: str) -> None:
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of each, as Pillow numbers its transpositions
    stored = COLOUR.transpose(Image.Transpose(turned[orientation])) if orientation > 1 else COLOUR
    body = encoded(stored, kind, exif=with_orientation(orientation), quality=95)
    for wanted, side in ((WHOLE, 200), (PictureSettings(image_size=100), 100)):
        picture = make_picture(body, wanted)
        assert (picture.original_width, picture.original_height) == (300, 200)
        assert (picture.width, picture.height) == (side * 3 // 2, side)
        plain = np.asarray(Image.open(io.BytesIO(picture.jpg)))  # a reader that heeds no EXIF
        assert mean_difference(plain, np.asarray(COLOUR.resize((side * 3 // 2, side), Image.Resampling.BOX))) < 5
    assert picture.exif is not None
    assert "Image Orientation" in json.loads(picture.exif)


def test_sixteen_bits() -> None:
    grey = PIXELS[:, :, 0].astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        picture = make_picture(encoded(Image.fromarray(grey), kind), WHOLE)
        assert mean_difference(decode(picture.jpg)[:, :, 0], PIXELS[:, :, 0]) < 2
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.astype(np.uint16) * 257)
    assert make_picture(png((300, 200), 16, 2, rows), WHOLE).jpg == make_picture(encoded(COLOUR, "PNG"), WHOLE).jpg


def test_cmyk_and_other_colours_of_jpeg() -> None:
    cmyk = encoded(COLOUR.convert("CMYK"), quality=95)
    assert mean_difference(decode(make_picture(cmyk, WHOLE).jpg), PIXELS) < 6
    rgb = encoded(COLOUR, quality=95, keep_rgb=True)
    assert make_picture(rgb, WHOLE).jpg == rgb
    resized = make_picture(rgb, PictureSettings(image_size=100)).jpg
    assert mean_difference(decode(resized), np.asarray(COLOUR.resize((150, 100), Image.Resampling.BOX))) < 3


def test_transparency_is_laid_on_white() -> None:
    alpha = np.zeros((200, 300), np.uint8)
    alpha[:, 150:] = 255
    clear = COLOUR.copy()
    clear.putalpha(Image.fromarray(alpha))
    palette = COLOUR.quantize(16)
    grey = clear.convert("LA")
    bodies = [
        encoded(clear, "PNG"),
        encoded(clear, "WEBP", lossless=True),
        encoded(clear, "TIFF"),
        encoded(grey, "PNG"),
    ]
    for body in bodies:
        pixels = decode(make_picture(body, WHOLE).jpg)
        assert pixels[:, :140].min() > 250
        assert mean_difference(pixels[:, 160:].mean(2), PIXELS[:, 160:].mean(2)) < 12
    index = np.asarray(palette)[100, 100]
    pixels = decode(make_picture(encoded(palette, "PNG", transparency=int(index)), WHOLE).jpg)
    assert pixels[100, 100].min() > 230
    plain = decode(make_picture(encoded(palette, "PNG"), WHOLE).jpg)
    assert mean_difference(plain, np.asarray(palette.convert("RGB"))) < 6
    grey_with_key = encoded(COLOUR.convert("L"), "PNG", transparency=int(np.asarray(COLOUR.convert("L"))[100, 100]))
    assert decode(make_picture(grey_with_key, WHOLE).jpg)[100, 100].min() > 200


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "lime", "blue")]
    body = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    picture = make_picture(body, WHOLE)
    assert picture.format == kind
    assert mean_difference(decode(picture.jpg), np.asarray(frames[0])) < 6


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO"])
def test_other_formats(kind: str) -> None:
    assert kind != "AVIF" or features.check("avif")
    picture = make_picture(encoded(COLOUR, kind), WHOLE)
    assert picture.format == kind
    assert mean_difference(decode(picture.jpg), np.asarray(COLOUR.resize((picture.width, picture.height)))) < 6


def test_a_colour_profile_stays_where_the_bytes_stay() -> None:
    body = encoded(COLOUR, quality=90, icc_profile=b"profile" * 20)
    assert make_picture(body, WHOLE).jpg == body
    resized = Image.open(io.BytesIO(make_picture(body, PictureSettings(image_size=100)).jpg))
    assert "icc_profile" not in resized.info


# ---- Bad bodies ------------------------------------------------------------------------------------------------------


def png(size: tuple[int, int], bits: int, colours: int, rows: bytes) -> bytes:
    data = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", *size, bits, colours, 0, 0, 0)
    for name, body in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data


def huge(kind: str) -> bytes:
    """A small file whose header says 50,000 x 50,000 pixels; of AVIF 16,000, for libavif itself opens no larger one."""
    side = 16_000 if kind == "AVIF" else 50_000
    if kind == "PNG":
        return png((side, side), 8, 2, b"")
    body = bytearray(encoded(Image.new("RGB", (64, 48)), kind, **({"compression": None} if kind == "TIFF" else {})))
    if kind == "JPEG":
        at = body.index(b"\xff\xc0") + 5
        body[at : at + 4] = struct.pack(">HH", side, side)
    elif kind == "GIF":
        body[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        body[18:26] = struct.pack("<ii", side, side)
    elif kind == "WEBP":  # a VP8X header in front of the image
        chunk = b"VP8X" + struct.pack("<IB3x", 10, 0) + 2 * (side - 1).to_bytes(3, "little")
        body[12:12] = chunk
        body[4:8] = struct.pack("<I", len(body) - 8)
    elif kind == "TIFF":
        for tag, old in ((256, 64), (257, 48)):
            entry = body.index(struct.pack("<HHI", tag, 4, 1) + struct.pack("<I", old))
            body[entry + 8 : entry + 12] = struct.pack("<I", side)
    elif kind == "AVIF":
        at = body.index(b"ispe") + 8
        body[at : at + 8] = struct.pack(">II", side, side)
    return bytes(body)


def test_the_pixel_cap_is_read_from_the_header(tmp_path: Path) -> None:
    """In a process that could not hold the pixels."""
    kinds = ["AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]
    for kind in kinds:
        (tmp_path / kind).write_bytes(huge(kind))
    code = (
        "import resource, sys, pathlib\n"
        "from clipkit.tfrecord_tools.pictures.picture import *\n"
        "maker = PictureMaker(PictureSettings())\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: maker(path.read_bytes())\n"
        "    except PictureError as error: print(path.name, error.reason)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{kind} too-many-pixels" for kind in kinds]
    assert done.stderr == ""


def test_sides_that_are_refused() -> None:
    body = encoded(COLOUR)
    assert failure(body, PictureSettings(max_pixels=59_999))[0] == reasons.TOO_MANY_PIXELS
    assert make_picture(body, PictureSettings(max_pixels=60_000)).width == 300
    assert failure(body, PictureSettings(min_image_size=201)) == (
        reasons.TOO_SMALL,
        "300 x 200 pixels: the shorter side is below 201",
    )
    assert make_picture(body, PictureSettings(min_image_size=200)).height == 200
    assert failure(body, PictureSettings(max_aspect_ratio=1.4))[0] == reasons.ASPECT_RATIO
    assert make_picture(body, PictureSettings(max_aspect_ratio=1.5)).height == 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_long_strips_are_not_enlarged_without_measure(kind: str) -> None:
    body = encoded(Image.new("RGB", (9000, 2)), kind)
    assert failure(body, PictureSettings(256, "keep_ratio", False))[0] == reasons.ASPECT_RATIO
    assert make_picture(body, PictureSettings(256, "keep_ratio", True)).width == 9000
    too_long = encoded(Image.new("RGB", (70_000, 2)), "PNG")
    assert failure(too_long, PictureSettings(256, "no"))[0] == reasons.ASPECT_RATIO


@pytest.mark.parametrize(
    ("body", "reason", "message"),
    [
        (b"", reasons.EMPTY, "the answer has no bytes"),
        (b"<!DOCTYPE html><title>gone</title>", reasons.NOT_AN_IMAGE, "not an image but an HTML page"),
        (b"\n <html>", reasons.NOT_AN_IMAGE, "not an image but an HTML page"),
        (b"GIF89a", reasons.NOT_AN_IMAGE, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", reasons.NOT_AN_IMAGE, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", reasons.NOT_AN_IMAGE, "not an image"),
        (b"\0" * 1000, reasons.NOT_AN_IMAGE, "not an image"),
        (encoded(COLOUR)[:-100], reasons.TRUNCATED, "the image ends before its end"),
        (encoded(COLOUR, "PNG")[:-100], reasons.TRUNCATED, "the image ends before its end"),
        (encoded(COLOUR, "WEBP")[:-100], reasons.TRUNCATED, "the image ends before its end"),
        (encoded(COLOUR, "GIF")[:-9000], reasons.TRUNCATED, "truncated"),
        (encoded(COLOUR, "BMP")[:-100], reasons.TRUNCATED, "truncated"),
        (png((0, 5), 8, 2, b""), reasons.NOT_AN_IMAGE, "no pixels"),
        (png((5, 5), 8, 2, b"\0" * 10), reasons.TRUNCATED, "truncated"),
    ],
)
def test_bad_bodies(body: bytes, reason: str, message: str) -> None:
    found, said = failure(body)
    assert found == reason
    assert re.search(message, said)


@pytest.mark.parametrize("exif", [None, with_orientation(1), with_orientation(6)])
@pytest.mark.parametrize("wanted", [WHOLE, PictureSettings(image_size=100)])
def test_a_jpeg_with_lost_data_is_damaged(exif: Image.Exif | None, wanted: PictureSettings) -> None:
    """OpenCV and Pillow call it a success, and go on with shifted colours."""
    body = bytearray(encoded(COLOUR, quality=95, **({"exif": exif} if exif else {})))
    middle = len(body) // 2
    body[middle : middle + 3000] = b""
    assert failure(bytes(body), wanted)[1].startswith("the image is damaged (Corrupt JPEG data")


def test_a_jpeg_that_is_odd_but_whole_is_encoded_anew() -> None:
    clean = encoded(COLOUR, quality=95)
    body = clean[:-2] + b"\0\0\0" + clean[-2:]
    picture = make_picture(body, WHOLE)
    assert picture.jpg != body
    assert mean_difference(decode(picture.jpg), decode(clean)) < 2


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    body = encoded(COLOUR, progressive=True)
    at = body.rindex(b"\xff\xda")
    assert "scans" in failure(body[:-2] + body[at:-2] * 100 + body[-2:])[1]


def hidden(body: bytes) -> bytes:
    """The JPEG with a fill byte before its frame, and a comment in which who stumbles over that sees another frame."""
    frame = body.index(b"\xff\xc2" if b"\xff\xc2" in body else b"\xff\xc0")
    lie = b"\xff\xc0\x00\x11\x08\x00\x64\x00\x64\x03" + bytes(9) + b"\xff\xda\x00\x0c\x03" + bytes(9)
    # Read from the fill byte on, the marker is FFFF and its length the frame's own marker: C200 or C000.
    reach = frame + 2 + int.from_bytes(body[frame + 1 : frame + 2] + b"\x00", "big")
    tables = bytearray(b"\xff\xfe\xff\xff" + bytes(0xFFFD))
    changed = bytearray(body[:frame] + b"\xff" + body[frame:])
    end_of_frame = frame + 1 + 2 + int.from_bytes(body[frame + 2 : frame + 4], "big")
    changed[end_of_frame:end_of_frame] = tables
    changed[reach : reach + len(lie)] = lie
    return bytes(changed)


def test_a_fill_byte_hides_neither_size_nor_scans() -> None:
    large = hidden(encoded(natural(300, 400)))
    assert plain_jpeg_size(large) is None
    with pytest.raises(ImageError, match="more than"):
        decode(large, max_pixels=100_000)
    body = encoded(COLOUR, progressive=True)
    at = body.rindex(b"\xff\xda")
    many = hidden(body[:-2] + body[at:-2] * 100 + body[-2:])
    assert not has_one_scan(many)
    assert "scans" in failure(many)[1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("side", [20, 100])
def test_what_xmp_turns_is_turned_too(kind: str, side: int) -> None:
    """Resized or kept: the sides that are told are those that are seen, and what is encoded anew lies upright."""
    turned = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    body = encoded(natural(40, 60), kind, **({"pnginfo": png_xmp(turned)} if kind == "PNG" else {"xmp": turned}))
    picture = make_picture(body, PictureSettings(image_size=side, resize_mode="keep_ratio", resize_only_if_bigger=True))
    assert picture.height > picture.width
    assert decode(picture.jpg).shape == (picture.height, picture.width, 3)
    assert decode(body).shape == (60, 40, 3)


def png_xmp(text: bytes) -> PngInfo:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", text.decode())
    return info


@pytest.mark.parametrize("kind", ["all colours in one scan", "a scan for each colour", "progressive"])
def test_no_jpeg_is_decoded_over_and_over(kind: str) -> None:
    """Whatever the first scan says it holds, and whatever comes behind it: refused, or no slower than a plain one."""
    body = bytearray(encoded(natural(240, 320), progressive=kind == "progressive"))
    scan = body.index(b"\xff\xda")
    if kind == "a scan for each colour":
        body[scan:] = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + body[scan + 14 :]
    scan = body.index(b"\xff\xda")
    many = bytes(body[:-2] + body[scan:-2] * 200 + body[-2:])
    began = time.process_time()
    assert has_one_scan(many) == (kind == "all colours in one scan")
    assert ("Didn't expect more than one scan" if has_one_scan(many) else "scans)") in failure(many, SMALL)[1]
    assert time.process_time() - began < 0.5


def test_settings_that_can_not_be() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"resize_mode": "stretch"}, "unknown resize mode 'stretch': choose no, keep_ratio"),
        ({"image_size": 0}, "image size 0"),
        ({"quality": 101}, "quality 101"),
        ({"max_pixels": 2 << 30}, "max pixels 2147483648 is out of range"),
        ({"max_aspect_ratio": 0.5}, "max aspect ratio 0.5"),
    ]
    for values, message in wrong:
        with pytest.raises(UserError, match=message):
            PictureMaker(PictureSettings(**values))


BODIES = [
    encoded(natural(40, 60), kind, **options)
    for kind, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": with_orientation(6)}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("BMP", {}),
        ("AVIF", {}),
    )
]
SMALL = PictureSettings(image_size=30, max_pixels=1_000_000)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BODIES), st.data())
def test_any_bytes_end_in_a_picture_or_a_reason(body: bytes, data: st.DataObject) -> None:
    broken = bytearray(body)
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(broken) - 1))
        broken[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not broken:
            break
    try:
        picture = make_picture(bytes(broken), SMALL)
    except PictureError as error:
        assert error.reason in reasons.REASONS
        assert "\n" not in error.message
    else:
        assert decode(picture.jpg).shape == (picture.height, picture.width, 3)


@pytest.mark.parametrize("sampling", [0x14, 0x24, 0x42, 0x31, 0x13])
def test_chroma_of_a_size_that_turbojpeg_cannot_name_is_decoded(sampling: int) -> None:
    """Libjpeg itself decodes such files: the picture here is garbled by the changed byte, but the file is whole."""
    body = bytearray(encoded(natural(40, 60)))
    luma = body.index(b"\xff\xc0") + 11
    assert body[luma] == 0x22
    body[luma] = sampling
    if sampling == 0x14:  # here the changed byte asks for more data than the file has
        assert "premature end" in failure(bytes(body), SMALL)[1]
    else:
        picture = make_picture(bytes(body), SMALL)
        assert decode(picture.jpg).shape == (picture.height, picture.width, 3)


# ---- In a worker -----------------------------------------------------------------------------------------------------


def test_many_threads_make_the_same_pictures_and_leave_the_output_alone(capfd: pytest.CaptureFixture[str]) -> None:
    maker = PictureMaker(PictureSettings(image_size=50))
    bodies = [encoded(natural(120, 160, seed), kind) for seed in range(3) for kind in ("JPEG", "PNG")]
    bodies.append(encoded(natural(120, 160, 7))[:900] + bytes(3000) + b"\xff\xd9")

    def outcome(body: bytes) -> object:
        try:
            return maker(body)
        except PictureError as error:
            return str(error)

    expected = [outcome(body) for body in bodies]
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for _ in range(10) for i, body in enumerate(bodies) if outcome(body) != expected[i])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    os.write(1, b"still here")
    out, err = capfd.readouterr()
    assert (out, err) == ("still here", "")


def test_large_pictures_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "LARGE_PIXELS", 50 * 50)
    maker = PictureMaker(PictureSettings(image_size=50))
    large, small = encoded(natural(60, 80, 1)), encoded(natural(40, 50, 2))
    made: list[str] = []
    with maker.large:
        thread = threading.Thread(target=lambda: made.append(maker(large).format))
        thread.start()
        assert maker(small).format == "JPEG"
        thread.join(0.2)
        assert not made
    thread.join(30)
    assert made == ["JPEG"]


def test_importing_the_resizer_is_light_and_hides_nothing_afterwards() -> None:
    code = (
        "import sys\n"
        "from clipkit.tfrecord_tools.pictures.resizer import import_resizer\n"
        "import_resizer()\n"
        "print([name for name in ('torch', 'pandas', 'wandb', 'fire') if name in sys.modules])\n"
        "import importlib.util\n"
        "print(importlib.util.find_spec('torch') is not None)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nTrue\n"
