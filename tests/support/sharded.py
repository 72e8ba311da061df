"""Towers of which each rank has a part (FSDP2), trained and saved on any number of ranks, for `ranks.run_ranks`."""

import os
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from clipkit import checkpoint
from clipkit.device import pick
from clipkit.model.clip import build, load_state
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.train.run import parts
from clipkit.train.saving import CheckpointWriter

MODEL = ModelConfig(
    embed_dim=8,
    image=ImageConfig("vit_tiny_patch16_224", image_size=16, patch_size=8, width=16, depth=1, heads=2),
    text=TextConfig(context_length=8, width=16, depth=1, heads=2, vocab_size=50),
)


def train_sharded(folder: Path, stop: int) -> None:
    """Go on from the newest checkpoint in `folder`, if there is one, to step `stop`, and save there."""
    device = pick("cpu")
    newest = checkpoint.latest(folder)
    start = checkpoint.load(newest, with_optimizer=True) if newest else None
    model = build(MODEL, seed=1)
    if start:
        load_state(model, start.tensors)
    if device.world > 1:
        mesh = torch.distributed.init_device_mesh("cpu", (device.world,))
        for tower in (model.image, model.text):
            fully_shard(tower, mesh=mesh)
        assert any(isinstance(each, DTensor) for each in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, foreach=False)
    if start:
        checkpoint.restore_optimizer(model, optimizer, start.optimizer, start.path)
    with CheckpointWriter(device) as checkpoints:
        checkpoints.follow(optimizer, lambda: parts(model, None, optimizer))
        for step in range(start.samples_seen if start else 0, stop):
            torch.manual_seed(step)  # all ranks see the same, so gradients are those of one process
            image_BCHW, ids_BT = torch.rand(4, 3, 16, 16), torch.randint(1, 50, (4, 8))
            image_BE, text_BE, scale = model(image_BCHW, ids_BT)
            (scale * (image_BE - text_BE).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        config = checkpoint.describe(MODEL, None, None) | {"recipe": {}}
        state = {"samples_seen": stop}
        checkpoints.save(
            checkpoint.folder_of(folder, stop), parts(model, None, optimizer), list, config=config, state=state
        )
    device.barrier()
    assert os.environ["WORLD_SIZE"] == str(device.world)
