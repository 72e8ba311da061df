from dataclasses import dataclass, replace

import pytest

from clipkit.config import from_json, set_values, to_json
from clipkit.device import Device, pick
from clipkit.errors import UserError
from clipkit.model.config import vit_b32, vit_l14
from clipkit.train.recipes import Recipe, check_recipe, loader_config, model_at, patch_grid, recipes


@dataclass(frozen=True)
class Records:
    """As much of a dataset as a recipe's check looks at."""

    num_records: int = 1000


def check(recipe: Recipe, dataset: Records = Records(), device: Device | None = None) -> None:
    check_recipe(recipe, dataset, device or pick("cpu"))


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_passes_its_own_check_and_survives_json(name):
    recipe = recipes()[name]()
    assert recipe.name == name
    check(recipe)
    assert from_json(Recipe, to_json(recipe)) == recipe


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.0.batch_size=1", "batch_size 1"),
        ("stages.0.samples=17", "samples 17 is not a multiple of batch_size 16: set 16"),
        ("stages.1.warmup_samples=10000", "warmup_samples 10000"),
        ("stages.0.image_size=33", "stage reduced: .*33"),
        ("stages.0.image_size=0", "image_size is 0: set a positive number"),
        ("optimizer.grad_clip=0", "grad_clip is 0.0: set a positive number, or none for off"),
        ("optimizer.grad_clip=-1", "grad_clip is -1.0: set a positive number, or none for off"),
        ("optimizer.grad_clip=nan", "grad_clip is nan: set a positive number, or none for off"),
        ("stages.0.learning_rate=-1", "learning_rate is -1.0: set a positive number"),
        ("stages.0.learning_rate=nan", "learning_rate is nan: set a positive number"),
        ("stages.0.context_length=2", "stage reduced: .*2"),
        ("stages.0.image_keep=17", "stage reduced: .*17"),
        ("stages.0.image_reduction=none", "image_keep and image_reduction go together"),
        ("stages.1.image_reduction=grid", "stage full: image_keep and image_reduction go together"),
        ("stages.1.augmentation.flip=2", "stage full: .*flip"),
        ("micro_batch=3", "micro_batch 3"),
        ("loss=sigmoid", "go together"),
        ("model.logit_bias_init=-10", "go together"),
        ("model.image.heads=0", "stage reduced: "),
        ("model.image.patch_size=0", "stage reduced: "),
        ("model.text.heads=0", "stage reduced: "),
        ("cadence.log_samples=0", "log_samples is 0: set a positive number"),
        ("cadence.keep_checkpoints=-1", "keep_checkpoints is -1: set a positive number"),
        ("block_size=0", "block_size is 0"),
    ],
)
def test_what_would_fail_later_is_refused_now(setting, says):
    recipe = set_values(recipes()["debug"](), [setting])
    with pytest.raises(UserError, match=says):
        check(recipe)


def test_a_batch_must_divide_over_the_devices():
    with pytest.raises(UserError, match="can't be divided over 3 devices"):
        check(recipes()["debug"](), device=replace(pick("cpu"), world=3))


def test_an_empty_dataset_is_refused():
    with pytest.raises(UserError, match="no records"):
        check(recipes()["debug"](), Records(0))


def test_the_patches_are_the_towers_own():
    """A name of timm's says the patch size, where the recipe doesn't."""
    recipe = recipes()["clipa-b16-i50-t16"]()
    stage = recipe.stages[1]
    assert patch_grid(recipe, stage) == (14, 14)
    assert patch_grid(replace(recipe, model=vit_l14()), stage) == (16, 16)
    assert patch_grid(replace(recipe, model=vit_b32()), stage) == (7, 7)
    kept = replace(stage, image_size=84, image_reduction="grid", image_keep=9)
    check(replace(recipe, model=vit_l14(), stages=(kept,)))


def test_a_stage_says_the_sizes_of_its_model_and_loader():
    recipe = recipes()["clipa-b16-i50-t16"]()
    reduced, full = (model_at(recipe, stage) for stage in recipe.stages)
    assert (reduced.image.image_size, reduced.image.position, reduced.text.context_length) == (112, "sincos", 16)
    assert (full.image.image_size, full.image.position) == (224, "learnable")
    assert loader_config(recipe, recipe.stages[0]).grid == (7, 7)
