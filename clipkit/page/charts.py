"""Charts as inline SVG: text stays text, and colours come from the page, so they follow light and dark.

Every chart is drawn for a card of about 360 pixels, so that its text stays readable on a phone and the page lays out as
many side by side as fit.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from clipkit.formatting import share, short

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 30, 34
POINTS = 240

Scale = Callable[[float], float]
Show = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """One line of a chart, by its points in order of x. The style is a class of the page: a to f, or dashed."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "a"


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a name: a stage."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Bin:
    """Guesses whose confidence lies in start..stop: their mean confidence, and their accuracy with its interval."""

    start: float
    stop: float
    confidence: float
    accuracy: float
    low: float
    high: float
    n: int


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within low..high, at most `most` of them or so."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(xs: Sequence[float], ys: Sequence[float], most: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: means over equal stretches. Values that aren't numbers are left out."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    size = -(-len(pairs) // most) if pairs else 1
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [sum(x for x, _ in group) / len(group) for group in groups], [
        sum(y for _, y in group) / len(group) for group in groups
    ]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    bands: Sequence[Band] = (),
    is_share: bool = False,
    from_zero: bool = False,
    x_name: str = "samples seen",
    show_x: Show = short,
) -> str:
    """Lines over samples seen, with the stages shaded; `title` names the y axis and its unit. `show_x` writes a place
    on the x axis, such as the number that a logarithm stands for."""
    drawn = [Line(line.name, *thin(line.xs, line.ys), line.style) for line in lines]
    drawn = [line for line in drawn if line.xs]
    if not drawn:
        return empty_chart(title, "nothing logged yet")
    x_low = min([band.start for band in bands] + [min(line.xs) for line in drawn])
    x_high = max([band.stop for band in bands] + [max(line.xs) for line in drawn])
    y_values = [y for line in drawn for y in line.ys]
    y_low, y_high = (min(0.0, *y_values) if from_zero else min(y_values)), max(y_values)
    pad = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 1.0
    y_low, y_high = (y_low if from_zero and y_low >= 0 else y_low - pad), y_high + pad
    x_span = (x_high - x_low) or 1.0

    def px(x: float) -> float:
        return LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    show = share if is_share else short
    parts = [
        f'<rect class="band band{number % 2}" x="{px(band.start):.1f}" y="{TOP}" '
        f'width="{max(0.0, px(band.stop) - px(band.start)):.1f}" height="{HEIGHT - TOP - BOTTOM}">'
        f"<title>stage {escape(band.name)}</title></rect>"
        for number, band in enumerate(bands)
    ]
    parts += y_axis(y_low, y_high, py, show) + x_axis(x_low, x_high, px, x_name, show_x)
    for line in drawn:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if len(line.xs) <= 12 and line.style != "dashed":
            dots = zip(line.xs, line.ys, strict=True)
            parts += [f'<circle class="dot {line.style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6"/>' for x, y in dots]
    # What the pointer reads: a place on the x axis and what to say there.
    reader = max(drawn, key=lambda line: len(line.xs))
    said = [[round(px(x), 1), f"{show_x(x)}: {reading(drawn, x, show)}"] for x in reader.xs]
    legend = "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in drawn if len(drawn) > 1)
    return frame(title, "".join(parts), said, legend)


def reading(lines: Sequence[Line], x: float, show: Show) -> str:
    """The values of all lines at the point nearest to x."""
    texts = []
    for line in lines:
        if line.style != "dashed":
            _, nearest_y = min(zip(line.xs, line.ys, strict=True), key=lambda point: abs(point[0] - x))
            value = show(nearest_y)
            texts.append(f"{line.name} {value}" if len(lines) > 1 else value)
    return ", ".join(texts)


def frame(title: str, inside: str, said: Sequence[Sequence[object]] = (), legend: str = "") -> str:
    """A figure with the axis' name on top and the reading line under the pointer."""
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-said="{escape(json.dumps(said, separators=(",", ":")))}">'
        f'<text class="title" x="0" y="13">{escape(title)}</text>{inside}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="said" x="{WIDTH - RIGHT}" y="13"></text></svg>'
        + (f"<figcaption>{legend}</figcaption>" if legend else "")
        + "</figure>"
    )


def empty_chart(title: str, why: str) -> str:
    """A card that says why there is nothing to draw."""
    middle = (HEIGHT - BOTTOM + TOP) / 2
    return frame(title, f'<text class="tick" x="{WIDTH / 2}" y="{middle}" text-anchor="middle">{escape(why)}</text>')


def y_axis(low: float, high: float, py: Scale, show: Show) -> list[str]:
    """Grid lines with their values at the left."""
    parts = []
    for tick in ticks(low, high, 4):
        y = py(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{show(tick)}</text>')
    return parts


def x_axis(low: float, high: float, px: Scale, name: str, show: Show = short) -> list[str]:
    """Values below the axis and its name below those."""
    base = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for tick in ticks(low, high, 4):
        # A label at the right edge ends there instead of being cut off.
        anchor = "end" if px(tick) > WIDTH - RIGHT - 10 else "middle"
        parts.append(
            f'<text class="tick" x="{px(tick):.1f}" y="{base + 14}" text-anchor="{anchor}">{show(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(name)}</text>')
    return parts


def histogram(
    title: str,
    counts: Sequence[int],
    edges: Sequence[float],
    *,
    x_name: str,
    marks: Sequence[tuple[float, str]] = (),
    show_x: Show = short,
) -> str:
    """Counts between neighbouring edges (one more than counts), with named upright marks."""
    total = sum(counts)
    if not total:
        return empty_chart(title, "no data")
    shares = [count / total for count in counts]
    low, high = edges[0], max([edges[-1], *(mark for mark, _ in marks)])
    # Head room for the names of the marks.
    top = max(shares) * (1.08 + 0.14 * len(marks))

    def px(x: float) -> float:
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = y_axis(0, top, py, share)
    for value, start, stop in zip(shares, edges, edges[1:], strict=False):
        width = max(0.5, px(stop) - px(start) - 1)
        parts.append(
            f'<rect class="bar" x="{px(start) + 0.5:.1f}" y="{py(value):.1f}" width="{width:.1f}" '
            f'height="{max(0.0, HEIGHT - BOTTOM - py(value)):.1f}" rx="1">'
            f"<title>{show_x(start)} to {show_x(stop)}: {share(value)}</title></rect>"
        )
    parts += x_axis(low, high, px, x_name, show_x)
    for number, (mark, name) in enumerate(marks):
        x = px(mark)
        right = x > WIDTH * 0.62
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick strong" x="{x + (-4 if right else 4):.1f}" y="{TOP + 9 + 13 * number}" '
            f'text-anchor="{"end" if right else "start"}">{escape(name)}</text>'
        )
    return frame(title, "".join(parts))


def calibration_chart(title: str, bins: Sequence[Bin], x_name: str) -> str:
    """A reliability diagram: bars of accuracy over confidence with their intervals, beside the diagonal, where
    probabilities can be taken at their word."""

    def px(x: float) -> float:
        return LEFT + x * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    parts = y_axis(0, 1, py, share)
    for each in bins:
        x, width = px(each.start) + 0.5, px(each.stop) - px(each.start) - 1
        words = f"confidence {share(each.confidence)}, accuracy {share(each.accuracy)} of {each.n:,}"
        middle = (px(each.start) + px(each.stop)) / 2
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{py(each.accuracy):.1f}" width="{width:.1f}" '
            f'height="{py(0) - py(each.accuracy):.1f}" rx="1"><title>{words}</title></rect>'
            f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" y1="{py(each.low):.1f}" '
            f'y2="{py(each.high):.1f}"/>'
        )
    parts.append(f'<line class="line dashed" x1="{px(0)}" y1="{py(0)}" x2="{px(1)}" y2="{py(1)}"/>')
    parts += x_axis(0, 1, px, x_name, share)
    said = [[round((px(each.start) + px(each.stop)) / 2, 1), f"{share(each.accuracy)} of {each.n:,}"] for each in bins]
    return frame(title, "".join(parts), said)


def interval_strip(value: float, low: float, high: float, chance: float, top: float) -> str:
    """A dot with its interval on a line from 0 to `top`, and a tick at chance: one row of the results table."""
    scale = 100 / top
    label = f"{share(value)}, 95% interval {share(low)} to {share(high)}, chance {share(chance)}"
    return (
        f'<svg class="strip" viewBox="-2 0 104 14" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<line class="axis" x1="0" x2="100" y1="7" y2="7"/>'
        f'<line class="chance" x1="{chance * scale:.2f}" x2="{chance * scale:.2f}" y1="1" y2="13"/>'
        f'<rect class="range" x="{low * scale:.2f}" y="4" width="{max(0.6, (high - low) * scale):.2f}" height="6"/>'
        f'<rect class="value" x="{value * scale - 0.5:.2f}" y="2" width="1" height="10"/></svg>'
    )
