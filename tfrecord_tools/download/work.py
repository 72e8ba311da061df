"""The course of a download: what is missing, what is tried again, what must be written again, and the end.

A retry has a number. Each shard remembers the last one that it went through, so a retry that was killed goes on with
the shards that it hadn't reached, and what failed again in it isn't asked for twice.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clipkit.errors import InternalError, UserError
from clipkit.formats.kinds import unify
from clipkit.formatting import counts_text
from clipkit.jobs.run import Engine, run_jobs
from clipkit.jobs.worker import cores
from clipkit.storage.files import clear_leftovers, disk_errors, is_remote, read_json, remove, write_json
from clipkit.tfrecord_tools.account.ledger import FAILURES_FILE, LEDGER_FOLDER, write_failures
from clipkit.tfrecord_tools.account.shard_state import DownloadState, is_whole, load_state, recover
from clipkit.tfrecord_tools.download.finish import DownloadSummary, summarise, was_changed, write_dataset
from clipkit.tfrecord_tools.download.plan import DownloadJob, DownloadPlan, DownloadShard, JobSettings, settings_of
from clipkit.tfrecord_tools.download.progress import watch
from clipkit.tfrecord_tools.reasons import (
    BLOCKED_ADDRESS,
    DEFAULT_RETRY,
    EMPTY_CAPTION,
    PASSING,
    PURGED,
    REASONS,
    remedy_after_download,
)

# Shards of a batch, at most: more overlap better, fewer lose less with a worker and, on a cluster, report sooner.
BATCH_SHARDS = 16
BATCH_SHARDS_OF_CLUSTER = 4
BATCHES_PER_WORKER = 4
OVERLAPPING = 4  # shards of a batch, at least, so that one is fetched while another is written
STORE_THREADS = 16
RETRY_FILE = "retry.json"  # number and reasons of a retry under way
# What a download reports too, and no retry changes.
NOT_RETRIED = {
    EMPTY_CAPTION: "a dataset takes no pair without a caption: choose --format webdataset and another output",
    PURGED: "what was purged must not come back",
}


@dataclass(frozen=True)
class Download:
    """A planned download. `workers` of None is all that a cluster can take; `urls` is what the user called the table.

    What it raises is what `command.download` does.
    """

    plan: DownloadPlan
    settings: JobSettings
    workers: int | None
    engine: Engine
    urls: str
    where: str | None

    def has_begun(self) -> bool:
        """Whether any shard is there."""
        folder = self.settings.layout.own / LEDGER_FOLDER
        return folder.exists() and any(folder.iterdir())

    def run(self, again: frozenset[str] | None) -> DownloadSummary:
        """Fetch what is missing, and with `again` the rows that failed for one of these reasons; then account for all.

        Nothing is written when all is there.
        """
        layout, settings, shards = self.settings.layout, self.settings, self.plan.shards
        recover(layout)
        clear_leftovers(layout.root, layout.own, *(layout.own / name for name in (LEDGER_FOLDER, "shards", "input")))
        found = self.read_states(shards)
        finished = self.is_finished()
        if finished and layout.format == "tfds" and was_changed(layout, [state for state, _ in found]):
            return self.leave_changed(again)
        states = [state if whole else None for state, whole in found]
        jobs = [DownloadJob(shard) for shard, state in zip(shards, states, strict=True) if state is None]
        if again is not None:
            settings = dataclasses.replace(settings, round=begin_retry(layout.own, again, states))
            jobs += retry_jobs(shards, states, again, settings.round)
        if not jobs and finished:
            remove(layout.own / RETRY_FILE)
            return summarise(layout, self.plan, [state for state in states if state is not None])
        # Take back what says that all is there, on which other stages rely.
        for path in (layout.own / "download.json", layout.root / "dataset_info.json"):
            remove(path)
        whole_states = self.fetch(jobs, settings, states)
        if layout.format == "tfds":
            # Shards whose columns have a narrower kind than in others are written again; nothing is fetched for it. A
            # whole number among them may turn out too large for the others' float.
            while True:
                kinds = unify(state.kinds_met for state in whole_states)
                pairs = zip(shards, whole_states, strict=True)
                narrow = [DownloadJob(shard, frozenset()) for shard, state in pairs if state.is_narrower(kinds)]
                if not narrow:
                    break
                whole_states = self.fetch(narrow, dataclasses.replace(settings, kinds=kinds), whole_states)
        return self.finish(whole_states)

    def read_states(self, shards: Sequence[DownloadShard]) -> list[tuple[DownloadState | None, bool]]:
        """The states of shards as they were written, and whether the files are still so."""

        def read(shard: DownloadShard) -> tuple[DownloadState | None, bool]:
            files = self.settings.layout.files(shard.number)
            state = load_state(files)
            return state, state is not None and is_whole(files, state)

        if not is_remote(self.settings.layout.root):
            return [read(shard) for shard in shards]
        with ThreadPoolExecutor(STORE_THREADS) as pool:  # each is a question to a store
            return list(pool.map(read, shards))

    def is_finished(self) -> bool:
        """Whether an earlier run has come to its end."""
        layout = self.settings.layout
        lasts = [layout.own / "download.json", layout.own / FAILURES_FILE]
        lasts += [layout.root / "dataset_info.json"] if layout.format == "tfds" else []
        with disk_errors(layout.root):
            return all(path.exists() for path in lasts)

    def leave_changed(self, again: frozenset[str] | None) -> DownloadSummary:
        """A dataset from which records were removed since is left alone: they must not come back."""
        root = self.settings.layout.root
        if again is not None:
            raise UserError(
                f"{root} was changed since it was downloaded (clipkit purge?): nothing can be fetched "
                "into it any more; download the table into another folder, and purge that"
            )
        values = read_json(self.settings.layout.own / "download.json")
        names = [field.name for field in dataclasses.fields(DownloadSummary) if field.name not in ("out", "probe")]
        return DownloadSummary(out=root, **{name: values[name] for name in names})

    def fetch(
        self, jobs: Sequence[DownloadJob], settings: JobSettings, states: Sequence[DownloadState | None]
    ) -> list[DownloadState]:
        """Fetch shards, with a line of progress; returns all states, those of the shards fetched read again."""
        current = list(states)
        if jobs:
            # Only here, so that what fetching imports stays out of this process.
            from clipkit.tfrecord_tools.download.worker import fetch_batch

            before = counts_before(jobs, states)
            with watch(self.plan.rows, before, live=self.engine == "local") as line:
                results = run_jobs(
                    partial(fetch_batch, settings=dataclasses.replace(settings, counters=line.folder)),
                    cut_batches(jobs, self.workers or cores(), self.engine),
                    workers=self.workers,
                    describe=self.name_batch,
                    isolate=True,
                    engine=self.engine,
                )
                for _, counts in results:
                    line.finished(counts)
            shards = [job.shard for job in jobs]
            for shard, (state, whole) in zip(shards, self.read_states(shards), strict=True):
                current[shard.number] = state if whole else None
        for number, state in enumerate(current):
            if state is None:
                layout = settings.layout
                raise InternalError(
                    f"shard {layout.shard(number)} is missing from {layout.root}: run the same command again"
                )
        return [state for state in current if state is not None]

    def name_batch(self, batch: Sequence[DownloadJob]) -> str:
        """What an error says it was working on."""
        first, last = (self.settings.layout.shard(job.shard.number) for job in (batch[0], batch[-1]))
        return f"shard {first}" if first == last else f"shards {first} to {last}"

    def finish(self, states: Sequence[DownloadState]) -> DownloadSummary:
        """Write all failures, the files around a dataset, and the summary, which says that all is there."""
        layout = self.settings.layout
        ledgers = [(layout.shard(shard.number), layout.files(shard.number).ledger) for shard in self.plan.shards]
        write_failures(layout.own / FAILURES_FILE, ledgers)
        summary = summarise(layout, self.plan, states)
        if summary.rows != summary.left_out + summary.downloaded + sum(summary.failed.values()):
            raise InternalError(
                f"the counts of {layout.root} don't add up ({summary}): report this, and download into another folder"
            )
        if layout.format == "tfds":
            if not summary.downloaded:
                raise UserError(
                    f"not one of {self.plan.rows:,} rows gave an image ({counts_text(summary.failed)}; each is in "
                    f"{layout.own / FAILURES_FILE}): {remedy_after_download(next(iter(summary.failed)))}"
                )
            write_dataset(layout, self.plan, states)
        settings = settings_of(self.settings.output, self.where)
        write_json(layout.own / "download.json", {**summary.to_json(), "urls": self.urls, "settings": settings})
        remove(layout.own / RETRY_FILE)  # nothing is left to do of a retry
        return summary


def cut_batches(jobs: Sequence[DownloadJob], workers: int, engine: Engine) -> list[tuple[DownloadJob, ...]]:
    """Neighbouring shards together, few enough that all workers have something to do to the end."""
    most = BATCH_SHARDS if engine == "local" else BATCH_SHARDS_OF_CLUSTER
    least = min(OVERLAPPING, -(-len(jobs) // workers))
    length = min(most, max(least, len(jobs) // (workers * BATCHES_PER_WORKER)))
    return [tuple(jobs[start : start + length]) for start in range(0, len(jobs), length)]


def counts_before(jobs: Sequence[DownloadJob], states: Sequence[DownloadState | None]) -> Counter[str]:
    """The rows that are done already, images under `ok`, without those that are fetched again."""
    counts: Counter[str] = Counter()
    for state in states:
        if state is not None:
            counts.update(state.row_counts)
    for job in jobs:
        state = states[job.shard.number]
        if state is not None and job.retry is not None:
            counts.subtract({reason: number for reason, number in state.failed.items() if reason in job.retry})
    return +counts


# ---------------------------------------------------------------------------------------------------------------------
# Rows that failed, fetched again
# ---------------------------------------------------------------------------------------------------------------------


def parse_reasons(text: str, allow_private_hosts: bool = False) -> frozenset[str]:
    """Reasons separated by commas. Raises UserError for an unknown one, and for one that no retry changes.

    Where private hosts are allowed, the default takes their rows along: a run that forgot to allow them refused them.
    """
    if text == DEFAULT_RETRY and allow_private_hosts:
        return PASSING | {BLOCKED_ADDRESS}
    named = [part.strip().lower() for part in text.split(",") if part.strip()]
    for name in named:
        if name in NOT_RETRIED:
            raise UserError(f"--retry-failed={text}: rows can't be fetched again for {name}, {NOT_RETRIED[name]}")
    unknown = [name for name in named if name not in REASONS]
    if unknown or not named:
        what = f"unknown reason {unknown[0]!r}" if unknown else "no reason is named"
        raise UserError(f"{what} in --retry-failed={text}: choose among {', '.join(REASONS)}")
    return frozenset(named)


def begin_retry(own: Path, reasons: frozenset[str], states: Iterable[DownloadState | None]) -> int:
    """The number, from 1, of the retry that was killed, if it was one for the same reasons, or of the next."""
    path = own / RETRY_FILE
    latest = max((state.round for state in states if state is not None), default=0)
    if path.exists():
        before = read_json(path)
        if before.get("reasons") == sorted(reasons):
            return int(before["round"])
        latest = max(latest, int(before["round"]))
    write_json(path, {"round": latest + 1, "reasons": sorted(reasons)})
    return latest + 1


def retry_jobs(
    shards: Iterable[DownloadShard], states: Iterable[DownloadState | None], reasons: frozenset[str], round: int
) -> list[DownloadJob]:
    """The shards that a retry has not reached and that have rows for it."""
    return [
        DownloadJob(shard, reasons)
        for shard, state in zip(shards, states, strict=True)
        if state is not None and state.round < round and reasons & set(state.failed)
    ]
