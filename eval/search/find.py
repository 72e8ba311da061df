"""The images nearest to a vector, by cosine: of a file of vectors, or of a dataset that is embedded on the fly."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.embedding.encoder import Compute, check_finite
from clipkit.embedding.script import LoadedModel
from clipkit.embedding.vectors import ImageSet, embed_images
from clipkit.errors import UserError
from clipkit.eval.search.pictures import Picture, Pictures
from clipkit.eval.search.vectors import VectorFile, matrix_of
from clipkit.log import Progress
from clipkit.pixels.images import ImageError


@dataclass(frozen=True)
class Hit:
    """An image that was found. `said` are its captions or its label; `image` is its encoded self, where at hand."""

    record: int
    key: str
    similarity: float
    """The cosine, -1 to 1."""
    said: tuple[str, ...]
    image: bytes = b""


def query_vector(model: LoadedModel, text: str | None, image: Path | None) -> NDArray[np.float32]:
    """The unit vector of a text or an image. Raises UserError unless there is exactly one of them."""
    if (text is None) == (image is None):
        raise UserError("search by one thing: a text, or an image with --image")
    if text is not None and not text.strip():
        raise UserError("the query is blank: describe what to look for")
    return model.encode_image(image) if image is not None else model.encode_text(text or "")


def find_in_file(file: VectorFile, query_E: NDArray[np.float32], most: int) -> list[Hit]:
    """The `most` nearest rows of a file, best first, the earlier of equals first."""
    best: list[Hit] = []
    said = "captions" if file.about["captioned"] else "label"
    for first, table in file.groups(["key", "image", said]):
        rows = np.flatnonzero(~np.asarray(table["image"].is_null()))
        found_M = matrix_of(table["image"]) @ query_E
        best = nearest(
            best,
            (
                Hit(first + row, table["key"][row].as_py(), float(found_M[place]), texts_of(table[said][row].as_py()))
                for place, row in top(found_M, rows, most)
            ),
            most,
        )
    return best


def find_in_pictures(
    model: LoadedModel, pictures: Pictures, query_E: NDArray[np.float32], most: int, batch_size: int
) -> list[Hit]:
    """The same over images that are embedded now. Only the best images are held."""
    held: dict[int, Picture] = {}

    def read() -> Iterator[bytes | ImageError]:
        for place, picture in enumerate(pictures.read(0)):
            held[place] = picture
            yield picture.image

    keys = LazyKeys(pictures)
    images = ImageSet(pictures.path, keys, read, keep_pixels=False)
    best: list[Hit] = []
    with Progress(f"search {pictures.path.name}", pictures.total, "images") as progress, model.encoder.evaluating():
        compute = Compute(model.device, batch_size=batch_size, progress=progress.update)
        for index_B, image_BE in embed_images(model.encoder, images, compute):
            found_B = check_finite(image_BE.cpu()).numpy() @ query_E
            hits = (
                with_picture(Hit(record, keys[record], float(found_B[place]), ()), held[record])
                for place, record in top(found_B, index_B, most)
            )
            best = nearest(best, hits, most)
            for record in [record for record in held if record <= index_B[-1]]:
                del held[record]
    if not best:
        raise UserError(f"{pictures.path} has no image that can be read")
    return best


def top(found_N: NDArray[np.float32], record_N: NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """The places of the largest values, and the records there."""
    return [(int(place), int(record_N[place])) for place in np.argsort(-found_N, kind="stable")[:most]]


def nearest(best: Sequence[Hit], more: Iterable[Hit], most: int) -> list[Hit]:
    """The best of both."""
    return sorted([*best, *more], key=lambda hit: (-hit.similarity, hit.record))[:most]


def texts_of(said: list[str] | str | None) -> tuple[str, ...]:
    """Captions or a label as a file has them."""
    return tuple(said) if isinstance(said, list) else (said,) if said else ()


def with_picture(hit: Hit, picture: Picture) -> Hit:
    """A hit with its image and with what is said about it."""
    image = picture.image if isinstance(picture.image, bytes) else b""
    return replace(hit, image=image, said=picture.captions or texts_of(picture.label))


def with_pictures(hits: Sequence[Hit], pictures: Pictures) -> list[Hit]:
    """Hits in a file of vectors with their images, from the data that it was made of."""
    if pictures.captioned:
        return [with_picture(hit, next(pictures.read(hit.record))) for hit in hits]
    wanted = {hit.record for hit in hits}  # of labelled images each reading begins at the first
    coming = enumerate(itertools.islice(pictures.read(0), max(wanted) + 1))
    found = {record: picture for record, picture in coming if record in wanted}
    return [with_picture(hit, found[hit.record]) for hit in hits]


class LazyKeys(Sequence[str]):
    """The names of images, each made when it is asked for."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return self.pictures.total

    def __getitem__(self, place: Any) -> Any:
        return self.pictures.key(place)
