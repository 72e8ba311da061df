"""A stage's model on its device: activations, compilation and sharding, in the order that they need."""

import torch

from clipkit.device import Device
from clipkit.errors import UserError
from clipkit.model.clip import CLIP
from clipkit.model.image_tower import make_image_tower
from clipkit.model.timm_tower import TimmTower
from clipkit.train.recipes import Recipe, Stage, model_at


def set_up(model: CLIP, recipe: Recipe, stage: Stage, device: Device) -> None:
    """Bring a stage's model, of which nothing else has to be changed or copied, onto the device as `recipe` says.
    `Fit.apply` has left nothing open in it that matters here.
    """
    model.to(device.torch_device)
    model.recompute_activations(device.recompute() if recipe.checkpoint_activations is True else None)
    is_sharded = is_sharding(recipe, stage, device)
    if is_compiling(recipe, stage, device):
        # What gathers the parts of a block can't be in a graph with it.
        model.compile_step(by_block=is_sharded)
    if is_sharded:
        device.shard(model, model.blocks(), recipe.precision)


def is_sharding(recipe: Recipe, stage: Stage, device: Device) -> bool:
    """Whether each rank holds only its part of the weights."""
    if recipe.shard_weights == "auto" and not (recipe.optimizer.name == "adamw" and has_blocks(recipe, stage)):
        return False
    return device.is_sharding(recipe.shard_weights, weights_of(recipe, stage))


def is_compiling(recipe: Recipe, stage: Stage, device: Device) -> bool:
    """Whether the towers are compiled."""
    return device.compiles(recipe.compile) and (recipe.compile is True or has_blocks(recipe, stage))


def check_setup(recipe: Recipe, stage: Stage, device: Device) -> None:
    """Raise UserError for what was asked for and can't be here."""
    if device.mesh is not None and recipe.compile is True:
        raise UserError("compile isn't for TPUs, where XLA compiles each step: set compile=auto")
    if recipe.shard_weights is True:
        if recipe.optimizer.name != "adamw":
            raise UserError(
                f"shard_weights isn't for optimizer.name={recipe.optimizer.name}, which looks at whole weights: set "
                "shard_weights=false, or optimizer.name=adamw"
            )
        if not has_blocks(recipe, stage):
            raise UserError(f"shard_weights isn't for {recipe.model.image.name}: set it to false")


def has_blocks(recipe: Recipe, stage: Stage) -> bool:
    """Whether the image tower is one of ours, with blocks that can be treated one by one."""
    with torch.device("meta"):
        return not isinstance(make_image_tower(model_at(recipe, stage).image), TimmTower)


def weights_of(recipe: Recipe, stage: Stage) -> int:
    """The number of weights of a stage's model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CLIP(model_at(recipe, stage)).parameters())
