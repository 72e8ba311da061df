"""How a training run ends in good order: by Ctrl-C, a closed terminal, or the signals of a scheduler.

A signal asks for a stop after the step under way, since all ranks have to stop at the same step to save a checkpoint.
It ends an evaluation, as that can take longer than a scheduler waits, and a resumed run makes it again: at once, or
where several ranks share it, after the batches under way. A process that is the only one of its run also stops at once
where it waits for data, which may never come.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from clipkit.device import Device
from clipkit.train.loader.loader import Batch

# SIGUSR1 is what schedulers are asked to send some time before the end (SLURM: --signal=USR1@120).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


# How long a rank has, when its launcher was killed, to stop in good order: the others may be gone, and not answer.
ORPHAN_SECONDS = 120.0


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
    evaluating: bool = False

    @property
    def asked(self) -> bool:
        """Whether this process got a signal."""
        return self.signal is not None

    @contextlib.contextmanager
    def while_evaluating(self) -> Iterator[None]:
        """Leave the block by StopNowError when a signal comes, or has come; of several ranks, in `check`."""
        self.evaluating = True
        try:
            if self.asked and self.only_process:
                raise StopNowError
            yield
        finally:
            self.evaluating = False

    def check(self, device: Device) -> None:
        """Raise StopNowError on all ranks if one of them got a signal. All call this together."""
        if any(device.agree(self.asked)):
            raise StopNowError


class StopNowError(BaseException):
    """A signal came while data were waited for, or in an evaluation. Nothing in between is to catch it."""


@contextlib.contextmanager
def stop_on_signal(stop: Stop) -> Iterator[None]:
    """SIGNALS ask for a stop; a second Ctrl-C interrupts at once. Does nothing outside the main thread.

    A SIGHUP that is ignored stays so: `nohup` is there to outlive the terminal.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number
        if (stop.evaluating or stop.waiting) and stop.only_process:
            raise StopNowError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, ask) for number in SIGNALS if number not in ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with_launcher() -> None:
    """Where torchrun started this process: have it stop when torchrun is killed, which nothing else would tell it."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def until_stopped(stop: Stop, loader: Iterator[Batch]) -> Iterator[Batch]:
    """The loader's batches, up to a stop that is asked for while one is waited for. A batch that is lost by that hasn't
    been counted as seen.
    """
    while True:
        try:
            stop.waiting = True
            if stop.asked and stop.only_process:  # while evaluating or saving: data may stall as well then
                raise StopNowError
            batch = next(loader, None)
            stop.waiting = False
        except StopNowError:
            stop.waiting, stop.agreed = False, True
            return
        if batch is None:
            return
        yield batch
