"""What a person sees while long work runs, and what a script reads afterwards: progress, warnings and metrics.

Progress and warnings go to stderr, so that stdout stays for results.
"""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from clipkit.formatting import counted, duration
from clipkit.storage.files import append_json_line, read_json_lines, write_beside

if TYPE_CHECKING:
    from rich.progress import TaskID

PLAIN_LINE_SECONDS = 10.0


def warn_on_stderr(message: str) -> None:
    """Print a warning."""
    print(f"Warning: {message}", file=sys.stderr, flush=True)


class Progress:
    """One live line: what, how far, the rate, the time left, and a note (failures, what it waits for).

    On a terminal the line redraws itself; elsewhere a plain line is printed at most every ten seconds. A `quiet` one
    prints nothing, as on all ranks but the first.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "samples",
        start: int = 0,
        quiet: bool = False,
        rate: bool = True,
    ) -> None:
        """`rate` is False where the note has one."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.label, self.total, self.unit = label, total, unit
        self.first, self.done, self.note = start, start, ""
        self.started = self.printed = time.monotonic()
        self.quiet, self.rate = quiet, rate
        self.console = Console(stderr=True)
        self.live: Progress | None = None
        self.task: TaskID | None = None
        if self.console.is_terminal and not quiet:
            self.live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=False,
            )
            self.task = self.live.add_task(label, total=total, completed=start, text="")

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def update(self, done: int, note: str = "") -> None:
        """Show how much is done in all, with a note after the rate."""
        self.done, self.note = done, note
        now = time.monotonic()
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=done, text=self.text())
        elif not self.quiet and now - self.printed >= PLAIN_LINE_SECONDS and done != self.total:
            self.printed = now
            print(f"{self.label}: {self.text()}{self.remaining(now)}", file=sys.stderr, flush=True)

    def text(self) -> str:
        """Count, rate and note as on the line."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        note = f" · {self.note}" if self.note else ""
        rate = f" · {(self.done - self.first) / elapsed:,.0f} {self.unit}/s" if self.rate else ""
        return f"{count} {self.unit}{rate}{note}"

    def remaining(self, now: float) -> str:
        """The time left at the rate so far, for a plain line."""
        if self.total is None or self.done <= self.first:
            return ""
        seconds = (now - self.started) / (self.done - self.first) * (self.total - self.done)
        return f" · {duration(seconds)} left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        elif kind is None and not self.quiet:
            print(f"{self.label}: {self.text()}", file=sys.stderr, flush=True)


class Writer:
    """Where the numbers of a run go. This one writes nothing: for the ranks that don't write."""

    def write(self, values: dict[str, float | int | str]) -> None:
        """Write one line of metrics; `samples_seen` is its place on the x axis."""

    def rewind(self, samples_seen: int) -> None:
        """Drop what was written beyond a checkpoint: the run goes on from there."""

    def close(self) -> None:
        """Flush and close the files."""


class MetricsWriter(Writer):
    """`metrics.jsonl` for scripts and TensorBoard event files for people, in a run's folder.

    TensorBoard's own writer imports TensorFlow where it is installed, and TensorFlow must not enter a process that
    trains. Its event file is a TFRecord file of `Event` messages, so clipkit's record writer writes it.
    """

    def __init__(self, run: Path, samples_seen: int = 0) -> None:
        """Continue a run that has seen `samples_seen`."""
        from clipkit.formats.records import RecordWriter

        self.run, self.path = run, run / "metrics.jsonl"
        folder = run / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self.records = RecordWriter(folder / f"events.out.tfevents.{time.time_ns()}.clipkit")
        self.event(file_version="brain.Event:2")
        self.rewind(samples_seen)

    def rewind(self, samples_seen: int) -> None:
        """Drop the lines beyond a checkpoint, and have TensorBoard drop its own."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        forget_metrics_after(self.run, samples_seen)
        self.event(step=samples_seen, session_log=SessionLog(status=SessionLog.START))

    def write(self, values: dict[str, float | int | str]) -> None:
        """Append one line; every number but `samples_seen` becomes a TensorBoard scalar under its name."""
        append_json_line(self.path, values)
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in values.items()
            if name != "samples_seen" and not isinstance(value, str)
        ]
        self.event(step=int(values["samples_seen"]), summary=Summary(value=scalars))

    def event(self, **fields: object) -> None:
        """Append one TensorBoard event with the wall clock of now."""
        from tensorboard.compat.proto.event_pb2 import Event

        self.records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self.records.flush()

    def close(self) -> None:
        """Close the event file; the lines of metrics are on the disk already."""
        self.records.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, in order of samples seen; [] when there are none. Other lines are passed over."""
    return [line for line in read_json_lines(run / "metrics.jsonl") if is_metrics(line)]


def is_metrics(line: Any) -> bool:
    """Whether a value read from `metrics.jsonl` is a line of ours."""
    return isinstance(line, dict) and type(line.get("samples_seen")) is int


def forget_metrics_after(run: Path, samples_seen: int) -> None:
    """Drop the lines beyond a checkpoint, since a resumed run is going to write them again.

    Lines that aren't ours stay where they are, and a warning says so; a torn last one goes.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    kept, foreign, dropped = [], [], False
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if is_metrics(line):
                is_kept = line["samples_seen"] <= samples_seen
            else:
                is_kept = text.endswith("\n")
                foreign += [number] if text.strip() and is_kept else []
            kept += [text] if is_kept else []
            dropped |= not is_kept
    if foreign:
        lines = counted(len(foreign), "line")
        warn_on_stderr(f"{path}: {lines} not of clipkit's, the first is line {foreign[0]}: left as they are")
    if dropped:
        with write_beside(path) as temporary:
            temporary.write_bytes("".join(kept).encode("utf-8", errors="surrogateescape"))
