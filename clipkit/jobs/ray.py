"""Jobs on Ray (https://docs.ray.io): on the cluster that the user has, or on one started for this run alone.

A cluster is joined when this process is connected already, when RAY_ADDRESS names one (`ray job submit` sets it), or
when `ray start` has begun one on this machine. One of our own takes connections with a token alone (Ray's default), has
no dashboard, and ends with this process, however that ends. Usage statistics are never sent.

Each item is one task of one CPU. Only as many are handed in as the cluster can take, because a million shards would be
a million objects in the driver. Ray's own repetition is off: it would be without bound where memory is short, and an
item is counted here as on the other engines.
"""

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from clipkit.errors import UserError
from clipkit.jobs.worker import STOP_SECONDS, Answer, answer_packed, cores, death, kept_signals, pack, result_of, unlike

T = TypeVar("T")
R = TypeVar("R")

REMEDY = (
    "check RAY_ADDRESS (HOST:PORT) and that the cluster runs the same Ray and Python, or set RAY_ADDRESS=local for one "
    "on this machine"
)
CONNECT_SECONDS = 10.0
LOOK_SECONDS = 10.0  # how often the cluster is asked for its size, which an autoscaler changes


def run_on_ray(
    function: Callable[[T], R],
    items: Sequence[T],
    workers: int | None,
    describe: Callable[[T], str],
    attempts: int,
) -> Iterator[tuple[int, R]]:
    """`run_jobs` on Ray. With `workers` of None two items for each CPU are handed in, so that none waits for us."""
    ray = _import_ray()
    if not items:
        return
    with _cluster(ray, workers):
        dumps = ray.cloudpickle.dumps
        task = ray.remote(answer_packed).options(max_retries=0, num_cpus=1)
        packed = pack(function, dumps)
        following = iter(range(len(items)))
        deaths: Counter[int] = Counter()
        again: list[int] = []  # items whose workers were lost
        pending: dict[Any, int] = {}
        finished: tuple[int, Answer] | None = None
        looked, window = -LOOK_SECONDS, 1
        try:
            while True:
                if time.monotonic() - looked >= LOOK_SECONDS:
                    looked, window = time.monotonic(), workers or _twice_the_cpus(ray)
                while len(pending) < window and (index := again.pop() if again else next(following, -1)) >= 0:
                    pending[task.remote(packed, dumps(items[index]))] = index
                if finished is not None:  # now that the next item is on its way
                    index, answered = finished
                    finished = None
                    yield index, result_of(answered, describe(items[index]))
                    continue
                if not pending:
                    return
                (reference, *_), _ = ray.wait(list(pending), num_returns=1)
                index = pending.pop(reference)
                outcome = _answer(ray, reference)
                if isinstance(outcome, str):
                    deaths[index] += 1
                    if deaths[index] >= attempts:
                        raise death(describe(items[index]), outcome, deaths[index])
                    again.append(index)
                else:
                    finished = index, outcome
        finally:
            _cancel(ray, list(pending))


def _import_ray() -> Any:
    # Read when ray is imported, by it and by the processes that it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"--engine ray needs a package that is missing ({error}): pip install 'clipkit[ray]'"
        ) from error
    return ray


@contextlib.contextmanager
def _cluster(ray: Any, workers: int | None) -> Iterator[None]:
    """Be connected to a cluster while the block runs."""
    from ray._private import worker as driver

    own = not ray.is_initialized()
    if own:
        connect(ray, workers)
    # Ray prints each lost worker to stdout, where results go.
    printing, driver._worker_logs_enabled = driver._worker_logs_enabled, False
    try:
        yield
    finally:
        if own:
            ray.shutdown()
        driver._worker_logs_enabled = printing


def connect(ray: Any, workers: int | None) -> None:
    """Join the user's cluster, or start one of `workers` CPUs. Raises UserError when that fails."""
    address = os.environ.get("RAY_ADDRESS") or _running_here() or "local"
    if address not in ("local", "auto") and "://" not in address and not _answers(address):
        # Ray itself would try for a quarter of an hour.
        raise UserError(f"nothing answers at the Ray cluster's address {address}: {REMEDY}")
    own = {"num_cpus": workers or cores(), "include_dashboard": False} if address == "local" else {}
    try:
        with kept_signals():
            ray.init(address=address, log_to_driver=False, logging_level="CRITICAL", **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(f"can't join the Ray cluster at {address} ({_short(error)}): {REMEDY}") from error


def _running_here() -> str | None:
    """The address that `ray start` left on this machine, when something still answers there."""
    from ray._private.utils import read_ray_address

    address: str | None = read_ray_address()
    return address if address and _answers(address) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def _twice_the_cpus(ray: Any) -> int:
    return max(1, round(2 * ray.cluster_resources().get("CPU", 0)))


def _answer(ray: Any, reference: Any) -> Answer | str:
    """The answer of a task, or why its worker was lost."""
    try:
        answered: Answer = ray.get(reference)
    except ray.exceptions.OutOfMemoryError:
        return "the machine was short of memory"
    except ray.exceptions.WorkerCrashedError:
        return "its process ended; often the machine is short of memory"
    except (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError):
        return "its machine was lost"
    except ray.exceptions.LocalRayletDiedError as error:
        return _short(error)
    except ray.exceptions.RayTaskError as error:
        # Whatever the function raises comes as an answer, so it was not even begun.
        raise unlike("the Ray cluster", error.cause if isinstance(error.cause, Exception) else error) from error
    except ray.exceptions.RayError as error:
        raise UserError(f"the Ray cluster failed ({_short(error)}): run the same command again to go on") from error
    return answered


def _cancel(ray: Any, pending: list[Any]) -> None:
    """Kill what still runs, and see it end: a next run may write the same files."""
    with contextlib.suppress(Exception):
        for reference in pending:
            ray.cancel(reference, force=True)
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=STOP_SECONDS)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
