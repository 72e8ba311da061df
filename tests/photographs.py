"""Natural photographs for tests, from the files of installed packages, and their crops as training makes them.

Every loader cuts crops at places of its own. `crops` gives the pixels of training's fast way beside Pillow's, for the
very crop that was cut and for the one as it was drawn.
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
from clipkit.images import UInt8Array, jpeg_scale, plain_jpeg_size
from clipkit.train.augment import GEOMETRY_DRAWS, Augmentation, cut, geometry_draws
from clipkit.train.crop import Box, crop_box, scaled_crop

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
class Crop:
    """A random crop three times, uint8[size, size, 3] each."""

    fast: UInt8Array
    """As training cuts it."""
    plain: UInt8Array
    """The crop that was cut, decoded in full and resized by Pillow's antialiased bicubic."""
    drawn: UInt8Array
    """The same of the crop as it was drawn, before it came to lie on the grid of a shrunk decoding."""
    box: Box
    """The crop that was cut, in pixels of the JPEG."""
    scale: int
    """How far the JPEG was shrunk in decoding."""
    moved: float
    """How far an edge moved at most, in pixels of the output."""


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
        full = plain_jpeg_size(data)
        assert full is not None
        drawn = crop_box(*full, FAST.crop_area, FAST.crop_ratio, row)
        box, scale = scaled_crop(*full, drawn, size)
        yield Crop(
            fast=cut(data, size, FAST, row),
            plain=by_pillow(data, box, size),
            drawn=by_pillow(data, drawn, size),
            box=box,
            scale=scale,
            moved=moved(box, drawn, size),
        )


def centre(data: bytes, size: int) -> Crop:
    """The central square of a JPEG, as training cuts it when it cuts no other."""
    full = plain_jpeg_size(data)
    assert full is not None
    scale = jpeg_scale(*full, size, size)
    drawn, box = central(full, 1), central(full, scale)
    return Crop(
        fast=cut(data, size, Augmentation(), [1.0] * GEOMETRY_DRAWS),
        plain=by_pillow(data, box, size),
        drawn=by_pillow(data, drawn, size),
        box=box,
        scale=scale,
        moved=moved(box, drawn, size),
    )


def central(full: tuple[int, int], scale: int) -> Box:
    """The central square of an image of that height and width, on the grid of its decoding at 1/`scale`."""
    height, width = (-(-side // scale) for side in full)
    side = min(height, width)
    return (height - side) // 2 * scale, (width - side) // 2 * scale, side * scale, side * scale


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
