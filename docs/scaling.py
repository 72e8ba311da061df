"""Draws docs/scaling.png from docs/scaling.jsonl, and prints the tables of docs/scaling.md.

The lines of docs/scaling.jsonl are those that `python benchmarks/build.py` prints for its sizes. Run
`python docs/scaling.py` after new ones have been put there.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
INK, GRID = "#1f2933", "#d5dae0"
STYLES = {"as they are": ("#2f6fb3", "o"), "--shuffle": ("#c2571a", "s"), "--dedup sha256": ("#2e8555", "^")}


def option_of(line: dict) -> str:
    """The name of the options that a line was measured with."""
    if "shuffle" in line["options"]:
        return "--shuffle"
    return "--dedup sha256" if "dedup" in line["options"] else "as they are"


def main() -> None:
    """Draw the plot and print the table."""
    lines = [json.loads(line) for line in (HERE / "scaling.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, (cost, memory) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, (colour, marker) in STYLES.items():
        chosen = [line for line in lines if option_of(line) == name]
        sizes = [line["samples"] for line in chosen]
        cost.plot(sizes, [line["microseconds_per_sample"] for line in chosen], marker=marker, color=colour, label=name)
        memory.plot(sizes, [line["peak_megabytes"] for line in chosen], marker=marker, color=colour, label=name)
    for axes, title, unit in ((cost, "Cost of a record", "µs of CPU"), (memory, "Peak of memory", "MB")):
        axes.set(xscale="log", ylim=(0, None), xlabel="records")
        axes.set_title(title, loc="left", color=INK)
        axes.set_ylabel(unit, color=INK)
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    cost.legend(frameon=False)
    figure.savefig(HERE / "scaling.png", dpi=130)
    print("| records | " + " | ".join(STYLES) + " |\n|---|" + "---|" * len(STYLES))
    for size in sorted({line["samples"] for line in lines}):
        cells = {option_of(line): line for line in lines if line["samples"] == size}
        row = [
            f"{cells[name]['microseconds_per_sample']:.0f} µs, {cells[name]['peak_megabytes']} MB" for name in STYLES
        ]
        print(f"| {size:,} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
