"""Add captions of another source to the records of a dataset: `clipkit add-captions`.

The table is packed first, which changes nothing. Then a journal is put down (`rewriting.plan`), and a run that finds
one ends what it began. Shard after shard is written again beside its place and renamed (`shard`), and the metadata come
at the end.

The captions of a source are a column of their own, so the records keep their number and their order: a training that
doesn't ask for the source sees what it would have seen.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clipkit.errors import UserError
from clipkit.formats.captions import OF_SOURCE, check_source, source_columns
from clipkit.formats.dataset import DatasetLayout, Rewrite, open_dataset, read_layout
from clipkit.formats.features import Feature
from clipkit.formats.kinds import own_name
from clipkit.formats.manifest import CLIPKIT_FOLDER, reinforced_folder
from clipkit.formats.records import decode_example
from clipkit.formatting import counted, size_text
from clipkit.jobs.passes import Runner
from clipkit.jobs.run import Engine
from clipkit.log import warn_on_stderr
from clipkit.storage.files import as_path, clear_leftovers, lock, remove
from clipkit.tfrecord_tools.account.captions import read_added, write_added
from clipkit.tfrecord_tools.captions.shard import CaptionedShard, add_captions_to
from clipkit.tfrecord_tools.captions.table import CaptionTable, RowCounts, open_table, pack_table, read_rows
from clipkit.tfrecord_tools.rewriting.finish import changed_shards, finish_rewrite, with_changes
from clipkit.tfrecord_tools.rewriting.plan import (
    RewritePlan,
    leave,
    num_bytes,
    planned_shards,
    read_plan,
    rewrite_jobs,
    work_folder,
    write_plan,
)
from clipkit.tfrecord_tools.rewriting.shard import read_state
from clipkit.tfrecord_tools.writing.metadata import add_feature


@dataclass(frozen=True)
class CaptionPlan(RewritePlan):
    """Captions of a `source` from a table."""

    command: ClassVar[Rewrite] = "add-captions"

    source: str
    table: str
    sha256: str
    by: str
    column: str
    counts: RowCounts

    @property
    def name(self) -> str:
        """The column that the records get."""
        return OF_SOURCE + self.source

    def is_of(self, table: CaptionTable, source: str) -> bool:
        return (self.source, self.sha256, self.by, self.column) == (source, table.sha256, table.by, table.column)


@dataclass(frozen=True)
class CaptionSummary:
    """What was joined. Of `records`, `joined` got captions; of the table's `rows`, `rows_joined` went into a record.

    The other rows have a key that no record has (`rows_unmatched`), no caption, or no key. `bytes` is what the shards
    grew by; `added` is False where all was there already.
    """

    path: Path
    source: str
    by: str
    column: str
    records: int
    joined: int
    shards: int
    bytes: int
    rows: int
    rows_joined: int
    rows_unmatched: int
    rows_without_caption: int
    rows_without_key: int
    added: bool

    @property
    def without(self) -> int:
        return self.records - self.joined

    def to_json(self) -> dict[str, Any]:
        """The counts, and the path as text."""
        return {**asdict(self), "path": str(self.path), "without": self.without}

    def text(self) -> str:
        """A few lines for a person."""
        there = "" if self.added else " (there already)"
        left_out = (
            (self.rows_unmatched, f"with a {self.by} that no record has"),
            (self.rows_without_caption, "without a caption"),
            (self.rows_without_key, f"without a {self.by}"),
        )
        return "\n".join(
            [
                f"captions of {self.source!r} in {self.joined:,} of {counted(self.records, 'record')} of {self.path}, "
                f"{size_text(self.bytes)} in {counted(self.shards, 'shard')}{there}; {self.without:,} without one",
                f"the table's {counted(self.rows, 'row')}: {self.rows_joined:,} joined by {self.by}"
                + "".join(f", {count:,} {what}" for count, what in left_out if count),
            ]
        )


def add_captions(
    path: Path,
    table: Path,
    *,
    by: str | None = None,
    source: str = "synthetic",
    column: str = "caption",
    engine: Engine = "local",
    workers: int | None = 1,
) -> CaptionSummary:
    """Add the captions of a table's `column` to the records of all splits whose `by` (key or url; None: the one that
    the table has) is the row's. One job a shard runs on `engine`.

    Several captions are a list in one row. A row goes into every record that has its key or URL.
    Raises UserError for a source that the dataset has already (of the same table: nothing is done), a table that can't
    be joined or of which no row was, a dataset that isn't whole, and another run that isn't finished.
    """
    check_source(source)
    layout = read_layout(as_path(path))
    folder = layout.folder
    listed = open_table(as_path(table), by, column, layout.features)
    with lock(folder / CLIPKIT_FOLDER):
        layout = read_layout(folder)  # again, since another run may have ended in the meantime
        clear_leftovers(folder, folder / CLIPKIT_FOLDER)
        plan = read_plan(folder, CaptionPlan)
        work = work_folder(folder, CaptionPlan.command)
        if plan is None:
            remove(work)  # of a run that was killed before its journal was there, or after it was gone
            if source in source_columns(layout.features):
                return _there_already(folder, listed, source)
            plan = _begin(layout, listed, source)
            _warn_of_teachers(folder)
        elif not plan.is_of(listed, source):
            raise UserError(
                f"{folder}: adding captions of {plan.source!r} from {plan.table} isn't finished: run that command again"
            )
        states = Runner(workers, engine).run(
            "add-captions",
            partial(add_captions_to, table=work, key=own_name(layout.features, plan.by), column=plan.name),
            rewrite_jobs(layout, plan),
            describe=lambda job: job.path.name,
            size=lambda job: job.before.bytes,
            finished=partial(read_state, kind=CaptionedShard),
            counts=lambda state: {"joined": state.joined},
        )
        summary = _summarise(folder, plan, states)
        if not summary.joined:
            leave(folder, plan.command)
            raise _nothing_joined(layout, listed)
        _finish(layout, plan, states, summary)
        return summary


def _begin(layout: DatasetLayout, table: CaptionTable, source: str) -> CaptionPlan:
    """Pack the table and put down the journal. Raises UserError when the dataset isn't whole."""
    folder, work = layout.folder, work_folder(layout.folder, CaptionPlan.command)
    shards = planned_shards(layout)
    try:
        counts = pack_table(table, OF_SOURCE + source, work)
    except UserError:
        remove(work)
        raise
    plan = CaptionPlan(
        num_bytes=num_bytes(folder),
        shards=shards,
        source=source,
        table=str(table.path),
        sha256=table.sha256,
        by=table.by,
        column=table.column,
        counts=counts,
    )
    write_plan(folder, plan)
    return plan


def _finish(
    layout: DatasetLayout, plan: CaptionPlan, states: Sequence[CaptionedShard], summary: CaptionSummary
) -> None:
    """Write the account of what was added, and index and metadata again."""
    account = {name: value for name, value in summary.to_json().items() if name not in ("path", "added", "without")}
    write_added(layout.folder, plan.source, {**account, "table": plan.table, "sha256": plan.sha256})
    add_feature(layout.folder, plan.name, Feature("text", is_list=True))
    changes = changed_shards(states)
    manifest = {split: with_changes(before, changes) for split, before in layout.manifest.items()}
    finish_rewrite(layout, plan, changes, manifest)


def _warn_of_teachers(folder: Path) -> None:
    """Say so where stored embeddings of teachers will be of captions that the records no longer have alone."""
    stored = reinforced_folder(folder)
    if stored.exists():
        warn_on_stderr(
            f"{stored} has teachers' embeddings of the captions so far, and training will refuse them for each record "
            "that gets more: run clipkit reinforce again into another folder"
        )


def _summarise(folder: Path, plan: CaptionPlan, states: Sequence[CaptionedShard]) -> CaptionSummary:
    counts = plan.counts
    matched = np.zeros(counts.rows - counts.without_caption - counts.without_key, bool)
    for state in states:
        matched[state.joined_rows()] = True
    joined = int(matched.sum())
    return CaptionSummary(
        path=folder,
        source=plan.source,
        by=plan.by,
        column=plan.column,
        records=sum(shard.records for shard in plan.shards),
        joined=sum(state.joined for state in states),
        shards=sum(state.joined > 0 for state in states),
        bytes=sum(state.grown for state in states),
        rows=counts.rows,
        rows_joined=joined,
        rows_unmatched=len(matched) - joined,
        rows_without_caption=counts.without_caption,
        rows_without_key=counts.without_key,
        added=True,
    )


def _there_already(folder: Path, table: CaptionTable, source: str) -> CaptionSummary:
    """The summary of an earlier run by the same table. Raises UserError where the captions are of another one."""
    account = read_added(folder).get(source, {})
    if (account.get("sha256"), account.get("by"), account.get("column")) != (table.sha256, table.by, table.column):
        of = f" from {account['table']}" if "table" in account else ""
        raise UserError(f"{folder} has captions of {source!r}{of} already: give these another name with --source")
    names = {field.name for field in fields(CaptionSummary)}
    known = {name: value for name, value in account.items() if name in names}
    return CaptionSummary(path=folder, added=False, **known)


def _nothing_joined(layout: DatasetLayout, table: CaptionTable) -> UserError:
    """What to say where no row is a record's: the keys of a folder of tars, for one, aren't those of its dataset."""
    theirs = next(
        key for keys, captions in read_rows(table) for key, some in zip(keys, captions, strict=True) if key and some
    )
    name = own_name(layout.features, table.by)
    first = (dataset.read(0) for dataset in (open_dataset(layout.folder, split) for split in layout.lengths) if dataset)
    ours = (decode_example(next(first, b""), [name]).get(name) or [b""])[0]
    shown = [repr(each.decode("utf-8", "replace") if isinstance(each, bytes) else str(each)) for each in (theirs, ours)]
    return UserError(
        f"no {table.by} of {table.path} is that of a record of {layout.folder}, and nothing was changed: the table has "
        f"{shown[0]}, the first record {shown[1]} in its column {name!r}, which must be the same text"
    )
