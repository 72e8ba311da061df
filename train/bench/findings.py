"""What was measured of the loader, what follows from it, and how it is shown to people and scripts."""

import math
from dataclasses import dataclass
from typing import Any

from clipkit.config import to_json
from clipkit.formatting import counted, print_table, size_text

COMPACT_QUALITY = 90
# A change that brings less than this isn't worth a second copy of a dataset.
WORTH = 1.2
# Workers that compute less than this share of their time wait for something.
BUSY = 0.75
# Shares of a sample's cost from which on a phase is worth a word.
MUCH_TEXT, MUCH_READING = 0.1, 0.25


@dataclass(frozen=True)
class Need:
    """Samples a second, and who needs them."""

    who: str
    samples_per_s: float


# One H100 at half of its dense bf16 peak, at two of CLIPA's published lengths.
PUBLISHED = (
    Need("one H100, B/16 at 50 image and 16 text tokens", 13_500),
    Need("one H100, L/16 at 37 image and 8 text tokens", 5_600),
)


@dataclass(frozen=True)
class Compact:
    """What a copy with smaller images would bring, as tried on some images of the dataset."""

    side: int
    """Shorter side in pixels."""
    image_gain: float
    """How many times as fast an image becomes pixels."""
    bytes_gain: float
    """How many times smaller an encoded image is."""


@dataclass(frozen=True)
class Reading:
    """One thread that does nothing but read, on records that the loader hasn't touched."""

    megabytes_per_s: float
    image_bytes: float
    """Mean size of an encoded image."""
    waiting: float
    """Share of the time in which it waited for the disk or the network, not for a core, between 0 and 1."""
    precomputed: bool
    """Whether the records hold their token ids."""


@dataclass(frozen=True)
class Findings:
    """What `bench_data` measured. Phases are processor time in microseconds a sample."""

    data: str
    records: int
    image_size: int
    text_reduction: str
    workers: int
    cores: int
    samples: int
    seconds: float
    phases_us: dict[str, float]
    busy: float
    """Share of their time in which the workers computed, between 0 and 1."""
    reading: Reading
    compact: Compact | None
    needs: tuple[Need, ...]
    tokenizer: str = "clip-bpe"
    """Only this one's ids can be stored in a dataset."""
    compiled: bool = True
    """Whether the decoder of JPEGs was compiled when clipkit was installed."""

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds

    @property
    def samples_per_core_s(self) -> float:
        """What one core gives that does nothing else."""
        return 1e6 / sum(self.phases_us.values())

    @property
    def compact_gain(self) -> float:
        """How many times as fast a core would be on a compact copy: only what the images cost becomes less."""
        if self.compact is None:
            return 1.0
        total, image = sum(self.phases_us.values()), self.phases_us.get("image", 0.0)
        return total / (total - image + image / self.compact.image_gain)

    def cores_for(self, need: Need, gain: float = 1.0) -> int:
        """Cores that give `need` when each is `gain` times as fast as now."""
        return math.ceil(need.samples_per_s / (self.samples_per_core_s * gain))

    def to_json(self) -> dict[str, Any]:
        """The findings and what follows from them, as JSON values."""
        needs = [{**to_json(need), "cores": self.cores_for(need)} for need in self.needs]
        derived = {"samples_per_s": self.samples_per_s, "samples_per_core_s": self.samples_per_core_s, "needs": needs}
        return {**to_json(self), **derived, "compact_gain": self.compact_gain, "advice": advice(self)}


def advice(found: Findings) -> list[str]:
    """What to change, one sentence each, the cheapest change first."""
    lines = []
    need = found.needs[0]
    lacking = found.samples_per_s < need.samples_per_s
    total = sum(found.phases_us.values())
    cores = found.cores_for(need)
    if not lacking:
        lines.append(f"The loader gives what is needed ({need.who}).")
    elif found.busy < BUSY and found.reading.waiting > 1 - BUSY:
        lines.append(
            f"The workers wait {1 - found.busy:.0%} of their time, and one that only reads "
            f"{found.reading.waiting:.0%}: the disk or network gives one reader "
            f"{found.reading.megabytes_per_s:,.0f} MB/s. Copy the dataset to a faster disk, or use more workers than "
            "cores."
        )
    elif found.busy < BUSY:
        lines.append(
            f"The workers compute {found.busy:.0%} of their time though data come at once: other processes use the "
            "cores, or there are more workers than cores."
        )
    if not found.compiled:
        lines.append(
            "JPEGs take twice as long as they could: install a C compiler and then clipkit again, which compiles its "
            "decoder."
        )
    if lacking and cores > found.workers:
        here = f"--workers {cores}" if cores <= found.cores else f"this machine has {found.cores}"
        lines.append(
            f"More workers: {counted(cores, 'core')} give {need.samples_per_s:,.0f} samples/s as the data are ({here})."
        )
    if found.compact is not None and found.compact_gain >= WORTH:
        lines.append(
            f"A compact copy (clipkit build-tfds … --resize {found.compact.side} --quality {COMPACT_QUALITY}): "
            f"{found.compact_gain:.1f} times as many samples/s, {1 / found.compact.bytes_gain:.0%} of the bytes; "
            f"{counted(found.cores_for(need, found.compact_gain), 'core')} would do."
        )
    text = found.phases_us.get("text", 0.0) / total
    # Training reads stored columns for the syntax way only.
    storable = found.text_reduction == "syntax" and found.tokenizer == "clip-bpe"
    if text > MUCH_TEXT and storable and not found.reading.precomputed:
        lines.append(f"Text takes {text:.0%}: store it once with clipkit build-tfds … --precompute tokens,syntax.")
    read = found.phases_us.get("read", 0.0) / total
    if read > MUCH_READING:
        lines.append(f"Reading takes {read:.0%} of a core: smaller images, or a dataset of build-tfds, take less.")
    return lines


def print_findings(found: Findings) -> None:
    """The findings as tables for people, on stdout."""
    workers = counted(found.workers, "worker")
    print(
        f"{found.data}: {found.records:,} records, images of {size_text(found.reading.image_bytes)}\n"
        f"{found.samples_per_s:,.0f} samples/s at {found.image_size} px with {workers}, which computed "
        f"{found.busy:.0%} of their time; one core by itself gives {found.samples_per_core_s:,.0f}\n"
    )
    total = sum(found.phases_us.values())
    phases = [(phase, f"{value:,.0f}", f"{value / total:.0%}") for phase, value in found.phases_us.items()]
    print_table(("phase", "µs a sample", "share of a core"), [*phases, ("all", f"{total:,.0f}", "100%")])
    print()

    columns = ["needed by", "samples/s", "cores for it"]
    gains = [1.0]
    if found.compact is not None and found.compact_gain >= WORTH:
        columns.append("with a compact copy")
        gains.append(found.compact_gain)
    needs = [
        (need.who, f"{need.samples_per_s:,.0f}", *(str(found.cores_for(need, gain)) for gain in gains))
        for need in found.needs
    ]
    print_table(columns, needs)
    print()
    for line in advice(found):
        print(f"- {line}")
