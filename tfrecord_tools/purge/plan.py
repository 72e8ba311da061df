"""What a purge has set out to do: the journal that survives its death.

The journal (`clipkit/purge.json`) names the shards concerned as they were; `clipkit/purge/` holds the numbers of the
records, and the accounts of the shards that are rewritten already.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipkit.errors import UserError
from clipkit.formats.dataset import journal_path
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.storage.files import local_copy, read_json, write_beside, write_json

FORMAT = 1

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlannedShard:
    """A shard as it was before, and how many of its records are to go."""

    split: str
    file: str
    records: int
    bytes: int
    purged: int


@dataclass(frozen=True)
class Plan:
    """A purge by its name. `lengths` and `num_bytes` are what dataset_info.json said of each split before.

    `computed` counts the records whose hash was computed of the stored image.
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


def state_path(folder: Path, number: int) -> Path:
    """Where the account of the plan's shard of this number stands once it is rewritten."""
    return work_folder(folder) / f"shard-{number:05d}.json"


def write_plan(folder: Path, plan: Plan, numbers: Sequence[Int64Array], places: Sequence[Int64Array]) -> None:
    """Write what is to be done, the journal last. `numbers` are those of each shard's records that are to go, and
    `places` where their values stand in the list's array."""
    with write_beside(work_folder(folder) / "doomed.npy") as temporary, temporary.open("wb") as file:
        empty = np.zeros(0, np.int64)
        np.save(file, np.stack([np.concatenate([empty, *numbers]), np.concatenate([empty, *places])]))
    write_json(journal_path(folder), {"format": FORMAT, **asdict(plan)})


def read_plan(folder: Path) -> Plan | None:
    """The plan of a purge that isn't finished, None when there is none. Raises UserError for one of another version."""
    path = journal_path(folder)
    if not path.exists():
        return None
    told = read_json(path)
    if told.pop("format", None) != FORMAT:
        raise UserError(f"{path} is of another version of clipkit: finish that purge with the version that began it")
    return Plan(**{**told, "shards": tuple(PlannedShard(**shard) for shard in told["shards"])})


def read_numbers(folder: Path, plan: Plan) -> tuple[list[Int64Array], Int64Array]:
    """The numbers of the records of each shard of a plan, and all places together."""
    with local_copy(work_folder(folder) / "doomed.npy") as path:
        numbers, places = np.load(path)
    ends = np.cumsum([shard.purged for shard in plan.shards])
    return np.split(numbers, ends[:-1]) if plan.shards else [], places
