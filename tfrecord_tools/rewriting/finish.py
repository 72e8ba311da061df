"""The end of a command that has written shards again: the index and the metadata are brought into line with them.

Each step may be done twice: it finds out by itself whether an earlier run has done it. The journal goes last of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from clipkit.formats.dataset import DatasetLayout
from clipkit.formats.manifest import SplitManifest, index_path, write_manifest
from clipkit.storage.files import local_copy, read_json, write_json
from clipkit.tfrecord_tools.rewriting.plan import RewritePlan, leave
from clipkit.tfrecord_tools.rewriting.shard import ShardState
from clipkit.tfrecord_tools.writing.finish import write_index

Changes = Mapping[str, ShardState]


def changed_shards(states: Sequence[ShardState]) -> Changes:
    """The shards that were written again, by their files: those that have another size than before."""
    return {state.before.file: state for state in states if state.bytes != state.before.bytes}


def with_changes(manifest: SplitManifest, changes: Changes) -> SplitManifest:
    """A split's manifest with the entries of the shards as they are now."""
    new = {file: state.entry for file, state in changes.items()}
    return replace(manifest, shards=tuple(new.get(shard.file) or shard for shard in manifest.shards))


def finish_rewrite(
    layout: DatasetLayout, plan: RewritePlan, changes: Changes, manifest: Mapping[str, SplitManifest]
) -> None:
    """Write the index, the manifest and TFDS's own account again, and end the plan."""
    folder = layout.folder
    for split, files in layout.files.items():
        if index_path(folder, split).exists() and not changes.keys().isdisjoint(files):
            _write_index(layout, split, changes)
    if manifest:
        write_manifest(folder, manifest)
    _write_info(layout, plan, changes, manifest)
    leave(folder, plan.command)


def _write_index(layout: DatasetLayout, split: str, changes: Changes) -> None:
    files = layout.files[split]
    lengths = dict(zip(files, layout.lengths[split], strict=True))
    before = lengths | {file: changes[file].before.records for file in files if file in changes}
    after = lengths | {file: changes[file].records for file in files if file in changes}
    records = sum(after.values())
    with local_copy(index_path(layout.folder, split)) as local:
        index = np.load(local, mmap_mode="r" if records else None)
        indexed = (after if len(index) == records else before).values()  # an earlier run may have written it
        offsets = (
            changes[file].offsets() if file in changes else index[first : first + length]
            for file, first, length in zip(files, accumulate(indexed, initial=0), indexed, strict=False)
        )
        write_index(layout.folder, split, offsets, records)


def _write_info(
    layout: DatasetLayout, plan: RewritePlan, changes: Changes, manifest: Mapping[str, SplitManifest]
) -> None:
    """TFDS's own account, all else in it left as it is: records of each shard, and bytes of each split."""
    info = read_json(layout.folder / "dataset_info.json")
    for part in info["splits"]:
        split = part["name"]
        changed = {number: changes[file] for number, file in enumerate(layout.files[split]) if file in changes}
        for number, state in changed.items():
            part["shardLengths"][number] = str(state.records)
        before = plan.num_bytes.get(split)
        if split in manifest:
            part["numBytes"] = str(manifest[split].bytes)
        elif before is not None:  # TFDS counts the contents without their frames
            part["numBytes"] = str(int(before) + sum(state.grown for state in changed.values()))
    write_json(layout.folder / "dataset_info.json", info)
