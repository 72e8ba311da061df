"""The work of a download in its order: what is missing, what is tried again, what must be written anew, and the end."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from clipkit.errors import InternalError, UserError
from clipkit.jobs.run import Engine, run_jobs
from clipkit.jobs.worker import cores
from clipkit.storage.files import clear_leftovers, disk_errors, is_remote, read_json, remove, write_json
from clipkit.tfrecord_tools.account.ledger import FAILURES_FILE, LEDGER_FOLDER, write_failures
from clipkit.tfrecord_tools.account.replace_shard import recover
from clipkit.tfrecord_tools.account.shard_state import ShardState, is_whole, load_state
from clipkit.tfrecord_tools.download.finish import differs, kinds_of_all, was_changed, write_dataset
from clipkit.tfrecord_tools.download.plan import Plan, Shard, settings_of
from clipkit.tfrecord_tools.download.progress import counters, watch
from clipkit.tfrecord_tools.download.retry import begin_retry, end_retry, retry_jobs
from clipkit.tfrecord_tools.download.shard import ShardJob, Task
from clipkit.tfrecord_tools.download.summary import DownloadSummary, summarise
from clipkit.tfrecord_tools.reasons import remedy_after_download

T = TypeVar("T")
R = TypeVar("R")

# Shards of a run, at most: more overlap better, fewer lose less with a worker and, on a cluster, tell sooner.
RUN_SHARDS = 16
RUN_SHARDS_OF_CLUSTER = 4
RUNS_PER_WORKER = 4
OVERLAPPING = 4  # shards of a run, at least, so that one is fetched while another is written
STORE_THREADS = 16


@dataclass(frozen=True)
class Work:
    """A planned download. `workers` of None is all that a cluster can take; `urls` is what the user called the table.

    What it raises is what `download` does.
    """

    plan: Plan
    task: Task
    workers: int | None
    engine: Engine
    urls: str
    where: str | None

    def has_begun(self) -> bool:
        """Whether any shard is there."""
        folder = self.task.layout.own / LEDGER_FOLDER
        return folder.exists() and any(folder.iterdir())

    def run(self, again: frozenset[str] | None) -> DownloadSummary:
        """Fetch what is missing, and with `again` the rows that failed for one of these reasons; then account for all.

        Nothing is written when all is there.
        """
        layout = self.task.layout
        recover(layout)
        clear_leftovers(layout.root, layout.own, *(layout.own / each for each in (LEDGER_FOLDER, "shards", "input")))
        recorded = self.each(self.plan.shards, self.load)
        finished = self.is_finished()
        if finished and layout.format == "tfds" and was_changed(layout, recorded):
            return self.leave_changed(again)
        states = self.each(list(zip(self.plan.shards, recorded, strict=True)), self.check)
        missing = [ShardJob(shard) for shard, state in zip(self.plan.shards, states, strict=True) if state is None]
        todo, task = missing, self.task
        if again is not None:
            retry = begin_retry(layout.own, again, states)
            task = dataclasses.replace(task, round=retry.round)
            todo = missing + retry_jobs(self.plan.shards, states, retry)
        if not todo and finished:
            end_retry(layout.own)
            return summarise(layout, self.plan, self.complete(states))
        self.withdraw()
        self.fetch(todo, task, states)
        whole = self.reload(todo, states)
        if layout.format == "tfds":
            whole = self.widen(task, whole)
        return self.finish(whole)

    def widen(self, task: Task, states: Sequence[ShardState]) -> list[ShardState]:
        """Write those shards again whose columns have a narrower kind than in others; nothing is fetched for it."""
        kinds = kinds_of_all(states)
        pairs = zip(self.plan.shards, states, strict=True)
        narrow = [ShardJob(shard, frozenset()) for shard, state in pairs if differs(state, kinds)]
        self.fetch(narrow, dataclasses.replace(task, kinds=kinds), states)
        return self.reload(narrow, states)

    # -----------------------------------------------------------------------------------------------------------------
    # States
    # -----------------------------------------------------------------------------------------------------------------

    def each(self, items: Sequence[T], function: Callable[[T], R]) -> list[R]:
        """The function of each item, several at a time where each is a question to a store."""
        if not is_remote(self.task.layout.root):
            return [function(item) for item in items]
        with ThreadPoolExecutor(STORE_THREADS) as pool:
            return list(pool.map(function, items))

    def load(self, shard: Shard) -> ShardState | None:
        return load_state(self.task.layout.files(shard.number))

    def check(self, known: tuple[Shard, ShardState | None]) -> ShardState | None:
        shard, state = known
        return state if state is not None and is_whole(self.task.layout.files(shard.number), state) else None

    def reload(self, done: Sequence[ShardJob], states: Sequence[ShardState | None]) -> list[ShardState]:
        """The states with those of the shards that are done read anew."""
        shards = [job.shard for job in done]
        fresh = self.each(list(zip(shards, self.each(shards, self.load), strict=True)), self.check)
        known = dict(enumerate(states))
        known.update({shard.number: state for shard, state in zip(shards, fresh, strict=True)})
        return self.complete(list(known.values()))

    def complete(self, states: Sequence[ShardState | None]) -> list[ShardState]:
        """All states, none missing."""
        for number, state in enumerate(states):
            if state is None:
                name = self.task.layout.shard(number)
                raise InternalError(f"shard {name} is missing from {self.task.layout.root}: run the same command again")
        return [state for state in states if state is not None]

    def is_finished(self) -> bool:
        """Whether a run before has come to its end."""
        layout = self.task.layout
        lasts = [layout.own / "download.json", layout.own / FAILURES_FILE]
        lasts += [layout.root / "dataset_info.json"] if layout.format == "tfds" else []
        with disk_errors(layout.root):
            return all(path.exists() for path in lasts)

    def withdraw(self) -> None:
        """Take back what says that all is there, on which other stages rely."""
        for path in (self.task.layout.own / "download.json", self.task.layout.root / "dataset_info.json"):
            remove(path)

    def leave_changed(self, again: frozenset[str] | None) -> DownloadSummary:
        """A dataset from which records were removed since is left alone: they must not come back."""
        path = self.task.layout.own / "download.json"
        if again is not None:
            raise UserError(
                f"{self.task.layout.root} was changed since it was downloaded (clipkit purge?): nothing can be fetched "
                "into it any more; download the table into another folder, and purge that"
            )
        told = read_json(path)
        names = [field.name for field in dataclasses.fields(DownloadSummary) if field.name not in ("out", "probe")]
        return DownloadSummary(out=self.task.layout.root, **{name: told[name] for name in names})

    # -----------------------------------------------------------------------------------------------------------------
    # Fetching
    # -----------------------------------------------------------------------------------------------------------------

    def fetch(self, todo: Sequence[ShardJob], task: Task, states: Sequence[ShardState | None]) -> None:
        """Fetch shards, with a line of progress."""
        if not todo:
            return
        # Only here, so that what fetching imports stays out of this process.
        from clipkit.tfrecord_tools.download.worker import fetch_run

        runs = cut_runs(todo, self.workers or cores(), self.engine)
        with (
            counters(self.engine == "local") as folder,
            watch(self.plan.rows, counts_before(todo, states), folder) as line,
        ):
            work = run_jobs(
                partial(fetch_run, task=dataclasses.replace(task, counters=folder)),
                runs,
                workers=self.workers,
                describe=self.name_run,
                isolate=True,
                engine=self.engine,
            )
            for _, counts in work:
                line.finished(counts)

    def name_run(self, run: Sequence[ShardJob]) -> str:
        first, last = (self.task.layout.shard(job.shard.number) for job in (run[0], run[-1]))
        return f"shard {first}" if first == last else f"shards {first} to {last}"

    # -----------------------------------------------------------------------------------------------------------------
    # The end
    # -----------------------------------------------------------------------------------------------------------------

    def finish(self, states: Sequence[ShardState]) -> DownloadSummary:
        """Write all failures, the files around a dataset, and the summary, which says that all is there."""
        layout = self.task.layout
        ledgers = [(layout.shard(each.number), layout.files(each.number).ledger) for each in self.plan.shards]
        write_failures(layout.own / FAILURES_FILE, ledgers)
        summary = summarise(layout, self.plan, states)
        if summary.rows != summary.left_out + summary.downloaded + sum(summary.failed.values()):
            raise InternalError(
                f"the counts of {layout.root} don't add up ({summary}): report this, and download into another folder"
            )
        if layout.format == "tfds":
            if not summary.downloaded:
                why = ", ".join(f"{reason} {number:,}" for reason, number in summary.failed.items())
                raise UserError(
                    f"not one of {self.plan.rows:,} rows gave an image ({why}; each is in "
                    f"{layout.own / FAILURES_FILE}): {remedy_after_download(next(iter(summary.failed)))}"
                )
            write_dataset(layout, self.plan, states)
        told = {**summary.to_json(), "urls": self.urls, "settings": settings_of(self.task.output, self.where)}
        write_json(layout.own / "download.json", told)
        end_retry(layout.own)
        return summary


def cut_runs(todo: Sequence[ShardJob], workers: int, engine: Engine) -> list[tuple[ShardJob, ...]]:
    """Neighbouring shards together, few enough that all workers have something to do to the end."""
    most = RUN_SHARDS if engine == "local" else RUN_SHARDS_OF_CLUSTER
    least = min(OVERLAPPING, -(-len(todo) // workers))
    length = min(most, max(least, len(todo) // (workers * RUNS_PER_WORKER)))
    return [tuple(todo[start : start + length]) for start in range(0, len(todo), length)]


def counts_before(todo: Sequence[ShardJob], states: Sequence[ShardState | None]) -> Counter[str]:
    """The rows that are done already, images under `ok`, without those that are fetched again."""
    counts: Counter[str] = Counter()
    for state in states:
        if state is not None:
            counts.update({"ok": state.successes, **state.failed})
    for job in todo:
        state = states[job.shard.number]
        if state is not None and job.retry is not None:
            counts.subtract({reason: number for reason, number in state.failed.items() if reason in job.retry})
    return +counts
