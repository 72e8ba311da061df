"""A call of `Fetcher.fetch_many`: its rows on their way, and the threads that handle what came of them."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from clipkit.tfrecord_tools.web.settings import FetchOutcome
from clipkit.tfrecord_tools.web.urls import WebUrl

Rows = Iterable[tuple[int, str]]
Handle = Callable[[FetchOutcome], None]

MAX_WAITING = 128
MAX_WAITING_BYTES = 128 << 20


@dataclass(eq=False)
class Call:
    """One call of fetch_many. `handling` counts the rows that wait for a thread or are in one."""

    rows: Iterator[tuple[int, str]]
    handle: Handle
    done: asyncio.Future[None]
    pending: set["PendingRow"] = field(default_factory=set)
    handling: int = 0
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
        if self.exhausted and not self.pending and not self.handling and not self.done.done():
            self.done.set_result(None)
        if not self.handling:
            self.idle.set()


@dataclass(slots=True, eq=False)
class PendingRow:
    """A row on its way. `spent` is its own time in seconds, the waits that hosts asked for included."""

    call: Call
    index: int
    url: str
    at: WebUrl
    redirects: int = 0
    tries: int = 1
    rate_tries: int = 0
    spent: float = 0.0
    decision: str = ""
    task: asyncio.Task[None] | None = None

    def note(self, decision: str) -> None:
        """Remember what a party said about the use of the image, each thing once."""
        if decision and decision not in self.decision:
            self.decision = f"{self.decision}; {decision}" if self.decision else decision


class HandlerThreads:
    """Threads that call a call's `handle` for each outcome, and then `finished` in the event loop.

    Must be made inside a running event loop and closed there. `finished` gets the error that `handle` raised, or None.
    """

    def __init__(self, threads: int, finished: Callable[[Call, FetchOutcome, BaseException | None], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.finished = finished
        self.waiting = 0
        self.waiting_bytes = 0
        self.inbox: queue.SimpleQueue[tuple[Call, FetchOutcome, int] | None] = queue.SimpleQueue()
        self.outbox: deque[tuple[Call, FetchOutcome, int, BaseException | None]] = deque()
        self.is_collecting = False
        self.threads = [
            threading.Thread(target=self.run, name=f"handler {number}", daemon=True) for number in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    def has_room(self) -> bool:
        """Whether more should be fetched before the threads have caught up."""
        return self.waiting < MAX_WAITING and self.waiting_bytes < MAX_WAITING_BYTES

    def put(self, call: Call, outcome: FetchOutcome) -> None:
        """Hand over the outcome of a row."""
        size = 0 if outcome.body is None else len(outcome.body)
        self.waiting += 1
        self.waiting_bytes += size
        self.inbox.put((call, outcome, size))

    def run(self) -> None:
        """The life of a thread."""
        while (entry := self.inbox.get()) is not None:
            call, outcome, size = entry
            error = None
            try:
                if not call.failed:
                    call.handle(outcome)
            except BaseException as caught:
                error = caught
            self.outbox.append((call, outcome, size, error))
            del entry, call, outcome
            # One wake-up of the loop collects all that is finished by then: each costs a write to its socket.
            if not self.is_collecting:
                self.is_collecting = True
                self.loop.call_soon_threadsafe(self.collect)

    def collect(self) -> None:
        """Take back what the threads have finished."""
        self.is_collecting = False
        while self.outbox:
            call, outcome, size, error = self.outbox.popleft()
            self.waiting -= 1
            self.waiting_bytes -= size
            self.finished(call, outcome, error)

    async def close(self) -> None:
        """End the threads when they have finished what they have."""
        for _ in self.threads:
            self.inbox.put(None)
        for thread in self.threads:
            await asyncio.to_thread(thread.join)
        self.collect()
