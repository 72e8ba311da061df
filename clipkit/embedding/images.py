"""Many encoded images to unit vectors: decoded on all cores a little ahead of the model, counted and hashed.

An image that can't be decoded is noted, never passed over in silence, and more than a few end the work.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipkit.embedding.encoder import Compute, Encoder, check_finite
from clipkit.errors import UserError
from clipkit.pixels.images import ImageError, Preprocess, UInt8Array, decode, eval_transform

KEEP_PIXELS_BYTES = 1 << 30
UNREADABLE_SHARE = 0.01

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Pixels:
    """Some of a set's images as the model's input before normalising. `index_B` are their places in the set."""

    index_B: NDArray[np.int64]
    image_BHWC: UInt8Array


class ImageSet:
    """Encoded images in a fixed order. What is costly to make again while training goes on is kept: up to 1 GiB of
    decoded images, for the latest preprocessing only.
    """

    def __init__(self, path: Path, keys: Sequence[str], read: Callable[[], Iterator[bytes | ImageError]]) -> None:
        """`path` and `keys` name the images in messages and hashes; `read` yields them in order, as often as asked."""
        self.path, self.keys, self.read = path, keys, read
        self.unreadable: dict[int, str] = {}
        """Places of images that can't be decoded, with the reasons, once they were read."""
        self.content = ""
        """A hash of all encoded images, once they were read."""
        self._pixels: tuple[Preprocess, list[Pixels]] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def pixels(
        self, preprocess: Preprocess, batch_size: int, also: Callable[[int, bytes], None] | None = None
    ) -> Iterator[Pixels]:
        """The images in batches; `also` is shown each place and encoded image.

        An image that can't be read or decoded is noted in `unreadable`. Raises UserError when those are more than 1%.
        """
        if self._pixels is not None and self._pixels[0] == preprocess and also is None:
            yield from self._pixels[1]
            return
        self.unreadable, self._pixels = {}, None
        keep = len(self) * preprocess.size**2 * 3 <= KEEP_PIXELS_BYTES
        decoded: list[Pixels] = []
        images = self._decode_ahead(preprocess, batch_size, also)
        while batch := list(itertools.islice(images, batch_size)):
            pixels = stack(batch)
            if keep:
                decoded.append(pixels)
            yield pixels
        if keep:
            self._pixels = preprocess, decoded

    def _decode_ahead(
        self, preprocess: Preprocess, ahead: int, also: Callable[[int, bytes], None] | None
    ) -> Iterator[tuple[int, UInt8Array]]:
        """Places and pixels of the readable images, so many of them decoded ahead."""
        content = hashlib.blake2b(digest_size=16)
        with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:
            waiting: deque[tuple[int, Future[tuple[bytes, UInt8Array | ImageError]]]] = deque()

            def result() -> Iterator[tuple[int, UInt8Array]]:
                place, future = waiting.popleft()
                image_digest, image = future.result()
                content.update(image_digest)
                if isinstance(image, ImageError):
                    self._note_unreadable(place, image)
                else:
                    yield place, image

            for place, data in enumerate(self.read()):
                if also is not None and isinstance(data, bytes):
                    also(place, data)
                waiting.append((place, pool.submit(digest_and_decode, data, preprocess)))
                if len(waiting) > ahead:
                    yield from result()
            while waiting:
                yield from result()
        self.content = content.hexdigest()

    def _note_unreadable(self, place: int, error: ImageError) -> None:
        self.unreadable[place] = str(error)
        count, total = len(self.unreadable), len(self)
        if count > UNREADABLE_SHARE * total:
            raise UserError(
                f"{self.path}: {count:,} of {total:,} images can't be read, the last one "
                f"{self.keys[place]} ({error}): repair or remove them"
            ) from error


def stack(images: list[tuple[int, UInt8Array]]) -> Pixels:
    """One batch of single images."""
    return Pixels(np.array([place for place, _ in images], dtype=np.int64), np.stack([image for _, image in images]))


def digest_and_decode(data: bytes | ImageError, preprocess: Preprocess) -> tuple[bytes, UInt8Array | ImageError]:
    """A hash of an encoded image, and its pixels as uint8 [size, size, 3], or the reason why there are none."""
    if isinstance(data, ImageError):
        return b"", data
    try:
        image: UInt8Array | ImageError = eval_transform(
            decode(data), preprocess.size, interpolation=preprocess.interpolation, resize_mode=preprocess.resize_mode
        )
    except ImageError as error:
        image = error
    return hashlib.blake2b(data, digest_size=16).digest(), image


def embed_images(
    encoder: Encoder, images: ImageSet, compute: Compute, also: Callable[[int, bytes], None] | None = None
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Places and unit vectors float32[B, E] on the device, for one batch of the readable images after another."""
    device = compute.device
    for pixels in images.pixels(encoder.preprocess, compute.batch_size, also):
        rows = pad_rows(pixels.image_BHWC, compute.batch_size) if device.static_shapes else pixels.image_BHWC
        image_BE = encoder.image_features(device.batch({"image": rows})["image"], compute)
        yield pixels.index_B, image_BE[: len(pixels.index_B)]
        device.end_step()
        if compute.progress is not None:
            compute.progress(int(pixels.index_B[-1]) + 1)


@torch.no_grad()
def image_matrix(
    encoder: Encoder, images: ImageSet, compute: Compute, also: Callable[[int, bytes], None] | None = None
) -> tuple[NDArray[np.int64], Tensor]:
    """Places of the readable images, and their unit vectors float32[N, E] on the CPU.

    Raises UserError when the model gives NaN, or none can be read.
    """
    places, parts = [], []
    for index_B, image_BE in embed_images(encoder, images, compute, also):
        places.append(index_B)
        parts.append(image_BE.cpu())
    if not parts:
        raise UserError(f"{images.path} has no image that can be read")
    return np.concatenate(places), check_finite(torch.cat(parts))


def pad_rows(array: NDArray[Number], rows: int) -> NDArray[Number]:
    """Repeat the last row until there are `rows`."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)]) if len(array) < rows else array
