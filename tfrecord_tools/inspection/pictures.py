"""What the pictures of a sample are like: sizes, formats, and which of them are the same."""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipkit.pixels.images import ImageError, decode, header_size
from clipkit.pixels.phash import SAME_PICTURE, perceptual_hash_of
from clipkit.tfrecord_tools.inspection.histogram import Histogram, histogram_of
from clipkit.tfrecord_tools.pictures.sniff import image_format

# Comparing each with each takes the square of their number; so many take half a minute.
MOST_COMPARED = 20_000
GROUPS = 6
# Pictures of one colour, which say nothing about each other (see `phash`).
PLAIN = (0, 1 << 63)
_ROWS = 256


@dataclass(frozen=True)
class Group:
    """Records with the same picture: how many, and the places of the first of them in the dataset."""

    count: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class PictureFacts:
    """Pictures of `read` records. Sides are in pixels as stored, `bytes` of the encoded picture, aspect is width by
    height.

    `repeated` counts records whose picture's bytes come again. Of the first `compared` pictures with different bytes,
    `alike` have another beside them whose perceptual hash differs in at most `distance` of 64 bits.
    """

    column: str
    read: int
    unreadable: int
    first_unreadable: str
    shorter_side: Histogram | None
    aspect: Histogram | None
    bytes: Histogram | None
    formats: dict[str, int]
    repeated: int
    same: tuple[Group, ...]
    compared: int
    distance: int
    alike: int
    near: tuple[Group, ...]


class Pictures:
    """Takes the pictures of a sample one by one and keeps a few numbers of each."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.places: list[int] = []
        self.digests: list[bytes] = []
        self.hashes: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.bytes: list[int] = []
        self.formats: Counter[str] = Counter()
        self.unreadable = 0
        self.first_unreadable = ""

    def add(self, place: int, data: bytes) -> None:
        """Look at the picture of the record at `place`."""
        self.bytes.append(len(data))
        self.formats[image_format(data) or "unknown"] += 1
        try:
            size = header_size(data) or decode(data).shape[:2]
            value = perceptual_hash_of(data)
        except ImageError as error:
            self.unreadable += 1
            self.first_unreadable = self.first_unreadable or f"record {place:,}: {error}"
            return
        self.places.append(place)
        self.sizes.append((int(size[0]), int(size[1])))
        self.hashes.append(value)
        self.digests.append(hashlib.sha256(data).digest())

    def facts(self) -> PictureFacts:
        """All that was seen, put together."""
        by_digest: dict[bytes, list[int]] = {}
        for place, digest in zip(self.places, self.digests, strict=True):
            by_digest.setdefault(digest, []).append(place)
        same = [places for places in by_digest.values() if len(places) > 1]
        alike, near, compared = self._near()
        return PictureFacts(
            column=self.column,
            read=len(self.bytes),
            unreadable=self.unreadable,
            first_unreadable=self.first_unreadable,
            shorter_side=histogram_of([min(size) for size in self.sizes], whole=True),
            aspect=histogram_of([width / height for height, width in self.sizes if height]),
            bytes=histogram_of(self.bytes, whole=True),
            formats=dict(self.formats.most_common()),
            repeated=sum(map(len, same)),
            same=_largest(same),
            compared=compared,
            distance=SAME_PICTURE,
            alike=alike,
            near=_largest(near),
        )

    def _near(self) -> tuple[int, list[list[int]], int]:
        """How many pictures have one alike of other bytes, groups of such, and how many were compared."""
        first: dict[bytes, int] = {}
        for number, digest in enumerate(self.digests):
            if self.hashes[number] not in PLAIN:
                first.setdefault(digest, number)
        numbers = list(first.values())[:MOST_COMPARED]
        hashes = np.array([self.hashes[number] for number in numbers], np.uint64)
        near = neighbours(hashes, SAME_PICTURE)
        groups: list[list[int]] = []
        left = {number: set(others) for number, others in near.items()}
        while left and len(groups) < GROUPS:
            # The picture that most others are like, with these, then the next among the rest.
            best = max(left, key=lambda number: (len(left[number]), -number))
            group = sorted({best, *left[best]})
            groups.append([self.places[numbers[number]] for number in group])
            left = {number: others - set(group) for number, others in left.items() if number not in group}
            left = {number: others for number, others in left.items() if others}
        return len(near), groups, len(numbers)


def neighbours(hashes: npt.NDArray[np.uint64], distance: int) -> dict[int, list[int]]:
    """For each hash that has any, the others within so many bits, by number."""
    found: dict[int, list[int]] = {}
    for start in range(0, len(hashes), _ROWS):
        rows = hashes[start : start + _ROWS]
        close = np.bitwise_count(rows[:, None] ^ hashes[None, :]) <= distance
        close[np.arange(len(rows)), np.arange(start, start + len(rows))] = False
        for row, other in zip(*(axis.tolist() for axis in np.nonzero(close)), strict=True):
            found.setdefault(start + row, []).append(other)
    return found


def _largest(groups: list[list[int]]) -> tuple[Group, ...]:
    ordered = sorted(groups, key=lambda places: (-len(places), places))
    return tuple(Group(len(places), tuple(places[:GROUPS])) for places in ordered[:GROUPS])
