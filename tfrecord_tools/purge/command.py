"""Take records out of a dataset for good: `clipkit purge`, for opt-outs and for lists such as Re-LAION's removals.

All shards are read, and those that hold a record of the list are written again without it. Reading comes first and
changes nothing. Then a journal is put down (`rewriting.plan`), and a run that finds one ends what it began, at
whichever moment the first was killed.

The order of the data is a function of the number of records. So a training that is resumed on a purged dataset sees
another order than it would have: nothing can keep the old one, for the point is that these records are gone. Numbers of
records move up within the split as well. A training that is running while its dataset is purged stops with one line.

The manifest counts the records among the skipped, as "purged", so that its sums stay right, and a download's ledger
keeps their rows (see `ledger`).
"""

import datetime
import hashlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.formats.dataset import DatasetLayout, read_layout
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.formats.text_file import Quoting
from clipkit.formatting import counted, size_text
from clipkit.jobs.passes import Runner
from clipkit.jobs.run import Engine
from clipkit.storage.files import as_path, clear_leftovers, load_array, lock, remove, save_array
from clipkit.tfrecord_tools.purge.finish import finish, purged_before, was_recorded
from clipkit.tfrecord_tools.purge.ledger import purge_ledgers
from clipkit.tfrecord_tools.purge.removals import RemovalList, empty_list, open_list, wanted_entries
from clipkit.tfrecord_tools.purge.shard import Int64Array, PurgePlan, ValueReader, purge_jobs, purge_shard, search_shard
from clipkit.tfrecord_tools.rewriting.plan import (
    num_bytes,
    planned_shards,
    read_plan,
    rewrite_jobs,
    work_folder,
    write_plan,
)
from clipkit.tfrecord_tools.tables.digests import UInt64Array


@dataclass(frozen=True)
class PurgeSummary:
    """What a purge did, or would do. `entries` are the list's distinct values, of which `matched` were found.

    `before` are those that an earlier purge removed; `empty` counts the list's rows without a value, `computed` the
    records whose hash was computed from the stored image; `bytes` is what the shards are smaller by.
    """

    path: Path
    by: str
    entries: int
    empty: int
    matched: int
    before: int
    records: int
    shards: int
    bytes: int
    computed: int
    dry_run: bool

    @property
    def unmatched(self) -> int:
        return self.entries - self.matched - self.before

    def to_json(self) -> dict[str, Any]:
        """The counts, and the path as text."""
        return {**asdict(self), "path": str(self.path), "unmatched": self.unmatched}

    def text(self) -> str:
        """A few lines for a person."""
        would = "would remove" if self.dry_run else "removed"
        freed = "" if self.dry_run else f" ({size_text(self.bytes)})"
        lines = [
            f"{would} {counted(self.records, 'record')}{freed} from {counted(self.shards, 'shard')} of {self.path}",
            f"the list's {counted(self.entries, 'value')} of {self.by}: {self.matched:,} found, "
            f"{self.before:,} purged before, {self.unmatched:,} in no record",
        ]
        if self.empty:
            lines.append(f"{counted(self.empty, 'row')} of the list without a value")
        if self.computed:
            lines.append(
                f"{self.by} was computed from the stored image for {counted(self.computed, 'record')} without that "
                "column"
            )
        return "\n".join(lines)


def purge(
    path: Path,
    removals: Path,
    *,
    by: str | None = None,
    quoting: Quoting = "auto",
    dry_run: bool = False,
    engine: Engine = "local",
    workers: int | None = 1,
) -> PurgeSummary:
    """Remove the records that `removals` lists from all splits of the dataset at `path`; a second run finds none.

    `by` is the column that is compared (`url`, `key`, `sha256`, `md5`, or any text column), None to tell from the list.
    A hash is compared with the column of that name, and where a record has none, with the hash of its stored image.
    `quoting` says what quotes mean in a list that is a text table (see `formats.text_quotes`).
    `dry_run` counts and changes nothing. One job a shard runs on `engine`.
    Raises UserError for a list that is empty, a list or a dataset that can't be read, a dataset that isn't whole, and
    another purge that isn't finished.
    """
    layout = read_layout(as_path(path))
    folder = layout.folder
    listed = open_list(as_path(removals), by, layout.features, quoting)
    reader = ValueReader.of(listed.by, layout.features)
    wanted, empty = wanted_entries(listed)
    if not wanted.size:
        raise empty_list(listed.path)
    runner = Runner(workers, engine)
    with lock(folder / CLIPKIT_FOLDER):
        layout = read_layout(folder)  # again, since another purge may have ended in the meantime
        clear_leftovers(folder, folder / CLIPKIT_FOLDER)
        plan, work = read_plan(folder, PurgePlan), work_folder(folder, PurgePlan.command)
        values = hashlib.sha256(wanted.data).hexdigest()
        same = (listed.sha256, listed.by, values)
        if plan is not None and (plan.list_sha256, plan.by, plan.values or values) != same:
            raise UserError(
                f"{folder}: a purge by {plan.by} with {plan.list_path} isn't finished: run that one again first, with "
                "its options"
            )
        if plan is not None and dry_run:
            raise UserError(f"{folder}: a purge isn't finished: run it again without --dry-run")

        def summary(matched: npt.NDArray[np.bool_], plan: PurgePlan, freed: int = 0) -> PurgeSummary:
            before = purged_before(folder, listed, wanted) & ~matched
            return PurgeSummary(
                path=folder,
                by=listed.by,
                entries=len(matched),
                empty=empty,
                matched=int(matched.sum()),
                before=int(before.sum()),
                records=sum(shard.purged for shard in plan.shards),
                shards=len(plan.shards),
                bytes=freed,
                computed=plan.computed,
                dry_run=dry_run,
            )

        if plan is None:
            plan, doomed_2N = _find(layout, listed, values, reader, wanted, runner)
            # A list that is new here is written down though no record matches; rows that gave no image may.
            if dry_run or not (plan.shards or not was_recorded(folder, listed)):
                return summary(_matched(wanted, doomed_2N[1]), plan)
            save_array(work / "doomed.npy", doomed_2N)
            write_plan(folder, plan)
        numbers, places = load_array(work / "doomed.npy")
        states = runner.run(
            "purge: writing",
            purge_shard,
            purge_jobs(layout, plan, reader, numbers),
            describe=lambda job: job.path.name,
            size=lambda job: job.before.bytes,
            counts=lambda state: {"removed": state.before.purged},
        )
        failed = purge_ledgers(layout, plan, states, listed, wanted, runner)
        matched = _matched(wanted, places)
        finish(layout, plan, states, listed, wanted, matched, failed)
        return summary(matched, plan, sum(state.before.bytes - state.bytes for state in states))


def _matched(wanted: UInt64Array, places: Int64Array) -> npt.NDArray[np.bool_]:
    """Which entries of the list were found: bool[entries]."""
    matched = np.zeros(wanted.shape[1], bool)
    matched[places] = True
    return matched


def _find(
    layout: DatasetLayout, listed: RemovalList, values: str, reader: ValueReader, wanted: UInt64Array, runner: Runner
) -> tuple[PurgePlan, Int64Array]:
    """Look at every record of every split: the plan, and of all records to remove what `Matches` has, shard by shard.

    Raises UserError when the dataset isn't whole.
    """
    work = work_folder(layout.folder, PurgePlan.command)
    remove(work)
    plan = PurgePlan(
        num_bytes=num_bytes(layout.folder),
        shards=planned_shards(layout),
        purge=f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S.%fZ}-{listed.sha256[:8]}",
        list_path=str(listed.path),
        list_sha256=listed.sha256,
        by=listed.by,
        computed=0,
        values=values,
    )
    save_array(work / "wanted.npy", wanted)
    found = runner.run(
        "purge: reading",
        partial(search_shard, reader=reader, wanted=work / "wanted.npy"),
        rewrite_jobs(layout, plan),
        describe=lambda job: job.path.name,
        size=lambda job: job.before.bytes,
        counts=lambda matches: {"found": matches.records_2N.shape[1]},
    )
    remove(work)
    pairs = zip(plan.shards, found, strict=True)
    shards = [replace(shard, purged=matches.records_2N.shape[1]) for shard, matches in pairs]
    plan = replace(
        plan,
        shards=tuple(shard for shard in shards if shard.purged),
        computed=sum(matches.computed for matches in found),
    )
    return plan, np.concatenate([np.zeros((2, 0), np.int64), *(matches.records_2N for matches in found)], axis=1)
