"""Every kind of picture comes out right, bad ones say why, and the fast paths agree with the plain ones."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from natural_images import PIXELS, encoded, jpeg
from natural_images import natural as picture
from PIL import Image, ImageOps

from clipkit.pixels import images
from clipkit.pixels.images import (
    CLIP_MEAN,
    CLIP_STD,
    ImageError,
    decode,
    decode_scaled,
    eval_transform,
    normalise,
    plain_jpeg_size,
)

COLOUR = Image.fromarray(PIXELS)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow(subsampling: int, progressive: bool) -> None:
    data = jpeg(PIXELS, subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats(kind: str) -> None:
    np.testing.assert_array_equal(decode(encoded(COLOUR, kind)), PIXELS)


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"quality": 80, "exif": b"Exif\0\0"}])
def test_webp_equals_pillow(options: dict[str, object]) -> None:
    data = encoded(COLOUR, "WEBP", **options)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_grey(kind: str) -> None:
    pixels = decode(encoded(COLOUR.convert("L"), kind))
    assert pixels.shape == (64, 96, 3)
    assert np.abs(pixels.astype(int) - np.asarray(COLOUR.convert("L"))[:, :, None]).mean() < 6


def test_cmyk_jpeg() -> None:
    pixels = decode(encoded(COLOUR.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - PIXELS).mean() < 6


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(grey), kind))
        np.testing.assert_array_equal(pixels[:, :, 0], np.rint(grey / 257).astype(np.uint8))


def test_sixteen_bit_colour_png() -> None:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.astype(np.uint16) * 257)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 96, 64, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    np.testing.assert_array_equal(decode(data), PIXELS)


def test_transparency_is_laid_on_white() -> None:
    alpha = np.zeros((64, 96, 1), np.uint8)
    alpha[:, 48:] = 255
    clear = Image.fromarray(np.concatenate([PIXELS, alpha], 2))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        pixels = decode(encoded(clear, kind, **options))
        np.testing.assert_array_equal(pixels[:, 48:], PIXELS[:, 48:])
        assert (pixels[:, :48] == 255).all()


def test_palette_with_transparency() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    pixels = decode(encoded(palette, "PNG", transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [200, 0, 0]
    greys = Image.fromarray(np.array([[0, 100]], np.uint8)).convert("LA")
    greys.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    assert decode(encoded(greys, "PNG"))[0].tolist() == [[255] * 3, [100] * 3]


@pytest.mark.parametrize("rows", [1, 5, 63])
def test_what_is_turned_into_rgb_in_strips_is_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = Image.fromarray(PIXELS[:, :, 0])
    palette, clear = COLOUR.quantize(16), COLOUR.convert("RGBA")
    clear.putalpha(alpha)
    upright = Image.Exif()
    upright[0x0112] = 6
    kinds = [
        encoded(COLOUR, "PNG"),
        encoded(COLOUR, "PNG", transparency=tuple(PIXELS[3, 4].tolist())),
        encoded(clear, "PNG"),
        encoded(Image.merge("LA", (alpha, alpha)), "PNG"),
        encoded(alpha.convert("1"), "PNG"),
        encoded(palette, "PNG", transparency=3),
        encoded(palette, "GIF", transparency=3),
        encoded(COLOUR.convert("CMYK"), "JPEG"),
        encoded(COLOUR, "JPEG", exif=upright.tobytes()),
    ]
    whole = [decode(data) for data in kinds]
    monkeypatch.setattr(images, "STRIP_PIXELS", rows * 96)
    for data, expected in zip(kinds, whole, strict=True):
        np.testing.assert_array_equal(decode(data), expected)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=10)
        assert np.abs(decode(data).astype(int) - [255, 0, 0]).max() <= 8


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_exif_rotation(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned = decode(encoded(COLOUR, kind, exif=exif))
    plain = decode(encoded(COLOUR, kind))
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))
    assert decode_scaled(encoded(COLOUR, kind, exif=exif), 10, 10).shape[0] > 90


def test_the_headers_walked_say_what_libjpeg_says() -> None:
    for seed, (height, width) in enumerate([(64, 96), (97, 31), (8, 8), (1, 300)]):
        image = Image.fromarray(picture(height, width, seed))
        for options in ({}, {"progressive": True}, {"subsampling": 0}, {"comment": b"Exif\0 is no header here"}):
            for mode in ("RGB", "L"):
                data = encoded(image.convert(mode), "JPEG", **options)
                assert plain_jpeg_size(data) == plain_jpeg_size(memoryview(data)) == (height, width)
                assert simplejpeg.decode_jpeg_header(data)[:2] == (height, width)
        exif = Image.Exif()
        exif[0x0112] = 6
        assert plain_jpeg_size(encoded(image, "JPEG", exif=exif)) is None
        assert plain_jpeg_size(encoded(image.convert("CMYK"), "JPEG")) is None
        assert plain_jpeg_size(encoded(image, "PNG")) is None


def test_an_upright_exif_block_does_not_cost_the_fast_way() -> None:
    """Cameras write one into every file; read by Pillow, a large photograph takes ten times as long."""
    image = Image.fromarray(picture(40, 60))
    for orientation in (None, 1):
        exif = Image.Exif()
        exif[0x010F] = "a maker"
        if orientation:
            exif[0x0112] = orientation
        data = encoded(image, "JPEG", exif=exif)
        assert plain_jpeg_size(data) == (40, 60)
        assert plain_jpeg_size(data, exif=False) is None
    turned = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    assert decode(encoded(image, "JPEG", xmp=turned)).shape == (60, 40, 3)


@given(
    st.dictionaries(st.sampled_from([0x010E, 0x010F, 0x0131, 0x013B]), st.text("ab", min_size=1, max_size=9)),
    st.one_of(st.none(), st.integers(0, 9)),
    st.sampled_from("<>"),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_whatever_exif_says_the_picture_is_turned_as_pillow_turns_it(
    tags: dict[int, str], orientation: int | None, order: str, broken: list[tuple[int, int]]
) -> None:
    exif = Image.Exif()
    exif.endian = order
    exif.update(tags | ({} if orientation is None else {0x0112: orientation}))
    block = bytearray(exif.tobytes())
    for at, byte in broken:
        block[6 + at % (len(block) - 6)] = byte
    data = encoded(COLOUR, "JPEG", exif=bytes(block))
    try:
        expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    except Exception:  # broken beyond what Pillow forgives
        return
    np.testing.assert_array_equal(decode(data), expected)


@given(st.integers(2, 700), st.binary(max_size=6))
@settings(max_examples=300, deadline=None)
def test_broken_headers_raise_nothing(cut: int, junk: bytes) -> None:
    data = jpeg(PIXELS)
    size = plain_jpeg_size(data[:cut] + junk + data[cut + len(junk) :])
    assert size is None or len(size) == 2
    begin = data.index(b"\xff\xda")
    assert cut >= begin + 4 or plain_jpeg_size(data[:cut]) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_views_of_bytes_are_decoded_too(kind: str) -> None:
    data = encoded(COLOUR, kind)
    view = memoryview(b"before" + data + b"after")[6 : 6 + len(data)]
    np.testing.assert_array_equal(decode(view), decode(data))
    with pytest.raises(ImageError):
        decode(view[:40])
    with pytest.raises(ImageError, match="HTML page"):
        decode(memoryview(b"<html>no"))


BAD = {
    "empty": (b"", "no bytes"),
    "text": (b"Sorry, gone.", "not an image"),
    "page": (b"  <!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "cut jpeg": (jpeg(PIXELS)[:-900], "damaged"),
    "cut png": (encoded(COLOUR, "PNG")[:-900], "damaged"),
    "cut webp": (encoded(COLOUR, "WEBP")[:-900], "damaged|not an image"),
    "jpeg header": (jpeg(PIXELS)[:24], "damaged|not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
}


@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD)
def test_bad_bytes_say_why(data: bytes, reason: str) -> None:
    for read in (decode, lambda data: decode_scaled(data, 8, 8)):
        with pytest.raises(ImageError, match=reason) as caught:
            read(data)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_too_many_pixels_are_refused_by_the_header(kind: str) -> None:
    data = encoded(COLOUR, kind)
    with pytest.raises(ImageError, match="96 x 64 pixels"):
        decode(data, max_pixels=6000)
    with pytest.raises(ImageError, match="96 x 64 pixels"):
        decode_scaled(data, 1, 1, max_pixels=6000)
    assert decode(data, max_pixels=6144).shape == (64, 96, 3)


def test_a_decompression_bomb_costs_nothing() -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    with pytest.raises(ImageError, match="60000 x 60000"):
        decode(data)


@pytest.mark.parametrize(
    ("side", "expected"), [(256, 256), (129, 256), (128, 128), (64, 64), (33, 64), (32, 32), (1, 32)]
)
def test_scaled_decoding_gives_the_smallest_that_is_enough(side: int, expected: int) -> None:
    data = jpeg(picture(256, 320))
    assert decode_scaled(data, side, side).shape == (expected, expected * 5 // 4, 3)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (97, 64), (300, 451), (20, 30), (13, 500)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_pixels_equal_openclip(height: int, width: int, resize_mode: str, interpolation: str) -> None:
    from open_clip.transform import image_transform

    image = picture(height, width)
    transform = image_transform(64, is_train=False, resize_mode=resize_mode, interpolation=interpolation)
    expected_CHW = transform(Image.fromarray(image))
    pixels = eval_transform(image, 64, interpolation, resize_mode)
    found_BCHW = normalise(torch.from_numpy(pixels.copy())[None], CLIP_MEAN, CLIP_STD)
    assert torch.equal(found_BCHW[0], expected_CHW)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("shorter", "longer", "size"), [(1, 100, 32), (20, 700, 64), (50, 4000, 224), (90, 2000, 32)])
@pytest.mark.parametrize("is_tall", [True, False])
def test_the_middle_of_a_strip_is_that_of_the_whole(
    shorter: int, longer: int, size: int, interpolation: str, is_tall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.asarray(Image.fromarray(picture(48, 48)).resize((longer, shorter)))
    image = np.ascontiguousarray(image.transpose(1, 0, 2)) if is_tall else image
    cut = images.eval_transform(image, size, interpolation)
    monkeypatch.setattr(images, "LONGEST_RESIZED", float("inf"))
    whole = images.eval_transform(image, size, interpolation)
    assert np.abs(cut.astype(int) - whole).max() <= 1


STRIPS = """
import io, resource
import numpy as np
from PIL import Image
from clipkit.pixels.images import decode, eval_transform, thumbnail
from clipkit.train.loader.augment import Augmentation, cut, geometry_draws
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
draws = geometry_draws([3])[0].tolist()
for size in ((1, 60_000), (60_000, 1), (3, 65_000), (65_000, 2)):
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "PPM"):
        buffer = io.BytesIO()
        Image.new("RGB", size, "teal").save(buffer, kind)
        for mode in ("shortest", "squash"):
            assert eval_transform(decode(buffer.getvalue()), 336, resize_mode=mode).shape == (336, 336, 3)
        for augmentation in (Augmentation(), Augmentation(crop_area=(0.4, 1.0)), Augmentation(exact=True)):
            assert cut(buffer.getvalue(), 336, augmentation, draws).shape == (336, 336, 3)
        assert thumbnail(buffer.getvalue(), 128)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_strips_take_little_memory() -> None:
    done = subprocess.run([sys.executable, "-c", STRIPS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100
