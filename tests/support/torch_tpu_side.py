"""Runs in the environment of torch_tpu, and prints one line of JSON: what clipkit picks there without a chip, and with
one that is only said to be there. No tensor is made on it.
"""

import json
from unittest.mock import patch

import torch
from torch_tpu import _loader

from clipkit.device import pick
from clipkit.errors import UserError


def refusal() -> str:
    """The message of the error on a machine without a TPU."""
    try:
        return str(pick("tpu"))
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    found: dict[str, object] = {"without": refusal()}
    _loader._init_device("tpu")  # as torch_tpu does where it finds a chip
    found["registered"] = str(torch.accelerator.current_accelerator())
    with (
        patch("torch.accelerator.current_accelerator", return_value=torch.device("tpu")),
        patch("torch.tpu.set_device"),
    ):
        device = pick("tpu")
    before = torch.get_float32_matmul_precision()
    with device.loss_products(), device.autocast("auto"):
        found["products"] = [before, torch.get_float32_matmul_precision()]
        found["autocast"] = str(torch.get_autocast_dtype("tpu"))
    found |= {
        "kind": device.kind,
        "device": str(device.torch_device),
        "backend": hasattr(torch.distributed.Backend, "TPU_DIST"),
    }
    found["products_after"] = torch.get_float32_matmul_precision()
    print(json.dumps(found))
