"""Jobs on Spark (https://spark.apache.org): in the user's session, or in local mode on this machine.

A context that is active in this process is used as it is. Under `spark-submit`, or with SPARK_MASTER set to a master's
URL, one is made for the run there. Otherwise Spark starts in local mode, bound to loopback, and quietly. Spark needs
Java 17 or newer.

Each item is a Spark job of one task, asked for by one of a few threads. One job over all items would be simpler, but
gives its results at the end (`collect`) or in order (`toLocalIterator`, which moreover runs one partition at a time),
and a million items would be a million tasks in the driver. Threads give each result as it comes, hand in no more than
the cluster can take, and cost a tenth of a second an item. A lost task is repeated by Spark itself: `attempts` times
where the context is ours, `spark.task.maxFailures` times in the user's.
"""

import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clipkit.errors import UserError
from clipkit.jobs.worker import Answer, answer_packed, cores, death, kept_signals, pack, result_of, unlike

T = TypeVar("T")
R = TypeVar("R")

OLDEST_JAVA = 17
MOST_THREADS = 512  # each holds a connection to the JVM
STOP_SECONDS = 20.0  # Spark kills a Python worker two seconds after its task was cancelled


def run_on_spark(
    function: Callable[[T], R],
    items: Sequence[T],
    workers: int | None,
    describe: Callable[[T], str],
    attempts: int,
) -> Iterator[tuple[int, R]]:
    """`run_jobs` on Spark. With `workers` of None as many items are handed in as the context has cores."""
    try:
        import pyspark
    except ImportError as error:
        raise UserError(
            f"--engine spark needs a package that is missing ({error}): pip install 'clipkit[spark]'"
        ) from error
    if not items:
        return
    with _context(pyspark, workers, attempts) as context:
        threads = min(workers or context.defaultParallelism, len(items), MOST_THREADS)
        asking = _Asking(pyspark, context, function, items)
        try:
            for index, outcome in asking.outcomes(threads):
                name = describe(items[index])
                if isinstance(outcome, Exception):
                    raise _failure(outcome, name) from outcome
                yield index, result_of(outcome, name)
        finally:
            asking.stop()


class _Asking:
    """The threads that hand items to Spark, one job each, and what comes back."""

    def __init__(self, pyspark: Any, context: Any, function: Callable[[T], R], items: Sequence[T]) -> None:
        self.pyspark, self.context, self.items = pyspark, context, items
        self.dumps = pyspark.cloudpickle.dumps
        self.packed = pack(function, self.dumps)
        self.group = f"clipkit-{uuid.uuid4()}"
        self.following = iter(range(len(items)))
        self.following_lock = threading.Lock()
        self.results: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()
        self.permits = threading.Semaphore(0)  # how many items may be handed in
        self.stopped = threading.Event()
        self.threads: list[threading.Thread] = []

    def outcomes(self, threads: int) -> Iterator[tuple[int, Answer | Exception]]:
        """Each item's answer as it comes, or what Spark raised."""
        self.permits.release(threads)
        for _ in range(threads):
            thread = self.pyspark.InheritableThread(target=self._ask, session=None)
            thread.daemon = True
            thread.start()
            self.threads.append(thread)
        for _ in range(len(self.items)):
            result = self.results.get()
            self.permits.release()
            yield result

    def _ask(self) -> None:
        self.context.setJobGroup(self.group, "clipkit", interruptOnCancel=True)
        packed = self.packed
        while self.permits.acquire() and not self.stopped.is_set():
            with self.following_lock:
                index = next(self.following, -1)
            if index < 0:
                return
            outcome: Answer | Exception
            try:
                item = self.dumps(self.items[index])
                (outcome,) = self.context.parallelize([item], 1).map(_Work(packed)).collect()
            except Exception as error:
                outcome = error
            self.results.put((index, outcome))

    def stop(self) -> None:
        """Cancel what runs and wait for the threads, so that nothing is handed in afterwards."""
        self.stopped.set()
        self.permits.release(len(self.threads))
        until = time.monotonic() + STOP_SECONDS
        while any(thread.is_alive() for thread in self.threads) and time.monotonic() < until:
            # Again and again: a thread may have been on its way to hand an item in.
            with contextlib.suppress(Exception):
                self.context.cancelJobGroup(self.group)
            for thread in self.threads:
                thread.join(0.2 / len(self.threads))


class _Work:
    """`answer_packed` with the function; a class, because Spark sends those of this module by their name."""

    def __init__(self, packed: bytes) -> None:
        self.packed = packed

    def __call__(self, item: bytes) -> Answer:
        return answer_packed(self.packed, item)


@contextlib.contextmanager
def _context(pyspark: Any, workers: int | None, attempts: int) -> Iterator[Any]:
    """The active SparkContext, or one for the time of the block."""
    if pyspark.SparkContext._active_spark_context is not None:
        yield pyspark.SparkContext._active_spark_context
        return
    master = os.environ.get("SPARK_MASTER")
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ or "--master" in os.environ.get("PYSPARK_SUBMIT_ARGS", "")
    local = not master and not submitted
    if master and not re.match(r"spark://|k8s://|yarn$|local", master):
        raise UserError(f"SPARK_MASTER={master}: give spark://HOST:PORT, k8s://URL, yarn or local[N]")
    if "PYSPARK_GATEWAY_PORT" not in os.environ and (problem := java_problem()):
        raise UserError(problem)
    if submitted:
        pyspark.SparkContext._ensure_initialized()  # so that the settings below see those of spark-submit
    settings = pyspark.SparkConf()
    for key, value in _settings(local, attempts).items():
        settings.setIfMissing(key, value)
    if local:
        settings.setMaster(f"local[{workers or cores()},{attempts}]")
    elif master:
        settings.setMaster(master)
    environment = {"PYSPARK_PYTHON": os.environ.get("PYSPARK_PYTHON", sys.executable)}
    if local:
        environment["SPARK_LOCAL_IP"] = "127.0.0.1"
    try:
        with kept_signals(), _environment(environment):
            if not submitted and pyspark.SparkContext._gateway is None:
                from pyspark.java_gateway import launch_gateway

                # Java and Spark greet on stderr before any setting can stop them.
                gateway = launch_gateway(settings, {"stderr": subprocess.DEVNULL} if local else {})
                pyspark.SparkContext._ensure_initialized(gateway=gateway, conf=settings)
            context = pyspark.SparkContext(conf=settings)
    except Exception as error:
        where = "on this machine" if local else f"at {master or 'the master that was given'}"
        raise UserError(
            f"Spark doesn't start {where} ({_short(error)}): try `pyspark` in the same environment"
        ) from error
    try:
        yield context
    finally:
        with kept_signals():
            context.stop()


def _settings(local: bool, attempts: int) -> dict[str, str]:
    settings = {
        "spark.app.name": "clipkit",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "OFF" if local else "ERROR",
        "spark.task.maxFailures": str(attempts),
    }
    if local:
        settings |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    return settings


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Spark takes some settings from the environment alone, when it starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def java_problem() -> str | None:
    """What is wrong with this machine's Java as far as Spark is concerned, in one line; None when it will do."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    remedy = f"install Java {OLDEST_JAVA} or newer (such as the package openjdk-{OLDEST_JAVA}-jre-headless)"
    if java is None or not Path(java).is_file():
        where = f"JAVA_HOME is {home}, which holds none" if home else "there is none on the PATH"
        return f"Spark needs Java, and {where}: {remedy}, or set JAVA_HOME"
    said = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < OLDEST_JAVA:
        return f"Spark needs Java {OLDEST_JAVA}, and {java} is {_first_line(said) or 'broken'}: {remedy}"
    return None


def _failure(error: Exception, name: str) -> UserError:
    """What Spark's error means. What the function raises comes as an answer, so this is about the workers."""
    text = str(error)
    if isinstance(error, _python_exception()):
        return unlike("the Spark cluster", Exception(_last_line(text)))
    times = re.search(r"failed (\d+) times", text)
    if "Python worker exited unexpectedly" in text or "ExecutorLostFailure" in text:
        reason = "its process ended; often the machine is short of memory"
        return death(name, reason, int(times[1]) if times else 1)
    return UserError(f"Spark failed while working on {name} ({_short(error)}): run the same command again to go on")


def _python_exception() -> type[Exception]:
    from pyspark.errors import PythonException

    kind: type[Exception] = PythonException
    return kind


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if re.match(r"\S+Error", line)), text)
