"""Many encoded images to unit vectors: decoded on all cores a little ahead of the model, counted and hashed.

Unreadable images are recorded and reported. If more than 1% of the images are unreadable, the work stops.
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

from clipkit.embedding.cached import Piece, key_of, read_piece
from clipkit.embedding.encoder import Compute, Encoder, check_finite
from clipkit.errors import UserError
from clipkit.pixels.images import ImageError, Preprocess, UInt8Array, decode, eval_transform
from clipkit.storage.cache import BlockCache

KEEP_PIXELS_BYTES = 1 << 30
UNREADABLE_SHARE = 0.01

Number = TypeVar("Number", bound=np.generic)
Decoding = Future[tuple[bytes, UInt8Array | ImageError]]
"""What `digest_and_decode` is going to give."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Some of a set's images as the model's input before normalising. `index_B` are their places in the set."""

    index_B: NDArray[np.int64]
    image_BHWC: UInt8Array


class ImageSet:
    """Encoded images in a fixed order. What is costly to make again while training goes on is kept: up to 1 GiB of
    decoded images, for the latest preprocessing only.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[str],
        read: Callable[[], Iterator[bytes | ImageError]],
        keep_pixels: bool = True,
    ) -> None:
        """`path` and `keys` name the images in messages and hashes; `read` yields them in order, as often as asked."""
        self.path, self.keys, self.read, self.keep_pixels = path, keys, read, keep_pixels
        self.unreadable: dict[int, str] = {}
        """The reason for each unreadable image, by its place. Filled while the images are read."""
        self.content = ""
        """A hash of all encoded images. Empty until they have been read."""
        self._pixels: tuple[Preprocess, list[Pixels]] | None = None
        self._decoded: tuple[Preprocess, dict[bytes, list[UInt8Array | ImageError]]] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def pixels(
        self, preprocess: Preprocess, batch_size: int, also: Callable[[int, bytes], None] | None = None
    ) -> Iterator[Pixels]:
        """The images in batches; `also` is shown each place and encoded image.

        Unreadable images are recorded in `unreadable`. Raises UserError if they are more than 1% of all.
        """
        if self._pixels is not None and self._pixels[0] == preprocess and also is None:
            yield from self._pixels[1]
            return
        self.unreadable, self._pixels = {}, None
        keep = self.keep_pixels and self._fit(preprocess)
        decoded: list[Pixels] = []
        images = self._decode_ahead(preprocess, batch_size, also)
        while batch := list(itertools.islice(images, batch_size)):
            pixels = stack(batch)
            if keep:
                decoded.append(pixels)
            yield pixels
        if keep:
            self._pixels = preprocess, decoded

    def _fit(self, preprocess: Preprocess) -> bool:
        return len(self) * preprocess.size**2 * 3 <= KEEP_PIXELS_BYTES

    def decoded(self, preprocess: Preprocess) -> dict[bytes, list[UInt8Array | ImageError]] | None:
        """Decoded batches by their images' hashes, for the next model with this preprocessing; to be filled by the
        first. None for a set whose pixels don't fit."""
        if not self._fit(preprocess):
            return None
        if self._decoded is None or self._decoded[0] != preprocess:
            self._decoded = preprocess, {}
        return self._decoded[1]

    def _decode_ahead(
        self, preprocess: Preprocess, ahead: int, also: Callable[[int, bytes], None] | None
    ) -> Iterator[tuple[int, UInt8Array]]:
        """Places and pixels of the readable images, so many of them decoded ahead."""
        content = hashlib.blake2b(digest_size=16)
        with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:
            waiting: deque[tuple[int, Decoding]] = deque()

            def result() -> Iterator[tuple[int, UInt8Array]]:
                place, future = waiting.popleft()
                image_digest, image = future.result()
                content.update(image_digest)
                if isinstance(image, ImageError):
                    self.note_unreadable(place, str(image))
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

    def note_unreadable(self, place: int, reason: str) -> None:
        """Record an unreadable image. Raises UserError if they are more than 1% of all."""
        self.unreadable[place] = reason
        count, total = len(self.unreadable), len(self)
        if count > UNREADABLE_SHARE * total:
            raise UserError(
                f"{self.path}: {count:,} of {total:,} images can't be read, the last one "
                f"{self.keys[place]} ({reason}): repair or remove them"
            )


def stack(images: list[tuple[int, UInt8Array]]) -> Pixels:
    """One batch of single images."""
    return Pixels(np.array([place for place, _ in images], dtype=np.int64), np.stack([image for _, image in images]))


def digest_image(data: bytes | ImageError) -> bytes:
    """A hash of an encoded image; nothing for one that can't be read."""
    return b"" if isinstance(data, ImageError) else hashlib.blake2b(data, digest_size=16).digest()


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
    return digest_image(data), image


def embed_images(
    encoder: Encoder, images: ImageSet, compute: Compute, also: Callable[[int, bytes], None] | None = None
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Places and unit vectors float32[B, E] on the device, for one batch of the readable images after another.

    Batches that `compute.cache` has are neither decoded nor embedded.
    """
    if compute.cache is not None:
        yield from _embed_through_cache(encoder, images, compute, compute.cache, also)
        return
    for pixels in images.pixels(encoder.preprocess, compute.batch_size, also):
        yield pixels.index_B, _embed(encoder, pixels, compute)
        compute.device.end_step()
        if compute.progress is not None:
            compute.progress(int(pixels.index_B[-1]) + 1)


def _embed(encoder: Encoder, pixels: Pixels, compute: Compute) -> Tensor:
    device = compute.device
    rows = pad_rows(pixels.image_BHWC, compute.batch_size) if device.static_shapes else pixels.image_BHWC
    image_BE = encoder.image_features(device.batch({"image": rows})["image"], compute)
    return image_BE[: len(pixels.index_B)]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Encoded images on their way: place in the set, hashes, key in the cache, and what is being decoded."""

    start: int
    encoded: list[bytes | ImageError]
    digests: bytes
    key: str
    decoding: list[Decoding]


def _embed_through_cache(
    encoder: Encoder, images: ImageSet, compute: Compute, cache: BlockCache, also: Callable[[int, bytes], None] | None
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """As `embed_images`. While the model works on a batch, the next one is decoded, if the cache doesn't have it."""
    images.unreadable.clear()
    content = hashlib.blake2b(digest_size=16)
    how = repr(encoder.preprocess).encode()
    known = images.decoded(encoder.preprocess)
    encoded = iter(images.read())
    waiting: deque[_Batch] = deque()
    with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:

        def finish(batch: _Batch) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
            piece = read_piece(cache, batch.key, lambda: make(batch))
            for place, reason in piece.problems.items():
                images.note_unreadable(batch.start + place, reason)
            if compute.progress is not None:
                compute.progress(batch.start + len(batch.encoded))
            if len(piece.index_N):
                yield piece.index_N + batch.start, torch.from_numpy(piece.vector_NE).to(compute.device.torch_device)

        def decode(encoded: list[bytes | ImageError]) -> list[Decoding]:
            return [pool.submit(digest_and_decode, data, encoder.preprocess) for data in encoded]

        def make(batch: _Batch) -> Piece:
            decoded = None if known is None else known.get(batch.digests)
            if decoded is None:
                decoded = [each.result()[1] for each in batch.decoding or decode(batch.encoded)]
                if known is not None:
                    known[batch.digests] = decoded
            problems = {place: str(image) for place, image in enumerate(decoded) if isinstance(image, ImageError)}
            readable = [(place, image) for place, image in enumerate(decoded) if not isinstance(image, ImageError)]
            if not readable:
                return Piece(np.empty((0, 1), np.float32), np.empty(0, np.int64), problems)
            pixels = stack(readable)
            vector_NE = _embed(encoder, pixels, compute).cpu().numpy()
            compute.device.end_step()
            return Piece(vector_NE, pixels.index_B, problems)

        start = 0
        while batch := list(itertools.islice(encoded, compute.batch_size)):
            if also is not None:
                for place, data in enumerate(batch, start):
                    if isinstance(data, bytes):
                        also(place, data)
            digests = b"".join(pool.map(digest_image, batch))
            content.update(digests)
            key = key_of(encoder, compute, how + digests)
            is_known = cache.has(key) or (known is not None and digests in known)
            waiting.append(_Batch(start, batch, digests, key, [] if is_known else decode(batch)))
            start += len(batch)
            if len(waiting) > 1:
                yield from finish(waiting.popleft())
        while waiting:
            yield from finish(waiting.popleft())
    images.content = content.hexdigest()


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
