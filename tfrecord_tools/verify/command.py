"""Is a dataset what its metadata say? `clipkit verify`: every byte is read, nothing is written.

A dataset is compared with `dataset_info.json`, `features.json` and, where clipkit made it, the manifest and the index;
a folder of img2dataset's tars with the counts that stand beside them. Training stops at the first fault that it meets,
perhaps on the third day; this finds all of them beforehand, and says for each shard what to do.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clipkit.formats.dataset import DatasetLayout, is_unfinished_download, read_layout
from clipkit.formats.manifest import CLIPKIT_FOLDER, ShardEntry, index_path
from clipkit.formats.tables import is_hidden
from clipkit.formatting import counted, duration, size_text
from clipkit.jobs.passes import Runner
from clipkit.jobs.run import Engine
from clipkit.storage.files import WRITTEN_BESIDE, as_path
from clipkit.tfrecord_tools.verify.metadata import index_fits, leftovers, metadata_problems, unfinished_rewrites
from clipkit.tfrecord_tools.verify.problems import FINISH, Problem, ShardReport, remedy
from clipkit.tfrecord_tools.verify.shard import ShardCheck, check_shard
from clipkit.tfrecord_tools.verify.tar import TarCheck, check_tar

Check = TypeVar("Check", ShardCheck, TarCheck)

SEED = 0
DECODE = 1000


@dataclass(frozen=True)
class VerifySummary:
    """What was read and what is wrong. `leftovers` do no harm; everything in `problems` wants something done.

    `remedies` say, for each file with a problem, what to do.
    """

    path: Path
    shards: int
    records: int
    bytes: int
    decoded: int
    seconds: float
    problems: tuple[Problem, ...]
    remedies: dict[str, str]
    leftovers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**asdict(self), "path": str(self.path), "ok": not self.problems}

    def text(self) -> str:
        """A table of the problems by file, each file with its remedy, and one line that says all."""
        lines = []
        for file, todo in self.remedies.items():
            lines.append(file)
            for problem in self.problems:
                if problem.file == file:
                    times = f"{problem.count:,} × " if problem.count > 1 else ""
                    first = f" ({'first: ' if problem.count > 1 else ''}{problem.first})" if problem.first else ""
                    lines.append(f"  {times}{problem.what}{first}")
            lines.append(f"  -> {todo}")
        if self.leftovers:
            more = f" and {len(self.leftovers) - 5:,} more" if len(self.leftovers) > 5 else ""
            lines.append(f"left over, harmless, may be removed: {', '.join(self.leftovers[:5])}{more}")
        count = f"{counted(len(self.remedies), 'file')} with problems"
        verdict = count if self.problems else "all is well"
        lines.append(
            f"{self.path}: {verdict}. Read {counted(self.records, 'record')}, {size_text(self.bytes)} in "
            f"{counted(self.shards, 'shard')}, and decoded {counted(self.decoded, 'image')} in "
            f"{duration(self.seconds)}."
        )
        return "\n".join(lines)


def verify(
    path: Path, *, decode: int | None = DECODE, engine: Engine = "local", workers: int | None = 1
) -> VerifySummary:
    """Check the dataset at `path`, or a folder of img2dataset's tars, and return all that is wrong.

    `decode` images drawn from the whole are decoded in full; None takes all. One job a shard runs on `engine`.
    Amid a purge that isn't finished nothing is read, and the purge is the one problem.
    Raises UserError where there is neither a dataset nor tars.
    """
    path = as_path(path)
    runner = Runner(workers, engine)
    started = time.monotonic()
    if tars := _find_tars(path):
        return _verify_tars(path, tars, decode, runner, started)
    layout = read_layout(path)
    reports: list[ShardReport] = []
    problems = unfinished_rewrites(layout)
    if not problems:
        checks = list(_shard_checks(layout, decode))
        reports, found = _reports(check_shard, checks, runner)
        problems = [*metadata_problems(layout), *found]
    files = list(dict.fromkeys(problem.file for problem in problems))
    remedies = {file: remedy(layout, file, [p for p in problems if p.file == file]) for file in files}
    return _summary(layout.folder, reports, problems, remedies, leftovers(layout), started)


def _summary(
    path: Path,
    reports: list[ShardReport],
    problems: list[Problem],
    remedies: dict[str, str],
    leftovers: list[str],
    started: float,
) -> VerifySummary:
    return VerifySummary(
        path=path,
        shards=len(reports),
        records=sum(report.records for report in reports),
        bytes=sum(report.bytes for report in reports),
        decoded=sum(report.decoded for report in reports),
        seconds=time.monotonic() - started,
        problems=tuple(problems),
        remedies=remedies,
        leftovers=tuple(leftovers),
    )


def _reports(
    function: Callable[[Check], ShardReport], checks: Sequence[Check], runner: Runner
) -> tuple[list[ShardReport], list[Problem]]:
    reports = runner.run(
        "verify",
        function,
        checks,
        describe=lambda check: check.path.name,
        size=lambda check: check.bytes,
        counts=lambda report: {"with problems": bool(report.problems)},
    )
    return reports, [problem for report in reports for problem in report.problems]


# ---------------------------------------------------------------------------------------------------------------------
# A dataset
# ---------------------------------------------------------------------------------------------------------------------


def _shard_checks(layout: DatasetLayout, decode: int | None) -> Iterator[ShardCheck]:
    """What to check of every shard, the images to decode drawn from all records of all splits (seed 0)."""
    total = sum(sum(lengths) for lengths in layout.lengths.values())
    rng = np.random.default_rng(SEED)
    chosen = np.sort(rng.choice(total, min(decode or 0, total), replace=False, shuffle=False))
    before = 0
    for split, lengths in layout.lengths.items():
        manifest = layout.manifest.get(split)
        shards: Mapping[str, ShardEntry] = {shard.file: shard for shard in manifest.shards} if manifest else {}
        index = index_path(layout.folder, split) if index_fits(layout, split) else None
        first = 0
        for number, file in enumerate(layout.files[split]):
            length = lengths[number] if number < len(lengths) else None
            low, high = np.searchsorted(chosen, [before + first, before + first + (length or 0)])
            shard = shards.get(file)
            yield ShardCheck(
                path=layout.folder / file,
                features=layout.features,
                records=length,
                bytes=shard.bytes if shard else None,
                crc32c=shard.crc32c if shard else None,
                index=(index, first) if index is not None else None,
                decode=None if decode is None else tuple((chosen[low:high] - before - first).tolist()),
            )
            first += length or 0
        before += sum(lengths)


# ---------------------------------------------------------------------------------------------------------------------
# A folder of tars
# ---------------------------------------------------------------------------------------------------------------------


def _find_tars(path: Path) -> list[Path]:
    """The tars of a folder by name, [] where it is a dataset."""
    if not path.is_dir() or (path / "dataset_info.json").exists():
        return []
    found = (file for file in path.iterdir() if file.suffix == ".tar" and not is_hidden(file.name))
    return sorted(found, key=lambda each: each.name)


def _verify_tars(
    folder: Path, files: Sequence[Path], decode: int | None, runner: Runner, started: float
) -> VerifySummary:
    each = None if decode is None else -(-decode // len(files))
    checks = [TarCheck(file, file.stat().st_size, number, each) for number, file in enumerate(files)]
    reports, problems = _reports(check_tar, checks, runner)
    if is_unfinished_download(folder):
        problems.append(Problem(f"{CLIPKIT_FOLDER}/plan.json", "the download isn't finished", FINISH))
    again = "run the same clipkit download again"
    remedies = {problem.file: f"remove it and what stands beside it, and {again}" for problem in problems}
    remedies |= {problem.file: again for problem in problems if problem.todo == FINISH}
    names = sorted(file.name for file in folder.iterdir())
    left = [name for name in names if WRITTEN_BESIDE.fullmatch(name) or name.endswith(".tmp") or name == "_tmp"]
    return _summary(folder, reports, problems, remedies, left, started)
