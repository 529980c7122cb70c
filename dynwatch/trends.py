"""Robust statistics of a stream of numbers: spread of a window, means over a whole run, and a trend test.

Non-finite numbers are for the caller to keep out.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

# Turns a median absolute deviation into a standard deviation, for normal numbers.
MAD_TO_SIGMA = 1.4826


class RobustWindow:
    """Median and median absolute deviation of the last `size` numbers, kept sorted: a few microseconds each.

    Args:
        size: Numbers in the window.

    Example:
        >>> window = RobustWindow(5)
        >>> for number in [1.0, 2.0, 3.0, 4.0, 500.0]:
        ...     window.add(number)
        >>> window.median, window.mad
        (3.0, 1.0)
    """

    def __init__(self, size: int) -> None:
        self._order: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []
        self._mad: float | None = None

    def __len__(self) -> int:
        return len(self._order)

    @property
    def full(self) -> bool:
        """Whether there are as many numbers as the window holds."""
        return len(self._order) == self._order.maxlen

    def add(self, number: float) -> None:
        """Take in a finite number; the oldest leaves."""
        if self.full:
            del self._sorted[bisect_left(self._sorted, self._order[0])]
        self._order.append(number)
        insort(self._sorted, number)
        self._mad = None

    @property
    def median(self) -> float:
        """The median; NaN for an empty window."""
        return _middle(self._sorted)

    @property
    def mad(self) -> float:
        """The median of the absolute deviations from the median; NaN for an empty window."""
        if self._mad is None:
            # The deviations to either side of the median are sorted as they lie: the list is two runs, and
            # sorting it is a merge.
            m, numbers = self.median, self._sorted
            self._mad = _middle(sorted([m - x if x < m else x - m for x in numbers]))
        return self._mad

    @property
    def sigma(self) -> float:
        """A robust standard deviation, 1.4826 times the MAD."""
        return MAD_TO_SIGMA * self.mad

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": list(self._order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order = deque(state["numbers"], maxlen=self._order.maxlen)
        self._sorted = sorted(self._order)
        self._mad = None


class RunMeans:
    """Means of a whole run in a bounded number of blocks of equal length.

    When there are `most` blocks, neighbours are merged and blocks are twice as long from then on: the
    blocks always span the run, in constant memory.

    Args:
        most: The most blocks, an even number.

    Example:
        >>> means = RunMeans(most=4)
        >>> for number in range(10):
        ...     _ = means.add(float(number))
        >>> means.blocks, means.block_length
        ([1.5, 5.5], 4)
    """

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self.block_length = 1
        self._means: list[float] = []
        self._mean, self._count = 0.0, 0

    def add(self, number: float) -> bool:
        """Take in a finite number; True if it has completed a block."""
        self._count += 1
        self._mean += (number - self._mean) / self._count  # of equal numbers exactly that number, unlike sum / count
        if self._count < self.block_length:
            return False
        if len(self._means) == self.most:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self.block_length *= 2
            if self._count < self.block_length:
                return False
        self._means.append(self._mean)
        self._mean, self._count = 0.0, 0
        return True

    def __len__(self) -> int:
        """How many numbers were taken in."""
        return len(self._means) * self.block_length + self._count

    @property
    def blocks(self) -> list[float]:
        """Means of the complete blocks, oldest first."""
        return list(self._means)

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.block_length, "means": list(self._means), "mean": self._mean, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.block_length, self._means = state["length"], list(state["means"])
        self._mean, self._count = state["mean"], state["count"]


def mann_kendall(numbers: Sequence[float]) -> float:
    r"""The Mann-Kendall test statistic for a monotone trend, in standard deviations.

    .. math:: S = \sum_{i<j} \mathrm{sign}(x_j - x_i), \qquad
        \mathrm{Var}\,S = \frac{n(n-1)(2n+5) - \sum_t t(t-1)(2t+5)}{18}

    with t the sizes of groups of ties, and :math:`z = (S - \mathrm{sign}\,S) / \sqrt{\mathrm{Var}\,S}`. Without a
    trend z is close to standard normal from about n = 8 on, whatever the numbers' distribution.

    Args:
        numbers: [n] finite numbers, in order; independent ones, so take means of blocks of a loss.

    Returns:
        z: positive for a rise, negative for a fall, 0 where nothing can be told (n < 2, or all the same).

    Source: Mann (1945); Kendall (1975), Rank Correlation Methods.

    Example:
        >>> round(mann_kendall([1.0, 2.0, 3.0, 4.0, 5.0]), 3)
        2.205
        >>> mann_kendall([1.0, 1.0, 1.0])
        0.0
    """
    n = len(numbers)
    if n < 2:
        return 0.0
    x = np.asarray(numbers, dtype=np.float64)
    later, earlier = x[None, :], x[:, None]
    # Compared rather than subtracted, so that differences of huge numbers cannot overflow.
    s = int(np.triu(later > earlier, 1).sum()) - int(np.triu(later < earlier, 1).sum())
    ties = np.unique(x, return_counts=True)[1].astype(np.int64)
    variance = (n * (n - 1) * (2 * n + 5) - int((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance == 0 or s == 0:
        return 0.0
    return (s - math.copysign(1, s)) / math.sqrt(variance)


def _middle(ordered: Sequence[float]) -> float:
    n = len(ordered)
    if n == 0:
        return math.nan
    half = n // 2
    return ordered[half] if n % 2 else (ordered[half - 1] + ordered[half]) / 2


class Row:
    """How many sparse readings in a row have met a condition; one that comes late begins a new row.

    A reading is late if it comes more than twice as long after the last one as usual: as the median of the last
    8 distances, or as the last one if that is larger.

    Example:
        >>> row = Row()
        >>> [row.add(step, met) for step, met in [(0, True), (50, True), (100, False), (150, True), (200, True)]]
        [1, 2, 0, 1, 2]
        >>> row.add(301, True)
        1
    """

    _STALE = 2.0

    def __init__(self) -> None:
        self.length = 0
        self._last: int | None = None  # step of the last reading
        self._gaps: deque[int] = deque(maxlen=8)  # steps from one reading to the next

    def add(self, step: int, met: bool) -> int:
        """Take in a reading; the length of the row that it ends."""
        if self._last is not None:
            gap = step - self._last
            if self._gaps and gap > self._STALE * max(median(self._gaps), self._gaps[-1]):
                self.length = 0
            if gap > 0:
                self._gaps.append(gap)
        self._last = step
        self.length = self.length + 1 if met else 0
        return self.length

    def state_dict(self) -> dict[str, Any]:
        """All of it, as primitives."""
        return {"length": self.length, "last": self._last, "gaps": list(self._gaps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.length, self._last = state["length"], state["last"]
        self._gaps = deque(state["gaps"], maxlen=self._gaps.maxlen)
