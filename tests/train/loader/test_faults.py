"""Faults on real shards: damage within them, shards that go, disks that stall, workers that are killed, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from loader_workers import workers_of
from small_dataset import write_pairs

from clipkit import checkpoint
from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.dataset import Dataset, open_dataset
from clipkit.train.loader import loader as data_module
from clipkit.train.loader.augment import Augmentation
from clipkit.train.loader.loader import Batch, batches
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.sources.source import RecordSource

CONFIG = LoaderConfig(
    image_size=32,
    context_length=8,
    batch_size=24,
    augmentation=Augmentation(crop_area=(0.4, 1.0), flip=0.5),
    text_reduction="random",
    block_size=8,
)
KINDS = [(0, False), (2, False), (2, True)]
GENEROUS = 120.0


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """96 pairs in three shards, to be spoilt."""
    return open_dataset(write_pairs(tmp_path / "data", [40, 30, 26]))


def shard(dataset: Dataset, number: int) -> Path:
    return dataset.path / dataset.shards[number].file


def spoil(dataset: Dataset, records: list[int], at: int = 200) -> None:
    """Turn one byte in each of these records, `at` bytes behind its beginning."""
    for record in records:
        number, place = dataset.locate(record)
        with shard(dataset, number).open("r+b") as file:
            offset = int(dataset.offsets(number)[place]) + at
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0xFF]))


def contents(batch: Batch) -> list[bytes]:
    return [array.tobytes() for array in (*batch.arrays().values(), batch.positions_B, batch.records_B)]


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something to be true."""
    end = time.monotonic() + GENEROUS
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.01)
    return found


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "processes"), KINDS)
@pytest.mark.parametrize("at", [2, 200])  # in the length, in the contents
def test_damaged_records_are_replaced_counted_and_named(
    dataset: Dataset, workers: int, processes: bool, at: int
) -> None:
    spoilt = [40, 41, 90]
    spoil(dataset, spoilt, at)
    told: list[str] = []
    source = RecordSource(dataset)
    found = list(batches(source, CONFIG, 0, 96, workers=workers, processes=processes, warn=told.append))
    assert sum(batch.bad for batch in found) == 4  # 41 was also to stand in for 40
    assert sorted(np.concatenate([batch.records_B for batch in found])) == sorted(
        {40: 42, 41: 42, 90: 91}.get(record, record) for record in range(96)
    )
    assert len(told) == 3
    for record in spoilt:
        named = [line for line in told if line.startswith(f"{dataset.key(record)} is replaced by its neighbour: ")]
        assert len(named) == 1
        assert "checksum" in named[0]


def test_a_run_names_a_damaged_record_once_in_all_its_stages_and_counts_each_time(
    dataset: Dataset, tmp_path: Path
) -> None:
    spoil(dataset, [40])
    arguments = ["train", "--data", str(dataset.path), "--recipe", "debug", "--out", str(tmp_path / "run"), "--json"]
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert result.stderr.count(f"{dataset.key(40)} is replaced by its neighbour: ") == 1
    # 320 samples are three epochs of 96 records and a third of another: in two stages.
    assert json.loads(result.stdout)["bad_samples"] in (3, 4)


def test_too_much_damage_ends_training_with_the_names(dataset: Dataset, tmp_path: Path) -> None:
    spoil(dataset, [0, 7, *range(30, 60, 3)])
    arguments = ["train", "--data", str(dataset.path), "--recipe", "debug", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--workers", "1"])
    assert result.exit_code == 2
    error = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1
    assert "records are broken, more than 1%, among them" in error[0]
    assert any(file.file in error[0] for file in dataset.shards)


@pytest.mark.parametrize(("workers", "processes"), KINDS)
def test_a_shard_that_vanishes_is_named(dataset: Dataset, workers: int, processes: bool) -> None:
    """It goes after the dataset was opened; no file of it was open yet."""
    shard(dataset, 1).unlink()
    with pytest.raises(UserError) as error:
        list(batches(RecordSource(dataset), CONFIG, 0, 96, workers=workers, processes=processes))
    assert f"{shard(dataset, 1)} is gone: put the shard back" in str(error.value)


@pytest.mark.parametrize("how", ["unlinked", "cut", "another"])
def test_a_shard_that_vanishes_while_it_is_read(dataset: Dataset, how: str) -> None:
    """What is open stays readable when it is unlinked; what is cut short is damage; another file is refused."""
    source, path = RecordSource(dataset), shard(dataset, 1)
    plain = [contents(batch) for batch in batches(RecordSource(open_dataset(dataset.path)), CONFIG, 0, 192, workers=0)]
    loader = batches(source, CONFIG, 0, 192, workers=2, processes=how == "another", warn=lambda _: None)
    if how == "another":
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(UserError, match="has changed since the dataset was opened"):
            list(loader)
        return
    found = [contents(next(loader))]
    if how == "unlinked":
        path.unlink()
        assert found + [contents(batch) for batch in loader] == plain
        return
    os.truncate(path, 100)
    with pytest.raises(UserError, match=rf"({path.name}:\d+ .*the file ends|{path.name}:\d+ .*checksum)"):
        list(loader)


# ---- Workers ---------------------------------------------------------------------------------------------------------


def test_workers_that_are_killed_are_named_and_their_work_is_done_again(dataset: Dataset) -> None:
    source = RecordSource(dataset)
    plain = [contents(batch) for batch in batches(source, CONFIG, 0, 480, workers=0)]
    told: list[str] = []
    loader = batches(source, CONFIG, 0, 480, workers=2, processes=True, prefetch=1, warn=told.append)
    found, killed = [contents(next(loader))], set()
    for batch in loader:
        found.append(contents(batch))
        if len(found) in (3, 8):
            for worker in workers_of(os.getpid()):
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
    assert found == plain
    assert len(killed) == 4
    # One of those killed last may have had nothing to do any more.
    assert 3 <= len(told) <= 4
    for line in told:
        assert int(line.split()[2]) in killed
        assert "died (exit -9) at about" in line
        assert any(file.file in line for file in dataset.shards)


def test_a_worker_that_stalls_is_reported_with_its_shard_and_goes_on(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RecordSource(dataset)
    plain = [contents(batch) for batch in batches(source, CONFIG, 0, 96, workers=0)]
    monkeypatch.setattr(data_module, "STALL_SECONDS", 0.2)
    told: list[str] = []
    stopped: list[int] = []

    def warn(line: str) -> None:
        told.append(line)
        if stopped:
            os.kill(stopped.pop(), signal.SIGCONT)

    loader = batches(source, CONFIG, 0, 96, workers=1, processes=True, prefetch=1, warn=warn)
    found = [contents(next(loader))]
    told.clear()  # the start of a worker may have taken as long
    stopped.extend(workers_of(os.getpid()))
    os.kill(stopped[0], signal.SIGSTOP)
    found += [contents(batch) for batch in loader]
    assert found == plain
    assert told
    assert "the loader has waited 0 s for samples from" in told[0]
    assert any(file.file in told[0] for file in dataset.shards)


def test_a_stall_is_reported_within_half_a_minute() -> None:
    assert data_module.STALL_SECONDS <= 25


def in_time(seconds_of: Callable[[int], float]) -> bool:
    """Whether it takes less than two seconds, or than its share of a machine that others keep busy. Their load, a mean
    over a minute, may be behind the times: it can only add to ours, so the first of three attempts in time decides."""
    cores = len(os.sched_getaffinity(0))
    return any(seconds_of(attempt) < 2.0 * max(1.0, os.getloadavg()[0] / cores) for attempt in range(3))


@pytest.fixture
def stalled(dataset: Dataset) -> Iterator[Dataset]:
    """A dataset, opened, of which one shard's file now never answers who opens it."""
    path = shard(dataset, 1)
    path.unlink()
    os.mkfifo(path)
    yield dataset
    # Let go of whoever still hangs there.
    release = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    until(lambda: not [each for each in threading.enumerate() if "(work)" in each.name], "a thread hangs")
    os.close(release)


class EnoughError(Exception):
    """Ends a loader that waits."""


@pytest.mark.parametrize("processes", [False, True])
def test_closing_does_not_wait_for_a_disk_that_stalls(
    stalled: Dataset, monkeypatch: pytest.MonkeyPatch, processes: bool
) -> None:
    monkeypatch.setattr(data_module, "STALL_SECONDS", 5.0 if processes else 0.5)  # processes take a while to start

    def close(_: int) -> float:
        told: list[float] = []

        def warn(line: str) -> None:
            told.append(time.monotonic())
            raise EnoughError

        with pytest.raises(EnoughError):
            list(batches(RecordSource(stalled), CONFIG, workers=2, processes=processes, warn=warn))
        seconds = time.monotonic() - told[0]
        assert workers_of(os.getpid()) == []
        return seconds

    assert in_time(close)


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def session(leader: int) -> list[int]:
    """Process ids of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == leader and "State:\tZ" not in (folder / "status").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def memory_files(processes: list[int]) -> dict[tuple[int, int], str]:
    """Files in memory that these processes hold, by device and inode: the name that each has, if any."""
    found = {}
    for process in processes:
        for file in Path(f"/proc/{process}/fd").glob("*"):
            try:
                name, status = str(file.readlink()), file.stat()
            except OSError:
                continue
            if name.startswith(("/dev/shm/", "/memfd:")):
                found[status.st_dev, status.st_ino] = name
    return found


def everyone() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def interrupt(process: subprocess.Popen[str]) -> float:
    """Ctrl-C as a terminal sends it: to the whole group. Gives the seconds until the process is gone."""
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.wait(GENEROUS)
    return time.monotonic() - began


def test_ctrl_c_ends_training_and_leaves_nothing_behind(dataset: Dataset, tmp_path: Path) -> None:
    def interrupted(attempt: int) -> float:
        run = tmp_path / f"run{attempt}"
        changes = ["stages.0.samples=160000000", "cadence.checkpoint_samples=100000000", "cadence.log_samples=16"]
        command = [sys.executable, "-m", "clipkit", "train", "--data", str(dataset.path), "--recipe", "debug"]
        command += ["--out", str(run), "--device", "cpu", "--workers", "3"]
        command += [word for change in changes for word in ("--set", change)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
        ) as training:
            metrics = run / "metrics.jsonl"
            until(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, "training doesn't begin")
            workers, files = workers_of(training.pid), memory_files(session(training.pid))
            seconds = interrupt(training)
            assert training.stderr is not None
            said = training.stderr.read()
        assert len(workers) == 3
        assert any("clipkit-batches" in name for name in files.values())
        assert training.returncode == 128 + signal.SIGINT, said
        assert "run the same command with --resume" in said
        assert "Traceback" not in said
        assert session(training.pid) == []
        assert not set(files) & set(memory_files(everyone()))
        assert not [name for name in files.values() if name.startswith("/dev/shm/") and Path(name).exists()]
        seen = [json.loads(line)["samples_seen"] for line in metrics.read_text().splitlines()]
        assert checkpoint.load(run).samples_seen == seen[-1]
        return seconds

    assert in_time(interrupted)


STALLING = """
import itertools, sys, threading
from pathlib import Path
from clipkit.train import loop
from clipkit.train.loader import loader as data
from clipkit.train.catalogue import debug
data.STALL_SECONDS = 0.5
real = loop.batches
def stalling(source, *arguments, **options):
    pairs, taken = source.pairs, itertools.count()
    def stall(records):
        for record in records:
            if next(taken) >= 120:
                threading.Event().wait()
            yield from pairs([record])
    source.pairs = stall
    return real(source, *arguments, **options | {"processes": False})
loop.batches = stalling
summary = loop.train(debug(), Path(sys.argv[1]), Path(sys.argv[2]), device_name="cpu", workers=2)
print(summary.finished, summary.samples_seen)
"""


def test_ctrl_c_ends_training_that_waits_for_data(dataset: Dataset, tmp_path: Path) -> None:
    """What was learnt since the last checkpoint is saved, though no step follows any more."""

    def interrupted(attempt: int) -> float:
        run = tmp_path / f"run{attempt}"
        command = [sys.executable, "-c", STALLING, str(dataset.path), str(run)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as training:
            assert training.stdout is not None
            assert training.stderr is not None
            told: list[str] = []
            # A slow start may be reported too; the stall is the one behind the first checkpoint.
            for line in training.stderr:
                told.append(line)
                if "the loader has waited" in line and (run / "checkpoints" / f"{64:012d}").exists():
                    break
            seconds = interrupt(training)
            said, told_after = training.stdout.read(), training.stderr.read()
        assert training.returncode == 0, "".join(told) + told_after
        finished, samples_seen = said.split()
        assert finished == "False"
        assert int(samples_seen) in (80, 96, 112)
        assert checkpoint.load(run).samples_seen == int(samples_seen)
        assert session(training.pid) == []
        return seconds

    assert in_time(interrupted)
