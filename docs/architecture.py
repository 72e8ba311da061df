"""Draws docs/rooms.svg from the one table of who may import whom, and writes the walks into docs/architecture.md.

`make docs` runs it; tests/house/test_architecture.py and test_walks.py fail when either is out of date.
"""

import ast
import json
import runpy
import subprocess
import sys
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
# The table is the tests' own, which are no package.
MAY_IMPORT = runpy.run_path(str(ROOT / "tests" / "support" / "rooms.py"))["MAY_IMPORT"]

WIDTH, BOX_HEIGHT, MARGIN = 1180, 46, 16
# From the top floor down: an arrow leads downwards, or sideways on one floor.
FLOORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("clipkit/cli: one command for each stage", ("clipkit/cli",)),
    (
        "tfrecord_tools/: a room for each command; they never import each other",
        tuple(
            f"tfrecord_tools/{name}"
            for name in ("download", "build", "in_place", "labelled", "purge", "captions", "verify", "inspection")
        ),
    ),
    (
        "tfrecord_tools/: what the commands share",
        tuple(f"tfrecord_tools/{name}" for name in ("web", "account", "rewriting", "readers")),
    ),
    ("", ("tfrecord_tools/writing", "tfrecord_tools/pictures", "tfrecord_tools/tables", "tfrecord_tools")),
    (
        "train/ and eval/",
        (
            "train/sweep",
            "train/bench",
            "train/plan",
            "train",
            "train/fit",
            "train/watch",
            "train/loader",
            "train/sources",
            "train/teachers",
        ),
    ),
    (
        "",
        (
            "eval/choice",
            "eval/probe",
            "eval/retrieval",
            "eval/search",
            "eval/classification",
            "eval/comparison",
            "eval/report",
            "eval",
        ),
    ),
    (
        "clipkit/: the core, which every stage may use",
        tuple(
            f"clipkit/{name}"
            for name in (
                "export",
                "interop",
                "embedding",
                "model",
                "text",
                "pixels",
                "page",
                "jobs",
                "formats",
                "storage",
            )
        ),
    ),
    ("", ("clipkit",)),
)
COLOURS = ("#1b6ca8", "#b5532a", "#2f7d4f", "#7a4b9d", "#a3831c", "#b03a5b", "#47707a", "#5b5b9a")
GAPS = (14, 62, 44, 14, 44, 62, 22, 14)  # below each floor, room for its arrows


def title(room: str) -> str:
    """A room as the picture names it; the files at the top of a stage are a room too."""
    return {"clipkit": "config · log · errors · device · …", "tfrecord_tools": "reasons · sample"}.get(
        room, room if room in ("train", "eval") else room.rpartition("/")[2]
    )


def draw() -> str:
    """The picture as SVG text."""
    assert {room for _, rooms in FLOORS for room in rooms} == set(MAY_IMPORT), "a room is missing from FLOORS"
    places: dict[str, tuple[float, float, float]] = {}  # left, top, width
    parts: list[str] = []
    top = MARGIN
    for number, (label, rooms) in enumerate(FLOORS):
        if label:
            parts.append(f'<text x="{MARGIN}" y="{top + 8}" class="label">{escape(label)}</text>')
            top += 16
        gap = 14
        width = min((WIDTH - 2 * MARGIN - gap * (len(rooms) - 1)) / len(rooms), 330)
        start = MARGIN + (WIDTH - 2 * MARGIN - width * len(rooms) - gap * (len(rooms) - 1)) / 2
        for place, room in enumerate(rooms):
            places[room] = (start + place * (width + gap), top, width)
        top += BOX_HEIGHT + GAPS[number]
    arrows = []
    for number, (room, others) in enumerate(MAY_IMPORT.items()):
        if room in ("clipkit", "clipkit/cli"):  # the commands' faces reach every stage; __main__ starts them
            continue
        for other in others:
            if other == "tfrecord_tools" or (other.startswith("clipkit/") and not room.startswith("clipkit/")):
                continue  # the core and the reasons are there for all; the core's rooms are named in the box
            arrows.append(arrow(places[room], places[other], COLOURS[number % len(COLOURS)]))
    boxes = []
    for room, (left, box_top, width) in places.items():
        core = [title(other) for other in MAY_IMPORT[room] if other.startswith("clipkit/")]
        uses = " · ".join(core) if core and not room.startswith("clipkit") else ""
        boxes.append(
            f'<rect x="{left:.0f}" y="{box_top:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="6" class="room"/>'
            f'<text x="{left + width / 2:.0f}" y="{box_top + (19 if uses else 28):.0f}" class="name">'
            f"{escape(title(room))}</text>"
        )
        lines = [" · ".join(core[:3]), " · ".join(core[3:])] if uses else []
        for number, line in enumerate(filter(None, lines)):
            y = box_top + 31 + 11 * number
            boxes.append(f'<text x="{left + width / 2:.0f}" y="{y:.0f}" class="uses">{escape(line)}</text>')
    style = (
        "text{font-family:system-ui,sans-serif;fill:#222}.label{font-size:12px;fill:#666}"
        ".name{font-size:14px;font-weight:600;text-anchor:middle}.uses{font-size:9px;fill:#666;text-anchor:middle}"
        ".room{fill:#f6f4ee;stroke:#8a8578}path{fill:none;stroke-width:1.4;opacity:.75}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" width="{WIDTH}">'
        f"<style>{style}</style>"
        f'<rect width="{WIDTH}" height="{top:.0f}" fill="#fff"/>\n'
        + "\n".join((*arrows, *boxes, *parts))
        + "\n</svg>\n"
    )


def arrow(source: tuple[float, float, float], target: tuple[float, float, float], colour: str) -> str:
    """A curve from the lower edge of a box to the upper edge of another, or between the sides of neighbours."""
    x1, y1 = source[0] + source[2] / 2, source[1] + BOX_HEIGHT
    x2, y2 = target[0] + target[2] / 2, target[1]
    if source[1] == target[1]:  # on one floor: a bow below the boxes
        y2 = y1
        bow = 14 + abs(x2 - x1) / 14
        shape = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bow:.0f} {x2:.0f} {y1 + bow:.0f} {x2:.0f} {y2:.0f}"
    else:
        middle = (y1 + y2) / 2
        shape = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{shape}" stroke="{colour}"/><circle cx="{x2:.0f}" cy="{y2:.0f}" r="3" fill="{colour}"/>'


def walks_text(walks: dict[str, list[str]]) -> str:
    """A list for each walk: its files in the order in which they are met, each with the first sentence about it."""
    titles = {
        "row": "A URL row to its TFRecord",
        "record": "A record to its training batch",
        "checkpoint": "A checkpoint to its zero-shot numbers",
    }
    parts = []
    for name, files in walks.items():
        parts.append(f"### {titles[name]}: {len(files)} files\n")
        for file in files:
            about = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
            sentence = " ".join(about.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
            parts.append(f"1. `{file}`: {sentence}")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    (HERE / "rooms.svg").write_text(draw(), encoding="utf-8")
    command = [sys.executable, ROOT / "tests" / "support" / "walks.py"]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    page = HERE / "architecture.md"
    before, start, rest = page.read_text(encoding="utf-8").partition("<!-- walks -->\n")
    _, end, after = rest.partition("<!-- end of walks -->")
    page.write_text(f"{before}{start}\n{walks_text(measured)}\n{end}{after}", encoding="utf-8")
