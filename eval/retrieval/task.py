"""Which caption is of which image: captioned images, ready for any model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from clipkit.embedding.encoder import Compute, Encoder
from clipkit.embedding.vectors import ImageSet, embed_images, tokenise, tokenised_matrix
from clipkit.errors import UserError
from clipkit.eval.evaluation import Outcome, cut_notes, unreadable_notes
from clipkit.eval.results import digest
from clipkit.eval.retrieval.captioned import CaptionedImages, open_captioned
from clipkit.eval.retrieval.ranks import Ranks, Vectors, best_matches, find_ranks
from clipkit.eval.retrieval.scores import retrieval_measures
from clipkit.formats.folders import printable
from clipkit.pixels.images import Preprocess, thumbnail

TEXTS_AT_ONCE = 65_536
# The examples of each direction that go with the ranks, with pictures.
SEED, EXAMPLES, SHOWN, PICTURE_PIXELS = 0, 100, 5, 128

GUESSES = pa.schema(
    [
        ("key", pa.string()),
        ("direction", pa.string()),
        ("caption", pa.string()),
        ("rank", pa.int64()),
        ("correct", pa.bool_()),
        ("guesses", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("right", pa.list_(pa.bool_())),
        ("image", pa.binary()),
        ("pictures", pa.list_(pa.binary())),
        ("problem", pa.string()),
    ]
)


class Retrieval:
    """Images and their captions, each to be found among all by the other."""

    kind = "retrieval"

    def __init__(self, data: CaptionedImages) -> None:
        self.data, self.name, self.notes = data, data.name, data.notes
        self.pictures = ImageSet(data.path, data.keys, data.read)

    def __len__(self) -> int:
        return len(self.data.keys)

    @property
    def path(self) -> Path:
        """Where the images are."""
        return self.data.path

    def hashes(self, preprocess: Preprocess) -> dict[str, str]:
        """Of captions, images and preprocessing."""
        return {
            "texts": digest(self.data.captions),
            "split": digest([self.data.keys, self.data.captions, self.pictures.content]),
            "preprocessing": digest(vars(preprocess)),
        }

    def measure(self, encoder: Encoder, compute: Compute, keep_guesses: bool = False) -> Outcome:
        """Recalls and median ranks in both directions. Raises UserError when the model gives NaN.

        An image that can't be read is left out with its captions. With `keep_guesses` there is a table with the rank
        of every image and caption, and for a seeded sample of them what was found.
        """
        found = rank_all(encoder, self, compute)
        notes = cut_notes(found.cut, "captions", encoder)
        notes += unreadable_notes(self.pictures, " and left out with all captions")
        return Outcome(
            retrieval_measures(found.ranks, found.image_of_C),
            unreadable=len(self.pictures.unreadable),
            notes=tuple(notes),
            guesses=guess_table(self, found, ranking_device(compute)) if keep_guesses else None,
        )


@dataclass(frozen=True, eq=False)
class Found:
    """The embeddings of N readable images and their C captions, and the ranks."""

    index_N: NDArray[np.int64]
    """The images' places in the data."""
    images: Vectors
    captions: list[str]
    texts: Vectors
    image_of_C: NDArray[np.int64]
    """The image of each caption, 0 to N - 1."""
    cut: int
    """Captions that lose words to the context length."""
    ranks: Ranks


@torch.no_grad()
def rank_all(encoder: Encoder, task: Retrieval, compute: Compute) -> Found:
    """Embed and rank everything. Raises UserError when no image can be read or the model gives NaN."""
    images, texts, places, cut = Vectors(), Vectors(), [], 0
    with encoder.evaluating():
        for index_B, image_BE in embed_images(encoder, task.pictures, compute):
            images.add(image_BE)
            places.append(index_B)
        if not places:
            raise UserError(f"{task.path} has no image that can be read")
        index_N = np.concatenate(places)
        captions = [task.data.captions[index] for index in index_N.tolist()]
        flat = [caption for of_image in captions for caption in of_image]
        for start in range(0, len(flat), TEXTS_AT_ONCE):
            tokenised = tokenise(flat[start : start + TEXTS_AT_ONCE], encoder.tokenizer, encoder.context_length)
            texts.add(tokenised_matrix(encoder, tokenised, compute))
            cut += tokenised.cut
    image_of_C = np.repeat(np.arange(len(captions)), [len(of_image) for of_image in captions])
    ranks = find_ranks(images, texts, image_of_C, ranking_device(compute))
    return Found(index_N, images, flat, texts, image_of_C, cut, ranks)


def ranking_device(compute: Compute) -> torch.device:
    """Where scores are compared: not where each shape of a tile is compiled."""
    return torch.device("cpu") if compute.device.static_shapes else compute.device.torch_device


def guess_table(task: Retrieval, found: Found, device: torch.device) -> pa.Table:
    """A row for each image and then each caption in the order of the data: its rank, and for a seeded sample the first
    answers, with small pictures.
    """
    keys, captions = [task.data.keys[index] for index in found.index_N.tolist()], found.captions
    own = found.image_of_C.tolist()
    first_N = np.searchsorted(found.image_of_C, np.arange(len(keys))).tolist()
    rows: dict[str, list[Any]] = {name: [None] * (len(keys) + len(captions)) for name in GUESSES.names}
    rows["key"] = [*keys, *(f"{keys[image]}#{caption - first_N[image]}" for caption, image in enumerate(own))]
    rows["direction"] = ["image to text"] * len(keys) + ["text to image"] * len(captions)
    rows["caption"][len(keys) :] = captions
    rows["rank"] = [*found.ranks.text_N.tolist(), *found.ranks.image_C.tolist()]
    rows["correct"] = [rank == 1 for rank in rows["rank"]]
    rng = np.random.default_rng(SEED)
    image_S, caption_S = (
        np.sort(rng.choice(total, min(EXAMPLES, total), replace=False)) for total in (len(keys), len(captions))
    )
    text_SK, text_score_SK = best_matches(rows_of(found.images, image_S, device), found.texts, SHOWN)
    image_SK, image_score_SK = best_matches(rows_of(found.texts, caption_S, device), found.images, SHOWN)
    shown = {*image_S.tolist(), *found.image_of_C[caption_S].tolist(), *image_SK.ravel().tolist()}
    picture = read_pictures(task, {int(found.index_N[number]): number for number in shown})
    for row, guess_K, score_K in zip(image_S.tolist(), text_SK.tolist(), text_score_SK.tolist(), strict=True):
        rows["guesses"][row] = [captions[guess] for guess in guess_K]
        rows["right"][row] = [own[guess] == row for guess in guess_K]
        rows["scores"][row], rows["image"][row] = score_K, picture.get(row)
    for caption, guess_K, score_K in zip(caption_S.tolist(), image_SK.tolist(), image_score_SK.tolist(), strict=True):
        row = len(keys) + caption
        rows["guesses"][row] = [keys[guess] for guess in guess_K]
        rows["right"][row] = [own[caption] == guess for guess in guess_K]
        rows["scores"][row], rows["image"][row] = score_K, picture.get(own[caption])
        rows["pictures"][row] = [picture.get(guess) for guess in guess_K]
    for index, reason in task.pictures.unreadable.items():
        for name in GUESSES.names:
            rows[name].append({"key": task.data.keys[index], "problem": reason}.get(name))
    return pa.table(rows, schema=GUESSES)


def rows_of(vectors: Vectors, places: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Some rows, float32[S, E] on a device."""
    return torch.cat([vectors.read(place, place + 1, device) for place in places.tolist()])


def read_pictures(task: Retrieval, wanted: dict[int, int]) -> dict[int, bytes]:
    """Small copies of the images at some places of the data, under the numbers that `wanted` gives them."""
    found: dict[int, bytes] = {}
    for place, data in enumerate(task.data.read()):
        if place in wanted and isinstance(data, bytes):
            found[wanted[place]] = thumbnail(data, PICTURE_PIXELS)
            if len(found) == len(wanted):
                break
    return found


def open_retrieval(
    data: Path, *, split: str | None = None, images: Path | None = None, name: str | None = None
) -> Retrieval:
    """Find the images and their captions; see `open_captioned`. No image is decoded yet."""
    task = Retrieval(open_captioned(data, split=split, images=images))
    task.name = printable(name or task.name)
    return task
