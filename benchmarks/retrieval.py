"""Peak memory and time of ranking N images and N captions against each other, N after N.

Each size runs in a process of its own, with random unit vectors, from the embeddings to the numbers with their
intervals. `before` is what the process holds when torch is loaded; what comes on top must not grow with N², and
grows with N only by what is kept for each query: its rank and its place.
"""

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from clipkit.eval.retrieval.ranks import TILE, Vectors, find_ranks
from clipkit.eval.retrieval.scores import retrieval_measures
from clipkit.formatting import duration, size_text


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_vectors(count: int, width: int, seed: int) -> Vectors:
    generator, vectors = torch.Generator().manual_seed(seed), Vectors()
    for start in range(0, count, TILE):
        rows_BE = torch.randn(min(TILE, count - start), width, generator=generator)
        vectors.add(torch.nn.functional.normalize(rows_BE, dim=-1))
    return vectors


def measure(count: int, width: int) -> None:
    """Rank in this process and print a line of the table."""
    before = peak()
    images, texts = random_vectors(count, width, 0), random_vectors(count, width, 1)
    start, owner_C = time.monotonic(), np.arange(count)
    ranks = find_ranks(images, texts, owner_C, torch.device("cpu"))
    ranked = time.monotonic()
    retrieval_measures(ranks, owner_C)
    done = time.monotonic()
    print(
        f"| {count:,} × {count:,} | {size_text(count * count * 4)} | {size_text(before)} | {size_text(peak())} "
        f"| {duration(ranked - start)} | {duration(done - ranked)} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        measure(given.counts[0], given.width)
        return
    print("| images × captions | all scores would be | before | peak | ranking | numbers and intervals |")
    print("|---|---|---|---|---|---|", flush=True)
    for count in given.counts:
        command = [sys.executable, __file__, "--here", "--width", str(given.width), "--counts", str(count)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
