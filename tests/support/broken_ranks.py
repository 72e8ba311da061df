"""A run on several ranks of which the last one gets a batch that breaks it, for `ranks.run_ranks`."""

import math
from pathlib import Path

from clipkit.config import set_values
from clipkit.errors import UserError
from clipkit.train import loop
from clipkit.train.catalogue import debug


def train_with_a_broken_batch(data: Path, run: Path, policy: str) -> None:
    """Train on pixels that aren't numbers at 80 samples; prints the error that stops the run, if one does."""
    real, skipped, place = loop.train_step, loop.is_skipped, []

    def is_skipped(run, before):
        place[:] = [before]
        return skipped(run, before)

    def step(model, optimizer, batch, recipe, device, teachers):
        if place == [80] and device.rank == 1:
            batch["image_BHWC"] = batch["image_BHWC"].float() * math.nan
        return real(model, optimizer, batch, recipe, device, teachers)

    loop.is_skipped, loop.train_step = is_skipped, step
    settings = ["cadence.log_samples=48", f"on_bad_loss={policy}"]
    try:
        loop.train(set_values(debug(), settings), data, run, device_name="cpu", workers=1)
    except UserError as error:
        print("stopped:", error)
