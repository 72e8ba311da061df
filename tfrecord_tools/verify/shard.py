"""What a worker of `clipkit verify` does: read one shard from end to end and say what is wrong with it.

One damaged record doesn't hide the next: only a damaged length ends the reading, for nothing says where a further
record would begin. Equal problems of a shard are told once, with their number and the place of the first.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.formats.features import Feature
from clipkit.formats.records import RecordError, check_contents, decode_example, read_framed
from clipkit.storage.files import local_copy
from clipkit.tfrecord_tools.verify.problems import FETCH, INDEX, PURGE, REBUILD, ProblemList, ShardReport

_TYPES: dict[str, type] = {"image": bytes, "text": bytes, "int": int, "bool": int, "label": int, "float": float}


@dataclass(frozen=True)
class ShardCheck:
    """What one worker is to check. None where the dataset says nothing.

    `index` is the file of the split's offsets with the place of this shard's first; `decode` are the numbers of the
    records whose images are decoded, None for all.
    """

    path: Path
    features: Mapping[str, Feature]
    records: int | None
    bytes: int | None
    crc32c: str | None
    index: tuple[Path, int] | None
    decode: tuple[int, ...] | None


def check_shard(check: ShardCheck) -> ShardReport:
    """Read the shard once and compare it with what the dataset says of it."""
    found = ProblemList(check.path.name)
    try:
        with local_copy(check.path) as local:
            return _check(check, local, found)
    except (FileNotFoundError, UserError) as error:
        # `local_copy` wraps what an object store says.
        if not isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        found.add("the shard is missing", "", FETCH)
        return ShardReport(0, 0, 0, found.all())


def _check(check: ShardCheck, local: Path, found: ProblemList) -> ShardReport:
    size = local.stat().st_size
    if check.bytes is not None and size != check.bytes:
        found.add(f"{size:,} bytes where the manifest says {check.bytes:,}", "", FETCH)
    columns = ColumnCheck(check.features)
    chosen = None if check.decode is None else set(check.decode)
    offsets: list[int] = []
    decoded, checksum = 0, 0
    try:
        for offset, framed in read_framed(local):
            checksum = google_crc32c.extend(checksum, framed)
            number = len(offsets)
            offsets.append(offset)
            place = f"record {number:,} at byte {offset:,}"
            try:
                values = decode_example(check_contents(framed, offset, local))
            except RecordError as error:
                found.add(error.reason, place, FETCH)
                continue
            except ValueError:
                found.add("a record isn't a tf.train.Example", place, FETCH)
                continue
            for what in columns.problems(values):
                found.add(what, place, REBUILD)
            if chosen is None or number in chosen:
                decoded += _decode(values, columns.images, place, found)
    except RecordError as error:
        found.add(error.reason, f"byte {error.offset:,}, and nothing behind it can be read", FETCH)
    # A damaged record shows in the checksum of the file as well: told once is enough.
    if check.crc32c is not None and not found.problems and f"{checksum:08x}" != check.crc32c:
        found.add("the checksum of the file isn't the manifest's, though every record is whole", "", FETCH)
    if check.records is not None and len(offsets) != check.records:
        found.add(f"{len(offsets):,} records where dataset_info.json says {check.records:,}", "", FETCH)
    elif check.index is not None:
        _check_index(check.index, np.array(offsets, np.uint64), found)
    return ShardReport(len(offsets), size, decoded, found.all())


class ColumnCheck:
    """Compares records with the columns that features.json declares."""

    def __init__(self, features: Mapping[str, Feature]) -> None:
        known = {name: feature for name, feature in features.items() if feature.kind in _TYPES}
        self.columns = [(name, feature, _TYPES[feature.kind]) for name, feature in known.items()]
        self.images = [name for name, feature in known.items() if feature.kind == "image" and not feature.is_list]

    def problems(self, values: Mapping[str, list[Any]]) -> list[str]:
        """One line for each column of a record that isn't as declared; [] for nearly all records."""
        found = []
        for name, feature, wanted in self.columns:
            items = values.get(name)
            if not items:
                if not feature.optional and not feature.is_list:
                    found.append(f"column {name!r} is missing and features.json doesn't call it optional")
                continue
            if len(items) > 1 and not feature.is_list:
                found.append(f"column {name!r} holds several values and features.json says one")
            if type(items[0]) is not wanted:
                found.append(f"column {name!r} holds {type(items[0]).__name__} and features.json says {feature.kind}")
            elif wanted is bytes and feature.kind == "text":
                try:
                    for item in items:
                        item.decode()
                except UnicodeDecodeError:
                    found.append(f"column {name!r} isn't UTF-8")
            elif feature.num_classes is not None and not all(-1 <= item < feature.num_classes for item in items):
                found.append(f"column {name!r} holds labels beyond its {feature.num_classes:,} classes")  # -1: none
        return found


def _decode(values: Mapping[str, list[Any]], columns: list[str], place: str, found: ProblemList) -> int:
    """Decode a record's images in full and return how many there were."""
    decoded = 0
    for image in (image for name in columns for image in values.get(name, []) if isinstance(image, bytes)):
        decoded += 1
        error = decoding_error(image)
        if error is not None:
            key = (values.get("key") or values.get("file_name") or [None])[0]
            text = key.decode("utf-8", "replace") if isinstance(key, bytes) else None
            found.add("an image can't be decoded", f"{place}{f', key {text}' if text else ''}: {error}", PURGE, text)
    return decoded


def decoding_error(image: bytes) -> str | None:
    """What the decoder says against an image, None where it decodes in full."""
    # Here and not above: the decoders take a second to load, and a check without them takes less.
    from clipkit.pixels.images import ImageError, decode

    try:
        decode(image)
    except ImageError as error:
        return str(error)
    return None


def _check_index(index: tuple[Path, int], offsets: npt.NDArray[np.uint64], found: ProblemList) -> None:
    path, first = index
    stored = read_index(path, first, len(offsets))
    if not np.array_equal(stored, offsets):
        wrong = int(np.argmin(stored == offsets)) if len(stored) == len(offsets) else 0
        found.add(f"{path.name} says other offsets than the file has", f"record {wrong:,}", INDEX)


def read_index(path: Path, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Some of the offsets of an index without reading the others, from a disk or a store."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(first * 8, io.SEEK_CUR)
        return np.frombuffer(file.read(count * 8), "<u8")
