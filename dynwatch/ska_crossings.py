"""Where a series of numbers, such as a Tensor Net (`dynwatch.ska`), goes through zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynwatch.rules.base import check_number


@dataclass(frozen=True)
class Crossing:
    """Where a series changed its sign.

    Attributes:
        position: Index into the series, interpolated between the last value of the old sign and the value after it.
        rising: Whether it went from below zero to above.

    Example:
        >>> zero_crossings([-1.0, 1.0])
        [Crossing(position=0.5, rising=True)]
    """

    position: float
    rising: bool


def zero_crossings(values: Sequence[float], dead_band: float = 0.0) -> list[Crossing]:
    """Where a series, such as a Tensor Net step by step, goes through zero.

    A sign counts once a value with it lies beyond the dead band, so that noise around zero crosses nothing; the
    crossing is then put where the sign last changed. Values that are not finite are left out.

    Args:
        values: [n], in order.
        dead_band: Distance from zero up to which a value has no say.

    Returns:
        The crossings, in order.

    Raises:
        ValueError: If the dead band is negative, NaN or infinite.

    Example:
        >>> zero_crossings([3.0, 1.0, -0.1, 0.1, -1.0, -2.0], dead_band=0.5)
        [Crossing(position=3.090909090909091, rising=False)]
    """
    check_number("dead_band", dead_band, least=0.0, below=math.inf)
    points = [(index, float(value)) for index, value in enumerate(values) if math.isfinite(value)]
    crossings: list[Crossing] = []
    sign = 0.0
    last = -1  # the last of `points` with the sign that counts
    for place, (_, value) in enumerate(points):
        now = math.copysign(1.0, value)
        if abs(value) > dead_band and now == -sign:
            (i, a), (j, b) = points[last], points[last + 1]
            # The quotient of halves: a difference of two large numbers may not fit.
            share = (a / 2) / (a / 2 - b / 2) if a / 2 != b / 2 else 1.0
            crossings.append(Crossing(i + (j - i) * share, rising=now > 0))
        if abs(value) > dead_band:
            sign = now
        if value != 0 and now == sign:
            last = place
    return crossings
