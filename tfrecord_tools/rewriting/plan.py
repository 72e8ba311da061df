"""What a command that writes shards again has set out to do: the journal that survives its death.

The journal (`clipkit/COMMAND.json`) names the shards as they were; `clipkit/COMMAND/` holds what the work takes, and
the states of the shards that are done. While the journal is there, `open_dataset` refuses the dataset: from the first
shard that is renamed to the last of the metadata, index and shards don't agree. The journal goes before the folder.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, TypeVar

from clipkit.config import from_json
from clipkit.errors import UserError
from clipkit.formats.dataset import DatasetLayout, Rewrite, journal_path, open_dataset
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.storage.files import read_json, remove, write_json
from clipkit.tfrecord_tools.rewriting.shard import PlannedShard, RewriteJob

FORMAT, READABLE = 2, (1, 2)  # the first had more fields


@dataclass(frozen=True)
class RewritePlan:
    """The shards to write again; each command adds what it does to them.

    `num_bytes` is what dataset_info.json said of each split before.
    """

    command: ClassVar[Rewrite]

    num_bytes: dict[str, str | None]
    shards: tuple[PlannedShard, ...]


Plan = TypeVar("Plan", bound=RewritePlan)


def planned_shards(layout: DatasetLayout) -> tuple[PlannedShard, ...]:
    """All shards of all splits. Raises UserError when one is missing or hasn't the size that the manifest says."""
    return tuple(
        PlannedShard(split, shard.file, shard.records, shard.bytes)
        for split in layout.lengths
        for shard in open_dataset(layout.folder, split).shards
    )


def num_bytes(folder: Path) -> dict[str, str | None]:
    """What dataset_info.json says of each split."""
    return {part["name"]: part.get("numBytes") for part in read_json(folder / "dataset_info.json")["splits"]}


def work_folder(folder: Path, command: Rewrite) -> Path:
    """Where a command keeps what it needs until it is finished."""
    return folder / CLIPKIT_FOLDER / command


def write_plan(folder: Path, plan: RewritePlan) -> None:
    """Put down the journal; what the plan takes must be in the work folder already."""
    write_json(journal_path(folder, plan.command), {"format": FORMAT, **asdict(plan)})


def read_plan(folder: Path, kind: type[Plan]) -> Plan | None:
    """The plan of a command that isn't finished, or None. Raises UserError for one of another version."""
    path = journal_path(folder, kind.command)
    if not path.exists():
        return None
    values = read_json(path)
    if values.get("format") not in READABLE:
        raise UserError(
            f"{path} is of another version of clipkit: finish {kind.command} with the version that began it"
        )
    known = {field.name for field in fields(kind)}
    return from_json(kind, {name: value for name, value in values.items() if name in known}, str(path))


def rewrite_jobs(layout: DatasetLayout, plan: RewritePlan) -> list[RewriteJob]:
    """One job a shard, in the plan's order."""
    work = work_folder(layout.folder, plan.command)
    entries = {shard.file: shard for split in layout.manifest.values() for shard in split.shards}
    return [
        RewriteJob(layout.folder / shard.file, shard, entries.get(shard.file), work / f"shard-{number:05d}.json")
        for number, shard in enumerate(plan.shards)
    ]


def leave(folder: Path, command: Rewrite) -> None:
    """Remove the journal and what it was about."""
    remove(journal_path(folder, command))
    remove(work_folder(folder, command))
