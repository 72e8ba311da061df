"""Trains the `debug` recipe and writes down each sample that the trainer gets; killed by the kernel where it is asked.

After `kill_at` batches of a new run the process that got the last one kills itself, once the newest checkpoint is on
the disk (the kills while one is being written are those of `killed_runs`). `log` gets a file a rank and start, a line
of JSON a sample.
"""

import contextlib
import hashlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit import checkpoint
from clipkit.storage.files import as_path
from clipkit.train import loop
from clipkit.train.catalogue import debug
from clipkit.train.loader.loader import Batch, batches
from clipkit.train.run import Summary

EVERY, STEP = 64, 16  # samples from one checkpoint of the recipe to the next, and of a step


def digest(array: Any) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()


def lines(batch: Batch) -> Iterator[dict[str, Any]]:
    """For each sample its place in the run, its key, and hashes of all that the trainer is given of it."""
    assert batch.keys is not None
    for row, key in enumerate(batch.keys):
        given = {name: digest(array[row]) for name, array in batch.arrays().items()}
        yield {"position": int(batch.positions_B[row]), "key": key, **given}


def train_recorded(data: Path, run: Path, log: Path, workers: int, kill_at: int | None = None) -> Summary:
    """Train, or go on with, the run in this process, and record every batch that it takes from the loader."""
    log.mkdir(exist_ok=True)
    rank = os.environ.get("RANK", "0")
    path = log / f"{len(list(log.glob(f'*-{rank}.jsonl'))):03d}-{rank}.jsonl"
    taken = 0

    def recorded(*arguments: Any, **options: Any) -> Iterator[Batch]:
        nonlocal taken
        loader = batches(*arguments, **options, keys=True)
        with contextlib.closing(loader), path.open("a") as file:
            for batch in loader:
                file.writelines(json.dumps(line) + "\n" for line in lines(batch))
                file.flush()
                taken += 1
                if taken == kill_at:
                    newest = EVERY * ((int(batch.positions_B.max()) + 1 - STEP) // EVERY)
                    while not checkpoint.folder_of(run, newest).exists():
                        time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    loop.batches = recorded
    try:
        return loop.train(debug(), data, run, device_name="cpu", resume=True, workers=workers)
    finally:
        loop.batches = batches


def train_as_rank(environment: dict[str, str], data: str, *arguments: Any) -> None:
    """The same in a process of `ranks`, which began before the test set its environment."""
    os.environ.update(environment)
    tempfile.tempdir = None
    train_recorded(as_path(data), *arguments)
