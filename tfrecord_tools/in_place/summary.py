"""What `build-tfds --in-place` tells when it is done."""

from dataclasses import dataclass, field

from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.formatting import counted
from clipkit.tfrecord_tools.writing.summary import BuildSummary


@dataclass(frozen=True)
class InPlaceSummary(BuildSummary):
    """`rewritten`: why, by the shard's old name; all others were renamed alone. `problems`: bad pairs by reason."""

    rewritten: dict[str, str] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """A few lines for a person."""
        lines = [super().text()]
        if self.rewritten:
            first, why = next(iter(self.rewritten.items()))
            lines.append(
                f"{len(self.rewritten):,} of {counted(self.shards, 'shard')} written anew, since TensorFlow refuses "
                f"what img2dataset writes for a null: {first} ({why}){' …' if len(self.rewritten) > 1 else ''}"
            )
        if self.problems:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.problems.items())
            listed = self.path / CLIPKIT_FOLDER / f"problems-{self.split}.jsonl"
            lines.append(
                f"bad pairs, which can't be left out in place: {reasons}; each in {listed} "
                "(clipkit build-tfds without --in-place leaves them out)"
            )
        return "\n".join(lines)
