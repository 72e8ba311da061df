"""Many encoded images, and many texts, to unit vectors.

Images are decoded on all cores a little ahead of the model, counted and hashed. Unreadable ones are recorded and
reported. If they are too many (`may_be_unreadable`), the work stops.

Each different text is encoded once, in batches of about equal length. A thousand classes in 80 templates are 80,000
sentences, mostly short. They are tokenised once, sorted by length and then by ids. Where the text tower is causal and
read at the end token, what stands behind a token can't change its vector. So each batch is cut to its longest text,
and a beginning that several texts of a batch have is computed once: 4 tokens a sentence remain of 10, and of 77 with
padding. Other towers see the padding.
"""

import hashlib
import itertools
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

from clipkit.device import Device
from clipkit.embedding.cached import Piece, key_of, read_piece
from clipkit.embedding.encoder import Compute, Encoder, TextTokenizer, check_finite
from clipkit.errors import UserError
from clipkit.model.text_tower import Prefixes, shared_prefixes
from clipkit.pixels.images import ImageError, Preprocess, UInt8Array, decode, eval_transform

KEEP_PIXELS_BYTES = 1 << 30
UNREADABLE_SHARE, UNREADABLE_FEW = 0.01, 10
TOKENS_PER_BATCH = 8192

Number = TypeVar("Number", bound=np.generic)
Decoding = Future[UInt8Array | ImageError]
"""What `decode_pixels` is going to give."""


def full_rows(array: NDArray[Number], rows: int, device: Device) -> NDArray[Number]:
    """The array; where shapes are static, with its last row repeated until there are `rows`, or the next number of them
    that is the same on all devices.
    """
    return pad_rows(array, -(-rows // device.shards) * device.shards) if device.static_shapes else array


def pad_rows(array: NDArray[Number], rows: int) -> NDArray[Number]:
    """Repeat the last row until there are `rows`."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)]) if len(array) < rows else array


# ---- Images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pixels:
    """A batch of a set's images as the model's input before normalising. `index_B` are the places of the readable ones
    in the batch; the others have a reason why not.
    """

    digests: bytes
    """Of all encoded images of the batch."""
    index_B: NDArray[np.int64]
    image_BHWC: UInt8Array
    problems: dict[int, str]


class ImageSet:
    """Encoded images in a fixed order. What is costly to make again is kept for the next model, or while training goes
    on: up to 1 GiB of decoded images, for the latest preprocessing only.
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
        self._content = ""
        self._kept: tuple[Preprocess, int, dict[int, Pixels]] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def content(self) -> str:
        """A hash of all encoded images, which are read for it unless they were embedded before."""
        if not self._content:
            content = hashlib.blake2b(digest_size=16)
            for data in self.read():
                content.update(digest_image(data))
            self._content = content.hexdigest()
        return self._content

    @content.setter
    def content(self, found: str) -> None:
        self._content = found

    def kept(self, preprocess: Preprocess, batch_size: int) -> dict[int, Pixels] | None:
        """Decoded batches by their numbers: earlier models left them, this one is to. None where they don't fit."""
        if not self.keep_pixels or len(self) * preprocess.size**2 * 3 > KEEP_PIXELS_BYTES:
            return None
        if self._kept is None or self._kept[:2] != (preprocess, batch_size):
            self._kept = preprocess, batch_size, {}
        return self._kept[2]

    def note_unreadable(self, place: int, reason: str) -> None:
        """Record an unreadable image. Raises UserError if they are too many."""
        self.unreadable[place] = reason
        count, total = len(self.unreadable), len(self)
        if count > may_be_unreadable(total):
            raise UserError(
                f"{self.path}: {count:,} of {total:,} images can't be read, the last one "
                f"{self.keys[place]} ({reason}): repair or remove them"
            )


def may_be_unreadable(total: int) -> int:
    """How many of so many images may be left out of a number: 1%, or of a small set ten, but always less than half."""
    return max(int(UNREADABLE_SHARE * total), min(UNREADABLE_FEW, (total - 1) // 2))


def digest_image(data: bytes | ImageError) -> bytes:
    """A hash of an encoded image; nothing for one that can't be read."""
    return b"" if isinstance(data, ImageError) else hashlib.blake2b(data, digest_size=16).digest()


def decode_pixels(data: bytes | ImageError, preprocess: Preprocess) -> UInt8Array | ImageError:
    """The pixels of an encoded image as uint8 [size, size, 3], or the reason why there are none."""
    if isinstance(data, ImageError):
        return data
    try:
        return eval_transform(
            decode(data), preprocess.size, interpolation=preprocess.interpolation, resize_mode=preprocess.resize_mode
        )
    except ImageError as error:
        return error


@dataclass(frozen=True, eq=False)
class _Batch:
    """Encoded images on their way: their hashes, and what is being decoded. Nothing of what was read before."""

    number: int
    encoded: list[bytes | ImageError]
    digests: bytes
    decoding: list[Decoding]


def embed_images(
    encoder: Encoder, images: ImageSet, compute: Compute, also: Callable[[int, bytes], None] | None = None
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Places and unit vectors float32[B, E] on the device, for one batch of the readable images after another. The
    ranks share the work; `also` is shown each place and encoded image on every rank.

    While the model works on a batch, the next one is decoded. Batches that `compute.cache` has are neither decoded nor
    embedded. Unreadable images are recorded in `images.unreadable`. Raises UserError if they are too many.
    """
    device, cache, size = compute.device, compute.own_cache, compute.batch_size
    images.unreadable.clear()
    content = hashlib.blake2b(digest_size=16)
    how = repr(encoder.preprocess).encode()
    kept = images.kept(encoder.preprocess, size)
    count = -(-len(images) // size)
    encoded: Iterator[bytes | ImageError] | None = None
    if also is not None or kept is None or not kept.keys() >= set(compute.own_numbers(count)):
        encoded = iter(images.read())
    with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:

        def begin(numbers: range, own: int) -> _Batch:
            if encoded is None:
                assert kept is not None
                return _Batch(own, [], kept[own].digests, [])
            batch: list[bytes | ImageError] = []
            for number in numbers:
                read = list(itertools.islice(encoded, size))
                batch = read if number == own else batch
                for place, data in enumerate(read if also else (), number * size):
                    if also is not None and isinstance(data, bytes):
                        also(place, data)
            digests = b"".join(pool.map(digest_image, batch))
            is_known = cache is not None and cache.has(key_of(encoder, compute, how + digests))
            return _Batch(own, batch, digests, [] if is_known or pixels_of(own, digests) else start_decoding(batch))

        def pixels_of(number: int, digests: bytes) -> Pixels | None:
            found = None if kept is None else kept.get(number)
            return found if found is not None and found.digests == digests else None

        def start_decoding(batch: list[bytes | ImageError]) -> list[Decoding]:
            return [pool.submit(decode_pixels, data, encoder.preprocess) for data in batch]

        def make(batch: _Batch) -> Piece:
            pixels = pixels_of(batch.number, batch.digests)
            if pixels is None:
                decoding = batch.decoding or start_decoding(batch.encoded)
                pixels = stack(batch.digests, [each.result() for each in decoding], encoder.preprocess.size)
                if kept is not None:
                    kept[batch.number] = pixels
            if not len(pixels.index_B):
                return Piece(np.empty((0, 1), np.float32), pixels.index_B, pixels.problems)
            vector_NE = pixel_vectors(encoder, pixels.image_BHWC, compute).cpu().numpy()
            device.end_step()
            return Piece(vector_NE, pixels.index_B, pixels.problems)

        def work(batch: _Batch) -> tuple[bytes, Piece]:
            if cache is None:
                return batch.digests, make(batch)
            key = key_of(encoder, compute, how + batch.digests)
            return batch.digests, read_piece(cache, key, lambda: make(batch))

        for number, (digests, piece) in enumerate(compute.deal(count, begin, work)):
            content.update(digests)
            for place, reason in piece.problems.items():
                images.note_unreadable(number * size + place, reason)
            if compute.progress is not None:
                compute.progress(min(number * size + size, len(images)))
            if len(piece.index_N):
                yield piece.index_N + number * size, torch.from_numpy(piece.vector_NE).to(device.torch_device)
    images.content = content.hexdigest()


def stack(digests: bytes, decoded: list[UInt8Array | ImageError], size: int) -> Pixels:
    """One batch of single images."""
    readable = [(place, image) for place, image in enumerate(decoded) if not isinstance(image, ImageError)]
    problems = {place: str(image) for place, image in enumerate(decoded) if isinstance(image, ImageError)}
    image_BHWC = np.stack([image for _, image in readable]) if readable else np.empty((0, size, size, 3), np.uint8)
    return Pixels(digests, np.array([place for place, _ in readable], dtype=np.int64), image_BHWC, problems)


def pixel_vectors(encoder: Encoder, image_BHWC: UInt8Array, compute: Compute) -> Tensor:
    """Unit vectors float32[B, E] of a batch on the device."""
    rows = full_rows(image_BHWC, compute.batch_size, compute.device)
    return encoder.image_features(compute.device.common_batch({"image": rows})["image"], compute)[: len(image_BHWC)]


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


# ---- Texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenisedTexts:
    """P different texts, tokenised, of N that were given: shortest first, those of one length by their ids."""

    ids_PT: NDArray[np.int32]
    length_P: NDArray[np.int64]
    """Tokens of each text, start and end included."""
    place_N: NDArray[np.int64]
    """Where each of the given texts is among the different ones."""
    cut: int
    """Different texts that lose words to the context length."""


def tokenise(texts: Sequence[str], tokenizer: TextTokenizer, context_length: int) -> TokenisedTexts:
    """Tokenise texts, each different one once."""
    first: dict[str, int] = {}
    place_N = np.array([first.setdefault(text, len(first)) for text in texts], dtype=np.int64)
    encoded = tokenizer.encode(list(first))
    ids_PT = tokenizer.rows(encoded, context_length)
    whole_P = np.array([len(ids) + tokenizer.specials for ids in encoded], dtype=np.int64)
    length_P = whole_P.clip(max=context_length)
    order = np.lexsort((*ids_PT.T[::-1], length_P))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return TokenisedTexts(ids_PT[order], length_P[order], rank[place_N], int((whole_P > context_length).sum()))


def text_batches(texts: TokenisedTexts, fixed_length: bool) -> Iterator[slice]:
    """Slices of about equal numbers of tokens, all of one shape where the length of a text is fixed."""
    total, width = texts.ids_PT.shape
    start = 0
    while start < total:
        rows = TOKENS_PER_BATCH // width
        if not fixed_length:
            # The batch grows until its longest text, which is its last, makes it too large.
            lengths = texts.length_P[start : start + TOKENS_PER_BATCH]
            fits = lengths * np.arange(1, len(lengths) + 1) <= TOKENS_PER_BATCH
            rows = int(fits.sum())
        stop = min(total, start + max(1, rows))
        yield slice(start, stop)
        start = stop


def embed_tokenised(encoder: Encoder, texts: TokenisedTexts, compute: Compute) -> Iterator[tuple[slice, Tensor]]:
    """Unit vectors float32[rows, E] on the device, for one slice of the different texts after another. The ranks share
    the work.
    """
    device = compute.device
    width = texts.ids_PT.shape[1]
    fixed_length = device.static_shapes or encoder.fixed_length  # on XLA, as each new shape is compiled
    parts = list(text_batches(texts, fixed_length))

    def work(part: slice) -> Tensor:
        ids_BT = texts.ids_PT[part]
        if fixed_length:
            ids_BT = full_rows(ids_BT, max(1, TOKENS_PER_BATCH // width), device)
        else:
            ids_BT = np.ascontiguousarray(ids_BT[:, : texts.length_P[part].max()])
        text_BE = _text_vectors(encoder, ids_BT, part.stop - part.start, fixed_length, compute)
        device.end_step()
        return text_BE if device.world == 1 else text_BE.cpu()

    for part, text_BE in zip(parts, compute.deal(len(parts), lambda _, own: parts[own], work), strict=True):
        yield part, text_BE.to(device.torch_device)


def _text_vectors(
    encoder: Encoder, ids_BT: NDArray[np.int32], rows: int, fixed_length: bool, compute: Compute
) -> Tensor:
    """The first `rows` of a batch, from the cache where there is one that has them."""

    def features() -> Tensor:
        if not fixed_length:
            return encoder.prefix_features(Prefixes(**compute.device.batch(shared_prefixes(ids_BT))), compute)
        return encoder.text_features(compute.device.common_batch({"ids": ids_BT})["ids"], compute)[:rows]

    cache = compute.own_cache
    if cache is None:
        return features()
    key = key_of(encoder, compute, str(ids_BT.shape).encode() + ids_BT.tobytes())
    piece = read_piece(cache, key, lambda: Piece(features().cpu().numpy(), np.arange(rows), {}))
    return torch.from_numpy(piece.vector_NE).to(compute.device.torch_device)


@torch.no_grad()
def tokenised_matrix(encoder: Encoder, texts: TokenisedTexts, compute: Compute) -> Tensor:
    """Unit vectors float32[N, E] of the texts in the order in which they were given, on the device.

    Raises UserError when the model gives NaN.
    """
    matrix_PE = check_finite(torch.cat([text_BE for _, text_BE in embed_tokenised(encoder, texts, compute)]))
    return matrix_PE[torch.from_numpy(texts.place_N).to(matrix_PE.device)]


def text_matrix(encoder: Encoder, texts: Sequence[str], compute: Compute) -> Tensor:
    """Unit vectors float32[N, E] of the texts in their order, on the device."""
    return tokenised_matrix(encoder, tokenise(texts, encoder.tokenizer, encoder.context_length), compute)
