"""The end of a purge: all that stands beside the shards is brought into line with them.

Each step may be done twice: it finds out by itself whether an earlier run has done it. The log comes before the
metadata, and the journal goes last of all, so a dataset that opens has told what was taken out of it.
"""

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.formats.dataset import DatasetLayout, journal_path
from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest, index_path, write_manifest
from clipkit.storage.files import local_copy, read_json, remove, write_beside, write_json
from clipkit.tfrecord_tools.purge.ledger import with_failures
from clipkit.tfrecord_tools.purge.log import log_path, rewrite_lines, write_purged
from clipkit.tfrecord_tools.purge.plan import Plan, state_path, work_folder
from clipkit.tfrecord_tools.purge.removals import RemovalList, UInt64Array
from clipkit.tfrecord_tools.purge.shard import ShardState, less, offsets_path, read_removed
from clipkit.tfrecord_tools.reasons import PURGED


@dataclass(frozen=True)
class Changed:
    """A rewritten shard: its number in the plan, and its account."""

    number: int
    state: ShardState


def finish(
    layout: DatasetLayout,
    plan: Plan,
    states: Sequence[ShardState],
    removals: RemovalList,
    wanted: UInt64Array,
    matched: npt.NDArray[np.bool_],
    failed: Mapping[str, Mapping[str, int]],
) -> None:
    """Write index, log and metadata anew, and end the purge.

    `matched` says which entries of the list were found, `failed` what a download counts of each shard by its file.
    """
    folder = layout.folder
    splits: dict[str, dict[str, Changed]] = {}
    for number, (shard, state) in enumerate(zip(plan.shards, states, strict=True)):
        splits.setdefault(shard.split, {})[shard.file] = Changed(number, state)
    for split, changed in splits.items():
        _write_index(layout, plan, split, changed)
        if split in layout.manifest:
            lines = _skipped_lines(layout, changed)
            rewrite_lines(folder / CLIPKIT_FOLDER / f"skipped-{split}.jsonl", plan.purge, lines)
    record(layout, plan.purge, removals, wanted, matched, lambda: _removed(layout, plan))
    manifest = {
        split: with_failures(_purged_manifest(each, splits.get(split, {})), failed)
        for split, each in layout.manifest.items()
    }
    if manifest:
        write_manifest(folder, manifest)
    _write_info(layout, plan, splits, manifest)
    remove(journal_path(folder))
    remove(work_folder(folder))


def _skipped_lines(layout: DatasetLayout, changed: Mapping[str, Changed]) -> Iterator[dict[str, Any]]:
    for each in changed.values():
        for removed in read_removed(state_path(layout.folder, each.number)):
            yield {"source": removed["source"], "key": removed["key"], "reason": PURGED}


def _removed(layout: DatasetLayout, plan: Plan) -> Iterator[dict[str, Any]]:
    """Every removed record as the log has it."""
    for number, shard in enumerate(plan.shards):
        for removed in read_removed(state_path(layout.folder, number)):
            kept = {name: removed[name] for name in ("value", "key", "url", "sha256")}
            yield {**kept, "split": shard.split, "shard": shard.file}


def record(
    layout: DatasetLayout,
    purge: str,
    removals: RemovalList,
    wanted: UInt64Array,
    matched: npt.NDArray[np.bool_],
    removed: Callable[[], Iterable[dict[str, Any]]],
) -> None:
    """Write down who was removed, and what must not come back. `removed` gives the records, anew at each call."""
    write_purged(layout.folder, purge, removals, wanted, removed(), matched)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    same = {"when": when, "list": str(removals.path), "list_sha256": removals.sha256, "by": removals.by}

    def lines() -> Iterator[dict[str, Any]]:
        count = 0
        for row in removed():
            count += 1
            yield {**same, "record": row}
        yield {**same, "removed": count, "entries": len(matched), "matched": int(matched.sum())}

    rewrite_lines(log_path(layout.folder), purge, lines())


def _write_index(layout: DatasetLayout, plan: Plan, split: str, changed: Mapping[str, Changed]) -> None:
    """The index of a split with the new offsets of its changed shards, unless it has them already."""
    path = index_path(layout.folder, split)
    before = sum(plan.lengths[split])
    after = before - sum(each.state.removed for each in changed.values())
    if not path.exists():
        return
    with local_copy(path) as local:
        old = np.load(local, mmap_mode="r" if after else None)
        if len(old) == after:
            return
        with write_beside(path) as temporary, temporary.open("wb") as file:
            header = {"descr": "<u8", "fortran_order": False, "shape": (after,)}
            np.lib.format.write_array_header_1_0(file, header)
            first = 0
            for name, length in zip(layout.files[split], plan.lengths[split], strict=True):
                if name in changed:
                    with local_copy(offsets_path(state_path(layout.folder, changed[name].number))) as offsets:
                        file.write(np.load(offsets).tobytes())
                else:
                    file.write(old[first : first + length].tobytes())
                first += length


def _purged_manifest(manifest: SplitManifest, changed: Mapping[str, Changed]) -> SplitManifest:
    """A split's manifest with its changed shards, or itself when it has them already."""
    entries = {shard.file: shard for shard in manifest.shards}
    new = {file: each.state.entry for file, each in changed.items() if each.state.entry is not None}
    if all(entries[file].bytes == entry.bytes for file, entry in new.items()):
        return manifest
    # A shuffled split has its sources here and not in its shards, and which of them a record came from isn't known.
    left = sum(changed[file].state.removed for file in new if not entries[file].sources)
    sources = []
    for source in manifest.sources:
        taken = min(left, source.records)
        sources.append(less(source, taken))
        left -= taken
    shards = tuple(new.get(shard.file, shard) for shard in manifest.shards)
    return replace(manifest, shards=shards, sources=tuple(sources))


def _write_info(
    layout: DatasetLayout,
    plan: Plan,
    splits: Mapping[str, Mapping[str, Changed]],
    manifest: Mapping[str, SplitManifest],
) -> None:
    """TFDS's own account, all else in it left as it is: records of each shard, and bytes of each split."""
    info = read_json(layout.folder / "dataset_info.json")
    for part in info["splits"]:
        name = part["name"]
        changed = splits.get(name, {})
        if not changed:
            continue
        for number, file in enumerate(layout.files[name]):
            if file in changed:
                part["shardLengths"][number] = str(changed[file].state.records)
        before = plan.num_bytes.get(name)
        if name in manifest:
            part["numBytes"] = str(manifest[name].bytes)
        elif before is not None:  # TFDS counts the contents without their frames
            part["numBytes"] = str(int(before) - sum(each.state.contents for each in changed.values()))
    write_json(layout.folder / "dataset_info.json", info)
