"""The state of a fetch: a call with its rows, a row on its way, a row that has come to its end."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from clipkit.tfrecord_tools.web.settings import Fetched
from clipkit.tfrecord_tools.web.urls import WebUrl

Rows = Iterable[tuple[int, str]]
Handle = Callable[[Fetched], None]


@dataclass
class FetchStats:
    """What a Fetcher has done so far and is doing, for the line of progress. `reasons` counts ends, None successes."""

    bytes_in: int = 0
    requests: int = 0
    in_flight: int = 0
    concurrency: int = 0
    queued: int = 0
    handling: int = 0
    reasons: Counter[str | None] = field(default_factory=Counter)


@dataclass(eq=False)
class Job:
    """One call of fetch_many."""

    rows: Iterator[tuple[int, str]]
    handle: Handle
    done: asyncio.Future[None]
    tickets: set["Ticket"] = field(default_factory=set)
    handing: int = 0
    exhausted: bool = False
    failed: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, error: BaseException) -> None:
        """End with an error, unless it has ended."""
        self.failed = True
        if not self.done.done():
            self.done.set_exception(error)

    def check_end(self) -> None:
        """End when nothing is left to do."""
        if self.exhausted and not self.tickets and not self.handing and not self.done.done():
            self.done.set_result(None)
        if not self.handing:
            self.idle.set()


@dataclass(slots=True, eq=False)
class Ticket:
    """A row on its way. `spent` is its own time in seconds, the waits that it was told included."""

    job: Job
    index: int
    url: str
    at: WebUrl
    redirects: int = 0
    tries: int = 1
    rate_tries: int = 0
    spent: float = 0.0
    said: str = ""
    task: asyncio.Task[None] | None = None

    def note(self, said: str) -> None:
        """Remember what a party said about the use of the image, each thing once."""
        if said and said not in self.said:
            self.said = f"{self.said}; {said}" if self.said else said


@dataclass(slots=True)
class Handover:
    """A finished row for the threads."""

    job: Job
    fetched: Fetched
    reserved: int


def run_handler(handover: Handover) -> None:
    """In a thread: what the caller of fetch_many wants done."""
    if not handover.job.failed:
        handover.job.handle(handover.fetched)
