"""How a training run ends in good order: by Ctrl-C, or by the SIGTERM of a scheduler.

A signal asks for a stop after the step under way, since all ranks have to stop at the same step to save a checkpoint.
A process that is the only one of its run may stop at once where it waits for data, which may never come.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from clipkit.train.loader.loader import Batch


@dataclass
class Stop:
    """Whether the run is to stop."""

    only_process: bool
    """Whether this is the only process of the run."""
    signal: int | None = None
    """The first signal that this process got."""
    agreed: bool = False
    """All processes are to stop now."""
    waiting: bool = False
    """This process waits for data."""

    @property
    def asked(self) -> bool:
        """Whether this process got a signal."""
        return self.signal is not None


class StopWaitingError(Exception):
    """A signal came while data were waited for."""


@contextlib.contextmanager
def stop_on_signal(stop: Stop) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask for a stop; a second Ctrl-C interrupts at once. Does nothing outside the main thread."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number
        if stop.waiting and stop.only_process:
            raise StopWaitingError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def until_stopped(stop: Stop, loader: Iterator[Batch]) -> Iterator[Batch]:
    """The loader's batches, up to a stop that is asked for while one is waited for. A batch that is lost by that hasn't
    been counted as seen.
    """
    while True:
        try:
            stop.waiting = True
            if stop.asked and stop.only_process:  # while evaluating or saving: data may stall as well then
                raise StopWaitingError
            batch = next(loader, None)
            stop.waiting = False
        except StopWaitingError:
            stop.waiting, stop.agreed = False, True
            return
        if batch is None:
            return
        yield batch
