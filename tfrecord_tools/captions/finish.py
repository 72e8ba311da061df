"""The end of `clipkit add-captions`: the index and the metadata are brought into line with the shards.

Each step may be done twice, and the journal goes last of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipkit.formats.dataset import DatasetLayout, journal_path
from clipkit.formats.features import Feature
from clipkit.formats.manifest import index_path, write_manifest
from clipkit.storage.files import read_json, remove, write_json
from clipkit.tfrecord_tools.account.captions import write_added
from clipkit.tfrecord_tools.captions.plan import CaptionPlan, work_folder
from clipkit.tfrecord_tools.captions.shard import CaptionedShard
from clipkit.tfrecord_tools.writing.finish import rewrite_index
from clipkit.tfrecord_tools.writing.metadata import feature_json


def finish(
    layout: DatasetLayout, plan: CaptionPlan, states: Sequence[CaptionedShard], account: Mapping[str, Any]
) -> None:
    """Write index and metadata again, and the account of what was added."""
    folder = layout.folder
    changed = {shard.file: state for shard, state in zip(plan.shards, states, strict=True) if state.joined}
    for split, lengths in layout.lengths.items():
        offsets = {file: changed[file].offsets for file in layout.files[split] if file in changed}
        if offsets and index_path(folder, split).exists():
            rewrite_index(folder, split, layout.files[split], lengths, offsets, sum(lengths))
    manifest = {
        split: replace(before, shards=tuple(_entry(changed.get(shard.file)) or shard for shard in before.shards))
        for split, before in layout.manifest.items()
    }
    if manifest:
        write_manifest(folder, manifest)
    _write_features(folder, plan.name)
    info = read_json(folder / "dataset_info.json")
    for part in info["splits"]:
        split, before = part["name"], plan.num_bytes.get(part["name"])
        if split in manifest:
            part["numBytes"] = str(manifest[split].bytes)
        elif before is not None:  # TFDS counts the contents without their frames
            grown = sum(changed[file].added for file in layout.files[split] if file in changed)
            part["numBytes"] = str(int(before) + grown)
    write_json(folder / "dataset_info.json", info)
    write_added(folder, plan.source, account)
    leave(folder)


def leave(folder: Path) -> None:
    """Remove the journal and what it was about."""
    remove(journal_path(folder, "add-captions"))
    remove(work_folder(folder))


def _entry(state: CaptionedShard | None) -> Any:
    return state.entry if state is not None else None


def _write_features(folder: Path, name: str) -> None:
    """TFDS's own description with one column more, all else in it left as it is."""
    description = read_json(folder / "features.json")
    content = description.get("content", description)
    features = content["featuresDict"]["features"] if "featuresDict" in content else content["features"]
    features[name] = feature_json(Feature("text", is_list=True))
    write_json(folder / "features.json", description)
