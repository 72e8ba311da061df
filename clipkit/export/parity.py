"""How far an exported model is from ours, on embedded pictures and their names, run through the format's package."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipkit.embedded import emoji_parquet
from clipkit.embedding.encoder import Encoder
from clipkit.errors import InternalError, UserError
from clipkit.pixels.images import eval_transform, normalise, to_rgb

BOUND = 1e-4
"""Between unit vectors, in float32."""
COUNT = 24


@dataclass(frozen=True)
class Peer:
    """An exported model as its own package runs it. None: the format doesn't have it."""

    package: str
    image: Callable[[Tensor], Tensor]
    """float[B, 3, S, S] normalised -> [B, E]."""
    text: Callable[[Tensor], Tensor] | None = None
    """int64[B, T] -> [B, E]."""
    pixels: Callable[[Sequence[Image.Image]], Tensor] | None = None
    """Images through its own preprocessing, as `image` takes them."""
    ids: Callable[[Sequence[str]], Tensor] | None = None
    """Texts through its own tokenizer, as `text` takes them."""
    exact_pixels: bool = False
    """Its preprocessing resizes with Pillow, as ours."""


@dataclass(frozen=True)
class Parity:
    """The largest differences between unit vectors of the two."""

    target: str
    package: str
    images: int
    texts: int
    image: float
    """For the same pixels."""
    text: float | None
    """For the same ids."""
    image_own_preprocessing: float | None
    """For the same files, each with its own preprocessing."""
    text_own_tokenizer: float | None
    """For the same strings."""

    def to_json(self) -> dict[str, Any]:
        """For `parity.json`."""
        return vars(self)

    def text_report(self) -> str:
        """A line for each difference."""
        rows = [("images, same pixels", self.image), ("texts, same ids", self.text)]
        rows += [("images, its own preprocessing", self.image_own_preprocessing)]
        rows += [("texts, its own tokenizer", self.text_own_tokenizer)]
        head = f"largest difference from {self.package}, {self.images} images and {self.texts} texts:"
        return "\n".join([head, *(f"  {name}: {value:.1e}" for name, value in rows if value is not None)])


@torch.no_grad()
def measure(encoder: Encoder, peer: Peer, target: str) -> Parity:
    """Compare the two. Raises InternalError where they differ by more than BOUND, which rounding can't explain."""
    images, texts = real_samples(COUNT)
    pixels, ids = our_pixels(encoder, images), our_ids(encoder, texts)
    image_BE, text_BE = encoder.model.encode_image(pixels), encoder.model.encode_text(ids)
    own_pixels = None if peer.pixels is None else peer.pixels(images)
    own_ids = None if peer.ids is None else peer.ids(texts)
    found = Parity(
        target,
        peer.package,
        len(images),
        len(texts),
        difference(peer.image(pixels), image_BE),
        None if peer.text is None else difference(peer.text(ids.long()), text_BE),
        None if own_pixels is None else difference(peer.image(own_pixels), image_BE),
        None if own_ids is None or peer.text is None else difference(peer.text(own_ids), text_BE),
    )
    bound = [found.image, found.text, found.text_own_tokenizer]
    bound += [found.image_own_preprocessing] if peer.exact_pixels else []
    if not all(value is None or value <= BOUND for value in bound):
        raise InternalError(
            f"the model exported to {target} differs from ours by up to {max(value or 0 for value in bound):.1g} in "
            f"{peer.package}, so nothing was written: please report it with the checkpoint's config.json"
        )
    return found


def check_shapes(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], format: str) -> None:
    """Raise UserError where an image tower has other tensors than the one that a format would build."""
    shapes, wanted = ({name: tensor.shape for name, tensor in each.items()} for each in (own, theirs))
    wrong = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    if wrong:
        raise UserError(f"{format} and this model's image tower differ in {wrong[0]}")


def difference(one_BE: Tensor, other_BE: Tensor) -> float:
    """The largest between the unit vectors; NaN where one of them is."""
    return float((F.normalize(one_BE.float(), dim=-1) - other_BE).abs().max())


def our_pixels(encoder: Encoder, images: Sequence[Image.Image]) -> Tensor:
    """float32[B, 3, S, S] as `encode_image` takes them."""
    how = encoder.preprocess
    rows = [eval_transform(to_rgb(image), how.size, how.interpolation, how.resize_mode) for image in images]
    return torch.stack([normalise(torch.from_numpy(row.copy())[None], how.mean, how.std)[0] for row in rows])


def our_ids(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """int32[B, T] as `encode_text` takes them."""
    tokenizer = encoder.tokenizer
    return torch.from_numpy(tokenizer.rows(tokenizer.encode(texts), encoder.context_length))


def real_samples(count: int) -> tuple[list[Image.Image], list[str]]:
    """Embedded pictures on white that no model was trained on, and their short names."""
    import pyarrow.parquet as pq

    rows = pq.read_table(emoji_parquet("heldout")).slice(0, count).to_pylist()
    pictures = [Image.fromarray(to_rgb(Image.open(io.BytesIO(row["image"])))) for row in rows]
    return pictures, [row["label"] for row in rows]
