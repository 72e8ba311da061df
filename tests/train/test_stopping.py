"""A run that is told to stop does so between steps, or at once where it waits for data alone."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from clipkit.device import pick
from clipkit.train.stopping import SIGNALS, Stop, StopNowError, stop_on_signal, until_stopped


def endless(stalls: bool) -> Iterator[Any]:
    """Two batches, then more of them, or nothing for a minute."""
    yield from "ab"
    if stalls:
        time.sleep(60)
    yield from "cdefg"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_wait_for_data(number: int) -> None:
    stop = Stop(only_process=True)
    began = time.monotonic()
    with stop_on_signal(stop):
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        assert list(until_stopped(stop, endless(stalls=True))) == ["a", "b"]
    assert (stop.signal, stop.agreed, stop.waiting) == (number, True, False)
    assert time.monotonic() - began < 30


def test_a_signal_between_two_batches_is_heeded_before_data_are_waited_for() -> None:
    stop, taken = Stop(only_process=True), []
    with stop_on_signal(stop):
        for batch in until_stopped(stop, endless(stalls=True)):
            taken.append(batch)
            if batch == "b":  # say during an evaluation
                os.kill(os.getpid(), signal.SIGTERM)
    assert (taken, stop.agreed) == (["a", "b"], True)


def test_several_processes_stop_only_together() -> None:
    stop, taken = Stop(only_process=False), []
    with stop_on_signal(stop):
        for batch in until_stopped(stop, endless(stalls=False)):
            taken.append(batch)
            if batch == "b":
                os.kill(os.getpid(), signal.SIGTERM)
    assert "".join(taken) == "abcdefg"
    assert stop.asked and not stop.agreed


def test_a_second_ctrl_c_interrupts_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = Stop(only_process=True)
    with pytest.raises(KeyboardInterrupt), stop_on_signal(stop):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_is_handled_outside_the_main_thread() -> None:
    seen = []

    def run() -> None:
        with stop_on_signal(Stop(only_process=True)):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_an_evaluation(number: int) -> None:
    stop = Stop(only_process=True)
    began = time.monotonic()
    with stop_on_signal(stop):
        with pytest.raises(StopNowError), stop.while_evaluating():
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            time.sleep(60)
        with pytest.raises(StopNowError), stop.while_evaluating():
            raise AssertionError("no other evaluation begins")
    assert (stop.signal, stop.evaluating) == (number, False)
    assert time.monotonic() - began < 30


def test_one_of_several_ranks_leaves_an_evaluation_with_the_others() -> None:
    stop, device = Stop(only_process=False), pick("cpu")
    with stop_on_signal(stop), pytest.raises(StopNowError), stop.while_evaluating():
        stop.check(device)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.asked
        stop.check(device)
        raise AssertionError("the next batch isn't begun")


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop(only_process=True)
        with stop_on_signal(stop):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
