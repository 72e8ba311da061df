"""The hash is ImageHash's, bit for bit; it hardly moves when a picture is re-encoded, and is another for another."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from natural_images import encoded, natural
from PIL import Image

from clipkit.pixels.images import ImageError
from clipkit.pixels.phash import SAME_PICTURE, distance, perceptual_hash, perceptual_hash_of


def pattern(height: int, width: int, step: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    layers = [(x * x * step // 31 + y) % 256, (x + y * y // 17) % 256, (x * y // (step + 9)) % 256]
    return np.stack(layers, 2).astype(np.uint8)


# What `imagehash.phash` of ImageHash 4.3.2 gives for `pattern` of these.
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((40, 60, 3), "9635a935eb25a925"),
        ((256, 256, 1), "9500079417bf373f"),
        ((300, 97, 7), "8101073f203f7f6f"),
        ((32, 32, 5), "aa7d807fb059984e"),
        ((9, 5, 2), "a778c7272718f858"),
    ],
)
def test_equals_imagehash(shape: tuple[int, int, int], expected: str) -> None:
    assert f"{perceptual_hash(pattern(*shape)):016x}" == expected


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), roughness=st.floats(1.2, 2))
def test_re_encoded_and_resized_pictures_stay_near(seed: int, roughness: float) -> None:
    pixels = natural(256, 320, seed, roughness)
    half = np.asarray(Image.fromarray(pixels).resize((160, 128), Image.Resampling.BICUBIC))
    original = perceptual_hash_of(encoded(pixels, quality=95))
    assert distance(original, perceptual_hash(pixels)) <= 4
    assert distance(original, perceptual_hash_of(encoded(pixels, quality=60))) <= 6
    assert distance(original, perceptual_hash_of(encoded(half, quality=80))) <= 6
    assert distance(original, perceptual_hash_of(encoded(pixels, "WEBP", quality=70))) <= 6


def test_different_pictures_are_far_apart() -> None:
    hashes = [perceptual_hash(natural(128, 160, seed)) for seed in range(120)]
    distances = [distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert np.mean(np.array(distances) > 16) > 0.999
    assert min(distances) > SAME_PICTURE
    mirrored = [perceptual_hash(natural(128, 160, seed)[:, ::-1]) for seed in range(10)]
    assert all(distance(a, b) > 16 for a, b in zip(hashes, mirrored, strict=False))


def test_decoding_at_a_smaller_size_hardly_moves_the_hash() -> None:
    pictures = [natural(256, 341, seed, 1.4) for seed in range(30)] + [natural(700, 900, seed) for seed in range(10)]
    moved = [distance(perceptual_hash(each), perceptual_hash_of(encoded(each, quality=90))) for each in pictures]
    assert np.mean(moved) < 1
    assert max(moved) <= 4


def test_pictures_of_one_colour() -> None:
    flat = {perceptual_hash(np.full((50, 70, 3), colour, np.uint8)) for colour in (1, 100, 255)}
    assert flat == {1 << 63}
    assert perceptual_hash(np.zeros((50, 70, 3), np.uint8)) == 0


def test_distance() -> None:
    assert distance(0, 2**64 - 1) == 64
    assert distance(0b1010, 0b0110) == 2


def test_rotated_by_exif_is_hashed_upright() -> None:
    pixels = natural(200, 300, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(file, "JPEG", quality=95, exif=exif)
    assert distance(perceptual_hash_of(file.getvalue()), perceptual_hash(pixels)) <= 6


def test_what_is_no_image() -> None:
    with pytest.raises(ImageError, match="HTML page"):
        perceptual_hash_of(b"<html>")
