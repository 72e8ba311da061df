"""Small copies look like the originals made smaller with care, and come out the same each time."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from natural_images import encoded, natural
from PIL import Image

from clipkit.errors import UserError
from clipkit.pixels.images import ImageError, decode
from clipkit.tfrecord_tools.pictures.compact import Compacted, compact, fit


def reduced(pixels: np.ndarray, width: int, height: int, quality: int = 90) -> np.ndarray:
    """The plain way: all pixels, Pillow's antialiased resize, and what JPEG makes of that."""
    small = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(Image.open(io.BytesIO(encoded(small, quality=quality, subsampling="4:2:0"))))


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(256, 341), (400, 256), (256, 256), (700, 900), (300, 1000)]),
    size=st.sampled_from([64, 96, 128, 160, 200]),
)
def test_close_to_full_decoding_and_antialiased_resize(seed: int, shape: tuple[int, int], size: int) -> None:
    body = encoded(natural(*shape, seed), quality=95)
    small = compact(body, size, 95)
    pixels = decode(small.jpg)
    assert pixels.shape == (small.height, small.width, 3)
    assert min(small.height, small.width) == size
    assert abs(small.width * shape[0] / (small.height * shape[1]) - 1) < 0.02
    plain = reduced(decode(body), small.width, small.height, 95)
    assert mean_difference(pixels, plain) < (2.5 if size > 64 else 3.2)
    assert compact(body, size, 95) == small


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 3000))
def test_fit(height: int, width: int, size: int) -> None:
    rows, columns = fit(height, width, size)
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert min(rows, columns) == min(size, height, width)
    assert abs(rows - height * columns / width) <= max(0.5, 0.5 * height / width) + 1e-9


def test_nothing_is_enlarged_and_small_ones_keep_their_bytes() -> None:
    body = encoded(natural(100, 150), quality=80)
    for size in (100, 101, 4000):
        assert compact(body, size, 50) == Compacted(body, 150, 100)
    small_png = compact(encoded(natural(100, 150), "PNG"), 128, 95)
    assert (small_png.width, small_png.height) == (150, 100)
    assert mean_difference(decode(small_png.jpg), reduced(natural(100, 150), 150, 100, 95)) < 2.5
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "Canon"
    upright = encoded(natural(100, 150), exif=exif)
    assert compact(upright, 100, 50).jpg == upright


@pytest.mark.parametrize("size", [64, 500])
def test_rotated_by_exif_comes_out_upright(size: int) -> None:
    pixels = natural(200, 300)
    exif = Image.Exif()
    exif[0x0112] = 6
    small = compact(encoded(np.ascontiguousarray(np.rot90(pixels)), exif=exif, quality=95), size, 95)
    assert (small.width, small.height) == ((96, 64) if size == 64 else (300, 200))
    plain = np.asarray(Image.open(io.BytesIO(small.jpg)))
    assert mean_difference(plain, reduced(pixels, small.width, small.height)) < 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_become_jpeg(kind: str) -> None:
    body = encoded(natural(256, 341), kind)
    small = compact(body, 128, 90)
    assert small.jpg[:2] == b"\xff\xd8"
    assert (small.width, small.height) == (170, 128)
    assert mean_difference(decode(small.jpg), reduced(decode(body), 170, 128)) < 2.5


def test_odd_colours() -> None:
    pixels = natural(256, 341)
    grey = encoded(Image.fromarray(pixels).convert("L"), quality=95)
    cmyk = encoded(Image.fromarray(pixels).convert("CMYK"), quality=95)
    for body in (grey, cmyk):
        small = compact(body, 128, 90)
        assert mean_difference(decode(small.jpg), reduced(decode(body), 170, 128)) < 2.5


def test_a_strip_keeps_a_side() -> None:
    strip = compact(encoded(np.zeros((3, 3000, 3), np.uint8)), 1, 90)
    assert (strip.width, strip.height) == (1000, 1)


@pytest.mark.parametrize("size", [64, 500])
def test_what_can_not_be_decoded(size: int) -> None:
    for body in (b"", b"<html>", encoded(natural(256, 341))[:3000], b"\xff\xd8\xff"):
        with pytest.raises(ImageError):
            compact(body, size, 90)


def test_wrong_settings() -> None:
    for size, quality in ((0, 90), (128, 0), (128, 101)):
        with pytest.raises(UserError, match="can't resize to"):
            compact(encoded(natural(20, 30)), size, quality)
