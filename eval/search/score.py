"""How similar each image is to its caption, by any model: the table that `build-tfds --keep-best 0.3 --by` chooses by.

A row an image, in the order of the data: `key` as `build-tfds` reads it, `similarity`, the cosine of the two vectors,
null where there is none, and `problem`, the reason. The work is that of `embed`, part by part, without the vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipkit.errors import UserError
from clipkit.eval.search.embed import Form, write_file
from clipkit.eval.search.pictures import Picture, Pictures
from clipkit.formats.dataset import open_dataset
from clipkit.formats.kinds import own_name
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.formats.records import RecordError

KIND = "scores"
SCHEMA = pa.schema([("key", pa.string()), ("similarity", pa.float32()), ("problem", pa.string())])


@dataclass(frozen=True)
class ScoreSummary:
    """What `score` made; `mean` is that of the similarities, None where there are none."""

    path: Path
    records: int
    scored: int
    mean: float | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}

    def text(self) -> str:
        mean = "" if self.mean is None else f", {self.mean:.3f} on average"
        return f"{self.path}: similarities of {self.scored:,} of {self.records:,} images to their captions{mean}"


def score(
    pictures: Pictures,
    out: Path | None,
    source: str | Path,
    *,
    split: str = "train",
    **options: Any,
) -> ScoreSummary:
    """Write the similarities of all images and their captions into `out`, else beside the dataset's own files.

    `options` are those of `write_file`. Raises UserError for images without captions or with several, without `out` for
    what isn't a dataset directory, and what `write_file` raises.
    """
    if not pictures.captioned:
        raise UserError(f"{pictures.path} has no captions to compare its images with: name images with captions")
    pictures, folder = with_own_keys(pictures, split)
    if out is None and folder is None:
        raise UserError(f"{pictures.path} isn't a dataset directory: say with --out where to write the scores")
    out = out or (folder or Path()) / CLIPKIT_FOLDER / f"scores-{split}.parquet"
    found = write_file(pictures, out, source, Form(KIND, "score", lambda _: SCHEMA, score_table), **options)
    scored, total = 0, 0.0
    for _, table in found.groups(["similarity"]):
        there = table["similarity"].drop_null()
        scored, total = scored + len(there), total + (pc.sum(there).as_py() or 0.0)
    return ScoreSummary(out, found.rows, scored, total / scored if scored else None)


def with_own_keys(pictures: Pictures, split: str) -> tuple[Pictures, Path | None]:
    """The same under the keys by which `build-tfds` knows a dataset's records, with its folder; others as they are."""
    try:
        dataset = open_dataset(pictures.path, split)
    except UserError:
        return pictures, None
    name = own_name(dataset.features, "key")

    def key(place: int) -> str:
        try:
            own = dataset.example(place)[name] if name in dataset.features else None
        except RecordError:
            return dataset.key(place)
        shard, number = dataset.locate(place)
        return f"{dataset.shards[shard].file}-{dataset.offsets(shard)[number]}" if own is None else str(own)

    return replace(pictures, key=key), dataset.path


def score_table(
    schema: pa.Schema,
    keys: Sequence[str],
    pictures: Sequence[Picture],
    image_NE: NDArray[np.float32],
    text_ME: NDArray[np.float32],
    problems: Mapping[int, str],
) -> pa.Table:
    """Rows of a file. `text_ME` has a row for each picture with a caption. Raises UserError for several captions."""
    said = np.array([len(picture.captions) for picture in pictures])
    if (said > 1).any():
        place = int(said.argmax())
        raise UserError(
            f"{keys[place]} has {said[place]} captions, and a score is of one: make a dataset with one caption a "
            "record (build-tfds --captions)"
        )
    captioned_M = np.flatnonzero(said)
    similarity_N = np.zeros(len(keys), np.float32)
    similarity_N[captioned_M] = np.einsum("me,me->m", image_NE[captioned_M], text_ME)
    reasons = [problems.get(place) or (None if said[place] else "no caption") for place in range(len(keys))]
    absent = np.array([reason is not None for reason in reasons])
    columns = [pa.array(keys), pa.array(similarity_N, pa.float32(), mask=absent), pa.array(reasons, pa.string())]
    return pa.table(columns, schema=schema)
