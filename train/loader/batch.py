"""What a batch is, and everything that decides what is in it."""

from dataclasses import dataclass, field

import numpy as np

from clipkit.counter_rng import UInt64Array
from clipkit.errors import UserError
from clipkit.pixels.images import UInt8Array
from clipkit.text.tokens import ImageMethod, TextMethod, image_keep_indices, reduce_text
from clipkit.train.loader.augment import Augmentation
from clipkit.train.order import Int64Array
from clipkit.train.sources.source import Examples, Source


@dataclass(frozen=True)
class LoaderConfig:
    """Everything that decides what is in a batch."""

    image_size: int
    context_length: int
    batch_size: int
    """Samples in a batch of all ranks together."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    text_reduction: TextMethod = "truncate"
    image_reduction: ImageMethod | None = None
    image_keep: int | None = None
    """Patches that stay of the `grid` (rows, columns), where not all do."""
    grid: tuple[int, int] | None = None
    seed: int = 0
    block_size: int = 64
    """Records that the shuffle keeps together on disk (`clipkit.train.order`)."""
    max_bad: float = 0.01
    """Share of the records that may be broken before the run stops."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch; every array's first axis is the sample."""

    image_BHWC: UInt8Array
    ids_BT: np.ndarray
    """int32, start and end included, zero padded."""
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
    seconds: dict[str, float] = field(default_factory=dict)
    """Processor seconds by phase: read, image, colour, text."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What goes to the device, by name."""
        arrays = {"image_BHWC": self.image_BHWC, "ids_BT": self.ids_BT, "caption_B": self.caption_B}
        if self.keep_BK is not None:
            arrays["keep_BK"] = self.keep_BK
        return arrays


def check(dataset: Source | Examples, config: LoaderConfig, start: int, stop: int | None, world: int) -> None:
    """Raise UserError for what can't be."""
    config.augmentation.check()
    if dataset.num_records < 1:
        raise UserError(f"{dataset!r} has no records: build it from shards that have some")
    if config.batch_size < 1 or config.batch_size % world:
        raise UserError(
            f"a batch of {config.batch_size} can't be shared by {world} devices: choose a multiple of {world}"
        )
    if stop is not None and (stop < start or (stop - start) % config.batch_size):
        raise UserError(f"{stop - start:,} samples aren't a whole number of batches of {config.batch_size}: round them")
    if config.block_size < 1:
        raise UserError(f"block_size is {config.block_size}: choose 1 (a full shuffle) or more")
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
