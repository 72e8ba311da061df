import pytest

from clipkit.config import from_json, set_values, to_json
from clipkit.errors import UserError
from clipkit.train.recipes import Recipe, check_recipe, loader_config, model_at, recipes


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_passes_its_own_check_and_survives_json(name):
    recipe = recipes()[name]()
    assert recipe.name == name
    check_recipe(recipe, records=1000, shards=1)
    assert from_json(Recipe, to_json(recipe)) == recipe


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.0.batch_size=1", "batch_size 1"),
        ("stages.0.samples=17", "samples 17 is no multiple of batch_size 16: set 16"),
        ("stages.1.warmup_samples=10000", "warmup_samples 10000"),
        ("stages.0.image_size=33", "image_size 33 is no multiple of the patch size 8"),
        ("stages.0.context_length=2", "no token between start and end"),
        ("stages.0.image_keep=17", "at most 16 patches"),
        ("stages.0.image_reduction=none", "needs an image_reduction"),
        ("micro_batch=3", "micro_batch 3"),
        ("loss=sigmoid", "needs a bias"),
    ],
)
def test_what_would_fail_later_is_refused_now(setting, says):
    recipe = set_values(recipes()["debug"](), [setting])
    with pytest.raises(UserError, match=says):
        check_recipe(recipe, records=1000, shards=1)


def test_a_batch_must_divide_over_the_devices():
    with pytest.raises(UserError, match="doesn't divide over 3 devices"):
        check_recipe(recipes()["debug"](), records=1000, shards=3)


def test_an_empty_dataset_is_refused():
    with pytest.raises(UserError, match="no records"):
        check_recipe(recipes()["debug"](), records=0, shards=1)


def test_a_stage_says_the_sizes_of_its_model_and_loader():
    recipe = recipes()["clipa-b16-i50-t16"]()
    reduced, full = (model_at(recipe, stage) for stage in recipe.stages)
    assert (reduced.image.image_size, reduced.image.position, reduced.text.context_length) == (112, "sincos", 16)
    assert (full.image.image_size, full.image.position) == (224, "learnable")
    assert loader_config(recipe, recipe.stages[0]).grid == (7, 7)
