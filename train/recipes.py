"""Recipes: everything that decides what a run learns, as one frozen dataclass.

A recipe is a function that returns a `Recipe`, so it can be read, called and changed in Python; the command line
changes it by `--set key=value`. Lengths are samples seen. CLIPA's plan is the shape of all of them: train long on few
image and text tokens, then briefly on all ("An Inverse Scaling Law for CLIP Training", NeurIPS 2023).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from clipkit.config import did_you_mean
from clipkit.device import Device, Precision
from clipkit.errors import UserError
from clipkit.model.clip import CLIP
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig, vit_b16
from clipkit.pixels.images import CLIP_MEAN, CLIP_STD, Preprocess
from clipkit.text.tokens import ImageMethod, TextMethod
from clipkit.train.loader.augment import Augmentation
from clipkit.train.loader.loader import check_loader
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.sources.source import Examples, Source


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
    """Side of the square input in pixels; a smaller image is the best way to reduce image tokens."""
    context_length: int
    """Text tokens, start and end included."""
    text_reduction: TextMethod = "truncate"
    image_reduction: ImageMethod | None = None
    """How patches are chosen when `image_keep` says to keep only some of them."""
    image_keep: int | None = None
    position: Literal["learnable", "sincos"] | None = None
    """The image tower's position embedding in this stage, where it isn't the model's own."""
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019). `grad_clip` is the largest norm of all gradients together."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.2
    grad_clip: float | None = 1.0
    """None is off."""


@dataclass(frozen=True)
class Cadence:
    """How often a run logs, saves and evaluates. It may be changed when a run is resumed."""

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
    max_bad: float = 0.01
    """Share of the records that may be broken before the run stops."""
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


def check_recipe(recipe: Recipe, source: Source | Examples, device: Device) -> None:
    """Refuse what would fail only hours later. Raises UserError that names the stage and the field."""
    shards = device.shards
    if (recipe.loss == "sigmoid") != (recipe.model.logit_bias_init is not None):
        raise UserError("loss=sigmoid and a bias go together: set model.logit_bias_init=-10 with it, or neither")
    if recipe.micro_batch is not None and device.mesh is not None:
        raise UserError("micro_batch isn't for TPUs yet: unset it, and set checkpoint_activations=true to save memory")
    check_positive(f"recipe {recipe.name}: cadence", vars(recipe.cadence))
    clip = recipe.optimizer.grad_clip
    if clip is not None and not clip > 0:  # 0 would learn nothing, and a negative norm climbs the loss
        raise UserError(f"recipe {recipe.name}: optimizer.grad_clip is {clip}: set a positive number, or none for off")
    for stage in recipe.stages:
        where = f"recipe {recipe.name}, stage {stage.name}"
        sizes = ("batch_size", "samples", "image_size", "learning_rate")
        check_positive(where, {name: getattr(stage, name) for name in sizes})
        if stage.batch_size < 2 or stage.batch_size % shards:
            raise UserError(f"{where}: batch_size {stage.batch_size} can't be divided over {shards} devices")
        if stage.samples % stage.batch_size:
            near = max(1, round(stage.samples / stage.batch_size)) * stage.batch_size
            raise UserError(
                f"{where}: samples {stage.samples} is not a multiple of batch_size {stage.batch_size}: set {near}"
            )
        if not 0 <= stage.warmup_samples <= stage.samples:
            raise UserError(f"{where}: warmup_samples {stage.warmup_samples} is not between 0 and {stage.samples}")
        if (stage.image_keep is None) != (stage.image_reduction is None):
            raise UserError(f"{where}: image_keep and image_reduction go together: set both or neither")
        share = stage.batch_size // shards
        if recipe.micro_batch is not None and (recipe.micro_batch < 1 or share % recipe.micro_batch):
            raise UserError(f"{where}: micro_batch {recipe.micro_batch} doesn't divide a device's share of {share}")
        try:
            check_loader(source, loader_config(recipe, stage), 0, stage.samples, device.world)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def check_positive(where: str, values: Mapping[str, float | None]) -> None:
    """Raise UserError that names the first of `values` which isn't a positive number; None is skipped."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{where}: {name} is {value}: set a positive number")


def model_at(recipe: Recipe, stage: Stage) -> ModelConfig:
    """The recipe's model at a stage's image size, context length and position embedding."""
    model = recipe.model
    image = replace(model.image, image_size=stage.image_size, position=stage.position or model.image.position)
    return replace(model, image=image, text=replace(model.text, context_length=stage.context_length))


def preprocess_at(recipe: Recipe, stage: Stage) -> Preprocess:
    """How images are prepared when the stage's model is evaluated."""
    return Preprocess(size=stage.image_size, mean=recipe.mean, std=recipe.std)


def patch_grid(recipe: Recipe, stage: Stage) -> tuple[int, int]:
    """Rows and columns of patches in a stage. Raises UserError for a model that can't be built."""
    # The tower itself knows best; on the meta device it takes no memory.
    with torch.device("meta"):
        return CLIP(model_at(recipe, stage)).image.grid


def loader_config(recipe: Recipe, stage: Stage) -> LoaderConfig:
    """What the loader needs to know of a stage."""
    return LoaderConfig(
        image_size=stage.image_size,
        augmentation=stage.augmentation,
        context_length=stage.context_length,
        text_reduction=stage.text_reduction,
        image_reduction=stage.image_reduction,
        image_keep=stage.image_keep,
        grid=patch_grid(recipe, stage),
        batch_size=stage.batch_size,
        seed=recipe.seed,
        block_size=recipe.block_size,
        max_bad=recipe.max_bad,
    )
