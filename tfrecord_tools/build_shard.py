"""One output shard of a dataset from the image shards that belong to it: what a worker of `build` does.

The shard and its state appear one after the other by renames, the state last. So a shard with a state is finished, and
one without is written again, to the same bytes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.files import read_json, write_beside, write_json
from clipkit.manifest import Shard, Source
from clipkit.tfrecord_tools.pair_writer import PairWriter
from clipkit.tfrecord_tools.read_shards import read_shard
from clipkit.tfrecord_tools.schema import KindWidenedError


@dataclass(frozen=True)
class ShardJob:
    """What one worker is to make. `number` counts the output shards; `sizes` are the bytes of `sources`."""

    number: int
    path: Path
    state: Path
    sources: tuple[Path, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ShardState:
    """What is known of a finished shard. `present` counts each column's values; `skipped` is (source, key, reason)."""

    shard: Shard
    kinds: dict[str, str]
    present: dict[str, int]
    skipped: tuple[tuple[str, str, str], ...]


def build_shard(job: ShardJob, kinds: Mapping[str, str]) -> ShardState:
    """Write the shard, its record offsets and its state. `kinds` are the columns' kinds to begin with.

    A value that doesn't fit widens its column's kind and the shard is begun anew, so that all of it has one kind.
    """
    while True:
        try:
            return _build_shard(job, dict(kinds))
        except KindWidenedError as widened:
            kinds = widened.kinds


def _build_shard(job: ShardJob, kinds: dict[str, str]) -> ShardState:
    skipped: list[tuple[str, str, str]] = []
    sources: list[Source] = []
    with write_beside(job.path) as temporary, PairWriter(temporary, kinds) as writer:
        for source, size in zip(job.sources, job.sizes, strict=True):
            samples, first_record = 0, writer.records
            reasons: Counter[str] = Counter()
            for sample in read_shard(source):
                samples += 1
                reason = writer.add(sample)
                if reason is not None:
                    reasons[reason] += 1
                    skipped.append((source.name, sample.key, reason))
            records = writer.records - first_record
            sources.append(Source(source.name, size, samples, records, dict(sorted(reasons.items()))))
    written = writer.written()
    with write_beside(offsets_path(job)) as temporary, temporary.open("wb") as file:
        np.save(file, written.offsets)
    shard = written.shard(job.path.name, tuple(sources))
    state = ShardState(shard, written.kinds, written.present, tuple(skipped))
    write_json(job.state, asdict(state))
    return state


def offsets_path(job: ShardJob) -> Path:
    """Where the byte offsets of the shard's records wait for the index of the whole split."""
    return job.state.with_suffix(".npy")


def read_state(job: ShardJob) -> ShardState | None:
    """The state of a finished shard, or None when it must be written (again), its sources having changed for one."""
    if not (job.state.exists() and job.path.exists() and offsets_path(job).exists()):
        return None
    values: dict[str, Any] = read_json(job.state)
    shard = Shard.from_dict(values["shard"])
    same_sources = [(source.file, source.bytes) for source in shard.sources] == [
        (source.name, size) for source, size in zip(job.sources, job.sizes, strict=True)
    ]
    if not same_sources or job.path.stat().st_size != shard.bytes:
        return None
    skipped = tuple((source, key, reason) for source, key, reason in values["skipped"])
    return ShardState(shard, values["kinds"], values["present"], skipped)
