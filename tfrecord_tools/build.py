"""From image shards to a dataset directory that TFDS opens: `clipkit build-tfds`.

An output shard is made from a run of neighbouring image shards, cut by size, so the number of shards, and with it every
file's name, is known before the first record. Columns' kinds are not: each shard is written with the kinds it meets
(see `schema`), and when all are there, the shards that differ from what all together need are written again. So the
data are read once when the shards agree, as img2dataset's do, and no pass goes ahead to look.

Files come in the order of trust: shards, each with its state in `clipkit/build-SPLIT/`; then the index, the list of
skipped samples and the manifest; `dataset_info.json` last. A run that finds a state goes on from it; a whole dataset
made from the same shards is left as it is.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from clipkit import jobs
from clipkit.dataset import open_dataset
from clipkit.errors import UserError
from clipkit.features import Feature, Kind, parse_features
from clipkit.files import clear_leftovers, lock, read_json, remove, write_beside, write_json
from clipkit.log import Progress
from clipkit.manifest import CLIPKIT_FOLDER, SplitManifest, index_path, read_manifest, write_manifest
from clipkit.tfrecord_tools.build_shard import ShardJob, ShardState, build_shard, offsets_path, read_state
from clipkit.tfrecord_tools.build_summary import BuildProgress, BuildSummary, progress_line, summarise
from clipkit.tfrecord_tools.metadata import VERSION, shard_name, write_metadata
from clipkit.tfrecord_tools.read_shards import find_shards
from clipkit.tfrecord_tools.schema import EMPTY_LIST, LIST, unify

SHARD_MEGABYTES = 256
IMAGE_COLUMN, CAPTION_COLUMN = "jpg", "txt"


def build_tfds(
    shards: Path,
    out: Path,
    name: str,
    *,
    split: str = "train",
    workers: int | None = 1,
    shard_megabytes: int = SHARD_MEGABYTES,
    progress: Callable[[BuildProgress], None] | None = None,
) -> BuildSummary:
    """Make `out/name/1.0.0` from a folder of image shards, or from one, and go on where a killed run stopped.

    `shard_megabytes` is what an output shard should have; an image shard is never divided. A further split of another
    call joins the dataset when its columns have the same kinds. The result does not depend on `workers` (None: one a
    core). `progress` takes the place of the progress line.
    Raises UserError for shards that are damaged, a name or split that TFDS doesn't allow, an output that holds other
    data, columns that don't go with those of another split, and when not one sample can be used.
    """
    _check_names(name, split)
    if shard_megabytes < 1:
        raise UserError(f"shard size of {shard_megabytes} MB: give at least 1")
    folder = Path(out) / name / VERSION
    sources = find_shards(Path(shards))
    sizes = [source.stat().st_size for source in sources]
    work = folder / CLIPKIT_FOLDER / f"build-{split}"
    with lock(folder / CLIPKIT_FOLDER):
        splits = read_manifest(folder)
        whole = _whole_splits(folder)
        splits = {part: manifest for part, manifest in splits.items() if part in whole}
        if whole - set(splits):
            raise _foreign(folder)
        wanted = [(source.name, size) for source, size in zip(sources, sizes, strict=True)]
        if split in splits and _sources_of(splits[split]) != wanted:
            raise UserError(
                f"{folder} already holds a split {split!r} made from other shards: "
                "remove it, or choose another output or --name"
            )
        clear_leftovers(folder, folder / CLIPKIT_FOLDER, work)
        if split in splits:
            open_dataset(folder, split)  # says so when a shard is missing
            remove(work)
            return summarise(folder, name, split, splits[split], built=False)
        known = parse_features(read_json(folder / "features.json")) if whole else {}
        job_list = _plan(folder, work, name, split, sources, sizes, shard_megabytes)
        with ExitStack() as stack:
            tell = progress or progress_line(stack.enter_context(Progress("build-tfds", sum(sizes) // 1_000_000, "MB")))
            states, kinds = _build_shards(job_list, _kinds_of(known), workers, tell)
        manifest = SplitManifest(tuple(state.shard for state in states))
        if not manifest.records:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in manifest.skipped.items()) or "they are empty"
            raise UserError(f"no sample of {shards} can be used ({reasons}): check the download")
        _write_index(folder, split, job_list, manifest.records)
        _write_skipped(folder, split, states)
        splits[split] = manifest
        write_manifest(folder, splits)
        write_metadata(folder, name, _features(states, kinds, known), splits)
        remove(work)
    return summarise(folder, name, split, manifest, built=True)


def _check_names(name: str, split: str) -> None:
    if not re.fullmatch(r"[a-zA-Z]\w*", name, re.ASCII):
        raise UserError(
            f"dataset name {name!r}: TFDS wants a letter, then letters, digits and _ alone; choose such a one"
        )
    if not re.fullmatch(r"[a-zA-Z]\w*", split, re.ASCII):
        raise UserError(f"split {split!r}: give a letter, then letters, digits and _ alone, such as train or test")


def _whole_splits(folder: Path) -> set[str]:
    """The splits that `dataset_info.json` names. Raises UserError when another program wrote it.

    Hugging Face's `save_to_disk` writes a file of this name too, with splits of another form or none.
    """
    path = folder / "dataset_info.json"
    if not path.exists():
        return set()
    info = read_json(path)
    splits = info.get("splits") if isinstance(info, dict) else None
    if not isinstance(splits, list) or not all(isinstance(part, dict) for part in splits):
        raise _foreign(folder)
    return {str(part.get("name")) for part in splits}


def _foreign(folder: Path) -> UserError:
    return UserError(f"{folder} holds a dataset that clipkit didn't write: choose another output or --name")


def _sources_of(manifest: SplitManifest) -> list[tuple[str, int]]:
    return [(source.file, source.bytes) for shard in manifest.shards for source in shard.sources]


def _plan(
    folder: Path, work: Path, name: str, split: str, sources: list[Path], sizes: list[int], shard_megabytes: int
) -> list[ShardJob]:
    """The output shards and their sources. A killed run's plan is kept, so that its finished shards stay valid."""
    names = [source.name for source in sources]
    path = work / "plan.json"
    if path.exists():
        plan = read_json(path)
        if plan["sources"] != names or plan["shard_megabytes"] != shard_megabytes:
            raise UserError(
                f"{folder} holds a build of {split!r} begun from other shards or with another shard size: "
                f"remove {work} to begin anew, or run the command as it was"
            )
        starts = plan["starts"]
    else:
        starts = _cut(sizes, shard_megabytes * 1_000_000)
        write_json(path, {"sources": names, "shard_megabytes": shard_megabytes, "starts": starts})
    ends = [*starts[1:], len(sources)]
    return [
        ShardJob(
            number,
            folder / shard_name(name, split, number, len(starts)),
            work / f"shard-{number:05d}.json",
            tuple(sources[start:end]),
            tuple(sizes[start:end]),
        )
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _cut(sizes: list[int], wanted: int) -> list[int]:
    """Where each run of neighbours begins, so that runs come near to `wanted` bytes and none is empty."""
    starts, run = [0], 0
    for i, size in enumerate(sizes):
        if i > starts[-1] and run + size / 2 > wanted:
            starts.append(i)
            run = 0
        run += size
    return starts


def _build_shards(
    job_list: list[ShardJob], known: dict[str, str], workers: int | None, progress: Callable[[BuildProgress], None]
) -> tuple[list[ShardState], dict[str, str]]:
    """The states of all shards, and the kinds that all of them are written with."""
    states = {job.number: state for job in job_list if (state := read_state(job)) is not None}
    _tell(progress, job_list, states)
    _run(job_list, known, states, workers, progress)
    kinds = unify([known, *(_kinds_met(state) for state in states.values())])
    for column, kind in known.items():
        if kinds[column] != kind:
            raise UserError(
                f"column {column!r} is {kinds[column]} in these shards and {kind} in the dataset's other splits: "
                "build them under another --name"
            )
    for job in job_list:
        if any(kinds[column] != kind for column, kind in _kinds_met(states[job.number]).items()):
            del states[job.number]
    _run(job_list, kinds, states, workers, progress)
    return [states[job.number] for job in job_list], kinds


def _run(
    job_list: list[ShardJob],
    kinds: dict[str, str],
    states: dict[int, ShardState],
    workers: int | None,
    progress: Callable[[BuildProgress], None],
) -> None:
    """Build the shards that have no state yet and add theirs."""
    lacking = [job for job in job_list if job.number not in states]
    function = partial(build_shard, kinds=kinds)
    for index, state in jobs.run(function, lacking, workers=workers, describe=lambda job: job.path.name):
        states[lacking[index].number] = state
        _tell(progress, job_list, states)


def _kinds_met(state: ShardState) -> dict[str, str]:
    """The kinds of the columns that have a value in the shard."""
    return {column: state.kinds[column] for column in state.present}


def _tell(
    progress: Callable[[BuildProgress], None], job_list: list[ShardJob], states: Mapping[int, ShardState]
) -> None:
    progress(
        BuildProgress(
            bytes_done=sum(sum(job.sizes) for job in job_list if job.number in states),
            bytes_total=sum(sum(job.sizes) for job in job_list),
            shards_done=len(states),
            shards_total=len(job_list),
            records=sum(state.shard.records for state in states.values()),
            skipped=sum(len(state.skipped) for state in states.values()),
        )
    )


def _kinds_of(features: Mapping[str, Feature]) -> dict[str, str]:
    return {
        name: (LIST if feature.is_list else "") + feature.kind
        for name, feature in features.items()
        if name not in (IMAGE_COLUMN, CAPTION_COLUMN)
    }


def _features(states: list[ShardState], kinds: Mapping[str, str], known: Mapping[str, Feature]) -> dict[str, Feature]:
    """The columns as `features.json` declares them; optional where any record of any split lacks a value."""
    records = sum(state.shard.records for state in states)
    features = {IMAGE_COLUMN: Feature("image"), CAPTION_COLUMN: Feature("text")}
    for column, kind in kinds.items():
        present = sum(state.present.get(column, 0) for state in states)
        optional = present < records or (bool(known) and (column not in known or known[column].optional))
        if kind == EMPTY_LIST:
            features[column] = Feature("text", is_list=True)
        elif kind.startswith(LIST):
            features[column] = Feature(cast(Kind, kind.removeprefix(LIST)), is_list=True)
        else:
            features[column] = Feature("int" if kind == "bool" and optional else cast(Kind, kind), optional)
    return features


def _write_index(folder: Path, split: str, job_list: list[ShardJob], records: int) -> None:
    """The offsets of all shards in one file, written through the disk's cache: 400 million take 3.2 GB."""
    with write_beside(index_path(folder, split)) as temporary:
        index = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=(records,))
        start = 0
        for job in job_list:
            offsets = np.load(offsets_path(job))
            index[start : start + len(offsets)] = offsets
            start += len(offsets)
        index.flush()
        del index


def _write_skipped(folder: Path, split: str, states: list[ShardState]) -> None:
    """One JSON line for each sample that was left out, so that it can be looked at or fetched again."""
    with (
        write_beside(folder / CLIPKIT_FOLDER / f"skipped-{split}.jsonl") as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        for state in states:
            for source, key, reason in state.skipped:
                file.write(json.dumps({"source": source, "key": key, "reason": reason}, ensure_ascii=False) + "\n")
