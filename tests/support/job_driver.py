"""Drives jobs on an engine in a process of its own, so that neither Ray nor a JVM enters the process of the tests.

`job_driver.py ENGINE FOLDER SCENARIO...`: prints a JSON line for each scenario: its name, and what came of it. But for
`write` alone, the engine is started by the driver, as a user's program would have it running already.
"""

import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import job_functions

from clipkit.jobs.run import Engine, run_jobs


def tell(line: list[object]) -> None:
    """A line on stdout in one piece: print writes its end by itself, and Ray's log of a lost worker came in between."""
    os.write(1, (json.dumps(line) + "\n").encode())


def run(engine: str, function: Callable[[int], Any], items: Sequence[int], workers: int | None = 2) -> Iterator[Any]:
    return run_jobs(function, items, workers=workers, engine=cast(Engine, engine), describe="shard {:05d}".format)


def same(engine: str, folder: Path) -> object:
    return sorted(run(engine, functools.partial(job_functions.multiply, 10), range(9), workers=None))


def nothing(engine: str, folder: Path) -> object:
    return list(run(engine, job_functions.square, []))


def other_processes(engine: str, folder: Path) -> object:
    return os.getpid() in {pid for _, pid in run(engine, job_functions.process_id, range(3), workers=1)}


def as_they_finish(engine: str, folder: Path) -> object:
    indices = []
    for index, _ in run(engine, functools.partial(job_functions.wait_for_the_others, folder), range(6)):
        indices.append(index)
        if len(indices) == 5:
            (folder / "go").touch()
    return indices


def lost_workers(engine: str, folder: Path) -> object:
    return sorted(run(engine, functools.partial(job_functions.square_after_death, folder), range(6)))


def poison(engine: str, folder: Path) -> object:
    return sorted(run(engine, job_functions.die_on_three, range(6)))


def user_error(engine: str, folder: Path) -> object:
    return sorted(run(engine, job_functions.fail_on_three, range(6)))


def other_error(engine: str, folder: Path) -> object:
    return sorted(run(engine, job_functions.divide, range(6)))


class Touched(Sequence[int]):
    """A million items, of which it is known how many were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: Any) -> Any:
        self.asked = max(self.asked, index)
        return index


def a_few_of_a_million(engine: str, folder: Path) -> object:
    items = Touched()
    results = run(engine, job_functions.square, items)
    for _ in range(3):
        next(results)
    cast(Any, results).close()
    return items.asked


def leaving(engine: str, folder: Path) -> object:
    results = run(engine, functools.partial(job_functions.note_and_wait, folder), range(9))
    next(results)
    job_functions.wait_until(lambda: len(list(folder.glob("*.pid"))) == 2)
    cast(Any, results).close()
    # Now, while the engine goes on: when it ends, its workers end too.
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    job_functions.wait_until(lambda: not any(map(job_functions.alive, pids)), seconds=30)
    return len(pids)


def write(engine: str, folder: Path) -> object:
    """What a stage does: what is finished stays, the rest is made."""
    lacking = [number for number in range(8) if not (folder / f"{number:05d}.bin").exists()]
    for index, _ in run(engine, functools.partial(job_functions.write_bytes, folder), lacking):
        own_signals = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        tell(["finished", lacking[index], own_signals])
    return len(lacking)


@contextlib.contextmanager
def running(engine: str) -> Iterator[Callable[[], bool]]:
    """An engine that the user has started: jobs use it, and leave it running, as the function tells."""
    if engine == "ray":
        import ray

        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="CRITICAL")
        yield ray.is_initialized
    else:
        from pyspark import SparkConf, SparkContext

        settings = {"spark.ui.enabled": "false", "spark.log.level": "OFF"}
        settings |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
        with SparkContext(conf=SparkConf().setMaster("local[2,3]").setAll(list(settings.items()))) as context:
            yield lambda: context.parallelize([1], 1).count() == 1


SCENARIOS: list[Callable[[str, Path], object]] = [
    same, nothing, other_processes, as_they_finish, lost_workers, poison, user_error, other_error, a_few_of_a_million,
    leaving, write,
]  # fmt: skip


def main() -> None:
    engine, folder, *wanted = sys.argv[1:]
    with running(engine) if wanted != ["write"] else contextlib.nullcontext(lambda: True) as still_runs:
        for scenario in SCENARIOS:
            if scenario.__name__ in wanted:
                own = Path(folder) / (scenario.__name__ if scenario is not write else "")
                own.mkdir(exist_ok=True)
                try:
                    outcome = scenario(engine, own)
                except Exception as error:
                    outcome = [type(error).__name__, str(error), getattr(error, "__notes__", [])]
                tell([scenario.__name__, outcome])
        tell(["still runs", still_runs()])


if __name__ == "__main__":
    main()
