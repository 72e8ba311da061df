"""What teachers said of each record: their embeddings of a few views of its image and of its captions.

A view is not stored: it is an augmentation whose random numbers follow from (seed, record, view), so that whoever cuts
it again gets the same crop, flip and colours. The embeddings are unit vectors, so that 8-bit integers in any scale say
all: the largest number becomes 127, and a vector is divided by its length when it is used. That moves a cosine by about
0.0005 at a width of 768 (tested); bfloat16 would take twice the room.

A folder of parts, each one array with a row for each of PART_RECORDS records in the dataset's own numbering, and
`reinforced.json`, which says what they were made of. A part is whole or absent. Each row has a checksum of the record,
so that a record that has changed since is noticed when it is read.

Nothing here may import torch: the loader's workers import it.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.config import differences, from_json, to_json
from clipkit.counter_rng import UInt64Array, bits, mix_int, sample_keys, uniform
from clipkit.errors import UserError
from clipkit.storage.files import allow_many_files, read_json
from clipkit.train.augmentation import Augmentation
from clipkit.train.order import Int64Array
from clipkit.train.sources.source import AroundSource, Pair, Source

PART_RECORDS = 16_384
MANIFEST = "reinforced.json"
VIEW, DRAWN_VIEW = 906, 907  # streams of random numbers
_VIEWS = 0x9FB21C651E98DF25  # any odd number

Int8Array = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Teacher:
    """A model as its embeddings depend on it."""

    name: str
    """As it was asked for."""
    weights: str
    """A hash."""
    width: int
    scale: float
    """The inverse of its temperature."""
    preprocessing: Mapping[str, Any]
    context_length: int
    precision: str
    towers: Mapping[str, Any] | None = None
    """What they are made of, beside the weights; None where the model isn't of clipkit's kind, and in older folders."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of stored embeddings was made of."""

    data: Mapping[str, Any]
    """What decides the numbering of the records (`OpenedSource.identity`)."""
    records: int
    teachers: tuple[Teacher, ...]
    augmentation: Augmentation
    views: int
    seed: int
    part_records: int = PART_RECORDS

    @property
    def width(self) -> int:
        """Of all teachers together."""
        return sum(teacher.width for teacher in self.teachers)

    @property
    def parts(self) -> int:
        return -(-self.records // self.part_records)

    def records_of(self, part: int) -> range:
        """The records of a part."""
        return range(part * self.part_records, min((part + 1) * self.part_records, self.records))

    def view_keys(self, records_B: npt.ArrayLike, views_B: npt.ArrayLike) -> UInt64Array:
        """The keys from which views of records take their random numbers, uint64[B]."""
        keys_BV = bits(sample_keys(mix_int(self.seed + _VIEWS), records_B), self.views, VIEW)
        return keys_BV[np.arange(len(keys_BV)), np.asarray(views_B)]

    def draw(self, keys_B: UInt64Array) -> Int64Array:
        """The view that each sample takes, by the sample's key."""
        return (uniform(keys_B, 1, DRAWN_VIEW)[:, 0] * self.views).astype(np.int64)

    def dtype(self, captions: int) -> np.dtype[Any]:
        """A row of a part whose records have up to so many captions."""
        image, text = (self.views, self.width), (captions, self.width)
        return np.dtype([("checksum", "<u4"), ("image", "i1", image), ("text", "i1", text)])

    def digest(self) -> str:
        """A hash of all of it but the teachers' names, which are paths."""
        value = to_json(self)
        for teacher in value["teachers"]:
            del teacher["name"]
            if teacher["towers"] is None:  # as in folders of an older clipkit
                del teacher["towers"]
        return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def part_path(folder: Path, part: int) -> Path:
    """Where a part is."""
    return folder / f"{part:06d}.npy"


def checksum(pair: Pair) -> int:
    """Of a record's image and captions."""
    return zlib.crc32("\0".join(pair.captions).encode(), zlib.crc32(pair.image))


def quantise(vector_NE: npt.NDArray[np.float32]) -> Int8Array:
    """Vectors as int8 whose largest number is 127 each."""
    largest_N1 = np.abs(vector_NE).max(axis=-1, keepdims=True)
    return np.rint(vector_NE * (127 / np.maximum(largest_N1, 1e-30))).astype(np.int8)


def read_stored(folder: Path) -> Manifest:
    """What a folder says that it was made of. Raises UserError where there is none."""
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} has no {MANIFEST}: make it with clipkit reinforce, or name its folder: --reinforced")
    return from_json(Manifest, read_json(folder / MANIFEST), str(folder / MANIFEST))


class Stored:
    """Stored embeddings, opened: read by several threads, and pickled for worker processes."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Raises UserError unless all parts are there."""
        self.folder, self.manifest = folder, manifest
        self._open: dict[int, npt.NDArray[Any]] = {}
        absent = [part for part in range(manifest.parts) if not part_path(folder, part).exists()]
        if absent:
            raise UserError(
                f"{folder} lacks {len(absent)} of {manifest.parts} parts: "
                "run the same clipkit reinforce again to finish it"
            )
        allow_many_files()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def check_data(self, identity: Mapping[str, Any]) -> None:
        """Raise UserError unless they are of these data."""
        other = differences(dict(self.manifest.data), dict(identity))
        if other:
            raise UserError(
                f"{self.folder} has teachers' embeddings of other data ({other[0]}): "
                "run clipkit reinforce on these data, into another folder"
            )

    def part(self, number: int) -> npt.NDArray[Any]:
        """The rows of a part, on the disk. Raises UserError where they aren't what the manifest says."""
        if number not in self._open:
            path, count = part_path(self.folder, number), len(self.manifest.records_of(number))
            try:
                rows = np.load(path, mmap_mode="r")
                fits = rows.shape == (count,) and rows.dtype == self.manifest.dtype(rows.dtype["text"].shape[0])
            except (OSError, ValueError, KeyError, IndexError):
                fits = False
            if not fits:
                raise UserError(f"{path} is damaged: remove it, and run the same clipkit reinforce again")
            self._open[number] = rows
        return self._open[number]

    def check_record(self, record: int, pair: Pair, key: str) -> None:
        """Raise UserError where a record isn't the one that the teachers saw."""
        number, row = divmod(record, self.manifest.part_records)
        if self.part(number)["checksum"][row] != checksum(pair):
            raise UserError(
                f"{key} has changed since {self.folder} was made: run clipkit reinforce again, into another folder"
            )

    def rows(self, records_B: Int64Array, views_B: Int64Array, captions_B: Int64Array) -> Int8Array:
        """int8[B, 2, E]: the teachers' embeddings of a view and of a caption of each record.

        Raises UserError for a record whose image couldn't be read when they were made.
        """
        found_B2E = np.empty((len(records_B), 2, self.manifest.width), np.int8)
        numbers_B, rows_B = np.divmod(records_B, self.manifest.part_records)
        for number in np.unique(numbers_B).tolist():
            of_part = np.flatnonzero(numbers_B == number)
            part = self.part(number)
            found_B2E[of_part, 0] = part["image"][rows_B[of_part], views_B[of_part]]
            found_B2E[of_part, 1] = part["text"][rows_B[of_part], captions_B[of_part]]
        absent_B = (found_B2E == 0).all(axis=2).any(axis=1)
        if absent_B.any():
            raise UserError(
                f"{self.folder} has no embeddings of record {records_B[absent_B][0]}, which couldn't be read then: "
                "run clipkit reinforce again, into another folder"
            )
        return found_B2E


class ReinforcedSource(AroundSource):
    """A source whose records have stored embeddings, and are checked to be those that they are of."""

    def __init__(self, source: Source, stored: Stored) -> None:
        super().__init__(source)
        self.stored = stored

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record, pair in zip(records, super().pairs(records), strict=True):
            if isinstance(pair, Pair):
                self.stored.check_record(record, pair, self.key(record))
            yield pair
