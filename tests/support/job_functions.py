"""What the workers of test_jobs do, apart from it, so that a worker starts without pytest."""

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from clipkit.errors import UserError
from clipkit.storage.files import write_beside


def square(number: int) -> int:
    return number * number


def multiply(factor: int, number: int) -> int:
    return factor * number


def process_id(_: int) -> int:
    return os.getpid()


def fail_on_three(number: int) -> int:
    if number == 3:
        raise UserError("shard 3 is damaged: build it again")
    return number


def divide(number: int) -> float:
    return 1 / (number - 3)


class AwkwardError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def fail_awkwardly(_: int) -> int:
    raise AwkwardError("two", "words")


def die_on_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_and_tell(folder: Path, number: int) -> int:
    if number == 3:
        with (folder / "deaths").open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def exit_on_three(number: int) -> int:
    if number == 3:
        os._exit(7)
    return number


def square_after_death(folder: Path, number: int) -> int:
    """The square; but the first time, two of the numbers kill their worker."""
    if number in (1, 4):
        mark = folder / f"died-{number}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def wait_for_the_others(folder: Path, number: int) -> int:
    """The first waits until the driver has had the answers of the others."""
    if number == 0:
        wait_until((folder / "go").exists)
    return number


def note_and_wait(folder: Path, number: int) -> int:
    """The first item answers at once, the others leave their process id and wait for ever.

    The id is the file's name: whoever sees the file can read it, which a file's contents don't promise.
    """
    if number:
        (folder / f"{os.getpid()}.pid").touch()
        wait_until(lambda: False)
    return number


def write_bytes(folder: Path, number: int) -> str:
    """Write a file whose bytes follow from its number; from the fourth on, wait for `go` in the middle of it."""
    with (folder / "runs").open("a") as file:
        file.write(f"{number} {os.getpid()}\n")
    with write_beside(folder / f"{number:05d}.bin") as temporary, temporary.open("wb") as file_of_bytes:
        for part in range(8):
            if part == 4 and number >= 4:
                wait_until((folder / "go").exists)
            file_of_bytes.write(hashlib.sha256(f"{number} {part}".encode()).digest() * 1000)
    return f"{number:05d}"


def alive(pid: int) -> bool:
    """Whether the process runs (one that awaits its reaping doesn't)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for a condition; an error when it doesn't come, so that no test waits for ever."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.02)
