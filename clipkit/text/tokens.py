"""Fewer tokens: the eight ways of CLIPA (Li, Wang & Xie, "An Inverse Scaling Law for CLIP Training", NeurIPS 2023).

Images: `resize` to fewer pixels (the loader does, as it decodes), or keep `random` patches, one of each window of a
`grid`, or one `block`.
Texts: `truncate`, keep `random` tokens, a `block` of consecutive tokens, or nouns first (`syntax`). A ninth way,
`sentence`, is that of CLIPS (Liu et al., 2024) for long captions: the loader draws a sentence, which is then truncated.
All choices are pure functions of one 64-bit key a sample (`clipkit.counter_rng`), whatever batch the sample is in; all
shapes depend only on the arguments.

Where this differs from CLIPA's published code (2023), which has the text methods, `resize` and `random`:
- kept tokens stay in order; its random text masking shuffles them;
- a text block may start anywhere it fits; its code never picks the last start;
- syntax picks tokens by the class of their word, earlier first. Its PyTorch code picks words, then truncates what they
  encode to; its JAX code picks tokens, each tagged on its own, by a sort that isn't stable.
The paper's `grid` keeps one patch of each 2 x 2 window; which one isn't published. Here it is drawn for each window, so
that every patch is seen in the long run and neighbours stay about two patches apart.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt

from clipkit import counter_rng
from clipkit.choices import ImageMethod, TextMethod
from clipkit.errors import UserError
from clipkit.text.tokenizer import EOT, SOT

if TYPE_CHECKING:  # a sweep is priced without torch
    from torch import Tensor

# Streams of random numbers, each for one use (see counter_rng).
RANDOM_PATCHES, GRID_PATCHES, BLOCK_PATCHES, RANDOM_TOKENS, BLOCK_TOKENS = range(900, 905)

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


def image_keep_indices(method: ImageMethod, grid: tuple[int, int], keep: int, keys_B: npt.ArrayLike) -> Int64Array:
    """Which patches of a (rows, columns) grid stay: int64[B, keep], ascending, patch = row * columns + column.

    `grid` splits the image in square windows and keeps one patch of each; windows at the right and lower edge may be
    smaller. `keep` must be the number of windows of some size: a quarter of the patches, rounded up along each side,
    for the paper's 2 x 2. `block` keeps the rectangle of `keep` patches that is nearest in shape to the image, anywhere
    in it. Raises UserError when `keep` isn't possible, with the nearest numbers that are.
    """
    rows, columns = grid
    if not 1 <= keep <= rows * columns:
        raise UserError(f"can't keep {keep} of {rows * columns} patches: choose 1 to {rows * columns}")
    match method:
        case "random":
            return random_indices(rows * columns, keep, keys_B)
        case "grid":
            return grid_indices(grid, window_size(grid, keep), keys_B)
        case "block":
            return block_indices(grid, block_shapes(grid, keep), keys_B)
    raise UserError(f"unknown image token method {method!r}: choose resize, random, grid or block")


def random_indices(count: int, keep: int, keys_B: npt.ArrayLike) -> Int64Array:
    """`keep` of `count` (at most 65,536) numbers, every subset equally likely: int64[B, keep], ascending."""
    # Each number rides in the low bits of a random word: numpy finds the smallest words far faster than it argsorts.
    low = np.uint64(0xFFFF)
    word_BN = (counter_rng.bits(keys_B, count, RANDOM_PATCHES) & ~low) | np.arange(count, dtype=np.uint64)
    word_BN.partition(keep - 1, axis=1)
    return np.sort((word_BN[:, :keep] & low).astype(np.int64), axis=1)


def window_size(grid: tuple[int, int], keep: int) -> int:
    """The side of the square windows of which there are `keep`. Raises UserError when no side gives that many."""
    rows, columns = grid
    counts = {math.ceil(rows / side) * math.ceil(columns / side): side for side in range(max(grid), 0, -1)}
    if keep not in counts:
        raise UserError(f"can't keep {keep} patches of {rows} x {columns} by grid: {nearest(keep, list(counts))}")
    return counts[keep]


def grid_indices(grid: tuple[int, int], side: int, keys_B: npt.ArrayLike) -> Int64Array:
    """One random patch of each `side` x `side` window: int64[B, windows], ascending."""
    rows, columns = grid
    top_W, left_W = (axis.ravel() for axis in np.mgrid[0:rows:side, 0:columns:side])
    height_W, width_W = np.minimum(side, rows - top_W), np.minimum(side, columns - left_W)
    draw_B2W = counter_rng.uniform(keys_B, 2 * len(top_W), GRID_PATCHES).reshape(-1, 2, len(top_W))
    row_BW = top_W + (draw_B2W[:, 0] * height_W).astype(np.int64)
    column_BW = left_W + (draw_B2W[:, 1] * width_W).astype(np.int64)
    return np.sort(row_BW * columns + column_BW, axis=1)


def block_shapes(grid: tuple[int, int], keep: int) -> Int64Array:
    """The (rows, columns) of `keep` patches nearest in shape to the grid: int64[S, 2]; S is 2 when a shape and the same
    one lying are equally near. Raises UserError when no rectangle in the grid has that many patches."""
    rows, columns = grid
    areas = {height * width for height in range(1, rows + 1) for width in range(1, columns + 1)}
    if keep not in areas:
        raise UserError(f"can't keep {keep} patches of {rows} x {columns} as a block: {nearest(keep, list(areas))}")
    heights = [height for height in range(1, rows + 1) if keep % height == 0 and keep // height <= columns]
    shapes = [(height, keep // height) for height in heights]
    elongation = [abs(math.log(height * columns / (width * rows))) for height, width in shapes]
    best = min(elongation)
    return np.array([shape for shape, value in zip(shapes, elongation, strict=True) if value < best + 1e-9], np.int64)


def block_indices(grid: tuple[int, int], shapes_S2: Int64Array, keys_B: npt.ArrayLike) -> Int64Array:
    """The patches of one rectangle at a random place: int64[B, height * width], ascending."""
    rows, columns = grid
    draw_B3 = counter_rng.uniform(keys_B, 3, BLOCK_PATCHES)
    height_B, width_B = shapes_S2[(draw_B3[:, 0] * len(shapes_S2)).astype(np.int64)].T
    top_B = (draw_B3[:, 1] * (rows - height_B + 1)).astype(np.int64)
    left_B = (draw_B3[:, 2] * (columns - width_B + 1)).astype(np.int64)
    step_K = np.arange(shapes_S2[0].prod())
    row_BK = top_B[:, None] + step_K // width_B[:, None]
    column_BK = left_B[:, None] + step_K % width_B[:, None]
    return row_BK * columns + column_BK


def nearest(wanted: int, possible: Sequence[int]) -> str:
    """The end of an error line: the possible numbers around the one wanted."""
    near = sorted(sorted(possible, key=lambda number: abs(number - wanted))[:3])
    return f"choose {', '.join(map(str, near))}"


def reduce_text(
    method: TextMethod,
    ids: Sequence[Sequence[int]],
    context_length: int,
    keys_B: npt.ArrayLike,
    priorities: Sequence[Sequence[int]] | None = None,
    *,
    start: int | None = SOT,
    end: int | None = EOT,
    pad_id: int = 0,
) -> Int32Array:
    """Captions' ids, without start and end, to int32[B, context_length]: start, the ids kept, end, then padding.

    A caption that fits is kept whole by every method. `truncate` with any keys equals the tokenizer's own call, given
    its `start`, `end` and `pad` (CLIP's unless told). `syntax` needs `priorities`, one for each id, the lowest kept
    first (`clipkit.text.syntax.Syntax.priorities`).
    """
    first = int(start is not None)
    room = context_length - first - int(end is not None)
    if room < 1:
        least = context_length - room + 1
        raise UserError(f"{context_length} text tokens leave no room between start and end: take {least} or more")
    if method in ("truncate", "sentence"):  # of long captions, all that follows would be sorted for nothing
        ids = [row[:room] for row in ids]
    keys = np.atleast_1d(np.asarray(keys_B, np.uint64))
    length_B = np.fromiter(map(len, ids), np.int64, len(ids))
    ids_BL = pad(ids, length_B)
    B, L = ids_BL.shape
    position_L = np.arange(L)
    rank_BL: npt.NDArray[np.number]
    match method:
        case "truncate" | "sentence":  # the loader has drawn the sentence, for ids don't show where one ends
            rank_BL = np.broadcast_to(position_L, (B, L))
        case "random":
            rank_BL = counter_rng.uniform(keys, L, RANDOM_TOKENS)
        case "block":
            starts_B = np.maximum(length_B - room, 0) + 1
            start_B = (counter_rng.uniform(keys, 1, BLOCK_TOKENS)[:, 0] * starts_B).astype(np.int64)
            rank_BL = np.where(position_L >= start_B[:, None], position_L, position_L + L)
        case "syntax":
            if priorities is None or [len(row) for row in priorities] != length_B.tolist():
                raise ValueError("syntax needs one priority for each id")
            rank_BL = pad(priorities, length_B) * L + position_L
        case _:
            raise UserError(f"unknown text token method {method!r}: choose from {', '.join(get_args(TextMethod))}")
    # Padding ranks last, so that it is kept only when nothing else is left.
    rank_BL = np.where(position_L < length_B[:, None], rank_BL, np.inf)
    kept_BR = np.sort(rank_BL.argsort(axis=1, kind="stable")[:, :room], axis=1)
    count_B = np.minimum(length_B, room)
    kept_ids_BR = np.take_along_axis(ids_BL, kept_BR, axis=1)
    out_BT = np.full((B, context_length), pad_id, np.int32)
    out_BT[:, first : first + kept_BR.shape[1]] = np.where(kept_BR < length_B[:, None], kept_ids_BR, pad_id)
    if start is not None:
        out_BT[:, 0] = start
    if end is not None:
        out_BT[np.arange(B), first + count_B] = end
    return out_BT


def pad(rows: Sequence[Sequence[int]], length_B: Int64Array) -> Int64Array:
    """Rows of unequal length as int64[B, longest], zeros at the end."""
    out_BL = np.zeros((len(rows), int(length_B.max(initial=0))), np.int64)
    flat = np.fromiter((item for row in rows for item in row), np.int64, int(length_B.sum()))
    out_BL[np.arange(out_BL.shape[1]) < length_B[:, None]] = flat
    return out_BL


def gather_tokens(x_BND: "Tensor", keep_BK: "Tensor") -> "Tensor":
    """The kept tokens of each sample: [B, N, D] and int64[B, K] -> [B, K, D]."""
    return x_BND.gather(1, keep_BK[:, :, None].expand(-1, -1, x_BND.shape[2]))
