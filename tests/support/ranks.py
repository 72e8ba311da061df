"""Several ranks as torchrun starts them, out of a process that has imported clipkit: five seconds less for each.

What torchrun itself does is in the tests of `loop` and `saving`, which start it for real.
"""

import multiprocessing
import multiprocessing.context
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Of all tests that fork: there is one server a process, and it imports what the first of them asks for.
PRELOAD = (
    "clipkit.cli.main",
    "clipkit.jobs.local",
    "clipkit.tfrecord_tools.purge.command",
    "clipkit.train.loop",
    "pandas",
    "pyarrow.compute",
    "rich.progress",
)


def forkserver() -> multiprocessing.context.ForkServerContext:
    """A context whose processes begin with clipkit imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


class Ended(NamedTuple):
    """How a rank ended: its exit code (negative: a signal), and what it wrote."""

    code: int
    out: str
    err: str


def run_ranks(target: Callable[..., object], *arguments: Any, ranks: int = 2) -> list[str]:
    """What `target(*arguments)` writes to stdout on each rank. Fails, with their stderr, unless all exit with 0."""
    ended = end_ranks(target, *arguments, ranks=ranks)
    assert [each.code for each in ended] == [0] * ranks, "".join(each.err for each in ended)
    return [each.out for each in ended]


def end_ranks(target: Callable[..., object], *arguments: Any, ranks: int = 2) -> list[Ended]:
    """How `target(*arguments)` ends on each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name) / str(rank) for rank in range(ranks)]
        processes = [
            forkserver().Process(target=_as_rank, args=(rank, ranks, port, output, target, arguments))
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
            process.join()
        return [
            Ended(process.exitcode or 0, *(output.with_suffix(suffix).read_text() for suffix in (".out", ".err")))
            for process, output in zip(processes, outputs, strict=True)
        ]


def _as_rank(
    rank: int, ranks: int, port: int, output: Path, target: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.fsync = lambda descriptor: None  # as in the process of the tests
    target(*arguments)


def command(*arguments: str) -> None:
    """The `clipkit` command."""
    from clipkit.cli.main import main

    main(arguments)
