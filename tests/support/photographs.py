"""Natural photographs for tests, from the files of installed packages, and their crops as training makes them.

`crops` gives the pixels of training's fast way beside Pillow's of the same crop, and those of the way that training
takes where its compiled code doesn't read a file or couldn't be compiled.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import skimage
from natural_images import encoded
from PIL import Image

from clipkit.counter_rng import sample_keys
from clipkit.pixels.images import UInt8Array, plain_jpeg_size
from clipkit.train.loader.augment import GEOMETRY_DRAWS, Augmentation, cut, geometry_draws
from clipkit.train.loader.crop import Box, central_box, crop_box, crop_of_shrunk_jpeg, scaled_crop

SKIMAGE = Path(skimage.__file__).parent / "data"
FILES = (
    SKIMAGE / "astronaut.png",
    SKIMAGE / "chelsea.png",
    SKIMAGE / "coffee.png",
    SKIMAGE / "rocket.jpg",
    SKIMAGE / "motorcycle_left.png",
    Path(matplotlib.__file__).parent / "mpl-data/sample_data/grace_hopper.jpg",
)
# What datasets hold: as img2dataset leaves them, and the compact copy. Shorter side in pixels, and quality.
STORED = {"standard": (256, 95), "compact": (128, 90)}
FAST = Augmentation(crop_area=(0.4, 1.0))
EXACT = replace(FAST, exact=True)
CROPS = 12


@dataclass(frozen=True, eq=False)
class LibraryCrop:
    """A crop as training cuts it where the compiled code doesn't: on the grid of a shrunk decoding."""

    pixels: UInt8Array
    """uint8[size, size, 3]."""
    plain: UInt8Array
    """The crop that was cut, decoded in full and resized by Pillow's antialiased bicubic."""
    scale: int
    """How far the JPEG was shrunk in decoding."""
    moved: float
    """How far an edge moved at most from where it was drawn, in pixels of the output."""


@dataclass(frozen=True, eq=False)
class Crop:
    """A crop in three ways, uint8[size, size, 3] each."""

    fast: UInt8Array
    """As training cuts it."""
    plain: UInt8Array
    """Decoded in full and resized by Pillow's antialiased bicubic."""
    library: LibraryCrop
    """As training cuts it where the compiled code doesn't."""
    box: Box
    """The crop as it was drawn, in pixels of the JPEG."""


def photographs() -> dict[str, UInt8Array]:
    """uint8[H, W, 3] by name: two portraits, a cat's head, a cup, a rocket by night, a garage. 300 to 600 pixels."""
    found = {}
    for path in FILES:
        with Image.open(path) as image:
            found[path.stem.removesuffix("_left")] = np.array(image.convert("RGB"))
    return found


def shrunk(side: int) -> dict[str, Image.Image]:
    """The photographs with a shorter side of `side` pixels."""
    images = {}
    for name, pixels in photographs().items():
        height, width = pixels.shape[:2]
        scale = side / min(height, width)
        target = round(width * scale), round(height * scale)
        images[name] = Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC)
    return images


def stored(kind: str) -> dict[str, bytes]:
    """The photographs as the JPEGs of a `STORED` kind of dataset."""
    side, quality = STORED[kind]
    return {name: encoded(image, quality=quality) for name, image in shrunk(side).items()}


def crops(jpegs: Iterable[bytes], size: int, count: int = CROPS) -> Iterator[Crop]:
    """`count` random crops of each JPEG, the JPEGs in turn."""
    jpegs = tuple(jpegs)
    rows = geometry_draws(sample_keys(1, np.arange(count * len(jpegs)))).tolist()
    for number, row in enumerate(rows):
        data = jpegs[number % len(jpegs)]
        box = crop_box(*dimensions(data), FAST.crop_area, FAST.crop_ratio, row)
        yield Crop(cut(data, size, FAST, row), by_pillow(data, box, size), by_library(data, box, size), box)


def centre(data: bytes, size: int) -> Crop:
    """The central square of a JPEG, as training cuts it when it cuts no other."""
    box = central_box(*dimensions(data))
    fast = cut(data, size, Augmentation(), [1.0] * GEOMETRY_DRAWS)
    return Crop(fast, by_pillow(data, box, size), by_library(data, box, size), box)


def dimensions(data: bytes) -> tuple[int, int]:
    """Height and width of a JPEG."""
    full = plain_jpeg_size(data)
    assert full is not None
    return full


def by_library(data: bytes, drawn: Box, size: int) -> LibraryCrop:
    """A crop by libjpeg's shrunk decoding and OpenCV."""
    box, scale = scaled_crop(*dimensions(data), drawn, size)
    pixels = library_pixels(data, drawn, size)
    return LibraryCrop(pixels, by_pillow(data, box, size), scale, moved(box, drawn, size))


def library_pixels(data: bytes, box: Box, size: int) -> UInt8Array:
    """uint8[size, size, 3]: those alone."""
    return crop_of_shrunk_jpeg(data, dimensions(data), box, size, np.empty((size, size, 3), np.uint8))


def by_pillow(data: bytes, box: Box, size: int) -> UInt8Array:
    """A crop of an encoded image by nothing but Pillow, as torchvision's `resized_crop` and OpenCLIP make it."""
    with Image.open(io.BytesIO(data)) as image:
        return resized(image, box, size)


def resized(
    image: Image.Image, box: Box, size: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> UInt8Array:
    """A crop of a picture at `size`, antialiased. A crop on the grid may reach a little beyond the last pixel."""
    top, left, height, width = box
    part = image.crop((left, top, min(left + width, image.width), min(top + height, image.height)))
    return np.asarray(part.resize((size, size), resampling))


def moved(box: Box, drawn: Box, size: int) -> float:
    """How far the edges of two crops are apart at most, in pixels of the output."""
    (top, left, height, width), (first, start, tall, wide) = box, drawn
    down = max(abs(top - first), abs(top + height - first - tall)) * size / tall
    return max(down, max(abs(left - start), abs(left + width - start - wide)) * size / wide)


def difference(one: UInt8Array, other: UInt8Array) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(one.astype(np.int16) - other).mean())
