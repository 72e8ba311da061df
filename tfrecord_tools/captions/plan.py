"""What a run of `clipkit add-captions` has set out to do, and the packed table, which waits beside the journal."""

from dataclasses import dataclass
from typing import ClassVar

from clipkit.errors import UserError
from clipkit.formats.captions import OF_SOURCE
from clipkit.formats.dataset import DatasetLayout, Rewrite
from clipkit.storage.files import remove
from clipkit.tfrecord_tools.captions.table import CaptionTable, RowCounts, pack_table
from clipkit.tfrecord_tools.rewriting.plan import RewritePlan, num_bytes, planned_shards, work_folder, write_plan


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


def begin(layout: DatasetLayout, table: CaptionTable, source: str) -> CaptionPlan:
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
