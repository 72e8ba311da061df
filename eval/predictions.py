"""Every guess of an evaluation, kept for looking at: which image was taken for what, and how sure the model was.

All images have a row; a seeded random sample of them carries a small copy of the picture.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.errors import UserError
from clipkit.pixels.images import thumbnail
from clipkit.storage.files import write_beside

if TYPE_CHECKING:
    from clipkit.eval.task import Task
    from clipkit.eval.zeroshot import Guesses

SEED = 0
PICTURES = 400
PICTURE_PIXELS = 128


class Thumbnails:
    """Keeps the encoded images of a random sample of the places 0..total-1, seeded, so the same each time."""

    def __init__(self, total: int) -> None:
        chosen = np.random.default_rng(SEED).choice(total, size=min(PICTURES, total), replace=False)
        self.chosen = frozenset(chosen.tolist())
        self.images: dict[int, bytes] = {}

    def take(self, place: int, data: bytes) -> None:
        """Keep `data` if its place is in the sample."""
        if place in self.chosen:
            self.images[place] = data


def rows(task: "Task", guesses: "Guesses", pictures: Mapping[int, bytes]) -> list[dict[str, Any]]:
    """A row for each image in the order of the data: what it is, the best guesses, and for some the picture."""
    titles = task.classes.titles
    place_of = {int(index): row for row, index in enumerate(guesses.index_N)}
    listed = []
    for index, key in enumerate(task.images.keys):
        row = place_of.get(index)
        tops = guesses.top_NK[row].tolist() if row is not None else []
        listed.append(
            {
                "key": key,
                "label": titles[task.labels_N[index]],
                "correct": bool(tops and tops[0] == task.labels_N[index]),
                "guesses": [titles[number] for number in tops],
                "probabilities": guesses.probability_NK[row].tolist() if row is not None else [],
                "image": thumbnail(pictures[index], PICTURE_PIXELS) or None if index in pictures else None,
                "problem": task.unreadable.get(index),
            }
        )
    return listed


def write(path: Path, listed: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write rows as parquet, with `about` in the file's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("key", pa.string()),
            ("label", pa.string()),
            ("correct", pa.bool_()),
            ("guesses", pa.list_(pa.string())),
            ("probabilities", pa.list_(pa.float32())),
            ("image", pa.binary()),
            ("problem", pa.string()),
        ],
        metadata={"clipkit": json.dumps(dict(about))},
    )
    with write_beside(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(listed), schema=schema), temporary, compression="zstd")


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a predictions file and what it is about. Raises UserError when it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged: remove it and run zeroshot again") from error
    about = json.loads((table.schema.metadata or {}).get(b"clipkit", b"{}"))
    return table.to_pylist(), about
