"""A bounded memory of one tag's readings, for the terminal report."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_MOST_POINTS = 512


class Series:
    """Last, smallest and largest reading, and a thinned curve of at most 512 points.

    When the curve is full, every second point is dropped and only every second new one is kept from
    then on, so that it always spans the whole run.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last = math.nan
        self.smallest = math.inf
        self.largest = -math.inf
        self.points: list[float] = []
        self._stride = 1

    def add(self, value: float) -> None:
        if self.count % self._stride == 0:
            self.points.append(value)
            if len(self.points) > _MOST_POINTS:
                self.points = self.points[::2]
                self._stride *= 2
        self.count += 1
        self.last = value
        if math.isfinite(value):
            self.smallest = min(self.smallest, value)
            self.largest = max(self.largest, value)

    def sparkline(self, width: int = 24) -> str:
        """The curve as block characters; "!" where a reading was not finite."""
        return sparkline(self.points, width)


def sparkline(points: Sequence[float], width: int = 24) -> str:
    """Draw points as at most `width` block characters, each the mean of its share of the points.

    Example:
        >>> sparkline([1, 2, 3, 4])
        '▁▃▆█'
    """
    width = min(width, len(points))
    finite = [p for p in points if math.isfinite(p)]
    if not width:
        return ""
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    bars = ""
    for cell in range(width):
        share = points[cell * len(points) // width : (cell + 1) * len(points) // width]
        if not all(math.isfinite(p) for p in share):
            bars += "!"
            continue
        # Of quotients: sums and differences of the largest numbers may not fit.
        mean = math.fsum(p / len(share) for p in share)
        height = (mean / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.0
        bars += _BARS[min(int(height * (len(_BARS) - 1) + 0.5), len(_BARS) - 1)]
    return bars
