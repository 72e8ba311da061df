"""How long saving a checkpoint of L/14 with its optimizer stops the loop: `train.saving` against writing it at once.

The weights and two moments of CLIPA-v2's L/14 in float32, 5 GB. Sleeping stands for the forward and backward pass of a
step of `--step-seconds`, as on a device that computes by itself. The loop is stopped while `save` runs and while the
update waits for the copy. The files go to `--folder`, which must have room for one checkpoint. Figures are seconds.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from clipkit import checkpoint
from clipkit.device import pick
from clipkit.formatting import size_text
from clipkit.model.clip import CLIP
from clipkit.train.catalogue import clipa_l14_datacomp
from clipkit.train.recipes import model_at
from clipkit.train.saving import CheckpointWriter, Parts, bytes_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def l14() -> tuple[torch.optim.Optimizer, Parts]:
    """An optimizer of L/14's weights, and what a checkpoint of them has."""
    recipe = clipa_l14_datacomp()
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in CLIP(model_at(recipe, recipe.stages[0])).named_parameters()}
    weights = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    moments = {f"{slot}/{name}": torch.zeros(shape) for slot in MOMENTS for name, shape in shapes.items()}
    for tensor in (*weights.values(), *moments.values()):
        tensor.data.fill_(1.0)  # so that all pages are there
    optimizer = torch.optim.SGD([weights["text.token_embedding.weight"]], lr=1.0)
    return optimizer, {"tensors": {name: each.detach() for name, each in weights.items()}, "optimizer": moments}


def saved_at_once(parts: Parts, folder: Path) -> float:
    """Copy, write, flush and rename while the loop stands still."""
    start = time.perf_counter()
    tensors, optimizer = ({name: each.clone() for name, each in part.items()} for part in parts.values())
    checkpoint.save(folder, tensors=tensors, optimizer=optimizer, config={}, state={})
    return time.perf_counter() - start


def saved_beside(
    checkpoints: CheckpointWriter, optimizer: torch.optim.Optimizer, parts: Parts, folder: Path, step_seconds: float
) -> tuple[float, float, float]:
    """Seconds in `save`, seconds that the next update waits, and seconds until the checkpoint is on the disk."""
    start = time.perf_counter()
    checkpoints.save(folder, parts, list, config={}, state={})
    returned = time.perf_counter()
    time.sleep(step_seconds)
    before = time.perf_counter()
    optimizer.step()
    after = time.perf_counter()
    checkpoints.wait()
    return returned - start, after - before, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-seconds", type=float, default=5.0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    optimizer, parts = l14()
    print(f"{size_text(bytes_of(parts))}, {torch.get_num_threads()} threads, a step of {options.step_seconds} s")
    with tempfile.TemporaryDirectory(dir=options.folder) as name, CheckpointWriter(pick("cpu")) as checkpoints:
        checkpoints.follow(optimizer, lambda: parts)
        optimizer.step()
        checkpoints.wait()
        for number in range(options.rounds):
            folder = Path(name) / str(number)
            at_once = saved_at_once(parts, folder)
            shutil.rmtree(folder)
            call, update, all_of_it = saved_beside(checkpoints, optimizer, parts, folder, options.step_seconds)
            shutil.rmtree(folder)
            print(
                f"at once: stopped {at_once:.2f}   beside the steps: stopped {call + update:.2f} (save {call:.2f}, "
                f"update {update:.2f}), on the disk after {all_of_it:.1f}"
            )


if __name__ == "__main__":
    main()
