"""Records to samples: the work of one loader worker, whether it is a thread or a process of its own.

A worker process imports this module, so nothing here may import torch: it would cost each of them seconds and half a
gigabyte. Everything that is made of a sample follows from its position, so it doesn't matter who makes it.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from clipkit.counter_rng import UInt64Array, sample_keys
from clipkit.errors import UserError
from clipkit.pixels.images import ImageError, UInt8Array
from clipkit.text.tokenizer import WordTokenizer
from clipkit.train.loader.augment import Augmentation, cut, geometry_draws, recolour, warpable
from clipkit.train.loader.captions import (
    Text,
    caption_draws,
    draw_caption,
    draw_sentence,
    sentence_draws,
    text_of,
    used_weights,
)
from clipkit.train.order import Int64Array
from clipkit.train.sources.source import Pair, Source
from clipkit.train.teachers.stored import Int8Array, ReinforcedSource

if TYPE_CHECKING:
    from clipkit.text.tokens import ImageMethod, TextMethod

# A broken record is replaced by one of the next ones of its block; a block this broken is a broken dataset.
MAX_TRIES = 16
# So many records of a chunk are read before the first of them is decoded: each kind of work goes faster in a row.
# Of large images fewer, by their bytes.
READ_TOGETHER, READ_TOGETHER_BYTES = 32, 32_000_000
# A dataset whose images, decoded, fit into so many bytes is decoded once; one that doesn't is never kept in part.
DECODED_BYTES = 400_000_000

Priorities = Callable[[Sequence[Sequence[int]]], list[list[int]]]


@dataclass(frozen=True)
class LoaderConfig:
    """Everything that decides what is in a batch."""

    image_size: int
    context_length: int
    batch_size: int
    """Samples in a batch of all ranks together."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    text_reduction: "TextMethod" = "truncate"
    image_reduction: "ImageMethod | None" = None
    image_keep: int | None = None
    """Patches that stay of the `grid` (rows, columns), where not all do."""
    grid: tuple[int, int] | None = None
    seed: int = 0
    block_size: int = 64
    """Records that the shuffle keeps together on disk (`clipkit.train.order`)."""
    max_bad: float = 0.01
    """Share of the records that may be broken before the run stops."""
    captions: Mapping[str, float] = field(default_factory=dict)
    """How often captions of each source are taken, by weight; without any, the original ones alone."""


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring samples of a batch, to be made."""

    positions_B: UInt64Array
    records_B: Int64Array
    slot: int
    """The number of the batch's buffer, and this chunk's first row in it."""
    first: int
    image_BHWC: np.ndarray
    """The rows of the buffer themselves, in this process."""


@dataclass
class ChunkResult:
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
    wordless: list[int] = field(default_factory=list)
    """The rows whose caption has no letter or digit."""
    teacher_B2E: Int8Array | None = None
    """The teachers' embeddings of each sample's view and caption, where the source has them."""
    text_BE: npt.NDArray[np.float32] | None = None
    """The captions' stored vectors, where these stand in their place; there are no ids then."""


class Sample(NamedTuple):
    """A pair that can be used: its image encoded, or decoded for `warp`."""

    image: bytes | memoryview | UInt8Array
    text: Text
    vectors: memoryview | None = None
    """Those of its captions, where they stand in their place."""


class SampleMaker:
    """Makes chunks of samples; one a worker.

    `decoded` is where small datasets stay decoded, by record: threads share one, and None (a worker process) keeps
    nothing.
    """

    def __init__(
        self,
        source: Source,
        config: LoaderConfig,
        tokenizer: WordTokenizer,
        decoded: dict[int, Sample] | None = None,
    ) -> None:
        self.source, self.config = source, config
        self.tokenizer = tokenizer
        self.stored = source.stored if isinstance(source, ReinforcedSource) else None
        self.decoded = decoded if config.augmentation.is_affine else None
        self.weights = used_weights(config.captions)
        self.tag: Priorities | None = None
        if config.text_reduction == "syntax":
            from clipkit.text.syntax import Syntax

            self.tag = Syntax(self.tokenizer).priorities

    def make(self, chunk: Chunk) -> ChunkResult:
        """Fill the chunk's rows with the samples at its positions, made of its records or of their replacements.

        Raises UserError when a shard is gone, or when records can't be replaced.
        """
        clock = Clock()
        image_BHWC = chunk.image_BHWC
        keys_B = sample_keys(self.config.seed, chunk.positions_B)
        used_B = chunk.records_B.copy()
        views_B = np.zeros(len(keys_B), np.int64) if self.stored is None else self.stored.manifest.draw(keys_B)
        draws = geometry_draws(self.view_keys(keys_B, used_B, views_B)).tolist()
        by_caption, clean = caption_draws(keys_B).tolist(), self.tokenizer.clean
        width = self.source.text_width or 0
        text_BE = np.empty((len(keys_B), width), np.float32) if width else None
        # The images aren't held until the chunk is made: a hundred large ones fill the memory.
        texts: list[Text] = []
        bad: list[tuple[str, str]] = []
        records = chunk.records_B.tolist()
        for first in range(0, len(records), READ_TOGETHER):
            coming = enumerate(self.samples(records[first : first + READ_TOGETHER]), first)
            while group := take_group(coming):
                clock.lap("read")
                for index, sample in group:
                    used_B[index], used = self.write_pixels(
                        records[index], sample, draws[index], image_BHWC[index], bad, int(views_B[index])
                    )
                    texts.append(draw_caption(used.text, by_caption[index], clean))
                    if text_BE is not None and used.vectors is not None:
                        size = len(used.image)  # of each vector, in bytes: all are of one kind
                        start = texts[-1].number * size
                        text_BE[index] = np.frombuffer(used.vectors[start : start + size], f"<f{size // width}")
                group.clear()
                clock.lap("image")
        if not self.source.feature_width:
            recolour(image_BHWC, self.config.augmentation, self.view_keys(keys_B, used_B, views_B))
        clock.lap("colour")
        ids = self.ids(texts, keys_B) if text_BE is None else []
        priorities = self.priorities(texts, ids) if text_BE is None else None
        # Not every tokenizer's `clean` takes the case away, but all of their ids are without it.
        caption_B = np.array([caption_hash(text.caption.lower()) for text in texts], np.int64)
        wordless = [row for row, text in enumerate(texts) if not any(map(str.isalnum, text.caption))]
        clock.lap("text")
        teacher_B2E = None
        if self.stored is not None:
            teacher_B2E = self.stored.rows(used_B, views_B, np.array([text.number for text in texts]))
            clock.lap("read")
        return ChunkResult(used_B, ids, priorities, caption_B, bad, clock.seconds, wordless, teacher_B2E, text_BE)

    def view_keys(self, keys_B: UInt64Array, records_B: npt.ArrayLike, views_B: npt.ArrayLike) -> UInt64Array:
        """What each sample's augmentation is drawn from: its own key, or that of a stored view of its record."""
        return keys_B if self.stored is None else self.stored.manifest.view_keys(records_B, views_B)

    def write_pixels(
        self,
        record: int,
        found: Sample | UserError,
        draws: Sequence[float],
        image_HWC: np.ndarray,
        bad: list[tuple[str, str]],
        view: int,
    ) -> tuple[int, Sample]:
        """Write the pixels of a record or of the first one that can stand in for it, colours unchanged; says which.

        Stored embeddings are of a record's own `view`, so a stand-in is cut as its own is. Adds what can't be used to
        `bad`. Raises UserError when nothing can.
        """
        for candidate, sample in self.candidates(record, found):
            if isinstance(sample, UserError):
                reason: Exception = sample
            else:
                if self.source.feature_width:
                    image_HWC[:] = np.frombuffer(sample.image, f"<f{len(sample.image) // len(image_HWC)}")
                    return candidate, sample
                if self.stored is not None and candidate != record:
                    draws = geometry_draws(self.stored.manifest.view_keys([candidate], [view]))[0].tolist()
                try:
                    cut(sample.image, self.config.image_size, self.config.augmentation, draws, image_HWC)
                except (ImageError, cv2.error) as error:
                    reason = error
                else:
                    return candidate, sample
            bad.append((self.source.key(candidate), str(reason)))
        key, why = bad[-1]
        raise UserError(
            f"{len(self.stand_ins(record)) + 1} records next to each other can't be used, the last one {key} ({why}): "
            "build the dataset again"
        )

    def candidates(self, record: int, found: Sample | UserError) -> Iterator[tuple[int, Sample | UserError]]:
        """The record, then what may stand in for it, each read when it is asked for."""
        yield record, found
        for other in self.stand_ins(record):
            yield other, next(self.samples([other]))

    def stand_ins(self, record: int) -> list[int]:
        """The records that follow in the block, from the block's end on to its beginning."""
        block = self.source.block(record, self.config.block_size)
        place = block.index(record)
        return [block[(place + step) % len(block)] for step in range(1, min(MAX_TRIES, len(block)))]

    def samples(self, records: Sequence[int]) -> Iterator[Sample | UserError]:
        """What the records hold, read or kept decoded."""
        decoded = self.decoded
        if decoded is None:
            yield from (self.to_sample(pair) for pair in self.source.pairs(records))
            return
        found = {record: decoded[record] for record in records if record in decoded}
        pairs = self.source.pairs([record for record in records if record not in found])
        for record in records:
            yield found[record] if record in found else self.keep_decoded(record, self.to_sample(next(pairs)))

    def to_sample(self, pair: Pair | UserError) -> Sample | UserError:
        """A pair with its caption cleaned, or why it can't be used."""
        if isinstance(pair, UserError):
            return pair
        text = text_of(pair, self.weights, self.tokenizer.clean)
        if text is None:
            sources = " or ".join(sorted(self.config.captions and self.weights))
            return ImageError(
                f"it has no caption of the source {sources}; name another one in captions"
                if sources
                else "the caption is empty"
            )
        return Sample(pair.image, text, pair.vectors)

    def keep_decoded(self, record: int, sample: Sample | UserError) -> Sample | UserError:
        """The sample, its image decoded and kept where all of the dataset's would fit."""
        if self.decoded is None or isinstance(sample, UserError) or isinstance(sample.image, np.ndarray):
            return sample
        try:
            image = warpable(sample.image, self.config.image_size)
        except ImageError as error:
            return error
        if image.nbytes * self.source.num_records > DECODED_BYTES:
            self.decoded = None
            return sample
        self.decoded[record] = Sample(image, sample.text)
        return self.decoded[record]

    def ids(self, texts: Sequence[Text], keys_B: UInt64Array) -> list[list[int]]:
        """Token ids of the captions, or of a sentence of those that don't fit, where that is wanted."""
        encoded = iter(self.tokenizer.encode_cleaned([text.caption for text in texts if text.ids is None]))
        ids = [next(encoded) if text.ids is None else text.ids for text in texts]
        if self.config.text_reduction == "sentence":
            room = self.config.context_length - self.tokenizer.specials
            long = [row for row, found in enumerate(ids) if len(found) > room]
            draws, clean = sentence_draws(keys_B).tolist(), self.tokenizer.clean
            sentences = [draw_sentence(texts[row].raw, draws[row], clean) for row in long]
            for row, shorter in zip(long, self.tokenizer.encode_cleaned(sentences), strict=True):
                ids[row] = shorter
        return ids

    def priorities(self, texts: Sequence[Text], ids: Sequence[list[int]]) -> list[list[int]] | None:
        """The class of each id's word, where they are wanted."""
        if self.tag is None:
            return None
        tagged = iter(self.tag([row for text, row in zip(texts, ids, strict=True) if text.priorities is None]))
        return [next(tagged) if text.priorities is None else text.priorities for text in texts]


def take_group(coming: Iterator[tuple[int, Sample | UserError]]) -> list[tuple[int, Sample | UserError]]:
    """The samples that come next, until their images take READ_TOGETHER_BYTES; [] at the end."""
    group, size = [], 0
    for index, sample in coming:
        group.append((index, sample))
        size += 0 if isinstance(sample, UserError) else len(sample.image)
        if size >= READ_TOGETHER_BYTES:
            break
    return group


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
