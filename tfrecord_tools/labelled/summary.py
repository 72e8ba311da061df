"""What `build-imagenet` tells when it is done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.formatting import counted, size_text
from clipkit.tfrecord_tools.writing.summary import BuildSummary


@dataclass(frozen=True)
class LabelledSummary:
    """What was made, split by split. `subset`: it isn't the whole of ImageNet-1K; `notes` say what else to know."""

    path: Path
    name: str
    classes: int
    subset: bool
    splits: tuple[BuildSummary, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The counts, and paths as text."""
        return {
            "path": str(self.path),
            "name": self.name,
            "classes": self.classes,
            "subset": self.subset,
            "splits": {split.split: split.to_json() for split in self.splits},
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """A few lines for a person."""
        lines = [f"{self.path}: {counted(self.classes, 'class', 'classes')}"]
        for split in self.splits:
            there = "" if split.built else " (there already)"
            lines.append(
                f"{split.split}: {counted(split.records, 'image')}, {size_text(split.bytes)} in "
                f"{counted(split.shards, 'shard')}{there}"
            )
            if split.skipped:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in split.skipped.items())
                listed = self.path / CLIPKIT_FOLDER / f"skipped-{split.split}.jsonl"
                lines.append(f"{split.split}: left out as broken: {reasons}; each in {listed}")
            if split.converted:
                formats = ", ".join(f"{name} {count:,}" for name, count in split.converted.items())
                lines.append(f"{split.split}: stored as RGB JPEG, as TFDS does: {formats}")
        return "\n".join([*lines, *self.notes])
