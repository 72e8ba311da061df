"""TensorFlow for tests, in one process of its own that all of them share.

TensorFlow must not enter the process that holds torch, and its import takes most of what a test with it takes.
"""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

# Results go through a descriptor of their own: TensorFlow and what it loads print where they like.
SERVER = """
import json, os, sys, traceback
answers = os.fdopen(int(sys.argv[1]), "w")
for line in sys.stdin:
    script, arguments = json.loads(line)
    try:
        names = {"arguments": arguments, "__name__": "with_tensorflow"}
        exec(compile(script, "script of the test", "exec"), names)
        answer = [True, names.get("result")]
    except BaseException:
        answer = [False, traceback.format_exc()]
    print(json.dumps(answer), file=answers, flush=True)
"""


def with_tensorflow(script: str, *arguments: object) -> object:
    """Run `script` beside TensorFlow with `arguments` (a list of str); return what it assigns to `result` (JSON)."""
    process, answers = _server()
    assert process.stdin is not None
    process.stdin.write(json.dumps([script, [str(argument) for argument in arguments]]) + "\n")
    process.stdin.flush()
    line = answers.readline()
    assert line, f"the process with TensorFlow died with {process.wait()}"
    succeeded, result = json.loads(line)
    assert succeeded, result
    return result


@cache
def _server():
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(writing)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[writing],
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
    )
    os.close(writing)
    answers = os.fdopen(reading)
    atexit.register(_stop, process, answers)
    return process, answers


def _stop(process, answers) -> None:
    process.stdin.close()
    answers.close()
    process.kill()
    process.wait()
