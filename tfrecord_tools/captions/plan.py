"""What a run of `clipkit add-captions` has set out to do: the journal that survives its death.

The journal (`clipkit/add-captions.json`) names the shards as they were; `clipkit/add-captions/` holds the packed table,
and the states of the shards that are done.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clipkit.formats.captions import OF_SOURCE
from clipkit.formats.dataset import DatasetLayout, read_journal, write_journal
from clipkit.formats.kinds import own_name
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.tfrecord_tools.captions.shard import CaptionJob
from clipkit.tfrecord_tools.captions.table import ROWS, TEXTS, CaptionTable, RowCounts

FORMAT = 1


@dataclass(frozen=True)
class PlannedShard:
    """A shard as it was before."""

    split: str
    file: str
    records: int
    bytes: int


@dataclass(frozen=True)
class CaptionPlan:
    """Captions of a `source` from a table. `num_bytes` is what dataset_info.json said of each split before."""

    source: str
    table: str
    sha256: str
    by: str
    column: str
    counts: RowCounts
    num_bytes: dict[str, str | None]
    shards: tuple[PlannedShard, ...]

    @property
    def name(self) -> str:
        """The column that the records get."""
        return OF_SOURCE + self.source

    def is_of(self, table: CaptionTable, source: str) -> bool:
        return (self.source, self.sha256, self.by, self.column) == (source, table.sha256, table.by, table.column)


def work_folder(folder: Path) -> Path:
    """Where all is kept that is needed until the work is finished."""
    return folder / CLIPKIT_FOLDER / "add-captions"


def write_plan(folder: Path, plan: CaptionPlan) -> None:
    write_journal(folder, "add-captions", FORMAT, asdict(plan))


def read_plan(folder: Path) -> CaptionPlan | None:
    """The plan of a run that isn't finished, None when there is none. Raises UserError for one of another version."""
    values = read_journal(folder, "add-captions", FORMAT)
    if values is None:
        return None
    shards = tuple(PlannedShard(**shard) for shard in values["shards"])
    return CaptionPlan(**{**values, "counts": RowCounts(**values["counts"]), "shards": shards})


def shard_jobs(layout: DatasetLayout, plan: CaptionPlan) -> Sequence[CaptionJob]:
    """One job a shard, in the plan's order."""
    folder, work = layout.folder, work_folder(layout.folder)
    entries = {shard.file: shard for split in layout.manifest.values() for shard in split.shards}
    return [
        CaptionJob(
            path=folder / shard.file,
            records=shard.records,
            bytes=shard.bytes,
            entry=entries.get(shard.file),
            rows=work / ROWS,
            texts=work / TEXTS,
            key=own_name(layout.features, plan.by),
            column=plan.name,
            state=work / f"shard-{number:05d}.json",
        )
        for number, shard in enumerate(plan.shards)
    ]
