"""The samples that training gets, to the last pixel: the same with any workers and ranks, killed wherever it may be.

All goes through the training loop itself. Each run's samples are compared with those of one run with one worker that
nobody disturbed: the keys, and hashes of pixels, token ids, caption and kept patches.
"""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from object_store import s3 as s3
from object_store import s3_server as s3_server
from ranks import Ended, end_ranks
from recorded_training import train_as_rank, train_recorded
from safetensors.torch import load_file
from source_kinds import upload

from clipkit import checkpoint

BATCHES = 20
SAMPLES = 16 * BATCHES

Sample = dict[str, Any]


def read(log: Path) -> list[Sample]:
    """All lines of a log, start after start, rank after rank."""
    return [json.loads(line) for path in sorted(log.iterdir()) for line in path.read_text().splitlines()]


def assert_same(log: Path, expected: list[Sample]) -> list[int]:
    """What was seen, however often, is what the undisturbed run saw there, and nothing is missing. Gives positions."""
    seen = read(log)
    assert [line for line in seen if line != expected[line["position"]]] == []
    assert {line["position"] for line in seen} == set(range(SAMPLES))
    return [line["position"] for line in seen]


def train_apart(ranks: int, data: object, *arguments: Any) -> list[Ended]:
    """Train in processes of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return end_ranks(train_as_rank, environment, str(data), *arguments, ranks=ranks)


@pytest.fixture(scope="module")
def undisturbed(pairs_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train_recorded(pairs_dataset, folder / "run", folder / "log", workers=1).finished
    return folder


@pytest.fixture(scope="module")
def expected(undisturbed: Path) -> list[Sample]:
    """Sample by sample what one worker gives."""
    found = read(undisturbed / "log")
    assert [line["position"] for line in found] == list(range(SAMPLES))
    assert len({line["key"] for line in found[:96]}) == 96
    # Pixels are a sample's own: as good as no two are equal, though each of 96 records comes three times and more.
    assert len({line["image_BHWC"] for line in found}) > 0.95 * SAMPLES
    return found


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_samples(
    pairs_dataset: Path, expected: list[Sample], tmp_path: Path, workers: int
) -> None:
    """These are processes; the one of the undisturbed run is a thread."""
    assert train_recorded(pairs_dataset, tmp_path / "run", tmp_path / "log", workers).finished
    assert assert_same(tmp_path / "log", expected) == list(range(SAMPLES))


def kill_somewhere(draw: random.Random, ranks: int, data: Path, run: Path, log: Path) -> list[Ended]:
    """Start a run with any number of workers, and have the kernel kill it at any batch behind the first checkpoint.

    There is one every four batches, so that what comes after goes on and doesn't begin anew.
    """
    killed = train_apart(ranks, data, run, log, draw.choice([1, 2, 4]), draw.randint(5, 14))
    first = {line["position"] for line in read(log)}
    assert 64 <= len(first) < SAMPLES
    assert checkpoint.checkpoints(run)
    return killed


def test_killed_and_resumed_with_other_workers(
    pairs_dataset: Path, undisturbed: Path, expected: list[Sample], tmp_path: Path
) -> None:
    draw, run, log = random.Random(0), tmp_path / "run", tmp_path / "log"
    (killed,) = kill_somewhere(draw, 1, pairs_dataset, run, log)
    assert killed.code == -signal.SIGKILL, killed.err
    newest = checkpoint.latest(run)
    assert newest is not None
    assert train_recorded(pairs_dataset, run, log, draw.choice([1, 2, 4])).finished
    assert SAMPLES < len(assert_same(log, expected)) < SAMPLES + 6 * 16
    again = [json.loads(line)["position"] for line in (log / "001-0.jsonl").read_text().splitlines()]
    assert again == list(range(int(newest.name), SAMPLES))
    ours, theirs = (load_file(checkpoint.find(each) / "model.safetensors") for each in (run, undisturbed / "run"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_two_ranks_killed_and_resumed_get_what_one_gets(
    pairs_dataset: Path, expected: list[Sample], tmp_path: Path
) -> None:
    draw, run, log = random.Random(1), tmp_path / "run", tmp_path / "log"
    killed = kill_somewhere(draw, 2, pairs_dataset, run, log)
    assert -signal.SIGKILL in [each.code for each in killed], killed
    done = train_apart(2, pairs_dataset, run, log, draw.choice([1, 2, 4]))
    assert [each.code for each in done] == [0, 0], done
    said = "".join(each.err for each in done)
    # Both ranks read their part, and one of them speaks.
    assert {path.name for path in log.iterdir()} == {"000-0.jsonl", "000-1.jsonl", "001-0.jsonl", "001-1.jsonl"}
    assert said.count("train full: 128/128 samples") == said.count("train full") == 1
    assert "waits for data" in said
    assert len(assert_same(log, expected)) > SAMPLES


def test_two_ranks_and_their_workers_read_a_store_through_one_cache(
    pairs_dataset: Path, expected: list[Sample], tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept beside them in a temporary folder goes with the last of the six processes."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    data = upload(pairs_dataset, f"{s3}/pairs")
    done = train_apart(2, data, tmp_path / "run", tmp_path / "log", 2)
    assert [each.code for each in done] == [0, 0], done
    assert sorted(assert_same(tmp_path / "log", expected)) == list(range(SAMPLES))
    assert not list(tmp_path.glob("clipkit-blocks-*"))
