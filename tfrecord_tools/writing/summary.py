"""What a build tells when it is done: its counts, for a person and for a script."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest
from clipkit.formatting import counted, counts_text, size_text


@dataclass(frozen=True)
class BuildSummary:
    """What a build made: samples = records + the sum of `skipped`. `built` is False when all was there already.

    Where one call made several splits, `split` names them all, the counts are of all, and `by_split` has the records.
    """

    path: Path
    name: str
    split: str
    shards: int
    samples: int
    records: int
    bytes: int
    skipped: dict[str, int]
    formats: dict[str, int]
    converted: dict[str, int]
    built: bool
    by_split: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The counts, and the path as text."""
        return {**asdict(self), "path": str(self.path)}

    def text(self) -> str:
        """A few lines for a person."""
        there = "" if self.built else " (there already)"
        lines = [
            f"{self.records:,} of {counted(self.samples, 'sample')}, {size_text(self.bytes)} in "
            f"{counted(self.shards, 'shard')}: split {self.split} of {self.path}{there}"
        ]
        if self.by_split:
            lines.append(counts_text(self.by_split))
        if self.skipped:
            files = " and ".join(f"skipped-{split}.jsonl" for split in self.split.split(","))
            lines.append(
                f"skipped: {counts_text(self.skipped)}; each sample, but for what wasn't wanted, in "
                f"{self.path / CLIPKIT_FOLDER / files}"
            )
        if self.converted:
            lines.append(f"stored as JPEG, since TFDS can't decode them: {counts_text(self.converted)}")
        return "\n".join(lines)


def summarise(folder: Path, name: str, splits: Mapping[str, SplitManifest], built: bool) -> BuildSummary:
    """The summary of the splits that one call makes, or finds whole."""
    whole = SplitManifest(
        tuple(shard for manifest in splits.values() for shard in manifest.shards),
        tuple(source for manifest in splits.values() for source in manifest.sources),
    )
    return BuildSummary(
        path=folder,
        name=name,
        split=",".join(splits),
        shards=len(whole.shards),
        samples=whole.samples,
        records=whole.records,
        bytes=whole.bytes,
        skipped=whole.skipped,
        formats=whole.formats,
        converted=whole.converted,
        built=built,
        by_split={split: manifest.records for split, manifest in splits.items()} if len(splits) > 1 else {},
    )
