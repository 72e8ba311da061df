"""The way from shards to training batches against OpenCLIP's loader, a TFDS reader as CLIPA's, and libjpeg-turbo alone.

All sides work in turn on the same shards, round after round, each with two workers in processes of its own. Figures are
samples/s; ratios are those of a round, as median (smallest to largest), by wall clock and by CPU seconds of the side's
whole process tree. On a busy machine the CPU's ratio is the one to look at. `limit` is libjpeg-turbo decoding the very
bytes, each at the smallest scale that its crop allows, with nothing around it, in one process a core.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from support.loader_sides import CROP_AREA, CROP_RATIO, Answer, Request
from support.pictures import jpegs, write

from clipkit.counter_rng import sample_keys
from clipkit.pixels.images import decode, plain_jpeg_size
from clipkit.train.loader.augment import geometry_draws
from clipkit.train.loader.crop import crop_box, exact_crop_resize, random_resized_crop

SIDES = ("clipkit", "openclip", "tfds", "limit")
CASES = (("standard", 64), ("standard", 112), ("standard", 224), ("compact", 64), ("compact", 112))
# Samples to take before the clock runs, and while it does. In the first the peers' buffers fill, and ours meets the
# frequent words; the rest of a run is like the second.
WARM = {"clipkit": 3072, "openclip": 1024, "tfds": 2048, "limit": 0}
SAMPLES = {"clipkit": 5120, "openclip": 2048, "tfds": 3072, "limit": 4096}
HERE = Path(__file__).resolve().parent


class Side:
    """A process that stays, so that imports are no part of what is measured."""

    def __init__(self, name: str) -> None:
        self.name = name
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "support" / "loader_sides.py"), name, str(writing)],
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self.answers = os.fdopen(reading)

    def ask(self, request: Request) -> Answer:
        assert self.process.stdin is not None
        print(json.dumps(asdict(request)), file=self.process.stdin, flush=True)
        line = self.answers.readline()
        if not line:
            sys.exit(f"the side {self.name} ended with {self.process.wait()}")
        return Answer(**json.loads(line))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.answers.close()


def pixels(size: int, count: int) -> float:
    """Mean absolute difference, in levels of 255, of our crops to those of a full decoding, resized by Pillow."""
    draws = geometry_draws(sample_keys(1, np.arange(count, dtype=np.uint64))).tolist()
    differences = []
    for data, row in zip(jpegs(count, seed=1), draws, strict=True):
        full = plain_jpeg_size(data)
        assert full is not None
        box = crop_box(*full, CROP_AREA, CROP_RATIO, row)
        ours = random_resized_crop(data, size, CROP_AREA, CROP_RATIO, row).astype(int)
        differences.append(np.abs(ours - exact_crop_resize(decode(data), box, size)).mean())
    return float(np.mean(differences))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"


def report(found: dict[tuple[str, str, int], list[Answer]], cases: list[tuple[str, int]], sides: list[str]) -> None:
    """Print the table, and each row as a line of JSON."""
    rows: list[dict[str, Any]] = []

    def middle(side: str, shards: str, size: int, clock: str) -> float:
        return statistics.median(rates(side, shards, size, clock))

    def rates(side: str, shards: str, size: int, clock: str) -> list[float]:
        return [answer.samples / getattr(answer, clock) for answer in found.get((side, shards, size), [])]

    print(f"\n{'samples/s, by wall clock | by CPU second':44}" + "".join(f"{side:>18}" for side in sides))
    for shards, size in cases:
        cells = [f"{middle(s, shards, size, 'wall'):8,.0f} |{middle(s, shards, size, 'cpu'):7,.0f}" for s in sides]
        print(f"{f'{shards} shards, {size} px':44}" + "".join(f"{cell:>18}" for cell in cells))
    print("\nclipkit's rate by another's: median (smallest to largest) of the rounds")
    print(f"{'':60}{'wall clock':>26}{'CPU':>26}")
    for shards, size in cases:
        for other in sides:
            # The peers have no compact copies: what ours gains by them stands beside what the copy alone gives.
            for theirs in dict.fromkeys((shards, "standard" if other != "limit" else shards)):
                if other == "clipkit" or (other, theirs, size) not in found:
                    continue
                ratios = {}
                for clock in ("wall", "cpu"):
                    pairs = zip(rates("clipkit", shards, size, clock), rates(other, theirs, size, clock), strict=True)
                    ratios[clock] = [own / peer for own, peer in pairs]
                name = f"{shards} shards, {size} px, against {other}" + (" on standard" if theirs != shards else "")
                print(f"{name:60}{spread(ratios['wall']):>26}{spread(ratios['cpu']):>26}")
                rows.append({"shards": shards, "size": size, "other": other, "other_shards": theirs, **ratios})
    print("\nclipkit's CPU microseconds a sample by phase")
    for shards, size in cases:
        answers = found.get(("clipkit", shards, size), [])
        if answers:
            phases = {
                phase: round(1e6 * statistics.median(a.phases[phase] / a.samples for a in answers), 1)
                for phase in answers[0].phases
            }
            whole = round(1e6 * statistics.median(a.cpu / a.samples for a in answers), 1)
            print(f"{f'{shards} shards, {size} px':30}{whole:8.1f} = {phases}")
            rows.append({"shards": shards, "size": size, "cpu_us": whole, "phases_us": phases})
    for row in rows:
        print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual samples in each measurement")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    names = [f"{shards}:{size}" for shards, size in CASES]
    parser.add_argument("--cases", nargs="+", default=names, help="SHARDS:SIZE")
    parser.add_argument("--data", type=Path, help="where the shards are kept for another run (default: made anew)")
    parser.add_argument("--samples", type=int, default=10_000, help="in the shards, each image used five times")
    parser.add_argument("--workers", choices=("threads", "processes"), help="of clipkit (default: the loader's choice)")
    parser.add_argument("--pixels", type=int, default=100, help="images to compare pixels of; 0 leaves that out")
    options = parser.parse_args()
    cases = [(shards, int(size)) for shards, _, size in (case.partition(":") for case in options.cases)]
    for size in sorted({size for _, size in cases}) if options.pixels else ():
        print(f"pixels at {size} px: {pixels(size, options.pixels):.2f} of 255 from full decoding, antialiased bicubic")
    folder = options.data or Path(tempfile.mkdtemp(prefix="clipkit-bench-"))
    try:
        if not (folder / "sizes.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            write(folder, options.samples, options.samples // 5)
        sizes = json.loads((folder / "sizes.json").read_text())
        print("KB an image, standard and compact: " + ", ".join(f"{size:.1f}" for size in sizes))
        sides = {name: Side(name) for name in options.sides}
        processes = {"threads": False, "processes": True}.get(options.workers)
        found: dict[tuple[str, str, int], list[Answer]] = {}
        for number in range(options.rounds):
            for shards, size in cases:
                for name, side in sides.items():
                    start = number * options.samples  # an epoch of our side for each round
                    count = round(SAMPLES[name] * options.share)
                    request = Request(str(folder / shards), size, count, WARM[name], start, processes)
                    answer = side.ask(request)
                    found.setdefault((name, shards, size), []).append(answer)
                    print(f"round {number}: {shards} {size} {name}: {answer.samples / answer.wall:,.0f}/s", flush=True)
        for side in sides.values():
            side.end()
        report(found, cases, options.sides)
    finally:
        if not options.data:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
