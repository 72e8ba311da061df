"""The loader by the size of the dataset: CPU time a sample, the start to the first batch, and memory.

- Rate: microseconds a sample of the whole process tree's CPU time with two worker processes, from 10 thousand to a
  million records and from 2 to 1,024 shards. The cases take turns, round after round; beside each stands its ratio to
  the first case of its kind in the same round, as median (smallest to largest).
- Start: seconds to the first batch of 10 million records in 1,000 shards and of 10 thousand in one, each time in a
  fresh process, from its beginning (imports, torch among them, included) and from the call of `open_source`. `cold`
  means that index and shards were put out of the page cache before.
- Memory: peaks of the resident memory (VmHWM) of the loader's process and of its larger worker, nothing taken off,
  after each batch buffer was filled. The buffers are one piece of memory, and each process that touches a page of it
  counts that page (RssShmem): this part stands beside.

Images are small (64 px), so what is done around the pixels weighs more than in training: a rate that is flat here is
flatter there. All records are made of the same few hundred images and ten thousand captions, so that the work in them
is the same for each size. The million records are a million on the disk; the ten million are one shard under a thousand
names (hard links), with an index and a manifest for each of them. As all of it was just written, the page cache hides
the disk.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from loader import Side
from support.loader_sides import Request
from support.pictures import captions, compacted, jpegs, picture

from clipkit.formats.dataset import shard_name
from clipkit.formats.features import Feature
from clipkit.formats.manifest import ShardEntry, SourceEntry, SplitManifest, index_path, write_manifest
from clipkit.formats.records import RecordWriter, encode_example
from clipkit.pixels.images import decode
from clipkit.tfrecord_tools.writing.metadata import write_metadata

SIDE, QUALITY = 64, 50
IMAGES, CAPTIONS = 200, 10_000
LARGE_HEIGHT, LARGE_WIDTH, LARGE_QUALITY = 3000, 4000, 92
RATES = {  # the first of each kind is what the others are compared with
    "records": ((10_000, 32), (100_000, 32), (1_000_000, 32)),
    "shards": ((100_000, 2), (100_000, 32), (100_000, 1024)),
}
WARM, SAMPLES = 4096, 32_768
MANY = 10_000_000, 1000
FEW = 10_000, 1
BATCHES = 8  # more than the loader has buffers

# One run in a process of its own: seconds to the first batch, then memory after some more.
ONE_RUN = """
import json, os, sys, time
from pathlib import Path
began, request = float(sys.argv[1]), json.loads(sys.argv[2])
from clipkit.train.loader.augment import Augmentation
from clipkit.train.loader.loader import LoaderConfig, batches
from clipkit.train.sources.open import open_source

def memory(process):
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {name: round(int(fields[name][0]) * 1024 / 1e6, 1) for name in ("VmHWM", "RssAnon", "RssFile", "RssShmem")}

called, spent = time.perf_counter(), time.process_time()
source = open_source(request["data"]).source()
config = LoaderConfig(request["size"], 77, request["batch"], Augmentation(crop_area=(0.4, 1.0)))
loader = batches(source, config, request["start"], workers=request["workers"], processes=True)
next(loader).image_BHWC.max()
first, spent = time.perf_counter(), time.process_time() - spent
for _ in range(request["batches"] - 1):
    next(loader).image_BHWC.max()
tasks = Path("/proc/self/task").iterdir()
children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
print(json.dumps({
    "from_process_start": round(first - began, 3),
    "from_call": round(first - called, 3),
    "cpu_from_call": round(spent, 3),
    "own": memory("self"),
    "workers": [memory(child) for child in children],
}))
loader.close()
"""


# ---- Datasets --------------------------------------------------------------------------------------------------------


def examples(images: Sequence[bytes], count: int = CAPTIONS) -> list[bytes]:
    """Encoded records, each with a caption of its own."""
    found = []
    for number, caption in enumerate(captions(count)):
        about = {"url": f"https://e.org/{number}", "key": f"{number:09d}"}
        found.append(encode_example({**about, "jpg": images[number % len(images)], "txt": caption}))
    return found


def large_images(count: int) -> list[bytes]:
    """JPEGs of a camera's size."""
    random = np.random.default_rng(2)
    found = []
    for _ in range(count):
        image = cv2.resize(picture(random), (LARGE_WIDTH, LARGE_HEIGHT), interpolation=cv2.INTER_CUBIC)
        grain = random.standard_normal((LARGE_HEIGHT // 2, LARGE_WIDTH // 2), dtype=np.float32) * 12
        grain = cv2.resize(grain, (LARGE_WIDTH, LARGE_HEIGHT))[:, :, None]
        pixels = np.clip(image + grain, 0, 255).astype(np.uint8)
        found.append(simplejpeg.encode_jpeg(pixels, LARGE_QUALITY, colorsubsampling="420"))
    return found


def write_dataset(folder: Path, pool: Sequence[bytes], records: int, shards: int, linked: bool = False) -> Path:
    """A dataset directory with the pool's records again and again; `linked`, all shards are the first one."""
    (folder / "clipkit").mkdir(parents=True)
    index = np.lib.format.open_memmap(index_path(folder, "train"), mode="w+", dtype=np.uint64, shape=(records,))
    entries: list[ShardEntry] = []
    for number in range(shards):
        start, end = records * number // shards, records * (number + 1) // shards
        path = folder / shard_name("scale", "train", number, shards)
        if linked and number:
            path.hardlink_to(folder / entries[0].file)
            index[start:end] = index[: end - start]
        else:
            with RecordWriter(path) as writer:
                index[start:end] = [writer.write(pool[record % len(pool)]) for record in range(start, end)]
        source = SourceEntry(f"{number:05d}.tar", writer.bytes, end - start, end - start)
        checksum = f"{writer.checksum:08x}"
        entries.append(ShardEntry(path.name, end - start, writer.bytes, checksum, (source,), {"jpeg": end - start}))
    del index
    split = {"train": SplitManifest(tuple(entries))}
    features = {"jpg": Feature("image"), "txt": Feature("text"), "url": Feature("text"), "key": Feature("text")}
    write_manifest(folder, split)
    write_metadata(folder, "scale", features, split)
    return folder


def forget(folder: Path) -> None:
    """Put a dataset's files out of the page cache."""
    for path in {path.stat().st_ino: path for path in folder.rglob("*") if path.is_file()}.values():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- What is measured ------------------------------------------------------------------------------------------------


def measure_rates(folder: Path, pool: Sequence[bytes], rounds: int, rows: list[dict[str, Any]]) -> None:
    cases = list(dict.fromkeys(itertools.chain.from_iterable(RATES.values())))
    for records, shards in cases:
        write_dataset(folder / f"{records}-{shards}" / "tfds", pool, records, shards)
    side = Side("clipkit")
    found: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for number in range(-1, rounds):  # the first round, in which pages and caches are filled, isn't counted
        for case in cases:
            data = str(folder / f"{case[0]}-{case[1]}")
            answer = side.ask(Request(data, 64, SAMPLES, WARM, number % rounds * (WARM + SAMPLES), processes=True))
            if number >= 0:
                found[case].append(answer.cpu / answer.samples * 1e6)
    side.end()
    print(f"\nCPU microseconds a sample, 64 px, 2 worker processes, {rounds} rounds")
    print(f"{'records':>12}{'shards':>8}{'microseconds':>28}{'to the first of its kind':>28}")
    for kind, of_kind in RATES.items():
        for case in of_kind:
            ratios = [own / first for own, first in zip(found[case], found[of_kind[0]], strict=True)]
            print(f"{case[0]:12,}{case[1]:8,}{spread(found[case], 1):>28}{spread(ratios, 2):>28}")
            rows.append({"kind": kind, "records": case[0], "shards": case[1], "cpu_us": rounded(found[case], 1)})
            rows[-1]["ratio"] = rounded(ratios, 3)


def measure_starts(few: Path, many: Path, rounds: int, rows: list[dict[str, Any]]) -> None:
    print(f"\nSeconds to the first batch of 256 at 64 px, {rounds} rounds: median (smallest to largest)")
    print(f"{'records':>12}{'workers':>8}{'samples seen':>14}{'':>6}{'from the call':>26}{'from the beginning':>26}")
    cases = [
        (data, records, workers, start, cold)
        for workers in (0, 2)
        for data, records, start, cold in (
            (few, FEW[0], 0, False),
            (many, MANY[0], 0, False),
            (many, MANY[0], 14_999_808, False),
            (many, MANY[0], 0, True),
        )
    ]
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    for _ in range(rounds):
        for (data, _, workers, start, cold), answers in zip(cases, found, strict=True):
            if cold:
                forget(data)
            answers.append(run(data, 64, 256, workers=workers, start=start, count=1))
    for (_, records, workers, start, cold), answers in zip(cases, found, strict=True):
        calls, begins, spent = (
            [answer[name] for answer in answers] for name in ("from_call", "from_process_start", "cpu_from_call")
        )
        cells = f"{spread(calls, 2):>26}{spread(begins, 2):>26}"
        print(f"{records:12,}{workers:8}{start:14,}{'cold' if cold else '':>6}{cells}")
        rows.append({"start": {"records": records, "workers": workers, "samples_seen": start, "cold": cold}})
        rows[-1].update(from_call=calls, from_process_start=begins, cpu_from_call=spent)


def measure_memory(datasets: Sequence[tuple[str, Path, Sequence[int], int]], rows: list[dict[str, Any]]) -> None:
    print("\nPeak of resident memory, MB: the larger of two workers, and the loader's own process (torch included)")
    print(f"{'':44}{'size':>6}{'batch':>7}{'a worker':>12}{'of it shared':>14}{'loader':>10}{'of it shared':>14}")
    for name, data, sizes, count in datasets:
        for size, batch in itertools.product(sizes, (256, 1024)):
            answer = run(data, size, batch, workers=2, start=0, count=count)
            worker, own = max(answer["workers"], key=lambda each: each["VmHWM"]), answer["own"]
            cells = f"{worker['VmHWM']:12,.0f}{worker['RssShmem']:14,.0f}{own['VmHWM']:10,.0f}{own['RssShmem']:14,.0f}"
            print(f"{name:44}{size:6}{batch:7,}{cells}", flush=True)
            rows.append({"memory": name, "size": size, "batch": batch, "worker": worker, "loader": own})


def run(data: Path, size: int, batch: int, *, workers: int, start: int, count: int) -> dict[str, Any]:
    """Take `count` batches in a fresh process."""
    request = {"data": str(data), "size": size, "batch": batch, "workers": workers, "start": start, "batches": count}
    done = subprocess.run(
        [sys.executable, "-c", ONE_RUN, str(time.perf_counter()), json.dumps(request)],
        stdout=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def rounded(values: Sequence[float], digits: int) -> list[float]:
    return [round(value, digits) for value in values]


def spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="rounds of starts")
    parser.add_argument("--parts", nargs="+", choices=("rate", "start", "memory"), default=["rate", "start", "memory"])
    parser.add_argument("--folder", type=Path, help="where 3 GB of data may be for a while (default: a temporary one)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="clipkit-bench-", dir=options.folder))
    rows: list[dict[str, Any]] = []
    try:
        images = [compacted(data, SIDE, QUALITY) for data in jpegs(IMAGES)]
        height, width = decode(images[0]).shape[:2]
        print(f"{sum(map(len, images)) / len(images) / 1e3:.1f} KB an image, the first of them {width} x {height}")
        pool = examples(images)
        if "rate" in options.parts:
            (folder / "rates").mkdir()
            measure_rates(folder / "rates", pool, options.rounds, rows)
            shutil.rmtree(folder / "rates")
        few, many = write_dataset(folder / "few", pool, *FEW), write_dataset(folder / "many", pool, *MANY, linked=True)
        if "start" in options.parts:
            measure_starts(few, many, options.starts, rows)
        if "memory" in options.parts:
            large = large_images(4)
            each = f"of 12 MP, {sum(map(len, large)) / len(large) / 1e6:.1f} MB"
            mixed = write_dataset(folder / "mixed", examples([*images, large[0]]), *FEW)
            alone = write_dataset(folder / "alone", examples(large, 128), 1024, 8, linked=True)
            datasets = (
                ("10,000 records in one shard", few, (64, 224), BATCHES),
                ("10,000,000 records in 1,000 shards", many, (64, 224), BATCHES),
                (f"10,000, one in {IMAGES + 1} {each}", mixed, (64, 224), BATCHES),
                (f"1,024, all {each}", alone, (64,), 1),
            )
            measure_memory(datasets, rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print()
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
