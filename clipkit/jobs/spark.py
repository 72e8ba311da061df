"""Jobs on Spark (https://spark.apache.org): in the user's context, or in local mode on this machine.

A context that is active in this process is used as it is. Under `spark-submit`, whose settings hold, or with
SPARK_MASTER set to a master's URL, one is made for the run there. Otherwise Spark starts in local mode, bound to
loopback, and quietly. Spark needs Java 17 or newer.

Each item is a Spark job of one task, asked for by a thread of its own. One job over all items would be simpler, but
gives its results at the end (`collect`) or in order (`toLocalIterator`, which moreover runs one partition at a time),
and a million items would be a million tasks in the driver. Threads give each result as it comes, hand in no more than
the cluster can take, and cost a tenth of a second an item. Spark's own retries are off where the context is ours;
in the user's they are part of the attempts that `run_jobs` counts.
"""

import contextlib
import functools
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from clipkit.errors import UserError, one_line
from clipkit.jobs import worker
from clipkit.jobs.worker import Answer, Loss

T = TypeVar("T")
R = TypeVar("R")

OLDEST_JAVA = 17
MOST_THREADS = 512  # each holds a connection to the JVM
STOP_SECONDS = 20.0  # Spark kills a Python worker two seconds after its task was cancelled
OWNER = "spark.clipkit.owner"  # the setting that tells a context of ours from the user's


class SparkWorkers:
    """A context's workers. With `workers` of None as many items are handed in as the context has cores."""

    def __init__(self, function: Callable[[T], R], workers: int | None) -> None:
        self.function, self.workers = function, workers
        self.group = f"clipkit-{uuid.uuid4()}"
        self.results: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()
        self.threads: dict[int, threading.Thread] = {}  # by the index of the item

    def __enter__(self) -> Self:
        try:
            import pyspark
        except ImportError as error:
            raise worker.missing_package("spark", error) from error
        self.pyspark: Any = pyspark
        packed = worker.pack(self.function, self.pyspark.cloudpickle.dumps)
        self.work = functools.partial(worker.answer_packed, packed)
        self.context = get_context(self.pyspark, self.workers, self.group)
        return self

    def room(self) -> int:
        return min(self.workers or int(self.context.defaultParallelism), MOST_THREADS)

    def submit(self, index: int, item: Any) -> None:
        ask = functools.partial(self._ask, index, self.pyspark.cloudpickle.dumps(item))
        self.threads[index] = self.pyspark.InheritableThread(target=ask, daemon=True)
        self.threads[index].start()

    def _ask(self, index: int, item: bytes) -> None:
        outcome: Answer | Exception
        try:
            self.context.setJobGroup(self.group, "clipkit", interruptOnCancel=True)
            (outcome,) = self.context.parallelize([item], 1).map(self.work).collect()
        except Exception as error:
            outcome = error
        self.results.put((index, outcome))

    def wait(self) -> tuple[int, Answer | Loss]:
        index, outcome = self.results.get()
        self.threads.pop(index).join()
        return index, _loss(outcome) if isinstance(outcome, Exception) else outcome

    def __exit__(self, *_: object) -> None:
        """Cancel what runs and wait for it, then end a context of our own."""
        until = time.monotonic() + STOP_SECONDS
        while any(thread.is_alive() for thread in self.threads.values()) and time.monotonic() < until:
            # Again and again: a thread may have been on its way to hand an item in.
            with contextlib.suppress(Exception):
                self.context.cancelJobGroup(self.group)
            for thread in self.threads.values():
                thread.join(0.2 / len(self.threads))
        if self.context.getConf().get(OWNER) == self.group:
            with worker.keep_signals():
                self.context.stop()


def _loss(error: Exception) -> Loss:
    """What Spark's error means. What the function raises comes as an answer, so this is about the workers."""
    from pyspark.errors import PythonException

    text = str(error)
    if isinstance(error, PythonException):
        last = next((line for line in reversed(text.splitlines()) if re.match(r"\S+Error", line)), text)
        raise worker.unlike_driver("the Spark cluster", Exception(last)) from error
    if "Python worker exited unexpectedly" in text or "ExecutorLostFailure" in text:
        times = re.search(r"failed (\d+) times", text)
        return Loss("its process ended; often the machine is short of memory", int(times[1]) if times else 1)
    raise UserError(f"Spark failed ({one_line(error)[:300]}): run the same command again to go on") from error


def get_context(pyspark: Any, workers: int | None, owner: str) -> Any:
    """The active SparkContext, or a new one whose setting OWNER is `owner`. Raises UserError when none starts."""
    master = os.environ.get("SPARK_MASTER")
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ or "--master" in os.environ.get("PYSPARK_SUBMIT_ARGS", "")
    local = not master and not submitted
    if master and not re.match(r"spark://|k8s://|yarn$|local", master):
        raise UserError(f"SPARK_MASTER={master}: give spark://HOST:PORT, k8s://URL, yarn or local[N]")
    if "PYSPARK_GATEWAY_PORT" not in os.environ and (problem := java_problem()):
        raise UserError(problem)
    settings = pyspark.SparkConf().set(OWNER, owner)
    if not submitted:
        settings.setMaster(master or f"local[{workers or worker.cores()}]").setAppName("clipkit")
        settings.set("spark.ui.enabled", "false").set("spark.ui.showConsoleProgress", "false")
        settings.set("spark.log.level", "OFF" if local else "ERROR").set("spark.task.maxFailures", "1")
    environment = {"PYSPARK_PYTHON": os.environ.get("PYSPARK_PYTHON", sys.executable)}
    if local:
        settings.set("spark.driver.host", "127.0.0.1").set("spark.driver.bindAddress", "127.0.0.1")
        environment["SPARK_LOCAL_IP"] = "127.0.0.1"
    try:
        with worker.keep_signals(), _environment(environment), _silent_stderr() if local else contextlib.nullcontext():
            return pyspark.SparkContext.getOrCreate(settings)
    except Exception as error:
        where = "on this machine" if local else f"at {master or 'the master that was given'}"
        raise UserError(
            f"Spark doesn't start {where} ({one_line(error)[:300]}): try `pyspark` in the same environment"
        ) from error


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Spark takes some settings only from the environment, when it starts."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Java and Spark greet on stderr, which they inherit, before any setting can stop them."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def java_problem() -> str | None:
    """What is wrong with this machine's Java as far as Spark is concerned, in one line; None when it will do."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    remedy = f"install Java {OLDEST_JAVA} or newer (such as the package openjdk-{OLDEST_JAVA}-jre-headless)"
    if java is None or not Path(java).is_file():
        where = f"JAVA_HOME is {home}, which holds none" if home else "there is none on the PATH"
        return f"Spark needs Java, and {where}: {remedy}, or set JAVA_HOME"
    text = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', text)
    if version is None or int(version[1]) < OLDEST_JAVA:
        return f"Spark needs Java {OLDEST_JAVA}, and {java} is {(text.splitlines() or ['broken'])[0]}: {remedy}"
    return None
