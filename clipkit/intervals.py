"""Intervals for what was counted."""

import math

Z_95 = 1.959963984540054  # two-sided 95% of the normal distribution


def wilson(value: float, n: float) -> tuple[float, float]:
    """The 95% score interval of a proportion seen in `n` independent trials (Wilson, 1927). `n` need not be whole.

    Unlike value ± 1.96 standard errors it stays inside 0..1 and has a width at 0 and at 1.
    """
    if n <= 0:
        return 0.0, 1.0
    z2 = Z_95 * Z_95
    centre = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(value * (1 - value) / n + z2 / (4 * n * n))
    # The two ends are exact where nothing or everything is right; rounding must not push them past the value.
    return max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))
