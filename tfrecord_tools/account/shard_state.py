"""Where the files of a downloaded shard lie, and the state that says that they are whole.

The state is written last and names each file with its size: whoever finds it finds the others, and a file that was
changed since is noticed. For img2dataset's formats it is the `00000_stats.json` that img2dataset would write.

A new version of a shard takes the place of the old one so that a kill leaves one of them and never half of each. No
disk renames several files at once, so the new ones are made in a folder of their own, their state last, and then moved
one by one, the state last again. A folder with a state is whole, and whoever finds it moves what is still there: doing
that twice does no harm. A folder without one was left by a kill, and is removed.
"""

import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from clipkit.formats.dataset import shard_name
from clipkit.formats.manifest import CLIPKIT_FOLDER, add_counts
from clipkit.storage.files import disk_errors, is_remote, remove, sync_file, write_json
from clipkit.storage.stores import as_upath, retry, store_errors
from clipkit.tfrecord_tools.account.ledger import LEDGER_FOLDER
from clipkit.tfrecord_tools.outcome import RowOutcome

Format = Literal["tfds", "webdataset", "parquet"]
FORMATS: tuple[Format, ...] = ("tfds", "webdataset", "parquet")

SPLIT = "train"
MIN_SHARD_DIGITS = 5


@dataclass(frozen=True)
class DownloadFiles:
    """The files of one shard. `rows` is webdataset's table of all rows, None in the other formats."""

    data: Path
    ledger: Path
    state: Path
    rows: Path | None = None

    def written(self) -> dict[str, Path]:
        """All but the state, in the order in which they are written, by the names that a state has for them."""
        paths = {"data": self.data, "rows": self.rows, "ledger": self.ledger}
        return {label: path for label, path in paths.items() if path is not None}

    def inside(self, folder: Path) -> Self:
        """Files of the same names, all in one folder."""
        rows = None if self.rows is None else folder / f"rows-{self.rows.name}"
        return type(self)(folder / self.data.name, folder / f"ledger-{self.ledger.name}", folder / "state.json", rows)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file but the state."""
        return {label: path.stat().st_size for label, path in self.written().items()}


@dataclass(frozen=True)
class DownloadLayout:
    """The output folder of a download and how its files are named. `name` is the dataset's for `tfds`, else ""."""

    root: Path
    format: Format
    name: str
    shard_count: int

    @property
    def own(self) -> Path:
        """What clipkit writes for itself; img2dataset takes any `*.json` in the folder above for a finished shard."""
        return self.root / CLIPKIT_FOLDER

    @property
    def pending(self) -> Path:
        """Where shards that are to take the place of others wait until they are whole."""
        return self.own / "pending"

    def shard(self, number: int) -> str:
        """A shard's number as file names and keys have it."""
        return f"{number:0{max(MIN_SHARD_DIGITS, len(str(self.shard_count - 1)))}d}"

    def files(self, number: int) -> DownloadFiles:
        """Where the files of a shard lie."""
        name = self.shard(number)
        ledger = self.own / LEDGER_FOLDER / f"{name}.parquet"
        if self.format == "tfds":
            data = self.root / shard_name(self.name, SPLIT, number, self.shard_count)
            return DownloadFiles(data, ledger, self.own / "shards" / f"{name}.json")
        rows = self.root / f"{name}.parquet" if self.format == "webdataset" else None
        data = self.root / (f"{name}.tar" if self.format == "webdataset" else f"{name}.parquet")
        return DownloadFiles(data, ledger, self.root / f"{name}_stats.json", rows)


# ---------------------------------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DownloadState:
    """What is known of a finished shard: `count` rows = `successes` + the sum of `failed`.

    `sizes` are the bytes of its files by name, `round` the number of the last retry that it has been through.
    `image_bytes` are those stored, `body_bytes` those fetched. `crc32c`, `kinds` and `present` (how many values each
    column has) are the TFRecord file's.
    """

    count: int
    successes: int
    failed_to_download: int
    failed_to_resize: int
    failed: dict[str, int]
    empty_captions: int
    hash_check: dict[str, int]
    image_bytes: int
    body_bytes: int
    start_time: float
    end_time: float
    round: int
    sizes: dict[str, int]
    crc32c: str = ""
    kinds: dict[str, str] = field(default_factory=dict)
    present: dict[str, int] = field(default_factory=dict)

    @property
    def row_counts(self) -> dict[str, int]:
        """The rows by what became of them: images under `ok`, failures by reason."""
        return {"ok": self.successes, **self.failed}

    @property
    def kinds_met(self) -> dict[str, str]:
        """The kinds of the columns that have a value in the shard."""
        return {column: self.kinds[column] for column in self.present}

    def is_narrower(self, kinds: dict[str, str]) -> bool:
        """Whether the shard was written with narrower kinds than all together need."""
        return any(kinds[column] != kind for column, kind in self.kinds_met.items())


def outcome_counts(outcomes: Sequence[RowOutcome]) -> dict[str, Any]:
    """What a state counts of its rows' outcomes, by the names of its fields."""
    stored = [outcome for outcome in outcomes if outcome.reason is None]
    failed = Counter(outcome.reason for outcome in outcomes if outcome.reason is not None)
    return {
        "successes": len(stored),
        "failed": dict(sorted(failed.items())),
        "hash_check": dict(sorted(Counter(outcome.hash_check for outcome in stored if outcome.hash_check).items())),
        "image_bytes": sum(outcome.jpg_bytes or 0 for outcome in stored),
    }


def add_states(states: Sequence[DownloadState]) -> dict[str, Any]:
    """What a download's summary counts of all its shards, by the names of its fields; `failed` most first."""
    failed = add_counts(state.failed for state in states)
    return {
        "downloaded": sum(state.successes for state in states),
        "failed": dict(sorted(failed.items(), key=lambda item: (-item[1], item[0]))),
        "hash_check": add_counts(state.hash_check for state in states),
        "image_bytes": sum(state.image_bytes for state in states),
    }


def write_state(path: Path, state: DownloadState) -> None:
    """Write a state, whole or not at all."""
    write_json(path, asdict(state))


def load_state(files: DownloadFiles) -> DownloadState | None:
    """A shard's state as it was written, whether or not its files are still so; None when there is none."""
    with disk_errors(files.state):
        if not files.state.exists():
            return None
        try:
            values = json.loads(files.state.read_text(encoding="utf-8"))
            # Earlier versions spelt one reason "empty caption".
            failed = {reason.replace(" ", "-"): count for reason, count in values.pop("failed").items()}
            return DownloadState(failed=failed, **values)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None


def is_whole(files: DownloadFiles, state: DownloadState) -> bool:
    """Whether the shard's files have the sizes that the state names."""
    with disk_errors(files.state):
        try:
            return files.sizes() == state.sizes
        except FileNotFoundError:
            return False


def finished_state(files: DownloadFiles) -> DownloadState | None:
    """The state of a finished shard; None when it isn't there, or its files haven't the sizes that it names."""
    state = load_state(files)
    return state if state is not None and is_whole(files, state) else None


# ---------------------------------------------------------------------------------------------------------------------
# A shard in the place of another
# ---------------------------------------------------------------------------------------------------------------------


def new_folder(layout: DownloadLayout, number: int) -> Path:
    """A folder for the new files of a shard, `DownloadFiles.inside` of it."""
    return layout.pending / f"{layout.shard(number)}.{secrets.randbits(60)}"


def commit(folder: Path, final: DownloadFiles) -> None:
    """Move the files of a whole folder to their places and remove it. Raises UserError when the disk refuses."""
    new = final.inside(folder)
    pairs = zip((*new.written().values(), new.state), (*final.written().values(), final.state), strict=True)
    for source, target in pairs:
        with disk_errors(target):
            if source.exists():
                move(source, target)
    remove(folder)


def move(source: Path, target: Path) -> None:
    """Rename a file over another; in a store copy it, and then remove the source."""
    if is_remote(source):
        path = as_upath(source)
        with store_errors(target, writing=True):
            retry(lambda: path.fs.mv(path.path, as_upath(target).path))
        return
    source.replace(target)
    sync_file(target.parent)


def recover(layout: DownloadLayout, number: int | None = None) -> None:
    """Finish what was whole when a run was killed, of one shard or of all, and remove what wasn't."""
    with disk_errors(layout.pending):
        folders = sorted(layout.pending.iterdir()) if layout.pending.exists() else []
    for folder in folders:
        name = folder.name.partition(".")[0]
        if number is not None and name != layout.shard(number):
            continue
        if (folder / "state.json").exists():
            commit(folder, layout.files(int(name)))
        else:
            remove(folder)
