"""One function over many shards, here on the local machine's processes.

Each worker is a process of its own start (spawned, so that no thread or lock of the parent is copied into it) and holds
one item at a time. That is why a worker that dies can be named together with the item it held, which the pools of the
standard library can't do.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from clipkit.errors import InternalError, UserError

T = TypeVar("T")
R = TypeVar("R")

# How long a worker that was asked to stop may take before it is killed.
STOP_SECONDS = 5.0


def run(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int | None = 1,
    describe: Callable[[T], str] = str,
    isolate: bool = False,
) -> Iterator[tuple[int, R]]:
    """Yield `(index of the item, function(item))` in the order in which the items finish.

    `workers` of None takes every core that this process may use. With 0 or 1 everything runs in this process, in
    order, unless `isolate` keeps `function` and what it imports out of it. Otherwise `function`, the items and the
    results are pickled, so `function` must be importable (`functools.partial` of such a one is fine).
    An exception of `function` keeps its type and gets a note that names the item through `describe`.
    Raises UserError when a worker dies, naming the item it held; what other items have finished stays finished.
    Leaving the loop early, Ctrl-C included, stops the workers.
    """
    workers = min(cores() if workers is None else max(workers, 1), len(items))
    if workers <= 1 and not isolate:
        return _run_here(function, items, describe)
    return _run_workers(function, items, workers, describe)


def cores() -> int:
    """How many cores this process may use: fewer than the machine has, in a container or under `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_here(function: Callable[[T], R], items: Sequence[T], describe: Callable[[T], str]) -> Iterator[tuple[int, R]]:
    for index, item in enumerate(items):
        try:
            result = function(item)
        except Exception as error:
            error.add_note(f"while working on {describe(item)}")
            raise
        yield index, result


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: "connection.Connection[Any, Any]"
    index: int


def _run_workers(
    function: Callable[[T], R], items: Sequence[T], workers: int, describe: Callable[[T], str]
) -> Iterator[tuple[int, R]]:
    context = multiprocessing.get_context("spawn")
    alive: list[_Worker] = []
    following = iter(range(len(items)))
    try:
        for index in (next(following) for _ in range(workers)):
            pipe, pipe_of_worker = context.Pipe()
            process = context.Process(target=_work, args=(function, pipe_of_worker), daemon=True)
            process.start()
            pipe_of_worker.close()
            alive.append(_Worker(process, pipe, index))
            _send(alive[-1], items[index], describe)
        while alive:
            # A worker's end shows as a readable pipe too, unless a process of its own still holds the other end.
            ready = connection.wait([handle for worker in alive for handle in (worker.pipe, worker.process.sentinel)])
            for worker in [w for w in alive if w.pipe in ready or w.process.sentinel in ready]:
                index = worker.index
                succeeded, result = _receive(worker, items[index], describe)
                if not succeeded:
                    result.add_note(f"while working on {describe(items[index])}")
                    raise result
                worker.index = next(following, -1)
                if worker.index >= 0:
                    _send(worker, items[worker.index], describe)
                else:
                    alive.remove(worker)
                    _stop([worker])
                yield index, result
    finally:
        _stop(alive)


def _send(worker: _Worker, item: T, describe: Callable[[T], str]) -> None:
    try:
        worker.pipe.send(item)
    except (BrokenPipeError, ConnectionResetError):
        raise _death(worker, item, describe) from None


def _receive(worker: _Worker, item: T, describe: Callable[[T], str]) -> tuple[bool, Any]:
    try:
        if not worker.pipe.poll():
            raise EOFError
        succeeded, pickled = worker.pipe.recv()
    except (EOFError, OSError, pickle.UnpicklingError):
        raise _death(worker, item, describe) from None
    return succeeded, pickle.loads(pickled)


def _death(worker: _Worker, item: T, describe: Callable[[T], str]) -> UserError:
    worker.process.join(STOP_SECONDS)
    code = worker.process.exitcode
    if code is None:
        reason = "it closed its pipe"
    elif code < 0:
        name = signal.Signals(-code).name
        reason = f"{name}; often the machine is short of memory" if name == "SIGKILL" else name
    else:
        reason = f"exit code {code}"
    return UserError(
        f"a worker died while working on {describe(item)} ({reason}): "
        "run the same command again to go on, with fewer workers if memory is short"
    )


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
    """Answer items with `(succeeded, pickled result or exception)` until the parent closes the pipe."""
    # The terminal sends Ctrl-C to all of us; the parent alone answers it, by stopping the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            item = pipe.recv()
            try:
                answer = (True, pickle.dumps(function(item)))
            except Exception as error:
                answer = (False, _pickle_exception(error))
            pipe.send(answer)


def _end_with_parent() -> None:
    """A killed parent can't stop its workers, and one that works on would meet the next run's on the same files."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def _pickle_exception(error: Exception) -> bytes:
    if not isinstance(error, UserError):
        error.add_note("in the worker:\n" + "".join(traceback.format_exception(error)).rstrip())
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        # Not every exception survives the way back (one that wants two arguments, or holds an open file).
        replacement = InternalError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", []):
            replacement.add_note(note)
        return pickle.dumps(replacement)
    return pickled
