"""SIGKILL at any moment of `clipkit add-captions`: until its end nothing opens the dataset, and in the end the bytes
are those of the unbroken run.
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from small_dataset import pair_columns, write_dataset

# Children are forked from a process that has imported everything, so that most of a child's life is the work. A kill
# loses nothing of what the kernel holds, so flushing, most of the time, is left out.
KILLER = """
import faulthandler, json, os, random, shutil, signal, sys, time
from pathlib import Path
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.tfrecord_tools.captions.command import add_captions
from folder_contents import contents

os.fsync = lambda descriptor: None
data, table, seed, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
work = data.with_name("work")
rng = random.Random(seed)

def start():
    child = os.fork()
    if not child:
        faulthandler.disable()
        try:
            add_captions(work, table)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child

def afresh():
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(data, work)

before = contents(data)
for _ in range(2):  # the first one imports what is left
    afresh()
    began = time.monotonic()
    add_captions(work, table)
    seconds = time.monotonic() - began
expected = contents(work)

finished = restarts = broken = 0
while kills:
    afresh()
    while True:
        child = start()
        until = time.monotonic() + (rng.uniform(0, seconds * 1.1) if kills else 600.0)
        status = None
        while time.monotonic() < until and status is None:
            pid, code = os.waitpid(child, os.WNOHANG)
            status = code if pid else None
            time.sleep(0.0005)
        if status is None:
            assert kills, "it takes ten minutes"
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            kills -= 1
            restarts += 1
            try:  # as it was, or whole, or refused
                open_dataset(work)
                found = contents(work)
                own = {name for name in found if "add-captions" in name or Path(name).name.startswith(".")}
                whole = {name: digest for name, digest in found.items() if name not in own}
                assert whole in (before, expected), sorted(set(whole.items()) ^ set(expected.items()))
            except UserError as error:
                assert "isn't finished, run the same clipkit add-captions" in str(error), error
                broken += 1
        if status == 0:
            break
        assert status == signal.SIGKILL, status
    assert contents(work) == expected
    finished += 1
print(json.dumps([finished, restarts, broken]))
"""


def test_killed_at_thirty_random_moments_the_bytes_are_the_same(tmp_path):
    shards = [[pair_columns(number) for number in range(start, start + 8)] for start in range(0, 48, 8)]
    write_dataset(tmp_path / "data", {"train": shards, "test": [[pair_columns(number) for number in (3, 60)]]})
    rows = {f"{number:09d}": [f"seen {number}", f"{number} again"] for number in range(0, 70, 2)}
    pq.write_table(pa.table({"key": list(rows), "caption": list(rows.values())}), tmp_path / "captions.parquet")
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            KILLER,
            str(tmp_path / "data"),
            str(tmp_path / "captions.parquet"),
            "1",
            "30",
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2] / "support",
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    finished, restarts, broken = json.loads(done.stdout)
    assert restarts == 30
    assert finished and broken > 5
