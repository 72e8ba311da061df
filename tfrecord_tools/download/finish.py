"""The files around the downloaded TFRecord shards that make a dataset directory of them, `dataset_info.json` last."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from clipkit.formats.features import Feature, Kind
from clipkit.formats.kinds import EMPTY_LIST, LIST, unify
from clipkit.formats.manifest import ShardEntry, SourceEntry, SplitManifest, index_path, read_manifest, write_manifest
from clipkit.storage.files import write_beside
from clipkit.tfrecord_tools.account.ledger import read_offsets
from clipkit.tfrecord_tools.account.shard_state import SPLIT, Layout, ShardState
from clipkit.tfrecord_tools.download.plan import Plan
from clipkit.tfrecord_tools.writing.metadata import write_metadata


def kinds_of_all(states: Sequence[ShardState]) -> dict[str, str]:
    """The kinds that hold the values of all shards; columns without any value are left out."""
    return unify(kinds_met(state) for state in states)


def kinds_met(state: ShardState) -> dict[str, str]:
    """The kinds of the columns that have a value in the shard."""
    return {column: state.kinds[column] for column in state.present}


def differs(state: ShardState, kinds: dict[str, str]) -> bool:
    """Whether a shard was written with narrower kinds than all together need."""
    return any(kinds[column] != kind for column, kind in kinds_met(state).items())


def features_of(states: Sequence[ShardState], kinds: dict[str, str]) -> dict[str, Feature]:
    """The columns as `features.json` declares them, as building from tars would; optional where a value is missing."""
    records = sum(state.successes for state in states)
    features = {"jpg": Feature("image"), "txt": Feature("text")}
    for column, kind in kinds.items():
        optional = sum(state.present.get(column, 0) for state in states) < records
        if kind == EMPTY_LIST:
            features[column] = Feature("text", is_list=True)
        elif kind.startswith(LIST):
            features[column] = Feature(cast(Kind, kind.removeprefix(LIST)), is_list=True)
        else:
            features[column] = Feature("int" if kind == "bool" and optional else cast(Kind, kind), optional)
    return features


def split_manifest(layout: Layout, plan: Plan, states: Sequence[ShardState]) -> SplitManifest:
    """The account of all shards; the source of each is the table whose rows it has."""
    sizes: dict[Path, int] = {}
    shards = []
    for shard, state in zip(plan.shards, states, strict=True):
        if shard.table not in sizes:
            sizes[shard.table] = shard.table.stat().st_size
        source = SourceEntry(
            shard.table.name, sizes[shard.table], state.count, state.successes, dict(sorted(state.failed.items()))
        )
        formats = {"jpeg": state.successes} if state.successes else {}
        file = layout.files(shard.number).data.name
        shards.append(ShardEntry(file, state.successes, state.sizes["data"], state.crc32c, (source,), formats))
    return SplitManifest(tuple(shards))


def was_changed(layout: Layout, states: Sequence[ShardState | None]) -> bool:
    """Whether the dataset is no more what was downloaded: purged, for one."""
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


def write_dataset(layout: Layout, plan: Plan, states: Sequence[ShardState]) -> None:
    """Write index, manifest and TFDS's own files. Raises UserError when the disk or the store refuses."""
    manifest = split_manifest(layout, plan, states)
    with write_beside(index_path(layout.root, SPLIT)) as temporary:
        # Through the disk's cache: the offsets of 400 million records take 3.2 GB.
        index = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=(manifest.records,))
        start = 0
        for shard in plan.shards:
            offsets = read_offsets(layout.files(shard.number).ledger)
            index[start : start + len(offsets)] = offsets
            start += len(offsets)
        index.flush()
        del index
    write_manifest(layout.root, {SPLIT: manifest})
    write_metadata(layout.root, layout.name, features_of(states, kinds_of_all(states)), {SPLIT: manifest})
