"""Checkpoints beside the steps: what is in them, which stay, what stands in the way, and who else is told."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.log import read_metrics
from clipkit.train import loop, saving
from clipkit.train.catalogue import debug
from clipkit.train.loop import train
from clipkit.train.saving import CheckpointWriter, require_common_disk
from clipkit.train.watch.stopwatch import Stopwatch


class Disk(NamedTuple):
    """A disk's state as shutil gives it."""

    free: int


def short(*settings):
    """The first stage alone, of six steps."""
    recipe = set_values(debug(), ["stages.0.samples=96", "stages.0.warmup_samples=0", *settings])
    return replace(recipe, stages=recipe.stages[:1])


def run_short(data, run, *settings, **options):
    return train(short(*settings), data, run, device_name="cpu", workers=0, **options)


# ---- Written beside the steps ----------------------------------------------------------------------------------------


def test_updates_wait_for_the_copy_and_not_for_the_files(tmp_path, monkeypatch):
    weight = torch.nn.Parameter(torch.arange(300_000.0))
    scale = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight, scale], lr=1.0)
    order, may_write = [], threading.Event()
    real_copy, real_write = saving.copy, checkpoint.write_tensors

    def slow_copy(pairs):
        time.sleep(0.1)
        real_copy(pairs)
        order.append("copied")

    def slow_write(path, tensors):
        assert may_write.wait(30)
        real_write(path, tensors)
        order.append("written")

    monkeypatch.setattr(saving, "copy", slow_copy)
    monkeypatch.setattr(checkpoint, "write_tensors", slow_write)

    def parts():
        return {"tensors": {"weight": weight.detach(), "scale": scale.detach()}}

    with CheckpointWriter(pick("cpu")) as checkpoints:
        checkpoints.follow(optimizer, parts)
        optimizer.step()  # without gradients: it changes nothing
        for seen in (1, 2):
            checkpoints.save(tmp_path / str(seen), parts(), list, config={}, state={})
            with torch.no_grad():
                scale += 1  # as a forward pass may
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            order.append("updated")
            may_write.set()
            checkpoints.wait()
            may_write.clear()
    assert order == ["copied", "updated", "written", "copied", "updated", "written"]
    for seen in (1, 2):
        saved = load_file(tmp_path / str(seen) / "model.safetensors")
        assert torch.equal(saved["weight"], torch.arange(300_000.0) - (seen - 1))
        assert saved["scale"] == seen - 1


@pytest.mark.parametrize("place", ["copy", "write_tensors"])
def test_an_error_beside_the_steps_ends_the_run_with_one_line(pairs_dataset, tmp_path, monkeypatch, place):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def step(*arguments):
        taken.append(real(*arguments))
        time.sleep(0.05)
        return taken[-1]

    real, taken = loop.train_step, []
    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(saving if place == "copy" else checkpoint, place, full)
    says = "No space left" if place == "copy" else "the disk is full while writing .*/checkpoints/0+16: free some"
    with pytest.raises((UserError, OSError), match=says):
        run_short(pairs_dataset, tmp_path, "cadence.checkpoint_samples=16")
    assert len(taken) < 6
    assert not list((tmp_path / "checkpoints").glob("*"))


# ---- Which stay ------------------------------------------------------------------------------------------------------


def test_the_best_and_one_every_so_often_stay(pairs_dataset, tmp_path, monkeypatch, capsys):
    """Of checkpoints each 16 samples: the best of a run that is resumed, the first after each 40, and the last."""
    values = iter((0.1, 0.5, 0.2, 0.5, 0.3, 0.1))
    monkeypatch.setattr("clipkit.train.run.evaluate", lambda *_: [("a/top1", next(values)), ("a/top5", 0.9)])
    settings = ["cadence.evaluate_samples=16", "cadence.keep_checkpoints=1", "cadence.keep_best=top1"]
    real = loop.train_step

    def step(*arguments):
        if int((checkpoint.latest(tmp_path) or Path("0")).name) == 48:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    run_short(pairs_dataset, tmp_path, *settings, task=object())
    monkeypatch.setattr(loop, "train_step", real)
    assert run_short(pairs_dataset, tmp_path, *settings, task=object(), resume=True).finished
    assert [int(path.name) for path in checkpoint.checkpoints(tmp_path)] == [32, 96]

    values = iter((5.0, 3.0, 4.0, 2.0, 3.0, 9.0))
    settings = [*settings[:2], "cadence.keep_every_samples=40", "cadence.keep_best=a/image_retrieval_median_rank"]
    ranks = [("a/image_retrieval_median_rank", values), ("a/top1", values)]
    monkeypatch.setattr("clipkit.train.run.evaluate", lambda *_: [(ranks[0][0], next(values)), ("b/top1", 0.0)])
    run_short(pairs_dataset, tmp_path / "ranks", *settings, task=object())
    assert [int(path.name) for path in checkpoint.checkpoints(tmp_path / "ranks")] == [48, 64, 80, 96]
    assert "no best checkpoint" not in capsys.readouterr().err


def test_a_best_by_what_is_not_measured_is_refused_or_said(pairs_dataset, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"cadence\.keep_best is by the evaluations in training: add --eval-data"):
        run_short(pairs_dataset, tmp_path, "cadence.keep_best=top1")
    found = [("a/top1", 0.5), ("b/top1", 0.5), ("ema/a/top1", 0.5)]
    monkeypatch.setattr("clipkit.train.run.evaluate", lambda *_: found)
    run_short(pairs_dataset, tmp_path, "cadence.keep_best=top1", task=object())
    says = "no best checkpoint is kept: cadence.keep_best=top1 doesn't name exactly one of a/top1, b/top1, ema/a/top1"
    assert says in capsys.readouterr().err


def test_the_first_checkpoint_after_each_multiple_stays(tmp_path):
    for seen in (30, 39, 41, 60, 79, 80, 110, 121, 130):
        checkpoint.folder_of(tmp_path, seen).mkdir(parents=True)
    checkpoint.prune(tmp_path, 1, frozenset({60}), every=40)
    assert [int(path.name) for path in checkpoint.checkpoints(tmp_path)] == [41, 60, 80, 121, 130]


# ---- Too little space ------------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_it_is_needed(pairs_dataset, tmp_path, monkeypatch, capsys):
    """Before the first step; and after one checkpoint for the next, which ends the run if nobody makes room."""
    whole = tmp_path / "whole"
    run_short(pairs_dataset, whole)
    tensors = [load_file(path) for path in checkpoint.latest(whole).glob("*.safetensors")]
    needed = sum(each.nbytes for part in tensors for name, each in part.items() if "step/" not in name)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: Disk(needed - 1))
    says = rf"too little space in {re.escape(str(tmp_path))}/run/checkpoints: the next checkpoint needs [\d.]+ MB, and "
    with monkeypatch.context() as patch, pytest.raises(UserError, match=says):
        patch.setattr(loop, "train_step", None)
        run_short(pairs_dataset, tmp_path / "run")
    free = iter((needed, needed + 10_000, 0, 0))
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: Disk(next(free)))
    with pytest.raises(UserError, match=says + "0 B are free: free some space, and go on with --resume"):
        run_short(pairs_dataset, tmp_path / "run", "cadence.checkpoint_samples=32")
    assert [int(path.name) for path in checkpoint.checkpoints(tmp_path / "run")] == [32]
    assert re.search(f"Warning: {says}", capsys.readouterr().err)


# ---- Several ranks ---------------------------------------------------------------------------------------------------


def test_waiting_for_data_is_that_of_all_ranks():
    class Ranks:
        def gather(self, share):
            return [share, 0.5, 0.1]

    assert Stopwatch().waiting_shares(Ranks()) == {"data_wait": pytest.approx(0.2), "data_wait_max": 0.5}


def test_ranks_that_write_parts_must_share_a_disk(tmp_path):
    class Ranks:
        is_first = True

        def __init__(self, is_alone):
            self.is_alone = is_alone

        def on_first(self, work):
            return work()

        def agree(self, missing):
            return [missing or self.is_alone]

    require_common_disk(tmp_path / "checkpoints", Ranks(False))
    says = "some don't see rank 0's .*/checkpoints: give all ranks an --out on a disk that they share, or set"
    with pytest.raises(UserError, match=says):
        require_common_disk(tmp_path / "checkpoints", Ranks(True))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_killed_launcher_leaves_no_rank_behind(pairs_dataset, tmp_path):
    """torchrun is killed by the kernel: its ranks save a checkpoint and end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clipkit"]
    options = ["train", "--data", str(pairs_dataset), "--recipe", "debug", "--out", str(tmp_path / "run")]
    options += ["--device", "cpu", "--workers", "1", "--set", "stages.0.samples=1600000"]
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen([*torchrun, *options], stdout=output, stderr=output)
        while not read_metrics(tmp_path / "run"):
            assert launcher.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        launcher.kill()
        launcher.wait()
    assert len(children) == 2
    deadline = time.monotonic() + 60
    while alive := [each for each in children if Path(f"/proc/{each}").exists() and not is_zombie(each)]:
        assert time.monotonic() < deadline, f"{alive} live on: {(tmp_path / 'output').read_text()}"
        time.sleep(0.05)
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None and checkpoint.damage(newest) is None
    assert int(newest.name) >= read_metrics(tmp_path / "run")[0]["samples_seen"]


def is_zombie(process: str) -> bool:
    """Whether a process has ended, and only its parent doesn't know yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
