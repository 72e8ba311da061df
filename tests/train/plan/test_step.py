"""The step's operations against PyTorch's counter, and its times against the published ones."""

import pytest

from clipkit.config import set_values
from clipkit.errors import UserError
from clipkit.hardware import CHIPS, parse_devices
from clipkit.model.flops import sample_cost, weight_count
from clipkit.train.catalogue import recipes
from clipkit.train.plan.cost import Fleet, Pairs, found_by_training, stage_plan
from clipkit.train.plan.published_times import published_times
from clipkit.train.plan.step import Calibration, Step, forward_operations, towers_of
from clipkit.train.recipes import model_at

CASES = ("emoji-demo", "clipa-l16-i37-t8", "clipa-h14-laion2b", "siglip-b16", "lit-b16")
STAGES = [(recipes()[name](), -1) for name in CASES]


@pytest.mark.parametrize(("recipe", "number"), STAGES, ids=lambda each: getattr(each, "name", str(each)))
def test_operations_and_weights_are_those_that_torch_counts(recipe, number):
    stage = recipe.stages[number]
    config = model_at(recipe, stage)
    towers = towers_of(config, stage.image_keep)
    cost = sample_cost(config, stage.image_keep)
    assert (towers[0].tokens, towers[1].tokens) == (cost.image_tokens, cost.text_tokens)
    operations = sum(forward_operations(tower) * (1 if tower.frozen else 3) for tower in towers)
    assert operations == pytest.approx(cost.flops, rel=1e-9)
    assert sum(tower.weights for tower in towers) == pytest.approx(weight_count(config), rel=0.03)


@pytest.mark.parametrize(("image", "text"), [("glu", "mlp"), ("linear", "none")])
def test_heads_are_counted_as_torch_counts_them_and_only_they_are_trained(image, text):
    settings = ["text.frozen=true", f"image.head={image}", f"text.head={text}", "image.head_input=768"]
    config = set_values(recipes()["lit-b16"]().model, settings)
    towers = towers_of(config, None)
    chip = next(chip for chip in CHIPS if chip.name == "A100-80GB")
    step = Step(towers, config.embed_dim, 224, chip, 1, 256, False, False, Calibration())
    plain = Step(towers_of(set_values(config, ["image.head=none", "text.head=none", "image.head_input=none"]), None),
                 config.embed_dim, 224, chip, 1, 256, False, False, Calibration())  # fmt: skip
    operations = step.operations()
    assert operations.image + operations.text == pytest.approx(256 * sample_cost(config).flops, rel=1e-9)
    assert step.weights == pytest.approx(weight_count(config), rel=0.03)
    heads = step.weights - plain.weights
    assert (step.trained, plain.trained) == (heads, 0)
    assert sum(step.seconds()) > sum(plain.seconds())


def test_published_times_are_told_within_a_quarter_by_one_calibration():
    rows = published_times(Calibration())
    assert len(rows) == 11
    assert {row.name: row.ratio for row in rows if not 0.8 <= row.ratio <= 1.25} == {}


@pytest.mark.parametrize(
    ("setting", "saved"), [("optimizer.mu_dtype=bfloat16", 2), ("optimizer.name=lion", 4), ("seed=1", 0)]
)
def test_the_optimizers_own_state_is_counted(setting, saved):
    plain, other = (
        stage_plan(recipe, recipe.stages[0], Fleet(8, CHIPS[0], 1.0), Pairs(None, 1.0, "unknown"), Calibration()).step
        for base in [recipes()["clipa-b16-i50-t16"]()]
        for recipe in (base, set_values(base, [setting]))
    )
    assert plain.fixed_bytes() - other.fixed_bytes() == saved * plain.trained


def test_towers_in_float32_multiply_at_the_chips_float32_peak():
    recipe, chip, pairs = recipes()["clipa-b16-i50-t16"](), CHIPS[2], Pairs(None, 1.0, "unknown")
    products_only = Calibration(memory=1e9)
    half, whole = (
        stage_plan(
            set_values(recipe, [f"precision={name}"]), recipe.stages[0], Fleet(8, chip, 1.0), pairs, products_only
        )
        for name in ("bfloat16", "float32")
    )
    times = [each.step.seconds() for each in (half, whole)]
    assert times[1].image / times[0].image == pytest.approx(chip.tflops / chip.float32_tflops)
    assert times[1].loss == times[0].loss


def test_smaller_memory_gives_smaller_micro_batches_and_costs_a_forward_pass():
    recipe = recipes()["clipa-l16-i17-t16"]()
    stage = recipe.stages[0]
    towers = towers_of(model_at(recipe, stage), None)

    def step(name):
        chip = next(chip for chip in CHIPS if chip.name == name)
        return Step(towers, 768, stage.image_size, chip, 8, stage.batch_size, False, False, Calibration())

    large, small = step("MI300X"), step("RTX-4090")
    assert large.micro_batch() > small.micro_batch() > 0
    assert (large.extra_forwards(), small.extra_forwards()) == (0, 1)
    held = small.fixed_bytes() + small.micro_batch() * small.sample_bytes()
    assert held < small.chip.memory_gb * 1e9
    assert 0 < sum(large.seconds()) < sum(small.seconds())


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("8xA100-80GB", 8, "A100-80GB"), ("h200", 1, "H200"), ("4 x rtx4090", 4, "RTX-4090"), ("tpu v5e", 1, "TPU-v5e"),
     ("2xcpu", 2, "cpu")],
)  # fmt: skip
def test_devices_are_read_as_people_write_them(text, count, name):
    found = parse_devices(text, cores=4)
    assert (found[0], found[1].name) == (count, name)


@pytest.mark.parametrize(
    ("text", "said"),
    [("8xA100", "A100-80GB or A100-40GB"), ("B300", "did you mean B200"), ("0xH200", "NUMBERxNAME"),
     ("", "NUMBERxNAME"), ("8xfoo", "unknown device 'foo': the nearest that plan knows are ")],
)  # fmt: skip
def test_unknown_devices_are_refused_with_the_nearest(text, said):
    with pytest.raises(UserError, match=r"--devices") as caught:
        parse_devices(text, cores=4)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "micro_batch", "recompute", "said"),
    [
        ([], 4096, True, True),
        (["checkpoint_activations=false"], 2048, False, True),
        (["micro_batch=1024"], 1024, False, True),
        (["micro_batch=none", "checkpoint_activations=true"], 4096, True, False),
    ],
)
def test_what_a_recipe_leaves_open_is_what_training_finds_and_is_said(settings, micro_batch, recompute, said):
    recipe = set_values(recipes()["clipa-l16-i17-t16"](), settings)
    count, chip = parse_devices("8xA100-80GB", cores=4)
    cost = stage_plan(recipe, recipe.stages[0], Fleet(count, chip, 1.0), Pairs(None, 1.0, ""), Calibration())
    assert (cost.micro_batch, cost.step.recompute) == (micro_batch, recompute)
    way = "computed again" if recompute else "kept"
    lines = [f"{micro_batch:,} of a device's 4,096 pairs go at once, activations {way}"] if said else []
    found = found_by_training(recipe, [cost])
    assert [line.partition("finds that ")[2].partition(" (yours")[0] for line in found] == lines
