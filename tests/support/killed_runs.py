"""A run that a signal hits at a chosen place, for `ranks.end_ranks`."""

import itertools
import os
from pathlib import Path
from typing import Any

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.train import loop, saving
from clipkit.train.catalogue import debug

PLACES: dict[str, tuple[Any, str]] = {
    "step": (loop, "train_step"),
    "copy": (saving, "copy"),
    "write": (checkpoint, "write_tensors"),
    "shards": (checkpoint, "write_shards"),
    "prune": (checkpoint, "prune"),
}


def train_until(
    data: Path,
    run: Path,
    settings: tuple[str, ...],
    place: str = "step",
    count: int = 0,
    rank: int = 0,
    number: int = 0,
) -> None:
    """Begin a run or go on with it. The `count`th time at `place`, `rank` sends the signal `number` to itself."""
    owner, name = PLACES[place]
    real, times = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(times) == count and os.environ["RANK"] == str(rank):
            if place == "write":
                arguments[0].write_bytes(b"torn")
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    setattr(owner, name, call)
    recipe = set_values(debug(), ["cadence.checkpoint_samples=32", *settings])
    # What is killed and what goes on have different numbers of workers.
    loop.train(recipe, data, run, device_name="cpu", workers=2 if number else 1, resume=True)
