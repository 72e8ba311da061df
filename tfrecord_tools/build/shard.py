"""One TFRecord file from its stretch of the image shards: what a worker of `build` does.

The file and its state appear one after the other by renames, the state last. So a file with a state is finished, and
one without is written again, to the same bytes. It is an output shard, or where records are still to be put into
another order or into several splits (`shuffle`), an intermediate file with a few notes on each record.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clipkit.formats.kinds import KindWidenedError
from clipkit.formats.manifest import ShardEntry, SourceEntry
from clipkit.storage.files import read_json, save_array, write_beside, write_json
from clipkit.tfrecord_tools.build.choose import going
from clipkit.tfrecord_tools.build.dedup import DecideJob, duplicates_in
from clipkit.tfrecord_tools.build.prepare import Preparation, Prepared, Stretch, prepared
from clipkit.tfrecord_tools.pictures.sniff import FORMATS
from clipkit.tfrecord_tools.reasons import DUPLICATE, UNWANTED
from clipkit.tfrecord_tools.writing.pair_writer import PairWriter


@dataclass(frozen=True)
class Task:
    """What all shards of a build have in common.

    `shares` are the splits with the part of the samples that each gets; `gathered`: the files are
    intermediate, so notes are kept. `duplicates` are the decisions of `dedup`; `chosen`: `choose` has made some too.
    """

    preparation: Preparation
    shares: tuple[tuple[str, float], ...]
    gathered: bool
    duplicates: tuple[DecideJob, ...] = ()
    chosen: bool = False

    @property
    def compared(self) -> bool:
        """Whether which samples a stretch has depends on those of the others."""
        return bool(self.duplicates) or self.chosen


@dataclass(frozen=True)
class BuildState:
    """What is known of a finished file. `present` counts each column's values; `accounts` are the sources by split."""

    shard: ShardEntry
    kinds: dict[str, str]
    present: dict[str, int]
    accounts: dict[str, tuple[SourceEntry, ...]]
    parts: str

    @property
    def samples(self) -> int:
        return sum(source.samples for sources in self.accounts.values() for source in sources)

    @property
    def kinds_with_values(self) -> dict[str, str]:
        """The kinds of the columns that have a value here."""
        return {column: self.kinds[column] for column in self.present}


def build_shard(job: Stretch, task: Task, kinds: Mapping[str, str]) -> BuildState:
    """Write the file, its record offsets and its state. `kinds` are the columns' kinds to begin with.

    A value that doesn't fit widens its column's kind and the file is written again, so that all of it has one kind.
    """
    while True:
        try:
            return _build_shard(job, task, dict(kinds))
        except KindWidenedError as widened:
            kinds = widened.kinds


def _build_shard(job: Stretch, task: Task, kinds: dict[str, str]) -> BuildState:
    account = _Account(job, task)
    left_out = dict.fromkeys(duplicates_in(task.duplicates, job.number).tolist(), DUPLICATE)
    if task.chosen:
        left_out |= going(job)
    notes: list[tuple[int, int]] = []
    with write_beside(job.path) as temporary, PairWriter(temporary, kinds) as writer:
        for pair in prepared(job.parts, task.preparation, left_out):
            split = split_of(pair.key, task.shares)
            account.add(pair, split)
            if pair.reason is None:
                writer.put(pair.image, pair.caption, pair.columns, pair.kind)
                if task.gathered:
                    notes.append((split, FORMATS.index(pair.kind)))
    save_array(job.beside(".npy"), np.array(writer.offsets, np.uint64))
    if task.gathered:
        save_array(job.beside(".notes.npy"), np.array(notes, np.uint8).reshape(-1, 2))
    for (name, _), lines in zip(task.shares, account.skipped, strict=True):
        with write_beside(job.skipped(name)) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    accounts = {name: account.sources(number) for number, (name, _) in enumerate(task.shares)}
    sources = () if task.gathered else accounts[task.shares[0][0]]
    shard = ShardEntry.of(job.path.name, writer, sources, writer.formats, writer.converted)
    state = BuildState(shard, writer.kinds, writer.present, accounts, job.made_of(task.compared))
    write_json(job.beside(".json"), asdict(state))
    return state


class _Account:
    """Counts what becomes of the samples of each part, split by split, and names those that are skipped."""

    def __init__(self, job: Stretch, task: Task) -> None:
        self.parts = job.parts
        splits = range(len(task.shares))
        self.records = [[0] * len(job.parts) for _ in splits]
        self.reasons: list[list[Counter[str]]] = [[Counter() for _ in job.parts] for _ in splits]
        self.skipped: list[list[str]] = [[] for _ in splits]

    def add(self, pair: Prepared, split: int) -> None:
        if pair.reason is None:
            self.records[split][pair.part] += 1
            return
        self.reasons[split][pair.part][pair.reason] += 1
        if pair.reason not in UNWANTED:
            source = self.parts[pair.part].shard.path.name
            line = {"source": source, "key": pair.key, "reason": pair.reason}
            self.skipped[split].append(json.dumps(line, ensure_ascii=False) + "\n")

    def sources(self, split: int) -> tuple[SourceEntry, ...]:
        found = []
        for part, records, reasons in zip(self.parts, self.records[split], self.reasons[split], strict=True):
            samples = records + reasons.total()
            found.append(
                SourceEntry(part.shard.path.name, part.shard.size, samples, records, dict(sorted(reasons.items())))
            )
        return tuple(found)


def split_of(key: str, shares: tuple[tuple[str, float], ...]) -> int:
    """The number of the split that a key's hash falls to."""
    if len(shares) == 1:
        return 0
    point = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2**64
    for number, (_, share) in enumerate(shares):
        point -= share
        if point < 0:
            return number
    return len(shares) - 1


def read_state(job: Stretch, task: Task) -> BuildState | None:
    """The state of a finished file, or None when it must be written (again), its sources having changed for one."""
    path = job.beside(".json")
    if not path.exists() or not job.path.exists():
        return None
    values: dict[str, Any] = read_json(path)
    shard = ShardEntry.from_dict(values["shard"])
    if values["parts"] != job.made_of(task.compared) or job.path.stat().st_size != shard.bytes:
        return None
    accounts = {
        split: tuple(SourceEntry(**source) for source in sources) for split, sources in values["accounts"].items()
    }
    return BuildState(shard, values["kinds"], values["present"], accounts, values["parts"])
