"""build-tfds by one core: from tars, to small copies, in place against TensorFlow, and up to a million records.

Figures are from CPU seconds: medians of the rounds, with the smallest and the largest beside. The two sides of a
comparison work in turn on the same files, TensorFlow in a process of its own. The table of sizes is in JSON lines, each
size in a process of its own whose peak of memory is told: rows made up, bodies shared.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from clipkit.formats.records import RecordWriter, encode_example
from clipkit.pixels.images import UInt8Array
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.in_place.command import build_in_place

SIDE = 256
QUALITY = 95
COLUMNS: dict[str, Any] = {
    "url": "https://images.example.org/2021/07/bicycle-0001.jpg",
    "width": 341,
    "height": 256,
    "original_width": 1024,
    "original_height": 768,
    "similarity": 0.3125,
    "NSFW": "UNLIKELY",
    "LICENSE": "?",
    "sha256": "0" * 64,
}
CAPTION = "a photograph of a red bicycle that leans on a wall"

# Counts the records of files as CLIPA's script does, and says how many CPU seconds that took.
COUNTING = """
import json, os, sys, time
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
import tensorflow as tf
for line in sys.stdin:
    start = time.process_time()
    count = sum(1 for path in json.loads(line) for _ in tf.data.TFRecordDataset(path))
    print(json.dumps([time.process_time() - start, count]), flush=True)
"""

# One size: CPU time a sample without the imports, and the peak of memory (getrusage would tell the parent's).
ONE_SIZE = """
import json, re, sys, time
from pathlib import Path
from clipkit.tfrecord_tools.build.command import build_tfds
shards, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
start, wall = time.process_time(), time.perf_counter()
summary = build_tfds(shards, out, "bench", progress=lambda now: None, shard_megabytes=16, **options)
spent = time.process_time() - start
print(json.dumps({
    "samples": summary.samples,
    "records": summary.records,
    "options": options,
    "microseconds_per_sample": round(spent / summary.samples * 1e6, 2),
    "cpu_seconds": round(spent, 2),
    "wall_seconds": round(time.perf_counter() - wall, 2),
    "peak_megabytes": round(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3),
}))
"""


def photograph(number: int, side: int = SIDE, quality: int = QUALITY) -> bytes:
    """A JPEG like a photograph (noise whose amplitude falls with frequency); about 34 KB at 256 px, quality 95."""
    import simplejpeg

    rng = np.random.default_rng(number)
    height, width = side, side * 4 // 3
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) / np.maximum(frequency, 1 / width) ** 1.6
    noise = np.fft.ifft2(spectrum).real
    noise = noise.mean(0) * 0.8 + noise * 0.2
    image: UInt8Array = np.clip(128 + 48 * noise / noise.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")
    return encoded


def write_tar(path: Path, images: list[bytes], first: int, count: int) -> None:
    """A shard as img2dataset's webdataset writer leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(first, first + count):
            key = f"{number:09d}"
            about = json.dumps({**COLUMNS, "caption": CAPTION, "key": key, "status": "success"}, indent=4)
            image = images[number % len(images)]
            writer.write({"__key__": key, "jpg": image, "txt": CAPTION, "json": about})


def write_tfrecords(folder: Path, images: list[bytes], count: int, files: int) -> list[str]:
    """Shards as img2dataset's tfrecord writer leaves them."""
    folder.mkdir()
    paths = []
    for shard in range(files):
        path = folder / f"{shard:05d}.tfrecord"
        with RecordWriter(path) as writer:
            for number in range(shard * count // files, (shard + 1) * count // files):
                row = {**COLUMNS, "key": f"{number:09d}", "txt": CAPTION, "jpg": images[number % len(images)]}
                writer.write(encode_example(row))
        paths.append(str(path))
    return paths


def spent(function: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def spread(values: list[float], unit: str) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):10,.0f} {unit}   {ordered[0]:,.0f} to {ordered[-1]:,.0f}"


def build(shards: Path, out: Path, **options: Any) -> None:
    build_tfds(shards, out, "bench", progress=lambda now: None, **options)
    shutil.rmtree(out)


def measure_builds(folder: Path, count: int, rounds: int) -> None:
    images = [photograph(number) for number in range(64)]
    print(f"{count} records of {sum(map(len, images)) / len(images) / 1e3:.1f} KB, {rounds} rounds, one core")
    write_tar(folder / "tars" / "00000.tar", images, 0, count)
    megabytes = (folder / "tars" / "00000.tar").stat().st_size / 1e6
    rows: dict[str, tuple[dict[str, Any], str]] = {
        "as they are": ({}, "MB/s"),
        "--resize 128": ({"resize": 128}, "images/s"),
        "--where": ({"where": "similarity > 0.3 AND NSFW = 'UNLIKELY'"}, "MB/s"),
        "--dedup sha256": ({"dedup": "sha256"}, "MB/s"),
        "--dedup phash": ({"dedup": "phash"}, "images/s"),
        "--shuffle": ({"shuffle": 0}, "MB/s"),
        "--precompute tokens,syntax": ({"precompute": ("tokens", "syntax")}, "MB/s"),
    }
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (options, unit) in rows.items():
            seconds = spent(partial(build, folder / "tars", folder / "out", **options))
            rates[name].append((megabytes if unit == "MB/s" else count) / seconds)
    for name, (_, unit) in rows.items():
        print(f"build-tfds from a tar, {name:28}{spread(rates[name], unit)}")
    shutil.rmtree(folder / "tars")


def measure_in_place(folder: Path, count: int, rounds: int) -> None:
    images = [photograph(number) for number in range(64)]
    originals = write_tfrecords(folder / "originals", images, count, 4)
    megabytes = sum(Path(path).stat().st_size for path in originals) / 1e6
    peer = subprocess.Popen([sys.executable, "-c", COUNTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdin is not None
    assert peer.stdout is not None
    ours, theirs = [], []
    try:
        for _ in range(rounds):
            # Linked, for the shards are renamed.
            shutil.copytree(folder / "originals", folder / "linked", copy_function=os.link)
            ours.append(spent(lambda: build_in_place(folder / "linked", "bench")))
            shutil.rmtree(folder / "linked")
            print(json.dumps(originals), file=peer.stdin, flush=True)
            seconds, counted = json.loads(peer.stdout.readline())
            assert counted == count
            theirs.append(seconds)
    finally:
        peer.kill()
        peer.wait()
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    print(f"build-tfds --in-place                              {spread([megabytes / each for each in ours], 'MB/s')}")
    print(f"tf.data, counting                                  {spread([megabytes / each for each in theirs], 'MB/s')}")
    print(f"ratio {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
    shutil.rmtree(folder / "originals")


def measure_sizes(folder: Path, most: int) -> None:
    """From ten thousand records to `most`, by the same tar under many names."""
    images = [photograph(number, 16, 75) for number in range(64)]
    write_tar(folder / "one.tar", images, 0, 10_000)
    # Of the same tar again and again --dedup leaves few records; the work, in samples, is the same.
    for options in ({}, {"shuffle": 0}, {"dedup": "sha256"}):
        records = 10_000
        while records <= most:
            shards = folder / f"of-{records}"
            shards.mkdir()
            for number in range(records // 10_000):
                (shards / f"{number:05d}.tar").hardlink_to(folder / "one.tar")
            done = subprocess.run(
                [sys.executable, "-c", ONE_SIZE, str(shards), str(folder / "out"), json.dumps(options)],
                capture_output=True,
                text=True,
                check=True,
            )
            print(done.stdout, end="", flush=True)
            shutil.rmtree(folder / "out")
            shutil.rmtree(shards)
            records *= 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=1_000_000, help="Largest of the sizes; 0 leaves them out.")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="clipkit-bench-"))
    try:
        measure_builds(folder, options.records, options.rounds)
        measure_in_place(folder, options.records, options.rounds)
        measure_sizes(folder, options.most)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
