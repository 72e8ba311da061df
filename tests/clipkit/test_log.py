import subprocess
import sys

import pytest

from clipkit.formatting import counted, duration, size_text
from clipkit.log import MetricsWriter, Progress, Writer, forget_metrics_after, read_metrics


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (60, "1m 00s"), (3725, "1h 02m"), (280_000, "3d 5h")]
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_amounts_are_said_in_a_unit_that_fits():
    amounts = (0, 950, 999.96, 12_345, 999_949, 999_960, 256e6, 1.5e12, 3.2e15)
    assert [size_text(count) for count in amounts] == (
        ["0 B", "950 B", "1.0 kB", "12.3 kB", "999.9 kB", "1.0 MB", "256.0 MB", "1.5 TB", "3.2 PB"]
    )


def test_progress_ends_with_one_plain_line_off_a_terminal(capsys):
    with Progress("train", 100, "samples", start=20) as progress:
        progress.update(100, "loss 1.0")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("train: 100/100 samples · ")
    assert err.endswith(" samples/s · loss 1.0\n")


def test_the_last_plain_line_comes_once(capsys, monkeypatch):
    monkeypatch.setattr("clipkit.log.PLAIN_LINE_SECONDS", 0.0)
    with Progress("build", 2, "shards") as progress:
        progress.update(1)
        progress.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["build: 1/2 shards", "build: 2/2 shards"]


def test_a_quiet_progress_says_nothing(capsys):
    with Progress("train", 2, quiet=True) as progress:
        progress.update(2)
    assert capsys.readouterr() == ("", "")


def test_metrics_are_read_back_and_forgotten_after_a_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for seen in (16, 32, 48):
        writer.write({"samples_seen": seen, "stage": "reduced", "loss": seen / 16})
    writer.close()
    forget_metrics_after(tmp_path, 32)
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0]


@pytest.mark.parametrize(
    "foreign",
    [
        b"[1, 2]", b"17", b"null", b'"text"', b"# my note", b"{}", b'{"loss": 1.0}', b'{"samples_seen": "16"}',
        b'{"samples_seen": true}', b'{"samples_seen": null}', b'{"samples_seen": 1e3}', b"\xff\xfe",
        b"step,loss", b"a\x0bb",
    ],
)  # fmt: skip
def test_lines_that_are_not_ours_stay_and_are_said(tmp_path, capsys, foreign):
    path = tmp_path / "metrics.jsonl"
    ours = [f'{{"samples_seen": {seen}, "loss": 1.0}}\n'.encode() for seen in (16, 32, 48)]
    path.write_bytes(ours[0] + foreign + b"\n\n" + ours[1] + ours[2] + foreign + b"\n" + b'{"samples_seen": 4')
    forget_metrics_after(tmp_path, 32)
    assert path.read_bytes() == ours[0] + foreign + b"\n\n" + ours[1] + foreign + b"\n"
    assert [line["samples_seen"] for line in read_metrics(tmp_path)] == [16, 32]
    says = f"Warning: {path}: 2 lines not of clipkit's, the first is line 2: left as they are\n"
    assert capsys.readouterr().err == says


def test_tensorboard_reads_what_was_written_and_tensorflow_was_not_needed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from clipkit.log import MetricsWriter\n"
        f"writer = MetricsWriter(Path({str(tmp_path)!r}))\n"
        "writer.write({'samples_seen': 16, 'stage': 'full', 'loss': 0.5}); writer.close()\n"
        "assert 'tensorflow' not in sys.modules\n"
        # TensorBoard's reader takes its own stand-in for TensorFlow when this module exists, which saves its import.
        "import types; sys.modules['tensorboard.compat.notf'] = types.ModuleType('notf')\n"
        "from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader\n"
        f"path = next((Path({str(tmp_path)!r}) / 'tensorboard').iterdir())\n"
        "events = list(LegacyEventFileLoader(str(path)).Load())\n"
        "assert events[0].file_version == 'brain.Event:2'\n"
        "assert events[1].session_log.status == events[1].session_log.START\n"
        "value = events[2].summary.value[0]\n"
        "print(events[2].step, value.tag, value.simple_value)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "16 loss 0.5"


def test_a_plain_writer_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = Writer()
    writer.write({"samples_seen": 1})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_one_of_a_thing_and_more():
    assert [counted(number, "shard") for number in (0, 1, 1024)] == ["0 shards", "1 shard", "1,024 shards"]
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]
