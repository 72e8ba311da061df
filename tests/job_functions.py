"""What the workers of test_jobs do, apart from it, so that a worker starts without pytest."""

import os
import signal

from clipkit.errors import UserError


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


def exit_on_three(number: int) -> int:
    if number == 3:
        os._exit(7)
    return number
