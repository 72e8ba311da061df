"""Times the stretches between log lines, and says what would help where the device waits for data."""

import contextlib
import time
from collections.abc import Iterator

from clipkit.device import Device
from clipkit.train.loader.loader import Batch

# Waiting more than this share of the time is worth a word.
MUCH_WAITING = 0.1
# Workers that compute less than this share of their time wait for something themselves.
BUSY = 0.5


class Stopwatch:
    """Times an interval between two log lines, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def time_waiting(self, loader: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on, adding up the time that each took to come and the work that is in it."""
        while True:
            began = time.monotonic()
            batch = next(loader, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            for phase, seconds in batch.seconds.items():
                self.phases[phase] = self.phases.get(phase, 0.0) + seconds
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the interval what isn't training."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

    def restart(self) -> None:
        """Begin the next interval now."""
        self.started, self.waited = time.monotonic(), 0.0
        self.phases: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """The interval's length so far."""
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def waiting_share(self) -> float:
        """Between 0, the device never waited, and 1."""
        return min(1.0, self.waited / self.seconds)

    def waiting_shares(self, device: Device) -> dict[str, float]:
        """The share of waiting over all ranks, for the metrics: the mean, and the most, which the others wait for."""
        shares = device.gather(self.waiting_share)
        return {"data_wait": sum(shares) / len(shares), "data_wait_max": max(shares)}

    def note(self, share: float, workers: int, enough: int, tagged: bool = False) -> str:
        """A share of waiting for the progress line, with what would help; `enough` workers leave no core idle."""
        busy = sum(self.phases.values()) / (max(1, workers) * self.seconds)
        what = what_helps(share, busy, self.phases, workers, enough, tagged)
        return f"waits for data {share:.0%}" + (f" ({what} would help)" if what else "")


def what_helps(
    share: float, busy: float, phases: dict[str, float], workers: int, enough: int, tagged: bool = False
) -> str:
    """What to change when the device waits for data `share` of its time; "" when that is little.

    `busy` is the share of their time in which the workers computed, `phases` their processor seconds by phase, and
    `enough` the number of workers beyond which there is no core for another. `tagged` says that captions' words are
    tagged, for the syntax way of reducing them, and that a dataset can hold the outcome.
    """
    if share <= MUCH_WAITING:
        return ""
    if busy < BUSY:
        return "another disk, or fewer processes beside,"
    if workers < enough:
        return "more --workers"
    if tagged and phases and max(phases, key=lambda phase: phases[phase]) == "text":
        return "build-tfds --precompute tokens,syntax"
    return "a compact copy by build-tfds --resize"
