"""The end of a purge: what was removed is told, and then index and metadata are brought into line with the shards.

Each step may be done twice. The log comes before the metadata, so a dataset that opens has told what was taken out of
it.

`clipkit/purge-log.jsonl` is for people: a line for each removed record, and one for each purge.
`clipkit/purged.parquet` is for the commands that fetch: every value of every list, those that matched nothing here
included, for an image that failed to be fetched yesterday must not come tomorrow. No image and no caption is in either.
Both are written whole, without the lines that the same purge has added before it was killed.
"""

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.formats.dataset import DatasetLayout
from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest
from clipkit.storage.files import local_copy, remove, write_beside
from clipkit.tfrecord_tools.account.purged import PURGED_TABLE, purged_path
from clipkit.tfrecord_tools.purge.ledger import with_failures
from clipkit.tfrecord_tools.purge.removals import LINES, RemovalList, read_values
from clipkit.tfrecord_tools.purge.shard import PurgedShard, PurgePlan, without
from clipkit.tfrecord_tools.reasons import PURGED
from clipkit.tfrecord_tools.rewriting.finish import Changes, changed_shards, finish_rewrite, with_changes
from clipkit.tfrecord_tools.tables.digests import UInt64Array, find


def finish(
    layout: DatasetLayout,
    plan: PurgePlan,
    states: Sequence[PurgedShard],
    listed: RemovalList,
    wanted: UInt64Array,
    matched: npt.NDArray[np.bool_],
    failed: Mapping[str, Mapping[str, int]],
) -> None:
    """Write the log, the index and the metadata again, and end the purge.

    `matched` says which entries of the list were found, `failed` what a download counts of each shard by its file.
    """
    folder = layout.folder
    for split in layout.manifest.keys() & {state.before.split for state in states}:
        lines = (
            {"source": record["source"], "key": record["key"], "reason": PURGED}
            for state in states
            if state.before.split == split
            for record in state.removed_records()
        )
        _rewrite_lines(folder / CLIPKIT_FOLDER / f"skipped-{split}.jsonl", plan.purge, lines)
    _write_purged(folder, plan, states, listed, wanted, matched)
    _rewrite_lines(log_path(folder), plan.purge, _log_lines(states, listed, matched))
    if states:
        for page in (folder / CLIPKIT_FOLDER).glob("inspection*"):  # of `clipkit inspect`: it shows pictures
            if page.suffix in (".html", ".json"):
                remove(page)
    changes = changed_shards(states)
    manifest = {
        split: with_failures(_purged_manifest(before, changes), failed) for split, before in layout.manifest.items()
    }
    finish_rewrite(layout, plan, changes, manifest)


def log_path(folder: Path) -> Path:
    return folder / CLIPKIT_FOLDER / "purge-log.jsonl"


def was_recorded(folder: Path, listed: RemovalList) -> bool:
    """Whether a purge by this very list and column has been written down."""
    path = log_path(folder)
    if not path.exists():
        return False
    with local_copy(path) as local, local.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if f'"list_sha256": "{listed.sha256}"' in line and json.loads(line).get("by") == listed.by:
                return True
    return False


def purged_before(folder: Path, listed: RemovalList, wanted: UInt64Array) -> npt.NDArray[np.bool_]:
    """Which entries of the list were removed from this dataset by an earlier purge: bool[entries]."""
    before = np.zeros(wanted.shape[1], bool)
    path = purged_path(folder)
    if path.exists() and len(before):
        with local_copy(path) as local, pq.ParquetFile(local) as file:
            for batch in file.iter_batches(LINES, columns=["by", "value", "matched"]):
                rows = batch.filter(pa.compute.and_(batch["matched"], pa.compute.equal(batch["by"], listed.by)))
                places = find(wanted, [str(value).encode() for value in rows["value"].to_pylist()])
                before[places[places >= 0]] = True
    return before


def _removed(states: Sequence[PurgedShard]) -> Iterator[dict[str, Any]]:
    """Every removed record as the log has it."""
    for state in states:
        for record in state.removed_records():
            values = {name: record[name] for name in ("value", "key", "url", "sha256")}
            yield {**values, "split": state.before.split, "shard": state.before.file}


def _log_lines(
    states: Sequence[PurgedShard], listed: RemovalList, matched: npt.NDArray[np.bool_]
) -> Iterator[dict[str, Any]]:
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    same = {"when": when, "list": str(listed.path), "list_sha256": listed.sha256, "by": listed.by}
    for record in _removed(states):
        yield {**same, "record": record}
    count = sum(state.before.purged for state in states)
    yield {**same, "removed": count, "entries": len(matched), "matched": int(matched.sum())}


def _rewrite_lines(path: Path, purge: str, lines: Iterable[dict[str, Any]]) -> None:
    """Add JSON lines to a file in the place of those that the same purge has added before."""
    with write_beside(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        if path.exists():
            with local_copy(path) as local, local.open(encoding="utf-8", errors="replace") as before:
                for line in before:
                    if f'"purge": "{purge}"' not in line:
                        file.write(line if line.endswith("\n") else line + "\n")
        for values in lines:
            file.write(json.dumps({**values, "purge": purge}, ensure_ascii=False) + "\n")


def _write_purged(
    folder: Path,
    plan: PurgePlan,
    states: Sequence[PurgedShard],
    listed: RemovalList,
    wanted: UInt64Array,
    matched: npt.NDArray[np.bool_],
) -> None:
    """Add a purge to `purged.parquet`: the removed records, then the list's values that matched none, once each."""
    path = purged_path(folder)
    same = {"purge": plan.purge, "by": listed.by}
    with write_beside(path) as temporary, pq.ParquetWriter(temporary, PURGED_TABLE, compression="zstd") as writer:
        if path.exists():
            with local_copy(path) as local, pq.ParquetFile(local) as before:
                for batch in before.iter_batches(LINES):
                    writer.write_batch(batch.filter(pa.compute.not_equal(batch["purge"], plan.purge)))
        written = matched.copy()
        rows = ({**same, "matched": True, **record} for record in _removed(states))
        while some := list(islice(rows, LINES)):
            writer.write_table(pa.Table.from_pylist(some, schema=PURGED_TABLE))
        for values in read_values(listed):
            filled = [value for value in values if value]
            unmatched = []
            for value, place in zip(filled, find(wanted, filled).tolist(), strict=True):
                if place >= 0 and not written[place]:
                    written[place] = True
                    unmatched.append({**same, "value": value.decode("utf-8", "replace"), "matched": False})
            if unmatched:
                writer.write_table(pa.Table.from_pylist(unmatched, schema=PURGED_TABLE))


def _purged_manifest(manifest: SplitManifest, changes: Changes) -> SplitManifest:
    """A split's manifest with its changed shards. Its own sources are counted down unless an earlier run has."""
    # A shuffled split has its sources here and not in its shards, and which of them a record came from isn't known.
    left = sum(
        changes[shard.file].before.purged
        for shard in manifest.shards
        if shard.file in changes and shard.bytes != changes[shard.file].bytes and not shard.sources
    )
    sources = []
    for source in manifest.sources:
        taken = min(left, source.records)
        sources.append(without(source, taken))
        left -= taken
    return replace(with_changes(manifest, changes), sources=tuple(sources))
