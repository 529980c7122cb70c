"""What a condition remembers of its tags: last readings, and windows of finite ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dynwatch.rules.base import Recent
from dynwatch.trends import RobustWindow


class Window(RobustWindow):
    """The last `size` finite numbers of a tag, with what expressions ask of them: a few microseconds each.

    Args:
        size: Numbers in the window.

    Example:
        >>> window = Window(3)
        >>> for number in [9.0, 1.0, 2.0, 6.0]:
        ...     window.add(number)
        >>> window.min, window.median, window.mean, window.max
        (1.0, 2.0, 3.0, 6.0)
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        # The sum as a whole number of the smallest floats, 2**-1074. So it is exact: it neither drifts nor
        # overflows, however long the run, and costs the same for a window of any length.
        self._sum = 0

    def add(self, number: float) -> None:
        """Take in a finite number; the oldest leaves."""
        if self.full:
            self._sum -= _in_smallest_floats(self._order[0])
        self._sum += _in_smallest_floats(number)
        super().add(number)

    @property
    def mean(self) -> float:
        """The mean, rounded once; NaN for an empty window."""
        return self._sum / (len(self) << 1074) if len(self) else math.nan

    @property
    def min(self) -> float:
        """The least number; NaN for an empty window."""
        return self._sorted[0] if self._sorted else math.nan

    @property
    def max(self) -> float:
        """The largest number; NaN for an empty window."""
        return self._sorted[-1] if self._sorted else math.nan

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._sum = sum(map(_in_smallest_floats, self._order))


def _in_smallest_floats(number: float) -> int:
    numerator, denominator = number.as_integer_ratio()
    return numerator << (1075 - denominator.bit_length())


class Memory:
    """What an expression remembers: the last reading of each tag, its windows, and the last readings as evidence.

    Args:
        tags: The tags of the expression.
        windows: Tag and size of each window.

    Example:
        >>> memory = Memory(["loss"], [("loss", 2)])
        >>> memory.take(0, {"loss": 4.0, "lr": 0.1}), memory.take(1, {"lr": 0.1})
        (True, False)
        >>> memory.take(2, {"loss": 2.0}), memory.latest["loss"], memory.windows["loss", 2].mean
        (True, 2.0, 3.0)
    """

    def __init__(self, tags: Iterable[str], windows: Iterable[tuple[str, int]]) -> None:
        self.latest: dict[str, float] = {}
        self.windows = {(tag, size): Window(size) for tag, size in windows}
        self.recent = {tag: Recent(tag) for tag in tags}
        self._windows_of = {tag: [w for (of, _), w in self.windows.items() if of == tag] for tag in self.recent}

    def take(self, step: int, readings: Mapping[str, float]) -> bool:
        """Take in the readings of a step; True if one of the tags has a new one and all tags have come by now."""
        new = False
        for tag, recent in self.recent.items():
            reading = readings.get(tag)
            if reading is None:
                continue
            number = float(reading)
            new = True
            self.latest[tag] = number
            recent.add(step, number)
            if math.isfinite(number):  # a NaN must not blind a window
                for window in self._windows_of[tag]:
                    window.add(number)
        return new and len(self.latest) == len(self.recent)

    def state_dict(self) -> dict[str, Any]:
        return {
            "latest": dict(self.latest),
            "windows": [window.state_dict() for window in self.windows.values()],
            "recent": {tag: recent.state_dict() for tag, recent in self.recent.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latest = dict(state["latest"])
        for window, saved in zip(self.windows.values(), state["windows"], strict=True):
            window.load_state_dict(saved)
        for tag, recent in self.recent.items():
            recent.load_state_dict(state["recent"][tag])
