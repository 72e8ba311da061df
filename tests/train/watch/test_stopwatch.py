"""Waiting for data is measured apart from work and pauses, and said with a remedy that fits its cause."""

import numpy as np
import pytest

from clipkit.train.loader.loader import Batch
from clipkit.train.watch import stopwatch as module
from clipkit.train.watch.stopwatch import Stopwatch, what_helps

IMAGES = {"read": 0.1, "image": 0.8, "text": 0.1}
TEXT = {"read": 0.1, "image": 0.3, "text": 0.6}


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def batch(**seconds: float) -> Batch:
    none = np.zeros(0, np.int64)
    return Batch(np.zeros(0, np.uint8), none, None, none, none.astype(np.uint64), none, seconds=seconds)


def test_waiting_is_told_from_work_and_pauses(clock: Clock) -> None:
    watch = Stopwatch()

    def loader():
        for _ in range(3):
            clock.now += 0.5
            yield batch(image=0.6, text=0.2)

    for _ in watch.time_waiting(loader()):
        clock.now += 1.0
        with watch.paused():
            clock.now += 50.0
    assert watch.seconds == pytest.approx(4.5)
    assert watch.waiting_share == pytest.approx(1 / 3)
    assert watch.phases == pytest.approx({"image": 1.8, "text": 0.6})
    # One worker computed 2.4 s of 4.5 s: more than half, so it is the workers that are too few or too slow.
    assert watch.note(watch.waiting_share, 1, enough=2) == "waits for data 33% (more --workers would help)"
    assert (
        watch.note(watch.waiting_share, 2, enough=2)
        == "waits for data 33% (another disk, or fewer processes beside, would help)"
    )
    watch.restart()
    clock.now += 1.0
    assert (watch.seconds, watch.waiting_share, watch.phases) == (1.0, 0.0, {})
    assert watch.note(watch.waiting_share, 1, enough=2) == "waits for data 0%"


@pytest.mark.parametrize(
    ("share", "busy", "phases", "workers", "says"),
    [
        (0.10, 0.9, IMAGES, 1, ""),
        (0.11, 0.9, IMAGES, 1, "more --workers"),
        (0.11, 0.9, IMAGES, 4, "a compact copy"),
        (0.11, 0.9, TEXT, 4, "build-tfds --precompute tokens,syntax"),
        (0.90, 0.2, IMAGES, 1, "another disk"),
        (0.90, 0.2, IMAGES, 4, "another disk"),
        (0.90, 0.9, {}, 4, "a compact copy"),
    ],
)
def test_what_would_help(share: float, busy: float, phases: dict[str, float], workers: int, says: str) -> None:
    found = what_helps(share, busy, phases, workers, enough=4, tagged=True)
    assert found.startswith(says)
    assert bool(found) == bool(says)


def test_stored_columns_help_where_words_are_tagged_alone() -> None:
    assert what_helps(0.5, 0.9, TEXT, 4, enough=4).startswith("a compact copy")
