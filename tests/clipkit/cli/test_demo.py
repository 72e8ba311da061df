"""The demo's commands are those of the command line, it goes on where it was stopped, and leaves no child behind."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from clipkit import checkpoint
from clipkit.cli import demo
from clipkit.cli.main import main
from clipkit.errors import InternalError, UserError
from clipkit.formats.dataset import open_dataset
from clipkit.storage.files import read_json, read_json_lines, write_json_lines

run_child = demo.run_child
Fake = Callable[[list[str]], tuple[int, int]]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the commands: each leaves its output, and its name in this list."""
    names: list[str] = []

    def fake(arguments: list[str]) -> tuple[int, int]:
        names.append(arguments[2])
        students = demo.student_stages(tmp_path, "emoji-demo", "emoji-dr", [])
        for stage in [*demo.stages(tmp_path, "emoji-demo", []), *students]:
            if list(stage.arguments) == arguments[2:]:
                stage.output.parent.mkdir(parents=True, exist_ok=True)
                stage.output.touch()
        return 0, 10**9

    monkeypatch.setattr(demo, "run_child", fake)
    return names


ALL = ["download", "build-tfds", "train", "zeroshot", "zeroshot", "report"]


def test_the_commands_are_those_of_the_command_line(tmp_path: Path) -> None:
    settings = ["seed=3", "cadence.log_samples=16"]
    students = demo.student_stages(tmp_path, "debug", "emoji-dr", settings)
    for stage in [*demo.stages(tmp_path, "debug", settings), *students]:
        name, *arguments = stage.arguments
        command = main.commands[name]
        with command.make_context(name, arguments) as context:
            assert isinstance(context, click.Context)


def test_averages_are_measured_where_the_recipe_has_them(tmp_path: Path) -> None:
    def measured(recipe: str, *settings: str) -> list[bool]:
        return [
            "--ema" in stage.arguments for stage in demo.stages(tmp_path, recipe, settings) if "zeroshot" in stage.name
        ]

    assert measured("emoji-demo") == [True, True]
    assert measured("emoji-demo", "ema_decay=none") == measured("debug") == [False, False]


def test_stages_run_once(tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    demo.run_demo(tmp_path, limit=40)
    assert ran == ALL
    text = capsys.readouterr().out
    assert f"$ clipkit download {tmp_path}/urls.parquet {tmp_path}/shards --preset laion400m" in text
    assert f"The report: {tmp_path}/run/report.html" in text
    costs = read_json(tmp_path / "run" / "demo.json")["stages"]
    assert [cost["name"] for cost in costs][:3] == ALL[:3] and costs[0]["peak_memory_bytes"] == 10**9
    demo.run_demo(tmp_path, limit=40)
    assert ran == ALL
    assert capsys.readouterr().out.count("(done before") == 6


STUDENTS = ["train", "zeroshot", "train", "zeroshot", "reinforce", "train", "zeroshot", "report"]


def test_a_teacher_comes_after_the_demo(tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    demo.run_demo(tmp_path, limit=40)
    assert "side-by-side" not in capsys.readouterr().out
    demo.run_demo(tmp_path, limit=40, student="emoji-dr")
    assert ran == ALL + STUDENTS
    text = capsys.readouterr().out
    assert text.count("(done before") == 6
    assert f"The four runs side by side: {tmp_path}/side-by-side.html" in text


def test_what_follows_a_missing_output_runs_again(tmp_path: Path, ran: list[str]) -> None:
    demo.run_demo(tmp_path, limit=40)
    (tmp_path / "data" / "emoji" / "1.0.0" / "dataset_info.json").unlink()
    demo.run_demo(tmp_path, limit=40)
    assert ran == ALL + ALL[1:]


def test_another_recipe_runs_training_again(tmp_path: Path, ran: list[str]) -> None:
    demo.run_demo(tmp_path, limit=40)
    demo.run_demo(tmp_path, limit=40, settings=["seed=1"])
    assert ran == ALL + ALL[2:]


@pytest.mark.parametrize(("code", "kind", "message"), [
    (2, UserError, "the demo's build-tfds ended with exit code 2: fix what it says above"),
    (1, InternalError, "ended with exit code 1"),
    (-9, UserError, "was killed by SIGKILL"),
])  # fmt: skip
def test_failing_command_is_one_line_and_resumable(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception], message: str
) -> None:
    good: Fake = demo.run_child
    monkeypatch.setattr(demo, "run_child", lambda a: (code, 0) if a[2] == "build-tfds" else good(a))
    with pytest.raises(kind, match=message):
        demo.run_demo(tmp_path, limit=40)
    assert ran == ["download"]
    monkeypatch.setattr(demo, "run_child", good)
    demo.run_demo(tmp_path, limit=40)
    assert ran == ALL


def test_the_first_two_commands_for_real(tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Served, downloaded and built by child processes; of 150 URLs 4 are broken, in four of the five ways."""
    fake: Fake = demo.run_child
    monkeypatch.setattr(demo, "run_child", lambda a: run_child(a) if a[2] in ("download", "build-tfds") else fake(a))
    demo.run_demo(tmp_path, limit=150)
    told = read_json(tmp_path / "shards" / "clipkit" / "download.json")
    assert (told["rows"], told["downloaded"]) == (150, 146)
    assert told["failed"] == {"http-4xx": 1, "truncated": 1, "not-an-image": 1, "empty": 1}
    assert open_dataset(tmp_path / "data").num_records == 146
    assert all(cost["peak_memory_bytes"] > 30e6 for cost in read_json(tmp_path / "demo.json")["stages"][:2])
    assert ran == ALL[2:]


def test_second_run_serves_on_the_port_of_the_first(tmp_path: Path) -> None:
    with demo.serve_pictures(tmp_path, 7):
        before = (tmp_path / "urls.parquet").read_bytes()
    with demo.serve_pictures(tmp_path, 7):
        port = port_of(tmp_path)
        socket.create_connection(("127.0.0.1", port)).close()
    assert (tmp_path / "urls.parquet").read_bytes() == before
    (tmp_path / "shards").mkdir()
    with socket.create_server(("127.0.0.1", port)), demo.serve_pictures(tmp_path, 7):
        assert port_of(tmp_path) != port
        assert not (tmp_path / "shards").exists()  # made from a table that is no more
        socket.create_connection(("127.0.0.1", port_of(tmp_path))).close()
    with pytest.raises(UserError, match="holds a demo of 7 pairs, not 8"), demo.serve_pictures(tmp_path, 8):
        pass


def port_of(folder: Path) -> int:
    return int(pq.read_table(folder / "urls.parquet")["URL"][0].as_py().split("/")[2].partition(":")[2])


def test_child_tells_its_exit_code_and_memory() -> None:
    code, memory = demo.run_child(["-c", "import sys; block = bytearray(200 << 20); sys.exit(5)"])
    assert code == 5 and 200 << 20 < memory < 2 << 30
    assert demo.run_child(["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])[0] == -9
    assert demo.run_child(["-c", "import os; assert '127.0.0.1' in os.environ['no_proxy']"])[0] == 0


PARENT = """
import signal
from clipkit import checkpoint
from clipkit.cli import demo
demo.run_child(["-c", "import signal; print('ready', flush=True); signal.pause()"])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_child_ends_with_the_demo(how: signal.Signals) -> None:
    """The child holds our pipe: reading to its end waits until the child is gone too."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        parent.send_signal(how)
        assert parent.stdout.read() == b""
    assert parent.returncode == -how


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write"):
        demo.run_demo(tmp_path / "file")


def test_chance_stands_only_beside_what_guessing_gives(tmp_path: Path) -> None:
    one = {"n": 100, "classes": 10, "task": "drawings", "data": "drawings", "samples_seen": 1, "checkpoint": "a"}
    top1 = {"metric": "top1", "value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1}
    error = {"metric": "calibration_error", "value": 0.15, "low": 0.127, "high": 0.171, "chance": 0.0}
    write_json_lines(tmp_path / "results.jsonl", [one | top1, one | error])
    first, second = demo.result_lines(tmp_path)
    assert first.endswith("50.0%   (95%: 40.0% to 60.0%; chance 10.0%)")
    assert second.endswith("15.0%   (95%: 12.7% to 17.1%)")


def test_importing_the_demo_is_light() -> None:
    script = "import sys, clipkit.cli.demo; print([m for m in ('numpy', 'torch', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


TINY: dict[str, Any] = {"recipe": "debug", "limit": 120, "settings": ["stages.0.samples=1600"]}
SCRIPT = f"""
import sys
from pathlib import Path
from clipkit.cli import demo
demo.emoji_parquet = {{"train": demo.emoji_parquet("train"), "heldout": Path(sys.argv[2])}}.__getitem__
demo.run_demo(Path(sys.argv[1]), **{TINY})
"""


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    """As many held-out pictures as the tiny demo trains on."""
    path = tmp_path / "heldout.parquet"
    pq.write_table(pq.read_table(demo.emoji_parquet("heldout")).slice(0, 120), path)
    return path


@pytest.fixture
def unbroken(tmp_path: Path, heldout: Path) -> Path:
    """A tiny demo with a teacher that nobody disturbed. Its commands run here, where everything is imported."""

    def run_here(arguments: list[str]) -> tuple[int, int]:
        done = CliRunner().invoke(main, arguments[2:])
        assert done.exit_code == 0, done.output
        return 0, 10**9

    student = tmp_path / "student.toml"
    student.write_text('base = "debug"\n[distill]\nweight = 1.0\nscale = 10.0\n')
    pictures = {"train": demo.emoji_parquet("train"), "heldout": heldout}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "emoji_parquet", pictures.__getitem__)
        patch.setattr(demo, "run_child", run_here)
        patch.setattr(demo, "VIEWS", 2)
        demo.run_demo(tmp_path / "unbroken", student=str(student), **TINY)
    return tmp_path / "unbroken"


def tiny_demo(out: Path, heldout: Path, stop_when: Callable[[str], bool] = lambda text: False) -> tuple[int, str]:
    """Run a tiny demo for real, and SIGKILL it as soon as `stop_when` holds of what it has printed."""
    out.mkdir(exist_ok=True)
    log = out.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", SCRIPT, str(out), str(heldout)], stdout=file, stderr=file
        )
        while process.poll() is None:
            if stop_when(log.read_text()):
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
    return process.returncode, log.read_text()


def outcome(out: Path) -> dict[str, object]:
    """What a demo ends with that must not depend on where it was killed."""
    results = [
        (line["task"], line["metric"], line["value"], line["n"])
        for line in read_json_lines(out / "run" / "results.jsonl")
    ]
    download = read_json(out / "shards" / "clipkit" / "download.json")
    return {
        "rows": (download["rows"], download["downloaded"], download["failed"]),
        "records": open_dataset(out / "data").num_records,
        "weights": (checkpoint.find(out / "run") / "model.safetensors").read_bytes(),
        "results": sorted(results),
        "pictures": read_json_lines(out / "run" / "metrics.jsonl")[-1]["samples_seen"],
    }


def test_killed_in_each_stage_the_demo_ends_the_same(tmp_path: Path, heldout: Path, unbroken: Path) -> None:
    """SIGKILL in every stage, for real, then once more to the end: as many records, the same weights and numbers."""
    out = tmp_path / "killed"
    moments: dict[str, Callable[[str], bool]] = {
        "download": lambda text: (out / "shards" / "clipkit" / "plan.json").exists(),
        "build-tfds": lambda text: (out / "data" / "emoji" / "1.0.0" / "clipkit").exists(),
        "train": lambda text: checkpoint.latest(out / "run") is not None,
        "zeroshot": lambda text: "$ clipkit zeroshot" in text,
        "zeroshot of groups": lambda text: "--label group" in text,
        "report": lambda text: "$ clipkit report" in text,
    }
    for stage, moment in moments.items():
        code, text = tiny_demo(out, heldout, moment)
        assert code == -signal.SIGKILL, text
        assert stage not in [cost.name for cost in demo.read_costs(out / "demo.json")]
    code, text = tiny_demo(out, heldout)
    assert code == 0, text
    assert outcome(out) == outcome(unbroken)
    assert (out / "run" / "report.html").stat().st_size > 10_000


RUNS = ("run", "half-taught", "half", "teacher")


def test_one_page_shows_what_the_teacher_brought(unbroken: Path) -> None:
    """Two trainings that differ by the teacher alone, the teacher, and the first run, of which it is a longer one."""
    alone, taught = (read_json(unbroken / name / "config.json")["recipe"] for name in ("half", "half-taught"))
    assert (alone["distill"].pop("weight"), taught["distill"].pop("weight")) == (0.0, 1.0)
    assert alone == taught
    demo_samples, teacher_samples = (
        [stage["samples"] for stage in read_json(unbroken / name / "config.json")["recipe"]["stages"]]
        for name in ("run", "teacher")
    )
    assert teacher_samples == [3 * samples for samples in demo_samples]
    page = (unbroken / "side-by-side.html").read_text(encoding="utf-8")
    top = [read_json_lines(unbroken / name / "results.jsonl")[0] for name in RUNS]
    assert {line["metric"] for line in top} == {"top1"}
    for line, name in zip(top, RUNS, strict=True):
        assert name in page and f"{100 * line['value']:.1f}%" in page
