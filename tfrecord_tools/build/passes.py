"""The passes of `build-tfds` over the stretches of its image shards, each one function over many items (`jobs`).

    hashing, comparing     with --dedup
    writing                always: the output shards, or files on the way
    sorting, gathering     with --shuffle or several splits

Columns' kinds (`formats.kinds`) are found while the records are written: each file is written with the kinds it meets,
and when all are there, those that differ from what all together need are written again. So the data are read once when
the shards agree, as img2dataset's do, and no pass goes ahead to look.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from clipkit.errors import UserError
from clipkit.formats.dataset import shard_name
from clipkit.formats.kinds import unify
from clipkit.formats.manifest import ShardEntry
from clipkit.jobs.run import Engine, run_jobs
from clipkit.tfrecord_tools.build.dedup import (
    DecideJob,
    HashJob,
    Method,
    count_duplicates,
    decide,
    decide_jobs,
    hash_samples,
    read_hashed,
    runs_of,
)
from clipkit.tfrecord_tools.build.prepare import Preparation
from clipkit.tfrecord_tools.build.progress import BuildProgress
from clipkit.tfrecord_tools.build.shard import ShardJob, ShardState, Work, build_shard, read_state
from clipkit.tfrecord_tools.build.shuffle import (
    GatherJob,
    Stretch,
    gather,
    index_jobs,
    index_records,
    read_gathered,
)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Runner:
    """Where passes run, and who is told of them."""

    workers: int | None
    engine: Engine
    tell: Callable[[BuildProgress], None]

    def run(
        self, function: Callable[[T], R], items: Sequence[T], describe: Callable[[T], str]
    ) -> Iterator[tuple[int, R]]:
        return run_jobs(function, items, workers=self.workers, engine=self.engine, describe=describe)


def hash_pass(
    job_list: Sequence[ShardJob], folder: Path, preparation: Preparation, method: Method, runner: Runner
) -> tuple[DecideJob, ...]:
    """Find the duplicates; what is decided lies in files of `folder` (see `dedup`)."""
    hash_jobs = [HashJob(job.number, folder, job.parts) for job in job_list]
    hashed = {job.number: count for job in hash_jobs if (count := read_hashed(job)) is not None}
    lacking = [job for job in hash_jobs if job.number not in hashed]
    progress = BuildProgress("hashing", 0, sum(job.size for job in job_list), len(hashed), len(job_list), 0, 0)

    def tell() -> None:
        done = sum(job.size for job in job_list if job.number in hashed)
        runner.tell(replace(progress, bytes_done=done, shards_done=len(hashed), records=sum(hashed.values())))

    tell()
    function = partial(hash_samples, preparation=preparation, method=method)
    for index, count in runner.run(function, lacking, lambda job: f"hashes of stretch {job.number}"):
        hashed[lacking[index].number] = count
        tell()
    records = sum(hashed.values())
    decisions = decide_jobs(folder, len(job_list), records, method)
    # What was decided from other hashes isn't trusted: the pass takes seconds, and nothing is read twice in it.
    found = [0] * runs_of(method)
    progress = BuildProgress("comparing", 0, len(decisions), 0, len(decisions), records, 0)
    for done, (index, count) in enumerate(
        runner.run(partial(decide, method=method), decisions, lambda job: f"duplicates {job.run}-{job.number}"), 1
    ):
        # Each run finds many of the same, so until all are there the line tells of the one that has found most.
        found[decisions[index].run] += count
        runner.tell(replace(progress, bytes_done=done, shards_done=done, skipped=max(found)))
    if len(found) > 1:
        count = count_duplicates(decisions, sum(found))
        runner.tell(replace(progress, bytes_done=len(decisions), shards_done=len(decisions), skipped=count))
    return decisions


def write_pass(
    job_list: Sequence[ShardJob], work: Work, known: dict[str, str], runner: Runner
) -> tuple[list[ShardState], dict[str, str]]:
    """The states of all stretches, and the kinds that all of them are written with. `known` are other splits' kinds."""
    states = {job.number: state for job in job_list if (state := read_state(job)) is not None}
    _write(job_list, work, known, states, runner)
    kinds = unify([known, *(kinds_met(state) for state in states.values())])
    for column, kind in known.items():
        if kinds[column] != kind:
            raise UserError(
                f"column {column!r} is {kinds[column]} in these shards and {kind} in the dataset's other splits: "
                "build them under another --name"
            )
    for job in job_list:
        if any(kinds[column] != kind for column, kind in kinds_met(states[job.number]).items()):
            del states[job.number]
    _write(job_list, work, kinds, states, runner)
    return [states[job.number] for job in job_list], kinds


def _write(
    job_list: Sequence[ShardJob], work: Work, kinds: dict[str, str], states: dict[int, ShardState], runner: Runner
) -> None:
    """Write the files that have no state yet and add theirs."""
    lacking = [job for job in job_list if job.number not in states]
    if not lacking:
        return
    total = sum(job.size for job in job_list)
    sizes = {job.number: job.size for job in job_list}
    done = sum(sizes[number] for number in states)
    records = sum(state.shard.records for state in states.values())
    samples = sum(state.samples for state in states.values())

    def tell() -> None:
        runner.tell(BuildProgress("writing", done, total, len(states), len(job_list), records, samples - records))

    tell()
    function = partial(build_shard, work=work, kinds=kinds)
    for index, state in runner.run(function, lacking, lambda job: job.path.name):
        states[lacking[index].number] = state
        done += lacking[index].size
        records += state.shard.records
        samples += state.samples
        tell()


def kinds_met(state: ShardState) -> dict[str, str]:
    """The kinds of the columns that have a value in the file."""
    return {column: state.kinds[column] for column in state.present}


def gather_pass(
    job_list: Sequence[ShardJob],
    states: Sequence[ShardState],
    work: Work,
    out: tuple[Path, str],
    seed: int | None,
    wanted: float,
    runner: Runner,
) -> dict[str, list[tuple[Path, ShardEntry]]]:
    """The output shards of each split with the files of their offsets, of about `wanted` bytes each.

    `out` is the dataset's folder and name.
    """
    firsts = [0, *accumulate(state.shard.records for state in states)]
    stretches = [
        Stretch(job.beside(".npy"), job.beside(".notes.npy"), state.shard.bytes, state.shard.records, first)
        for job, state, first in zip(job_list, states, firsts, strict=False)
    ]
    folder = job_list[0].folder
    splits = tuple(split for split, _ in work.shares)
    indexes = index_jobs(folder, stretches, splits, firsts[-1], seed)
    sizes = dict.fromkeys(splits, 0)
    for done, (_, counts) in enumerate(runner.run(index_records, indexes, lambda job: f"places {job.number}"), 1):
        for split, (_, size) in counts.items():
            sizes[split] += size
        runner.tell(BuildProgress("sorting", done, len(indexes), done, len(indexes), firsts[-1], 0))
    made_of = hashlib.sha256(
        json.dumps([seed, work.shares, [(state.shard.records, state.shard.crc32c) for state in states]]).encode()
    ).hexdigest()
    gather_jobs = []
    for split in splits:
        count = max(1, round(sizes[split] / wanted))
        for number in range(count):
            path = out[0] / shard_name(out[1], split, number, count)
            gather_jobs.append(GatherJob(number, count, split, path, folder, len(indexes), made_of))
    shards = {job.path: shard for job in gather_jobs if (shard := read_gathered(job)) is not None}
    lacking = [job for job in gather_jobs if job.path not in shards]
    total = sum(sizes.values())

    def tell() -> None:
        done = sum(shard.bytes for shard in shards.values())
        records = sum(shard.records for shard in shards.values())
        runner.tell(BuildProgress("gathering", done, total, len(shards), len(gather_jobs), records, 0))

    tell()
    for index, shard in runner.run(gather, lacking, lambda job: job.path.name):
        shards[lacking[index].path] = shard
        tell()
    found: dict[str, list[tuple[Path, ShardEntry]]] = {split: [] for split in splits}
    for job in gather_jobs:
        found[job.split].append((job.beside(".npy"), shards[job.path]))
    return found
