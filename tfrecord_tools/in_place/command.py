"""img2dataset's TFRecord shards become a dataset where they lie, without a copy: `clipkit build-tfds --in-place`.

First all shards are looked at, and nothing is changed: checksums, counts, columns. When all are whole, each gets the
name that TFDS wants; the few that TensorFlow couldn't read as they are (see `in_place_columns`) are written anew, one
by one. Then come the index, the manifest and TFDS's metadata, `dataset_info.json` last.

The list of shards is kept from the beginning, so that a run that is killed between two renames knows which file is
which: a shard stands under its old name, or under its new one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset, shard_name
from clipkit.formats.manifest import (
    CLIPKIT_FOLDER,
    ShardEntry,
    SplitManifest,
    add_counts,
    index_path,
    read_manifest,
    write_manifest,
)
from clipkit.formats.tables import is_hidden
from clipkit.jobs.run import Engine, run_jobs
from clipkit.log import Progress
from clipkit.storage.files import (
    clear_leftovers,
    disk_errors,
    is_remote,
    lock,
    read_json,
    remove,
    require_dir,
    sync_file,
    write_beside,
    write_json,
)
from clipkit.tfrecord_tools.account.purged import refuse_unfinished_purge
from clipkit.tfrecord_tools.in_place.columns import check_columns, features_of, misfits, unify_looks
from clipkit.tfrecord_tools.in_place.shard import InPlaceJob, Looked, look_at, read_looked, rewrite
from clipkit.tfrecord_tools.in_place.summary import InPlaceSummary
from clipkit.tfrecord_tools.writing.metadata import write_metadata
from clipkit.tfrecord_tools.writing.summary import summarise

SUFFIX = ".tfrecord"


def build_in_place(
    folder: Path,
    name: str,
    *,
    split: str = "train",
    workers: int | None = 1,
    engine: Engine = "local",
) -> InPlaceSummary:
    """Make the folder of img2dataset's `00000.tfrecord` … itself a dataset, and go on where a killed run stopped.

    The shards are renamed, and those with nulls among numbers written anew; img2dataset's other files stay. Pairs that
    a build would leave out (no image, no caption) stay too, and are counted and listed in `clipkit/problems-*.jsonl`.
    Raises UserError, before anything is renamed: RecordError for a damaged shard, and others for images that aren't
    `jpg`, for shards that lack samples that img2dataset's own statistics count, for names that TFDS doesn't allow, and
    for a folder that is another dataset already.
    """
    for each in (name, split):
        if not re.fullmatch(r"[a-zA-Z]\w*", each, re.ASCII):
            raise UserError(f"name {each!r}: TFDS wants a letter, then letters, digits and _ alone; choose such a one")
    if is_remote(folder):
        raise UserError(f"{folder}: shards in a store can't be renamed; run clipkit build-tfds without --in-place")
    folder = require_dir(folder, "folder").absolute()
    work = folder / CLIPKIT_FOLDER / f"build-{split}"
    with lock(folder / CLIPKIT_FOLDER):
        refuse_unfinished_purge(folder)
        clear_leftovers(folder, folder / CLIPKIT_FOLDER, work)
        if (folder / "dataset_info.json").exists():
            manifest = _finished(folder, name, split)
            remove(work)
            return _summary(folder, name, split, manifest, built=False)
        job_list = _plan(folder, work, name, split)
        looked = _look(job_list, workers, engine)
        kinds = unify_looks(each.looks for each in looked)
        wrong = [misfits(each.looks, kinds) for each in looked]
        shards = _settle(job_list, looked, wrong, kinds, workers, engine)
        manifest = _manifest(job_list, looked, shards, wrong)
        _write_index(folder, split, job_list)
        _write_problems(folder, split, job_list, looked)
        write_manifest(folder, {split: manifest})
        features = features_of(kinds, [each.looks for each in looked], manifest.records)
        write_metadata(folder, name, features, {split: manifest})
        remove(work)
    return _summary(folder, name, split, manifest, built=True)


def _finished(folder: Path, name: str, split: str) -> SplitManifest:
    """The manifest of a folder that is a dataset. Raises UserError when it isn't this one, or has further shards."""
    info, splits = read_json(folder / "dataset_info.json"), read_manifest(folder)
    if not isinstance(info, dict) or info.get("name") != name or split not in splits:
        raise UserError(f"{folder} is a dataset already, of another name or split: leave it, or remove its metadata")
    more = _sources(folder)
    if more:
        raise UserError(
            f"{folder} is a dataset already, and {more[0].name} doesn't belong to it: move further shards to another "
            "folder"
        )
    open_dataset(folder, split)  # says so when a shard is missing
    return splits[split]


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file() and not is_hidden(path.name))


def _plan(folder: Path, work: Path, name: str, split: str) -> list[InPlaceJob]:
    """The shards in their order, from the list that the first run kept."""
    path = work / "plan.json"
    found = [source.name for source in _sources(folder)]
    if path.exists():
        plan = read_json(path)
        sources = plan.get("in_place", [])
        foreign = sorted(set(found) - set(sources))
        if plan.get("name") != name or foreign:
            other = f"with {foreign[0]} new in it" if foreign else f"as {plan.get('name')!r}"
            raise UserError(f"{folder} is being built {other}: finish it as it was begun, or remove {work} beforehand")
    else:
        sources = found
        if not sources:
            raise UserError(f"{folder} holds no {SUFFIX} shards: name the folder that img2dataset wrote")
        _check_downloaded(folder, sources)
        write_json(path, {"name": name, "in_place": sources})
    job_list = [
        InPlaceJob(folder / source, folder / shard_name(name, split, i, len(sources)), work / f"shard-{i:05d}.json")
        for i, source in enumerate(sources)
    ]
    for job in job_list:
        if not job.source.exists() and not job.target.exists():
            raise UserError(f"{job.source} is gone: put it back and run the same command again")
    return job_list


def _check_downloaded(folder: Path, sources: Sequence[str]) -> None:
    """img2dataset writes a shard's statistics when the shard is done; without any, somebody has tidied up."""
    statistics = {source: folder / f"{source.removesuffix(SUFFIX)}_stats.json" for source in sources}
    lacking = [source for source, path in statistics.items() if not path.exists()]
    if lacking and len(lacking) < len(sources):
        raise UserError(
            f"{folder / lacking[0]} has no statistics beside it, so img2dataset hadn't finished it: "
            "let img2dataset finish, or remove the shard"
        )


def _look(job_list: Sequence[InPlaceJob], workers: int | None, engine: Engine) -> list[Looked]:
    """What all shards hold; those that weren't looked at yet are read from end to end."""
    found = {job.source: looked for job in job_list if (looked := read_looked(job)) is not None}
    lacking = [job for job in job_list if job.source not in found]
    size = sum(job.source.stat().st_size for job in lacking)
    with Progress("check shards", size // 1_000_000, "MB") as line:
        done = 0
        running = run_jobs(look_at, lacking, workers=workers, engine=engine, describe=lambda job: job.source.name)
        for index, looked in running:
            job = lacking[index]
            _check_counted(job, looked.shard)
            if looked.shard.records:
                check_columns(looked.looks, str(job.source))
            found[job.source] = looked
            done += looked.shard.bytes
            line.update(done // 1_000_000, f"{sum(each.shard.records for each in found.values()):,} records")
    if not any(each.shard.records for each in found.values()):
        raise UserError(f"{job_list[0].source.parent} holds no records: check the download")
    return [found[job.source] for job in job_list]


def _check_counted(job: InPlaceJob, shard: ShardEntry) -> None:
    """A shard that was cut off between two records is whole to its checksums, but not to img2dataset's statistics."""
    path = job.source.with_name(f"{job.source.name.removesuffix(SUFFIX)}_stats.json")
    statistics = read_json(path) if path.exists() else {}
    successes = statistics.get("successes") if isinstance(statistics, dict) else None
    if isinstance(successes, int) and successes != shard.records:
        raise UserError(
            f"{job.source} holds {shard.records:,} records where {path.name} counts {successes:,} successes: "
            "download the shard again"
        )


def _settle(
    job_list: Sequence[InPlaceJob],
    looked: Sequence[Looked],
    wrong: Sequence[Mapping[str, str]],
    kinds: Mapping[str, str],
    workers: int | None,
    engine: Engine,
) -> list[ShardEntry]:
    """Write anew what can't stay as it is, and rename all else."""
    shards = [each.shard for each in looked]
    places = [place for place, why in enumerate(wrong) if why]
    with Progress("write shards anew", len(places), "shards", quiet=not places) as line:
        function = partial(_rewrite, kinds=dict(kinds))
        items = [(job_list[place], looked[place].shard) for place in places]
        running = run_jobs(function, items, workers=workers, engine=engine, describe=lambda item: item[0].source.name)
        for done, (index, shard) in enumerate(running, start=1):
            shards[places[index]] = shard
            line.update(done)
    with disk_errors(job_list[0].source.parent):
        for job in job_list:
            if job.source.exists():  # what was written anew has gone from here
                job.source.replace(job.target)
    sync_file(job_list[0].source.parent)
    return shards


def _rewrite(item: tuple[InPlaceJob, ShardEntry], kinds: Mapping[str, str]) -> ShardEntry:
    return rewrite(*item, kinds)


def _manifest(
    job_list: Sequence[InPlaceJob],
    looked: Sequence[Looked],
    shards: Sequence[ShardEntry],
    wrong: Sequence[Mapping[str, str]],
) -> SplitManifest:
    rewritten = {
        job.source.name: "; ".join(f"{column!r}: {why}" for column, why in columns.items())
        for job, columns in zip(job_list, wrong, strict=True)
        if columns
    }
    problems = add_counts({reason: 1} for each in looked for _, reason in each.problems)
    options = {"in_place": True, "rewritten": rewritten, "problems": problems}
    return SplitManifest(tuple(shards), options=options)


def _write_index(folder: Path, split: str, job_list: Sequence[InPlaceJob]) -> None:
    index_N = np.concatenate([np.load(job.offsets) for job in job_list])
    with write_beside(index_path(folder, split)) as temporary, temporary.open("wb") as file:
        np.save(file, index_N)


def _write_problems(folder: Path, split: str, job_list: Sequence[InPlaceJob], looked: Sequence[Looked]) -> None:
    """One JSON line for each pair that a build would have left out."""
    path = folder / CLIPKIT_FOLDER / f"problems-{split}.jsonl"
    with write_beside(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for job, each in zip(job_list, looked, strict=True):
            for key, reason in each.problems:
                line = {"shard": job.target.name, "key": key, "reason": reason}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _summary(folder: Path, name: str, split: str, manifest: SplitManifest, built: bool) -> InPlaceSummary:
    summary = summarise(folder, name, split, manifest, built)
    options = manifest.options
    return InPlaceSummary(**vars(summary), rewritten=options.get("rewritten", {}), problems=options.get("problems", {}))
