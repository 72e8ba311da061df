"""The training loop: what a run leaves, killing it anywhere, and that ranks and micro-batches change nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from random import Random

import pyarrow as pa
import pytest
import torch
from colour_pairs import pairs, write_tar
from killed_runs import train_until
from ranks import command, end_ranks, run_ranks
from safetensors.torch import load_file, save_file

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.device import Device
from clipkit.errors import UserError
from clipkit.log import read_metrics
from clipkit.model.clip import build
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.train import loop
from clipkit.train.catalogue import debug
from clipkit.train.loop import train
from clipkit.train.recipes import model_at
from clipkit.train.run import is_due
from clipkit.train.stopping import SIGNALS


def weights(run):
    return load_file(checkpoint.find(run) / "model.safetensors")


def losses(run):
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def assert_same_weights(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def unbroken(pairs_dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken")
    summary = train(debug(), pairs_dataset, run, device_name="cpu", workers=1)
    assert summary.finished
    return run


def test_a_run_leaves_metrics_checkpoints_and_what_it_was(unbroken, pairs_dataset):
    metrics = read_metrics(unbroken)
    assert [line["samples_seen"] for line in metrics] == list(range(16, 321, 16))
    assert [line["stage"] for line in metrics] == ["reduced"] * 12 + ["full"] * 8
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(0 <= line["data_wait"] <= 1 and line["samples_per_s"] > 0 for line in metrics)
    assert [line["seconds"] for line in metrics] == sorted(line["seconds"] for line in metrics)
    config = json.loads((unbroken / "config.json").read_text())
    assert config["recipe"]["name"] == "debug"
    assert config["data"] == str(pairs_dataset)
    assert config["dataset"] == {"name": "colours", "split": "train", "records": 96}
    # The two newest, and the end of the first stage.
    assert [int(path.name) for path in checkpoint.checkpoints(unbroken)] == [192, 256, 320]
    last = checkpoint.load(unbroken)
    assert (last.model_config.image.image_size, last.model_config.text.context_length) == (48, 16)
    assert last.preprocess.size == 48


def test_the_schedule_is_in_samples(unbroken):
    rates = [line["lr"] for line in read_metrics(unbroken)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[12:16] == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4])


class KilledError(Exception):
    """Stands for SIGKILL: nothing that the loop could do happens after it."""


@pytest.mark.parametrize("step", [3, 6, 12, 13, 18])
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(unbroken, pairs_dataset, tmp_path, monkeypatch, step):
    real, taken = loop.train_step, []

    def killing(*arguments):
        if len(taken) == step:
            raise KilledError
        taken.append(None)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", killing)
    with pytest.raises(KilledError):
        train(debug(), pairs_dataset, tmp_path, device_name="cpu", workers=1)
    monkeypatch.setattr(loop, "train_step", real)
    workers = 2 if step == 13 else 1  # those of the killed run are in its process, and two are processes
    train(debug(), pairs_dataset, tmp_path, device_name="cpu", resume=True, workers=workers)
    assert_same_weights(tmp_path, unbroken)
    assert losses(tmp_path) == losses(unbroken)


KILL, TERM = signal.SIGKILL, signal.SIGTERM
ON_ONE = [("write", KILL), ("copy", KILL), ("write", TERM), ("prune", KILL)]
ON_TWO = [("write", KILL), ("step", TERM), ("step", KILL)]
ON_SHARDED = [("shards", KILL), ("step", TERM)]
SHORT = ("stages.0.samples=96", "stages.1.samples=64")


@pytest.mark.parametrize(
    ("ranks", "signals", "settings"),
    [(1, ON_ONE, ()), (2, ON_TWO, SHORT), (2, ON_SHARDED, ("shard_weights=true", *SHORT))],
    ids=["one rank", "two ranks", "two ranks, sharded"],
)
def test_real_signals_lose_nothing(unbroken, pairs_dataset, tmp_path, ranks, signals, settings):
    """The kernel kills a rank at a random step, or while a checkpoint is copied or written beside one."""
    random = Random(ranks + len(settings))
    for place, number in signals:
        rank = random.randrange(ranks) if place in ("step", "shards") else 0
        count = random.randint(1, 3)
        ended = end_ranks(train_until, pairs_dataset, tmp_path, settings, place, count, rank, number, ranks=ranks)
        assert number == signal.SIGTERM or ended[rank].code == -number, ended
        newest = checkpoint.latest(tmp_path)
        samples = set_values(debug(), settings).samples
        assert newest is None or (checkpoint.damage(newest) is None and int(newest.name) < samples)
    run_ranks(train_until, pairs_dataset, tmp_path, settings, ranks=ranks)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    if ranks == 2:
        unbroken = tmp_path / "unbroken"
        run_ranks(train_until, pairs_dataset, unbroken, settings, ranks=ranks)
    assert losses(tmp_path) == losses(unbroken)
    assert_same_weights(tmp_path, unbroken)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_the_run_goes_on_from_there(unbroken, pairs_dataset, tmp_path, monkeypatch, number):
    real, taken = loop.train_step, []

    def step(*arguments):
        taken.append(None)
        if len(taken) == 5:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    stopped = train(debug(), pairs_dataset, tmp_path, device_name="cpu", workers=1)
    assert (stopped.finished, stopped.samples_seen, stopped.signal) == (False, 5 * 16, number)
    assert checkpoint.load(tmp_path).samples_seen == 5 * 16
    train(debug(), pairs_dataset, tmp_path, device_name="cpu", resume=True, workers=1)
    assert_same_weights(tmp_path, unbroken)


def test_a_finished_run_resumes_to_nothing(unbroken, pairs_dataset):
    before = weights(unbroken)
    summary = train(debug(), pairs_dataset, unbroken, device_name="cpu", resume=True, workers=1)
    assert summary.finished
    assert all(torch.equal(value, before[name]) for name, value in weights(unbroken).items())


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_removes_nothing_of_the_users(
    unbroken, pairs_dataset, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    newest = checkpoint.latest(run)
    before = checkpoint.checkpoints(run)[-2]
    with (newest / "optimizer.safetensors").open("r+b") as file:
        file.truncate(5000)
    shutil.copytree(before, run / "checkpoints" / ".best")
    (run / "checkpoints" / f".{newest.name}.123000000000000").mkdir()  # what a killed run was writing
    summary = train(debug(), pairs_dataset, run, device_name="cpu", resume=True, workers=1)
    assert summary.finished
    assert f"checkpoint {newest} is damaged" in capsys.readouterr().err
    assert_same_weights(run, unbroken)
    assert sorted(path.name for path in (run / "checkpoints").glob(".*")) == [".best"]


def test_none_turns_clipping_off(pairs_dataset, tmp_path):
    """As no norm is above 1e30, clipping at it changes nothing either."""
    for name, clip in (("none", "none"), ("far", "1e30")):
        recipe = set_values(debug(), [f"optimizer.grad_clip={clip}"])
        train(recipe, pairs_dataset, tmp_path / name, device_name="cpu", workers=1)
    assert_same_weights(tmp_path / "none", tmp_path / "far")


def test_micro_batches_change_nothing_but_memory(unbroken, pairs_dataset, tmp_path):
    recipe = set_values(debug(), ["micro_batch=4"])
    train(recipe, pairs_dataset, tmp_path, device_name="cpu", workers=1)
    assert losses(tmp_path) == pytest.approx(losses(unbroken), abs=2e-5)


def test_two_ranks_learn_what_one_learns(unbroken, pairs_dataset, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clipkit"]
    options = ["train", "--data", str(pairs_dataset), "--recipe", "debug", "--out", str(tmp_path), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *options, "--workers", "1"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(losses(unbroken), abs=2e-5)


def test_stages_of_other_reductions_learn_the_same_on_two_ranks_without_padding(pairs_dataset, tmp_path, monkeypatch):
    """The second stage leaves padding out, each rank that of its own captions, in micro-batches; the first can't."""
    settings = ["micro_batch=4", "stages.0.image_reduction=grid", "stages.0.image_keep=4", "stages.1.image_keep=12"]
    settings += ["stages.0.text_reduction=block", "stages.1.image_reduction=block", "stages.1.text_reduction=syntax"]
    settings += ["stages.1.context_length=24", "stages.0.samples=32", "stages.1.samples=64"]
    settings += ["stages.0.warmup_samples=16"]
    real, lengths = loop.train_step, []

    def step(model, optimizer, batch, *others):
        lengths.append(batch.get("length_B"))
        return real(model, optimizer, batch, *others)

    monkeypatch.setattr(loop, "train_step", step)
    train(set_values(debug(), settings), pairs_dataset, tmp_path / "one", device_name="cpu", workers=1)
    assert [length_B is not None for length_B in lengths] == [False] * 2 + [True] * 4
    assert max(length_B.max() for length_B in lengths[2:]) < 20
    arguments = ["train", "--data", str(pairs_dataset), "--recipe", "debug", "--out", str(tmp_path / "two")]
    arguments += ["--device", "cpu", "--workers", "1", *(f"--set={setting}" for setting in settings)]
    run_ranks(command, *arguments)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)


def test_a_device_of_static_shapes_computes_padding(pairs_dataset, tmp_path, monkeypatch):
    settings = ["stages.0.context_length=24", "stages.0.samples=32", "stages.0.warmup_samples=0"]
    recipe = set_values(debug(), settings)
    recipe = replace(recipe, stages=recipe.stages[:1])
    train(recipe, pairs_dataset, tmp_path / "real", device_name="cpu", workers=1)
    monkeypatch.setattr(Device, "static_shapes", True)
    monkeypatch.setattr("clipkit.train.step.length_buckets", None)
    train(recipe, pairs_dataset, tmp_path / "padded", device_name="cpu", workers=1)
    assert losses(tmp_path / "padded") == pytest.approx(losses(tmp_path / "real"), abs=2e-5)


def test_the_sigmoid_loss_trains(pairs_dataset, tmp_path):
    recipe = set_values(debug(), ["loss=sigmoid", "model.logit_scale_init=10", "model.logit_bias_init=-10"])
    train(recipe, pairs_dataset, tmp_path, device_name="cpu", workers=1)
    found = losses(tmp_path)
    assert found[-1] < found[0]


def test_weights_of_another_run_are_a_beginning(unbroken, pairs_dataset, tmp_path):
    recipe = replace(debug(), stages=debug().stages[:1])
    train(recipe, pairs_dataset, tmp_path, device_name="cpu", init=unbroken, workers=1)
    assert losses(tmp_path)[0] != pytest.approx(losses(unbroken)[0], abs=1e-3)


def test_a_run_is_not_overwritten_by_mistake(unbroken, pairs_dataset):
    with pytest.raises(UserError, match="holds a run of 320 samples: add --resume"):
        train(debug(), pairs_dataset, unbroken, device_name="cpu")


def test_another_recipe_is_not_resumed(unbroken, pairs_dataset):
    other = set_values(debug(), ["seed=1", "stages.0.learning_rate=1"])
    with pytest.raises(UserError, match=re.escape("another recipe (seed: 0 -> 1 and 1 more)")):
        train(other, pairs_dataset, unbroken, device_name="cpu", resume=True)


def test_another_dataset_is_not_resumed(unbroken, tmp_path):
    """The order of the data depends on their number: a dataset that was built again is another one."""
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "00000.tar", pairs(90))
    other = build_tfds(tmp_path / "shards", tmp_path / "data", "colours").path
    with pytest.raises(UserError, match=re.escape("another dataset (records: 96 -> 90)")):
        train(debug(), other, unbroken, device_name="cpu", resume=True)


def test_an_evaluation_is_never_lost_to_a_kill(pairs_dataset, tmp_path, monkeypatch):
    """Killed in an evaluation, a run that goes on from the checkpoint that was saved before makes it again."""
    taken = []

    def evaluation(encoder, *_):
        assert encoder.precision == "float32"
        taken.append(None)
        if len(taken) == 2:
            raise KilledError
        yield "colours/top1", 0.5

    monkeypatch.setattr("clipkit.train.run.evaluate", evaluation)
    recipe = set_values(debug(), ["cadence.evaluate_samples=64"])
    with pytest.raises(KilledError):
        train(recipe, pairs_dataset, tmp_path, device_name="cpu", workers=1, task=object())
    train(recipe, pairs_dataset, tmp_path, device_name="cpu", workers=1, task=object(), resume=True)
    evaluated = [line["samples_seen"] for line in read_metrics(tmp_path) if "colours/top1" in line]
    assert evaluated == [64, 128, 192, 256, 320]


@pytest.mark.parametrize(("number", "place"), list(zip(SIGNALS, (1, 2, 3, 5), strict=True)))
def test_an_evaluation_is_interrupted_and_made_again(pairs_dataset, unbroken, tmp_path, monkeypatch, number, place):
    taken = []

    def evaluation(*_):
        taken.append(None)
        if len(taken) == place:
            os.kill(os.getpid(), number)
            time.sleep(60)
        yield "colours/top1", 0.5

    monkeypatch.setattr("clipkit.train.run.evaluate", evaluation)
    recipe = set_values(debug(), ["cadence.evaluate_samples=64", "cadence.checkpoint_samples=1000000"])
    options = {"device_name": "cpu", "workers": 1, "task": object()}
    began = time.monotonic()
    stopped = train(recipe, pairs_dataset, tmp_path, **options)
    assert time.monotonic() - began < 30
    assert (stopped.finished, stopped.samples_seen, stopped.signal) == (False, 64 * place, number)
    assert checkpoint.load(tmp_path).samples_seen == 64 * place
    assert train(recipe, pairs_dataset, tmp_path, **options, resume=True).finished
    evaluated = [line["samples_seen"] for line in read_metrics(tmp_path) if "colours/top1" in line]
    assert evaluated == [64, 128, 192, 256, 320]
    assert_same_weights(tmp_path, unbroken)


@pytest.mark.parametrize(
    "error",
    [
        UserError("4 of 52 images can't be read"),
        FileNotFoundError(2, "No such file", "set"),
        pa.ArrowInvalid("cut"),
        torch.OutOfMemoryError("no memory"),
        MemoryError(),
        KeyError("image"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_evaluation_that_fails_is_reported_and_costs_nothing(
    pairs_dataset, unbroken, tmp_path, monkeypatch, capsys, error
):
    seen = []

    def evaluation(*_):
        seen.append(int(checkpoint.latest(tmp_path).name))
        if len(seen) == 2:
            raise error
        yield "colours/top1", 0.5

    monkeypatch.setattr("clipkit.train.run.evaluate", evaluation)
    recipe = set_values(debug(), ["cadence.evaluate_samples=80", "cadence.checkpoint_samples=1000000"])
    summary = train(recipe, pairs_dataset, tmp_path, device_name="cpu", workers=1, task=object())
    assert summary.finished
    assert seen == [80, 160, 192, 240, 320]  # saved before each of them
    assert_same_weights(tmp_path, unbroken)
    (line,) = [line for line in read_metrics(tmp_path) if "evaluation_error" in line]
    assert (line["samples_seen"], line["stage"]) == (160, "reduced")
    warning = f"Warning: no evaluation at 160 samples, training goes on: {line['evaluation_error']}"
    assert warning in capsys.readouterr().err.splitlines()


def test_an_evaluation_is_asked_for_of_a_run_that_had_none(pairs_dataset, unbroken, tmp_path, monkeypatch):
    """A run that is finished, but for the evaluation at its end, evaluates and doesn't train."""
    run = shutil.copytree(unbroken, tmp_path / "run")
    monkeypatch.setattr("clipkit.train.run.evaluate", lambda *_: [("colours/top1", 0.5)])
    monkeypatch.setattr(loop, "train_step", None)
    for _ in range(2):
        assert train(debug(), pairs_dataset, run, device_name="cpu", workers=1, task=object(), resume=True).finished
    assert [line["samples_seen"] for line in read_metrics(run) if "colours/top1" in line] == [320]


def test_weights_that_a_step_ruined_are_not_saved(pairs_dataset, tmp_path, monkeypatch):
    """The loss was still a number, and the gradient was none."""
    real = loop.train_step

    def ruined(*arguments):
        step = real(*arguments)
        return step._replace(grad_norm=step.grad_norm * float("nan"))

    monkeypatch.setattr(loop, "train_step", ruined)
    with pytest.raises(UserError, match="the loss or its gradient isn't finite"):
        train(debug(), pairs_dataset, tmp_path, device_name="cpu", workers=1)
    assert checkpoint.latest(tmp_path) is None


def test_activations_computed_again_change_nothing(unbroken, pairs_dataset, tmp_path):
    recipe = set_values(debug(), ["checkpoint_activations=true"])
    train(recipe, pairs_dataset, tmp_path, device_name="cpu", workers=1)
    assert losses(tmp_path) == pytest.approx(losses(unbroken), abs=2e-5)


def test_a_loss_that_is_no_number_stops_the_run(pairs_dataset, tmp_path):
    recipe = set_values(debug(), ["stages.0.learning_rate=1e30", "optimizer.grad_clip=1e30"])
    says = r"(the loss became \w+|no number) before [\d,]+ samples: begin .* a lower learning rate"
    with pytest.raises(UserError, match=says):
        train(recipe, pairs_dataset, tmp_path, device_name="cpu", workers=1)


@pytest.mark.parametrize(
    ("every", "before", "now", "due"),
    [(None, 0, 10, False), (10, 0, 9, False), (10, 0, 10, True), (10, 10, 19, False), (10, 19, 41, True)],
)
def test_something_is_due_when_a_multiple_was_passed(every, before, now, due):
    assert is_due(every, before, now) is due


@pytest.mark.parametrize("micro_batch", ["none", "4"])
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_frozen_tower_stays_as_it_was(pairs_dataset, tmp_path, side, micro_batch):
    """Locked-image tuning (Zhai et al., 2022): the other tower learns to read it."""
    settings = [f"model.{side}.frozen=true", f"micro_batch={micro_batch}", "stages.0.image_size=48"]
    settings += ["stages.0.context_length=16", "stages.0.image_keep=30"]
    recipe = set_values(debug(), settings)
    before = build(model_at(recipe, recipe.stages[0]), seed=recipe.seed).state_dict()
    with pytest.raises(UserError, match=f"a frozen tower with random weights: give the {side} tower's"):
        train(recipe, pairs_dataset, tmp_path / "run", device_name="cpu", workers=0)
    save_file(before, tmp_path / "init.safetensors")
    init = tmp_path / "init.safetensors"
    train(recipe, pairs_dataset, tmp_path / "run", device_name="cpu", workers=0, init=init)
    after = checkpoint.load(tmp_path / "run").tensors
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert side not in moved and f"{side}_projection" not in moved
    assert {"image", "text"} - {side} < moved


def test_nothing_to_train_is_refused(pairs_dataset, tmp_path):
    recipe = set_values(debug(), ["model.image.frozen=true", "model.text.frozen=true"])
    with pytest.raises(UserError, match="frozen"):
        train(recipe, pairs_dataset, tmp_path / "run", device_name="cpu", workers=0)
