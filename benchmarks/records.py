"""Writing, counting and reading records against TensorFlow, and build-tfds by itself, in MB/s of one core.

Both sides work in turn on the same files, round after round. The figures are from CPU seconds, medians of the rounds,
with the smallest and the largest ratio of a round beside. TensorFlow runs in a process of its own.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from clipkit.formats.dataset import open_dataset
from clipkit.formats.records import RecordWriter, decode_example, encode_example, index_records, read_records
from clipkit.tfrecord_tools.build.command import build_tfds

IMAGE_BYTES = 34_000  # the mean of img2dataset's images at 256 px, quality 95

PEER = """
import json, os, sys, time
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
import tensorflow as tf
columns = json.loads(sys.argv[1])

def feature(value):
    if isinstance(value, str):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))

def write(path, count, image_bytes):
    image = os.urandom(image_bytes)
    with tf.io.TFRecordWriter(path) as writer:
        for _ in range(count):
            example = {name: feature(value) for name, value in {**columns, "jpg": image}.items()}
            writer.write(tf.train.Example(features=tf.train.Features(feature=example)).SerializeToString())

def count(path):
    return sum(1 for _ in tf.data.TFRecordDataset(path))

for line in sys.stdin:
    name, *arguments = json.loads(line)
    start = time.process_time()
    {"write": write, "count": count}[name](*arguments)
    print(json.dumps(time.process_time() - start), flush=True)
"""

COLUMNS: dict[str, Any] = {
    "txt": "a photograph of a red bicycle that leans on a wall",
    "url": "https://images.example.org/2021/07/bicycle-0001.jpg",
    "key": "000010001",
    "width": 256,
    "height": 384,
    "original_width": 1024,
    "original_height": 1536,
    "similarity": 0.3125,
    "NSFW": "UNLIKELY",
    "LICENSE": "?",
    "sha256": "0" * 64,
}


def write_tar(path: Path, count: int) -> None:
    random = np.random.default_rng(0)
    metadata = {name: value for name, value in COLUMNS.items() if name != "txt"}
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(count):
            image = b"\xff\xd8\xff\xe0" + random.bytes(IMAGE_BYTES) + b"\xff\xd9"
            key = f"{number:09d}"
            about = json.dumps({**metadata, "caption": COLUMNS["txt"], "key": key, "status": "success"}, indent=4)
            writer.write({"__key__": key, "jpg": image, "txt": COLUMNS["txt"], "json": about})


def write(path: Path, count: int) -> None:
    image = np.random.default_rng(0).bytes(IMAGE_BYTES)
    with RecordWriter(path) as writer:
        for _ in range(count):
            writer.write(encode_example({**COLUMNS, "jpg": image}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="clipkit-bench-"))
    peer = subprocess.Popen(
        [sys.executable, "-c", PEER, json.dumps(COLUMNS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        measure(folder, peer, options.records, options.rounds)
    finally:
        peer.kill()
        peer.wait()
        shutil.rmtree(folder)


def measure(folder: Path, peer: "subprocess.Popen[str]", count: int, rounds: int) -> None:
    assert peer.stdin is not None
    assert peer.stdout is not None
    tar = folder / "00000.tar"
    write_tar(tar, count)
    build_tfds(tar, folder / "built", "bench", progress=lambda now: None)
    built = open_dataset(folder / "built")
    records = built.path / built.shards[0].file
    megabytes = records.stat().st_size / 1e6

    def ask(*request: object) -> float:
        print(json.dumps(request), file=peer.stdin, flush=True)
        assert peer.stdout is not None
        return float(peer.stdout.readline())

    def build() -> None:
        build_tfds(tar, folder / "again", "bench", progress=lambda now: None)
        shutil.rmtree(folder / "again")

    order = np.random.default_rng(1).permutation(count).tolist()
    rows = {
        "write records": (lambda: write(folder / "ours", count), ("write", str(folder / "theirs"), count, IMAGE_BYTES)),
        "count records, CRC of lengths": (lambda: index_records(records), ("count", str(records))),
        "count records, all CRC": (lambda: sum(1 for _ in read_records(records)), ("count", str(records))),
        "read at random, image and caption": (
            lambda: [decode_example(built.read(i), ("jpg", "txt")) for i in order],
            None,
        ),
        "build-tfds from a tar": (build, None),
    }
    print(f"{count} records of {IMAGE_BYTES / 1e3:.0f} KB, {rounds} rounds, CPU time of one process")
    print(f"{'':36}{'clipkit':>12}{'tensorflow':>12}{'ratio':>8}  spread")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (ours, theirs) in rows.items():
            start = time.process_time()
            ours()
            spent = time.process_time() - start
            times[name].append((spent, ask(*theirs) if theirs else float("nan")))
    for name, pairs in times.items():
        own, other = (megabytes / statistics.median(each) for each in zip(*pairs, strict=True))
        line = f"{name:36}{own:7,.0f} MB/s"
        if rows[name][1]:
            ratios = sorted(theirs / ours for ours, theirs in pairs)
            line += f"{other:7,.0f} MB/s{statistics.median(ratios):8.2f}  {ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(line)


if __name__ == "__main__":
    main()
