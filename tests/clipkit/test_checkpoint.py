import errno
import json
import os
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from clipkit import checkpoint
from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.model.clip import build
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.pixels.images import Preprocess
from clipkit.train.optimizer import make_optimizer
from clipkit.train.recipes import OptimizerConfig


@dataclass(frozen=True)
class NoRecipe:
    name: str = "none"


SMALL = ModelConfig(
    embed_dim=8,
    image=ImageConfig("vit_tiny_patch16_224", image_size=16, patch_size=8, width=16, depth=1, heads=2),
    text=TextConfig(context_length=8, width=16, depth=1, heads=2),
)
CONFIG = checkpoint.describe(SMALL, Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3), NoRecipe())


def saved(run, samples_seen=32, **changes):
    fields = {
        "tensors": build(SMALL).state_dict(),
        "config": CONFIG,
        "state": {"samples_seen": samples_seen, "stage": "full", "seconds": 1.5, "bad_samples": 0},
        "optimizer": {"exp_avg/x": torch.ones(2)},
    }
    return checkpoint.save(checkpoint.folder_of(run, samples_seen), **(fields | changes))


def test_a_checkpoint_describes_itself(tmp_path):
    path = saved(tmp_path)
    found = checkpoint.load(path, with_optimizer=True)
    assert found.model_config == SMALL
    assert found.preprocess == Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert found.samples_seen == 32
    assert found.optimizer["exp_avg/x"].tolist() == [1.0, 1.0]
    model, again = build(SMALL), checkpoint.build_model(found)
    assert not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_no_pickle_is_written(tmp_path):
    assert {path.suffix for path in saved(tmp_path).iterdir()} == {".safetensors", ".json"}


def test_a_failed_save_leaves_no_checkpoint(tmp_path):
    with pytest.raises(TypeError):
        saved(tmp_path, state={"samples_seen": object()})
    assert checkpoint.latest(tmp_path) is None
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    def full(tensors, path):
        # What safetensors 0.8 raised on a full file system.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"the disk is full while writing .*000000000032: free some space"):
        saved(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_a_rank_writes_of_the_state_is_read_again_and_takes_no_gpu(tmp_path, monkeypatch):
    """Here of a single one. Ranks are in the tests of `train.fit`."""
    tensors = {"exp_avg/a": torch.randn(3, 2).bfloat16(), "exp_avg_sq/a": torch.randn(3, 2), "step/a": torch.ones(())}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # so that using it fails
    shards = partial(checkpoint.write_shards, tensors=tensors, ranks=pick("cpu"))
    with pytest.warns(UserWarning, match="in a single process"):
        path = saved(tmp_path, optimizer=None, shards=shards)
    found = checkpoint.load(path, with_optimizer=True)
    assert (found.state["optimizer_shards"], found.optimizer) == (1, {})
    again = checkpoint.read_shards(path / checkpoint.SHARDS, {})
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_full_disk_under_a_rank_is_one_line_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full)
    shards = partial(checkpoint.write_shards, tensors={"step/a": torch.ones(())}, ranks=pick("cpu"))
    says = r"the disk is full while writing .*/checkpoints: free some space"
    with pytest.raises(UserError, match=says), pytest.warns(UserWarning, match="in a single process"):
        saved(tmp_path, optimizer=None, shards=shards)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_means_its_newest_checkpoint(tmp_path):
    for seen in (32, 96, 64):
        saved(tmp_path, seen)
    assert checkpoint.load(tmp_path).samples_seen == 96
    assert checkpoint.load(checkpoint.folder_of(tmp_path, 64)).samples_seen == 64


def test_pruning_keeps_the_newest_and_the_ends_of_stages(tmp_path):
    for seen in (16, 32, 48, 64):
        saved(tmp_path, seen)
    checkpoint.prune(tmp_path, 1, always=frozenset({32}))
    assert [int(path.name) for path in checkpoint.checkpoints(tmp_path)] == [32, 64]


def test_a_half_written_checkpoint_is_never_taken(tmp_path):
    saved(tmp_path, 16)
    (tmp_path / "checkpoints" / ".000000000032.471100000000000").mkdir()
    assert checkpoint.load(tmp_path).samples_seen == 16


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="doesn't exist"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load(tmp_path)
    path = saved(tmp_path)
    (path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        checkpoint.load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors doesn't exist"):
        checkpoint.load(path)


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path):
    path = saved(tmp_path, config=CONFIG | {"format": 99})
    with pytest.raises(UserError, match="format 99, newer than this clipkit"):
        checkpoint.load(path)


def test_another_tokenizer_is_refused(tmp_path):
    path = saved(tmp_path, config=CONFIG | {"tokenizer": "newer"})
    with pytest.raises(UserError, match="needs the tokenizer 'newer'"):
        checkpoint.load(path)


def test_weights_of_another_architecture_are_named(tmp_path):
    path = saved(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["model"]["text"]["width"] = 32
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"text\.\S+ has shape"):
        checkpoint.build_model(checkpoint.load(path))
    config["model"]["text"] |= {"width": 16, "depth": 2}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the checkpoint has no text\.blocks\.1"):
        checkpoint.build_model(checkpoint.load(path))


@pytest.mark.parametrize(
    "config",
    [
        *(OptimizerConfig(name) for name in ("adamw", "stable_adamw", "lion", "muon")),
        OptimizerConfig(mu_dtype="bfloat16"),
    ],
    ids=lambda config: f"{config.name} {config.mu_dtype}",
)
def test_the_optimizer_goes_on_bit_for_bit(tmp_path, config):
    def step(model, optimizer):
        model.encode_text(torch.tensor([[49406, 5, 49407]])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    device = pick("cpu")
    model = build(SMALL)
    optimizer = make_optimizer(model.text, config, 1e-2, device)
    step(model, optimizer)
    again = build(SMALL)
    again.load_state_dict(model.state_dict())
    other = make_optimizer(again.text, config, 1e-2, device)
    save_file(checkpoint.optimizer_tensors(model.text, optimizer), tmp_path / "o.safetensors")
    checkpoint.restore_optimizer(again.text, other, checkpoint.read_tensors(tmp_path / "o.safetensors"), tmp_path)
    step(model, optimizer)
    step(again, other)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    model = build(SMALL)
    optimizer = make_optimizer(model, OptimizerConfig(), 1e-2, pick("cpu"))
    with pytest.raises(UserError, match="no optimizer state for"):
        checkpoint.restore_optimizer(model, optimizer, {}, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "missing", "empty", "zeros", "other"])
def test_damaged_checkpoints_are_set_aside_until_one_is_whole(tmp_path, name, harm):
    whole, damaged, newest = (saved(tmp_path, samples_seen) for samples_seen in (32, 64, 96))
    for folder in (damaged, newest):
        path = folder / name
        data = path.read_bytes()
        path.unlink()
        if harm != "missing":
            harmed = {"cut": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data)), "other": b"{}"}
            path.write_bytes(harmed[harm])
    lines = checkpoint.set_damaged_aside(tmp_path)
    assert [str(folder) in line and "\n" not in line for folder, line in zip((newest, damaged), lines, strict=True)]
    assert checkpoint.latest(tmp_path) == whole
    assert (tmp_path / "checkpoints" / f"damaged-{newest.name}").is_dir()
    assert checkpoint.set_damaged_aside(tmp_path) == []


def test_a_run_without_a_whole_checkpoint_names_the_folder_to_remove(tmp_path):
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole .*model\.safetensors.*remove .*checkpoints"):
        checkpoint.set_damaged_aside(tmp_path)
    assert checkpoint.set_damaged_aside(tmp_path / "nothing") == []
