"""img2dataset's TFRecord shards become a dataset where they lie, without a copy: `clipkit build-tfds --in-place`.

First all shards are scanned, and nothing is changed: checksums, counts, columns. When all are whole, each gets the
name that TFDS wants; the few that TensorFlow couldn't read as they are (see `columns`) are rewritten, one
by one. Then come the index, the manifest and TFDS's metadata, `dataset_info.json` last.

The list of shards is kept from the beginning, so that a run that is killed between two renames knows which file is
which: a shard stands under its old name, or under its new one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from clipkit.errors import UserError
from clipkit.formats.dataset import check_name, open_dataset, refuse_unfinished_rewrite, shard_name
from clipkit.formats.manifest import CLIPKIT_FOLDER, ShardEntry, SplitManifest, add_counts, read_manifest
from clipkit.formats.tables import is_hidden
from clipkit.formatting import counted, counts_text
from clipkit.jobs.passes import Runner
from clipkit.jobs.run import Engine
from clipkit.storage.files import (
    clear_leftovers,
    disk_errors,
    is_remote,
    load_array,
    lock,
    read_json,
    remove,
    require_dir,
    sync_file,
    write_json,
    write_json_lines,
)
from clipkit.tfrecord_tools.in_place.columns import check_columns, features_of, misfits, unify_forms
from clipkit.tfrecord_tools.in_place.shard import InPlaceJob, ShardScan, read_scan, rewrite, scan_shard
from clipkit.tfrecord_tools.writing.finish import finish_dataset
from clipkit.tfrecord_tools.writing.summary import BuildSummary, summarise

SUFFIX = ".tfrecord"


@dataclass(frozen=True)
class InPlaceSummary(BuildSummary):
    """`rewritten`: why, by the shard's old name; all others were only renamed. `problems`: bad pairs by reason."""

    rewritten: dict[str, str] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """A few lines for a person."""
        lines = [super().text()]
        if self.rewritten:
            first, why = next(iter(self.rewritten.items()))
            lines.append(
                f"{len(self.rewritten):,} of {counted(self.shards, 'shard')} rewritten, since TensorFlow refuses "
                f"what img2dataset writes for a null: {first} ({why}){' …' if len(self.rewritten) > 1 else ''}"
            )
        if self.problems:
            listed = self.path / CLIPKIT_FOLDER / f"problems-{self.split}.jsonl"
            lines.append(
                f"bad pairs, which can't be left out in place: {counts_text(self.problems)}; each in {listed} "
                "(clipkit build-tfds without --in-place leaves them out)"
            )
        return "\n".join(lines)


def build_in_place(
    folder: Path,
    name: str,
    *,
    split: str = "train",
    workers: int | None = 1,
    engine: Engine = "local",
) -> InPlaceSummary:
    """Make the folder of img2dataset's `00000.tfrecord` … itself a dataset, and go on where a killed run stopped.

    The shards are renamed, and those with nulls among numbers are rewritten; img2dataset's other files stay. Pairs that
    a build would leave out (no image, no caption) stay too, and are counted and listed in `clipkit/problems-*.jsonl`.
    Raises UserError, before anything is renamed: RecordError for a damaged shard, and others for images that aren't
    `jpg`, for shards that lack samples that img2dataset's own statistics count, for names that TFDS doesn't allow, and
    for a folder that is another dataset already.
    """
    check_name(name)
    check_name(split, "split")
    if is_remote(folder):
        raise UserError(f"{folder}: shards in a store can't be renamed; run clipkit build-tfds without --in-place")
    folder = require_dir(folder, "folder").absolute()
    work = folder / CLIPKIT_FOLDER / f"build-{split}"
    with lock(folder / CLIPKIT_FOLDER):
        refuse_unfinished_rewrite(folder)
        clear_leftovers(folder, folder / CLIPKIT_FOLDER, work)
        if (folder / "dataset_info.json").exists():
            manifest = _finished(folder, name, split)
            remove(work)
            return _summary(folder, name, split, manifest, built=False)
        runner = Runner(workers, engine)
        jobs = _plan(folder, work, name, split)
        scans = _scan(jobs, runner)
        kinds = unify_forms(scan.forms for scan in scans)
        wrong = [misfits(scan.forms, kinds) for scan in scans]
        shards = _move(jobs, scans, wrong, kinds, runner)
        manifest = _manifest(jobs, scans, shards, wrong)
        # What a build would have left out.
        problems = (
            {"shard": job.target.name, "key": key, "reason": reason}
            for job, scan in zip(jobs, scans, strict=True)
            for key, reason in scan.problems
        )
        write_json_lines(folder / CLIPKIT_FOLDER / f"problems-{split}.jsonl", problems)
        features = features_of(kinds, [scan.forms for scan in scans], manifest.records)
        offsets = {split: (load_array(job.offsets) for job in jobs)}
        finish_dataset(folder, name, features, {split: manifest}, offsets)
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
        renamed = next(folder.glob(f"*{SUFFIX}-*-of-*"), None)
        if renamed is not None:  # its dataset would lose it
            raise UserError(
                f"{renamed} is of a build with another --name or --split: finish that one, or give its shards their "
                "names again"
            )
        _check_downloaded(folder, sources)
        write_json(path, {"name": name, "in_place": sources})
    jobs = [
        InPlaceJob(folder / source, folder / shard_name(name, split, i, len(sources)), work / f"shard-{i:05d}.json")
        for i, source in enumerate(sources)
    ]
    for job in jobs:
        if not job.source.exists() and not job.target.exists():
            raise UserError(f"{job.source} is gone: put it back and run the same command again")
    return jobs


def _check_downloaded(folder: Path, sources: Sequence[str]) -> None:
    """img2dataset writes a shard's statistics when the shard is done; without any, somebody has tidied up."""
    statistics = {source: folder / f"{source.removesuffix(SUFFIX)}_stats.json" for source in sources}
    lacking = [source for source, path in statistics.items() if not path.exists()]
    if lacking and len(lacking) < len(sources):
        raise UserError(
            f"{folder / lacking[0]} has no statistics beside it, so img2dataset hadn't finished it: "
            "let img2dataset finish, or remove the shard"
        )


def _scan(jobs: Sequence[InPlaceJob], runner: Runner) -> list[ShardScan]:
    """What all shards hold; those that no earlier run has scanned are read from end to end."""

    def check(job: InPlaceJob, scan: ShardScan) -> None:
        _check_counted(job, scan.shard)
        if scan.shard.records:
            check_columns(scan.forms, str(job.source))

    scans = runner.run(
        "check shards",
        scan_shard,
        jobs,
        describe=lambda job: job.source.name,
        size=lambda job: (job.source if job.source.exists() else job.target).stat().st_size,
        finished=read_scan,
        counts=lambda scan: {"records": scan.shard.records},
        check=check,
    )
    if not any(scan.shard.records for scan in scans):
        raise UserError(f"{jobs[0].source.parent} holds no records: check the download")
    return scans


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


def _move(
    jobs: Sequence[InPlaceJob],
    scans: Sequence[ShardScan],
    wrong: Sequence[Mapping[str, str]],
    kinds: Mapping[str, str],
    runner: Runner,
) -> list[ShardEntry]:
    """Rewrite what can't stay as it is, and rename everything else."""
    shards = [scan.shard for scan in scans]
    places = [place for place, why in enumerate(wrong) if why]
    rewritten = runner.run(
        "rewrite shards",
        partial(rewrite, kinds=dict(kinds)),
        [jobs[place] for place in places],
        describe=lambda job: job.source.name,
    )
    for place, shard in zip(places, rewritten, strict=True):
        shards[place] = shard
    with disk_errors(jobs[0].source.parent):
        for job in jobs:
            if job.source.exists():  # what was rewritten has gone from here
                job.source.replace(job.target)
    sync_file(jobs[0].source.parent)
    return shards


def _manifest(
    jobs: Sequence[InPlaceJob],
    scans: Sequence[ShardScan],
    shards: Sequence[ShardEntry],
    wrong: Sequence[Mapping[str, str]],
) -> SplitManifest:
    rewritten = {
        job.source.name: "; ".join(f"{column!r}: {why}" for column, why in columns.items())
        for job, columns in zip(jobs, wrong, strict=True)
        if columns
    }
    problems = add_counts({reason: 1} for scan in scans for _, reason in scan.problems)
    options = {"in_place": True, "rewritten": rewritten, "problems": problems}
    return SplitManifest(tuple(shards), options=options)


def _summary(folder: Path, name: str, split: str, manifest: SplitManifest, built: bool) -> InPlaceSummary:
    summary = summarise(folder, name, {split: manifest}, built)
    options = manifest.options
    return InPlaceSummary(**vars(summary), rewritten=options.get("rewritten", {}), problems=options.get("problems", {}))
