"""A model with all that it takes to embed images and texts: the one face behind which every model is used.

What is most often wrong in published comparisons is not the model but what goes with it: the activation, the resize
mode, the mean, the tokenizer, the context length. So they travel together here, and nobody names them a second time.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipkit.config import differences, from_json, to_json
from clipkit.device import Device, Precision
from clipkit.errors import UserError
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.pixels.images import Preprocess, normalise

if TYPE_CHECKING:
    from clipkit.model.clip import CLIP
    from clipkit.model.text_tower import Prefixes
    from clipkit.storage.cache import BlockCache

T = TypeVar("T")
R = TypeVar("R")


class TextTokenizer(Protocol):
    """Texts to ids. `WordTokenizer` is one; other packages' are wrapped."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def specials(self) -> int:
        """How many ids a text has beside its own."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without specials, not cut."""
        ...

    def rows(self, encoded: Sequence[list[int]], context_length: int) -> NDArray[np.int32]:
        """int32[B, context_length]: the same with specials, cut and padded."""
        ...


class Towers(Protocol):
    """What an encoder asks of a model, an `nn.Module`: ours, or a thin layer over another package's."""

    @property
    def logit_scale(self) -> Tensor:
        """The natural logarithm of the factor."""
        ...

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """float[B, 3, S, S] normalised pixels -> unit float32[B, E]."""
        ...

    def encode_text(self, ids_BT: Tensor) -> Tensor:
        """int[B, T] -> unit float32[B, E]."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...
    def train(self, mode: bool = True) -> Self: ...
    def to(self, device: torch.device) -> Self: ...
    @property
    def training(self) -> bool: ...


@dataclass(frozen=True)
class Compute:
    """Where and how embeddings are computed, and which part of the work is whose."""

    device: Device
    precision: Precision | None = None
    """The towers' arithmetic; None takes the encoder's."""
    batch_size: int = 256
    progress: Callable[[int], None] | None = None
    """Told how many images are done."""
    cache: "BlockCache | None" = None
    """Where embeddings are kept, and looked for first."""
    check: Callable[[], None] | None = None
    """Called before each batch, on all ranks together; what it raises ends the work."""

    @property
    def at_once(self) -> int:
        """How many batches are worked on in a round: one on each rank, or one on all of them together."""
        return 1 if self.device.shares_batches else self.device.world

    @property
    def own_cache(self) -> "BlockCache | None":
        """The cache, where a rank that finds a batch in it leaves none waiting that doesn't."""
        return None if self.device.shares_batches else self.cache

    def own_numbers(self, count: int) -> list[int]:
        """Of `count` batches, the number of the one that this rank works on in each round."""
        own = self.device.rank % self.at_once
        return [min(first + own, count - 1) for first in range(0, count, self.at_once)]

    def deal(self, count: int, begin: Callable[[range, int], T], work: Callable[[T], R]) -> Iterator[R]:
        """The results of batches 0 to `count` - 1, which are dealt to the ranks in turn: all of them on every rank, in
        order. The batches are those of one process, so whatever follows from the results is the same too.

        In each round every rank works on one batch: `begin` gets the numbers of the round's batches and this rank's own
        among them, a round ahead, and `work` gets what `begin` returned. In the last round there may be fewer batches
        than ranks; those left over do the last batch too, for a model whose weights are sharded needs all ranks in each
        forward pass. What is raised on one rank is raised on all. Raises UserError where ranks count other batches.
        """
        device = self.device
        if len(set(device.gather(count))) > 1:
            raise UserError("the ranks don't see the same data: give the processes of all machines the same files")
        own, begun = iter(self.own_numbers(count)), list[T]()

        def step(numbers: range) -> list[R]:
            if numbers:
                begun.append(begin(numbers, next(own)))
            return [work(begun.pop(0))] if len(begun) > bool(numbers) else []

        before = range(0)
        for first in range(0, count + self.at_once, self.at_once):
            if self.check is not None:
                self.check()
            numbers = range(first, min(first + self.at_once, count))
            for found in device.gather_results(partial(step, numbers))[: len(before)]:
                yield from found
            before = numbers


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model, its tokenizer, its preprocessing, and what is known about it.

    `fixed_length` says that a text's padding reaches its embedding, so that batches can't be cut to their longest text.
    """

    model: Towers
    tokenizer: TextTokenizer
    preprocess: Preprocess
    context_length: int
    fixed_length: bool = True
    precision: Precision = "auto"
    """The arithmetic that it was trained for."""
    name: str = ""
    """As it was asked for."""
    path: Path | None = None
    """Its folder or file, where it has one."""
    origin: str = "clipkit"
    """Whose code runs, and whose weights they are: `clipkit`, `clipkit (OpenCLIP's weights)`, `transformers` …"""
    samples_seen: int = 0
    """What it was trained on, where known."""
    activation: str = ""
    """What stands between the layers of its MLPs, where known: it isn't in the weights."""
    notes: tuple[str, ...] = ()
    """What a user should know: weights of another activation, an assumption."""

    def to(self, device: torch.device) -> "Encoder":
        """The same on a device."""
        return replace(self, model=self.model.to(device))

    @property
    def summary(self) -> str:
        """One line: what the model is, whose code and weights, and all that its numbers depend on beside those."""
        how = self.preprocess
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (how.mean, how.std))
        parts = [
            *(self.origin, f"{how.size} px", how.resize_mode, how.interpolation, f"mean {mean}", f"std {std}"),
            *(f"tokenizer {self.tokenizer.name}", f"{self.context_length} text tokens", self.activation),
        ]
        return f"model {self.name}: {', '.join(part for part in parts if part)}"

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by before a softmax, at most 100."""
        return self.model.logit_scale.detach().float().exp().clamp(max=100.0)

    @cached_property
    def weights(self) -> str:
        """A hash of all weights: two encoders with the same give the same embeddings, other settings being equal."""
        return weights_hash(self.model.state_dict())

    @cached_property
    def architecture(self) -> str:
        """What else decides about the embeddings: the same weights may run with another activation or pooling."""
        return f"{getattr(self.model, 'config', None)!r} {self.model!r}"

    @cached_property
    def computation(self) -> str:
        """A hash of what the same weights may run with and give other numbers: the architecture, and how texts become
        ids, by those of a text with capitals, punctuation and an underscore.
        """
        encoded = self.tokenizer.encode(["A photo of the Quick_brown fox, it's jumping (over 13 lazy dogs)!"])
        ids_1T = self.tokenizer.rows(encoded, self.context_length)
        how = f"{self.architecture} {self.tokenizer.name} {ids_1T.tolist()}"
        return hashlib.blake2b(how.encode(), digest_size=8).hexdigest()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode, and back into its own afterwards."""
        training = self.model.training
        self.model.train(False)
        try:
            yield
        finally:
            self.model.train(training)

    @torch.no_grad()
    def image_features(self, image_BHWC: Tensor, compute: Compute) -> Tensor:
        """uint8[B, S, S, 3] on the device -> unit float32[B, E] there."""
        with compute.device.autocast(compute.precision or self.precision):
            return self.model.encode_image(normalise(image_BHWC, self.preprocess.mean, self.preprocess.std)).float()

    @torch.no_grad()
    def text_features(self, ids_BT: Tensor, compute: Compute) -> Tensor:
        """int32[B, T] on the device -> unit float32[B, E] there."""
        with compute.device.autocast(compute.precision or self.precision):
            return self.model.encode_text(ids_BT).float()

    @torch.no_grad()
    def prefix_features(self, prefixes: "Prefixes", compute: Compute) -> Tensor:
        """The same of texts by their beginnings, where their length isn't fixed, which is so only of clipkit's CLIP."""
        with compute.device.autocast(compute.precision or self.precision):
            return cast("CLIP", self.model).encode_prefixes(prefixes).float()


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all of some tensors, by their names."""
    content = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().cpu().contiguous()
        content.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        content.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def tower_weights(tensors: Mapping[str, Tensor], tower: str, head: bool = True) -> str | None:
    """A hash of the weights that an image's vector depends on (`tower` image) or a text's (text), out of those of a
    model of clipkit's, without a `head` those before it; None for other models.
    """
    parts = (f"{tower}.", f"{tower}_projection.", *([f"{tower}_head."] if head else []))
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
    return weights_hash(found) if found else None


# What decides about a tower's vectors and isn't in its weights, beside the number of heads and fixed positions.
KINDS = ("act", "norm_eps", "pooling", "causal")


def towers_of(encoder: Encoder) -> dict[str, Any] | None:
    """What the towers of a model of clipkit's are made of; None for others."""
    config = getattr(encoder.model, "config", None)
    return {"image": to_json(config.image), "text": to_json(config.text)} if isinstance(config, ModelConfig) else None


def other_towers(made: Mapping[str, Any] | None, asked: Mapping[str, Any] | None) -> str:
    """In what a model differs from one of the same weights, by what `towers_of` says of both; "" for nothing, or where
    it doesn't say.
    """
    if not made or not asked:
        return ""
    kinds: dict[str, type[ImageConfig | TextConfig]] = {"image": ImageConfig, "text": TextConfig}
    for tower, kind in kinds.items():
        other = other_kind(*(from_json(kind, each[tower], f"the {tower} tower") for each in (made, asked)))
        if other:
            return f"{tower} tower, {other}"
    return ""


def other_kind(made: ImageConfig | TextConfig, asked: ImageConfig | TextConfig) -> str:
    """In what a tower that is `asked` for computes otherwise with the weights of one that was `made`; "" for nothing.

    Learned positions are among the weights.
    """
    ours, theirs = kind_of(made), kind_of(asked)
    if theirs.get("position") == "learnable":
        del ours["position"], theirs["position"]
    return next(iter(differences(ours, theirs)), "")


def kind_of(config: ImageConfig | TextConfig) -> dict[str, Any]:
    """What decides about a tower's vectors and isn't in its weights."""
    from clipkit.model.image_tower import make_image_tower
    from clipkit.model.timm_tower import TimmTower

    kind = {name: getattr(config, name) for name in KINDS if hasattr(config, name)}
    if isinstance(config, TextConfig):
        return kind | {"heads": config.heads}
    with torch.device("meta"):
        tower = make_image_tower(config)
    heads = {} if isinstance(tower, TimmTower) else {"heads": tower.trunk.blocks[0].attn.num_heads}
    return kind | heads | {"position": config.position}


def check_finite(vectors_NE: Tensor) -> Tensor:
    """The same. Raises UserError where a value is NaN or infinite."""
    if not torch.isfinite(vectors_NE).all():
        raise UserError("the model gives NaN: its weights are broken; take an earlier checkpoint")
    return vectors_NE


def clip_encoder(model: "CLIP", tokenizer: TextTokenizer, preprocess: Preprocess, **about: Any) -> Encoder:
    """An encoder of clipkit's own model; `about` are further fields."""
    return Encoder(
        model,
        tokenizer,
        preprocess,
        context_length=model.config.text.context_length,
        fixed_length=model.text.fixed_length,
        activation=" and ".join(dict.fromkeys((model.config.image.act, model.config.text.act))),
        **about,
    )
