"""The same samples whoever makes them and from wherever one goes on; faults end as promised; nothing is left behind."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from image_shards import picture
from loader_workers import workers_of

from clipkit.errors import UserError
from clipkit.formats.dataset import Dataset, open_dataset
from clipkit.formats.records import RecordError, encode_example
from clipkit.text.tokenizer import SOT, Tokenizer
from clipkit.train.loader import loader as data
from clipkit.train.loader import samples
from clipkit.train.loader import workers as worker_module
from clipkit.train.loader.augment import Augmentation
from clipkit.train.loader.loader import Batch, batches
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.sources.source import Pair, RecordSource, Source

CONFIG = LoaderConfig(
    image_size=32,
    context_length=8,
    batch_size=24,
    augmentation=Augmentation(crop_area=(0.4, 1.0), flip=0.5, brightness=0.3, contrast=0.3, saturation=0.3, grey=0.2),
    text_reduction="random",
    image_reduction="random",
    image_keep=8,
    grid=(4, 4),
    block_size=8,
)


@pytest.fixture(scope="module")
def dataset(pairs_dataset: Path) -> Dataset:
    return open_dataset(pairs_dataset)


@pytest.fixture(scope="module")
def source(dataset: Dataset) -> RecordSource:
    return RecordSource(dataset)


class Pairs:
    """Records in memory, some of them spoilt."""

    def __init__(self, count: int, spoilt: dict[int, str] | None = None) -> None:
        self.num_records, self.spoilt = count, spoilt or {}

    def read(self, i: int) -> bytes:
        image: bytes | None = picture(i % 7)
        text: str | None = f"picture number {i}"
        match self.spoilt.get(i):
            case "record":
                raise RecordError(Path("part-0"), 17, "its checksum is wrong")
            case "bytes":
                return b"\xff\xff no example"
            case "image":
                image = b"<html>gone</html>"
            case "no-image":
                image = None
            case "caption":
                text = " &nbsp; \n"
            case "no-caption":
                text = None
            case "shard":
                raise UserError("part-0 is gone: put the shard back")
            case "death":
                os.kill(os.getpid(), signal.SIGKILL)
            case "bug":
                raise ZeroDivisionError("a bug")
        return encode_example({"jpg": image, "txt": text, "similarity": 0.5})

    def key(self, i: int) -> str:
        return f"part-0:{i}"


def pairs(count: int, spoilt: dict[int, str] | None = None) -> RecordSource:
    return RecordSource(Pairs(count, spoilt))


def digest(batch: Batch) -> list[Any]:
    """All that a batch holds, comparable."""
    values = [batch.image_BHWC, batch.ids_BT, batch.keep_BK, batch.caption_B, batch.positions_B, batch.records_B]
    return [(value.shape, value.tobytes()) for value in values if value is not None] + [batch.keys]


def digests(loader: Iterator[Batch]) -> list[list[Any]]:
    return [digest(batch) for batch in loader]


@pytest.fixture(scope="module")
def plain(source: RecordSource) -> list[list[Any]]:
    """Six batches as made without any worker."""
    return digests(batches(source, CONFIG, 0, 144, workers=0, keys=True))


@pytest.mark.parametrize(("workers", "processes"), [(1, False), (2, False), (4, False), (2, True)])
def test_workers_change_nothing(source: RecordSource, plain: list[list[Any]], workers: int, processes: bool) -> None:
    loader = batches(source, CONFIG, 0, 144, workers=workers, processes=processes, keys=True)
    assert digests(loader) == plain


@pytest.mark.parametrize("start", [24, 96, 120])
def test_resume_is_exact(source: RecordSource, plain: list[list[Any]], start: int) -> None:
    assert digests(batches(source, CONFIG, start, 144, workers=2, keys=True)) == plain[start // 24 :]


def test_a_start_within_a_batch_gives_the_same_samples(source: RecordSource) -> None:
    aligned = list(batches(source, CONFIG, 0, 48, workers=0))
    shifted = list(batches(source, CONFIG, 11, 35, workers=0))
    expected = np.concatenate([batch.image_BHWC for batch in aligned])[11:35]
    np.testing.assert_array_equal(shifted[0].image_BHWC, expected)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batch(source: RecordSource, plain: list[list[Any]], world: int) -> None:
    shares = [list(batches(source, CONFIG, 0, 144, rank=rank, world=world, workers=1)) for rank in range(world)]
    whole = list(batches(source, CONFIG, 0, 144, workers=0))
    for number, batch in enumerate(whole):
        for name in ("image_BHWC", "ids_BT", "keep_BK", "caption_B", "records_B", "positions_B"):
            joined = np.concatenate([getattr(share[number], name) for share in shares])
            np.testing.assert_array_equal(joined, getattr(batch, name))


def test_a_batch_is_what_it_says(dataset: Dataset, source: RecordSource) -> None:
    batch = next(batches(source, CONFIG, 0, workers=0, keys=True))
    assert batch.image_BHWC.shape == (24, 32, 32, 3)
    assert batch.image_BHWC.dtype == np.uint8
    assert batch.image_BHWC.flags.writeable
    assert batch.ids_BT.shape == (24, 8)
    assert batch.ids_BT.dtype == np.int32
    assert (batch.ids_BT[:, 0] == SOT).all()
    assert batch.keep_BK is not None
    assert batch.keep_BK.shape == (24, 8)
    assert batch.keys == [dataset.key(record) for record in batch.records_B.tolist()]
    captions = [dataset.example(record)["txt"] for record in batch.records_B.tolist()]
    for i, j in itertools.combinations(range(24), 2):
        assert (batch.caption_B[i] == batch.caption_B[j]) == (captions[i] == captions[j])
    assert set(batch.arrays()) == {"image_BHWC", "ids_BT", "caption_B", "keep_BK"}
    whole = next(batches(source, replace(CONFIG, text_reduction="truncate", context_length=20), 0, workers=0))
    np.testing.assert_array_equal(whole.ids_BT, Tokenizer()(captions, 20))


def test_an_epoch_holds_each_record_once_and_the_next_in_another_order(source: RecordSource) -> None:
    first, second = np.split(np.concatenate([b.records_B for b in batches(source, CONFIG, 0, 192, workers=1)]), 2)
    assert sorted(first) == sorted(second) == list(range(96))
    assert (first != second).any()


def test_batches_may_be_kept(source: RecordSource, plain: list[list[Any]]) -> None:
    """Shared buffers are used again only when the trainer has let go of them."""
    kept = list(batches(source, CONFIG, 0, 144, workers=1, processes=True, prefetch=1, keys=True))
    assert [digest(batch) for batch in kept] == plain


def test_small_datasets_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoaderConfig(image_size=16, context_length=8, batch_size=8, augmentation=Augmentation(rotation=10.0))
    reads: list[int] = []

    class Counted(Pairs):
        def read(self, i: int) -> bytes:
            reads.append(i)
            return super().read(i)

    kept = digests(batches(RecordSource(Counted(16)), config, 0, 48, workers=1))
    assert sorted(reads) == list(range(16))
    monkeypatch.setattr(samples, "DECODED_BYTES", 100)
    assert digests(batches(RecordSource(Counted(16)), config, 0, 48, workers=1)) == kept
    assert len(reads) == 16 + 48


def test_syntax_reduction() -> None:
    config = LoaderConfig(image_size=16, context_length=5, batch_size=4, text_reduction="syntax")
    batch = next(batches(pairs(16), config, 0, workers=1))
    picture_id, number_id = Tokenizer().encode(["picture number"])[0]
    assert (batch.ids_BT[:, 1] == picture_id).all()
    assert (batch.ids_BT[:, 2] == number_id).all()


class Precomputed(Source):
    """Half of the pairs come with ids and word classes, which needn't be the caption's own."""

    num_records = 16

    def key(self, record: int) -> str:
        return str(record)

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record in records:
            image = memoryview(b"--" + picture(record % 7))[2:]
            yield Pair(image, "a small picture", [320, 1125, 1674], [3, 1, 0]) if record % 2 else Pair(image, "cat dog")


@pytest.mark.parametrize("processes", [False, True])
def test_ids_and_word_classes_made_before_are_taken(processes: bool) -> None:
    config = LoaderConfig(image_size=16, context_length=3, batch_size=8, text_reduction="syntax")
    cat = Tokenizer().encode(["cat"])[0]
    for batch in batches(Precomputed(), config, 0, 16, workers=1, processes=processes):
        for record, ids in zip(batch.records_B.tolist(), batch.ids_BT.tolist(), strict=True):
            assert ids[1:2] == ([1674] if record % 2 else cat)


# ---- Faults ----------------------------------------------------------------------------------------------------------

KINDS = ["record", "bytes", "image", "no-image", "caption", "no-caption"]
SPOILT = {2 + 40 * place: kind for place, kind in enumerate(KINDS)}


@pytest.mark.parametrize(("workers", "processes"), [(0, False), (2, False), (1, True)])
def test_bad_records_are_replaced_counted_and_named_once(workers: int, processes: bool) -> None:
    config = LoaderConfig(image_size=16, context_length=8, batch_size=40, block_size=8)
    told: list[str] = []
    source = pairs(400, SPOILT)
    found = list(batches(source, config, 0, 480, workers=workers, processes=processes, warn=told.append))
    assert sum(batch.bad for batch in found[:10]) == len(SPOILT)
    records = np.concatenate([batch.records_B for batch in found[:10]])
    expected = sorted(i + 1 if i in SPOILT else i for i in range(400))
    assert sorted(records) == expected
    assert len(told) == len(SPOILT)
    for record in SPOILT:
        assert sum(line.startswith(f"part-0:{record} is replaced") for line in told) == 1


def test_replacements_stay_in_the_block_and_differ_for_no_worker() -> None:
    config = LoaderConfig(image_size=16, context_length=8, batch_size=10, block_size=5)
    source = pairs(20, {3: "image", 4: "caption"})
    plain, threaded = (
        np.concatenate([b.records_B for b in batches(source, config, 0, 20, workers=n, warn=lambda _: None)])
        for n in (0, 2)
    )
    np.testing.assert_array_equal(plain, threaded)
    assert sorted(plain) == [0, 0, 0, 1, 2, *range(5, 20)]


def test_too_many_bad_records_stop_the_run_with_names() -> None:
    config = LoaderConfig(image_size=16, context_length=8, batch_size=50, block_size=10)
    source = pairs(1000, dict.fromkeys(range(0, 1000, 20), "image"))
    loader = batches(source, config, workers=1, warn=lambda _: None)
    with pytest.raises(UserError, match=r"more than 1%, among them part-0:\d+ \(not an image but an HTML page\)"):
        list(itertools.islice(loader, 40))
    allowed = batches(source, replace(config, max_bad=0.2), 0, 1000, workers=1, warn=lambda _: None)
    assert sum(batch.bad for batch in allowed) == 50


@pytest.mark.parametrize("seed", range(4))
def test_a_dataset_that_keeps_to_the_limit_is_not_stopped_by_chance(seed: int) -> None:
    """Exactly 1% are broken; somewhere in a random order more than that share have been seen."""
    config = LoaderConfig(image_size=16, context_length=8, batch_size=50, block_size=10, seed=seed)
    source = pairs(1200, dict.fromkeys(range(0, 1200, 100), "image"))
    found = list(batches(source, config, 0, 2400, workers=0, warn=lambda _: None))
    assert sum(batch.bad for batch in found) == 24


def test_a_block_of_bad_records_stops_the_run() -> None:
    config = LoaderConfig(image_size=16, context_length=8, batch_size=4, block_size=4)
    with pytest.raises(UserError, match=r"4 records next to each other .* part-0:\d"):
        list(batches(pairs(4, dict.fromkeys(range(4), "image")), config, 0, 4, workers=0, warn=lambda _: None))


@pytest.mark.parametrize(("kind", "error"), [("shard", UserError), ("bug", ZeroDivisionError)])
@pytest.mark.parametrize(("workers", "processes"), [(0, False), (1, False), (1, True)])
def test_other_errors_come_through(kind: str, error: type[Exception], workers: int, processes: bool) -> None:
    config = LoaderConfig(image_size=16, context_length=8, batch_size=8)
    with pytest.raises(error, match=r"part-0 is gone|a bug"):
        list(batches(pairs(8, {3: kind}), config, 0, 8, workers=workers, processes=processes))


def test_a_worker_that_dies_each_time_is_named_with_its_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MAX_DEATHS", 2)
    config = LoaderConfig(image_size=16, context_length=8, batch_size=8)
    told: list[str] = []
    with pytest.raises(UserError, match=r"2 loader workers died at .* part-0:\d"):
        list(batches(pairs(8, {3: "death"}), config, 0, 8, workers=1, processes=True, warn=told.append))
    assert len([line for line in told if "exit -9" in line]) == 2  # a busy machine is told of a wait, too


def test_a_worker_that_is_killed_has_its_work_done_again(source: RecordSource, plain: list[list[Any]]) -> None:
    told: list[str] = []
    loader = batches(source, CONFIG, 0, 144, workers=1, processes=True, prefetch=1, keys=True, warn=told.append)
    found = [digest(next(loader))]
    os.kill(workers_of(os.getpid())[0], signal.SIGKILL)
    found += digests(loader)
    assert found == plain
    assert len([line for line in told if "died (exit -9)" in line]) == 1


@pytest.mark.parametrize("processes", [False, True])
def test_closing_leaves_nothing_behind(dataset: Dataset, source: RecordSource, processes: bool) -> None:
    threads, files, cv2_threads = (
        threading.active_count(),
        len(list(Path("/proc/self/fd").iterdir())),
        cv2.getNumThreads(),
    )
    loader = batches(source, CONFIG, workers=2, processes=processes)
    next(loader)
    loader.close()
    assert threading.active_count() == threads
    assert cv2.getNumThreads() == cv2_threads
    assert workers_of(os.getpid()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + len(dataset.shards)


def test_workers_end_with_a_killed_trainer(pairs_dataset: Path) -> None:
    script = f"""
import sys
from clipkit.formats.dataset import open_dataset
from clipkit.train.loader.loader import batches
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.sources.source import RecordSource
config = LoaderConfig(image_size=16, context_length=8, batch_size=8)
loader = batches(RecordSource(open_dataset({str(pairs_dataset)!r})), config, workers=1, processes=True)
next(loader)
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"ready\n"
        workers = workers_of(trainer.pid)
        assert workers
        # The worker's stdout is a pipe to the trainer; we watch the worker itself through a descriptor of its process.
        watched = [os.pidfd_open(pid) for pid in workers]
        trainer.kill()
    import select

    for descriptor in watched:
        assert select.select([descriptor], [], [], 60)[0], "the worker outlived its trainer"
        os.close(descriptor)


def test_worker_processes_import_no_torch() -> None:
    script = (
        "import sys, clipkit.train.loader.workers\n"
        "assert 'torch' not in sys.modules and 'clipkit.text.tokens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_stalled_source_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "STALL_SECONDS", 0.01)
    release = threading.Event()

    class Slow(Pairs):
        def read(self, i: int) -> bytes:
            release.wait()
            return super().read(i)

    told: list[str] = []

    def warn(message: str) -> None:
        told.append(message)
        release.set()

    config = LoaderConfig(image_size=16, context_length=8, batch_size=8)
    assert len(list(batches(RecordSource(Slow(8)), config, 0, 8, workers=1, warn=warn))) == 1
    assert "waited" in told[0]


@pytest.mark.parametrize(
    ("changes", "stop", "world", "words"),
    [
        ({}, 25, 1, "25 samples"),
        ({}, 24, 5, "can't be shared by 5"),
        ({"block_size": 0}, 24, 1, "block_size"),
        ({"image_keep": 99}, 24, 1, "can't keep 99"),
        ({"image_reduction": None}, 24, 1, "image_keep needs"),
        ({"context_length": 2}, 24, 1, "2 text tokens"),
        ({"augmentation": Augmentation(flip=2.0)}, 24, 1, "flip"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_at_once(
    changes: dict[str, Any], stop: int, world: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        batches(pairs(8), replace(CONFIG, **changes), 0, stop, world=world)
    with pytest.raises(UserError, match="no records"):
        batches(pairs(0), CONFIG)


def test_resume_far_away_of_a_huge_dataset() -> None:
    config = LoaderConfig(image_size=16, context_length=8, batch_size=8)
    batch = next(batches(pairs(2**31), config, 10**12, workers=0))
    assert batch.positions_B[0] == 10**12
