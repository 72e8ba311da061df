"""Where the files of a downloaded shard lie, and the state that says that they are whole.

The state is written last and names each file with its size: whoever finds it finds the others, and a file that was
changed since is noticed. For img2dataset's formats it is the `00000_stats.json` that img2dataset would write.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

from clipkit.formats.dataset import shard_name
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.storage.files import disk_errors, write_json
from clipkit.tfrecord_tools.account.ledger import LEDGER_FOLDER

Format = Literal["tfds", "webdataset", "parquet"]
FORMATS: tuple[Format, ...] = ("tfds", "webdataset", "parquet")

SPLIT = "train"
MIN_SHARD_DIGITS = 5


@dataclass(frozen=True)
class ShardFiles:
    """The files of one shard. `rows` is webdataset's table of all rows, None in the other formats."""

    data: Path
    ledger: Path
    state: Path
    rows: Path | None = None

    def written(self) -> tuple[Path, ...]:
        """All but the state, in the order in which they are written."""
        return tuple(path for path in (self.data, self.rows, self.ledger) if path is not None)

    def inside(self, folder: Path) -> Self:
        """Files of the same names, all in one folder."""
        rows = None if self.rows is None else folder / f"rows-{self.rows.name}"
        return type(self)(folder / self.data.name, folder / f"ledger-{self.ledger.name}", folder / "state.json", rows)


@dataclass(frozen=True)
class ShardState:
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


@dataclass(frozen=True)
class Layout:
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

    def files(self, number: int) -> ShardFiles:
        """Where the files of a shard lie."""
        name = self.shard(number)
        ledger = self.own / LEDGER_FOLDER / f"{name}.parquet"
        if self.format == "tfds":
            data = self.root / shard_name(self.name, SPLIT, number, self.shard_count)
            return ShardFiles(data, ledger, self.own / "shards" / f"{name}.json")
        rows = self.root / f"{name}.parquet" if self.format == "webdataset" else None
        data = self.root / (f"{name}.tar" if self.format == "webdataset" else f"{name}.parquet")
        return ShardFiles(data, ledger, self.root / f"{name}_stats.json", rows)


def write_state(path: Path, state: ShardState) -> None:
    """Write a state, whole or not at all."""
    write_json(path, asdict(state))


def load_state(files: ShardFiles) -> ShardState | None:
    """A shard's state as it was written, whether or not its files are still so; None when there is none."""
    with disk_errors(files.state):
        if not files.state.exists():
            return None
        try:
            return ShardState(**json.loads(files.state.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None


def is_whole(files: ShardFiles, state: ShardState) -> bool:
    """Whether the shard's files are the ones that the state speaks of."""
    with disk_errors(files.state):
        try:
            return file_sizes(files) == state.sizes
        except FileNotFoundError:
            return False


def read_state(files: ShardFiles) -> ShardState | None:
    """The state of a finished shard; None when it isn't there, or its files aren't the ones that it speaks of."""
    state = load_state(files)
    return state if state is not None and is_whole(files, state) else None


def label(files: ShardFiles, path: Path) -> str:
    """What a state calls one of its files: names alone would be the same for webdataset's table and the ledger."""
    return "ledger" if path == files.ledger else "rows" if path == files.rows else "data"


def file_sizes(files: ShardFiles) -> dict[str, int]:
    """Bytes of each file of a shard but the state."""
    return {label(files, path): path.stat().st_size for path in files.written()}
