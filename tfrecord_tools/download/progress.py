"""One line while a download runs: how far it is within its shards too, how fast, and what goes wrong.

Workers of this machine count in a small file each, mapped into memory, and the line is drawn from all of them twice a
second. That costs a worker nothing, and one that dies takes no lock with it. On Ray and Spark, whose workers may be on
other machines, the line moves when a batch of shards is finished.
"""

import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipkit.log import Progress
from clipkit.storage.stores import scratch
from clipkit.tfrecord_tools.reasons import EMPTY_CAPTION, OTHER, PURGED, REASONS

OK = "ok"
NAMES = (OK, *REASONS, EMPTY_CAPTION, PURGED)
PLACES = {name: place for place, name in enumerate(NAMES)}
BYTES, REQUESTS = len(NAMES), len(NAMES) + 1
DRAW_SECONDS = 0.5
WINDOW_SECONDS = 10.0  # over which rates are taken
TOP_ERRORS = 3

Counts = npt.NDArray[np.int64]


def no_counts() -> Counts:
    """int64[reasons + 5]: rows by what became of them, bytes received, requests that may be under way."""
    return np.zeros(len(NAMES) + 2, np.int64)


class LiveCounts:
    """A worker's own counts, in a file that `DownloadLine` reads; without a folder they go nowhere."""

    def __init__(self, folder: str | None) -> None:
        """The counts go on where an earlier one of this process stopped."""
        self.lock = threading.Lock()
        self.values = no_counts()
        if folder is not None:
            path = Path(folder) / str(os.getpid())
            self.values = np.memmap(path, np.int64, "r+" if path.exists() else "w+", shape=self.values.shape)

    def add_refused(self, reasons: Iterable[str | None]) -> None:
        """Count rows that failed without being fetched."""
        with self.lock:
            for reason in reasons:
                self.values[PLACES.get(reason or OK, PLACES[OTHER])] += 1

    def add(self, reason: str | None, bytes_in: int, requests: int) -> None:
        """Count a row: its reason to fail, None for an image. The other two are those of the fetcher by now."""
        with self.lock:
            self.values[PLACES.get(reason or OK, PLACES[OTHER])] += 1
            self.values[BYTES], self.values[REQUESTS] = bytes_in, requests


def read_counts(folder: str) -> Counts:
    """The counts of all workers together."""
    total = no_counts()
    for path in Path(folder).iterdir():
        with contextlib.suppress(OSError):
            values = np.fromfile(path, np.int64)
            if values.shape == total.shape:
                total += values
    return total


class DownloadLine:
    """Draws the line. `before` counts the rows that an earlier run has done, images under `ok`."""

    def __init__(self, line: Progress, before: Counter[str], folder: str | None) -> None:
        self.line, self.folder = line, folder
        self.before = Counter(before)
        self.before_run = Counter(before)
        self.window: deque[tuple[float, int, int]] = deque()

    def finished(self, counts: Counter[str]) -> None:
        """A batch of shards is done; where workers count by themselves that is known already."""
        if self.folder is None:
            self.before.update(counts)
            self.draw()

    def draw(self, closing: bool = False) -> None:
        """Bring the line up to date; at the end the rates are those of the whole run."""
        live = read_counts(self.folder) if self.folder is not None else no_counts()
        counts = Counter(self.before)
        counts.update({name: int(live[place]) for name, place in PLACES.items()})
        now, received = time.monotonic(), int(live[BYTES])
        if closing:
            self.window = deque([(self.line.started, self.before_run[OK], 0)])
        self.window.append((now, counts[OK], received))
        while len(self.window) > 2 and now - self.window[0][0] > WINDOW_SECONDS:
            self.window.popleft()
        done = counts.total()
        if self.line.total is not None:
            done = min(done, self.line.total)  # a row of a lost worker is counted twice
        self.line.update(done, note(counts, self.rates(), int(live[REQUESTS])))

    def rates(self) -> tuple[float, float]:
        """Images and megabytes a second of late."""
        (began, images, received), (now, images_now, received_now) = self.window[0], self.window[-1]
        seconds = max(now - began, 1e-9)
        if now == began:
            return 0.0, 0.0
        return (images_now - images) / seconds, (received_now - received) / seconds / 1e6


def note(counts: Counter[str], rates: tuple[float, float], requests: int) -> str:
    """What stands behind the count of rows."""
    if not counts.total():
        return "waiting for the first answers"
    parts = [f"{rates[0]:,.0f} images/s"]
    if requests:
        parts += [f"{rates[1]:,.1f} MB/s", f"{requests:,} at once"]
    parts.append(f"{counts[OK] / counts.total():.1%} ok")
    errors = [f"{reason} {number:,}" for reason, number in counts.most_common() if reason != OK and number]
    return ", ".join([*parts, *errors[:TOP_ERRORS]])


@contextlib.contextmanager
def watch(rows: int, before: Counter[str], live: bool) -> Iterator[DownloadLine]:
    """Show the line while the block runs; with `live` workers count in its folder."""
    with contextlib.ExitStack() as stack:
        folder = None
        if live:
            folder = str(stack.enter_context(scratch()))
        progress = stack.enter_context(Progress("download", rows, "rows", start=before.total(), rate=False))
        line = DownloadLine(progress, before, folder)
        ended = threading.Event()

        def draw() -> None:
            while not ended.wait(DRAW_SECONDS):
                line.draw()

        thread = threading.Thread(target=draw, name="progress", daemon=True)
        if live:
            thread.start()
        try:
            yield line
        finally:
            ended.set()
            if live:
                thread.join()
            line.draw(closing=True)
