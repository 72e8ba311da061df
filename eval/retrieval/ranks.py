"""The rank of the right answer for every image and every caption, without ever holding all scores, or all embeddings.

A rank is the place in the list of all candidates, best first; of equal scores the one that comes first in the data is
ahead, so it is the place in a stable sort. An image with several captions takes the rank of its best one. The scores
are computed in tiles, each once for both directions; what is counted in a tile is how many candidates are ahead of the
right one. The score of the right one comes from the same product of the same tile, to the bit.
"""

import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipkit.embedding.encoder import check_finite
from clipkit.storage.files import disk_errors

TILE = 4096
NO_PLACE = torch.iinfo(torch.int64).max
IN_MEMORY_BYTES = 64 << 20


class Vectors:
    """Rows float32[E] in the order they were added, in a file that is read in tiles: a million of them take no more
    memory than a thousand. The file is in memory while it is small, else in TMPDIR.
    """

    def __init__(self, *parts: Tensor) -> None:
        # SIM115 asks for a `with` block, which would close the file at the end of this method. It is read for as long
        # as this object lives, and closed by the finalizer on the next line.
        self.file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.rows = self.width = 0
        for rows_BE in parts:
            self.add(rows_BE)

    def add(self, rows_BE: Tensor) -> None:
        """Append rows. Raises UserError when they hold NaN or infinity, and when the disk is full."""
        with disk_errors(Path(tempfile.gettempdir())):
            self.file.seek(0, 2)
            self.file.write(check_finite(rows_BE).float().cpu().contiguous().numpy().tobytes())
        self.rows, self.width = self.rows + len(rows_BE), rows_BE.shape[1]

    def __len__(self) -> int:
        return self.rows

    def read(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows `start` to `stop` (or the end), float32[B, E] on a device."""
        values = np.empty((min(stop, self.rows) - start, self.width), np.float32)
        self.file.seek(start * self.width * 4)
        self.file.readinto(values.data.cast("B"))
        return torch.from_numpy(values).to(device)

    def tiles(self, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """All rows, `size` at a time: the number of the first, and float32[B, E] on a device."""
        for start in range(0, self.rows, size):
            yield start, self.read(start, start + size, device)


@dataclass(frozen=True, eq=False)
class Ranks:
    """From 1: `text_N` of each of N images' best caption, `image_C` of each of C captions' image."""

    text_N: NDArray[np.int64]
    image_C: NDArray[np.int64]


@torch.no_grad()
def find_ranks(
    images: Vectors, texts: Vectors, image_of_C: NDArray[np.int64], device: torch.device, tile: int = TILE
) -> Ranks:
    """Ranks in both directions. `image_of_C` rises: the captions of an image stand together, and each image has one.

    Memory is that of some tiles of `tile` × `tile` scores. Ties are as OpenCLIP's `get_clip_metrics` counts them.
    """
    image_of = torch.from_numpy(image_of_C).to(device)
    right_C = _right_scores(images, texts, image_of, device, tile)
    best_N = torch.full((len(images),), -torch.inf, device=device).scatter_reduce(0, image_of, right_C, "amax")
    numbers = torch.arange(len(texts), device=device)
    candidates = torch.where(right_C == best_N[image_of], numbers, NO_PLACE)
    place_N = torch.full_like(best_N, NO_PLACE, dtype=torch.int64).scatter_reduce(0, image_of, candidates, "amin")
    ahead_N, ahead_C = torch.zeros_like(place_N), torch.zeros_like(image_of)
    flags = torch.empty(tile * tile, device=device)
    for first, image_BE in images.tiles(tile, device):
        rows = slice(first, first + len(image_BE))
        for start, text_DE in texts.tiles(tile, device):
            columns = slice(start, start + len(text_DE))
            score_BD = image_BE @ text_DE.T
            out_BD = flags[: score_BD.numel()].view(score_BD.shape)
            ahead_N[rows] += _ahead(score_BD, best_N[rows], place_N[rows], start, out_BD)
            ahead_C[columns] += _ahead(score_BD.T, right_C[columns], image_of[columns], first, out_BD.T)
    return Ranks(1 + ahead_N.cpu().numpy(), 1 + ahead_C.cpu().numpy())


def _right_scores(images: Vectors, texts: Vectors, image_of: Tensor, device: torch.device, tile: int) -> Tensor:
    """float32[C]: the score of each caption with its own image, from the tiles that hold them."""
    right_C = torch.empty(len(texts), device=device)
    for first, image_BE in images.tiles(tile, device):
        own = torch.searchsorted(image_of, torch.tensor([first, first + len(image_BE)], device=device)).tolist()
        for start in range(own[0] - own[0] % tile, own[1], tile):
            score_BD = image_BE @ texts.read(start, start + tile, device).T
            begin, end = max(start, own[0]), min(start + tile, own[1])
            columns = torch.arange(begin, end, device=device)
            right_C[begin:end] = score_BD[image_of[begin:end] - first, columns - start]
    return right_C


def _ahead(score_QD: Tensor, right_Q: Tensor, place_Q: Tensor, start: int, out_QD: Tensor) -> Tensor:
    """int64[Q]: how many of the candidates from number `start` on are ahead of the right one.

    A tile wholly before the right one's place wins ties and one wholly behind loses them, which a threshold just
    below the right score says; only where the place is inside need places be compared.
    """
    stop = start + score_QD.shape[1]
    just_below_Q = torch.nextafter(right_Q, right_Q.new_tensor(-torch.inf))
    torch.gt(score_QD, torch.where(place_Q >= stop, just_below_Q, right_Q)[:, None], out=out_QD)
    inside_Q = ((place_Q > start) & (place_Q < stop)).nonzero()[:, 0]
    if len(inside_Q):
        earlier_ID = torch.arange(start, stop, device=place_Q.device) < place_Q[inside_Q, None]
        out_QD[inside_Q] += (score_QD[inside_Q] == right_Q[inside_Q, None]) & earlier_ID
    return out_QD.sum(dim=1).long()


@torch.no_grad()
def best_matches(
    query_QE: Tensor, candidates: Vectors, count: int, tile: int = TILE
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best `count` candidates of some queries and their scores [Q, count], ordered as the ranks are."""
    score_QK = query_QE.new_empty(len(query_QE), 0)
    place_QK = torch.empty(len(query_QE), 0, dtype=torch.int64, device=query_QE.device)
    for start, candidate_DE in candidates.tiles(tile, query_QE.device):
        score_QD = query_QE @ candidate_DE.T
        best_QK, number_QK = score_QD.topk(min(count, len(candidate_DE)), dim=1)
        # Where more are as good as the last of these, topk takes any of them; a stable sort of all is much slower.
        tied_Q = (score_QD >= best_QK[:, -1:]).sum(dim=1) > best_QK.shape[1]
        number_QK[tied_Q] = score_QD[tied_Q].argsort(dim=1, descending=True, stable=True)[:, : best_QK.shape[1]]
        number_QK = number_QK.sort(dim=1)[0]
        score_QK = torch.cat([score_QK, score_QD.gather(1, number_QK)], dim=1)
        place_QK = torch.cat([place_QK, start + number_QK], dim=1)
        score_QK, order_QK = score_QK.sort(dim=1, descending=True, stable=True)
        place_QK = place_QK.gather(1, order_QK)[:, :count]
        score_QK = score_QK[:, :count]
    return place_QK.cpu().numpy(), score_QK.cpu().numpy()
