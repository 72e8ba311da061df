"""One function over many shards: on this machine, on Ray, or on Spark.

The engines differ in where the workers are, and in nothing that a caller sees: results come as items finish, an
exception keeps its type and names its item, an item whose worker was lost is given to another one, and leaving the loop
stops the work. Every item is one shard, which takes seconds to minutes, so what an engine costs for an item (about a
millisecond on Ray, a tenth of a second on Spark) doesn't count.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

from clipkit.jobs.worker import Loss, Workers, cores, result_of, worker_died

T = TypeVar("T")
R = TypeVar("R")

Engine = Literal["local", "ray", "spark"]
ATTEMPTS = 3


def run_jobs(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int | None = 1,
    describe: Callable[[T], str] = str,
    isolate: bool = False,
    engine: Engine = "local",
    attempts: int = ATTEMPTS,
    gpu: bool = False,
) -> Iterator[tuple[int, R]]:
    """Yield `(index of the item, function(item))` in the order in which the items finish.

    `engine` local: processes of this machine. `workers` of None takes every core that this process may use. With 0 or
    1 everything runs in this process, in order, unless `isolate` keeps `function` and what it imports out of it.
    `engine` ray, spark: the cluster that the user has (see `ray`, `spark`), or one started on this machine.
    `workers` is how many items are worked on at once; None is all that the cluster can take. With `gpu` each item gets
    a GPU of a Ray cluster that has some. Every machine needs
    clipkit in the same versions, and must see the paths in the items under the same names: a file system that all of
    them share, or a store such as `s3://`.

    Except for work in this process, `function`, the items and the results are pickled, so `function` must be importable
    (a `functools.partial` of such a function is fine).
    An exception of `function` keeps its type and gets a note that names the item through `describe`.
    An item whose worker is lost (killed, out of memory, its machine gone) is given to another worker, up to `attempts`
    times in all, so `function` must bear being run again, and even beside a first run that only seems lost: what it
    writes goes through `files.write_beside`. Then raises UserError, naming the item; what other items have finished
    stays finished. Raises UserError too for an engine that isn't installed or can't be started.
    Leaving the loop early, Ctrl-C included, stops the work.
    """
    if engine == "ray":
        from clipkit.jobs.ray import RayWorkers

        return _run(RayWorkers(function, workers, gpu), items, describe, attempts)
    if engine == "spark":
        from clipkit.jobs.spark import SparkWorkers

        return _run(SparkWorkers(function, workers), items, describe, attempts)
    from clipkit.jobs.local import LocalWorkers, run_here

    workers = min(cores() if workers is None else max(workers, 1), len(items))
    if workers <= 1 and not isolate:
        return run_here(function, items, describe)
    return _run(LocalWorkers(function, workers), items, describe, attempts)


def _run(
    engine: AbstractContextManager[Workers], items: Sequence[T], describe: Callable[[T], str], attempts: int
) -> Iterator[tuple[int, Any]]:
    """Hand in as many items as the engine has room for, and hand in again those whose workers were lost."""
    if not items:
        return
    waiting = iter(range(len(items)))
    again: list[int] = []  # items whose workers were lost
    losses: Counter[int] = Counter()
    working, finished = 0, None
    with engine as workers:
        while True:
            while working < workers.room() and (index := again.pop() if again else next(waiting, -1)) >= 0:
                workers.submit(index, items[index])
                working += 1
            if finished is not None:  # now that the next item is on its way
                yield finished
            if not working:
                return
            index, outcome = workers.wait()
            working -= 1
            finished, name = None, describe(items[index])
            if isinstance(outcome, Loss):
                losses[index] += outcome.times
                if losses[index] >= attempts:
                    raise worker_died(name, outcome.reason, losses[index])
                again.append(index)
            else:
                finished = index, result_of(outcome, name)
