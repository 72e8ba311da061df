"""What `build-tfds` is asked for, and where its image shards are cut into stretches, one for each output shard.

The cuts are made once, by size, and kept while the build isn't finished: what a killed run has finished stays valid,
and so does everything that doesn't touch a shard that was fetched again.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.dataset import check_name
from clipkit.formats.shards import ALL_SPLITS
from clipkit.formats.tables import PairColumns
from clipkit.storage.files import is_remote, read_json, remove, write_json
from clipkit.tfrecord_tools.build.choose import Balance, Best
from clipkit.tfrecord_tools.build.dedup import Method
from clipkit.tfrecord_tools.build.prepare import Part, check_sizes
from clipkit.tfrecord_tools.readers.shards import InputShard, places_in, read_shard
from clipkit.tfrecord_tools.sample import Sample

# Some samples are looked at beforehand: what columns there are, and how much of the data will be left.
LOOK_SHARDS, LOOK_REMOTE_SHARDS, LOOK_SAMPLES = 8, 2, 32
LEAST_LEFT = 1 / 64


@dataclass(frozen=True)
class BuildOptions:
    """What decides which samples a dataset has, in which form and order."""

    shares: tuple[tuple[str, float], ...]
    where: str | None
    resize: int | None
    quality: int
    dedup: Method | None
    shuffle: int | None
    precompute: tuple[str, ...]
    columns: PairColumns
    keep_best: Best | None = None
    balance: Balance | None = None

    def __post_init__(self) -> None:
        """Raises UserError for options that don't go together."""
        check_sizes(self.resize, self.quality)
        if self.columns.captions == "each" and self.dedup in ("sha256", "phash"):
            raise UserError(
                f"--captions each makes several records of an image, and --dedup {self.dedup} keeps one: leave one out"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split, _ in self.shares)

    @property
    def gathered(self) -> bool:
        """Whether records leave the order in which they come."""
        return self.shuffle is not None or len(self.shares) > 1

    def to_json(self) -> dict[str, Any]:
        """The options that were given, for plan and manifest."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        values["columns"] = {name: value for name, value in values["columns"].items() if value is not None}
        if self.resize is None:
            del values["quality"]
        if not values["columns"]:
            del values["columns"]
        if len(self.shares) == 1:
            del values["shares"]
        as_read_back: dict[str, Any] = json.loads(json.dumps(values))
        return as_read_back


def parse_split(text: str) -> tuple[tuple[str, float], ...]:
    """`train`, or shares as in `train=0.99,validation=0.01`. Raises UserError for names that TFDS refuses, bad sums."""
    if text == ALL_SPLITS:
        return (("train", 1.0),)
    shares: list[tuple[str, float]] = []
    for each in text.split(","):
        name, given, share = each.strip().partition("=")
        check_name(name, "split")
        try:
            shares.append((name, float(share) if given else 1.0))
        except ValueError as error:
            raise UserError(f"--split {each}: {share!r} is not a share; give one such as 0.99") from error
    names = [name for name, _ in shares]
    if len(set(names)) < len(names):
        raise UserError(f"--split {text}: a split is named twice")
    if any(not 0 < share <= 1 for _, share in shares) or not math.isclose(sum(s for _, s in shares), 1, abs_tol=1e-6):
        raise UserError(f"--split {text}: the shares must add up to 1, as in train=0.99,validation=0.01")
    return tuple(shares)


def first_samples(shards: Sequence[InputShard]) -> list[Sample]:
    """The first samples of some shards, which are spread over all of them."""
    most = LOOK_REMOTE_SHARDS if is_remote(shards[0].path) else LOOK_SHARDS
    step = max(1, len(shards) // most)
    return [sample for shard in shards[::step][:most] for sample in islice(read_shard(shard), LOOK_SAMPLES)]


def cut(shards: Sequence[InputShard], wanted: float) -> list[tuple[int, int]]:
    """Where each stretch begins: (number of the shard, place in it), so that all have the same size, near `wanted`."""
    ends = list(accumulate(shard.size for shard in shards))
    total = ends[-1]
    count = max(1, round(total / wanted))
    inner: dict[int, list[int]] = {}
    for number in range(1, count):
        position = total * number // count
        i = min(bisect_right(ends, position), len(shards) - 1)
        inner.setdefault(i, []).append(position - (ends[i] - shards[i].size))
    return [(0, 0), *((i, place) for i, found in inner.items() for place in places_in(shards[i], found))]


def parts_between(shards: Sequence[InputShard], start: tuple[int, int], stop: tuple[int, int] | None) -> Iterator[Part]:
    """What lies between two cuts, None being the end of the line. Every place belongs to exactly one stretch."""
    last, end = (len(shards), 0) if stop is None else stop
    for i in range(start[0], min(last + 1, len(shards))):
        begin = start[1] if i == start[0] else 0
        if i < last:
            yield Part(shards[i], begin, None)
        elif begin < end:
            yield Part(shards[i], begin, end)


def plan(
    path: Path, shards: Sequence[InputShard], options: BuildOptions, shard_megabytes: float, left: float
) -> list[tuple[Part, ...]]:
    """The parts of each stretch, by a kept plan at `path` or a new one; `left` is the part of the bytes that stays.

    Raises UserError when the kept plan is of another build that has finished a shard.
    """
    asked = {
        "sources": [shard.path.name for shard in shards],
        "shard_megabytes": shard_megabytes,
        "options": options.to_json(),
    }
    kept = read_json(path) if path.exists() else None
    if kept is not None and kept["sources"] != asked["sources"]:
        raise _another(path, "from other shards")
    if kept is not None and {name: kept[name] for name in asked} != asked:
        if any(path.parent.glob("shard-*.json")):
            raise _another(path, "with other options or another shard size")
        kept = None  # no shard is finished, as when the first run was refused for want of the option that is given now
        for state in (*path.parent.glob("hashes-*.json"), *path.parent.glob("survey-*.json")):
            remove(state)
    if kept is not None:
        cuts = [(i, place) for i, place in kept["cuts"]]
    else:
        cuts = cut(shards, shard_megabytes * 1e6 / max(left, LEAST_LEFT))
        write_json(path, {**asked, "cuts": cuts})
    stops = [*cuts[1:], None]
    return [tuple(parts_between(shards, start, stop)) for start, stop in zip(cuts, stops, strict=True)]


def _another(path: Path, how: str) -> UserError:
    return UserError(
        f"{path.parent} holds a build begun {how}: remove that folder to start over, or run the command as it was"
    )
