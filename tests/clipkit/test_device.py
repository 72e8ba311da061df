import resource
import sys

import numpy as np
import pytest
import torch

from clipkit.device import Device, pick
from clipkit.errors import UserError


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="choose from auto, cpu, gpu, tpu"):
        pick("cuda:0")


def test_a_device_that_is_not_here_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"no GPU: .*use --device cpu"):
        pick("gpu")


def test_without_torch_xla_the_tpu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(UserError, match=r"pip install 'clipkit\[tpu\]'"):
        pick("tpu")


def test_the_cpu_computes_in_float32_and_says_why_it_was_taken():
    device = pick("cpu")
    assert (device.kind, device.world, device.is_first, device.shards) == ("cpu", 1, True, 1)
    assert device.arithmetic("auto") == "float32"
    assert device.why == "asked for"
    with device.autocast("bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with device.autocast("auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["xla", "tpu"])
def test_a_tpus_memory_and_peak_are_those_of_its_data_sheet(monkeypatch, kind):
    device = Device(kind, torch.device("cpu"), "made up", world=8)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    assert (device.memory(), device.peak_flops()) == (16e9, 8 * 197e12)
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
    assert (device.memory(), device.peak_flops(), pick("cpu").memory()) == (None, None, None)


def test_a_host_batch_arrives_unchanged():
    arrays = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.array([1, 2])}
    batch = pick("cpu").batch(arrays)
    assert all(np.array_equal(batch[name].numpy(), arrays[name]) for name in arrays)


def test_the_learning_rate_reaches_every_group():
    device, parameter = pick("cpu"), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([{"params": [parameter]}], **device.optimizer_options(1.0))
    device.set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_memory_is_counted_in_bytes():
    assert 1 << 27 < pick("cpu").peak_memory() < 1 << 40


def test_memory_that_a_step_frees_is_kept_for_the_next():
    def faults() -> int:
        """Of four blocks of 64 MB, each of 16,000 pages."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(16_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pick("cpu")
    warm_up = [faults() for _ in range(4)]
    assert faults() < 4_000, warm_up
