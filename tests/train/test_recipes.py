import typing
from dataclasses import dataclass, fields, is_dataclass, replace

import open_clip
import pytest
import torch

from clipkit.config import from_json, set_values, to_json
from clipkit.device import Device, pick
from clipkit.errors import UserError
from clipkit.model.clip import allocate
from clipkit.model.config import vit_b32, vit_l14
from clipkit.train.catalogue import find_recipe, recipes
from clipkit.train.checks import captions_left_out, check_recipe, loader_config, patch_grid, preprocess_at, stage_cost
from clipkit.train.recipes import Recipe, model_at
from clipkit.train.sources.source import RecordSource


@dataclass(frozen=True)
class Records:
    """As much of a dataset as a recipe's check looks at."""

    num_records: int = 1000


def check(recipe: Recipe, dataset: Records = Records(), device: Device | None = None) -> None:
    check_recipe(recipe, RecordSource(dataset), device or pick("cpu"))


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_passes_its_own_check_and_survives_json(name):
    recipe = recipes()[name]()
    assert recipe.name == name
    check(recipe)
    assert from_json(Recipe, to_json(recipe)) == recipe


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages=", "recipe debug has no stages"),
        ("stages.1.name=reduced", "recipe debug has two stages of the name reduced: give each its own"),
        ("stages.0.batch_size=1", "batch_size 1"),
        ("stages.0.samples=17", "samples 17 is not a multiple of batch_size 16: set 16"),
        ("stages.1.warmup_samples=10000", "warmup_samples 10000"),
        ("stages.0.image_size=33", "stage reduced: .*33"),
        ("stages.0.image_size=0", "image_size is 0: set a positive number"),
        ("stages.0.cooldown_samples=16", "cooldown_samples 16 needs schedule=constant or inverse_sqrt"),
        ("optimizer.grad_clip=0", "grad_clip is 0.0: set a positive number, or none for off"),
        ("optimizer.grad_clip=-1", "grad_clip is -1.0: set a positive number, or none for off"),
        ("optimizer.grad_clip=nan", "grad_clip is nan: set a positive number, or none for off"),
        ("optimizer.momentum=0.9", "optimizer.momentum is 0.9, which adamw doesn't use: set its default 0.95"),
        ("optimizer.momentum=1", "optimizer.momentum is 1.0: set a number from 0 to 0.999999"),
        ("ema_decay=1", "ema_decay is 1.0: set a number from 0 to 0.99999999, or none"),
        ("stages.0.learning_rate=-1", "learning_rate is -1.0: set a positive number"),
        ("stages.0.learning_rate=nan", "learning_rate is nan: set a positive number"),
        ("stages.0.context_length=2", "stage reduced: .*2"),
        ("stages.0.image_keep=17", "stage reduced: .*17"),
        ("stages.0.image_reduction=none", "image_keep and image_reduction go together"),
        ("stages.1.image_reduction=grid", "stage full: image_keep and image_reduction go together"),
        ("stages.1.augmentation.flip=2", "stage full: .*flip"),
        ("micro_batch=3", "stage reduced: micro_batch 3 doesn't divide a device's share of 16: set a divisor"),
        ("loss=sigmoid", "go together"),
        ("model.logit_bias_init=-10", "go together"),
        ("model.image.heads=0", "stage reduced: model.image.heads is 0"),
        ("model.image.patch_size=0", "stage reduced: model.image.patch_size is 0"),
        ("model.text.heads=0", "stage reduced: model.text.heads is 0"),
        ("cadence.log_samples=0", "log_samples is 0: set a positive number"),
        ("cadence.keep_checkpoints=-1", "keep_checkpoints is -1: set a positive number"),
        ("block_size=0", "block_size is 0"),
        ("captions.original=0", "all weights of captions are 0: give a source a positive one"),
        ("captions.synthetic=-1", "captions.synthetic is -1.0: set 0 or a positive number"),
        ("captions.synthetic=nan", "captions.synthetic is nan"),
        ("captions.synthetic=1", "captions.synthetic: the data have only captions of original: name one of these"),
    ],
)
def test_what_would_fail_later_is_refused_now(setting, says):
    recipe = set_values(recipes()["debug"](), [setting])
    with pytest.raises(UserError, match=says):
        check(recipe)


def test_the_loader_gets_the_weights_and_what_is_left_out_is_told():
    source = RecordSource(Records(), added={"alt": "a", "synthetic": "b"})
    recipe = set_values(recipes()["debug"](), ["captions.synthetic=2"])
    assert loader_config(recipe, recipe.stages[0]).captions == {"synthetic": 2.0}
    (told,) = captions_left_out(recipe, source)
    assert told.startswith("the data have captions of original, alt, synthetic, and the recipe takes synthetic: ")
    (told,) = captions_left_out(recipes()["debug"](), source)
    assert told.endswith(
        "takes original: --set captions.original=0.33 --set captions.alt=0.33 --set captions.synthetic=0.33"
    )
    assert captions_left_out(set_values(recipe, ["captions.original=1", "captions.alt=0"]), source) == []
    assert captions_left_out(recipes()["debug"](), RecordSource(Records())) == []


def leaves(config, path=""):
    """The path of every number of a configuration, how it is written by --set, and whether it is whole."""
    hints = typing.get_type_hints(type(config))
    for field in fields(config):
        value, where = getattr(config, field.name), f"{path}{field.name}"
        if isinstance(value, dict):
            continue
        kinds = [kind for kind in (typing.get_args(hints[field.name]) or (hints[field.name],)) if kind in (int, float)]
        if is_dataclass(value):
            yield from leaves(value, f"{where}.")
        elif isinstance(value, tuple) and is_dataclass(value[0]):
            for number, part in enumerate(value):
                yield from leaves(part, f"{where}.{number}.")
        elif isinstance(value, tuple):
            yield where, f"{{}},{','.join(map(str, value[1:]))}", float
        elif kinds:
            yield where, "{}", kinds[0]


NUMBERS = list(leaves(recipes()["debug"]()))
UNBOUNDED_BELOW = ("model.logit_bias_init", "seed")


def means_nothing(key: str, kind: type, value: str) -> bool:
    """Whether no number field of that name may have the value: a float may be large, some may be negative."""
    if value == "1e30":
        return kind is not float or key.endswith(("crop_area", "crop_ratio"))
    return value == "-inf" or not value.startswith("-") or key not in UNBOUNDED_BELOW


SENSELESS = [
    (key, form, value)
    for key, form, kind in NUMBERS
    for value in ("nan", "inf", "-inf", "-0.1", "-1e9", "1e30")
    if means_nothing(key, kind, value)
]


@pytest.mark.parametrize(("key", "form", "value"), SENSELESS, ids=[f"{key}={value}" for key, _, value in SENSELESS])
def test_no_number_that_means_nothing_passes_the_check(key, form, value):
    """Every number of a recipe has its range: a field without one fails here."""
    with pytest.raises(UserError) as refusal:
        check(set_values(recipes()["debug"](), [f"{key}={form.format(value)}"]))
    assert key.rpartition(".")[2] in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("max_bad=-0.1", "recipe debug: max_bad is -0.1: set a number from 0 to 1"),
        ("max_bad=1.1", "recipe debug: max_bad is 1.1: set a number from 0 to 1"),
        ("model.text.vocab_size=0", "recipe debug, stage reduced: model.text.vocab_size is 0: set a positive number"),
        ("std=0,0,0", "recipe debug: std is 0.0: set a positive number"),
        ("mean=0.5,0.5,128", "recipe debug: mean is 128.0: set a number from 0 to 1"),
        ("seed=1e30", "recipe debug: seed is 1000000000000000000000000000000: set a number from -9,223,"),
        ("model.embed_dim=0", "recipe debug, stage reduced: model.embed_dim is 0: set a positive number"),
        ("model.image.width=0", "recipe debug, stage reduced: model.image.width is 0: set a positive number, or none"),
        ("model.text.width=0", "recipe debug, stage reduced: model.text.width is 0: set a positive number"),
        ("model.text.depth=1e6", "recipe debug, stage reduced: model.text.depth is 1000000: set at most 1,000"),
        ("model.text.width=1e6", "recipe debug, stage reduced: the model's .* weights take .* TB, and this machine"),
        ("stages.0.batch_size=1e15", "stage reduced: a batch of 1,000,000,000,000,000 images of 32 px takes"),
        (
            "model.logit_scale_init=0",
            "recipe debug, stage reduced: model.logit_scale_init is 0.0: set a positive number",
        ),
        ("model.logit_scale_init=101", "recipe debug, stage reduced: model.logit_scale_init is 101.0: set at most 100"),
        ("optimizer.weight_decay=-0.1", "recipe debug: optimizer.weight_decay is -0.1: set 0 or a positive number"),
        ("optimizer.beta2=1", "recipe debug: optimizer.beta2 is 1.0: set a number from 0 to 0.99999999"),
        ("cadence.checkpoint_samples=0", "cadence.checkpoint_samples is 0: set a positive number, or none"),
        ("stages.1.warmup_samples=-1", "stage full: warmup_samples is -1: set 0 or a positive number"),
        ("stages.1.augmentation.fill=256", "stage full: augmentation fill=256: give a number from 0 to 255"),
    ],
)
def test_a_number_out_of_its_range_is_named_with_what_it_may_be(setting, says):
    more = ["stages.0.samples=1e15"] if "batch_size" in setting else []
    with pytest.raises(UserError, match=says):
        check(set_values(recipes()["debug"](), [setting, *more]))


@pytest.mark.parametrize(
    "setting",
    [
        "seed=-1",
        "seed=18446744073709551615",
        "max_bad=0",
        "max_bad=1",
        "optimizer.weight_decay=0",
        "optimizer.beta1=0",
        "mean=0,0,1",
        "stages.0.warmup_samples=0",
        "stages.0.learning_rate=1e30",
        "optimizer.grad_clip=none",
        "model.logit_scale_init=100",
        "model.text.vocab_size=49409",
        "stages.0.augmentation.hue=0.5",
    ],
)
def test_the_ends_of_a_range_are_in_it(setting):
    check(set_values(recipes()["debug"](), [setting]))


def test_a_field_that_the_optimizer_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"optimizer\.eps is 1e-08, which lion doesn't use: set its default 1e-06"):
        check(set_values(recipes()["debug"](), ["optimizer.name=lion", "optimizer.eps=1e-8"]))
    with pytest.raises(UserError, match=r"optimizer\.mu_dtype is bfloat16, which muon doesn't use: set its default"):
        check(set_values(recipes()["debug"](), ["optimizer.name=muon", "optimizer.mu_dtype=bfloat16"]))
    check(set_values(recipes()["debug"](), ["optimizer.name=muon", "optimizer.eps=1e-8", "optimizer.momentum=0.9"]))


@pytest.mark.parametrize("ranks", [3, 32])
def test_a_batch_must_divide_over_the_devices(ranks):
    """Where there are more of them than samples, too."""
    says = f"stage reduced: batch_size 16 can't be divided over {ranks} devices: set a multiple of {ranks}$"
    with pytest.raises(UserError, match=says):
        check(recipes()["debug"](), device=replace(pick("cpu"), world=ranks))


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


# ---- CLIPA's own numbers, and recipes from files ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clipa-b16-i50-t16", "clipa-l16-i17-t16", "clipa-l16-i37-t8"])
def test_clipas_optimizer_is_the_published_one(name):
    optimizer = find_recipe(name).optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.95, 1e-6, 0.2)
    assert (optimizer.grad_clip, optimizer.decay) == (None, "matrices")


def test_clipas_l16_are_the_published_recipes():
    for name, size, tokens, full_tokens in (("clipa-l16-i17-t16", 64, 16, 16), ("clipa-l16-i37-t8", 96, 8, 32)):
        reduced, full = find_recipe(name).stages
        assert (reduced.image_size, reduced.context_length, reduced.text_reduction) == (size, tokens, "syntax")
        assert (reduced.batch_size, reduced.learning_rate) == (32_768, 1.024e-3)
        assert reduced.warmup_samples == 1_563 * 32_768
        assert (full.batch_size, full.learning_rate, full.context_length) == (7_168, 2.24e-5, full_tokens)
        assert full.samples == pytest.approx(131_072_000, rel=1e-4)
        jitter = reduced.augmentation
        assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.32, 0.32, 0.32, 0.08)
        assert (jitter.jitter, jitter.grey, full.augmentation.grey) == (0.8, 0.2, 0.0)


@pytest.mark.parametrize("name", ["clipa-l14-datacomp", "clipa-h14-laion2b", "clipa-h14-datacomp"])
def test_clipa_v2_is_the_published_recipe(name):
    recipe = find_recipe(name)
    reduced, full, large = recipe.stages
    assert [(stage.image_size, stage.context_length) for stage in recipe.stages] == [(84, 8), (224, 32), (336, 32)]
    assert [stage.batch_size for stage in recipe.stages] == [65_536, 32_768, 16_384]
    assert [stage.learning_rate for stage in recipe.stages] == [2.048e-3, 5.12e-5, 6.4e-6]
    assert reduced.samples == pytest.approx(12.81e9, rel=1e-3) and reduced.text_reduction == "syntax"
    assert (full.samples, large.samples) == (524_288_000, 131_072_000)
    warmups = [stage.warmup_samples // stage.batch_size for stage in recipe.stages]
    assert warmups == [3_200, 800, 1_600]
    kept = [stage.image_keep for stage in recipe.stages]
    assert kept == [None, int(0.7 * 16**2), int(0.6 * 24**2)]
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.weight_decay) == (0.9, 0.95, 0.2)
    assert (recipe.optimizer.eps, recipe.optimizer.mu_dtype) == (1e-8, "bfloat16")
    text = recipe.model.text
    assert (text.tokenizer, text.vocab_size, text.pooling, text.causal) == ("wordpiece", 32_000, "last", False)


@pytest.mark.parametrize(
    ("name", "tag"),
    [("clipa-h14-datacomp", ("ViT-H-14-CLIPA", "datacomp1b")), ("siglip-b16", ("ViT-B-16-SigLIP", "webli"))],
)
def test_images_are_prepared_as_openclip_does(name, tag):
    recipe = find_recipe(name)
    theirs, ours = open_clip.get_pretrained_cfg(*tag), preprocess_at(recipe, recipe.stages[-1])
    assert (ours.mean, ours.std) == (theirs["mean"], theirs["std"])
    assert (ours.interpolation, ours.resize_mode) == (theirs["interpolation"], theirs["resize_mode"])
    assert (recipe.interpolation, recipe.resize_mode) == (ours.interpolation, ours.resize_mode)


def test_siglips_text_is_openclips():
    theirs, recipe = open_clip.get_model_config("ViT-B-16-SigLIP"), find_recipe("siglip-b16")
    assert recipe.stages[0].context_length == theirs["text_cfg"]["context_length"]
    assert recipe.model.text.vocab_size == theirs["text_cfg"]["vocab_size"]
    assert recipe.loss == "sigmoid" and recipe.model.logit_bias_init == theirs["init_logit_bias"]


@pytest.mark.parametrize("name", ["debug", "emoji-demo", "clipa-b16-i50-t16", "clipa-l14-datacomp", "siglip-b16"])
def test_flops_are_those_that_pytorch_counts(name):
    """Of the forward pass; masked patches and the tokens that are cut are never computed."""
    from torch.utils.flop_counter import FlopCounterMode

    shallow = ["model.image.depth=2", "model.text.depth=2"] if name in ("clipa-l14-datacomp", "siglip-b16") else []
    recipe = set_values(find_recipe(name), shallow)
    for stage in recipe.stages:
        model = allocate(model_at(recipe, stage)).requires_grad_(False)  # else the counter trips over `expand`
        image_BCHW = torch.zeros(1, 3, stage.image_size, stage.image_size)
        ids_BT = torch.zeros(1, stage.context_length, dtype=torch.long)
        keep_BK = None if stage.image_keep is None else torch.zeros(1, stage.image_keep, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(image_BCHW, ids_BT, keep_BK)
        assert stage_cost(recipe, stage).flops == pytest.approx(3 * counter.get_total_flops(), rel=0.01)


def test_a_recipe_from_a_file_changes_its_base(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "debug"\nseed = 7\nmax_bad = 0.5\ncaptions = {original = 0.5, synthetic = 2}\n'
        '[optimizer]\neps = 1e-7\ngrad_clip = "none"\n'
        "[stages.0]\nsamples = 160\n[stages.1.augmentation]\ncrop_area = [0.5, 1.0]\nexact = true\n"
    )
    recipe = find_recipe(str(path))
    assert (recipe.name, recipe.seed, recipe.max_bad, recipe.stages[0].samples) == ("mine", 7, 0.5, 160)
    assert (recipe.optimizer.eps, recipe.optimizer.grad_clip) == (1e-7, None)
    assert recipe.stages[1].augmentation.crop_area == (0.5, 1.0)
    assert recipe.stages[1].augmentation.exact
    assert recipe.captions == {"original": 0.5, "synthetic": 2.0}
    assert from_json(Recipe, to_json(recipe)) == recipe
    assert recipe.model == find_recipe("debug").model


def test_a_recipe_file_may_begin_with_the_mark_of_an_editor(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "debug"\r\nseed = 7\r\n', encoding="utf-8-sig")
    assert find_recipe(str(path)).seed == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed = 1", "names no base"),
        ("base = 3", "names no base"),
        ('base = "debgu"', "unknown recipe 'debgu': did you mean debug"),
        ('base = "other.toml"', "is a file: name one of"),
        ('base = "debug"\nsede = 1', "sede: unknown key 'sede'; did you mean seed"),
        ('base = "debug"\nseed = "many"', "seed=many: takes a whole number"),
        ('base = "debug"\nseed = 1.5', "seed=1.5: takes a whole number"),
        ('base = "debug"\n[stages.7]\nsamples = 1', "isn't an index of the list"),
        ('base = "debug"\n[stages', "isn't TOML"),
        ('base = "debug"\noptimizer = 3', "can't be set as a whole"),
    ],
)
def test_a_recipe_file_that_says_something_else_gets_one_line(text, says, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        find_recipe(str(path))
    assert says in str(refusal.value)
    assert str(refusal.value).startswith(f"recipe {path}")
    assert "--set" not in str(refusal.value)
    with pytest.raises(UserError, match="doesn't exist"):
        find_recipe(str(tmp_path / "none.toml"))
