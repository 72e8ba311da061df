"""What a purge has set out to do, and the numbers of the records to remove, which wait beside the journal."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from clipkit.formats.dataset import DatasetLayout, Rewrite
from clipkit.storage.files import load_array, save_array
from clipkit.tfrecord_tools.purge.shard import PurgeJob, ValueReader
from clipkit.tfrecord_tools.rewriting.plan import RewritePlan, rewrite_jobs, work_folder, write_plan

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PurgePlan(RewritePlan):
    """A purge by its name. `computed` counts the records whose hash was computed from the stored image."""

    command: ClassVar[Rewrite] = "purge"

    purge: str
    list_path: str
    list_sha256: str
    by: str
    computed: int


def begin(folder: Path, plan: PurgePlan, numbers: Int64Array, places: Int64Array) -> None:
    """Write what is to be done, the journal last.

    `numbers` are those of the records to remove, shard after shard, and `places` where their values stand in the list's
    array.
    """
    save_array(work_folder(folder, "purge") / "doomed.npy", np.stack([numbers, places]))
    write_plan(folder, plan)


def purge_jobs(layout: DatasetLayout, plan: PurgePlan, reader: ValueReader) -> tuple[list[PurgeJob], Int64Array]:
    """The shards to rewrite, in the plan's order, and the places of all records to remove in the list's array."""
    numbers, places = load_array(work_folder(layout.folder, "purge") / "doomed.npy")
    ends = np.cumsum([shard.purged for shard in plan.shards], dtype=np.int64)[:-1]
    parts = np.split(numbers, ends)
    jobs = [
        PurgeJob(**vars(job), reader=reader, numbers=tuple(part.tolist()))
        for job, part in zip(rewrite_jobs(layout, plan), parts, strict=False)
    ]
    return jobs, places
