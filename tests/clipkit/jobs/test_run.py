"""Every item is done once, failures keep their type and name their item, and nobody outlives the parent."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from job_functions import (
    die_and_tell,
    die_on_three,
    divide,
    exit_on_three,
    fail_awkwardly,
    fail_on_three,
    multiply,
    process_id,
    square,
    square_after_death,
)

from clipkit.errors import InternalError, UserError
from clipkit.jobs.run import run_jobs
from clipkit.jobs.worker import cores


def name(number: int) -> str:
    return f"shard {number:05d}"


@pytest.mark.parametrize("workers", [None, 0, 1, 3])
def test_every_item_once(workers: int | None) -> None:
    assert sorted(run_jobs(square, range(11), workers=workers)) == [(i, i * i) for i in range(11)]


@pytest.mark.parametrize("workers", [1, 4])
def test_no_items(workers: int) -> None:
    assert list(run_jobs(square, [], workers=workers)) == []


def test_inline_keeps_the_order_and_the_process() -> None:
    assert list(run_jobs(process_id, [5, 6], workers=1)) == [(0, os.getpid()), (1, os.getpid())]


def test_workers_are_other_processes() -> None:
    assert os.getpid() not in {pid for _, pid in run_jobs(process_id, range(4), workers=2)}


@pytest.mark.parametrize("items", [0, 1, 3])
def test_isolated_work_is_never_in_this_process(items: int) -> None:
    results = list(run_jobs(process_id, range(items), workers=1, isolate=True))
    assert len(results) == items and os.getpid() not in {pid for _, pid in results}


def test_partial_functions() -> None:
    assert dict(run_jobs(functools.partial(multiply, 10), [1, 2, 3], workers=2)) == {0: 10, 1: 20, 2: 30}


@pytest.mark.parametrize("workers", [1, 2])
def test_user_error_keeps_type_and_message(workers: int) -> None:
    with pytest.raises(UserError, match=r"^shard 3 is damaged: build it again") as caught:
        list(run_jobs(fail_on_three, range(6), workers=workers, describe=name))
    assert "while working on shard 00003" in caught.value.__notes__


@pytest.mark.parametrize("workers", [1, 2])
def test_other_exceptions_keep_their_type(workers: int) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        list(run_jobs(divide, range(6), workers=workers, describe=name))
    assert "while working on shard 00003" in caught.value.__notes__


def test_traceback_of_the_worker_is_kept() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        list(run_jobs(divide, range(6), workers=2))
    assert any("in divide" in note for note in caught.value.__notes__)


def test_exception_that_does_not_pickle() -> None:
    with pytest.raises(InternalError, match="AwkwardError: two words"):
        list(run_jobs(fail_awkwardly, range(2), workers=2))


def test_killed_worker_is_named_with_its_item() -> None:
    with pytest.raises(UserError, match=r"worker died .* shard 00003 \(SIGKILL.*run the same command again"):
        list(run_jobs(die_on_three, range(6), workers=2, describe=name))


def test_items_of_lost_workers_are_done_by_others(tmp_path: Path) -> None:
    function = functools.partial(square_after_death, tmp_path)
    assert sorted(run_jobs(function, range(6), workers=2)) == [(i, i * i) for i in range(6)]


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_a_worker_is_lost_so_often_and_no_more(tmp_path: Path, attempts: int) -> None:
    results = run_jobs(functools.partial(die_and_tell, tmp_path), range(4), workers=2, describe=name, attempts=attempts)
    often = "" if attempts == 1 else f" {attempts} times"
    with pytest.raises(UserError, match=rf"a worker died{often} while working on shard 00003"):
        list(results)
    assert (tmp_path / "deaths").read_text() == "x" * attempts


def test_worker_that_exits_is_named_with_its_item() -> None:
    with pytest.raises(UserError, match=r"shard 00003 \(exit code 7\)"):
        list(run_jobs(exit_on_three, range(6), workers=2, describe=name))


def gone(pid: int) -> bool:
    """Whether the process has ended (one that awaits its reaping counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_cores_follow_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


def test_leaving_early_stops_the_workers() -> None:
    results = run_jobs(process_id, range(50), workers=2)
    pids = {next(results)[1] for _ in range(4)}
    results.close()
    assert all(gone(pid) for pid in pids)


# The child's workers stop for ever on their item; their standard output is ours, so reading to its end waits for
# the last of them to be gone.
PARENT = """
import os, signal, sys, threading
from clipkit.jobs.run import run_jobs
from clipkit.jobs.worker import cores

def stop(number):
    print(os.getpid(), flush=True)
    threading.Event().wait()

if __name__ == "__main__":
    list(run_jobs(stop, range(2), workers=2))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() and parent.stdout.readline()
        parent.send_signal(how)
        assert parent.stdout.read() == b""
    assert parent.returncode == -how
