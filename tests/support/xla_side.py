"""Runs in the environment of torch_xla, and prints one line of JSON: how the trainer reacts there to changing shapes.

python xla_side.py DATA OUT
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from clipkit.device import Device
from clipkit.errors import UserError
from clipkit.train.catalogue import debug
from clipkit.train.loop import train


def train_on_smaller_batches(data: Path, out: Path) -> str:
    """The error of a run whose batches shrink from the sixth on."""
    place, batches = Device.batch, 0

    def shrink(self: Device, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        nonlocal batches
        batches += 1
        return place(self, {name: array[: 8 if batches > 5 else None] for name, array in arrays.items()})

    try:
        with patch.object(Device, "batch", shrink):
            train(debug(), data, out, device_name="tpu", workers=0)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    print(json.dumps({"smaller_batches": train_on_smaller_batches(data, out / "smaller")}))
