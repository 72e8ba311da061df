"""Jobs on the local machine's processes.

Each worker is a process of its own start (spawned, so that no thread or lock of the parent is copied into it) and holds
one item at a time. That is why a worker that dies can be told together with the item it held, which the pools of the
standard library can't do; the item goes to a new worker.
"""

import contextlib
import multiprocessing
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from clipkit.jobs.worker import STOP_SECONDS, Answer, answer, death, result_of

T = TypeVar("T")
R = TypeVar("R")


def run_here(function: Callable[[T], R], items: Sequence[T], describe: Callable[[T], str]) -> Iterator[tuple[int, R]]:
    """`run_jobs` in this process, in order."""
    for index, item in enumerate(items):
        try:
            result = function(item)
        except Exception as error:
            error.add_note(f"while working on {describe(item)}")
            raise
        yield index, result


@dataclass(frozen=True, eq=False)
class _Worker:
    process: SpawnProcess
    pipe: "connection.Connection[Any, Any]"


def run_workers(
    function: Callable[[T], R], items: Sequence[T], workers: int, describe: Callable[[T], str], attempts: int
) -> Iterator[tuple[int, R]]:
    """`run_jobs` on at most `workers` processes."""
    holding: dict[_Worker, int] = {}  # the index of the item that each worker works on
    following = iter(range(len(items)))
    deaths: Counter[int] = Counter()
    again: list[int] = []  # items whose workers died
    try:
        while True:
            while len(holding) < workers and (index := again.pop() if again else next(following, -1)) >= 0:
                holding[_start(function, items[index])] = index
            if not holding:
                return
            # A worker's end shows as a readable pipe too, unless a process of its own still holds the other end.
            ready = connection.wait([handle for worker in holding for handle in (worker.pipe, worker.process.sentinel)])
            for worker in [w for w in holding if w.pipe in ready or w.process.sentinel in ready]:
                index = holding.pop(worker)
                answered = _receive(worker)
                if answered is None:
                    reason = _reason(worker)
                    _stop([worker])
                    deaths[index] += 1
                    if deaths[index] >= attempts:
                        raise death(describe(items[index]), reason, deaths[index])
                    again.append(index)
                    continue
                holding[worker] = index  # so that it is stopped when the item has failed
                result = result_of(answered, describe(items[index]))
                del holding[worker]
                coming = again.pop() if again else next(following, -1)
                if coming >= 0:
                    holding[worker] = coming
                    _send(worker, items[coming])
                else:
                    _stop([worker])
                yield index, result
    finally:
        _stop(list(holding))


def _start(function: Callable[[T], R], item: T) -> _Worker:
    context = multiprocessing.get_context("spawn")
    pipe, pipe_of_worker = context.Pipe()
    process = context.Process(target=_work, args=(function, pipe_of_worker), daemon=True)
    process.start()
    pipe_of_worker.close()
    worker = _Worker(process, pipe)
    _send(worker, item)
    return worker


def _send(worker: _Worker, item: T) -> None:
    # A worker that is dead already is met again where its answer is awaited.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.pipe.send(item)


def _receive(worker: _Worker) -> Answer | None:
    """The answer, or None when the worker is dead."""
    try:
        answered: Answer | None = worker.pipe.recv() if worker.pipe.poll() else None
    except (EOFError, OSError, pickle.UnpicklingError):
        return None
    return answered


def _reason(worker: _Worker) -> str:
    worker.process.join(STOP_SECONDS)
    code = worker.process.exitcode
    if code is None:
        return "it closed its pipe"
    if code < 0:
        name = signal.Signals(-code).name
        return f"{name}; often the machine is short of memory" if name == "SIGKILL" else name
    return f"exit code {code}"


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(STOP_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()


def _work(function: Callable[[T], R], pipe: "connection.Connection[Any, Any]") -> None:
    """Answer items until the parent closes the pipe."""
    # The terminal sends Ctrl-C to all of us; the parent alone answers it, by stopping the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(answer(function, pipe.recv()))


def _end_with_parent() -> None:
    """A killed parent can't stop its workers, and one that works on would meet the next run's on the same files."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
