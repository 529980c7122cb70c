"""The critical learning rate as measured of late, in words for the advice of several rules."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynwatch.rules import tags
from dynwatch.rules.base import newest

# Up to this multiple of the critical rate a run may be healthy. It hovers there at the edge of stability
# (arXiv 2103.00065): past their first hundred steps, small networks under full-batch gradient descent reached 1.49 at
# single readings, and stayed at 1.4 where it was measured on a probe batch of 64 samples, whose eigenvalue is larger.
EDGE = 1.5


class CriticalRate:
    """The last critical learning rates, their steps, and the largest rate that the run has had since each.

    The newest counts while it is near: `NEAR` steps old at most, or as old as the last two readings lay apart. It
    decides whether the learning rate is to blame. What is advised is the largest of the last few that the learning
    rate exceeded: a run that blows up comes to sharper places, whose rate is far lower than what it would have borne.
    While the rule that owns it sees trouble (`calm` is False), no newer reading is taken beside one that is near: what
    a run has blown up to, sharp or flat, tells nothing of how it came there.

    Args:
        readings: How many of the last critical rates are kept, the newest among them.

    Example:
        >>> critical = CriticalRate()
        >>> critical.take(400, {"hessian/critical_lr": 0.036, "stop/lr": 0.5})
        >>> critical.words(460)[:80]
        'The learning rate 0.5 was 14 times the critical rate 0.036 (hessian/critical_lr '
        >>> critical.take(450, {"hessian/critical_lr": 0.001})  # in the blow-up
        >>> critical.words(460).endswith("set it below 0.036. ")
        True
        >>> critical.words(1000)
        ''
    """

    NEAR = 500

    def __init__(self, readings: int = 3) -> None:
        self._readings: deque[_Reading] = deque(maxlen=readings)  # oldest first
        self._apart = 0  # how many steps after the one before it the newest came
        self._lr: float | None = None  # the newest learning rate

    def take(self, step: int, readings: Mapping[str, float], calm: bool = True) -> None:
        """Take in the critical rate and the learning rate of a step, if they are among its readings.

        Args:
            step: The step.
            readings: Values by tag; of the critical rate only a positive finite one counts.
            calm: Whether the run looks well so far.
        """
        lr = newest(readings, tags.LR, None)
        if lr is not None:
            self._lr = lr
            for reading in self._readings:
                reading.lr = lr if reading.lr is None else max(lr, reading.lr)
        rate = newest(readings, tags.CRITICAL_LR, None)
        if rate is None or not rate > 0 or not (calm or self.near(step) is None):
            return
        if self._readings:
            self._apart = max(step - self._readings[-1].step, 0)
        self._readings.append(_Reading(rate, step, self._lr))

    def near(self, step: int) -> float | None:
        """The newest critical rate if its reading is near a step, else None."""
        if not self._readings:
            return None
        last = self._readings[-1]
        return last.rate if step - last.step <= max(self.NEAR, self._apart) else None

    def words(self, step: int, blamed: bool = False) -> str:
        """What the critical rate says of the learning rate: a sentence and a blank, or nothing without a near reading.

        Args:
            step: The step at which it is asked.
            blamed: Whether the rate is known to be too high. Then what would excuse it is not said.
        """
        if self.near(step) is None:
            return ""
        last = self._readings[-1]
        reach = max(self.NEAR, self._apart * (len(self._readings) - 1))
        # The newest first, so that of equal ones it is quoted.
        recent = [reading for reading in reversed(self._readings) if last.step - reading.step <= reach]
        if last.lr is None:
            best = max(recent, key=lambda reading: reading.rate)
            return f"The critical learning rate was {best.rate:.2g} {best.where}: keep the learning rate below it. "
        share = last.lr / last.rate
        if share > EDGE or (blamed and share > 1):
            exceeded = [reading for reading in recent if reading.lr is not None and reading.lr > reading.rate]
            best = max(exceeded, key=lambda reading: reading.rate)
            return f"The {best.compared}: set it below {best.rate:.2g}. "
        if blamed:
            return ""
        if share > 1:
            return f"The {last.compared}, as in many healthy runs; a lower one is worth a try. "
        return (
            f"Curvature is not the cause as measured: the learning rate {last.lr:.3g} was below the critical rate "
            f"{last.rate:.2g} {last.where}; look at the data of these steps first. "
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it, as primitives."""
        readings = [[reading.rate, reading.step, reading.lr] for reading in self._readings]
        return {"readings": readings, "apart": self._apart, "lr": self._lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._readings.clear()
        self._readings.extend(_Reading(*reading) for reading in state["readings"])
        self._apart, self._lr = state["apart"], state["lr"]


@dataclass
class _Reading:
    rate: float  # the critical one
    step: int
    lr: float | None  # the largest learning rate since; None if it is not known

    @property
    def where(self) -> str:
        return f"({tags.CRITICAL_LR} at step {self.step})"

    @property
    def compared(self) -> str:
        lr = math.nan if self.lr is None else self.lr
        return f"learning rate {lr:.3g} was {lr / self.rate:.2g} times the critical rate {self.rate:.2g} {self.where}"
