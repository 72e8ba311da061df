"""The loader with ten million records in a thousand shards: start, memory and rate are those of ten thousand in one.

The shards are one file under many names, and the large images are large by what their headers hold, for speed.
"""

import contextlib
import io
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.formats import dataset as dataset_module
from clipkit.formats.dataset import open_dataset, shard_name
from clipkit.formats.features import Feature
from clipkit.formats.manifest import ShardEntry, SourceEntry, SplitManifest, index_path, write_manifest
from clipkit.formats.records import RecordWriter, encode_example
from clipkit.pixels.images import MAX_PIXELS
from clipkit.storage import ranges as range_reader
from clipkit.tfrecord_tools.writing.metadata import write_metadata
from clipkit.train.loader.augment import Augmentation
from clipkit.train.loader.loader import Batch, batches
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.sources.open import open_source
from clipkit.train.sources.source import RecordSource

CONFIG = LoaderConfig(image_size=32, context_length=8, batch_size=256, augmentation=Augmentation(crop_area=(0.4, 1.0)))
SHARD_RECORDS, MANY_SHARDS = 10_000, 1000
INDEX_MEGABYTES = SHARD_RECORDS * MANY_SHARDS * 8 / 1e6
WORKER_MEGABYTES = 700
START_SECONDS = 3.0


def jpeg(number: int, height: int, width: int) -> bytes:
    """A small picture, or a large one that is quickly decoded."""
    pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def padded(data: bytes, size: int) -> bytes:
    """The JPEG with comments in its header, `size` bytes in all or a little more."""
    comment = struct.pack(">HH", 0xFFFE, 0xFFFF) + bytes(0xFFFF - 2)
    return data[:2] + comment * -(-(size - len(data)) // len(comment)) + data[2:]


def png(height: int, width: int) -> bytes:
    """Grey with transparency, all pixels alike."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    squeeze = zlib.compressobj(1)
    rows = [squeeze.compress(bytes(1 + 2 * width)) for _ in range(height)]
    header = struct.pack(">IIBBBBB", width, height, 8, 4, 0, 0, 0)
    data = b"".join([*rows, squeeze.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def write_linked(folder: Path, images: Sequence[bytes], records: int, shards: int) -> Path:
    """A dataset directory whose shards are the same file of so many records, the images in turn."""
    (folder / "clipkit").mkdir(parents=True)
    first = folder / shard_name("scale", "train", 0, shards)
    with RecordWriter(first) as writer:
        offsets = [
            writer.write(encode_example({"jpg": images[number % len(images)], "txt": f"picture number {number}"}))
            for number in range(records)
        ]
    entries = []
    for number in range(shards):
        path = folder / shard_name("scale", "train", number, shards)
        if number:
            path.hardlink_to(first)
        source = SourceEntry(f"{number:05d}.tar", writer.bytes, records, records)
        entries.append(
            ShardEntry(path.name, records, writer.bytes, f"{writer.checksum:08x}", (source,), {"jpeg": records})
        )
    np.save(index_path(folder, "train"), np.tile(np.array(offsets, np.uint64), shards))
    write_manifest(folder, {"train": SplitManifest(tuple(entries))})
    features = {"jpg": Feature("image"), "txt": Feature("text")}
    write_metadata(folder, "scale", features, {"train": SplitManifest(tuple(entries))})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that is gone at the end: some hundred megabytes."""
    path = tmp_path_factory.mktemp("scale")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def few(folder: Path) -> Path:
    """Ten thousand records in one shard."""
    return write_linked(folder / "few", [jpeg(number, 40, 48) for number in range(50)], SHARD_RECORDS, 1)


@pytest.fixture(scope="module")
def many(folder: Path) -> Path:
    """Ten million records in a thousand shards."""
    return write_linked(folder / "many", [jpeg(number, 40, 48) for number in range(50)], SHARD_RECORDS, MANY_SHARDS)


def megabytes(process: int, field: str) -> float:
    """A field of /proc/PID/status: VmHWM, RssAnon, …"""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


def workers() -> list[int]:
    """Process ids of this process's loader workers."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread or a process that has just ended
            for child in map(int, (task / "children").read_text().split()):
                if b"clipkit.train.loader.workers" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
    return found


def first_seconds(path: Path, processes: bool, start: int = 0) -> float:
    """From the call to the first batch."""
    called = time.perf_counter()
    loader = batches(
        open_source(path).source(), CONFIG, start, workers=2 if processes else 0, processes=processes, prefetch=1
    )
    next(loader)
    seconds = time.perf_counter() - called
    loader.close()
    return seconds


# ---- Start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "start"), [(False, 0), (True, 0), (False, 14_999_808)])
def test_the_first_batch_of_ten_million_records_comes_at_once(many: Path, processes: bool, start: int) -> None:
    """The best of ten at the most: others may have the machine for a while."""
    assert any(first_seconds(many, processes, start) < START_SECONDS for _ in range(10))


def test_the_start_opens_no_shard_but_those_of_the_first_batch(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Recorded(range_reader.LocalFile):
        def __init__(self, path: Path) -> None:
            opened.append(path.name)
            super().__init__(path)

    def never(path: Path) -> np.ndarray:
        raise AssertionError(f"{path} is read for its offsets, which the index has")

    monkeypatch.setattr(range_reader, "LocalFile", Recorded)
    monkeypatch.setattr(dataset_module, "index_records", never)
    source = open_source(many).source()
    loader = batches(source, CONFIG, workers=0)
    read = bytes_read()
    assert opened == []
    batch = next(loader)
    read = bytes_read() - read
    loader.close()
    names = {source.key(record).partition(":")[0] for record in batch.records_B.tolist()}
    assert set(opened) == names
    assert len(opened) <= CONFIG.batch_size
    # The vocabulary and the batch's records; a shard has four times as much.
    assert read < 4_000_000 < 4 * (many / opened[0]).stat().st_size


def bytes_read() -> int:
    """What this process has read from files and pipes."""
    return int(Path("/proc/self/io").read_text().split()[1])


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_the_index_is_mapped_and_not_read(few: Path, many: Path) -> None:
    """Neither the loader's process nor its workers have a copy of it."""
    next(batches(open_source(few).source(), CONFIG, workers=0))  # what the first batch loads, once for all
    before = megabytes(os.getpid(), "RssAnon")
    loader = batches(open_source(many).source(), CONFIG, workers=0)
    next(loader)
    assert megabytes(os.getpid(), "RssAnon") - before < INDEX_MEGABYTES / 2
    loader.close()

    own = []
    for path in (few, many):
        loader = batches(open_source(path).source(), CONFIG, workers=1, processes=True)
        next(loader)
        own.append([megabytes(worker, "RssAnon") for worker in workers()])
        loader.close()
    assert len(own[0]) == len(own[1]) == 1
    assert own[1][0] - own[0][0] < INDEX_MEGABYTES / 2


@pytest.mark.parametrize(("size", "batch_size"), [(6_000_000, 256), (24_000_000, 64)])
def test_a_worker_takes_less_than_700_mb_for_large_images_alone(folder: Path, size: int, batch_size: int) -> None:
    """Every one of 4,000 x 3,000 pixels: many of some megabytes in a chunk, and few that are larger."""
    images = [padded(jpeg(number, 3000, 4000), size) for number in range(4)]
    source = RecordSource(open_dataset(write_linked(folder / f"large-{size}", images, 4, 64)))
    loader = batches(source, replace(CONFIG, batch_size=batch_size), workers=1, processes=True, prefetch=0)
    batch = next(loader)
    (worker,) = workers()
    peak = megabytes(worker, "VmHWM")
    loader.close()
    assert batch.bad == 0
    assert size / 1e6 < peak < WORKER_MEGABYTES


def test_a_worker_takes_less_than_700_mb_for_an_image_of_64_megapixels(folder: Path) -> None:
    """Pillow has to decode it, whole and with four bytes a pixel."""
    side = 8000
    assert side**2 < MAX_PIXELS
    source = RecordSource(open_dataset(write_linked(folder / "largest", [png(side, side)], 1, 1)))
    loader = batches(source, replace(CONFIG, batch_size=1), workers=1, processes=True, prefetch=0)
    batch = next(loader)
    (worker,) = workers()
    peak = megabytes(worker, "VmHWM")
    loader.close()
    assert batch.bad == 0
    assert 4 * side**2 / 1e6 < peak < WORKER_MEGABYTES


def test_memory_doesnt_grow_with_the_samples_that_were_made(folder: Path) -> None:
    """Some images are large; each batch is 20 MB of them."""
    images = [padded(jpeg(number, 40, 48), 80_000) for number in range(100)]
    images[50] = padded(jpeg(50, 3000, 4000), 1_000_000)
    source = RecordSource(open_dataset(write_linked(folder / "mixed", images, 100, 8)))
    loader = batches(source, CONFIG, workers=1, processes=True)
    for _ in islice(loader, 4):
        pass
    (worker,) = workers()
    early = megabytes(worker, "RssAnon")
    for _ in islice(loader, 8):
        pass
    late, peak = megabytes(worker, "RssAnon"), megabytes(worker, "VmHWM")
    loader.close()
    assert late - early < 40  # the eight batches are 160 MB
    assert peak < WORKER_MEGABYTES


def test_a_worker_keeps_no_pages_of_large_batches(few: Path) -> None:
    """The buffers take 600 MB together; what is in them is what it is without a worker."""
    config = replace(CONFIG, image_size=224, batch_size=1024)
    source = open_source(few).source()
    loader = batches(source, config, workers=1, processes=True, prefetch=1)
    made = list(islice(loader, 2))
    (worker,) = workers()
    shared = megabytes(worker, "RssShmem")
    plain = list(islice(batches(source, config, workers=0), 2))
    for ours, theirs in zip(made, plain, strict=True):
        np.testing.assert_array_equal(ours.records_B, theirs.records_B)
        np.testing.assert_array_equal(ours.image_BHWC, theirs.image_BHWC)
    loader.close()
    assert 4 * made[0].image_BHWC.nbytes / 1e6 > 600
    assert shared < 100


# ---- Rate ------------------------------------------------------------------------------------------------------------


def cpu_seconds(loader: Iterator[Batch], count: int) -> float:
    """To make so many batches."""
    before = time.process_time()
    assert len(list(islice(loader, count))) == count
    return time.process_time() - before


def test_a_sample_of_ten_million_costs_what_one_of_ten_thousand_does(few: Path, many: Path) -> None:
    """The best of several rounds in turn; the images are tiny, so what depends on the size would show."""
    loaders = [batches(RecordSource(open_dataset(path)), CONFIG, workers=0) for path in (few, many)]
    for loader in loaders:
        cpu_seconds(loader, 4)  # sets up the tokenizer
    rounds = [[cpu_seconds(loader, 8) for loader in loaders] for _ in range(5)]
    for loader in reversed(loaders):
        loader.close()
    small, large = (min(seconds) for seconds in zip(*rounds, strict=True))
    assert large < 1.5 * small
