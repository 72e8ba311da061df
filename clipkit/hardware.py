"""What makers publish of the chips that models are trained on: what a run's use of them is measured by (`device`), and
what a run is planned with (`train.plan`). Nothing here is measured.
"""

import difflib
import os
import re
from typing import NamedTuple

from clipkit.errors import UserError


class Chip(NamedTuple):
    """A chip by its data sheet."""

    name: str
    """As `--devices` takes it."""
    found_as: str
    """A pattern of the name that the chip's runtime gives it, or of TPU_ACCELERATOR_TYPE."""
    tflops: float
    """Dense bfloat16 peak, 10^12 operations a second, products summed in float32; NVIDIA's sheets mostly give twice as
    much, with sparsity."""
    float32_tflops: float
    """The same for factors of float32, not rounded to TF32; of a TPU, which has bfloat16 only, in three passes."""
    memory_gb: float
    bandwidth_gb: float
    """Of the memory, 10^9 bytes a second."""
    link_gb: float
    """To the other chips of the host, over all links together, 10^9 bytes a second in one direction."""
    source: str
    price: float
    """A device's usual rent an hour in US dollars, about 2026: an assumption, for the plan's `--price` to replace."""


AMPERE, ADA = "NVIDIA's data sheet; whitepaper on GA102", "NVIDIA's data sheet; whitepaper on Ada"
TPU = "docs.cloud.google.com/tpu/docs"
# The first whose pattern is in the runtime's name counts.
CHIPS = (
    Chip("H100-PCIe", "H100 PCIe", 756, 51, 80, 2000, 64, "NVIDIA's data sheet", 2.2),
    Chip("H100-NVL", "H100 NVL", 835, 60, 94, 3900, 300, "NVIDIA's data sheet", 2.4),
    Chip("H100-SXM", "H100", 989, 67, 80, 3350, 450, "NVIDIA's data sheet", 2.8),
    Chip("H200-NVL", "H200 NVL", 835, 60, 141, 4800, 450, "NVIDIA's data sheet", 3.0),
    Chip("H200", "H200", 989, 67, 141, 4800, 450, "NVIDIA's data sheet", 3.5),
    Chip("GB200", "GB200", 2500, 80, 186, 8000, 900, "NVIDIA's data sheet", 7.0),
    Chip("B200", "B200", 2250, 75, 180, 7700, 900, "NVIDIA's data sheet of DGX B200", 5.5),
    Chip("A100-80GB", r"A100\b.*\b80GB", 312, 19.5, 80, 2039, 300, "NVIDIA's data sheet (SXM)", 1.8),
    Chip("A100-40GB", "A100", 312, 19.5, 40, 1555, 300, "NVIDIA's data sheet (SXM)", 1.3),
    Chip("A10G", "A10G", 70, 31.5, 24, 600, 32, "NVIDIA's data sheet; AWS's page on G5", 1.0),
    Chip("A10", "A10", 125, 31.2, 24, 600, 32, "NVIDIA's data sheet", 0.75),
    Chip("A40", "A40", 149.7, 37.4, 48, 696, 32, "NVIDIA's data sheet", 0.45),
    Chip("L40S", "L40S", 362, 91.6, 48, 864, 32, "NVIDIA's data sheet", 0.9),
    Chip("L40", "L40", 181, 90.5, 48, 864, 32, "NVIDIA's data sheet", 0.8),
    Chip("L4", "L4", 121, 30.3, 24, 300, 32, "NVIDIA's data sheet", 0.7),
    Chip("RTX-3090", "RTX 3090", 71, 35.6, 24, 936, 32, AMPERE, 0.25),
    Chip("RTX-4090", "RTX 4090", 165.2, 82.6, 24, 1008, 32, ADA, 0.4),
    Chip("RTX-5090", "RTX 5090", 209.5, 104.8, 32, 1792, 64, "NVIDIA's whitepaper on RTX Blackwell", 0.7),
    Chip("MI300X", "MI300X", 1307.4, 163.4, 192, 5300, 448, "AMD's data sheet", 2.5),
    Chip("TPU-v4", "v4", 275, 91.7, 32, 1228, 300, TPU, 3.22),
    Chip("TPU-v5e", "v5litepod", 197, 65.7, 16, 819, 200, TPU, 1.2),
    Chip("TPU-v5p", "v5p", 459, 153, 95, 2765, 600, TPU, 4.2),
    Chip("TPU-v6e", "v6e", 918, 306, 32, 1640, 448, TPU, 2.7),
)


def find_chip(runtime_name: str) -> Chip | None:
    """The chip whose runtime calls it so; None where it isn't known."""
    for chip in CHIPS:
        if re.search(rf"\b{chip.found_as}\b(?!.* (Laptop|D|MIG)\b)", runtime_name):
            return chip
    return None


def this_cpu(cores: int) -> Chip:
    """This machine as a chip, by rule of thumb: 50 GFLOP/s of float32 a core, 10 GB/s of memory for each two cores."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip(
        "cpu",
        "CPU",
        0.05 * cores,
        0.05 * cores,
        memory / 1e9,
        5.0 * cores,
        10,
        "rule of thumb: measure with --measure",
        0.0,
    )


def parse_devices(text: str, cores: int) -> tuple[int, Chip]:
    """The number and kind of `8xA100-80GB`; `cpu` is this machine, which has so many cores.

    Raises UserError, with the nearest names, for a chip that isn't in the table.
    """
    match = re.fullmatch(r"(?:(\d+) *[xX×*] *)?([A-Za-z].*)", text.strip())
    if not match or (match[1] and not 1 <= int(match[1]) <= 1_000_000):
        raise UserError(f"--devices {text}: write it as NUMBERxNAME, such as 8xA100-80GB")
    count, name = int(match[1] or 1), match[2].strip()
    known = {_plain(chip.name): chip for chip in (*CHIPS, this_cpu(cores))}
    if _plain(name) in known:
        return count, known[_plain(name)]
    alike = [chip.name for plain, chip in known.items() if plain.startswith(_plain(name))]
    if len(alike) == 1:
        return count, known[_plain(alike[0])]
    if alike:
        raise UserError(f"--devices {text}: unknown device {name!r}: did you mean {' or '.join(alike)}?")
    likely = difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.5)
    names = [known[plain].name for plain in likely or difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.0)]
    remedy = f"did you mean {' or '.join(names)}?" if likely else f"the nearest that plan knows are {', '.join(names)}"
    raise UserError(f"--devices {text}: unknown device {name!r}: {remedy}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")
