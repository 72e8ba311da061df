"""The eight ways to reduce tokens: what they keep, and that it depends on the sample's key alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit import counter_rng
from clipkit.errors import UserError
from clipkit.text.tokenizer import EOT, SOT, Tokenizer
from clipkit.text.tokens import gather_tokens, image_keep_indices, reduce_text, window_size

GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12))
KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5)
CAPTIONS = st.lists(st.lists(st.integers(1, 49405), max_size=30), min_size=1, max_size=5)
TEXT_METHODS = ["truncate", "random", "block", "syntax"]


def keys(count: int, seed: int = 0) -> np.ndarray:
    return counter_rng.sample_keys(seed, np.arange(count))


def possible_keep(method: str, grid: tuple[int, int], data: st.DataObject) -> int:
    """A number of patches that the method can keep of this grid."""
    rows, columns = grid
    if method == "grid":
        side = data.draw(st.integers(1, max(grid)))
        return math.ceil(rows / side) * math.ceil(columns / side)
    if method == "block":
        return data.draw(st.integers(1, rows)) * data.draw(st.integers(1, columns))
    return data.draw(st.integers(1, rows * columns))


@pytest.mark.parametrize("method", ["random", "grid", "block"])
@given(grid=GRIDS, batch=KEYS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_kept_patches(method: str, grid: tuple[int, int], batch: list[int], data: st.DataObject) -> None:
    keep = possible_keep(method, grid, data)
    kept_BK = image_keep_indices(method, grid, keep, np.array(batch, np.uint64))
    assert kept_BK.shape == (len(batch), keep)
    assert kept_BK.dtype == np.int64
    assert kept_BK.min() >= 0
    assert kept_BK.max() < grid[0] * grid[1]
    assert (np.diff(kept_BK, axis=1) > 0).all()  # ascending, none twice
    # A sample's patches don't depend on the batch it is in, nor on anything drawn before.
    for key, kept_K in zip(batch, kept_BK, strict=True):
        assert (image_keep_indices(method, grid, keep, np.array([key], np.uint64))[0] == kept_K).all()


@given(grid=GRIDS, side=st.integers(1, 5), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_grid_keeps_one_patch_of_each_window(grid: tuple[int, int], side: int, key: int) -> None:
    rows, columns = grid
    windows = math.ceil(rows / side) * math.ceil(columns / side)
    kept_K = image_keep_indices("grid", grid, windows, [key])[0]
    side = window_size(grid, windows)  # larger windows may be as many on a narrow grid
    seen = set(zip(kept_K // columns // side, kept_K % columns // side, strict=True))
    assert len(seen) == windows


@given(grid=GRIDS, key=st.integers(0, 2**64 - 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_block_is_a_full_rectangle(grid: tuple[int, int], key: int, data: st.DataObject) -> None:
    keep = possible_keep("block", grid, data)
    kept_K = image_keep_indices("block", grid, keep, [key])[0]
    rows, columns = kept_K // grid[1], kept_K % grid[1]
    assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == keep


def test_the_papers_numbers() -> None:
    """ViT-B/16 at 224 px: a quarter of 196 patches; blocks are squares on square grids."""
    for method in ("random", "grid", "block"):
        assert image_keep_indices(method, (14, 14), 49, keys(3)).shape == (3, 49)
    block_BK = image_keep_indices("block", (14, 14), 49, keys(50))
    assert {(np.ptp(k // 14), np.ptp(k % 14)) for k in block_BK} == {(6, 6)}
    assert image_keep_indices("grid", (7, 7), 16, keys(1)).shape == (1, 16)  # odd: the edge's windows are smaller


@pytest.mark.parametrize(("method", "keep"), [("random", 9), ("grid", 9), ("block", 9), ("block", 8)])
def test_every_patch_has_its_turn(method: str, keep: int) -> None:
    kept_BK = image_keep_indices(method, (6, 6), keep, keys(3000))
    counts = np.bincount(kept_BK.ravel(), minlength=36)
    assert (counts > 0).all()
    if method != "block":
        assert counts.min() > 0.8 * 3000 * keep / 36
        assert counts.max() < 1.2 * 3000 * keep / 36
    if keep == 8:  # 2 x 4 and 4 x 2 are equally near to a square
        standing = sum(np.ptp(k // 6) == 3 for k in kept_BK)
        assert 0.45 < standing / 3000 < 0.55


@pytest.mark.parametrize(
    ("method", "keep", "message"),
    [
        ("random", 0, "can't keep 0 of 49 patches: choose 1 to 49"),
        ("random", 50, "can't keep 50 of 49"),
        ("grid", 12, "can't keep 12 patches of 7 x 7 by grid: choose 4, 9, 16"),
        ("block", 11, "can't keep 11 patches of 7 x 7 as a block: choose 9, 10, 12"),
        ("resize", 12, "unknown image token method 'resize'"),
    ],
)
def test_numbers_of_patches_that_cannot_be(method: str, keep: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        image_keep_indices(method, (7, 7), keep, keys(1))


@pytest.mark.parametrize("method", TEXT_METHODS)
@given(captions=CAPTIONS, context_length=st.integers(3, 20), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_kept_tokens(method: str, captions: list[list[int]], context_length: int, seed: int) -> None:
    batch = keys(len(captions), seed)
    priorities = [[token % 4 for token in caption] for caption in captions]
    ids_BT = reduce_text(method, captions, context_length, batch, priorities)
    assert ids_BT.shape == (len(captions), context_length)
    assert ids_BT.dtype == np.int32
    room = context_length - 2
    for row, caption, key, own in zip(ids_BT, captions, batch, priorities, strict=True):
        count = min(len(caption), room)
        assert row[0] == SOT
        assert row[count + 1] == EOT
        assert (row[count + 2 :] == 0).all()
        kept = row[1 : count + 1].tolist()
        if len(caption) <= room:
            assert kept == caption
        rest = iter(caption)
        assert all(token in rest for token in kept)  # a subsequence: order kept
        alone = reduce_text(method, [caption], context_length, [key], [own])
        assert (alone[0] == row).all()


@given(captions=CAPTIONS, context_length=st.integers(3, 20))
@settings(max_examples=30, deadline=None)
def test_truncate_and_block_keep_neighbours(captions: list[list[int]], context_length: int) -> None:
    truncated = reduce_text("truncate", captions, context_length, keys(len(captions)))
    blocks = reduce_text("block", captions, context_length, keys(len(captions)))
    for first, block, caption in zip(truncated, blocks, captions, strict=True):
        count = min(len(caption), context_length - 2)
        assert first[1 : count + 1].tolist() == caption[:count]
        windows = [caption[start : start + count] for start in range(len(caption) - count + 1)]
        assert block[1 : count + 1].tolist() in windows


@given(captions=CAPTIONS, context_length=st.integers(3, 20), data=st.data())
@settings(max_examples=30, deadline=None)
def test_syntax_keeps_the_lowest_priorities_first(
    captions: list[list[int]], context_length: int, data: st.DataObject
) -> None:
    priorities = [
        data.draw(st.lists(st.integers(0, 3), min_size=len(caption), max_size=len(caption))) for caption in captions
    ]
    ids_BT = reduce_text("syntax", captions, context_length, keys(len(captions)), priorities)
    for row, caption, own in zip(ids_BT, captions, priorities, strict=True):
        ranked = sorted(range(len(caption)), key=lambda place: (own[place], place))[: context_length - 2]
        assert row[1 : len(ranked) + 1].tolist() == [caption[place] for place in sorted(ranked)]


def test_random_choices_are_even() -> None:
    """Each token of a caption of 6 is kept as often, and a block starts anywhere it fits, its last place included."""
    captions = [[1, 2, 3, 4, 5, 6]] * 4000
    kept = reduce_text("random", captions, 5, keys(4000))[:, 1:4]
    assert np.bincount(kept.ravel(), minlength=7)[1:] / 4000 == pytest.approx(0.5, abs=0.04)
    starts = reduce_text("block", captions, 5, keys(4000))[:, 1]
    assert np.bincount(starts, minlength=5)[1:] / 4000 == pytest.approx(0.25, abs=0.04)


def test_truncation_equals_the_tokenizers() -> None:
    tokenizer = Tokenizer()
    texts = ["", "a photo of the red pandas playing in the snow, it's café time", "short"]
    expected = tokenizer(texts, 8)
    assert (reduce_text("truncate", tokenizer.encode(texts), 8, keys(3)) == expected).all()


def test_text_methods_refuse_what_they_cannot_do() -> None:
    with pytest.raises(UserError, match="2 text tokens leave no room"):
        reduce_text("truncate", [[1]], 2, keys(1))
    with pytest.raises(UserError, match="unknown text token method 'nouns'"):
        reduce_text("nouns", [[1]], 8, keys(1))
    for priorities in (None, [[1]], [[1, 2], []]):
        with pytest.raises(ValueError, match="one priority for each id"):
            reduce_text("syntax", [[1, 2]], 8, keys(1), priorities)


def test_an_empty_batch_has_its_shape() -> None:
    assert reduce_text("random", [], 8, np.empty(0, np.uint64)).shape == (0, 8)


def test_gather_tokens() -> None:
    x_BND = torch.arange(24.0).reshape(2, 4, 3)
    keep_BK = torch.tensor([[0, 3], [1, 2]])
    assert torch.equal(gather_tokens(x_BND, keep_BK), torch.stack([x_BND[0, [0, 3]], x_BND[1, [1, 2]]]))
