"""What `clipkit verify` finds in the files beside the shards.

The metadata are three accounts of the same records: TFDS's, the manifest's and the index's.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clipkit.formats.dataset import REWRITES, DatasetLayout, journal_path
from clipkit.formats.manifest import CLIPKIT_FOLDER, index_path
from clipkit.storage.files import WRITTEN_BESIDE, disk_errors, read_json
from clipkit.tfrecord_tools.verify.problems import FINISH, INDEX, REBUILD, Problem


def index_fits(layout: DatasetLayout, split: str) -> bool:
    """Whether there is an index with one offset for each record; any other is among the metadata's problems."""
    path = index_path(layout.folder, split)
    return path.exists() and _index_length(path) == sum(layout.lengths[split])


def _index_length(path: Path) -> int | None:
    """The number of offsets that an index should hold by its header and does by its size; None when it is damaged."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            size = path.stat().st_size - file.tell()
    except (ValueError, EOFError, OSError):
        return None
    return int(shape[0]) if len(shape) == 1 and dtype == np.uint64 and size == shape[0] * 8 else None


def unfinished_rewrites(layout: DatasetLayout) -> list[Problem]:
    """The one problem of a dataset whose shards are being written again, [] of any other.

    Its shards and metadata don't agree, and any advice but to end a purge would bring removed records back.
    """
    journals = [(what, journal_path(layout.folder, command)) for command, what in REWRITES.items()]
    return [
        Problem(f"{CLIPKIT_FOLDER}/{journal.name}", f"{what} isn't finished", FINISH)
        for what, journal in journals
        if journal.exists()
    ]


def metadata_problems(layout: DatasetLayout) -> Iterator[Problem]:
    """Where dataset_info.json, the manifest and the index don't agree."""
    name = f"{CLIPKIT_FOLDER}/manifest.json"
    info_bytes = {
        part["name"]: int(part.get("numBytes") or 0)
        for part in read_json(layout.folder / "dataset_info.json")["splits"]
    }
    for split, lengths in layout.lengths.items():
        manifest = layout.manifest.get(split)
        if layout.manifest and manifest is None:
            yield Problem(name, f"split {split!r} isn't in it, so its sizes and checksums aren't known", REBUILD)
        if manifest:
            if layout.differs(split):
                what = f"split {split!r}: {manifest.records:,} records in {len(manifest.shards):,} shards where "
                what += f"dataset_info.json says {sum(lengths):,} in {len(lengths):,}"
                yield Problem(name, what, REBUILD)
            elif manifest.bytes != info_bytes.get(split):
                what = f"split {split!r}: {manifest.bytes:,} bytes where dataset_info.json says {info_bytes[split]:,}"
                yield Problem(name, what, REBUILD)
            if manifest.all_sources and manifest.samples != manifest.records + sum(manifest.skipped.values()):
                what = f"split {split!r}: {manifest.samples:,} samples are not the records and what was left out"
                yield Problem(name, what, REBUILD)
            for shard in manifest.shards:
                left_out = sum(sum(source.skipped.values()) for source in shard.sources)
                records = sum(source.records for source in shard.sources)
                samples = sum(source.samples for source in shard.sources)
                if shard.sources and (records != shard.records or samples != records + left_out):
                    what = f"{samples:,} samples, {records:,} records and {left_out:,} left out don't add up"
                    yield Problem(name, what, REBUILD, first=f"shard {shard.file}, {shard.records:,} records")
        path = index_path(layout.folder, split)
        if path.exists() and _index_length(path) != sum(lengths):
            what = f"it isn't an index of {sum(lengths):,} records"
            yield Problem(f"{CLIPKIT_FOLDER}/{path.name}", what, INDEX)
    for split in sorted(set(layout.manifest) - set(layout.lengths)):
        yield Problem(name, f"split {split!r} isn't in dataset_info.json: its build wasn't finished", FINISH)


def leftovers(layout: DatasetLayout) -> list[str]:
    """What no reader needs: files that killed runs were writing, their state, and shards that no metadata name."""
    ours = {file for files in layout.files.values() for file in files}
    left = []
    with disk_errors(layout.folder):
        for path in sorted(layout.folder.iterdir(), key=lambda each: each.name):
            stray = ".tfrecord" in path.name and path.name not in ours
            if WRITTEN_BESIDE.fullmatch(path.name) or stray:
                left.append(path.name)
        clipkit = layout.folder / CLIPKIT_FOLDER
        for path in sorted(clipkit.iterdir(), key=lambda each: each.name) if clipkit.exists() else []:
            work = path.name.startswith("build-") and path.name.removeprefix("build-") in layout.lengths
            rewrite = path.name in REWRITES and not clipkit.joinpath(f"{path.name}.json").exists()
            if WRITTEN_BESIDE.fullmatch(path.name) or work or rewrite:
                left.append(f"{CLIPKIT_FOLDER}/{path.name}")
    return left
