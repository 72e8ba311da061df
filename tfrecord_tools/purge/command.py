"""Take records out of a dataset for good: `clipkit purge`, for opt-outs and for lists such as Re-LAION's removals.

All shards are read, and those that hold a record of the list are written again without it. Reading comes first and
changes nothing. Then a journal (`clipkit/purge.json`) is put down, by which `open_dataset` refuses the dataset: from
the first shard that is renamed to the last of the metadata, index and shards don't agree. The journal goes last of all.
A run that finds one ends what it began, from the plan in `clipkit/purge/`, at whichever moment the first was killed.

The order of the data is a function of the number of records. So a training that is resumed on a purged dataset sees
another order than it would have: nothing can keep the old one, for the point is that these records are gone. Numbers of
records move up within the split as well. A training that is running while its dataset is purged stops with one line.

The manifest counts the records among the skipped, as "purged", so that its sums stay right, and a download's ledger
keeps their rows (see `purge_ledger`).
"""

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.formats.dataset import DatasetLayout, open_dataset, read_layout
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.jobs.run import Engine, run_jobs
from clipkit.log import Progress, counted, size_text
from clipkit.storage.files import as_path, clear_leftovers, lock, read_json, remove, write_beside
from clipkit.tfrecord_tools.account.shard_state import SPLIT
from clipkit.tfrecord_tools.purge.finish import finish
from clipkit.tfrecord_tools.purge.ledger import KNOWN, LedgerJob, download_layout, finish_download, purge_ledger
from clipkit.tfrecord_tools.purge.log import purged_before, was_recorded
from clipkit.tfrecord_tools.purge.plan import (
    Plan,
    PlannedShard,
    read_numbers,
    read_plan,
    state_path,
    work_folder,
    write_plan,
)
from clipkit.tfrecord_tools.purge.removals import RemovalList, UInt64Array, empty_list, open_list, wanted_entries
from clipkit.tfrecord_tools.purge.shard import (
    PurgeJob,
    ShardState,
    Target,
    Values,
    find_records,
    purge_shard,
)

Item = TypeVar("Item", Target, PurgeJob, LedgerJob)
Result = TypeVar("Result")


@dataclass(frozen=True)
class PurgeSummary:
    """What a purge did, or would do. `entries` are the list's distinct values, of which `matched` were found.

    `before` are those that an earlier purge removed; `computed` counts the records whose hash was computed of the
    stored image; `bytes` is what the shards are smaller by.
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
                f"{self.by} was computed of the stored image for {counted(self.computed, 'record')} without that column"
            )
        return "\n".join(lines)


def purge(
    path: Path,
    removals: Path,
    *,
    by: str | None = None,
    dry_run: bool = False,
    engine: Engine = "local",
    workers: int | None = 1,
) -> PurgeSummary:
    """Remove the records that `removals` lists from all splits of the dataset at `path`; a second run finds none.

    `by` is the column that is compared (`url`, `key`, `sha256`, `md5`, or any text column), None to tell from the list.
    A hash is compared with the column of that name, and where a record has none, with the hash of its stored image.
    `dry_run` counts and changes nothing. One job a shard runs on `engine`.
    Raises UserError for a list that is empty, a list or a dataset that can't be read, a dataset that isn't whole, and
    another purge that isn't finished.
    """
    layout = read_layout(as_path(path))
    folder = layout.folder
    chosen = open_list(as_path(removals), by, layout.features)
    values = Values.of(chosen.by, layout.features)
    wanted, empty = wanted_entries(chosen)
    if not wanted.size:
        raise empty_list(chosen.path)
    with lock(folder / CLIPKIT_FOLDER):
        layout = read_layout(folder)  # anew, for another purge may have ended in the meantime
        run = _Run(layout, chosen, values, wanted, empty, engine, workers)
        clear_leftovers(folder, folder / CLIPKIT_FOLDER)
        plan = read_plan(folder)
        if plan is not None and (plan.list_sha256, plan.by) != (chosen.sha256, chosen.by):
            raise UserError(
                f"{folder}: a purge by {plan.by} with {plan.list_path} isn't finished: run that one again first"
            )
        if plan is not None and dry_run:
            raise UserError(f"{folder}: a purge isn't finished: run it again without --dry-run")
        if plan is None:
            plan, summary = _find(run, dry_run)
        if plan is None:
            return summary
        states, matched = _rewrite(run, plan)
        failed = _purge_ledgers(run, plan, states)
        finish(layout, plan, states, chosen, wanted, matched, failed)
        freed = sum(shard.bytes for shard in plan.shards) - sum(state.bytes for state in states)
        count = sum(state.removed for state in states)
        return _summary(run, matched, count, len(states), freed, plan.computed)


@dataclass(frozen=True)
class _Run:
    """What stays the same through a purge. `wanted` is the list as a sorted array, `empty` its rows without a value."""

    layout: DatasetLayout
    removals: RemovalList
    values: Values
    wanted: UInt64Array
    empty: int
    engine: Engine
    workers: int | None


def _summary(
    run: _Run,
    matched: npt.NDArray[np.bool_],
    records: int,
    shards: int,
    freed: int,
    computed: int,
    dry_run: bool = False,
) -> PurgeSummary:
    before = purged_before(run.layout.folder, run.removals, run.wanted) & ~matched
    return PurgeSummary(
        path=run.layout.folder,
        by=run.removals.by,
        entries=len(matched),
        empty=run.empty,
        matched=int(matched.sum()),
        before=int(before.sum()),
        records=records,
        shards=shards,
        bytes=freed,
        computed=computed,
        dry_run=dry_run,
    )


def _find(run: _Run, dry_run: bool) -> tuple[Plan | None, PurgeSummary]:
    """Look at every record of every split, and write down the plan; there is none when nothing is to be done.

    Raises UserError when the dataset isn't whole.
    """
    layout = run.layout
    work = work_folder(layout.folder)
    remove(work)
    targets = [target for split in layout.lengths for target in _targets(layout, split)]
    _save(work / "wanted.npy", run.wanted)
    function = partial(find_records, values=run.values, wanted=work / "wanted.npy")
    matches = _over_shards(run, "purge: reading", function, targets, [target.bytes for target in targets])
    remove(work)
    matched = np.zeros(run.wanted.shape[1], bool)
    for match in matches:
        matched[match.places] = True
    concerned = [(target, match) for target, match in zip(targets, matches, strict=True) if len(match.numbers)]
    count = sum(len(match.numbers) for _, match in concerned)
    computed = sum(match.computed for match in matches)
    summary = _summary(run, matched, count, len(concerned), 0, computed, dry_run)
    now = datetime.datetime.now(datetime.UTC)
    name = f"{now:%Y%m%dT%H%M%S.%fZ}-{run.removals.sha256[:8]}"
    # A list that is new here is written down though no record matches; rows that gave no image may.
    is_new = not was_recorded(layout.folder, run.removals)
    if dry_run or not (concerned or is_new):
        return None, summary
    parts = read_json(layout.folder / "dataset_info.json")["splits"]
    plan = Plan(
        purge=name,
        list_path=str(run.removals.path),
        list_sha256=run.removals.sha256,
        by=run.removals.by,
        computed=computed,
        lengths=layout.lengths,
        num_bytes={part["name"]: part.get("numBytes") for part in parts},
        shards=tuple(
            PlannedShard(target.split, target.path.name, target.records, target.bytes, len(match.numbers))
            for target, match in concerned
        ),
    )
    write_plan(layout.folder, plan, [match.numbers for _, match in concerned], [match.places for _, match in concerned])
    return plan, summary


def _targets(layout: DatasetLayout, split: str) -> Iterator[Target]:
    """The shards of a split, each checked to be there and of the right size."""
    manifest = layout.manifest.get(split)
    entries = manifest.shards if manifest else [None] * len(layout.lengths[split])
    for shard, entry in zip(open_dataset(layout.folder, split).shards, entries, strict=True):
        yield Target(layout.folder / shard.file, split, shard.records, shard.bytes, entry)


def _rewrite(run: _Run, plan: Plan) -> tuple[list[ShardState], npt.NDArray[np.bool_]]:
    """Write the shards that aren't written yet; return the accounts of all, and which entries of the list are found."""
    folder = run.layout.folder
    numbers, places = read_numbers(folder, plan)
    entries = {shard.file: shard for split in run.layout.manifest.values() for shard in split.shards}
    items = []
    for number, (shard, doomed) in enumerate(zip(plan.shards, numbers, strict=True)):
        target = Target(folder / shard.file, shard.split, shard.records, shard.bytes, entries.get(shard.file))
        items.append(PurgeJob(target, run.values, tuple(doomed.tolist()), state_path(folder, number)))
    states = _over_shards(run, "purge: writing", purge_shard, items, [shard.bytes for shard in plan.shards])
    matched = np.zeros(run.wanted.shape[1], bool)
    matched[places] = True
    return states, matched


def _purge_ledgers(run: _Run, plan: Plan, states: Sequence[ShardState]) -> dict[str, dict[str, int]]:
    """Purge the account that a download left; what failed in each of its shards by file, {} where there is none."""
    folder = run.layout.folder
    made = download_layout(run.layout)
    if made is None:
        return {}
    wanted = None
    if run.removals.by in KNOWN:
        wanted = work_folder(folder) / "wanted.npy"
        _save(wanted, run.wanted)
    changed = {shard.file: number for number, shard in enumerate(plan.shards) if shard.split == SPLIT}
    items = []
    for number in range(made.shard_count):
        files = made.files(number)
        place = changed.get(files.data.name)
        state = None if place is None else state_path(folder, place)
        purged = None if place is None else states[place]
        items.append(LedgerJob(files, state, purged, wanted, run.removals.by, plan.purge))
    _over_shards(run, "purge: ledgers", purge_ledger, items, [0] * len(items))
    return finish_download(made)


def _save(path: Path, array: UInt64Array) -> None:
    with write_beside(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _over_shards(
    run: _Run, label: str, function: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int]
) -> list[Result]:
    """`function` of all items, in their order, with a progress line in megabytes."""
    results: dict[int, Result] = {}
    done = 0
    counted = sum(sizes) // 1_000_000
    with Progress(label, counted or len(items), "MB" if counted else "shards") as progress:
        ended = run_jobs(function, items, engine=run.engine, workers=run.workers, describe=_describe)
        for index, result in ended:
            results[index] = result
            done += sizes[index]
            progress.update(done // 1_000_000 if counted else len(results), f"shard {len(results):,}/{len(items):,}")
    return [results[index] for index in range(len(items))]


def _describe(item: Target | PurgeJob | LedgerJob) -> str:
    if isinstance(item, LedgerJob):
        return item.files.ledger.name
    return (item if isinstance(item, Target) else item.target).path.name
