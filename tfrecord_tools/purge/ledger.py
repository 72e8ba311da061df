"""A purge in the account of a download: the rows stay, with their URLs and the reason "purged", and nothing else.

So they aren't fetched again, neither by the same download nor by a retry, which asks only for rows that failed for a
reason of the network's. Rows that gave no image are purged too: what was refused by a name server yesterday must not
come tomorrow. Where no download made the dataset, or its format has no ledger, there is nothing to do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from clipkit.errors import UserError
from clipkit.formats.dataset import DatasetLayout
from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest
from clipkit.jobs.passes import Runner
from clipkit.storage.files import local_copy, read_json, save_array, write_json
from clipkit.tfrecord_tools.account import ledger
from clipkit.tfrecord_tools.account.ledger import ledger_table, read_ledger, write_ledger
from clipkit.tfrecord_tools.account.shard_state import (
    SPLIT,
    DownloadFiles,
    DownloadLayout,
    add_states,
    load_state,
    outcome_counts,
    write_state,
)
from clipkit.tfrecord_tools.outcome import RowOutcome
from clipkit.tfrecord_tools.purge.removals import RemovalList
from clipkit.tfrecord_tools.purge.shard import PurgedShard, PurgePlan
from clipkit.tfrecord_tools.reasons import PURGED
from clipkit.tfrecord_tools.rewriting.plan import work_folder
from clipkit.tfrecord_tools.tables.digests import UInt64Array, find, value_bytes

# Columns of a ledger by which a row that gave no image can be meant.
KNOWN = ("url", "key")


@dataclass(frozen=True)
class LedgerJob:
    """The ledger of one shard. `shard` is the state of its rewriting, None when it keeps all records.

    `wanted` is the file of the list's array, None when the list is of something that failed rows haven't.
    """

    files: DownloadFiles
    shard: PurgedShard | None
    wanted: Path | None
    by: str
    purge: str


def purge_ledgers(
    layout: DatasetLayout,
    plan: PurgePlan,
    states: Sequence[PurgedShard],
    listed: RemovalList,
    wanted: UInt64Array,
    runner: Runner,
) -> dict[str, dict[str, int]]:
    """Purge the account that a download left; what failed in each of its shards by file, {} where there is none."""
    download = _download_layout(layout)
    if download is None:
        return {}
    wanted_path = None
    if listed.by in KNOWN:
        wanted_path = work_folder(layout.folder, plan.command) / "wanted.npy"
        save_array(wanted_path, wanted)
    rewritten = {state.before.file: state for state in states if state.before.split == SPLIT}
    files = [download.files(number) for number in range(download.shard_count)]
    runner.run(
        "purge: ledgers",
        purge_ledger,
        [LedgerJob(each, rewritten.get(each.data.name), wanted_path, listed.by, plan.purge) for each in files],
        describe=lambda job: job.files.ledger.name,
    )
    return _finish_download(download, files)


def _download_layout(layout: DatasetLayout) -> DownloadLayout | None:
    """How the download that made the dataset names its files, None when none made it."""
    split = SPLIT
    if split not in layout.lengths or not (layout.folder / CLIPKIT_FOLDER / ledger.LEDGER_FOLDER).exists():
        return None
    made = DownloadLayout(layout.folder, "tfds", layout.name, len(layout.lengths[split]))
    names = [made.files(number).data.name for number in range(made.shard_count)]
    return made if names == layout.files[split] and made.files(0).ledger.exists() else None


def purge_ledger(job: LedgerJob) -> int:
    """Write a ledger and its shard's state again where the purge concerns it; the number of rows purged by now."""
    path = job.files.ledger
    with local_copy(path) as local:
        rows = pq.read_table(local, columns=["key", "row", "url", "caption"], partitioning=None)
    outcomes = read_ledger(path)
    keys: list[str] = rows["key"].to_pylist()
    purged = RowOutcome(PURGED, f"by the purge {job.purge}")
    before = [outcome.reason for outcome in outcomes]
    stored = [row for row, reason in enumerate(before) if reason is None]
    if job.shard is not None and len(stored) != job.shard.records:
        if len(stored) != job.shard.before.records:
            raise UserError(f"ledger {path} isn't that of {job.files.data}: move it away and purge again")
        for removed in job.shard.removed_records():
            outcomes[stored[removed["number"]]] = purged
        offsets = job.shard.offsets().tolist()
        left = [row for row in stored if outcomes[row].reason is None]
        for row, offset in zip(left, offsets, strict=True):
            outcomes[row] = replace(outcomes[row], offset=offset)
    failed = [row for row, reason in enumerate(before) if reason not in (None, PURGED)]
    if job.wanted is not None and failed:
        values = rows[job.by].take(failed).to_pylist()
        with local_copy(job.wanted) as local:
            wanted = np.load(local, mmap_mode="r")
            places = find(wanted, [value_bytes(value) for value in values])
        for row, place in zip(failed, places.tolist(), strict=True):
            if place >= 0:
                outcomes[row] = purged
    if [outcome.reason for outcome in outcomes] != before:
        write_ledger(path, ledger_table(keys, rows["row"].to_pylist(), rows["url"], rows["caption"], outcomes))
    _write_state(job, outcomes)
    return sum(outcome.reason == PURGED for outcome in outcomes)


def _write_state(job: LedgerJob, outcomes: list[RowOutcome]) -> None:
    """The download's own state of the shard, counted again from the ledger."""
    state = load_state(job.files)
    if state is None:
        return
    counts = outcome_counts(outcomes)
    if state.successes != counts["successes"] and job.shard is not None:
        columns = {name: count - job.shard.columns.get(name, 0) for name, count in state.present.items()}
        state = replace(state, present={name: count for name, count in columns.items() if count})
    entry = job.shard.entry if job.shard is not None else None
    crc32c = entry.crc32c if entry is not None else state.crc32c
    new = replace(state, **counts, sizes=job.files.sizes(), crc32c=crc32c)
    if new != state:
        write_state(job.files.state, new)


def _finish_download(made: DownloadLayout, files: Sequence[DownloadFiles]) -> dict[str, dict[str, int]]:
    """Bring the download's tables of all its shards into line; returns what failed in each shard, by its file."""
    states = [state for each in files if (state := load_state(each)) is not None]
    failures, account = made.own / ledger.FAILURES_FILE, made.own / "download.json"
    if failures.exists():
        names = [(made.shard(number), each.ledger) for number, each in enumerate(files)]
        ledger.write_failures(failures, names)
    if account.exists() and len(states) == len(files):
        write_json(account, {**read_json(account), **add_states(states)})
    return {each.data.name: state.failed for each, state in zip(files, states, strict=False)}


def with_failures(manifest: SplitManifest, failed: Mapping[str, Mapping[str, int]]) -> SplitManifest:
    """A download's manifest, in which each shard has one source, with what failed in each shard."""
    shards = []
    for shard in manifest.shards:
        if shard.file in failed and len(shard.sources) == 1:
            source = replace(shard.sources[0], skipped=dict(sorted(failed[shard.file].items())))
            shard = replace(shard, sources=(source,))
        shards.append(shard)
    return replace(manifest, shards=tuple(shards))
