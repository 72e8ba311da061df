"""How long a sample takes on a chip: matrix products by their shapes, element-wise work by its bytes, the loss,
the optimizer, and what the chips send each other.

The towers are counted from their configuration, without torch; a test holds the operations to `model.flops`. The
numbers of `Calibration` are the only ones that were fitted, once for all (`docs/plan.md`).
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from clipkit.errors import UserError
from clipkit.hardware import Chip
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig, tower_dim

# Width, depth and MLP ratio of timm's vision transformers by the word in their names.
VITS = {
    "tiny": (192, 12, 4.0), "small": (384, 12, 4.0), "medium": (512, 12, 4.0), "base": (768, 12, 4.0),
    "large": (1024, 24, 4.0), "so400m": (1152, 27, 3.7362), "huge": (1280, 32, 4.0), "giant": (1408, 40, 48 / 11),
    "gigantic": (1664, 48, 64 / 13),
}  # fmt: skip

HOST = 8  # chips that share links; beyond them the network carries the gradients
NETWORK_GB = 200.0  # of a host, 10^9 bytes a second: 200 Gbit/s for each chip
BLOCK_BYTES, MLP_BYTES = 68, 8  # read and written by a block's forward pass for each token, per width and MLP width
STORED_BYTES = 50  # kept of a block for its backward pass, per token and width, where nothing is computed again
OPTIMIZER_BYTES = 44  # read and written of each weight in a step: gradients, moments, norms
OPTIMIZER_FLOPS = 16  # of each weight in a step
WEIGHT_BYTES = 12  # held of each weight beside the optimizer's state: itself, gradient, buckets
RESERVED = 0.08  # of the memory, for the allocator and the runtime


@dataclass(frozen=True)
class Calibration:
    """What no data sheet says."""

    matrix: float = 0.7
    """Share of the peak that a large matrix product reaches."""
    memory: float = 0.8
    """Share of the memory's bandwidth that element-wise work reaches."""
    half_width: float = 64.0
    """Of a matrix, at which a product reaches half of that share; a small product reaches less."""
    overhead: float = 0.1
    """Time on top: launches, waiting for data, evaluations and checkpoints."""


class Tower(NamedTuple):
    """A transformer by its numbers."""

    tokens: int
    width: int
    depth: int
    hidden: int
    """Width of the MLPs."""
    other: float
    """Forward operations of a sample outside the blocks: patches, projection, attention pooling."""
    weights: int
    frozen: bool
    head: int = 0
    """Weights of the head, which is trained where the rest is frozen too; they aren't among `weights`."""

    @property
    def trained(self) -> int:
        """The weights that are trained."""
        return self.head + (0 if self.frozen else self.weights)


class Parts(NamedTuple):
    """Something of a step by its parts."""

    image: float
    text: float
    loss: float
    optimizer: float
    recomputation: float
    collectives: float = 0.0


def towers_of(config: ModelConfig, image_keep: int | None) -> tuple[Tower, Tower]:
    """The image and the text tower at the configuration's sizes.

    Raises UserError for an image tower that isn't one of timm's plain vision transformers, and for patches that aren't
    in the image.
    """
    image, text = config.image, config.text
    match = re.fullmatch(r"vit_(\w+?)_patch(\d+)(?:_clip|_siglip)?(?:_quickgelu)?_\d+", image.name)
    if not match or match[1] not in VITS:
        raise UserError(f"plan knows vision transformers only, not {image.name}: time a few steps with clipkit train")
    width, depth, ratio = VITS[match[1]]
    width, depth = image.width or width, image.depth or depth
    hidden, patch = int(width * (image.mlp_ratio or ratio)), image.patch_size or int(match[2])
    grid, rest = divmod(image.image_size, patch)
    # vit_so400m_patch14_siglip_384 is published with 384 px, of which it doesn't see the last six.
    is_as_named = image.patch_size is None and image.name.endswith(f"_{image.image_size}")
    if (rest and not is_as_named) or not grid:
        near = " or ".join(str(each * patch) for each in (grid, grid + 1) if each)
        raise UserError(f"image_size {image.image_size} isn't a multiple of the patch size {patch}: take {near}")
    patches = image_keep or grid**2
    if patches > grid**2:
        raise UserError(f"can't keep {patches} of {grid**2} patches: choose 1 to {grid**2}")
    tokens = patches + int(image.class_token)
    other, weights = stem_cost(image, width, patch, grid)
    if image.pooling == "attention":
        matrices = 4 * width**2 + 2 * width * hidden
        other += 4.0 * patches * width**2 + 2.0 * (matrices - 2 * width**2) + 4.0 * patches * width
        weights += matrices
    projection = 0 if image.projection == "none" else width * tower_dim(image, config.embed_dim)
    weights += projection + depth * (4 * width**2 + 2 * width * hidden) + grid**2 * width
    picture = Tower(
        tokens,
        width,
        depth,
        hidden,
        other + 2.0 * projection,
        weights,
        image.frozen is True,
        head_weights(image, config),
    )
    hidden = int(text.width * text.mlp_ratio)
    projection = 0 if text.projection == "none" else text.width * tower_dim(text, config.embed_dim)
    weights = projection + text.depth * (4 * text.width**2 + 2 * text.width * hidden)
    weights += (text.vocab_size + text.context_length) * text.width
    frozen, head = text.frozen is True, head_weights(text, config)
    return picture, Tower(text.context_length, text.width, text.depth, hidden, 2.0 * projection, weights, frozen, head)


def head_weights(tower: ImageConfig | TextConfig, config: ModelConfig) -> int:
    """Those of a head's matrices."""
    width = tower_dim(tower, config.embed_dim)
    hidden = int(width * tower.head_ratio)
    matrices = {"none": 0, "linear": width * config.embed_dim, "mlp": hidden * (width + config.embed_dim)}
    return matrices.get(tower.head, hidden * (2 * width + config.embed_dim))


def stem_cost(image: ImageConfig, width: int, patch: int, grid: int) -> tuple[float, int]:
    """Forward operations and weights of what makes tokens of an image."""
    if image.stem == "patch":
        return 2.0 * grid**2 * 3 * patch**2 * width, 3 * patch**2 * width
    factors, rest = [], patch
    while rest > 1:
        factors.append(next(factor for factor in range(2, rest + 1) if rest % factor == 0))
        rest //= factors[-1]
    operations, weights, side, before = 0.0, 0, image.image_size, 3
    for number, factor in enumerate(factors):
        after, kernel = max(8, width >> (len(factors) - 1 - number)), max(3, factor)
        side //= factor
        operations += 2.0 * side**2 * kernel**2 * before * after
        weights += kernel**2 * before * after
        before = after
    return operations + 2.0 * grid**2 * before * width, weights + before * width


# ---- Operations and time ---------------------------------------------------------------------------------------------


def forward_operations(tower: Tower) -> float:
    """2 for each multiply-add of one sample's forward pass."""
    products = 2.0 * tower.tokens * (4 * tower.width**2 + 2 * tower.width * tower.hidden)
    return tower.depth * (products + 4.0 * tower.tokens**2 * tower.width) + tower.other


def forward_seconds(tower: Tower, chip: Chip, calibration: Calibration, is_float32: bool) -> float:
    """One sample's forward pass: products by their shapes, and everything between them by its bytes."""
    peak = product_rate(chip, calibration, is_float32)
    return product_seconds(tower, peak, calibration.half_width) + moving_seconds(tower, chip, calibration, is_float32)


def product_rate(chip: Chip, calibration: Calibration, is_float32: bool) -> float:
    """Operations a second of a large matrix product."""
    return (chip.float32_tflops if is_float32 else chip.tflops) * 1e12 * calibration.matrix


def moving_seconds(tower: Tower, chip: Chip, calibration: Calibration, is_float32: bool) -> float:
    """What norms, residuals and activations take of one sample's forward pass."""
    moved = tower.tokens * (BLOCK_BYTES * tower.width + MLP_BYTES * tower.hidden) * (1.5 if is_float32 else 1.0)
    return tower.depth * moved / (chip.bandwidth_gb * 1e9 * calibration.memory)


def product_seconds(tower: Tower, peak: float, half: float) -> float:
    """What matrix products take of one sample's forward pass; `half` as in `Calibration`."""
    tokens, width, hidden = tower.tokens, tower.width, tower.hidden
    block = 4.0 * tokens**2 * width / (peak * tokens / (tokens + 256))  # attention's small products
    for inner, outer in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
        block += 2.0 * tokens * (inner + half) * (outer + half) / peak
    return tower.depth * block + tower.other / (0.5 * peak)


@dataclass(frozen=True)
class Step:
    """One optimizer step on a number of chips."""

    towers: tuple[Tower, Tower]
    embed_dim: int
    image_size: int
    chip: Chip
    chips: int
    batch: int
    """Pairs over all chips."""
    recompute: bool
    is_float32: bool
    calibration: Calibration
    micro_asked: int | None = None
    state_bytes: int = 8
    """What the optimizer keeps of each trained weight: two moments in float32."""

    @property
    def share(self) -> int:
        """Pairs of one chip."""
        return -(-self.batch // self.chips)

    @property
    def weights(self) -> int:
        """Of both towers."""
        return sum(tower.weights + tower.head for tower in self.towers)

    @property
    def trained(self) -> int:
        """The weights that are trained."""
        return sum(tower.trained for tower in self.towers)

    def fixed_bytes(self) -> float:
        """Held by a chip whatever the micro-batch: weights, optimizer, the batch's images, features and logits."""
        state = (WEIGHT_BYTES + self.state_bytes) * self.trained + 4 * (self.weights - self.trained)
        logits = 3 * 4.0 * self.share * self.batch
        return state + logits + self.share * (3 * self.image_size**2 + 16 * self.embed_dim)

    def sample_bytes(self) -> float:
        """Held of each pair that goes through the towers at once."""
        held = 3 * self.image_size**2 * 6.0
        for tower in self.towers:
            block = STORED_BYTES * tower.tokens * tower.width
            held += block + 4.0 * tower.tokens * tower.width * tower.depth if self.recompute else block * tower.depth
        return held

    def micro_batch(self) -> int:
        """The most pairs that fit into the memory at once, a divisor of a chip's share; 0 if none do."""
        room = self.chip.memory_gb * 1e9 * (1 - RESERVED) - self.fixed_bytes()
        most = min(int(room / self.sample_bytes()), self.share)
        return next((size for size in range(most, 0, -1) if self.share % size == 0), 0)

    def operations(self) -> Parts:
        """Of one step over all chips; recomputation is what memory is saved by."""
        forward = [
            self.batch * (forward_operations(tower) * (1 if tower.frozen else 3) + 3 * 2.0 * tower.head)
            for tower in self.towers
        ]
        logits = 2 * 2.0 * self.batch**2 * self.embed_dim
        again = self.batch * sum(
            forward_operations(tower) * self.extra_forwards() for tower in self.towers if not tower.frozen
        )
        return Parts(forward[0], forward[1], 3 * logits, OPTIMIZER_FLOPS * float(self.trained), again)

    def extra_forwards(self) -> int:
        """Forward passes beside the one: for activations, and for the features of a batch in micro-batches."""
        in_parts = self.micro_batch() < self.share or (self.micro_asked or self.share) < self.share
        return int(self.recompute) + int(in_parts)

    def seconds(self) -> Parts:
        """Of one step by part; the towers' parts are the forward and backward pass without recomputation."""
        chip, share = self.chip, self.share
        forward = [forward_seconds(tower, chip, self.calibration, self.is_float32) for tower in self.towers]
        rate, float32 = (product_rate(chip, self.calibration, each) for each in (self.is_float32, True))
        heads = [3 * 2.0 * tower.head / (0.5 * rate) for tower in self.towers]
        towers = [
            share * (each * (1 if tower.frozen else 3) + head)
            for each, tower, head in zip(forward, self.towers, heads, strict=True)
        ]
        again = [
            share * each * self.extra_forwards()
            for each, tower in zip(forward, self.towers, strict=True)
            if not tower.frozen
        ]
        bandwidth = chip.bandwidth_gb * 1e9 * self.calibration.memory
        loss = 12.0 * share * self.batch * self.embed_dim / float32 + 2 * 6 * 4.0 * share * self.batch / bandwidth
        parts = [*towers, loss, OPTIMIZER_BYTES * self.trained / bandwidth, sum(again), self.collective_seconds()]
        return Parts(*(part * (1 + self.calibration.overhead) for part in parts))

    def collective_seconds(self) -> float:
        """Averaging the gradients in a ring, and gathering the features; nothing is hidden behind computing."""
        if self.chips == 1:
            return 0.0
        link = min(self.chip.link_gb, NETWORK_GB if self.chips > HOST else self.chip.link_gb) * 1e9
        around = (self.chips - 1) / self.chips
        return around * (2 * 4.0 * self.trained + 2 * 2 * 4.0 * self.batch * self.embed_dim) / link
