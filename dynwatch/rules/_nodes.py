"""What a condition on readings is made of, once it is parsed.

Evaluating a node raises nothing. A number that cannot be told (a NaN reading, a window that is not full, inf - inf,
a division by zero) is NaN, and a comparison with it is neither true nor false but unknown, None.

Example:
    >>> import operator
    >>> memory = Memory(["loss"], [("loss", 2)])
    >>> double = Arithmetic(Number(2.0), ((operator.mul, Windowed("min", "loss", 2)),))
    >>> rises = Comparison(Tag("loss"), operator.gt, double)
    >>> [memory.take(step, {"loss": loss}) and rises.holds(memory) for step, loss in enumerate([1.0, 3.0, 5.0])]
    [None, True, False]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from dynwatch.rules.memory import Memory


class Quantity(ABC):
    """A node that is a number."""

    @abstractmethod
    def value(self, memory: Memory) -> float:
        """The number; NaN if it cannot be told. All tags have come."""


class Condition(ABC):
    """A node that is true, false or unknown."""

    @abstractmethod
    def holds(self, memory: Memory) -> bool | None:
        """Whether it is true; None if that cannot be told. All tags have come."""


@dataclass(frozen=True)
class Number(Quantity):
    """A number as written."""

    number: float

    def value(self, memory: Memory) -> float:
        return self.number


@dataclass(frozen=True)
class Tag(Quantity):
    """The last reading of a tag."""

    tag: str

    def value(self, memory: Memory) -> float:
        return memory.latest[self.tag]

    def __str__(self) -> str:
        return self.tag


@dataclass(frozen=True)
class Windowed(Quantity):
    """A statistic of the last finite readings of a tag: "mean", "median", "min" or "max"."""

    function: str
    tag: str
    size: int

    def value(self, memory: Memory) -> float:
        window = memory.windows[self.tag, self.size]
        number: float = getattr(window, self.function) if window.full else math.nan
        return number

    def __str__(self) -> str:
        return f"{self.function}({self.tag}, {self.size})"


@dataclass(frozen=True)
class Absolute(Quantity):
    """The size of a number."""

    of: Quantity

    def value(self, memory: Memory) -> float:
        return abs(self.of.value(memory))


@dataclass(frozen=True)
class Negative(Quantity):
    """A number with its sign changed."""

    of: Quantity

    def value(self, memory: Memory) -> float:
        return -self.of.value(memory)


@dataclass(frozen=True)
class Arithmetic(Quantity):
    """Operations from left to right: flat, so that a long sum needs no deep recursion."""

    first: Quantity
    rest: tuple[tuple[Callable[[float, float], float], Quantity], ...]

    def value(self, memory: Memory) -> float:
        result = self.first.value(memory)
        for operate, quantity in self.rest:
            result = operate(result, quantity.value(memory))
        return result


@dataclass(frozen=True)
class Comparison(Condition):
    """Two numbers compared; unknown if one of them is NaN, also for "!="."""

    left: Quantity
    compare: Callable[[float, float], bool]
    right: Quantity

    def holds(self, memory: Memory) -> bool | None:
        left, right = self.left.value(memory), self.right.value(memory)
        return None if math.isnan(left) or math.isnan(right) else self.compare(left, right)


@dataclass(frozen=True)
class Not(Condition):
    """The opposite; the opposite of unknown is unknown."""

    of: Condition

    def holds(self, memory: Memory) -> bool | None:
        held = self.of.holds(memory)
        return None if held is None else not held


@dataclass(frozen=True)
class Joined(Condition):
    """Conditions joined by "or" (decisive True) or by "and" (decisive False).

    A decisive part decides, whatever the others; else an unknown part makes the whole unknown (Kleene's logic).
    """

    parts: tuple[Condition, ...]
    decisive: bool

    def holds(self, memory: Memory) -> bool | None:
        result: bool | None = not self.decisive
        for part in self.parts:
            held = part.holds(memory)
            if held is self.decisive:
                return held
            if held is None:
                result = None
        return result
