"""What a download tells when it is done; the same stands in `clipkit/download.json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipkit.formats.manifest import add_counts
from clipkit.tfrecord_tools.account.ledger import FAILURES_FILE
from clipkit.tfrecord_tools.account.shard_state import Layout, ShardState
from clipkit.tfrecord_tools.download.plan import Plan
from clipkit.tfrecord_tools.download.probe import ProbeResult
from clipkit.tfrecord_tools.reasons import PASSING


@dataclass(frozen=True)
class DownloadSummary:
    """What became of the rows: `rows == left_out + downloaded + sum(failed.values())`, `failed` by reason, most first.

    `left_out` are those that `--where` didn't want. `empty_captions` counts wanted rows whose caption is null or blank:
    a dataset doesn't take them, so they aren't fetched and are among the failed; the other formats fetch them and
    store an empty text. `hash_check` counts images by how they compare with the table's hash. `retries` is the number
    of the last retry. Bytes are those of the stored images, and of all bodies that came.
    """

    out: Path
    format: str
    rows: int
    left_out: int
    downloaded: int
    failed: dict[str, int]
    empty_captions: int
    hash_check: dict[str, int]
    shards: int
    image_bytes: int
    body_bytes: int
    retries: int
    probe: ProbeResult | None = None

    def to_json(self) -> dict[str, Any]:
        """The counts, and the path as text."""
        values = {**asdict(self), "out": str(self.out)}
        if self.probe is None:
            del values["probe"]
        return values

    def text(self) -> str:
        """A few lines for a person."""
        wanted = self.rows - self.left_out
        lines = [f"{self.downloaded:,} of {wanted:,} images ({self.downloaded / wanted:.1%}) in {self.out}"]
        if self.left_out:
            lines.append(f"left out by --where: {self.left_out:,} of {self.rows:,} rows")
        if self.failed:
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in self.failed.items())
            lines.append(f"failed: {reasons}; each row in {self.out / 'clipkit' / FAILURES_FILE}")
            passing = sum(number for reason, number in self.failed.items() if reason in PASSING)
            if passing:
                lines.append(f"--retry-failed fetches {passing:,} of them again, which may have failed in passing")
        if self.empty_captions and self.format != "tfds":
            lines.append(f"rows without a caption: {self.empty_captions:,}; build-tfds leaves them out")
        if self.hash_check:
            checked = ", ".join(f"{result} {number:,}" for result, number in self.hash_check.items())
            lines.append(f"against the table's hash: {checked}")
        return "\n".join(lines)


def summarise(layout: Layout, plan: Plan, states: Sequence[ShardState]) -> DownloadSummary:
    """The counts of all shards."""
    failed = add_counts(state.failed for state in states)
    return DownloadSummary(
        out=layout.root,
        format=layout.format,
        rows=plan.rows + plan.left_out,
        left_out=plan.left_out,
        downloaded=sum(state.successes for state in states),
        failed=dict(sorted(failed.items(), key=lambda each: (-each[1], each[0]))),
        empty_captions=sum(state.empty_captions for state in states),
        hash_check=add_counts(state.hash_check for state in states),
        shards=len(states),
        image_bytes=sum(state.image_bytes for state in states),
        body_bytes=sum(state.body_bytes for state in states),
        retries=max((state.round for state in states), default=0),
    )
