"""The averages of the weights: what they are, that a run keeps them through stages and kills, and who reads them."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from openclip_twin import TINY
from safetensors.torch import load_file

from clipkit import checkpoint, embedded
from clipkit.cli.main import main
from clipkit.config import set_values
from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.log import read_metrics
from clipkit.model.clip import build
from clipkit.train import loop
from clipkit.train.catalogue import debug
from clipkit.train.loop import train
from clipkit.train.optimizer import copy_for_average, keep_average, make_optimizer
from clipkit.train.recipes import OptimizerConfig, model_at

CPU = {"device_name": "cpu", "workers": 1}
KEPT = ["ema_decay=0.9", "cadence.checkpoint_samples=16", "cadence.keep_checkpoints=99"]


def evaluation(encoder, *_):
    yield "colours/top1", encoder.model.logit_scale.item()


@pytest.fixture(scope="module")
def whole(pairs_dataset, tmp_path_factory):
    """A finished run that evaluated at the end of each stage, with a checkpoint after each step."""
    run = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipkit.train.run.evaluate", evaluation)
        assert train(set_values(debug(), KEPT), pairs_dataset, run, **CPU, task=object()).finished
    return run


@pytest.fixture(scope="module")
def emoji_labels(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "emoji.parquet"
    pq.write_table(pq.read_table(embedded.emoji_parquet("heldout")).slice(0, 16), path)
    return path


def averages(path):
    return load_file(checkpoint.find(path) / "ema.safetensors")


@pytest.mark.parametrize("name", ["adamw", "stable_adamw", "lion", "muon"])
def test_averages_follow_each_step_and_share_what_is_frozen(name):
    model = build(TINY)
    model.text.requires_grad_(False)
    optimizer = make_optimizer(model, OptimizerConfig(name=name), 1e-2, pick("cpu"))
    average = copy_for_average(model)
    keep_average(average, model, optimizer, 0.9)
    expected = {name: each.detach().double() for name, each in model.named_parameters()}
    for _ in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        for name, each in model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * each.detach().double()
    for name, each in average.named_parameters():
        torch.testing.assert_close(each.double(), expected[name], atol=1e-6, rtol=0)
        assert not each.requires_grad
        assert (each is dict(model.named_parameters())[name]) == name.startswith("text.")


def test_averages_go_on_in_the_next_stage(whole):
    recipe = debug()
    weights = build(model_at(recipe, recipe.stages[0]), seed=recipe.seed).state_dict()
    expected = {name: tensor.double() for name, tensor in weights.items() if "pos_embed" not in name}
    for path in checkpoint.checkpoints(whole):
        now = load_file(path / "model.safetensors")
        expected = {name: 0.9 * before + 0.1 * now[name].double() for name, before in expected.items()}
        kept = averages(path)
        for name, tensor in expected.items():
            torch.testing.assert_close(kept[name].double(), tensor, atol=1e-6, rtol=0)
    assert now["image.trunk.pos_embed"].shape == kept["image.trunk.pos_embed"].shape


@pytest.mark.parametrize("samples", [128, 192, 256])
def test_a_resumed_run_keeps_the_averages_bit_for_bit(whole, pairs_dataset, tmp_path, samples):
    run = shutil.copytree(whole, tmp_path / "run")
    for path in checkpoint.checkpoints(run)[samples // 16 :]:
        shutil.rmtree(path)
    assert train(set_values(debug(), KEPT), pairs_dataset, run, **CPU, resume=True).finished
    for name, tensor in averages(whole).items():
        assert torch.equal(averages(run)[name], tensor)


def test_averages_are_evaluated_beside_the_weights(whole, pairs_dataset, tmp_path, monkeypatch):
    lines = [line for line in read_metrics(whole) if "colours/top1" in line]
    assert [line["samples_seen"] for line in lines] == [192, 320]
    assert lines[-1]["colours/top1"] == checkpoint.load(whole).tensors["logit_scale"].item()
    assert lines[-1]["ema/colours/top1"] == averages(whole)["logit_scale"].item()
    # The same, where only the evaluation is missing.
    run = shutil.copytree(whole, tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in metrics if "colours" not in line))
    monkeypatch.setattr("clipkit.train.run.evaluate", evaluation)
    monkeypatch.setattr(loop, "train_step", None)
    assert train(set_values(debug(), KEPT), pairs_dataset, run, **CPU, task=object(), resume=True).finished
    assert [line for line in read_metrics(run) if "colours/top1" in line] == lines[-1:]


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_checkpoint_with_damaged_averages_is_set_aside(whole, tmp_path, damage):
    run = shutil.copytree(whole, tmp_path / "run")
    path = checkpoint.latest(run) / "ema.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"checkpoint file .*ema\.safetensors"):
        checkpoint.load(run, ema=True)
    (note,) = checkpoint.set_damaged_aside(run)
    assert "is damaged" in note
    assert checkpoint.latest(run).name == f"{304:012d}"


def test_a_run_begins_with_the_weights_of_another_not_its_averages(whole, pairs_dataset, tmp_path):
    recipe = set_values(debug(), [*KEPT, "stages.0.learning_rate=1e-30"])
    train(recipe, pairs_dataset, tmp_path, **CPU, init=whole)
    first = checkpoint.checkpoints(tmp_path)[0]
    theirs = checkpoint.load(whole).tensors["logit_scale"]
    assert averages(first)["logit_scale"].item() == pytest.approx(theirs.item(), abs=1e-6)


def test_averages_of_a_run_that_kept_none_are_refused(pairs_dataset, tmp_path, emoji_labels):
    train(debug(), pairs_dataset, tmp_path / "run", **CPU)
    command = ["zeroshot", "--ckpt", str(tmp_path / "run"), "--data", str(emoji_labels), "--ema"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "has no averages of its weights (its recipe has no ema_decay): omit --ema" in line


def test_zeroshot_of_the_averages_is_another_task(whole, emoji_labels, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    command = ["zeroshot", "--ckpt", str(run), "--data", str(emoji_labels), "--templates", "plain", "--device", "cpu"]
    for more in ([], ["--ema"]):
        result = CliRunner().invoke(main, [*command, *more])
        assert result.exit_code == 0, result.output
    tasks = {line["task"] for line in map(json.loads, (run / "results.jsonl").read_text().splitlines())}
    assert len(tasks) == 2
    assert {f"ema/{task}" for task in tasks if not task.startswith("ema/")} <= tasks
    assert len(list(run.glob("predictions-*.parquet"))) == 2
