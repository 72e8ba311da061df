"""One host of a TPU pod that isn't there, in the environment of torch_xla: a run as `clipkit train` makes it.

python pod_side.py HOST PORT DATA OUT

XLA on the CPU can't join processes. So each of the two has both chips of the pod, believes that one of them is its own,
and gets the other's rows as it sends its own, which the TPUs' runtime would do. All else is as on a pod.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from xla_side import emoji_task, small

from clipkit.device import Device
from clipkit.train.loop import train
from clipkit.train.recipes import Recipe

HOSTS = 2
CHIPS = ("CPU:1", "CPU:0")  # by host: not in the order of their numbers


def pod_recipe() -> Recipe:
    """Three steps."""
    return replace(small(), stages=(replace(small().stages[1], samples=48, warmup_samples=16),))


def main(host: int, port: str, data: Path, out: Path) -> None:
    """Train and evaluate. The first host leaves the ids of all rows in `ids.npy`, in the order of the mesh."""
    import torch_xla
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    sent: list[np.ndarray] = []

    def send(device: Device, tensor: torch.Tensor) -> torch.Tensor:
        assert device.mesh.device_ids.tolist() == [1, 0]
        rows = torch.cat(device.gather(tensor))
        if tensor.dtype == torch.int32:
            sent.append(rows.numpy())
        placed = rows.to(device.torch_device)
        xs.mark_sharding(placed, device.mesh, ("data",) + (None,) * (tensor.dim() - 1))
        return placed

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    images = out / f"images-{host}"
    images.mkdir()
    with (
        patch.object(xr, "process_index", lambda: host),
        patch.object(xr, "process_count", lambda: HOSTS),
        patch.object(torch_xla._XLAC, "_xla_get_runtime_devices", lambda: [CHIPS[host]]),
        patch.object(Device, "send", send),
    ):
        summary = train(pod_recipe(), data, out / "run", device_name="tpu", workers=0, task=emoji_task(images))
    assert summary.finished and summary.is_first == (host == 0)
    if summary.is_first:
        np.save(out / "ids.npy", np.stack(sent[:3]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
