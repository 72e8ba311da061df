"""Jobs on Ray (https://docs.ray.io): on the cluster that the user has, or on one started for this run only.

A cluster is joined when this process is connected already, when RAY_ADDRESS names one (`ray job submit` sets it), or
when `ray start` has started one on this machine. A cluster of our own takes connections only with a token (Ray's
default), has no dashboard, and ends with this process, however that ends. Usage statistics are never sent.

Each item is one task of one CPU, and of one GPU where that is asked for and the cluster has any. Only as many are
handed in as the cluster can take, because a million shards would be a million objects in the driver. Ray's own retries
are off: where memory is short they have no bound, and an item's attempts are counted by `run_jobs`, as on the other
engines.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from clipkit.errors import UserError, one_line
from clipkit.jobs import worker
from clipkit.jobs.worker import Answer, Loss

T = TypeVar("T")
R = TypeVar("R")

REMEDY = (
    "check RAY_ADDRESS (HOST:PORT) and that the cluster runs the same Ray and Python, or set RAY_ADDRESS=local for one "
    "on this machine"
)
CONNECT_SECONDS = 10.0
RESIZE_SECONDS = 10.0  # how often the cluster is asked for its size, which an autoscaler changes


class RayWorkers:
    """A cluster's workers. With `workers` of None two items for each CPU are handed in, so that no worker waits."""

    def __init__(self, function: Callable[[T], R], workers: int | None, gpu: bool = False) -> None:
        self.function, self.workers, self.gpu = function, workers, gpu
        self.pending: dict[Any, int] = {}  # the index of each task's item
        self.size, self.asked = 1, -RESIZE_SECONDS

    def __enter__(self) -> Self:
        # Read when ray is imported, by it and by the processes that it starts.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise worker.missing_package("ray", error) from error
        self.ray: Any = ray
        self.packed = worker.pack(self.function, self.ray.cloudpickle.dumps)
        self.connected = ray.is_initialized()
        if not self.connected:
            connect(ray, self.workers)
        self.gpu = self.gpu and bool(self.ray.cluster_resources().get("GPU"))
        options = {"max_retries": 0, "num_cpus": 1, "num_gpus": int(self.gpu)}
        self.task = self.ray.remote(worker.answer_packed).options(**options)
        return self

    def room(self) -> int:
        if self.workers:
            return self.workers
        if time.monotonic() - self.asked >= RESIZE_SECONDS:
            self.size = max(1, round(2 * self.ray.cluster_resources().get("GPU" if self.gpu else "CPU", 0)))
            self.asked = time.monotonic()
        return self.size

    def submit(self, index: int, item: Any) -> None:
        self.pending[self.task.remote(self.packed, self.ray.cloudpickle.dumps(item))] = index

    def wait(self) -> tuple[int, Answer | Loss]:
        # Ray prints each lost worker to stdout, where results go.
        with contextlib.redirect_stdout(sys.stderr):
            (reference, *_), _ = self.ray.wait(list(self.pending), num_returns=1)
            return self.pending.pop(reference), self._outcome(reference)

    def _outcome(self, reference: Any) -> Answer | Loss:
        errors = self.ray.exceptions
        try:
            answered: Answer = self.ray.get(reference)
        except errors.OutOfMemoryError:
            return Loss("the machine was short of memory")
        except errors.WorkerCrashedError:
            return Loss("its process ended; often the machine is short of memory")
        except (errors.NodeDiedError, errors.ObjectLostError):
            return Loss("its machine was lost")
        except errors.LocalRayletDiedError as error:
            return Loss(one_line(error)[:300])
        except errors.RayTaskError as error:
            # Whatever the function raises comes as an answer, so it wasn't even begun.
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise worker.unlike_driver("the Ray cluster", cause) from error
        except errors.RayError as error:
            raise UserError(
                f"the Ray cluster failed ({one_line(error)[:300]}): run the same command again to go on"
            ) from error
        return answered

    def __exit__(self, *_: object) -> None:
        """Kill what still runs, and see it end: a next run may write the same files."""
        with contextlib.redirect_stdout(sys.stderr):
            with contextlib.suppress(Exception):
                for reference in self.pending:
                    self.ray.cancel(reference, force=True)
                if self.pending:
                    self.ray.wait(list(self.pending), num_returns=len(self.pending), timeout=worker.STOP_SECONDS)
            if not self.connected:
                self.ray.shutdown()


def connect(ray: Any, workers: int | None) -> None:
    """Join the user's cluster, or start one of `workers` CPUs. Raises UserError when that fails."""
    address = os.environ.get("RAY_ADDRESS") or _started_here() or "local"
    if address not in ("local", "auto") and "://" not in address and not _answers(address):
        # Ray itself would try for a quarter of an hour.
        raise UserError(f"nothing answers at the Ray cluster's address {address}: {REMEDY}")
    options = {"num_cpus": workers or worker.cores(), "include_dashboard": False} if address == "local" else {}
    try:
        with worker.keep_signals():
            ray.init(address=address, log_to_driver=False, logging_level="CRITICAL", **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(f"can't join the Ray cluster at {address} ({one_line(error)[:300]}): {REMEDY}") from error


def _started_here() -> str | None:
    """The address of a cluster that `ray start` left on this machine, when something still answers there."""
    # Where `ray.init` looks too, by its documentation; it would try an address that doesn't answer for minutes.
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    with contextlib.suppress(OSError):
        address = Path(folder, "ray", "ray_current_cluster").read_text(encoding="utf-8").strip()
        return address if _answers(address) else None
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True
