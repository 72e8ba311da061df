"""Recipes: everything that decides what a run learns, as one frozen dataclass.

A recipe is a function that returns a `Recipe`, so it can be read, called and changed in Python; the command line
changes it by `--set key=value`. Lengths are samples seen. CLIPA's plan is the shape of all of them: train long on few
image and text tokens, then briefly on all ("An Inverse Scaling Law for CLIP Training", NeurIPS 2023).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from clipkit.config import did_you_mean
from clipkit.device import Precision
from clipkit.errors import UserError
from clipkit.images import Preprocess
from clipkit.model_config import ImageConfig, ModelConfig, TextConfig, vit_b16
from clipkit.train.augment import Augmentation
from clipkit.train.data import LoaderConfig
from clipkit.train.optimizer import OptimizerConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TextReduction = Literal["truncate", "random", "block", "syntax"]
ImageReduction = Literal["random", "grid", "block"]


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one input size, one batch size and one cosine."""

    name: str
    samples: int
    """How many samples the stage sees, a multiple of `batch_size`."""
    batch_size: int
    """Pairs in a step over all devices together: each has `batch_size - 1` negatives."""
    learning_rate: float
    """The peak, reached after the warm-up."""
    warmup_samples: int
    image_size: int
    """Side of the square input in pixels; a smaller image is the best way to fewer image tokens."""
    context_length: int
    """Text tokens, start and end included."""
    text_reduction: TextReduction = "truncate"
    image_reduction: ImageReduction | None = None
    """How patches are chosen when `image_keep` says to keep only some of them."""
    image_keep: int | None = None
    position: Literal["learnable", "sincos"] | None = None
    """The image tower's position embedding in this stage, where it isn't the model's own."""
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Cadence:
    """How often a run speaks, saves and looks at itself. It may be changed when a run is resumed."""

    log_samples: int = 65_536
    checkpoint_samples: int | None = None
    checkpoint_minutes: float | None = 20.0
    evaluate_samples: int | None = None
    keep_checkpoints: int = 2
    """The newest ones stay, and the last one of each stage."""


@dataclass(frozen=True)
class Recipe:
    """A run from its first sample to its last."""

    name: str
    model: ModelConfig
    """The architecture; the stages give its image size and context length."""
    stages: tuple[Stage, ...]
    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    same_caption: Literal["negative", "ignore", "positive"] = "ignore"
    """What a pair is whose caption equals another's in the batch: CLIP and CLIPA count it as a negative."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    micro_batch: int | None = None
    """Pairs that go through the towers at once on one device; None takes the whole batch."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: about a third more time for a fraction of the memory."""
    precision: Precision = "auto"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    block_size: int = 256
    """Records read in one go by the shuffle (`clipkit.train.order`)."""
    seed: int = 0
    cadence: Cadence = field(default_factory=Cadence)

    @property
    def samples(self) -> int:
        """The length of all stages together, in samples seen."""
        return sum(stage.samples for stage in self.stages)


def clipa_b16_i50_t16() -> Recipe:
    """CLIPA's B/16 with 50 image and 16 text tokens on LAION-400M: 63.2% ImageNet zero-shot in about two days on eight
    A100-80GB, as published.

    Six passes over about 407 million pairs at 112 px, then 131,072,000 samples at 224 px.
    """
    crop = Augmentation(crop_area=(0.4, 1.0))
    model = vit_b16()
    batch = 65_536
    return Recipe(
        name="clipa-b16-i50-t16",
        model=replace(model, image=replace(model.image, position="sincos")),
        stages=(
            Stage(
                name="reduced",
                samples=37_263 * batch,
                batch_size=batch,
                learning_rate=2.048e-3,
                warmup_samples=782 * batch,
                image_size=112,
                context_length=16,
                augmentation=crop,
            ),
            Stage(
                name="full",
                samples=16_000 * 8_192,
                batch_size=8_192,
                learning_rate=2.56e-5,
                warmup_samples=3_072 * 8_192,
                image_size=224,
                context_length=16,
                position="learnable",
                augmentation=crop,
            ),
        ),
        same_caption="negative",
        checkpoint_activations=True,
        cadence=Cadence(log_samples=20 * batch, checkpoint_minutes=30.0, evaluate_samples=4_000 * batch),
    )


def emoji_demo() -> Recipe:
    """A first CLIP from 8,548 drawings in minutes on two CPU cores: 9 image tokens, then 16.

    Towers of 0.4 million weights beside the token embedding; a convolutional stem, without which so few drawings
    teach a transformer little. Colours and shapes are shaken hard, because the drawings to be recognised are in
    a style that training never saw.
    """
    image = ImageConfig(
        "vit_tiny_patch16_224", image_size=48, patch_size=16, width=128, depth=1, heads=2, pooling="average",
        class_token=False, pre_norm=False, stem="conv",
    )  # fmt: skip
    drawings = Augmentation(
        crop_area=(0.6, 1.3), crop_ratio=(1 / 1.2, 1.2), rotation=12.0, translation=0.08,
        brightness=0.3, contrast=0.3, saturation=0.4, grey=0.1, fixed="white",
    )  # fmt: skip
    batch = 256
    reduced = Stage(
        name="reduced", samples=1_200 * batch, batch_size=batch, learning_rate=2e-3, warmup_samples=60 * batch,
        image_size=48, context_length=8, augmentation=drawings,
    )  # fmt: skip
    full = replace(
        reduced, name="full", samples=240 * batch, learning_rate=1e-3, warmup_samples=20 * batch, image_size=64,
        context_length=16,
    )  # fmt: skip
    return Recipe(
        name="emoji-demo",
        model=ModelConfig(embed_dim=128, image=image, text=TextConfig(context_length=16, width=64, depth=1, heads=1)),
        stages=(reduced, full),
        optimizer=OptimizerConfig(beta2=0.98, weight_decay=0.1),
        mean=(0.70, 0.68, 0.63),
        std=(0.35, 0.34, 0.37),
        block_size=16,
        cadence=Cadence(log_samples=10 * batch, checkpoint_samples=100 * batch, evaluate_samples=200 * batch),
    )


def debug() -> Recipe:
    """Twenty steps on towers of a few thousand weights: seconds on any device, every part of the trainer in use."""
    image = ImageConfig(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2, pooling="average",
        class_token=False, position="sincos",
    )  # fmt: skip
    text = TextConfig(context_length=16, width=32, depth=1, heads=2)
    crop = Augmentation(crop_area=(0.4, 1.0), flip=0.5)
    common = Stage(
        name="reduced", samples=12 * 16, batch_size=16, learning_rate=1e-3, warmup_samples=4 * 16, image_size=32,
        context_length=8, text_reduction="random", image_reduction="random", image_keep=8, augmentation=crop,
    )  # fmt: skip
    full = replace(
        common, name="full", samples=8 * 16, learning_rate=1e-4, image_size=48, context_length=16,
        text_reduction="truncate", image_reduction=None, image_keep=None, position="learnable",
    )  # fmt: skip
    return Recipe(
        name="debug",
        model=ModelConfig(embed_dim=32, image=image, text=text),
        stages=(common, full),
        block_size=4,
        precision="float32",
        cadence=Cadence(log_samples=16, checkpoint_samples=4 * 16),
    )


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError, with the nearest names, when there is none."""
    known = recipes()
    if name not in known:
        raise UserError(f"unknown recipe {name!r}: {did_you_mean(name, known)}")
    return known[name]()


def recipes() -> dict[str, Callable[[], Recipe]]:
    """All recipes by the name that `--recipe` takes."""
    return {"emoji-demo": emoji_demo, "debug": debug, "clipa-b16-i50-t16": clipa_b16_i50_t16}


def check_recipe(recipe: Recipe, records: int, shards: int) -> None:
    """Refuse what would fail only hours later. Raises UserError that names the stage and the field.

    `shards` is the number of equal parts, one a device, that a batch is cut into.
    """
    if records < 1:
        raise UserError("the dataset has no records: build it again from shards that hold some")
    for stage in recipe.stages:
        where = f"recipe {recipe.name}, stage {stage.name}"
        patch = recipe.model.image.patch_size or 16
        if stage.batch_size < 2 or stage.batch_size % shards:
            raise UserError(f"{where}: batch_size {stage.batch_size} doesn't divide over {shards} devices")
        if stage.samples < 1 or stage.samples % stage.batch_size:
            near = max(1, round(stage.samples / stage.batch_size)) * stage.batch_size
            raise UserError(
                f"{where}: samples {stage.samples} is no multiple of batch_size {stage.batch_size}: set {near}"
            )
        if not 0 <= stage.warmup_samples <= stage.samples:
            raise UserError(f"{where}: warmup_samples {stage.warmup_samples} is not within 0 and {stage.samples}")
        if stage.image_size % patch:
            raise UserError(f"{where}: image_size {stage.image_size} is no multiple of the patch size {patch}")
        if recipe.loss == "sigmoid" and recipe.model.logit_bias_init is None:
            raise UserError(f"{where}: the sigmoid loss needs a bias: set model.logit_bias_init=-10")
        if stage.context_length < 3:
            raise UserError(f"{where}: context_length {stage.context_length} leaves no token between start and end")
        patches = (stage.image_size // patch) ** 2
        if stage.image_keep is not None and not (stage.image_reduction and 1 <= stage.image_keep <= patches):
            raise UserError(
                f"{where}: image_keep {stage.image_keep} needs an image_reduction and at most {patches} patches"
            )
        share = stage.batch_size // shards
        if recipe.micro_batch is not None and (recipe.micro_batch < 1 or share % recipe.micro_batch):
            raise UserError(f"{where}: micro_batch {recipe.micro_batch} doesn't divide a device's share of {share}")


def model_at(recipe: Recipe, stage: Stage) -> ModelConfig:
    """The recipe's model at a stage's image size, context length and position embedding."""
    model = recipe.model
    image = replace(model.image, image_size=stage.image_size, position=stage.position or model.image.position)
    return replace(model, image=image, text=replace(model.text, context_length=stage.context_length))


def preprocess_at(recipe: Recipe, stage: Stage) -> Preprocess:
    """How images are prepared when the stage's model is evaluated."""
    return Preprocess(size=stage.image_size, mean=recipe.mean, std=recipe.std)


def loader_config(recipe: Recipe, stage: Stage) -> LoaderConfig:
    """What the loader needs to know of a stage."""
    side = stage.image_size // (recipe.model.image.patch_size or 16)
    return LoaderConfig(
        image_size=stage.image_size,
        augmentation=stage.augmentation,
        context_length=stage.context_length,
        text_reduction=stage.text_reduction,
        image_reduction=stage.image_reduction,
        image_keep=stage.image_keep,
        grid=(side, side),
        batch_size=stage.batch_size,
        seed=recipe.seed,
        block_size=recipe.block_size,
    )
