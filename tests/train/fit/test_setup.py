"""Models of which each rank has a part: they learn what one process learns, and go on on any number of ranks."""

import shutil

import pytest
import torch
from ranks import end_ranks, run_ranks
from sharded import STEPS, WAYS, sharded_recipe, take_steps, train_sharded

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.device import Device, pick
from clipkit.errors import UserError
from clipkit.log import read_metrics
from clipkit.model.clip import build
from clipkit.train.catalogue import debug
from clipkit.train.fit.setup import check_setup, is_compiling, is_sharding, set_up
from clipkit.train.recipes import model_at

OWN = [*(f"{name}=none" for name in ("patch_size", "width", "depth", "heads")), "pooling=token", "class_token=true"]
TIMM = [f"model.image.{each}" for each in ("name=resnet18", "position=learnable", *OWN)]


def test_each_way_learns_on_any_number_of_ranks_what_one_process_learns(tmp_path):
    for ranks in (1, 2, 4):
        run_ranks(take_steps, tmp_path, ranks=ranks)
    alone = torch.load(tmp_path / "1 ddp")
    assert len(alone["losses"]) == STEPS and alone["losses"][-1] < alone["losses"][0]
    for ranks in (1, 2, 4):
        for way in WAYS:
            found = torch.load(tmp_path / f"{ranks} {way}")
            assert found["losses"] == pytest.approx(alone["losses"], abs=1e-6), (ranks, way)
            assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4), (ranks, way)
            assert found["gradients"].keys() == alone["gradients"].keys()
            for name, gradient in alone["gradients"].items():
                torch.testing.assert_close(
                    found["gradients"][name], gradient, rtol=0, atol=1e-5, msg=f"{ranks} {way} {name}"
                )


def optimizer_of(folder):
    """The whole of a checkpoint's optimizer state, whoever wrote it."""
    found = checkpoint.load(folder, with_optimizer=True)
    return found.optimizer or checkpoint.read_shards(found.path / checkpoint.SHARDS, {})


def test_a_sharded_run_goes_on_with_another_number_of_ranks(pairs_dataset, tmp_path):
    run_ranks(train_sharded, pairs_dataset, tmp_path / "one", ranks=1)
    run_ranks(train_sharded, pairs_dataset, tmp_path / "two", ranks=2)
    resumed = {"2 to 1": ("two", 1), "2 to 4": ("two", 4), "1 to 2": ("one", 2)}
    for name, (begun, ranks) in resumed.items():
        run = shutil.copytree(tmp_path / begun, tmp_path / name)
        for later in checkpoint.checkpoints(run)[1:]:
            shutil.rmtree(later)
        run_ranks(train_sharded, pairs_dataset, run, ranks=ranks)
    whole = checkpoint.load(tmp_path / "one", with_optimizer=True)
    (evaluated,) = [line for line in read_metrics(tmp_path / "one") if "grey/feature" in line]
    for run in ("two", *resumed):
        found = checkpoint.load(tmp_path / run, with_optimizer=True)
        pairs = ((found.tensors, whole.tensors), (optimizer_of(found.path), whole.optimizer), (found.ema, whole.ema))
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=f"{run} {name}")
        lines = [line for line in read_metrics(tmp_path / run) if "grey/feature" in line]
        for key in ("grey/feature", "ema/grey/feature"):
            assert lines[-1][key] == pytest.approx(evaluated[key], abs=1e-5)
        assert lines[-1]["grey/ranks"] == lines[-1]["ema/grey/ranks"] == 1  # all ranks evaluate the same weights
        assert lines[-1].keys() == evaluated.keys()

    # Each rank wrote its part, and nothing that would be executed on reading.
    newest = checkpoint.latest(tmp_path / "2 to 4")
    sizes = [path.stat().st_size for path in (newest / checkpoint.SHARDS).iterdir()]
    assert len(sizes) == 4 and max(sizes) < 1.1 * sum(sizes) / 4
    assert {path.suffix for path in newest.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert not (newest / "optimizer.safetensors").exists()

    # It goes on from no checkpoint of which a part is damaged or missing.
    for folder in (newest, checkpoint.checkpoints(tmp_path / "2 to 4")[-2]):
        assert checkpoint.damage(folder) is None
        shard = min((folder / checkpoint.SHARDS).iterdir())
        if folder == newest:
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="has 3 of 4 files of the optimizer's state: take another"):
        checkpoint.load(newest, with_optimizer=True)
    assert len(checkpoint.set_damaged_aside(tmp_path / "2 to 4")) == 2


def test_a_sharded_run_that_breaks_says_where(pairs_dataset, tmp_path):
    """The diagnosis gathers the weights."""
    ended = end_ranks(train_sharded, pairs_dataset, tmp_path, "stages.0.learning_rate=1e30", ranks=2)
    assert all(each.code and "became nan" in each.err for each in ended)
    (path,) = tmp_path.glob("diagnosis-*.json")
    assert '"incomplete"' not in path.read_text()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["optimizer.name=lion"], "shard_weights isn't for optimizer.name=lion"),
        (TIMM, "shard_weights isn't for resnet18: set it to false"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings, says):
    recipe = set_values(debug(), ["shard_weights=true", "stages.0.image_keep=none", *settings])
    with pytest.raises(UserError, match=says):
        check_setup(recipe, recipe.stages[0], pick("cpu"))
    left_open = set_values(recipe, ["shard_weights=auto"])
    check_setup(left_open, recipe.stages[0], pick("cpu"))
    assert not is_sharding(left_open, recipe.stages[0], Device("cpu", torch.device("cpu"), "", 0, 2))


def test_compile_is_not_for_tpus():
    recipe = set_values(debug(), ["compile=true"])
    with pytest.raises(UserError, match="compile isn't for TPUs"):
        check_setup(recipe, recipe.stages[0], Device("xla", torch.device("cpu"), "", mesh=object()))


def test_one_process_shards_nothing_and_a_cpu_compiles_nothing_unasked():
    recipe, device = sharded_recipe(), pick("cpu")
    assert not is_sharding(recipe, recipe.stages[0], device)
    assert not is_compiling(recipe, recipe.stages[0], device)
    model, compiling = build(model_at(recipe, recipe.stages[0])), set_values(recipe, ["compile=true"])
    set_up(model, compiling, recipe.stages[0], device)
    assert model._compiled_call_impl is not None
