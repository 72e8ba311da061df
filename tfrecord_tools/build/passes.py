"""The passes of `build-tfds` over the stretches of its image shards, each one function over many jobs.

    hashing, comparing     with --dedup
    surveying, choosing    with --keep-best and --balance
    writing                always: the output shards, or intermediate files
    sorting, gathering     with --shuffle or several splits

Columns' kinds aren't known before the records are written: each file is written with the kinds it meets (see `kinds`),
and when all are there, those that differ from what all together need are written again. So the data are read once when
the shards agree, as img2dataset's do, and no pass goes ahead to look.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.dataset import shard_name
from clipkit.formats.kinds import unify
from clipkit.formats.manifest import ShardEntry
from clipkit.jobs.passes import Runner
from clipkit.storage.files import save_array, write_json
from clipkit.tfrecord_tools.build.choose import (
    SURVEY,
    balance_account,
    choose,
    count_concepts,
    find_cut,
    join_scores,
    survey,
)
from clipkit.tfrecord_tools.build.concepts import ConceptList
from clipkit.tfrecord_tools.build.dedup import (
    HASHES,
    DecideJob,
    Method,
    decide,
    decide_jobs,
    hash_samples,
)
from clipkit.tfrecord_tools.build.plan import BuildOptions
from clipkit.tfrecord_tools.build.prepare import Preparation, Stretch
from clipkit.tfrecord_tools.build.shard import BuildState, Task, build_shard, read_state
from clipkit.tfrecord_tools.build.shuffle import (
    GatherJob,
    StretchFile,
    gather,
    index_jobs,
    index_records,
    read_gathered,
)


def hash_pass(
    jobs: Sequence[Stretch], folder: Path, preparation: Preparation, method: Method, runner: Runner
) -> tuple[DecideJob, ...]:
    """Find the duplicates; what is decided lies in files of `folder` (see `dedup`)."""
    hashed = runner.run(
        "build-tfds, hashing",
        partial(hash_samples, preparation=preparation, method=method),
        jobs,
        describe=lambda job: f"hashes of stretch {job.number}",
        size=lambda job: job.size,
        finished=lambda job: job.read_count(HASHES, compared=False),
        counts=lambda count: {"records": count},
    )
    decisions = decide_jobs(folder, len(jobs), sum(hashed), method)
    # What was decided from other hashes isn't trusted: the pass takes seconds, and nothing is read twice in it.
    runner.run(
        "build-tfds, comparing",
        partial(decide, method=method),
        decisions,
        describe=lambda job: f"duplicates {job.run}-{job.number}",
        # Each of several runs finds many of the same pictures.
        counts=lambda count: {"duplicates": count} if method != "phash" else {},
    )
    return decisions


def choose_pass(
    jobs: Sequence[Stretch],
    preparation: Preparation,
    duplicates: tuple[DecideJob, ...],
    options: BuildOptions,
    listed: ConceptList | None,
    runner: Runner,
) -> dict[str, Any]:
    """Decide by `--keep-best` and `--balance` which samples stay (see `choose`); the account, {} without these."""
    best, balance, folder = options.keep_best, options.balance, jobs[0].folder
    texts = listed.texts if listed else ()
    if best is None and balance is None:
        return {}
    texts_path, counts_path = folder / "concepts.json", folder / "concepts.npy"
    if balance is not None:
        write_json(texts_path, list(texts))
    runner.run(
        "build-tfds, surveying",
        partial(
            survey,
            preparation=preparation,
            duplicates=duplicates,
            by=best.by if best and not best.table else None,
            concepts=(texts_path, balance.sha256) if balance else None,
        ),
        jobs,
        describe=lambda job: f"survey of stretch {job.number}",
        size=lambda job: job.size,
        finished=lambda job: job.read_count(SURVEY, compared=bool(duplicates)),
        counts=lambda count: {"records": count},
    )
    cut, account = None, {}
    if best is not None:
        if best.table:
            join_scores(jobs, best)
        cut, account["keep_best"] = find_cut(jobs, best)
    concepts = None
    if balance is not None:
        concepts = count_concepts(jobs, cut, texts)
        save_array(counts_path, concepts)
    told: Counter[str] = Counter()
    # What was chosen by other counts isn't trusted: the pass takes seconds, and no image is read in it.
    for counts in runner.run(
        "build-tfds, choosing",
        partial(choose, cut=cut, balance=balance, counts=counts_path),
        jobs,
        describe=lambda job: f"choice of stretch {job.number}",
        counts=lambda counts: {"records": counts["kept"]},
    ):
        told.update(counts)
    if best is not None:
        account["keep_best"]["kept"] = told["kept by score"]
    if balance is not None and concepts is not None:
        account["balance"] = balance_account(balance, texts, concepts, told)
    return account


def write_pass(
    jobs: Sequence[Stretch], task: Task, known: dict[str, str], runner: Runner
) -> tuple[list[BuildState], dict[str, str]]:
    """The states of all stretches, and the kinds that all of them are written with. `known` are other splits' kinds."""
    states = _write(jobs, task, known, None, runner)
    while True:
        kinds = unify([known, *(state.kinds_with_values for state in states)])
        for column, kind in known.items():
            if kinds[column] != kind:
                raise UserError(
                    f"column {column!r} is {kinds[column]} in these shards and {kind} in the dataset's other splits: "
                    "build them under another --name"
                )
        if not any(_is_narrower(state, kinds) for state in states):
            return states, kinds
        states = _write(jobs, task, kinds, kinds, runner)  # whole numbers may turn out too large for the others' floats


def _write(
    jobs: Sequence[Stretch], task: Task, kinds: dict[str, str], needed: dict[str, str] | None, runner: Runner
) -> list[BuildState]:
    """Write the files that have no state yet, or one of narrower kinds than those `needed`."""

    def finished(job: Stretch) -> BuildState | None:
        state = read_state(job, task)
        return None if state is None or (needed and _is_narrower(state, needed)) else state

    return runner.run(
        "build-tfds",
        partial(build_shard, task=task, kinds=kinds),
        jobs,
        describe=lambda job: job.path.name,
        size=lambda job: job.size,
        finished=finished,
        counts=lambda state: {"records": state.shard.records, "skipped": state.samples - state.shard.records},
    )


def _is_narrower(state: BuildState, kinds: dict[str, str]) -> bool:
    """Whether a file was written with other kinds than all together need."""
    return any(kinds[column] != kind for column, kind in state.kinds_with_values.items())


def gather_pass(
    jobs: Sequence[Stretch],
    states: Sequence[BuildState],
    task: Task,
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
        StretchFile(job.beside(".npy"), job.beside(".notes.npy"), state.shard.bytes, state.shard.records, first)
        for job, state, first in zip(jobs, states, firsts, strict=False)
    ]
    folder = jobs[0].folder
    splits = tuple(split for split, _ in task.shares)
    indexes = index_jobs(folder, stretches, splits, firsts[-1], seed)
    by_index = runner.run("build-tfds, sorting", index_records, indexes, describe=lambda job: f"places {job.number}")
    sizes = {split: sum(each[split] for each in by_index) for split in splits}
    made_of = hashlib.sha256(
        json.dumps([seed, task.shares, [(state.shard.records, state.shard.crc32c) for state in states]]).encode()
    ).hexdigest()
    gather_jobs = []
    for split in splits:
        count = max(1, round(sizes[split] / wanted))
        for number in range(count):
            path = out[0] / shard_name(out[1], split, number, count)
            gather_jobs.append(GatherJob(number, count, split, path, folder, len(indexes), made_of))
    shards = runner.run(
        "build-tfds, gathering",
        gather,
        gather_jobs,
        describe=lambda job: job.path.name,
        size=lambda job: sizes[job.split] // job.count,
        finished=read_gathered,
        counts=lambda shard: {"records": shard.records},
    )
    found: dict[str, list[tuple[Path, ShardEntry]]] = {split: [] for split in splits}
    for job, shard in zip(gather_jobs, shards, strict=True):
        found[job.split].append((job.beside(".npy"), shard))
    return found
