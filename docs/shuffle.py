"""Draws docs/shuffle.png: how close the block shuffle comes to a full shuffle of a million records, by block size.

Run `python docs/shuffle.py` after a change to `clipkit/train/order.py`; it needs matplotlib, and prints the table of
docs/shuffle.md. tests/train/test_order.py holds the same numbers to bounds.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from clipkit.train.order import WINDOW_BLOCKS, Int64Array, record_indices

RECORDS = 1_000_000
BLOCK_SIZES = (1, 16, 64, 256)
BATCHES = (1024, 65_536)
SHARD = 10_000
INK, SOFT, GRID = "#1f2933", "#52606d", "#e4e7eb"
COLOURS = ("#6b7684", "#2f6fb3", "#2e8555", "#c2571a")


@dataclass(frozen=True)
class Quality:
    """What can be said of an order, beside what a full shuffle would give."""

    distances: Int64Array
    """Records between each sample's and the next one's, on disk."""
    distance_error: float
    """Largest difference of the distances' distribution from a full shuffle's (Kolmogorov-Smirnov)."""
    consecutive: float
    """Share of consecutive samples that are neighbours on disk."""
    neighbours: dict[int, float]
    """By batch size: the share of samples whose successor on disk is in the same batch."""
    shards: float
    """Mean number of shards of SHARD records in 1,024 samples."""
    window: int
    """Records that a reader takes at random from among those of its window."""


def full_distances(count: int) -> Int64Array:
    """How often each distance 1 … count-1 comes in a full shuffle, as cumulated shares."""
    distances = np.arange(1, count)
    return np.cumsum(2 * (count - distances) / (count * (count - 1)))


def neighbour_rate(order: Int64Array, batch: int) -> float:
    """The share of samples whose successor on disk is in the same batch; the last, incomplete batch is left out."""
    whole = order[: len(order) // batch * batch].reshape(-1, batch)
    together = [np.isin(rows + 1, rows, assume_unique=True).mean() for rows in whole]
    return float(np.mean(together))


def measure(order: Int64Array, block_size: int) -> Quality:
    """All of it for one epoch's order."""
    count = len(order)
    distances = np.abs(np.diff(order))
    found = np.cumsum(np.bincount(distances, minlength=count)[1:]) / (count - 1)
    error = float(np.abs(found - full_distances(count)).max())
    shards = [len(np.unique(part // SHARD)) for part in order[: count // 1024 * 1024].reshape(-1, 1024)]
    rates = {batch: neighbour_rate(order, batch) for batch in BATCHES}
    consecutive = float((distances == 1).mean())
    return Quality(distances, error, consecutive, rates, float(np.mean(shards)), min(count, WINDOW_BLOCKS * block_size))


def draw(found: dict[int, Quality], path: Path) -> None:
    """Left the distances, middle where a stretch of the order lies on disk, right the neighbours."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), facecolor="white")
    figure.subplots_adjust(left=0.055, right=0.985, top=0.84, bottom=0.14, wspace=0.24)
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=SOFT, labelsize=9)
        ax.grid(color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)

    bins = np.unique(np.geomspace(1, RECORDS, 49).round()) - 0.5
    full = np.interp(bins, np.arange(RECORDS) + 0.5, np.append(0, full_distances(RECORDS)))
    centres = np.sqrt(bins[1:] * bins[:-1])
    left.plot(centres, np.diff(full), color="#b8c0c8", linewidth=6, label="full shuffle")
    for (size, quality), colour in zip(found.items(), COLOURS, strict=True):
        share = np.histogram(quality.distances, bins)[0] / len(quality.distances)
        left.plot(centres, share, color=colour, linewidth=1.4, label=f"blocks of {size}")
    left.set(xscale="log", yscale="log", ylim=(8e-7, 0.3), xlabel="records between a sample and the next, on disk")
    left.set_ylabel("share of samples")
    left.legend(frameon=False, fontsize=9)

    for (size, _), colour, row in zip(found.items(), COLOURS, range(len(found)), strict=True):
        order = record_indices(np.arange(2048), RECORDS, 0, size)
        middle.scatter(order, row + 0.85 * np.arange(2048) / 2048 - 0.42, s=1.2, color=colour, linewidths=0)
    middle.set_yticks(range(len(found)), [f"blocks\nof {size}" for size in found])
    middle.set(xlim=(0, RECORDS), ylim=(len(found) - 0.5, -0.5), xlabel="record on disk")
    middle.set_xticks([0, 500_000, 1_000_000], ["0", "500,000", "1,000,000"])

    places = np.arange(len(found))
    for offset, (batch, colour) in enumerate(zip(BATCHES, ("#2f6fb3", "#c2571a"), strict=True)):
        rates = [quality.neighbours[batch] for quality in found.values()]
        right.bar(places + 0.38 * offset - 0.19, rates, 0.36, color=colour, label=f"batches of {batch:,}")
        chance = (batch - 1) / RECORDS
        right.axhline(chance, color=colour, linewidth=1, linestyle=(0, (4, 3)))
        for place, rate in enumerate(rates):
            text = f"{rate:.1%}" if rate > 0.01 else f"{rate:.2%}"
            right.text(place + 0.38 * offset - 0.19, rate * 1.1, text, ha="center", fontsize=8, color=SOFT)
    right.set(yscale="log", ylim=(3e-4, 30), xlabel="block size")
    right.set_xticks(places, [str(size) for size in found])
    right.minorticks_off()
    right.set_yticks([1e-3, 1e-2, 1e-1, 1], ["0.1%", "1%", "10%", "100%"])
    right.set_ylabel("samples whose neighbour is in the batch")
    right.legend(frameon=False, fontsize=9, loc="upper left", title="dashed: full shuffle", title_fontsize=9)

    titles = ("Distances between consecutive samples", "The first 2,048 samples, from top to bottom", "Neighbours")
    for ax, title in zip((left, middle, right), titles, strict=True):
        ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=12)
    figure.savefig(path, dpi=110, facecolor="white")


def main() -> None:
    found = {size: measure(record_indices(np.arange(RECORDS), RECORDS, 0, size), size) for size in BLOCK_SIZES}
    print("| block size | window | error of distances | consecutive | shards | " + " | ".join(map(str, BATCHES)) + " |")
    for size, quality in found.items():
        rates = " | ".join(f"{rate:.1%}" for rate in quality.neighbours.values())
        numbers = (
            f"{quality.window:,} | {quality.distance_error:.4f} | {quality.consecutive:.4%} | {quality.shards:.0f}"
        )
        print(f"| {size} | {numbers} | {rates} |")
    print(f"full: {2 / RECORDS:.4%}, " + ", ".join(f"{(batch - 1) / RECORDS:.1%}" for batch in BATCHES))
    path = Path(__file__).with_name("shuffle.png")
    draw(found, path)
    print(path)


if __name__ == "__main__":
    main()
