"""What a build tells: its progress while it runs, its counts when it is done."""

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from clipkit.log import Progress


@dataclass(frozen=True)
class BuildProgress:
    """How far a pass of a build is, its name being `phase`. What an earlier run finished counts as done.

    Bytes are those of the image shards while they are read, of records while these are gathered, and else items.
    """

    phase: str
    bytes_done: int
    bytes_total: int
    shards_done: int
    shards_total: int
    records: int
    skipped: int


class ProgressLines:
    """Shows a build's passes, one progress line each; use it as a context manager."""

    def __init__(self) -> None:
        self.phase = ""
        self.stack = ExitStack()

    def __call__(self, now: BuildProgress) -> None:
        counts_parts = now.phase in ("comparing", "sorting")
        name, unit = ("parts", 1) if counts_parts else ("MB", 1_000_000) if now.bytes_total >= 10e6 else ("kB", 1000)
        if now.phase != self.phase:
            self.stack.close()
            self.phase = now.phase
            label = "build-tfds" if now.phase == "writing" else f"build-tfds, {now.phase}"
            self.line = self.stack.enter_context(Progress(label, now.bytes_total // unit, name, now.bytes_done // unit))
        skipped = f", {now.skipped:,} {'duplicates' if now.phase == 'comparing' else 'skipped'}" if now.skipped else ""
        # What is written may be parts on the way, which are gathered into shards.
        what = "shards" if now.phase == "gathering" else "parts"
        parts = "" if counts_parts else f"{now.shards_done:,}/{now.shards_total:,} {what}, "
        note = f"{parts}{now.records:,} records{skipped}"
        self.line.update(now.bytes_done // unit, note)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, trace)
