"""What a build tells: its progress while it runs, its counts when it is done."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipkit.log import Progress
from clipkit.manifest import CLIPKIT_FOLDER, SplitManifest


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is. Bytes are those of the image shards; what an earlier run finished counts as done."""

    bytes_done: int
    bytes_total: int
    shards_done: int
    shards_total: int
    records: int
    skipped: int


@dataclass(frozen=True)
class BuildSummary:
    """What a build made: samples = records + the sum of `skipped`. `built` is False when all was there already."""

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

    def to_json(self) -> dict[str, Any]:
        """The counts, and the path as text."""
        return {**asdict(self), "path": str(self.path)}

    def text(self) -> str:
        """A few lines for a person."""
        there = "" if self.built else " (there already)"
        lines = [
            f"{self.records:,} of {self.samples:,} samples, {self.bytes / 1e6:,.1f} MB in {self.shards:,} "
            f"{'shard' if self.shards == 1 else 'shards'}: split {self.split} of {self.path}{there}"
        ]
        if self.skipped:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.items())
            lines.append(
                f"skipped: {reasons}; each sample in {self.path / CLIPKIT_FOLDER / f'skipped-{self.split}.jsonl'}"
            )
        if self.converted:
            formats = ", ".join(f"{name} {count:,}" for name, count in self.converted.items())
            lines.append(f"stored as JPEG, since TFDS can't decode them: {formats}")
        return "\n".join(lines)


def progress_line(line: Progress) -> Callable[[BuildProgress], None]:
    """Show a build's progress on the progress line, in megabytes of image shards."""

    def tell(now: BuildProgress) -> None:
        note = f"shard {now.shards_done:,}/{now.shards_total:,}, {now.records:,} records, {now.skipped:,} skipped"
        line.update(now.bytes_done // 1_000_000, note)

    return tell


def summarise(folder: Path, name: str, split: str, manifest: SplitManifest, built: bool) -> BuildSummary:
    """The summary of a split that is whole."""
    return BuildSummary(
        path=folder,
        name=name,
        split=split,
        shards=len(manifest.shards),
        samples=manifest.samples,
        records=manifest.records,
        bytes=manifest.bytes,
        skipped=manifest.skipped,
        formats=manifest.formats,
        converted=manifest.converted,
        built=built,
    )
