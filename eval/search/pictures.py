"""Images to embed, with their captions or their label, in a fixed order, readable from any place on."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from clipkit.errors import UserError
from clipkit.eval.classification.labelled import LabelledImages
from clipkit.eval.results import digest
from clipkit.pixels.images import ImageError

READ_TOGETHER = 64


class Picture(NamedTuple):
    """One encoded image, or why there is none, with what is said about it."""

    image: bytes | ImageError
    captions: tuple[str, ...] = ()
    label: str | None = None


@dataclass(frozen=True)
class Pictures:
    """`total` images: `read(first)` yields them from a place on, `key` names them, `identity` is their hash."""

    path: Path
    total: int
    key: Callable[[int], str]
    read: Callable[[int], Iterator[Picture]]
    identity: str
    captioned: bool
    """Whether they have captions; else they have labels."""


class CaptionedImage(Protocol):
    """An encoded image with its caption, or several."""

    @property
    def image(self) -> bytes | memoryview: ...

    @property
    def caption(self) -> str | Sequence[str]: ...


class CaptionedImages(Protocol):
    """Numbered pairs: what training reads from."""

    @property
    def num_records(self) -> int: ...

    def key(self, record: int, /) -> str: ...

    def pairs(self, records: Sequence[int], /) -> Iterator[Any]:
        """A CaptionedImage for each, or a UserError that says why there is none."""
        ...


def captioned_pictures(source: CaptionedImages, path: Path, identity: Any) -> Pictures:
    """The pairs of a source of training data."""

    def read(first: int) -> Iterator[Picture]:
        for start in range(first, source.num_records, READ_TOGETHER):
            for pair in source.pairs(range(start, min(start + READ_TOGETHER, source.num_records))):
                yield as_picture(pair)

    return Pictures(path, source.num_records, source.key, read, digest(identity), captioned=True)


def as_picture(pair: CaptionedImage | UserError) -> Picture:
    """A pair with its captions as a tuple, without empty ones."""
    if isinstance(pair, UserError):
        return Picture(ImageError(str(pair)))
    captions = (pair.caption,) if isinstance(pair.caption, str) else tuple(pair.caption)
    return Picture(bytes(pair.image), tuple(caption for caption in captions if caption.strip()))


def labelled_pictures(images: LabelledImages) -> Pictures:
    """Labelled images, as `zeroshot` takes them."""

    def read(first: int) -> Iterator[Picture]:
        labels = (images.label_names[number] for number in images.labels_N[first:].tolist())
        for image, label in zip(itertools.islice(images.read(), first, None), labels, strict=True):
            yield Picture(image, label=label)

    labels = [images.label_names[number] for number in images.labels_N.tolist()]
    identity = digest([images.keys, labels, images.files])
    return Pictures(images.path, len(images), images.keys.__getitem__, read, identity, captioned=False)
