"""Draws docs/token-reduction.png: the eight ways to reduce tokens, on one embedded image-caption pair.

Run `python docs/token_reduction.py` after a change to `clipkit/tokens.py`; it needs `clipkit[report,syntax]`.
"""

import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import torch
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from PIL import Image
from torch.nn import functional as F

from clipkit import counter_rng
from clipkit.embedded import emoji_parquet
from clipkit.text.syntax import ADJECTIVE, NOUN, OTHER, VERB, Syntax
from clipkit.text.tokenizer import Tokenizer
from clipkit.text.tokens import TextMethod, image_keep_indices, reduce_text

PAIR = ("fluent-emoji", "oncoming taxi")
PATCH = 8
KEEP = 36
TEXT_TOKENS = 10
KEYS = counter_rng.sample_keys(2, [12])

INK, GHOST, PAPER = "#1f2933", "#b8c0c8", "#ffffff"
COLOURS = {NOUN: "#2f6fb3", ADJECTIVE: "#c2571a", VERB: "#2e8555", OTHER: "#6b7684"}
NAMES = {NOUN: "noun", ADJECTIVE: "adjective", VERB: "verb", OTHER: "other"}


def load_pair(vendor: str, label: str) -> tuple[np.ndarray, str]:
    """uint8[96, 96, 3] and the caption."""
    rows = pq.read_table(emoji_parquet("train"), filters=[("vendor", "=", vendor), ("label", "=", label)]).to_pylist()
    image = Image.open(io.BytesIO(rows[0]["image"])).convert("RGB")
    return np.asarray(image), rows[0]["caption"]


def draw_image(
    ax: Any, image_HWC: np.ndarray, side: int, kept: np.ndarray, extent: float, title: str, note: str
) -> None:
    """The kept patches in colour, the rest faint, with the grid's lines; `extent` is the drawn size in full pixels."""
    full = image_HWC.shape[0]
    cell = full // side
    shown = 255 - (255 - image_HWC.astype(float)) * 0.13
    for index in kept:
        rows = slice(index // side * cell, (index // side + 1) * cell)
        columns = slice(index % side * cell, (index % side + 1) * cell)
        shown[rows, columns] = image_HWC[rows, columns]
    low, high = (96 - extent) / 2, (96 + extent) / 2
    ax.imshow(shown / 255, extent=(low, high, high, low), interpolation="nearest")
    ax.add_patch(Rectangle((0, 0), 96, 96, fill=False, edgecolor="#dde2e7", linewidth=0.8, linestyle=(0, (4, 3))))
    step = extent / side
    for index in range(side * side):
        corner = (low + index % side * step, low + index // side * step)
        ax.add_patch(Rectangle(corner, step, step, fill=False, edgecolor="#dde2e7", linewidth=0.5))
    for index in kept:
        corner = (low + index % side * step, low + index // side * step)
        ax.add_patch(Rectangle(corner, step, step, fill=False, edgecolor=INK, linewidth=0.9))
    ax.set(xlim=(-1, 97), ylim=(97, -1))
    ax.axis("off")
    ax.set_title(title, fontsize=13, fontweight="bold", color=INK, pad=20)
    ax.text(48, -4, note, ha="center", va="bottom", fontsize=9.5, color="#52606d")


def draw_captions(ax: Any, pieces: list[str], classes: list[int], rows: list[tuple[str, str, set[int]]]) -> None:
    """One line of tokens a method: those kept are coloured by the class of their word, the others pale."""
    widths = [0.6 + 0.27 * max(len(piece), 2) for piece in ["start", *pieces, "end"]]
    starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
    total = float(sum(widths))
    for line, (title, note, kept) in enumerate(rows):
        y = -line * 1.5
        ax.text(-0.5, y + 0.14, title, ha="right", va="bottom", fontsize=13, fontweight="bold", color=INK)
        ax.text(-0.5, y - 0.02, note, ha="right", va="top", fontsize=9.5, color="#52606d")
        for place, piece in enumerate(["start", *pieces, "end"]):
            special = place in (0, len(pieces) + 1)
            is_kept = special or place - 1 in kept
            colour = INK if special else COLOURS[classes[place - 1]]
            box = FancyBboxPatch(
                (starts[place] + 0.08, y - 0.42),
                widths[place] - 0.16,
                0.94,
                boxstyle="round,pad=0,rounding_size=0.14",
                facecolor=colour if is_kept else PAPER,
                edgecolor=colour if is_kept else "#dde2e7",
                linewidth=0.8,
            )
            ax.add_patch(box)
            middle = starts[place] + widths[place] / 2
            ax.text(middle, y + 0.03, piece, ha="center", va="center", fontsize=9, color=PAPER if is_kept else GHOST)
    ax.set(xlim=(-6.2, total), ylim=(-len(rows) * 1.5 + 0.7, 1.0))
    ax.axis("off")
    handles = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in COLOURS]
    ax.legend(handles=handles, loc="upper right", bbox_to_anchor=(1, 1.11), ncols=4, frameon=False, fontsize=9.5)


def main() -> None:
    image_HWC, caption = load_pair(*PAIR)
    side = image_HWC.shape[0] // PATCH
    tokenizer = Tokenizer()
    ids = tokenizer.encode([caption])
    classes = Syntax(tokenizer).priorities(ids)

    figure = plt.figure(figsize=(14, 8.9), facecolor=PAPER)
    upper, lower = figure.subfigures(2, 1, height_ratios=[3.85, 5.05])

    heading = {"x": 0.018, "ha": "left", "va": "top", "fontsize": 15, "color": "#52606d"}
    upper.text(s=f"Image tokens: {side * side} patches to {KEEP}", y=0.965, **heading)
    lower.text(s=f"Text tokens: {len(ids[0]) + 2} to {TEXT_TOKENS}, start and end always kept", y=0.965, **heading)
    image_axes = upper.subplots(
        1, 5, gridspec_kw={"wspace": 0.12, "left": 0.015, "right": 0.985, "top": 0.76, "bottom": 0.03}
    )
    everything = np.arange(side * side)
    draw_image(image_axes[0], image_HWC, side, everything, 96, "the image", "96 px")
    image_BCHW = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1)[None].float()
    small_BCHW = F.interpolate(image_BCHW, size=(48, 48), mode="bilinear", antialias=True, align_corners=False)
    small_HWC = small_BCHW[0].permute(1, 2, 0).round().numpy().astype(np.uint8)
    draw_image(image_axes[1], small_HWC, side // 2, np.arange(KEEP), 48, "resize", "48 px")
    notes = {"random": "any 36 patches", "grid": "one patch of each 2 × 2", "block": "one rectangle"}
    for ax, (method, note) in zip(image_axes[2:], notes.items(), strict=True):
        kept = image_keep_indices(method, (side, side), KEEP, KEYS)[0]
        draw_image(ax, image_HWC, side, kept, 96, method, note)

    methods: list[tuple[TextMethod, str]] = [
        ("truncate", "the first"),
        ("random", "any, in order"),
        ("block", "neighbours"),
        ("syntax", "nouns, adjectives, verbs"),
    ]
    rows = [("the caption", f"{len(ids[0]) + 2} tokens", set(range(len(ids[0]))))]
    places = [list(range(1, len(ids[0]) + 1))]  # in place of ids, to learn which places stay
    for method, note in methods:
        kept = reduce_text(method, places, TEXT_TOKENS, KEYS, classes)[0, 1:-1] - 1
        rows.append((method, f"{TEXT_TOKENS}: {note}", set(kept.tolist())))
    pieces = [tokenizer.fast.id_to_token(token).removesuffix("</w>") for token in ids[0]]
    draw_captions(lower.add_axes((0.015, 0.01, 0.97, 0.86)), pieces, classes[0], rows)

    path = Path(__file__).with_name("token-reduction.png")
    figure.savefig(path, dpi=110, facecolor=PAPER)
    print(path)


if __name__ == "__main__":
    main()
