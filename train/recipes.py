"""What a recipe is: everything that decides what a run learns, as one frozen dataclass, and what its values may be.

The recipes themselves are in `catalogue`. Lengths are samples seen.
"""

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch

from clipkit.device import Device, Precision
from clipkit.errors import UserError
from clipkit.formatting import size_text
from clipkit.model.clip import CLIP
from clipkit.model.config import ImageConfig, ModelConfig, Position, TextConfig
from clipkit.model.flops import SampleCost, sample_cost
from clipkit.model.image_tower import make_image_tower
from clipkit.model.timm_tower import TimmTower
from clipkit.pixels.images import CLIP_MEAN, CLIP_STD, Interpolation, Preprocess, ResizeMode
from clipkit.text.tokenizer import WordTokenizer
from clipkit.text.tokens import ImageMethod, TextMethod
from clipkit.train.loader.augment import Augmentation
from clipkit.train.loader.loader import check_loader
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.sources.source import Examples, Source

Decay = Literal["matrices", "layers"]
Schedule = Literal["cosine", "constant", "inverse_sqrt"]


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
    """The learning rate rises over so many samples."""
    image_size: int
    """Side of the square input in pixels; a smaller image is the best way to reduce image tokens."""
    context_length: int
    """Text tokens, start and end included."""
    text_reduction: TextMethod = "truncate"
    image_reduction: ImageMethod | None = None
    """How patches are chosen when `image_keep` says to keep only some of them."""
    image_keep: int | None = None
    schedule: Schedule = "cosine"
    """How the learning rate goes on from its peak: `cosine` to zero at the end; `constant`; `inverse_sqrt` of the
    samples seen. A stage on one of the last two can be made longer while it runs."""
    cooldown_samples: int = 0
    """The learning rate falls to zero over the last so many samples, in a straight line; not with a cosine."""
    position: Position | None = None
    """The image tower's position embedding in this stage, where it isn't the model's own."""
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019) or another optimizer. The defaults are those of CLIPA's public scripts."""

    name: Literal["adamw", "stable_adamw", "lion", "muon"] = "adamw"
    """`stable_adamw` clips the update of each tensor; `muon` is for the matrices in blocks, and AdamW for the rest."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    momentum: float = 0.95
    """Muon's."""
    weight_decay: float = 0.2
    decay: Decay = "matrices"
    """What is decayed: `matrices` is every tensor of two or more dimensions, embeddings of tokens and positions
    included, as in OpenCLIP and CLIPA; `layers` leaves embeddings out."""
    grad_clip: float | None = None
    """The largest norm of all gradients together; None is off."""


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
    ema_decay: float | None = None
    """What the averages of the weights keep of themselves at each step, such as 0.9999; None keeps no averages."""
    micro_batch: int | None = None
    """Pairs that go through the towers at once on one device; None takes the whole batch."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: about a third more time for a fraction of the memory."""
    precision: Precision = "auto"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    """How evaluation resizes an image (`clipkit.pixels.images.Preprocess`)."""
    block_size: int = 256
    """Records read in one go by the shuffle (`clipkit.train.order`)."""
    max_bad: float = 0.01
    """Share of the records that may be broken before the run stops."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that isn't finite does, beside the diagnosis: `stop` ends the run; `skip` goes back to
    the newest checkpoint, and leaves out the data from the bad step to the next log line."""
    on_stuck_loss: Literal["stop", "warn"] = "stop"
    """What a loss does that stays at that of chance, for a thousand steps after the warm-up."""
    seed: int = 0
    cadence: Cadence = field(default_factory=Cadence)

    @property
    def samples(self) -> int:
        """The length of all stages together, in samples seen."""
        return sum(stage.samples for stage in self.stages)


# ---- What a recipe's numbers may be ----------------------------------------------------------------------------------


class Range(NamedTuple):
    """Which numbers a field takes: finite ones from `low`, or above it where it is `open`, to `high`."""

    low: float
    high: float = math.inf
    open: bool = False

    def problem(self, value: float) -> str | None:
        """What to do about a value that isn't among them."""
        if math.isfinite(value) and self.low <= value <= self.high and not (self.open and value == self.low):
            return None
        if self.open and not self.low < value < math.inf:
            return "set a positive number"
        if self.high == math.inf:
            return "set a number" if self.low == -math.inf else "set 0 or a positive number"
        return f"set at most {self.high:,}" if self.open else f"set a number from {self.low:,} to {self.high:,}"


ANY, POSITIVE, NOT_NEGATIVE, SHARE = Range(-math.inf), Range(0, open=True), Range(0), Range(0, 1)
SIZE, DEPTH, COUNT = Range(0, 1_000_000, open=True), Range(0, 1_000, open=True), Range(0, 2**62, open=True)
RANGES: dict[type, dict[str, Range]] = {
    Recipe: {
        "ema_decay": Range(0, 0.99999999),
        "micro_batch": COUNT,
        "mean": SHARE,
        "std": POSITIVE,
        "block_size": Range(0, 2**31, open=True),
        "max_bad": SHARE,
        "seed": Range(-(2**63), 2**64 - 1),
    },
    Stage: {
        "samples": COUNT,
        "batch_size": COUNT,
        "learning_rate": POSITIVE,
        "warmup_samples": NOT_NEGATIVE,
        "cooldown_samples": NOT_NEGATIVE,
        "image_size": Range(0, 16_384, open=True),
        "context_length": SIZE,
        "image_keep": SIZE,
    },
    OptimizerConfig: {
        "beta1": Range(0, 0.999999),
        "beta2": Range(0, 0.99999999),
        "eps": POSITIVE,
        "momentum": Range(0, 0.999999),
        "weight_decay": NOT_NEGATIVE,
        "grad_clip": POSITIVE,  # 0 would learn nothing, and a negative norm climbs the loss
    },
    Cadence: {
        "log_samples": COUNT,
        "checkpoint_samples": COUNT,
        "checkpoint_minutes": POSITIVE,
        "evaluate_samples": COUNT,
        "keep_checkpoints": COUNT,
    },
    # From 100 on the logit scale is held, and wouldn't learn.
    ModelConfig: {"embed_dim": SIZE, "logit_scale_init": Range(0, 100, open=True), "logit_bias_init": ANY},
    ImageConfig: {
        "image_size": SIZE,
        "patch_size": SIZE,
        "width": SIZE,
        "depth": DEPTH,
        "heads": SIZE,
        "mlp_ratio": POSITIVE,
        "layer_scale": POSITIVE,
        "norm_eps": POSITIVE,
    },
    TextConfig: {
        "context_length": SIZE,
        "vocab_size": Range(0, 10_000_000, open=True),
        "width": SIZE,
        "depth": DEPTH,
        "heads": SIZE,
        "mlp_ratio": POSITIVE,
        "norm_eps": POSITIVE,
    },
}


# Fields of an OptimizerConfig that these optimizers don't have.
UNUSED = {"adamw": ["momentum"], "stable_adamw": ["momentum"], "lion": ["eps", "momentum"], "muon": []}


def check_ranges(config: Any, where: str, prefix: str = "") -> None:
    """Raise UserError that names the first number in `config`, or in a configuration in it, that is out of its range.

    An Augmentation checks itself.
    """
    for name, allowed in RANGES[type(config)].items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else [value]:
            remedy = None if number is None else allowed.problem(number)
            if remedy:
                is_optional = type(None) in get_args(get_type_hints(type(config))[name])
                off = f", or none{' for off' if name == 'grad_clip' else ''}" if is_optional else ""
                raise UserError(f"{where}: {prefix}{name} is {number}: {remedy}{off}")
    for name, part in vars(config).items():
        if type(part) in RANGES and name != "model":  # which each stage changes
            check_ranges(part, where, f"{prefix}{name}.")


def check_recipe(recipe: Recipe, source: Source | Examples, device: Device) -> None:
    """Refuse what would fail only hours later. Raises UserError that names the stage and the field."""
    shards = device.shards
    if (recipe.loss == "sigmoid") != (recipe.model.logit_bias_init is not None):
        raise UserError("loss=sigmoid and a bias go together: set model.logit_bias_init=-10 with it, or neither")
    if recipe.micro_batch is not None and device.mesh is not None:
        raise UserError("micro_batch isn't for TPUs yet: unset it, and set checkpoint_activations=true to save memory")
    if recipe.optimizer.name != "adamw" and device.mesh is not None:
        raise UserError(f"optimizer.name={recipe.optimizer.name} isn't for TPUs yet: set optimizer.name=adamw")
    check_ranges(recipe, f"recipe {recipe.name}")
    for name in UNUSED[recipe.optimizer.name]:
        value, default = getattr(recipe.optimizer, name), getattr(OptimizerConfig(), name)
        if value != default:
            raise UserError(
                f"recipe {recipe.name}: optimizer.{name} is {value}, which {recipe.optimizer.name} doesn't use: "
                f"set its default {default}"
            )
    for stage in recipe.stages:
        where = f"recipe {recipe.name}, stage {stage.name}"
        check_ranges(stage, where)
        check_ranges(recipe.model, where, "model.")
        if stage.batch_size < 2 or stage.batch_size % shards:
            raise UserError(f"{where}: batch_size {stage.batch_size} can't be divided over {shards} devices")
        if stage.samples % stage.batch_size:
            near = max(1, round(stage.samples / stage.batch_size)) * stage.batch_size
            raise UserError(
                f"{where}: samples {stage.samples} is not a multiple of batch_size {stage.batch_size}: set {near}"
            )
        if not 0 <= stage.warmup_samples <= stage.samples:
            raise UserError(f"{where}: warmup_samples {stage.warmup_samples} is not between 0 and {stage.samples}")
        cooldown, after_warmup = stage.cooldown_samples, stage.samples - stage.warmup_samples
        if cooldown and (stage.schedule == "cosine" or cooldown > after_warmup):
            raise UserError(
                f"{where}: cooldown_samples {cooldown} needs schedule=constant or inverse_sqrt, and at most the "
                f"{after_warmup} samples after the warm-up"
            )
        if (stage.image_keep is None) != (stage.image_reduction is None):
            raise UserError(f"{where}: image_keep and image_reduction go together: set both or neither")
        share = stage.batch_size // shards
        if recipe.micro_batch is not None and share % recipe.micro_batch:
            raise UserError(f"{where}: micro_batch {recipe.micro_batch} doesn't divide a device's share of {share}")
        try:
            check_memory(recipe, stage, device.world)
            check_sizes(recipe, stage)
            check_loader(source, loader_config(recipe, stage), 0, stage.samples, device.world)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def check_tokenizer(recipe: Recipe, tokenizer: WordTokenizer) -> None:
    """Raise UserError where the text tower can't read the tokenizer's ids."""
    text = recipe.model.text
    if text.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"recipe {recipe.name}: model.text.vocab_size is {text.vocab_size}: the tokenizer {text.tokenizer} has "
            f"{tokenizer.vocab_size:,} ids; set {tokenizer.vocab_size} or more"
        )
    if text.pooling == "end" and text.tokenizer != "clip-bpe":
        raise UserError(
            f"recipe {recipe.name}: model.text.pooling=end needs the end token of clip-bpe: set "
            f"model.text.pooling=last for {text.tokenizer}"
        )


def takes_precomputed(recipe: Recipe, stage: Stage) -> bool:
    """Whether a stage takes the ids and word classes that a dataset holds: they are clip-bpe's."""
    return stage.text_reduction == "syntax" and recipe.model.text.tokenizer == "clip-bpe"


def check_memory(recipe: Recipe, stage: Stage, world: int) -> None:
    """Raise UserError where the model's weights, or one batch of images, are larger than this machine's memory."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in CLIP(model_at(recipe, stage)).parameters())
    images, pixels = stage.batch_size // world, stage.image_size**2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for what, size, remedy in (
        (f"the model's {weights:,} weights take", 4 * weights, "a smaller width or depth under model"),
        (f"a batch of {images:,} images of {stage.image_size} px takes", 3 * images * pixels, "a smaller batch_size"),
    ):
        if size > memory:
            raise UserError(f"{what} {size_text(size)}, and this machine has {size_text(memory)}: set {remedy}")


def check_sizes(recipe: Recipe, stage: Stage) -> None:
    """Raise UserError where a tower that isn't a vision transformer has other weights at this stage's image size."""
    first = recipe.stages[0]
    if stage.image_size == first.image_size:
        return
    with torch.device("meta"):
        towers = [make_image_tower(model_at(recipe, each).image) for each in (first, stage)]
    if isinstance(towers[0], TimmTower) and shapes(towers[0]) != shapes(towers[1]):
        raise UserError(f"{recipe.model.image.name} has other weights at other sizes: give all stages one image_size")


def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    """The shapes of a module's tensors by name."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def model_at(recipe: Recipe, stage: Stage) -> ModelConfig:
    """The recipe's model at a stage's image size, context length and position embedding."""
    model = recipe.model
    image = replace(model.image, image_size=stage.image_size, position=stage.position or model.image.position)
    return replace(model, image=image, text=replace(model.text, context_length=stage.context_length))


def preprocess_at(recipe: Recipe, stage: Stage) -> Preprocess:
    """How images are prepared when the stage's model is evaluated."""
    return Preprocess(stage.image_size, recipe.mean, recipe.std, recipe.interpolation, recipe.resize_mode)


def stage_cost(recipe: Recipe, stage: Stage) -> SampleCost:
    """What one sample of a stage costs."""
    return sample_cost(model_at(recipe, stage), stage.image_keep)


def patch_grid(recipe: Recipe, stage: Stage) -> tuple[int, int] | None:
    """Rows and columns of patches in a stage; None where the image tower has none.

    Raises UserError for an invalid model.
    """
    # The tower itself knows best; on the meta device it takes no memory.
    with torch.device("meta"):
        image = CLIP(model_at(recipe, stage)).image
    if not isinstance(image, TimmTower):
        return image.grid
    if stage.image_keep is not None:
        raise UserError(f"image_keep isn't for {image.config.name}: set it and image_reduction to none")
    return None


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
