"""Labelled images of any kind as one thing: keys and labels, and the encoded images in their order."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipkit.pixels.images import ImageError


@dataclass(frozen=True)
class LabelledImages:
    """The images to classify. `labels_N` are places in `label_names`; `read()` yields the N encoded images in order."""

    path: Path
    """Where they are, down to the split, and the label where it isn't `label`."""
    name: str
    """For results and file names: the data's name, its split where it has several, the label where it isn't `label`."""
    keys: list[str]
    labels_N: NDArray[np.int64]
    label_names: tuple[str, ...]
    """Of each label; two may have the same."""
    named: bool
    """False when the labels are bare numbers, for which no prompt can be made without a file of names."""
    are_numbers: bool
    """Whether numbers stand in the data, and no list of names."""
    read: Callable[[], Iterator[bytes | ImageError]]
    notes: tuple[str, ...] = ()
    """What else to know: files left aside, classes without images."""
    templates: Path | None = None
    """The file of templates that lies beside the images."""
    targets_NC: NDArray[np.bool_] | None = None
    """Where an image may have several labels or none: which. `labels_N` then is the first, or 0."""
    metadata: Sequence[bytes] | None = None
    """A `.npy` file for each image, of numbers such as the region that it is from."""
    files: Sequence[tuple[str, int]] = ()
    """The files that hold them, each with its bytes: two sets may have the same keys and labels."""

    def __len__(self) -> int:
        return len(self.keys)


def sizes_of(paths: Iterable[Path]) -> list[tuple[str, int]]:
    """Files as `LabelledImages` names them."""
    return [(path.name, path.stat().st_size) for path in paths]


def select(images: LabelledImages, keep_N: NDArray[np.bool_]) -> LabelledImages:
    """Some of the images."""
    keep = keep_N.tolist()
    return replace(
        images,
        keys=list(itertools.compress(images.keys, keep)),
        labels_N=images.labels_N[keep_N],
        read=lambda: itertools.compress(images.read(), keep),
        metadata=None if images.metadata is None else list(itertools.compress(images.metadata, keep)),
    )
