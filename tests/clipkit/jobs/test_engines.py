"""Ray and Spark give what the local engine gives, whatever dies: run for real, on a cluster on this machine.

Drivers are processes of their own (`job_driver`). Every process that a test starts, through however many others,
carries a mark in its environment, by which the tests see that all are gone, and end what a failure left.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import CliRunner
from image_shards import picture
from job_functions import alive, square, wait_until
from ranks import run_ranks
from small_encoder import small_run

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.jobs import ray as jobs_ray
from clipkit.jobs import spark as jobs_spark
from clipkit.jobs.run import run_jobs
from clipkit.storage.files import clear_leftovers

SUPPORT = Path(__file__).parents[2] / "support"
MARK = "CLIPKIT_TEST_MARK"
ENGINES = ["ray", "spark"]


def marked(mark: str) -> dict[int, str]:
    """The living processes that carry the mark, and their commands."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0") and state != "Z":
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    return found


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark for the environment of what a test starts; nothing with it is left in the end."""
    yield from a_mark()


def a_mark() -> Iterator[str]:
    mark = secrets.token_hex(8)
    try:
        yield mark
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not marked(mark), seconds=30)
        assert marked(mark) == {}
    finally:
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class RayCluster:
    """The cluster of `ray_cluster.py`, and the environment by which a driver finds it."""

    def __init__(self, process: "subprocess.Popen[str]", environment: dict[str, str]) -> None:
        self.process, self.environment = process, environment

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    # A short path, because sockets lie below it; of its own, so that two clusters side by side don't meet.
    folder = tempfile.mkdtemp(prefix="ray-")
    for mark in a_mark():
        environment = {
            **os.environ,
            MARK: mark,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONWARNINGS": "ignore",
        }
        with subprocess.Popen(
            [sys.executable, SUPPORT / "ray_cluster.py"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, "the Ray cluster didn't start"
            yield RayCluster(process, {**environment, "RAY_ADDRESS": address})
            process.communicate()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def driver(
    engine: str, folder: Path, scenarios: list[str], mark: str, environment: dict[str, str] | None = None
) -> Iterator[tuple["subprocess.Popen[str]", IO[str]]]:
    """A driver and its standard output."""
    with (
        subprocess.Popen(
            [sys.executable, "-W", "error", SUPPORT / "job_driver.py", engine, folder, *scenarios],
            env={**(environment or os.environ), MARK: mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            process.kill()


def environment_of(engine: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """Ray's drivers join the cluster; Spark's start Spark in themselves."""
    if engine == "ray":
        cluster: RayCluster = request.getfixturevalue("ray_cluster")
        return cluster.environment
    return dict(os.environ)


TOGETHER = [
    "same", "nothing", "other_processes", "as_they_finish", "lost_workers", "poison", "user_error", "other_error",
    "a_few_of_a_million", "leaving",
]  # fmt: skip


@pytest.fixture(scope="module", params=ENGINES)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What came of each scenario that needs nothing done to it from outside, in one driver."""
    environment = environment_of(request.param, request)
    for mark in a_mark():
        folder = tmp_path_factory.mktemp(request.param)
        with driver(request.param, folder, TOGETHER, mark, environment) as (_, output):
            # Ray tells of lost workers late, when the jobs are over and the user's own cluster may speak again.
            yield dict(json.loads(line) for line in output if line.startswith("["))


def test_the_results_are_those_of_the_local_engine(outcomes: dict[str, Any]) -> None:
    assert outcomes["same"] == [[number, 10 * number] for number in range(9)]
    assert outcomes["nothing"] == []
    assert outcomes["other_processes"] is False


def test_results_come_as_items_finish(outcomes: dict[str, Any]) -> None:
    assert sorted(outcomes["as_they_finish"]) == [0, 1, 2, 3, 4, 5] and outcomes["as_they_finish"][-1] == 0


def test_items_of_lost_workers_are_done_by_others(outcomes: dict[str, Any]) -> None:
    assert outcomes["lost_workers"] == [[number, number * number] for number in range(6)]


def test_an_item_that_kills_every_worker_is_named(outcomes: dict[str, Any]) -> None:
    kind, message, _ = outcomes["poison"]
    assert kind == "UserError" and "\n" not in message
    assert message.startswith("a worker died 3 times while working on shard 00003 (its process ended")
    assert "run the same command again" in message


def test_exceptions_keep_their_type_and_name_their_item(outcomes: dict[str, Any]) -> None:
    assert outcomes["user_error"] == [
        "UserError", "shard 3 is damaged: build it again", ["while working on shard 00003"]
    ]  # fmt: skip
    kind, _, notes = outcomes["other_error"]
    assert kind == "ZeroDivisionError" and "in divide" in notes[0] and notes[1] == "while working on shard 00003"


def test_a_million_items_are_not_handed_in_at_once(outcomes: dict[str, Any]) -> None:
    assert outcomes["a_few_of_a_million"] < 20


def test_leaving_early_ends_the_work(outcomes: dict[str, Any]) -> None:
    assert outcomes["leaving"] == 2


def test_an_engine_that_runs_already_is_used_and_left(outcomes: dict[str, Any]) -> None:
    assert outcomes["still runs"] is True


def workers_of(folder: Path) -> list[int]:
    return [int(line.split()[1]) for line in (folder / "runs").read_text().splitlines()]


def started(folder: Path, count: int) -> bool:
    """Whether so many items have come to the middle of their files."""
    return sum(len(list(folder.glob(f".{number:05d}.bin.*"))) for number in range(4, 8)) >= count


def wanted_bytes() -> dict[str, bytes]:
    return {
        f"{number:05d}.bin": b"".join(hashlib.sha256(f"{number} {part}".encode()).digest() * 1000 for part in range(8))
        for number in range(8)
    }


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".bin"}


@pytest.mark.parametrize("engine", ["local", *ENGINES])
def test_a_driver_that_was_killed_ends_in_the_same_bytes(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path, mark: str
) -> None:
    environment = environment_of(engine, request)
    with driver(engine, tmp_path, ["write"], mark, environment) as (process, output):
        finished = [json.loads(output.readline()) for _ in range(4)]
        assert [(word, own_signals) for word, _, own_signals in finished] == [("finished", True)] * 4
        wait_until(lambda: started(tmp_path, 2))
        process.kill()
        process.wait()
        wait_until(lambda: not any(alive(pid) for pid in workers_of(tmp_path)), seconds=30)
    (tmp_path / "go").touch()
    assert written(tmp_path) == {name: data for name, data in wanted_bytes().items() if name < "00004"}
    clear_leftovers(tmp_path)
    # Files are all that the next run needs, on whatever engine.
    with driver("local", tmp_path, ["write"], mark) as (_, output):
        assert ["write", 4] in [json.loads(line) for line in output]
    assert written(tmp_path) == wanted_bytes()
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_ends_all(engine: str, tmp_path: Path, mark: str) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        own = {**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token"}
        own |= {"RAY_AUTH_TOKEN": secrets.token_hex(16)}
        with driver(engine, tmp_path, ["write"], mark, own) as (process, _):
            wait_until(lambda: started(tmp_path, 2))
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == -signal.SIGINT
            assert time.monotonic() - begun < 30
            wait_until(lambda: not marked(mark), seconds=30)
    assert len(written(tmp_path)) == 4


def test_the_items_of_a_lost_machine_are_done_by_others(ray_cluster: RayCluster, tmp_path: Path, mark: str) -> None:
    with driver("ray", tmp_path, ["write"], mark, ray_cluster.environment) as (_, output):
        wait_until(lambda: started(tmp_path, 2))
        ray_cluster.tell("lose")
        wait_until(lambda: len([pid for pid in set(workers_of(tmp_path)) if alive(pid)]) == 1)
        (tmp_path / "go").touch()
        assert ["write", 8] in [json.loads(line) for line in output]
    ray_cluster.tell("add")
    runs = (tmp_path / "runs").read_text().split("\n")
    assert len(runs) - 1 == 9  # one item was begun twice
    clear_leftovers(tmp_path)
    assert written(tmp_path) == wanted_bytes()


FLEET = ["zeroshot", "--ckpt", "models/1", "--ckpt", "models/2", "--data", "sets/a", "--data", "sets/b", "--json"]
FLEET += ["--templates", "plain", "--device", "cpu", "--no-cache"]
SWEEP = ["sweep", "mine.toml", "--device", "cpu", "--workers", "0"]


def commands_on_ray(folder: Path, environment: dict[str, str]) -> None:
    """Both commands, in a process that has joined the cluster: then its workers import clipkit once."""
    os.chdir(folder)
    os.environ.update(environment)
    import ray  # which reads the environment

    ray.init(address=environment["RAY_ADDRESS"], log_to_driver=False, logging_level="CRITICAL")
    for command in (FLEET, SWEEP):
        main([*command, "--engine", "ray", "--out", f"{command[0]}-ray"], standalone_mode=False)


@pytest.fixture(scope="module")
def commanded(
    ray_cluster: RayCluster, pairs_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Where both commands have left their files, and what they print: in this process, and on Ray."""
    folder = tmp_path_factory.mktemp("commands")
    for seed in (1, 2):
        small_run(folder / "models" / str(seed), seed)
    for name in ("a", "b"):
        for number in range(4):
            pictures = folder / "sets" / name / f"{name} class {number % 2}"
            pictures.mkdir(parents=True, exist_ok=True)
            (pictures / f"{number}.png").write_bytes(picture(number))
    text = f'base = "debug"\ndata = {json.dumps(str(pairs_dataset))}\nbudgets = [64]\n[eval]\ndata = "sets/a"\n'
    text += "[set]\nstages.0.warmup_samples = 16\n[image]\ntokens = [16, 4]\n[text]\ntokens = [16]\n"
    (folder / "mine.toml").write_text(text)
    printed = []
    with contextlib.chdir(folder):
        for command in (FLEET, SWEEP):
            done = CliRunner().invoke(main, [*command, "--out", f"{command[0]}-local"], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            printed += done.stdout.splitlines()
    environment = {name: value for name, value in ray_cluster.environment.items() if name.startswith("RAY_")}
    for mark in a_mark():
        (on_ray,) = run_ranks(commands_on_ray, folder, {**environment, MARK: mark}, ranks=1)
        yield folder, printed, on_ray.splitlines()


def test_a_fleet_of_models_has_the_results_of_one_process(commanded: tuple[Path, list[str], list[str]]) -> None:
    folder, here, on_ray = commanded
    assert here[:12] == on_ray[:12] and all(line.startswith("{") for line in here[:12])
    one, other = (folder / f"zeroshot-{engine}" for engine in ("local", "ray"))
    names = sorted(path.relative_to(one) for path in one.rglob("*.*"))
    assert names == sorted(path.relative_to(other) for path in other.rglob("*.*")) and len(names) >= 6
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_sweep_has_the_table_of_one_process(commanded: tuple[Path, list[str], list[str]]) -> None:
    tables = [(commanded[0] / f"sweep-{engine}" / "table.csv").read_bytes() for engine in ("local", "ray")]
    assert tables[0] == tables[1] and tables[0].count(b"\n") == 3


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("spark", "pyspark")])
def test_a_missing_package_is_one_line(engine: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'clipkit\[{engine}\]'"):
        next(run_jobs(square, [1], engine=engine))


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match="nothing answers at the Ray cluster's address"):
        jobs_ray.connect(None, 2)
    monkeypatch.setenv("SPARK_MASTER", "sparc://x")
    with pytest.raises(UserError, match="SPARK_MASTER=sparc://x: give spark://HOST:PORT"):
        next(run_jobs(square, [1], engine="spark"))


@pytest.mark.parametrize(
    ("says", "problem"),
    [
        ('openjdk version "17.0.15" 2025-04-15', None),
        ('java version "21" 2023-09-19', None),
        ('java version "1.8.0_401"', "needs Java 17, and .* is java version"),
        ("cannot load", "needs Java 17, and .* is cannot load"),
    ],
)
def test_java_is_looked_at_before_spark_is(
    says: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    if problem is None:
        assert jobs_spark.java_problem() is None
    else:
        with pytest.raises(UserError, match=problem):
            next(run_jobs(square, [1], engine="spark"))


def test_a_missing_java_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"Spark needs Java, and there is none on the PATH: install Java 17"):
        next(run_jobs(square, [1], engine="spark"))
