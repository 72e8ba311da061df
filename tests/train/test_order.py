"""The order visits each record once an epoch, knows no state, and mixes nearly as well as a full shuffle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.train.order import WINDOW_BLOCKS, permute, record_indices

sizes = st.integers(1, 3000)
blocks = st.sampled_from([1, 2, 3, 7, 64, 700])
seeds = st.integers(0, 2**32)


@given(sizes, blocks, seeds, st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_each_epoch_visits_each_record_once(num_records: int, block_size: int, seed: int, epoch: int) -> None:
    positions = np.arange(num_records) + epoch * num_records
    indices = record_indices(positions, num_records, seed, block_size)
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(np.sort(indices), np.arange(num_records))


# Of a few records in a block of many, a hundred epochs' places take seconds to find: tests above and below have those.
@given(st.integers(30, 3000), blocks, seeds, st.integers(0, 10**15))
@settings(max_examples=40, deadline=None)
def test_a_position_alone_decides(num_records: int, block_size: int, seed: int, start: int) -> None:
    positions = np.arange(start, start + 100)
    together = record_indices(positions, num_records, seed, block_size)
    parts = [record_indices(part, num_records, seed, block_size) for part in np.array_split(positions, 7)]
    np.testing.assert_array_equal(together, np.concatenate(parts))
    np.testing.assert_array_equal(together[::-1], record_indices(positions[::-1], num_records, seed, block_size))


@given(st.integers(1, 500), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    keys = np.full(size, key, np.uint64)
    np.testing.assert_array_equal(np.sort(permute(np.arange(size, dtype=np.uint64), size, keys)), np.arange(size))


def test_small_permutations_are_all_about_equally_frequent() -> None:
    draws = 6000
    keys = np.arange(draws, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    images = np.stack([permute(np.full(draws, value, np.uint64), 4, keys) for value in range(4)], 1)
    _, counts = np.unique(images, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 0.5 * draws / 24
    assert counts.max() < 2.0 * draws / 24


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = record_indices(np.arange(20_000), 10_000, 0).reshape(2, -1)
    other = record_indices(np.arange(10_000), 10_000, 1)
    for order in (second, other):
        assert (first == order).mean() < 0.001


def test_huge_datasets_cost_nothing() -> None:
    indices = record_indices(np.arange(5 * 10**12, 5 * 10**12 + 1000), 400_000_000, 0)
    assert len(np.unique(indices)) == 1000
    assert 0 <= indices.min() < 10**7
    assert indices.max() < 400_000_000


@pytest.mark.parametrize("block_size", [1, 16, 64, 256])
def test_shuffling_is_close_to_a_full_one(block_size: int) -> None:
    n = 200_000
    order = record_indices(np.arange(n), n, seed=0, block_size=block_size)
    full = np.random.default_rng(0).permutation(n)
    ours, theirs = (np.sort(np.abs(np.diff(indices))) for indices in (order, full))
    # The distance between one sample and the next is distributed as in a full shuffle (Kolmogorov–Smirnov) ...
    distance = np.abs(np.searchsorted(ours, theirs) - np.arange(n - 1)).max() / n
    assert distance < 0.01
    # ... and a sample's successor comes from its own block no more often than chance within one window says.
    same_block = (order[1:] // block_size == order[:-1] // block_size).mean()
    assert same_block < 1.5 / WINDOW_BLOCKS
    # Where a record comes says nothing about where it lies on disk.
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.1


@pytest.mark.parametrize("block_size", [1, 16, 64, 256])
def test_a_million_records_are_mixed_as_the_documents_say(block_size: int) -> None:
    """The numbers of docs/shuffle.md: distances, neighbours one after the other and within a batch, shards."""
    n, batch = 1_000_000, 1024
    order = record_indices(np.arange(n), n, seed=0, block_size=block_size)
    distances = np.abs(np.diff(order))
    found = np.cumsum(np.bincount(distances, minlength=n)[1:]) / (n - 1)
    steps = np.arange(1, n)
    full = np.cumsum(2 * (n - steps) / (n * (n - 1)))
    assert np.abs(found - full).max() < 0.005
    # Blocks of one record are a full shuffle; else a neighbour on disk may stand anywhere within the window.
    window = WINDOW_BLOCKS * block_size if block_size > 1 else n
    assert (distances == 1).mean() < 1.3 * 2 / window + 4e-6
    together = [
        np.isin(rows + 1, rows, assume_unique=True).mean() for rows in order[: n // batch * batch].reshape(-1, batch)
    ]
    assert np.mean(together) < 1.1 * batch / window
    shards = [len(np.unique(rows // 10_000)) for rows in order[: n // batch * batch].reshape(-1, batch)]
    assert np.mean(shards) > 90


def test_reading_stays_in_few_blocks_for_a_while() -> None:
    n, block_size = 400_000, 64
    order = record_indices(np.arange(n), n, seed=0, block_size=block_size)
    window = WINDOW_BLOCKS * block_size
    blocks = [len(np.unique(part // block_size)) for part in np.array_split(order, n // window)]
    assert max(blocks) <= 3 * WINDOW_BLOCKS


def test_small_datasets_are_fully_shuffled() -> None:
    order = record_indices(np.arange(8548), 8548, seed=0, block_size=64)
    first = np.sort(order[:4274])
    assert abs(first.mean() / 8548 - 0.5) < 0.02
    assert len(np.unique(first // 64)) == 134


@pytest.mark.parametrize(("num_records", "block_size"), [(0, 64), (5, 0)])
def test_senseless_sizes_are_refused(num_records: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        record_indices([0], num_records, 0, block_size)


def test_published_order_stays() -> None:
    # Another order after an upgrade would break the promise of exact resume.
    assert record_indices(np.arange(8), 1000, seed=0, block_size=64).tolist() == [426, 525, 48, 324, 983, 79, 504, 986]
