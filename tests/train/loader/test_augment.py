"""Augmentation is a function of the key, does what each field says, and off means off."""

import io
import json
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
from natural_images import PIXELS, encoded, jpeg
from natural_images import natural as picture
from PIL import Image

from clipkit.counter_rng import sample_keys
from clipkit.errors import UserError
from clipkit.pixels.images import ImageError, UInt8Array, eval_transform
from clipkit.train.loader.augment import Augmentation, colour_matrices, cut, geometry_draws, recolour
from clipkit.train.loader.crop import crop_box

EVERYTHING = Augmentation(
    crop_area=(0.5, 1.3), flip=0.5, rotation=20, shear=5, translation=0.1, brightness=0.3, contrast=0.3, saturation=0.4,
    hue=0.5, grey=0.2, permute_channels=0.2, invert=0.2, erase=0.5,
)  # fmt: skip
KEYS = sample_keys(0, np.arange(400))
PNG = encoded(Image.fromarray(PIXELS), "PNG")


def made(augmentation: Augmentation, keys: np.ndarray, size: int = 32, data: bytes = PNG) -> UInt8Array:
    images = np.stack([cut(data, size, augmentation, draws) for draws in geometry_draws(keys)])
    recolour(images, augmentation, keys)
    return images


def test_off_is_the_central_square() -> None:
    images = made(Augmentation(), KEYS[:3])
    assert (images == images[0]).all()
    assert np.abs(images[0].astype(float) - eval_transform(PIXELS, 32)).mean() < 3


@pytest.mark.parametrize("fixed", ["black", "white"])
def test_a_sample_does_not_depend_on_its_company(fixed: str) -> None:
    augmentation = replace(EVERYTHING, fixed=fixed)
    together = made(augmentation, KEYS[:40])
    alone = np.concatenate([made(augmentation, KEYS[i : i + 1]) for i in range(40)])
    np.testing.assert_array_equal(together, alone)
    assert len({image.tobytes() for image in together}) == 40


def test_it_survives_json() -> None:
    fields = json.loads(json.dumps(asdict(EVERYTHING)))
    assert (
        Augmentation(**{**fields, "crop_area": tuple(fields["crop_area"]), "crop_ratio": tuple(fields["crop_ratio"])})
        == EVERYTHING
    )


@pytest.mark.parametrize("area", [(1.0, 1.0), (0.4, 1.0)])
def test_exact_is_the_full_decoding_and_pillow(area: tuple[float, float]) -> None:
    data = jpeg(picture(256, 320, roughness=1.5))
    fast = Augmentation(crop_area=area, flip=0.5)
    slow = replace(fast, exact=True)
    # The same crop, but for the grid of eight that the fast way's shrunk decoding puts it on.
    assert np.abs(made(fast, KEYS[:20], data=data).astype(float) - made(slow, KEYS[:20], data=data)).mean() < 6
    image = Image.open(io.BytesIO(data))
    for draws in geometry_draws(KEYS[:20]).tolist():
        box = crop_box(256, 320, area, slow.crop_ratio, draws) if area[0] < 1 else (0, 32, 256, 256)
        top, left, height, width = box
        plain = image.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BICUBIC)
        expected = np.asarray(plain)[:, ::-1] if draws[22] < 0.5 else np.asarray(plain)
        row = np.zeros((32, 32, 3), np.uint8)
        np.testing.assert_array_equal(cut(data, 32, slow, draws), expected)
        cut(data, 32, slow, draws, row)
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("augmentation", [Augmentation(flip=0.5), replace(EVERYTHING, crop_area=(0.4, 1.0))])
@pytest.mark.parametrize("affine", [False, True])
def test_pixels_are_the_same_wherever_they_are_written(augmentation: Augmentation, affine: bool) -> None:
    augmentation = augmentation if affine else replace(augmentation, rotation=0, shear=0, translation=0)
    rows = np.full((20, 32, 32, 3), 7, np.uint8)
    for row, draws in zip(rows, geometry_draws(KEYS[:20]), strict=True):
        cut(PNG, 32, augmentation, draws, row)
    recolour(rows, augmentation, KEYS[:20])
    np.testing.assert_array_equal(rows, made(augmentation, KEYS[:20]))


@pytest.mark.parametrize("affine", [False, True])
def test_flip(affine: bool) -> None:
    base = Augmentation(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), rotation=1e-9 if affine else 0.0)
    square = encoded(Image.fromarray(picture(64, 64)), "PNG")
    plain, flipped = made(base, KEYS[:1], data=square), made(replace(base, flip=1.0), KEYS[:1], data=square)
    assert np.abs(flipped[:, :, ::-1].astype(int) - plain).max() <= 1
    halves = made(replace(base, flip=0.5), KEYS, data=square)
    share = np.mean([np.abs(image.astype(int) - plain[0]).mean() > 1 for image in halves])
    assert 0.42 < share < 0.58


def test_warp_with_no_turn_is_a_resize() -> None:
    square = encoded(Image.fromarray(picture(64, 64)), "PNG")
    still = Augmentation(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), rotation=1e-9)
    found = made(still, KEYS[:1], data=square)[0]
    expected = cv2.resize(picture(64, 64), (32, 32), interpolation=cv2.INTER_LINEAR)
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_warp_turns_about_the_centre_by_up_to_the_angle() -> None:
    pixels = np.zeros((65, 65, 3), np.uint8)
    pixels[30:35, 30:60] = 255  # a bar from the centre to the right
    turning = Augmentation(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), rotation=60.0, fill=0)
    images = made(turning, KEYS[:200], size=65, data=encoded(Image.fromarray(pixels), "PNG"))
    rows, columns = np.mgrid[0:65, 0:65] - 32
    weight = images[:, :, :, 0] / images[:, :, :, 0].sum(axis=(1, 2), keepdims=True)
    angles = np.degrees(np.arctan2((weight * rows).sum(axis=(1, 2)), (weight * columns).sum(axis=(1, 2))))
    assert 50 < np.abs(angles).max() < 62
    assert abs(angles.mean()) < 8
    assert abs(angles.std() - 60 / 3**0.5) < 5


def test_area_above_one_shows_the_border() -> None:
    black = encoded(Image.fromarray(np.zeros((64, 64, 3), np.uint8)), "PNG")
    images = made(Augmentation(crop_area=(1.5, 1.5), crop_ratio=(1.0, 1.0), fill=200), KEYS[:50], data=black)
    shares = (images[:, :, :, 0] > 100).mean(axis=(1, 2))
    assert np.abs(shares - (1 - 1 / 1.5)).max() < 0.05
    assert {0, 200} <= set(np.unique(images).tolist())


def test_large_images_are_warped_without_skipping_pixels() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    images = made(
        Augmentation(crop_area=(1.0, 1.0), rotation=3), KEYS[:20], data=encoded(Image.fromarray(stripes), "PNG")
    )
    assert np.abs(images[:, 8:24, 8:24].astype(int) - 127).max() < 12


def mid_tones() -> UInt8Array:
    """An image that no mild jitter drives out of range."""
    return (picture(32, 32, seed=3) * 0.35 + 80).astype(np.uint8)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("sign", [0.0, 1.0 - 1e-9])
def test_jitter_equals_torchvision(name: str, sign: float) -> None:
    from torchvision.transforms import functional

    image = mid_tones()
    draws = np.full((1, 16), 0.5)
    draws[0, 1:5] = sign
    augmentation = Augmentation(**{name: 0.3})
    matrix = colour_matrices(augmentation, draws, image.reshape(1, -1, 3).mean(1))[0]
    adjust = getattr(functional, f"adjust_{name}")
    expected = np.asarray(adjust(Image.fromarray(image), 1 + 0.3 * (2 * sign - 1)))
    assert np.abs(cv2.transform(image, matrix).astype(int) - expected).max() <= 2


def test_hue_turns_as_torchvision_and_keeps_brightness() -> None:
    from torchvision.transforms import functional

    image = (
        np.stack([picture(32, 32, seed)[..., 0] for seed in range(3)], axis=2) // 2 + 60
    )  # colourful, not too bright
    draws = np.full((1, 16), 0.5)
    for sign in (1.0, 0.0):
        draws[0, 4] = sign
        turned = cv2.transform(image, colour_matrices(Augmentation(hue=0.08), draws, np.zeros((1, 3)))[0])
        luma = [pixels @ np.array([0.299, 0.587, 0.114]) for pixels in (turned, image)]
        assert np.abs(luma[0] - luma[1]).max() < 1.5
        expected = np.asarray(functional.adjust_hue(Image.fromarray(image), 0.08 * (2 * sign - 1)))
        ours, theirs = (pixels.astype(float).ravel() - image.ravel() for pixels in (turned, expected))
        assert np.corrcoef(ours, theirs)[0, 1] > 0.6


def test_all_of_the_jitter_in_random_order_equals_torchvision_on_average() -> None:
    import torch
    from torchvision.transforms import ColorJitter

    torch.manual_seed(0)
    image = mid_tones()
    theirs = np.stack([np.asarray(ColorJitter(0.32, 0.32, 0.32, 0.08)(Image.fromarray(image))) for _ in range(400)])
    ours = np.stack([image] * 400)
    recolour(ours, Augmentation(brightness=0.32, contrast=0.32, saturation=0.32, hue=0.08), KEYS)
    for reduce in (np.mean, np.std):
        a, b = (reduce(images.astype(float), axis=0) for images in (ours, theirs))
        assert np.abs(a - b).mean() < 3


def test_grey_permute_and_invert() -> None:
    image = mid_tones()
    grey, permuted, negative = (np.stack([image] * 400) for _ in range(3))
    recolour(grey, Augmentation(grey=0.25), KEYS)
    is_grey = (grey == grey[..., :1]).all(axis=(1, 2, 3))
    assert 0.18 < is_grey.mean() < 0.32
    np.testing.assert_allclose(
        grey[is_grey][0], np.asarray(Image.fromarray(image).convert("L"))[..., None].repeat(3, 2), atol=1
    )
    np.testing.assert_array_equal(grey[~is_grey][0], image)
    recolour(permuted, Augmentation(permute_channels=1.0), KEYS)
    orders = {
        tuple(int(np.abs(p[..., c].astype(int) - image.transpose(2, 0, 1)).sum(axis=(1, 2)).argmin()) for c in range(3))
        for p in permuted
    }
    assert len(orders) == 6
    recolour(negative, Augmentation(invert=1.0), KEYS)
    np.testing.assert_array_equal(negative[0], 255 - image)


def test_white_stays_white() -> None:
    white = np.full((400, 8, 8, 3), 255, np.uint8)
    black = np.zeros((400, 8, 8, 3), np.uint8)
    drawing = Augmentation(brightness=0.3, contrast=0.3, saturation=0.4, hue=0.1, grey=0.1, fixed="white")
    recolour(white, drawing, KEYS)
    recolour(black, drawing, KEYS)
    assert white.min() >= 254
    assert 60 < black.max() < 255 * (1 - 0.7 * 0.7) + 2


def test_jitter_has_its_probability() -> None:
    images = np.stack([mid_tones()] * 400)
    recolour(images, Augmentation(brightness=0.3, jitter=0.8), KEYS)
    changed = (images != mid_tones()).any(axis=(1, 2, 3)).mean()
    assert 0.72 < changed < 0.87


def test_erase_paints_one_rectangle() -> None:
    images = np.full((400, 48, 48, 3), 7, np.uint8)
    recolour(images, Augmentation(erase=0.5), KEYS)
    painted = (images != 7).any(axis=3)
    touched = painted.any(axis=(1, 2))
    assert 0.42 < touched.mean() < 0.58
    for image in painted[touched]:
        rows, columns = np.nonzero(image.any(1))[0], np.nonzero(image.any(0))[0]
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert image.sum() == height * width
        assert min(height, width) >= 8
        assert max(height, width) <= 20


@pytest.mark.parametrize(
    "wrong", [{"crop_area": (0.0, 1.0)}, {"crop_ratio": (2.0, 1.0)}, {"flip": 1.5}, {"grey": -0.1}, {"fixed": "red"}]
)
def test_values_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Augmentation(**wrong).check()


def test_jpeg_and_png_of_the_same_pixels_look_alike() -> None:
    smooth = cv2.GaussianBlur(PIXELS, (0, 0), 3)
    for augmentation in (Augmentation(crop_area=(0.5, 1.0)), replace(EVERYTHING, erase=0.0)):
        a = made(augmentation, KEYS[:10], data=jpeg(smooth))
        b = made(augmentation, KEYS[:10], data=encoded(Image.fromarray(smooth), "PNG"))
        assert np.abs(a.astype(int) - b).mean() < 3


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (40_000, 150)])
def test_a_strip_that_cannot_be_warped_is_a_bad_sample(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    with pytest.raises(ImageError, match="longer than the 32,766 that can be warped"):
        cut(buffer.getvalue(), 64, Augmentation(rotation=10.0), geometry_draws([0])[0].tolist())
    buffer = io.BytesIO()
    Image.new("RGB", (32_000, 1)).save(buffer, "PNG")
    cut(buffer.getvalue(), 64, Augmentation(rotation=10.0), geometry_draws([0])[0].tolist())
