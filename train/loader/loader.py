"""The loader: batches whose every byte is a function of (dataset, configuration, samples seen).

The number of workers, ranks and batches made ahead changes when a batch is ready, never what is in it: the order is a
pure function (`clipkit.train.order`), every random choice belongs to a sample's position (`clipkit.counter_rng`), and
what a worker makes is put where the position says. Going on from any position therefore costs nothing and needs no
state but the number of samples seen.
"""

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass, field

import cv2
import numpy as np

from clipkit.counter_rng import UInt64Array, sample_keys
from clipkit.errors import UserError
from clipkit.log import warn_on_stderr
from clipkit.pixels.images import UInt8Array
from clipkit.text.tokenizer import Tokenizer, WordTokenizer
from clipkit.text.tokens import image_keep_indices, reduce_text
from clipkit.train.loader.samples import Chunk, ChunkResult, LoaderConfig, Sample, SampleMaker
from clipkit.train.loader.workers import Buffers, Pool, ProcessWorker
from clipkit.train.order import Int64Array
from clipkit.train.sources.source import Source

# More threads than this wait for the interpreter's lock more than they gain; from there on workers are processes. Where
# images are warped, two threads still do better: they share what a small dataset keeps decoded (`SampleMaker.decoded`).
MAX_THREADS, MAX_WARPING_THREADS = 1, 2
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128
# The order is computed for this many positions at once: fewer would take as long.
ORDER_SPAN = 4096
# A chunk that isn't there after this time is reported: with the batches made ahead, within half a minute of the stall.
STALL_SECONDS = 20.0
# Bad records stop a run when they are more than the allowed share of the samples seen by BAD_DEVIATIONS standard
# deviations: less may be chance. At least BAD_BASE samples count as seen, so that one bad record in the first ten stops
# nothing.
BAD_BASE, BAD_DEVIATIONS = 1000, 3.0
REPORTED_BAD = 1000


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch; every array's first axis is the sample."""

    image_BHWC: np.ndarray
    """uint8; or float32[B, E], the images' stored vectors."""
    ids_BT: np.ndarray
    """int32, start and end included, padded; or float32[B, E], the captions' stored vectors."""
    keep_BK: Int64Array | None
    """Patches that stay, ascending; None when all do."""
    caption_B: Int64Array
    """A hash of the cleaned caption: equal for equal captions."""
    positions_B: UInt64Array
    """Samples seen before each sample."""
    records_B: Int64Array
    """The dataset's record behind each sample."""
    bad: int = 0
    """Records that couldn't be used and were replaced."""
    keys: list[str] | None = None
    teacher_B2E: np.ndarray | None = None
    """int8: the teachers' embeddings of each sample's view and caption, of any length; None without teachers."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Processor seconds by phase: read, image, colour, text."""
    wordless: list[int] = field(default_factory=list)
    """The samples whose caption has no letter or digit."""

    @property
    def length_B(self) -> Int64Array:
        """Text tokens of each sample up to CLIP's end token, which has the largest id."""
        return self.ids_BT.argmax(axis=1) + 1

    def arrays(self) -> dict[str, np.ndarray]:
        """What goes to the device, by name."""
        image = "image_BHWC" if self.image_BHWC.ndim == 4 else "image_BE"
        text = "text_BE" if self.ids_BT.dtype == np.float32 else "ids_BT"
        arrays = {image: self.image_BHWC, text: self.ids_BT, "caption_B": self.caption_B}
        if self.keep_BK is not None:
            arrays["keep_BK"] = self.keep_BK
        if self.teacher_B2E is not None:
            arrays["teacher_B2E"] = self.teacher_B2E
        return arrays


def batches(
    source: Source,
    config: LoaderConfig,
    start: int = 0,
    stop: int | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    processes: bool | None = None,
    prefetch: int = 2,
    keys: bool = False,
    warn: Callable[[str], None] | None = None,
    bad_reasons: dict[str, str] | None = None,
    tokenizer: WordTokenizer | None = None,
) -> Generator[Batch, None, None]:
    """Batches from `start` samples seen up to `stop` (for ever when None): this rank's contiguous share of each.

    `stop - start` must be a multiple of the batch size, for shapes are static. `workers` 0 makes each batch when it is
    asked for; else so many make up to `prefetch` batches ahead, as threads, or as `processes` (chosen by their number
    when None). `keys` fills `Batch.keys`. `warn` gets one line for each broken record, dead or stalled worker (default:
    stderr). `bad_reasons` are the broken records that were reported before, with the reasons, and gets those that are
    reported now. `tokenizer` is CLIP's when None; token ids that a source holds must be its own. Closing the generator
    ends all workers.

    Raises UserError at once for invalid settings, and later when a shard is gone or when more than `max_bad` of the
    records are broken.
    """
    check_loader(source, config, start, stop, world)
    if processes is None:
        processes = workers > (MAX_WARPING_THREADS if config.augmentation.is_affine else MAX_THREADS)
    loader = Loader(
        source,
        config,
        workers,
        processes and workers > 0 and not source.feature_width,  # what little there is to do is the same in threads
        prefetch if workers else 0,
        keys,
        warn or warn_on_stderr,
        {} if bad_reasons is None else bad_reasons,
        tokenizer or Tokenizer(),
    )
    return loader.run(start, stop, rank, world)


@dataclass
class PendingBatch:
    """A batch whose chunks are being made."""

    positions_B: UInt64Array
    buffer: UInt8Array
    slot: int | None
    """The shared buffer it lies in; None for memory of its own."""
    parts: list[Future[ChunkResult]]
    """Chunk by chunk, and the first record of each."""
    firsts: list[int]


@dataclass
class Loader:
    """The state of one run of `batches`: workers, buffers, and the count of bad records."""

    source: Source
    config: LoaderConfig
    workers: int
    processes: bool
    prefetch: int
    keys: bool
    warn: Callable[[str], None]
    bad_reasons: dict[str, str]
    tokenizer: WordTokenizer
    seen: int = 0
    bad: int = 0

    def run(self, start: int, stop: int | None, rank: int, world: int) -> Generator[Batch, None, None]:
        """The generator behind `batches`."""
        share = self.config.batch_size // world
        size, width = self.config.image_size, self.source.feature_width
        self.shape = (share, width) if width else (share, size, size, 3)
        slots = self.prefetch + 3  # one being filled, one in use, and one that the loop variable still names
        self.free = deque(range(slots))
        with contextlib.ExitStack() as ends:
            ends.callback(cv2.setNumThreads, cv2.getNumThreads())
            cv2.setNumThreads(0)  # each worker is one core's share; put back at the end
            self.buffers = Buffers(slots, self.shape) if self.processes else None
            if self.buffers is not None:
                ends.callback(self.buffers.close)
            self.pool = Pool(self.make_workers(), threads=self.workers > 0)
            ends.callback(self.pool.close)
            pending: deque[PendingBatch] = deque()
            for positions_B, records_B in self.order(start, stop, rank, share):
                pending.append(self.begin(positions_B, records_B))
                if len(pending) > self.prefetch:
                    yield self.finish(pending.popleft())
            while pending:
                yield self.finish(pending.popleft())

    def make_workers(self) -> list[SampleMaker] | list[ProcessWorker]:
        """The workers of the pool; one even where nothing is made ahead."""
        made = self.source, self.config, self.tokenizer
        if self.buffers is not None:
            return [ProcessWorker(*made, self.buffers, self.warn) for _ in range(self.workers)]
        decoded = dict[int, Sample]()
        return [SampleMaker(*made, decoded) for _ in range(max(1, self.workers))]

    def order(self, start: int, stop: int | None, rank: int, share: int) -> Iterator[tuple[UInt64Array, Int64Array]]:
        """Positions and records of this rank's share of each batch."""
        size = self.config.batch_size
        at_once = max(1, ORDER_SPAN // share)
        while stop is None or start < stop:
            count = at_once if stop is None else min(at_once, (stop - start) // size)
            firsts = np.arange(start, start + count * size, size, dtype=np.uint64) + np.uint64(rank * share)
            positions_NB = firsts[:, None] + np.arange(share, dtype=np.uint64)
            positions = positions_NB.ravel().astype(np.uint64)
            indices = self.source.records_at(positions, self.config.seed, self.config.block_size)
            yield from zip(positions_NB, indices.reshape(positions_NB.shape), strict=True)
            start += count * size

    def begin(self, positions_B: UInt64Array, records_B: Int64Array) -> PendingBatch:
        """Give a batch to the workers, in chunks that keep all of them busy."""
        slot = None
        if self.buffers is not None:
            slot = self.free.popleft()
            buffer = self.buffers.array(slot)
        else:
            buffer = np.empty(self.shape, np.float32 if self.source.feature_width else np.uint8)
        size = -(-len(positions_B) // (2 * max(1, self.workers)))
        size = min(max(size, SMALLEST_CHUNK), LARGEST_CHUNK)
        parts = []
        for first in range(0, len(positions_B), size):
            rows = slice(first, first + size)
            parts.append(self.pool.submit(Chunk(positions_B[rows], records_B[rows], slot or 0, first, buffer[rows])))
        return PendingBatch(positions_B, buffer, slot, parts, records_B[::size].tolist())

    def finish(self, pending: PendingBatch) -> Batch:
        """Wait for a batch's chunks and put them together."""
        results = [self.wait(part, first) for part, first in zip(pending.parts, pending.firsts, strict=True)]
        self.count_bad([entry for part in results for entry in part.bad], len(pending.positions_B))
        keys_B = sample_keys(self.config.seed, pending.positions_B)
        records_B = np.concatenate([part.records_B for part in results])
        teachers = [part.teacher_B2E for part in results if part.teacher_B2E is not None]
        seconds: dict[str, float] = {}
        wordless: list[int] = []
        first = 0
        for part in results:
            wordless += [first + row for row in part.wordless]
            first += len(part.records_B)
            for phase, value in part.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + value
        return Batch(
            self.pixels(pending),
            self.texts(results, keys_B),
            keep_indices(self.config, keys_B),
            np.concatenate([part.caption_B for part in results]),
            pending.positions_B,
            records_B,
            sum(len(part.bad) for part in results),
            [self.source.key(record) for record in records_B.tolist()] if self.keys else None,
            np.concatenate(teachers) if teachers else None,
            seconds,
            wordless,
        )

    def texts(self, results: Sequence[ChunkResult], keys_B: UInt64Array) -> np.ndarray:
        """The captions' ids for the trainer, or their stored vectors."""
        vectors = [part.text_BE for part in results if part.text_BE is not None]
        if vectors:
            return np.concatenate(vectors)
        return reduce_text(
            self.config.text_reduction,
            [row for part in results for row in part.ids],
            self.config.context_length,
            keys_B,
            [row for part in results for row in part.priorities or []] or None,
            start=self.tokenizer.start,
            end=self.tokenizer.end,
            pad_id=self.tokenizer.pad,
        )

    def pixels(self, pending: PendingBatch) -> UInt8Array:
        """The batch's pixels for the trainer.

        A shared buffer is used again once the trainer has let go of it. Were that the last free one, the trainer gets a
        copy, so that it may keep as many batches as it likes.
        """
        if pending.slot is None:
            return pending.buffer
        if not self.free:
            self.free.append(pending.slot)
            return pending.buffer.copy()
        weakref.finalize(pending.buffer.base, self.free.append, pending.slot).atexit = False
        return pending.buffer

    def wait(self, part: Future[ChunkResult], first: int) -> ChunkResult:
        """A chunk's result; says so when it takes unusually long."""
        waited = 0.0
        while True:
            try:
                return part.result(timeout=STALL_SECONDS)
            except StillRunning:
                if part.done():
                    raise
                waited += STALL_SECONDS
                self.warn(
                    f"the loader has waited {waited:.0f} s for samples from {self.source.key(first)} on: "
                    "is the disk reachable?"
                )

    def count_bad(self, bad: Sequence[tuple[str, str]], seen: int) -> None:
        """Count bad records and report each once. Raises UserError when they are too many."""
        self.seen += seen
        self.bad += len(bad)
        for key, reason in bad:
            if key not in self.bad_reasons and len(self.bad_reasons) < REPORTED_BAD:
                self.bad_reasons[key] = reason
                self.warn(f"{key} is replaced by its neighbour: {reason}")
        allowed = self.config.max_bad * max(self.seen, BAD_BASE)
        if self.bad > allowed + BAD_DEVIATIONS * math.sqrt(allowed):
            examples = "; ".join(f"{key} ({reason})" for key, reason in list(self.bad_reasons.items())[:3])
            raise UserError(
                f"{self.bad:,} of {self.seen + self.bad:,} records are broken, more than {self.config.max_bad:.0%}, "
                f"among them {examples}: see clipkit verify and build the dataset again, or train with "
                "--set max_bad=0.1"
            )


def check_loader(source: Source, config: LoaderConfig, start: int, stop: int | None, world: int) -> None:
    """Raise UserError for invalid settings."""
    config.augmentation.check()
    if source.num_records < 1:
        raise UserError(f"{source!r} has no records: build it from shards that have some")
    if config.batch_size < 1 or config.batch_size % world:
        raise UserError(
            f"a batch of {config.batch_size} can't be shared by {world} devices: choose a multiple of {world}"
        )
    if stop is not None and (stop < start or (stop - start) % config.batch_size):
        raise UserError(f"{stop - start:,} samples aren't a whole number of batches of {config.batch_size}: round them")
    if config.block_size < 1:
        raise UserError(f"block_size is {config.block_size}: choose 1 (a full shuffle) or more")
    there = source.caption_sources
    for name in config.captions:
        if name not in there:
            raise UserError(f"captions.{name}: the data have only captions of {', '.join(there)}: name one of these")
    if config.image_keep is not None and (config.image_reduction is None or config.grid is None):
        raise UserError("image_keep needs image_reduction (random, grid or block)")
    one = np.zeros(1, np.uint64)
    reduce_text(config.text_reduction, [[1]], config.context_length, one, [[0]])
    keep_indices(config, one)


def keep_indices(config: LoaderConfig, keys_B: UInt64Array) -> Int64Array | None:
    """The patches that stay of each image, or None when all do."""
    if config.image_reduction is None or config.grid is None or config.image_keep is None:
        return None
    return image_keep_indices(config.image_reduction, config.grid, config.image_keep, keys_B)
