"""Jobs on the local machine's processes.

Each worker is a spawned process (no thread or lock of the parent is copied into it) and holds one item at a time. So
when a worker dies, it is known which item it held, which the pools of the standard library can't say; the item goes to
another worker.
"""

import contextlib
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any, Self, TypeVar

from clipkit.jobs.worker import STOP_SECONDS, Answer, Loss, answer

T = TypeVar("T")
R = TypeVar("R")


def run_here(function: Callable[[T], R], items: Sequence[T], describe: Callable[[T], str]) -> Iterator[tuple[int, R]]:
    """`run_jobs` in this process, one item after the other."""
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


class LocalWorkers:
    """At most so many processes, which live until no item is left for them."""

    def __init__(self, function: Callable[[T], R], workers: int) -> None:
        self.function, self.workers = function, workers
        self.busy: dict[_Worker, int] = {}  # with the index of the item that each works on
        self.idle: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def room(self) -> int:
        return self.workers

    def submit(self, index: int, item: Any) -> None:
        worker = self.idle.pop() if self.idle else _start(self.function)
        self.busy[worker] = index
        # A worker that is dead already is noticed where its answer is awaited.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.pipe.send(item)

    def wait(self) -> tuple[int, Answer | Loss]:
        _stop(self.idle)  # there was no item for them
        self.idle = []
        # A worker's end shows as a readable pipe too, unless a process of its own still holds the other end.
        ready = connection.wait([handle for worker in self.busy for handle in (worker.pipe, worker.process.sentinel)])
        worker = next(worker for worker in self.busy if worker.pipe in ready or worker.process.sentinel in ready)
        index, answered = self.busy.pop(worker), _receive(worker)
        if answered is not None:
            self.idle.append(worker)
            return index, answered
        loss = Loss(_reason(worker))
        _stop([worker])
        return index, loss

    def __exit__(self, *_: object) -> None:
        _stop([*self.busy, *self.idle])


def _start(function: Callable[[T], R]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    pipe, pipe_of_worker = context.Pipe()
    process = context.Process(target=_work, args=(function, pipe_of_worker), daemon=True)
    process.start()
    pipe_of_worker.close()
    return _Worker(process, pipe)


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
    # The terminal sends Ctrl-C to all of us; only the parent acts on it, by stopping the workers.
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
