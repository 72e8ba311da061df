"""Downloads that are killed: a process that has everything imported forks one for each, and kills it when it is told.

Importing takes seconds, and fifty kills are wanted: so a run is a fork, with the workers' part in the same process.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
import pandas, rich.console, rich.progress  # else each fork imports them for itself
sys.path.insert(0, sys.argv[1])
from download_site import NETWORK, PICTURES, fetch
from clipkit.tfrecord_tools.download.worker import fetch_batch
from clipkit.tfrecord_tools.pictures.picture import PictureMaker

PictureMaker(PICTURES)
os.fsync = lambda descriptor: None  # a kill loses nothing of what the kernel holds

def die_at(count):
    # Renames are where one state becomes the next, and where a clock would hardly ever hit.
    rename, left = Path.replace, [count]
    def replace(self, target):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    Path.replace = replace

def child(order):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if order["renames"] is not None:
        die_at(order["renames"])
    fetch(order["urls"], order["out"], **order["options"])

answers = os.fdopen(os.dup(1), "w")
print("ready", file=answers, flush=True)
for line in sys.stdin:
    order = json.loads(line)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(order)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(code)
    while (order["seconds"] is None or time.monotonic() - began < order["seconds"]):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.001)
    else:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - began]), file=answers, flush=True)
"""


class Driver:
    """Runs downloads and kills them."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process, self.log = process, log

    def run(
        self, urls: Path, out: Path, seconds: float | None = None, renames: int | None = None, **options: Any
    ) -> tuple[bool, float]:
        """Download, killed after so many seconds or renames. Whether it came to its end, and the seconds it took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"urls": str(urls), "out": str(out), "log": str(self.log), "seconds": seconds, "renames": renames}
        self.process.stdin.write(json.dumps({**order, "options": options}) + "\n")
        self.process.stdin.flush()
        code, took = json.loads(self.process.stdout.readline())
        assert code in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        return code == 0, took


@contextmanager
def driver(log: Path) -> Iterator[Driver]:
    """A driver, whose downloads write their standard error to `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield Driver(process, log)
        finally:
            process.kill()
