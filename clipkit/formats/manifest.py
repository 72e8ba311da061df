"""The account of a dataset: what went into each shard, what came out, and what was left out and why.

The manifest stands in `clipkit/manifest.json` beside TFDS's own files, which have no place for it. Its counts add up:
in every source, every shard that has sources, and every split, samples = records + all that was skipped.
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from clipkit.errors import UserError
from clipkit.formats.records import RecordWriter
from clipkit.storage.files import read_json, write_json

CLIPKIT_FOLDER = "clipkit"
# What `clipkit build-tfds --precompute` adds, by the names of the option and of the columns, which are clipkit's own. A
# table may have a column called `tokens` too, so a column is only believed where the split's options name it.
TOKENS, SYNTAX = "tokens", "syntax"
PRECOMPUTED_COLUMNS = {TOKENS: "clipkit_tokens", SYNTAX: "clipkit_syntax"}


def reinforced_folder(data: Path) -> Path:
    """Where the embeddings of teachers are that `clipkit reinforce` stores of some data, unless they are said to be
    elsewhere: beside these.
    """
    return data.with_name(f"{data.name}.reinforced")


@dataclass(frozen=True)
class SourceEntry:
    """One input file of a shard. `skipped` counts the samples left out by reason."""

    file: str
    bytes: int
    samples: int
    records: int
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardEntry:
    """One TFRecord file of a split. `crc32c` (8 hexadecimal digits) is that of the whole file."""

    file: str
    records: int
    bytes: int
    crc32c: str
    sources: tuple[SourceEntry, ...] = ()
    formats: dict[str, int] = field(default_factory=dict)
    converted: dict[str, int] = field(default_factory=dict)
    status: str = "done"

    @classmethod
    def of(
        cls,
        file: str,
        writer: RecordWriter,
        sources: tuple[SourceEntry, ...],
        formats: Mapping[str, int],
        converted: Mapping[str, int],
    ) -> Self:
        """The entry of what a writer has written, which gets the name `file`."""
        counts = dict(sorted(formats.items())), dict(sorted(converted.items()))
        return cls(file, writer.records, writer.bytes, writer.crc32c, sources, *counts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "sources": tuple(SourceEntry(**source) for source in values["sources"])})


@dataclass(frozen=True)
class SplitManifest:
    """All shards of one split, in the order of their numbers.

    A shard that took part of a source names the whole source with its size, and counts its own part. Where records of
    all sources are in all shards (a shuffle), the sources stand here once and not in each shard.
    """

    shards: tuple[ShardEntry, ...]
    sources: tuple[SourceEntry, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """What decided which samples are here, in which form and order, as `clipkit build-tfds` names it."""
    choice: dict[str, Any] = field(default_factory=dict)
    """What `--keep-best` and `--balance` found and did, in numbers; of all splits that were made together."""

    @property
    def all_sources(self) -> list[SourceEntry]:
        return [*self.sources, *(source for shard in self.shards for source in shard.sources)]

    @property
    def source_files(self) -> list[tuple[str, int]]:
        """Name and size in bytes of each input file, once, in order."""
        return list(dict.fromkeys((source.file, source.bytes) for source in self.all_sources))

    @property
    def samples(self) -> int:
        return sum(source.samples for source in self.all_sources)

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def skipped(self) -> dict[str, int]:
        return add_counts(source.skipped for source in self.all_sources)

    @property
    def formats(self) -> dict[str, int]:
        """Records by the format of their image as stored."""
        return add_counts(shard.formats for shard in self.shards)

    @property
    def converted(self) -> dict[str, int]:
        """Records whose image TFDS can't decode and which was therefore stored as JPEG, by the original format."""
        return add_counts(shard.converted for shard in self.shards)


def precomputed_columns(options: Mapping[str, Any], names: Container[str]) -> dict[str, str]:
    """The columns, among `names`, that a split's options say were precomputed, by the names of the option.

    An older clipkit called the columns as the option.
    """
    return {
        wanted: name
        for wanted in options.get("precompute", ())
        if (name := next((name for name in (PRECOMPUTED_COLUMNS.get(wanted), wanted) if name in names), None))
    }


def add_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counters added up, the names sorted."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def manifest_path(folder: Path) -> Path:
    return folder / CLIPKIT_FOLDER / "manifest.json"


def index_path(folder: Path, split: str) -> Path:
    """Where the byte offsets of a split's records stand: uint64[records], shard after shard."""
    return folder / CLIPKIT_FOLDER / f"index-{split}.npy"


def write_manifest(folder: Path, splits: Mapping[str, SplitManifest]) -> None:
    """Write the manifest of a dataset directory, sums first so that a reader sees them."""
    write_json(
        manifest_path(folder),
        {
            "format": 1,
            "splits": {
                name: {
                    "samples": split.samples,
                    "records": split.records,
                    "bytes": split.bytes,
                    "skipped": split.skipped,
                    "formats": split.formats,
                    "converted": split.converted,
                    "options": split.options,
                    "choice": split.choice,
                    "sources": [asdict(source) for source in split.sources],
                    "shards": [asdict(shard) for shard in split.shards],
                }
                for name, split in splits.items()
            },
        },
    )


def read_manifest(folder: Path) -> dict[str, SplitManifest]:
    """The splits of a dataset directory by name; {} where clipkit wrote no manifest."""
    path = manifest_path(folder)
    if not path.exists():
        return {}
    values = read_json(path)
    try:
        return {
            name: SplitManifest(
                tuple(ShardEntry.from_dict(shard) for shard in split["shards"]),
                tuple(SourceEntry(**source) for source in split.get("sources", ())),
                split.get("options", {}),
                split.get("choice", {}),
            )
            for name, split in values["splits"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} isn't a manifest that this clipkit knows ({error!r}): build the dataset again"
        ) from error
