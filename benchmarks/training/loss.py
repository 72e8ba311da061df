"""Memory and time of the losses at large batches, on random features.

Memory: each size in a process of its own; what the loss adds to the features and their gradients at its peak, which
must grow with the batch and not with its square. Time: forward and backward beside the plain InfoNCE, which holds all
logits, in turn, as processor time.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from clipkit.formatting import size_text
from clipkit.model.loss import info_nce, sigmoid_loss

SCALE, BIAS = 20.0, -10.0


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def leaves(rows: int, width: int) -> list[Tensor]:
    """Features, scale and bias that want gradients."""
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(rows, width, generator=generator), dim=-1) for _ in range(2)]
    return [value.requires_grad_() for value in (*features, torch.tensor(SCALE), torch.tensor(BIAS))]


def plain_info_nce(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    """The loss out of one matrix of all logits."""
    logits_BB = scale * image_BE @ text_BE.T
    target_B = logits_BB.diagonal()
    return ((logits_BB.logsumexp(1) - target_B).mean() + (logits_BB.logsumexp(0) - target_B).mean()) / 2


def measure_memory(name: str, rows: int, width: int) -> None:
    """Take the loss in this process and print what it added to the peak, in bytes."""
    given = leaves(rows, width)
    loss = {"info_nce": info_nce, "sigmoid": sigmoid_loss}[name]
    loss(*(value[:8] if value.ndim else value for value in given[: 3 if name == "info_nce" else 4])).backward()
    before = peak()  # with a gradient for each feature
    loss(*given[: 3 if name == "info_nce" else 4]).backward()
    print(peak() - before)


def measure_time(rows: int, width: int, rounds: int) -> None:
    """Print a line that compares the plain loss with the one in tiles."""
    given, repeats = leaves(rows, width)[:3], max(1, 2048 // rows) ** 2
    seconds: dict[object, list[float]] = {plain_info_nce: [], info_nce: []}
    for round_number in range(rounds + 1):
        for loss, taken in seconds.items():
            start = time.process_time()
            for _ in range(repeats):
                torch.autograd.grad(loss(*given), given)
            if round_number:  # the first one warms up
                taken.append((time.process_time() - start) / repeats)
    plain, tiled = seconds.values()
    ratios = sorted(ours / theirs for ours, theirs in zip(tiled, plain, strict=True))
    print(
        f"| {rows:,} | {1000 * statistics.median(plain):,.1f} ms | {1000 * statistics.median(tiled):,.1f} ms "
        f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f}) |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, nargs="*", default=[1024, 2048, 4096], help="batches to measure")
    parser.add_argument("--time", type=int, nargs="*", default=[256, 1024, 2048], help="batches to time")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        measure_memory(given.here, given.memory[0], given.width)
        return
    print("| batch | all logits would be | a side's features | InfoNCE adds | the sigmoid loss adds |")
    print("|---|---|---|---|---|", flush=True)
    for rows in given.memory:
        cells = [size_text(4 * rows * rows), size_text(4 * rows * given.width)]
        for name in ("info_nce", "sigmoid"):
            command = [sys.executable, __file__, "--here", name, "--memory", str(rows), "--width", str(given.width)]
            cells.append(size_text(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)))
        print(f"| {rows:,} | {' | '.join(cells)} |", flush=True)
    print("\n| batch | plain InfoNCE | in tiles | ratio (spread) |\n|---|---|---|---|", flush=True)
    for rows in given.time:
        measure_time(rows, given.width, given.rounds)


if __name__ == "__main__":
    main()
