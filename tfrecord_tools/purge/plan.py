"""What a purge has set out to do: the journal that survives its death.

The journal (`clipkit/purge.json`) names the shards concerned as they were; `clipkit/purge/` holds the numbers of the
records, and the states of the shards that are rewritten already.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipkit.formats.dataset import DatasetLayout, read_journal, write_journal
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.storage.files import load_array, save_array
from clipkit.tfrecord_tools.purge.shard import PurgeJob, ValueReader

FORMAT = 1

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlannedShard:
    """A shard as it was before, and how many of its records are to be removed."""

    split: str
    file: str
    records: int
    bytes: int
    purged: int


@dataclass(frozen=True)
class PurgePlan:
    """A purge by its name. `lengths` and `num_bytes` are what dataset_info.json said of each split before.

    `computed` counts the records whose hash was computed from the stored image.
    """

    purge: str
    list_path: str
    list_sha256: str
    by: str
    computed: int
    lengths: dict[str, list[int]]
    num_bytes: dict[str, str | None]
    shards: tuple[PlannedShard, ...]


def work_folder(folder: Path) -> Path:
    """Where a purge keeps what it needs until it is finished."""
    return folder / CLIPKIT_FOLDER / "purge"


def write_plan(folder: Path, plan: PurgePlan, numbers: Int64Array, places: Int64Array) -> None:
    """Write what is to be done, the journal last.

    `numbers` are those of the records to remove, shard after shard, and `places` where their values stand in the list's
    array.
    """
    save_array(work_folder(folder) / "doomed.npy", np.stack([numbers, places]))
    write_journal(folder, "purge", FORMAT, asdict(plan))


def read_plan(folder: Path) -> PurgePlan | None:
    """The plan of a purge that isn't finished, None when there is none. Raises UserError for one of another version."""
    values = read_journal(folder, "purge", FORMAT)
    if values is None:
        return None
    return PurgePlan(**{**values, "shards": tuple(PlannedShard(**shard) for shard in values["shards"])})


def shard_jobs(layout: DatasetLayout, plan: PurgePlan, reader: ValueReader) -> tuple[list[PurgeJob], Int64Array]:
    """The shards to rewrite, in the plan's order, and the places of all records to remove in the list's array."""
    folder = layout.folder
    numbers, places = load_array(work_folder(folder) / "doomed.npy")
    entries = {shard.file: shard for split in layout.manifest.values() for shard in split.shards}
    jobs = []
    end = 0
    for number, shard in enumerate(plan.shards):
        start, end = end, end + shard.purged
        jobs.append(
            PurgeJob(
                path=folder / shard.file,
                records=shard.records,
                bytes=shard.bytes,
                entry=entries.get(shard.file),
                reader=reader,
                numbers=tuple(numbers[start:end].tolist()),
                state=work_folder(folder) / f"shard-{number:05d}.json",
            )
        )
    return jobs, places
