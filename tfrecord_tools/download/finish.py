"""The end of a download: its summary, and the files that make a dataset directory of TFRecord shards."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipkit.formats.kinds import unify
from clipkit.formats.manifest import ShardEntry, SourceEntry, SplitManifest, read_manifest
from clipkit.formatting import counts_text
from clipkit.tfrecord_tools.account.ledger import FAILURES_FILE, read_offsets
from clipkit.tfrecord_tools.account.shard_state import SPLIT, DownloadLayout, DownloadState, add_states
from clipkit.tfrecord_tools.download.plan import DownloadPlan
from clipkit.tfrecord_tools.download.probe import ProbeResult
from clipkit.tfrecord_tools.reasons import PASSING
from clipkit.tfrecord_tools.writing.finish import finish_dataset, pair_features


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
            lines.append(f"failed: {counts_text(self.failed)}; each row in {self.out / 'clipkit' / FAILURES_FILE}")
            passing = sum(number for reason, number in self.failed.items() if reason in PASSING)
            if passing:
                lines.append(f"--retry-failed fetches {passing:,} of them again, whose failures may be temporary")
        if self.empty_captions and self.format != "tfds":
            lines.append(f"rows without a caption: {self.empty_captions:,}; build-tfds leaves them out")
        if self.hash_check:
            lines.append(f"against the table's hash: {counts_text(self.hash_check)}")
        return "\n".join(lines)


def summarise(layout: DownloadLayout, plan: DownloadPlan, states: Sequence[DownloadState]) -> DownloadSummary:
    """The counts of all shards."""
    return DownloadSummary(
        out=layout.root,
        format=layout.format,
        rows=plan.rows + plan.left_out,
        left_out=plan.left_out,
        empty_captions=sum(state.empty_captions for state in states),
        shards=len(states),
        body_bytes=sum(state.body_bytes for state in states),
        retries=max((state.round for state in states), default=0),
        **add_states(states),
    )


def split_manifest(layout: DownloadLayout, plan: DownloadPlan, states: Sequence[DownloadState]) -> SplitManifest:
    """The account of all shards; the source of each is the table whose rows it has."""
    tables = {rows: (table.name, table.stat().st_size) for rows, table in plan.sources.items()}
    shards = []
    for shard, state in zip(plan.shards, states, strict=True):
        failed = dict(sorted(state.failed.items()))
        source = SourceEntry(*tables[shard.table], state.count, state.successes, failed)
        formats = {"jpeg": state.successes} if state.successes else {}
        file = layout.files(shard.number).data.name
        shards.append(ShardEntry(file, state.successes, state.sizes["data"], state.crc32c, (source,), formats))
    return SplitManifest(tuple(shards))


def was_changed(layout: DownloadLayout, states: Sequence[DownloadState | None]) -> bool:
    """Whether the dataset is no longer what was downloaded: after a purge, for one."""
    known = read_manifest(layout.root).get(SPLIT)
    if known is None:
        return False
    if len(known.shards) != len(states):
        return True
    return any(
        state is not None
        and (shard.records, shard.bytes, shard.crc32c) != (state.successes, state.sizes["data"], state.crc32c)
        for shard, state in zip(known.shards, states, strict=True)
    )


def write_dataset(layout: DownloadLayout, plan: DownloadPlan, states: Sequence[DownloadState]) -> None:
    """Write index, manifest and TFDS's own files. Raises UserError when the disk or the store refuses."""
    manifest = split_manifest(layout, plan, states)
    kinds = unify(state.kinds_met for state in states)
    features = pair_features(kinds, (state.present for state in states), manifest.records)
    offsets = (read_offsets(layout.files(shard.number).ledger) for shard in plan.shards)
    finish_dataset(layout.root, layout.name, features, {SPLIT: manifest}, {SPLIT: offsets})
