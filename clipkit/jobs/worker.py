"""What every engine does around one item: run it in a worker, send its answer back, and name it when it fails."""

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from clipkit.errors import InternalError, UserError, one_line

T = TypeVar("T")
R = TypeVar("R")

# How long work that was asked to stop may take before it is killed.
STOP_SECONDS = 5.0

Answer = tuple[bool, bytes]  # whether it succeeded, and the pickled result or exception


@dataclass(frozen=True)
class Loss:
    """Why an item's worker was lost, and how many workers the engine itself gave the item to."""

    reason: str
    times: int = 1


class Workers(Protocol):
    """An engine at work, as `run_jobs` needs it."""

    def room(self) -> int:
        """How many items may be handed in at once; it may change."""

    def submit(self, index: int, item: Any) -> None:
        """Hand an item in."""

    def wait(self) -> tuple[int, Answer | Loss]:
        """Wait until an item has finished or its worker is lost. Raises UserError when the engine itself fails."""


def cores() -> int:
    """How many cores this process may use: fewer than the machine has, in a container or under `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def answer(function: Callable[[T], R], item: T) -> Answer:
    """`function(item)`, or its exception, as something that any process can send."""
    try:
        return True, pickle.dumps(function(item))
    except Exception as error:
        return False, _pickle_exception(error)


def pack(function: Callable[[T], R], dumps: Callable[[Any], bytes]) -> bytes:
    """`function` for `answer_packed` on another machine. `dumps` is an engine's own, which takes more than pickle's."""
    # Two pickles in one: the paths must be known before the function's module is looked for.
    return pickle.dumps((sys.path, dumps(function)))


def answer_packed(packed: bytes, item: bytes) -> Answer:
    """`answer` in a worker that knows nothing but that clipkit is installed."""
    try:
        paths, function = pickle.loads(packed)
        sys.path.extend(path for path in paths if path not in sys.path)
        work, argument = pickle.loads(function), pickle.loads(item)
    except (ImportError, AttributeError) as error:
        return False, _pickle_exception(unlike_driver(socket.gethostname(), error))
    return answer(work, argument)


def unlike_driver(machine: str, error: Exception) -> UserError:
    """The error of a worker whose environment differs from the driver's."""
    return UserError(
        f"a worker on {machine} can't load the work ({one_line(error)[:300]}): every machine of the "
        "cluster needs clipkit and its extras in the same versions"
    )


def result_of(answered: Answer, name: str) -> Any:
    """The result in an answer. Raises what the worker raised, with a note that says on which item."""
    succeeded, pickled = answered
    result = pickle.loads(pickled)
    if succeeded:
        return result
    result.add_note(f"while working on {name}")
    raise result


def worker_died(name: str, reason: str, times: int) -> UserError:
    """The error of an item whose workers died `times` times."""
    often = f" {times} times" if times > 1 else ""
    return UserError(
        f"a worker died{often} while working on {name} ({reason}): "
        "run the same command again to go on, with fewer workers if memory is short"
    )


@contextlib.contextmanager
def keep_signals() -> Iterator[None]:
    """Leave Ctrl-C and SIGTERM as they are: engines put handlers of their own in place when they start."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def missing_package(engine: str, error: ImportError) -> UserError:
    """The error of an engine that isn't installed."""
    return UserError(f"--engine {engine} needs a package that is missing ({error}): pip install 'clipkit[{engine}]'")


def _pickle_exception(error: Exception) -> bytes:
    if not isinstance(error, UserError):
        error.add_note("in the worker:\n" + "".join(traceback.format_exception(error)).rstrip())
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        # Not every exception can be unpickled (one that takes two arguments, or holds an open file).
        replacement = InternalError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", []):
            replacement.add_note(note)
        return pickle.dumps(replacement)
    return pickled
