"""What a log line says: accuracy in the batch, norms by group, speed against the peak; on two ranks as on one."""

import dataclasses
import math

import pytest
import torch
from colour_pairs import pairs, write_tar
from ranks import command, run_ranks

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.device import Device, pick
from clipkit.log import read_metrics
from clipkit.train.catalogue import debug
from clipkit.train.checks import stage_cost
from clipkit.train.loop import train
from clipkit.train.step import Step
from clipkit.train.watch.metrics import batch_accuracy, group_of

CPU = {"device_name": "cpu", "workers": 1}
TIMES = {"samples_per_s", "flops_per_s", "data_wait", "data_wait_max", "seconds", "peak_memory", "equal_captions"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs of which one has a broken image."""
    folder = tmp_path_factory.mktemp("data")
    samples = pairs(48)
    samples[7][1]["jpg"] = samples[7][1]["jpg"][:200]
    write_tar(folder / "00000.tar", samples)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    train(debug(), data, run, **CPU)
    return run


def assert_same_lines(one, other):
    ours, theirs = read_metrics(one), read_metrics(other)
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() - TIMES == expected.keys() - TIMES
        for name in line.keys() - TIMES - {"stage"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=2e-5), name


def test_norms_by_group_make_up_the_whole(run):
    for line in read_metrics(run):
        of_groups = [value for name, value in line.items() if name.startswith("grad_norm_")]
        assert len(of_groups) == 4
        assert math.hypot(*of_groups) == pytest.approx(line["grad_norm"], rel=1e-4)
    tensors = checkpoint.load(run).tensors
    for group in ("image", "text", "embeddings", "projections"):
        of_group = [tensors[name].flatten() for name in tensors if group_of(name) == group]
        assert line[f"weight_norm_{group}"] == pytest.approx(torch.cat(of_group).norm().item(), rel=1e-3)


def test_flops_follow_from_the_rate_and_an_unknown_peak_gives_no_mfu(run):
    cost = {stage.name: stage_cost(debug(), stage).flops for stage in debug().stages}
    for line in read_metrics(run):
        assert line["flops_per_s"] == pytest.approx(line["samples_per_s"] * cost[line["stage"]])
        assert "mfu" not in line


def test_mfu_is_the_share_of_the_peak(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Device, "peak_flops", lambda device: 1e12)
    train(debug(), data, tmp_path, **CPU)
    assert all(line["mfu"] == pytest.approx(line["flops_per_s"] / 1e12) for line in read_metrics(tmp_path))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GB200", 2500),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = dataclasses.replace(pick("cpu"), kind="cuda", world=8)
    assert device.peak_flops() == (None if tflops is None else pytest.approx(8 * tflops * 1e12))


def test_the_peak_of_a_tpu_is_found_by_its_accelerator_type(monkeypatch):
    device = dataclasses.replace(pick("cpu"), kind="xla")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    assert device.peak_flops() == pytest.approx(197e12)
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
    assert device.peak_flops() is None


def step_of(image_BE, text_BE):
    scalar = torch.zeros(())
    return Step(scalar, scalar, scalar, image_BE, text_BE)


def test_a_pair_is_right_when_no_negative_is_nearer():
    text = torch.eye(4)
    image = torch.eye(4)
    image[2] = torch.tensor([0.0, 0.0, 0.6, 0.8])  # nearer to the fourth text than to its own
    captions = torch.tensor([1, 2, 3, 4])
    to_text, to_image = batch_accuracy(step_of(image, text), captions, "ignore", gather=False)
    assert (to_text.item(), to_image.item()) == (0.75, 1.0)
    captions = torch.tensor([1, 2, 3, 3])  # no negatives of each other
    for same_caption in ("ignore", "positive"):
        to_text, _ = batch_accuracy(step_of(image, text), captions, same_caption, gather=False)
        assert to_text.item() == 1.0
    assert batch_accuracy(step_of(image, text), captions, "negative", gather=False)[0].item() == 0.75


def test_equal_features_tell_nothing_apart():
    same = torch.ones(4, 4) / 2
    assert batch_accuracy(step_of(same, same), torch.arange(4), "ignore", gather=False)[0].item() == 0.0


def test_micro_batches_log_the_same(data, run, tmp_path):
    train(set_values(debug(), ["micro_batch=4"]), data, tmp_path, **CPU)
    assert_same_lines(tmp_path, run)


def test_two_ranks_log_what_one_logs_bad_samples_included(data, run, tmp_path):
    arguments = ["train", "--data", str(data), "--recipe", "debug", "--out", str(tmp_path), "--device", "cpu"]
    run_ranks(command, *arguments, "--workers", "1")
    assert_same_lines(tmp_path, run)
    assert read_metrics(run)[-1]["bad_samples"] > 3
