"""What a recipe is: everything that decides what a run learns, as one frozen dataclass, and what its values may be.

The recipes themselves are in `catalogue`; `checks` holds them to a device and to data. Lengths are samples seen.
Nothing here imports torch, so that a recipe can be planned in a moment.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from clipkit.choices import CLIP_MEAN, CLIP_STD, ImageMethod, Interpolation, Precision, ResizeMode, TextMethod
from clipkit.errors import UserError
from clipkit.model.config import ImageConfig, ModelConfig, Position, TextConfig
from clipkit.train.augmentation import Augmentation

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
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """How `adamw` keeps the first moment between steps, as optax's `mu_dtype`: bfloat16 saves 2 bytes a weight."""
    momentum: float = 0.95
    """Muon's."""
    weight_decay: float = 0.2
    decay: Decay = "matrices"
    """What is decayed: `matrices` is every tensor of two or more dimensions, embeddings of tokens and positions
    included, as in OpenCLIP and CLIPA; `layers` leaves embeddings out."""
    grad_clip: float | None = None
    """The largest norm of all gradients together; None is off."""

    @property
    def state_bytes(self) -> int:
        """What is kept of each trained weight, at least: Muon has one number of a matrix, two of the rest."""
        numbers = {"adamw": 2, "stable_adamw": 2, "lion": 1, "muon": 1}[self.name]
        return 4 * numbers - (2 if self.mu_dtype == "bfloat16" else 0)


@dataclass(frozen=True)
class GlobalContrastive:
    """What `loss = "global_contrastive"` takes beside the pairs (FastCLIP; Wei et al., 2024)."""

    gamma: float = 0.2
    """The share of a batch in a record's running normaliser, at the end of its cosine from 1."""
    gamma_samples: int | None = None
    """The length of that cosine; None is half of the run."""
    eps: float = 1e-14
    """Is added to the normalisers: a larger one keeps pairs that are told apart well from being told apart further."""
    rho: float | None = None
    """FastCLIP-v3's, which learns the logit scale with the loss divided by it (6.5 to 16 in the paper); None is v0."""
    reference: bool = False
    """Count a pair by what it is worse at than with a reference model (DRRho; Wei et al., 2025), whose embeddings
    `clipkit reinforce` stored."""


@dataclass(frozen=True)
class Distill:
    """Learning from teachers whose embeddings `clipkit reinforce` stored (`clipkit.model.distill`)."""

    weight: float = 0.0
    """The share of the distillation in the loss; the contrastive loss has the rest. 0: no teachers."""
    scale: float | None = None
    """What teachers' cosines are multiplied by before a softmax, in place of each teacher's own logit scale."""


@dataclass(frozen=True)
class Cadence:
    """How often a run logs, saves and evaluates. It may be changed when a run is resumed."""

    log_samples: int = 65_536
    checkpoint_samples: int | None = None
    checkpoint_minutes: float | None = 20.0
    evaluate_samples: int | None = None
    keep_checkpoints: int = 2
    """The newest ones stay, and the last one of each stage."""
    keep_best: str | None = None
    """The metric of the evaluations by which the best checkpoint stays as well, such as `imagenet/top1`, or `top1`."""
    keep_every_samples: int | None = None
    """Every so many samples a checkpoint is saved that stays."""


@dataclass(frozen=True)
class Recipe:
    """A run from its first sample to its last."""

    name: str
    model: ModelConfig
    """The architecture; the stages give its image size and context length."""
    stages: tuple[Stage, ...]
    loss: Literal["info_nce", "sigmoid", "global_contrastive"] = "info_nce"
    global_contrastive: GlobalContrastive = field(default_factory=GlobalContrastive)
    same_caption: Literal["negative", "ignore", "positive"] = "ignore"
    """What a pair is whose caption equals another's in the batch: CLIP and CLIPA count it as a negative."""
    captions: Mapping[str, float] = field(default_factory=dict)
    """Which captions are trained on: the weight of each source, such as `original` and `synthetic`, of which one is
    drawn for each sample. A record that lacks a source draws among the others. Without any, the original ones alone."""
    distill: Distill = field(default_factory=Distill)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float | None = None
    """What the averages of the weights keep of themselves at each step, such as 0.9999; None keeps no averages."""
    micro_batch: int | Literal["auto"] | None = "auto"
    """Pairs that go through the towers at once on one device; None takes the whole batch, and `auto` on a GPU as many
    as fit (`train/fit`)."""
    checkpoint_activations: bool | Literal["auto"] = "auto"
    """Compute activations again in the backward pass: about a third more time for a fraction of the memory. `auto`
    does so where the whole batch fits no other way."""
    shard_weights: bool | Literal["auto"] = "auto"
    """Whether each rank holds only its part of the weights and of the optimizer's state (FSDP2); `auto` on GPUs
    and TPUs for models that would fill much of one."""
    compile: bool | Literal["auto"] = "auto"
    """Whether `torch.compile` makes one graph of a stage's towers; `auto` does so on GPUs."""
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
    def has_teachers(self) -> bool:
        """Whether it learns from stored embeddings of other models."""
        return bool(self.distill.weight) or (self.loss == "global_contrastive" and self.global_contrastive.reference)

    @property
    def samples(self) -> int:
        """The length of all stages together, in samples seen."""
        return sum(stage.samples for stage in self.stages)

    @property
    def gamma_samples(self) -> int:
        """The length of the cosine by which the share of a batch in the running normalisers falls."""
        return self.global_contrastive.gamma_samples or max(1, self.samples // 2)


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
    GlobalContrastive: {"gamma": Range(0, 1, open=True), "gamma_samples": COUNT, "eps": POSITIVE, "rho": NOT_NEGATIVE},
    Distill: {"weight": SHARE, "scale": POSITIVE},
    Cadence: {
        "log_samples": COUNT,
        "checkpoint_samples": COUNT,
        "checkpoint_minutes": POSITIVE,
        "evaluate_samples": COUNT,
        "keep_checkpoints": COUNT,
        "keep_every_samples": COUNT,
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
        "head_input": SIZE,
        "head_ratio": POSITIVE,
    },
    TextConfig: {
        "context_length": SIZE,
        "vocab_size": Range(0, 10_000_000, open=True),
        "width": SIZE,
        "depth": DEPTH,
        "heads": SIZE,
        "mlp_ratio": POSITIVE,
        "norm_eps": POSITIVE,
        "head_input": SIZE,
        "head_ratio": POSITIVE,
    },
}


def check_ranges(recipe: Recipe) -> None:
    """Raise UserError that names the first number of a recipe, a stage or the model that is out of its range."""
    check_numbers(recipe, f"recipe {recipe.name}")
    for stage in recipe.stages:
        where = f"recipe {recipe.name}, stage {stage.name}"
        check_numbers(stage, where)
        check_numbers(recipe.model, where, "model.")


def check_numbers(config: Any, where: str, prefix: str = "") -> None:
    """Raise UserError that names the first number in `config`, or in a configuration in it, that is out of its range.

    An Augmentation checks itself.
    """
    for name, allowed in RANGES[type(config)].items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else [value]:
            remedy = None if number in (None, "auto") else allowed.problem(number)
            if remedy:
                is_optional = type(None) in get_args(get_type_hints(type(config))[name])
                off = f", or none{' for off' if name == 'grad_clip' else ''}" if is_optional else ""
                raise UserError(f"{where}: {prefix}{name} is {number}: {remedy}{off}")
    for name, part in vars(config).items():
        if type(part) in RANGES and name != "model":  # which each stage changes
            check_numbers(part, where, f"{prefix}{name}.")


def model_at(recipe: Recipe, stage: Stage) -> ModelConfig:
    """The recipe's model at a stage's image size, context length and position embedding."""
    model = recipe.model
    image = replace(model.image, image_size=stage.image_size, position=stage.position or model.image.position)
    return replace(model, image=image, text=replace(model.text, context_length=stage.context_length))
