"""Records to samples: the work of one loader worker, whether it is a thread or a process of its own.

A worker process imports this module, so nothing here may import torch: it would cost each of them seconds and half a
gigabyte. Everything that is made of a sample follows from its position, so it doesn't matter who makes it.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from clipkit.counter_rng import UInt64Array, sample_keys
from clipkit.errors import UserError
from clipkit.images import ImageError, UInt8Array
from clipkit.records import RecordError, decode_example
from clipkit.tokenizer import Tokenizer, clean
from clipkit.train.augment import Augmentation, cut, geometry_draws, recolour, warpable

# A broken record is replaced by one of the next ones of its block; a block this broken is a broken dataset.
MAX_TRIES = 16
# Captions that come back each epoch are encoded once; a full cache is emptied, which web-scale data never notices.
CACHED_CAPTIONS = 20_000
# A dataset whose images, decoded, fit into so many bytes is decoded once; one that doesn't is never kept in part.
KEPT_BYTES = 400_000_000

Int64Array = npt.NDArray[np.int64]
Priorities = Callable[[Sequence[Sequence[int]]], list[list[int]]]


class Source(Protocol):
    """What the loader reads from, `clipkit.dataset.Dataset` or what does as it does: numbered tf.train.Example records.

    It must pickle, for worker processes. `read` raises RecordError for a damaged record, UserError for a lost shard.
    """

    @property
    def num_records(self) -> int: ...

    def read(self, i: int) -> bytes: ...

    def key(self, i: int) -> str: ...


@dataclass(frozen=True)
class Job:
    """What all chunks of a run have in common."""

    source: Source
    image_field: str
    text_field: str
    image_size: int
    augmentation: Augmentation
    seed: int
    block_size: int
    syntax: bool
    """Whether to tag the captions' words, for the `syntax` way of reducing text."""


@dataclass
class Made:
    """A chunk of samples without its pixels, which lie in the batch's buffer by then."""

    records_B: Int64Array
    """The records that the samples were made of; not those asked for where one was broken."""
    ids: list[list[int]]
    """Token ids of each caption, whole, without start and end."""
    priorities: list[list[int]] | None
    caption_B: Int64Array
    """A hash of each cleaned caption."""
    bad: list[tuple[str, str]]
    """Key and reason of each record that couldn't be used."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Processor seconds of this thread by phase: read, image, colour, text."""


Kept = dict[int, tuple[UInt8Array, str]]


class SampleMaker:
    """Makes chunks of samples; one a worker, as it keeps a cache of captions.

    `kept` is where small datasets stay decoded: threads share one, and None (a worker process) keeps nothing.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None, kept: Kept | None = None) -> None:
        self.job = job
        self.tokenizer = tokenizer or Tokenizer()
        self.kept = kept if job.augmentation.is_affine else None
        self.captions: dict[str, tuple[list[int], int]] = {}
        self.tag: Priorities | None = None
        if job.syntax:
            from clipkit.syntax import Syntax

            self.tag = Syntax(self.tokenizer).priorities

    def make(self, positions_B: UInt64Array, records_B: Int64Array, image_BHWC: UInt8Array) -> Made:
        """Fill `image_BHWC` with the samples at these positions, made of these records or of their replacements.

        Raises UserError when a shard is gone, or when records can't be replaced.
        """
        clock = Clock()
        keys_B = sample_keys(self.job.seed, positions_B)
        draws_BN = geometry_draws(keys_B)
        used_B = records_B.copy()
        texts: list[str] = []
        bad: list[tuple[str, str]] = []
        for index, record in enumerate(records_B.tolist()):
            for candidate in self.candidates(record):
                try:
                    data, text = self.fetch(candidate)
                    clock.lap("read")
                    image_BHWC[index] = cut(data, self.job.image_size, self.job.augmentation, draws_BN[index])
                    clock.lap("image")
                except (ImageError, RecordError, cv2.error) as error:
                    bad.append((self.job.source.key(candidate), str(error)))
                    continue
                used_B[index] = candidate
                texts.append(text)
                break
            else:
                count, (key, reason) = len(self.candidates(record)), bad[-1]
                raise UserError(
                    f"{count} records next to each other can't be used, the last one {key} ({reason}): "
                    "build the dataset anew"
                )
        recolour(image_BHWC, self.job.augmentation, keys_B)
        clock.lap("colour")
        ids, caption_B = self.encode(texts)
        priorities = self.tag(ids) if self.tag else None
        clock.lap("text")
        return Made(used_B, ids, priorities, caption_B, bad, clock.seconds)

    def candidates(self, record: int) -> list[int]:
        """The record, then those that follow it in its block, from the block's end on to its beginning."""
        size = self.job.block_size
        first = record // size * size
        length = min(size, self.job.source.num_records - first)
        return [first + (record - first + step) % length for step in range(min(MAX_TRIES, length))]

    def fetch(self, record: int) -> tuple[bytes | UInt8Array, str]:
        """The image and the caption: what was kept, or read anew. Raises as `read`, and ImageError."""
        if self.kept is None:
            return self.read(record)
        found = self.kept.get(record)
        if found is None:
            data, text = self.read(record)
            image = warpable(data, self.job.image_size)
            if image.nbytes * self.job.source.num_records > KEPT_BYTES:
                self.kept = None
                return data, text
            found = self.kept[record] = image, text
        return found

    def read(self, record: int) -> tuple[bytes, str]:
        """The image's bytes and the caption. Raises RecordError or ImageError where one of them can't be had."""
        image_field, text_field = self.job.image_field, self.job.text_field
        try:
            # Of a record's dozen columns these two alone are unpacked.
            columns = decode_example(self.job.source.read(record), (image_field, text_field))
        except ValueError as error:
            raise ImageError(f"the record is {error}") from error
        data, text = columns.get(image_field) or [None], columns.get(text_field) or [b""]
        if not isinstance(data[0], bytes):
            raise ImageError(f"the record has no image in {image_field!r}")
        caption = text[0].decode("utf-8", errors="replace") if isinstance(text[0], bytes) else ""
        if caption not in self.captions and not clean(caption):
            raise ImageError(f"the caption in {text_field!r} is empty")
        return data[0], caption

    def encode(self, texts: list[str]) -> tuple[list[list[int]], Int64Array]:
        """Ids and hashes of the captions."""
        new = [text for text in dict.fromkeys(texts) if text not in self.captions]
        if len(self.captions) + len(new) > CACHED_CAPTIONS:
            self.captions.clear()
            new = list(dict.fromkeys(texts))
        cleaned = [clean(text) for text in new]
        for text, plain, ids in zip(new, cleaned, self.tokenizer.encode_cleaned(cleaned), strict=True):
            self.captions[text] = ids, caption_hash(plain)
        found = [self.captions[text] for text in texts]
        return [ids for ids, _ in found], np.array([number for _, number in found], np.int64)


def caption_hash(cleaned: str) -> int:
    """A signed 64-bit number for a cleaned caption, the same in every process."""
    return int.from_bytes(hashlib.blake2b(cleaned.encode(), digest_size=8).digest(), "little", signed=True)


class Clock:
    """Splits a thread's processor time into phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.thread_time()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`."""
        now = time.thread_time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
