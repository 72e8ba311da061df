"""Numbers of many records in the form that a chart and a script want."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 24


@dataclass(frozen=True)
class Histogram:
    """`counts` between neighbouring `edges` (one more of these); values beyond the last edge are in the last bin."""

    n: int
    mean: float
    median: float
    low: float
    high: float
    counts: tuple[int, ...]
    edges: tuple[float, ...]


def histogram_of(values: Sequence[float], whole: bool = False) -> Histogram | None:
    """A histogram that a few huge values can't flatten: it ends at the 99th percentile. None without values.

    `whole`: the values are whole numbers, and so are the edges.
    """
    array = np.array([value for value in values if np.isfinite(value)], np.float64)
    if not len(array):
        return None
    low, high = float(array.min()), float(np.percentile(array, 99))
    if whole:
        low, high = np.floor(low), np.floor(high) + 1
        step = max(1, int(np.ceil((high - low) / BINS)))
        edges = np.arange(low, high + step, step)
    else:
        edges = np.linspace(low, high if high > low else low + (abs(low) or 1.0), BINS + 1)
    inside = np.minimum(array, np.nextafter(edges[-1], edges[0]))
    counts, _ = np.histogram(inside, bins=edges)
    return Histogram(
        n=len(array),
        mean=float(array.mean()),
        median=float(np.median(array)),
        low=float(array.min()),
        high=float(array.max()),
        counts=tuple(counts.tolist()),
        edges=tuple(edges.tolist()),
    )
