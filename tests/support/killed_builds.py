"""Builds that are killed just before one of their renames, or after the last, and run again to their end."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from folder_contents import contents


def kill_at_each_rename(build: Callable[[], Any], out: Path, least: int) -> None:
    """After each kill the same build must end with the same files in `out`, and return the same, as unbroken.

    There must be more than `least` renames. To be called in a process of its own: it forks, and flushes nothing from
    then on, which takes most of the time; a kill loses nothing of what the kernel holds.
    """
    os.fsync = lambda descriptor: None
    whole, renames = run(build)
    assert renames > least
    expected = contents(out)
    for kill_at in range(1, renames + 2):
        shutil.rmtree(out)
        child = os.fork()
        if not child:
            run(build, kill_at)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        again, _ = run(build)
        assert contents(out) == expected, kill_at
        assert again == whole, kill_at
    print("the same")


def run(build: Callable[[], Any], kill_at: int | None = None) -> tuple[Any, int]:
    """What a build returns and how often it renames; with `kill_at` this process dies, at the end if not before."""
    rename, done = Path.replace, 0

    def counted(path: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    with patch.object(Path, "replace", counted):
        returned = build()
    if kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return returned, done
