"""SIGKILL at any moment of a build, in any pass: no half shard, and in the end the bytes of the unbroken build."""

import json
import subprocess
import sys
from pathlib import Path

from image_shards import pair, write_tar

# Children are forked from a process that has imported everything, so that most of a child's life is the build. A kill
# loses nothing of what the kernel holds, so flushing, most of the time, is left out.
KILLER = """
import faulthandler, json, os, random, shutil, signal, sys, time
from pathlib import Path
from clipkit.tfrecord_tools.build import command as build
from clipkit.formats.manifest import read_manifest
from folder_contents import contents

os.fsync = lambda descriptor: None
shards, out, seed, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
PASSES = [
    {},
    {"shuffle": 3},
    {"dedup": "caption", "split": "train=0.7,test=0.3"},
    {"dedup": "phash", "shuffle": 1, "resize": 12},
]

def run(options):
    return build.build_tfds(shards, out, "pairs", progress=lambda now: None, shard_megabytes=0.02, **options)

def start(options):
    child = os.fork()
    if not child:
        faulthandler.disable()
        try:
            run(options)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child

expected, seconds = [], []
for options in PASSES:
    run(options)
    shutil.rmtree(out)
    began = time.monotonic()
    run(options)
    seconds.append(time.monotonic() - began)
    expected.append(contents(out))
    shutil.rmtree(out)

finished = restarts = 0
while kills:
    chosen = rng.randrange(len(PASSES))
    whole = expected[chosen]
    while True:
        child = start(PASSES[chosen])
        wait = rng.uniform(0, seconds[chosen] * 1.1) if kills else 600.0
        until = time.monotonic() + wait
        status = None
        while time.monotonic() < until and status is None:
            pid, code = os.waitpid(child, os.WNOHANG)
            status = code if pid else None
            time.sleep(0.0005)
        if status is None:
            assert kills, "a build takes ten minutes"
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            kills -= 1
            restarts += 1
        # Whatever has its final name is whole.
        for path, digest in contents(out).items() if out.exists() else ():
            name = path.rpartition("/")[2]
            if "/build-" not in path and not name.startswith("."):
                assert whole[path] == digest, path
        if status == 0:
            break
        assert status == signal.SIGKILL, status
    assert contents(out) == whole
    for manifest in read_manifest(out / "pairs" / "1.0.0").values():
        assert manifest.samples == manifest.records + sum(manifest.skipped.values())
    finished += 1
    shutil.rmtree(out)
print(json.dumps([finished, restarts]))
"""


def test_killed_at_fifty_random_moments_the_bytes_are_the_same(tmp_path):
    for shard in range(3):
        samples = [pair(10 * shard + i, **({"txt": "the same"} if i % 4 == 1 else {})) for i in range(10)]
        write_tar(tmp_path / "shards" / f"{shard}.tar", [*samples, pair(100 + shard, jpg=None)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "shards"), str(tmp_path / "out"), "1", "50"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2] / "support",
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    finished, restarts = json.loads(done.stdout)
    assert restarts == 50
    assert finished > 5
