"""Training crops have torchvision's distribution, and those from encoded bytes show what the plain way shows.

What holds for both ways of cutting a JPEG, the compiled code and the library, is tested with each.
"""

import io

import cv2
import numpy as np
import pytest
import torch
from natural_images import encoded, jpeg
from natural_images import natural as picture
from PIL import Image

from clipkit.pixels.images import UInt8Array, decode, plain_jpeg_size
from clipkit.train.loader import crop as crop_module
from clipkit.train.loader.crop import (
    Box,
    crop_box,
    crop_of_shrunk_jpeg,
    crop_resize,
    exact_crop_resize,
    random_resized_crop,
    scaled_crop,
)

WAYS = ("compiled", "library")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How JPEGs are cut in a test."""
    if request.param == "library":
        monkeypatch.setattr(crop_module, "crop_jpeg", lambda *arguments: False)
    return str(request.param)


def by_library(data: bytes, box: Box, size: int) -> UInt8Array:
    full = plain_jpeg_size(data)
    assert full is not None
    return crop_of_shrunk_jpeg(data, full, box, size, np.empty((size, size, 3), np.uint8))


# What was measured and 5% more, in levels of 255.
@pytest.mark.parametrize(("size", "bound"), [(48, 0.42), (64, 0.62), (112, 0.81), (224, 0.77)])
def test_crop_of_a_jpeg_equals_full_decoding_and_antialiased_bicubic(size: int, bound: float) -> None:
    errors = []
    for seed in range(8):
        data = jpeg(picture(256, 320, seed, roughness=1.3))
        for area in (0.45, 0.7, 0.95):
            draws = [0.5] * 22
            fast = random_resized_crop(data, size, (area, area), (1.0, 1.0), draws)
            top, left, height, width = crop_box(256, 320, (area, area), (1.0, 1.0), draws)
            part = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
            plain = part.resize((size, size), Image.Resampling.BICUBIC)
            errors.append(np.abs(fast.astype(float) - np.asarray(plain)).mean())
    assert np.mean(errors) < bound


@pytest.mark.parametrize("size", [48, 64, 112, 224])
def test_crop_by_the_library_equals_full_decoding_and_antialiased_bicubic(size: int) -> None:
    errors = []
    for seed in range(8):
        data = jpeg(picture(256, 320, seed, roughness=1.3))
        for area in (0.45, 0.7, 0.95):
            nominal = crop_box(256, 320, (area, area), (1.0, 1.0), [0.5] * 22)
            fast = by_library(data, nominal, size)
            (top, left, height, width), scale = scaled_crop(256, 320, nominal, size)
            edges = top, left, top + height, left + width
            drawn = nominal[0], nominal[1], nominal[0] + nominal[2], nominal[1] + nominal[3]
            assert max(abs(a - b) for a, b in zip(edges, drawn, strict=True)) <= scale / 2
            box = (left, top, left + width, top + height)
            plain = Image.open(io.BytesIO(data)).resize((size, size), Image.Resampling.BICUBIC, box=box)
            errors.append(np.abs(fast.astype(float) - np.asarray(plain)).mean())
    assert np.mean(errors) < 2.5


def test_a_jpeg_is_cut_by_the_library_where_the_compiled_code_is_missing(way: str) -> None:
    """And by the compiled code where it is there; a progressive file by the library in any case."""
    pixels = picture(200, 260, roughness=1.3)
    box = crop_box(200, 260, (0.5, 0.5), (1.0, 1.0), [0.5] * 22)
    for progressive in (False, True):
        data = jpeg(pixels, progressive=progressive)
        found = random_resized_crop(data, 64, (0.5, 0.5), (1.0, 1.0), [0.5] * 22)
        expected = way == "library" or progressive
        assert np.array_equal(found, by_library(data, box, 64)) == expected


@pytest.mark.parametrize("shrinks", [0.7, 1.0, 1.1, 1.2, 1.3, 1.6, 1.9, 2.5, 3.5])
def test_each_way_of_resizing_is_as_near_to_bicubic_as_the_mean_of_an_area(shrinks: float) -> None:
    side = round(64 * shrinks)
    ours, areas = [], []
    for seed in range(6):
        image = picture(256, 320, seed, roughness=1.3)
        box = (5, 9, side, side)
        plain = exact_crop_resize(image, box, 64).astype(float)
        area = cv2.resize(image[5 : 5 + side, 9 : 9 + side], (64, 64), interpolation=cv2.INTER_AREA)
        ours.append(np.abs(crop_resize(image, box, 64) - plain).mean())
        areas.append(np.abs(area - plain).mean())
    assert np.mean(ours) <= 1.2 * np.mean(areas)
    assert np.mean(ours) < 1.5


def test_chroma_by_the_library_is_smooth_where_it_shows() -> None:
    """Repeated chroma is for what shrinks by much; a little shrunk, the pixels are those of the full decoding."""
    data = jpeg(picture(200, 200, roughness=1.3))
    for size, equal in ((190, True), (124, True), (106, False)):
        found = by_library(data, (0, 0, 200, 200), size)
        expected = crop_resize(decode(data), (0, 0, 200, 200), size)
        assert np.array_equal(found, expected) == equal
        assert np.abs(found.astype(int) - expected).mean() < 1


@pytest.mark.usefixtures("way")
def test_pixels_of_a_jpeg_are_written_where_they_belong() -> None:
    buffer = np.zeros((3, 48, 48, 3), np.uint8)
    for side in (30, 70, 256):
        data = jpeg(picture(side, side))
        found = random_resized_crop(data, 48, (0.7, 0.7), (1.0, 1.0), [0.5] * 22, buffer[1])
        np.testing.assert_array_equal(buffer[1], found)
        np.testing.assert_array_equal(found, random_resized_crop(data, 48, (0.7, 0.7), (1.0, 1.0), [0.5] * 22))
        assert not buffer[[0, 2]].any()


def test_pixels_are_written_where_they_belong() -> None:
    buffer = np.zeros((3, 48, 48, 3), np.uint8)
    for height, width in ((30, 40), (50, 55), (70, 70), (100, 90), (256, 256)):
        image = picture(height, width)
        box = (0, 0, height, width)
        assert crop_resize(image, box, 48, buffer[1]) is not None
        np.testing.assert_array_equal(buffer[1], crop_resize(image, box, 48))
        assert not buffer[[0, 2]].any()


def test_the_exact_crop_equals_torchvision() -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    image = picture(128, 160)
    for box in ((3, 7, 100, 90), (0, 0, 128, 160), (60, 60, 20, 31)):
        expected = resized_crop(Image.fromarray(image), *box, [56, 56], InterpolationMode.BICUBIC)
        np.testing.assert_array_equal(exact_crop_resize(image, box, 56), np.asarray(expected))


def test_crop_box_distribution_equals_torchvision() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    area, ratio = (0.4, 1.0), (3 / 4, 4 / 3)
    image = torch.empty(3, 200, 300)
    theirs = np.array([RandomResizedCrop.get_params(image, area, ratio) for _ in range(1500)])
    draws = np.random.default_rng(0).random((1500, 22))
    ours = np.array([crop_box(200, 300, area, ratio, row) for row in draws])
    for column in range(4):
        spread = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.1 * spread
        assert abs(ours[:, column].std() - spread) < 0.1 * spread
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2]).max() <= 200
    assert (ours[:, 1] + ours[:, 3]).max() <= 300


def test_crop_that_never_fits_is_the_central_one() -> None:
    assert crop_box(10, 100, (1.0, 1.0), (1.0, 1.0), np.full(22, 0.5)) == (0, 45, 10, 10)
    assert crop_box(1, 1, (0.4, 1.0), (3 / 4, 4 / 3), np.full(22, 0.99)) == (0, 0, 1, 1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (7, 9)])
def test_tiny_and_thin_images_are_cropped(height: int, width: int) -> None:
    pixels = np.full((height, width, 3), 77, np.uint8)
    for data in (jpeg(pixels), encoded(Image.fromarray(pixels), "PNG")):
        crop = random_resized_crop(data, 32, (0.4, 1.0), (3 / 4, 4 / 3), np.full(22, 0.7))
        assert crop.shape == (32, 32, 3)
        assert np.abs(crop.astype(int) - 77).max() <= 3
