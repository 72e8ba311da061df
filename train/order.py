"""Which record comes when: a pure function of (dataset size, seed, samples seen).

Nothing is drawn and nothing is stored, so that a run can go on from any position at once, and every worker and rank
finds its share alone. The order is a block shuffle: records are taken in blocks of `block_size` neighbours, blocks are
permuted over the whole dataset, and the records of WINDOW_BLOCKS blocks at a time are permuted among each other. A
reader thus has to hold one window, each block of it contiguous on disk, while neighbours in the order come from blocks
all over the shards. Each epoch holds each record exactly once, in an order of its own.

Permutations are Feistel networks with cycle walking (Black & Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002), which take constant memory for any number of records.
"""

import numpy as np
import numpy.typing as npt

from clipkit.counter_rng import UInt64Array, bits, mix, sample_keys

WINDOW_BLOCKS = 256
ROUNDS = 6

Int64Array = npt.NDArray[np.int64]


def record_indices(positions_B: npt.ArrayLike, num_records: int, seed: int, block_size: int = 64) -> Int64Array:
    """The record at each position of the run (samples seen before it): int64[B] in [0, num_records).

    `block_size` is the one knob: 1 is a full shuffle; larger blocks make reading more sequential and put more
    neighbours into the same stretch of the order. A dataset of up to WINDOW_BLOCKS blocks is fully shuffled too.
    """
    if num_records < 1 or block_size < 1:
        raise ValueError(f"num_records and block_size must be at least 1, not {num_records} and {block_size}")
    positions = np.atleast_1d(np.asarray(positions_B)).astype(np.uint64)
    epochs, offsets = np.divmod(positions, np.uint64(num_records))
    keys_BK = bits(sample_keys(seed, epochs), 2, stream=0)

    num_blocks = -(-num_records // block_size)
    windows = max(1, round(num_blocks / WINDOW_BLOCKS))
    window_blocks = -(-num_blocks // windows)
    padded = windows * window_blocks * block_size

    # Blocks that exist only to fill the last window, and the last block's missing records, are walked over.
    order = block_shuffle(offsets, keys_BK, windows, window_blocks, block_size)
    while (outside := order >= num_records).any():
        order[outside] = block_shuffle(order[outside], keys_BK[outside], windows, window_blocks, block_size)
    assert padded >= num_records
    return order.astype(np.int64)


def block_shuffle(
    offsets_B: UInt64Array, keys_BK: UInt64Array, windows: int, window_blocks: int, block_size: int
) -> UInt64Array:
    """The permutation of `windows * window_blocks * block_size` records that `record_indices` describes."""
    window, place = np.divmod(offsets_B, np.uint64(window_blocks * block_size))
    place = permute(place, window_blocks * block_size, mix(keys_BK[:, 0] + window))
    slot, record = np.divmod(place, np.uint64(block_size))
    block = permute(window * np.uint64(window_blocks) + slot, windows * window_blocks, keys_BK[:, 1])
    return block * np.uint64(block_size) + record


def permute(values_B: UInt64Array, size: int, keys_B: UInt64Array) -> UInt64Array:
    """For each key, a permutation of 0 … size-1, applied to the value beside it."""
    permuted = feistel(values_B, size, keys_B)
    while (outside := permuted >= size).any():
        permuted[outside] = feistel(permuted[outside], size, keys_B[outside])
    return permuted


def feistel(values_B: UInt64Array, size: int, keys_B: UInt64Array) -> UInt64Array:
    """A keyed permutation of the smallest power of two that holds `size` values (at least four)."""
    width = max(2, (size - 1).bit_length())
    low_bits = width // 2
    low = values_B & np.uint64((1 << low_bits) - 1)
    high = values_B >> np.uint64(low_bits)
    high_mask, low_mask = np.uint64((1 << (width - low_bits)) - 1), np.uint64((1 << low_bits) - 1)
    for number in range(0, ROUNDS, 2):
        high = high ^ (mix(keys_B + low * np.uint64(ROUNDS) + np.uint64(number)) & high_mask)
        low = low ^ (mix(keys_B + high * np.uint64(ROUNDS) + np.uint64(number + 1)) & low_mask)
    return (high << np.uint64(low_bits)) | low
