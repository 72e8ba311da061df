"""A run with the global contrastive loss: its normalisers go through kills, ranks and stages; bad settings."""

from dataclasses import replace

import pytest
import torch
from ranks import command, run_ranks
from safetensors.torch import load_file

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.device import Device
from clipkit.errors import UserError
from clipkit.log import read_metrics
from clipkit.model.loss import ABSENT
from clipkit.train import checks, loop
from clipkit.train.catalogue import debug
from clipkit.train.checks import check_recipe
from clipkit.train.loop import train
from clipkit.train.sources.open import open_source

CPU = {"device_name": "cpu", "workers": 1}
SETTINGS = ["loss=global_contrastive", "global_contrastive.gamma=0.5", "cadence.checkpoint_samples=48"]
# A batch doesn't divide the dataset: records come again within a batch's distance.
SHORT = [*SETTINGS, "stages.1.warmup_samples=16", "stages.0.samples=128", "stages.1.samples=32"]


@pytest.fixture(scope="module")
def unbroken(pairs_dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken")
    assert train(set_values(debug(), SHORT), pairs_dataset, run, **CPU).finished
    return run


def kept(run, name):
    return load_file(checkpoint.find(run) / f"{name}.safetensors")


def losses(run):
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


@pytest.mark.parametrize("step", [4, 7])
def test_a_killed_run_goes_on_with_its_normalisers(unbroken, pairs_dataset, tmp_path, monkeypatch, step):
    real, taken = loop.train_step, []

    def killing(*arguments):
        taken.append(None)
        if len(taken) > step:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", killing)
    with pytest.raises(KeyboardInterrupt):
        train(set_values(debug(), SHORT), pairs_dataset, tmp_path, **CPU)
    monkeypatch.setattr(loop, "train_step", real)
    train(set_values(debug(), SHORT), pairs_dataset, tmp_path, **CPU, resume=True)
    assert losses(tmp_path) == losses(unbroken)
    for name in ("model", "normalisers"):
        torch.testing.assert_close(kept(tmp_path, name), kept(unbroken, name), atol=0, rtol=0)
    log_u_R2 = kept(unbroken, "normalisers")["log_u_R2"]
    assert log_u_R2.shape == (96, 2)
    assert (log_u_R2 > ABSENT / 2).all()  # 160 samples have met all 96 records


def test_two_ranks_in_micro_batches_keep_what_one_keeps(unbroken, pairs_dataset, tmp_path):
    options = [option for setting in (*SHORT, "micro_batch=4") for option in ("--set", setting)]
    where = ["--data", str(pairs_dataset), "--out", str(tmp_path), "--device", "cpu", "--workers", "1"]
    run_ranks(command, "train", "--recipe", "debug", *where, *options)
    assert losses(tmp_path) == pytest.approx(losses(unbroken), abs=2e-5)
    torch.testing.assert_close(kept(tmp_path, "normalisers"), kept(unbroken, "normalisers"), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_without_its_normalisers_is_damaged(unbroken):
    newest = checkpoint.latest(unbroken)
    path = newest / "normalisers.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert "is damaged" in str(checkpoint.damage(newest))
    path.write_bytes(whole)
    assert checkpoint.damage(newest) is None


@pytest.mark.parametrize(
    ("settings", "memory", "problem"),
    [
        (["loss=global_contrastive", "same_caption=positive"], 2**40, "set same_caption=ignore or negative"),
        (["loss=global_contrastive", "global_contrastive.gamma=0"], 2**40, "global_contrastive.gamma is 0"),
        (["loss=global_contrastive", "global_contrastive.eps=0"], 2**40, "global_contrastive.eps is 0"),
        (["global_contrastive.gamma=0.5"], 2**40, "loss=info_nce doesn't use global_contrastive"),
        (["loss=global_contrastive"], 1000, "takes 1.5 kB for 96 records in each process"),
    ],
)
def test_settings_that_mean_nothing(pairs_dataset, monkeypatch, settings, memory, problem):
    monkeypatch.setattr(checks.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else memory)
    source, recipe = open_source(pairs_dataset).source(), set_values(debug(), settings)
    with pytest.raises(UserError, match=problem):
        check_recipe(recipe, source, Device("cpu", torch.device("cpu"), "asked for"))


def test_a_schedule_by_the_length_of_the_run_holds_it(unbroken, pairs_dataset, tmp_path):
    """A stage at a constant rate may be made longer, but not where gamma falls by half of the run."""
    constant = [*SHORT, "stages.1.schedule=constant", "cadence.checkpoint_samples=16"]
    train(set_values(debug(), constant), pairs_dataset, tmp_path, **CPU)
    longer = set_values(debug(), [*constant, "stages.1.samples=48"])
    with pytest.raises(UserError, match="made by another recipe"):
        train(longer, pairs_dataset, tmp_path, **CPU, resume=True)
    # Nor may a further stage be added, by which gamma would go up again.
    recipe = set_values(debug(), constant)
    more = replace(recipe, stages=(*recipe.stages, replace(recipe.stages[1], name="more")))
    changed = {"resume": True, "allow_changes": True}
    with pytest.raises(UserError, match=r"made by another recipe \(global_contrastive\.gamma_samples: 80 -> 96\)"):
        train(more, pairs_dataset, tmp_path, **CPU, **changed)
    assert train(set_values(more, ["global_contrastive.gamma_samples=80"]), pairs_dataset, tmp_path, **CPU, **changed)
