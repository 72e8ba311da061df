"""Threads that work on what was fetched, beside the event loop that fetches, with a bound on what waits for them."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Work = TypeVar("Work")

MAX_WAITING = 128
MAX_WAITING_BYTES = 128 << 20


class Handlers(Generic[Work]):
    """Calls `work` for what is put in, from `threads` threads, and then `finished` in the event loop.

    Must be made inside a running event loop and closed there. `finished` gets the error that `work` raised, or None.
    """

    def __init__(
        self, threads: int, work: Callable[[Work], None], finished: Callable[[Work, BaseException | None], None]
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.work = work
        self.finished = finished
        self.waiting = 0
        self.waiting_bytes = 0
        self.inbox: queue.SimpleQueue[tuple[Work, int] | None] = queue.SimpleQueue()
        self.outbox: deque[tuple[Work, int, BaseException | None]] = deque()
        self.is_called = False
        self.threads = [
            threading.Thread(target=self.run, name=f"handler {number}", daemon=True) for number in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    def has_room(self) -> bool:
        """Whether more should be fetched before the threads have caught up."""
        return self.waiting < MAX_WAITING and self.waiting_bytes < MAX_WAITING_BYTES

    def put(self, work: Work, size: int) -> None:
        """Hand over something that holds `size` bytes."""
        self.waiting += 1
        self.waiting_bytes += size
        self.inbox.put((work, size))

    def run(self) -> None:
        """The life of a thread."""
        while (entry := self.inbox.get()) is not None:
            work, size = entry
            error = None
            try:
                self.work(work)
            except BaseException as caught:
                error = caught
            self.outbox.append((work, size, error))
            del entry, work
            # One call wakes the loop for all that is finished by then: a call an image would cost a write each.
            if not self.is_called:
                self.is_called = True
                self.loop.call_soon_threadsafe(self.collect)

    def collect(self) -> None:
        """Take back what the threads have finished."""
        self.is_called = False
        while self.outbox:
            work, size, error = self.outbox.popleft()
            self.waiting -= 1
            self.waiting_bytes -= size
            self.finished(work, error)

    async def close(self) -> None:
        """End the threads when they have finished what they have."""
        for _ in self.threads:
            self.inbox.put(None)
        for thread in self.threads:
            await asyncio.to_thread(thread.join)
        self.collect()
