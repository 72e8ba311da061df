"""A resumable pass over shards: what an earlier run finished is taken as it is, the rest is worked on, and all is told.

Build, ImageNet, in-place conversion, verify and purge are each a few such passes. A job is one shard's part of a pass,
as plain values; its function leaves a state beside what it wrote, by which the next run knows that it is finished.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from clipkit.formatting import counted
from clipkit.jobs.run import Engine, run_jobs
from clipkit.log import Progress

Job = TypeVar("Job")
State = TypeVar("State")

MEGABYTE, KILOBYTE = 1_000_000, 1000
FEW_BYTES = 10 * MEGABYTE  # below it the line counts kilobytes


@dataclass(frozen=True)
class PassProgress:
    """How far a pass is; what an earlier run finished counts as done.

    `done` and `total` are bytes where the jobs' sizes are known (`in_bytes`), else jobs. `counts` are what the states
    add up to, by name.
    """

    label: str
    done: int
    total: int
    in_bytes: bool
    jobs_done: int
    jobs_total: int
    counts: Mapping[str, int]

    def note(self) -> str:
        """What stands behind the rate: shards where bytes are counted, and every count that isn't zero."""
        shards = [f"{self.jobs_done:,}/{counted(self.jobs_total, 'shard')}"] if self.in_bytes else []
        counts = [
            (count, name.removesuffix("s") if count == 1 else name) for name, count in self.counts.items() if count
        ]
        return ", ".join([*shards, *(f"{count:,} {name}" for count, name in counts)])


@dataclass(frozen=True)
class Runner:
    """Where the passes of one command run; `tell`, where it is given, gets the progress instead of the progress line.

    `workers` and `engine` are those of `run_jobs`.
    """

    workers: int | None = 1
    engine: Engine = "local"
    tell: Callable[[PassProgress], None] | None = None

    def run(
        self,
        label: str,
        function: Callable[[Job], State],
        jobs: Sequence[Job],
        *,
        describe: Callable[[Job], str],
        size: Callable[[Job], int | None] = lambda job: None,
        finished: Callable[[Job], State | None] = lambda job: None,
        counts: Callable[[State], Mapping[str, int]] = lambda state: {},
        check: Callable[[Job, State], None] = lambda job, state: None,
    ) -> list[State]:
        """The states of all jobs, in their order: what `finished` finds of an earlier run, else what `function` gives.

        `size` is a job's bytes; the line counts jobs where one of them has none. `check` looks at each new state, and
        ends the pass by raising. All other errors are those of `run_jobs`; what is finished stays so.
        """
        states = {place: state for place, job in enumerate(jobs) if (state := finished(job)) is not None}
        missing = [place for place in range(len(jobs)) if place not in states]
        known = [size(job) for job in jobs]
        in_bytes = sum(each or 0 for each in known) > 0 and None not in known
        sizes = [each or 0 for each in known] if in_bytes else [1] * len(jobs)
        total, done = sum(sizes), sum(sizes[place] for place in states)
        sums: Counter[str] = Counter()
        for state in states.values():
            sums.update(counts(state))
        with ExitStack() as stack:
            tell = self.tell or stack.enter_context(_progress_line(label, total, in_bytes, done, not missing))
            tell(PassProgress(label, done, total, in_bytes, len(states), len(jobs), sums))
            ended = run_jobs(
                function,
                [jobs[place] for place in missing],
                workers=self.workers,
                engine=self.engine,
                describe=describe,
            )
            for index, state in ended:
                place = missing[index]
                check(jobs[place], state)
                states[place] = state
                done += sizes[place]
                sums.update(counts(state))
                tell(PassProgress(label, done, total, in_bytes, len(states), len(jobs), sums))
        return [states[place] for place in range(len(jobs))]


@contextmanager
def _progress_line(
    label: str, total: int, in_bytes: bool, done: int, quiet: bool
) -> Iterator[Callable[[PassProgress], None]]:
    unit, divisor = ("MB", MEGABYTE) if total >= FEW_BYTES else ("kB", KILOBYTE)
    if not in_bytes:
        unit, divisor = "shards", 1
    with Progress(label, total // divisor, unit, done // divisor, quiet) as line:
        yield lambda now: line.update(now.done // divisor, now.note())
