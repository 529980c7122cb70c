"""The critical learning rate as last measured, in words for the advice of several rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynwatch.rules import tags
from dynwatch.rules.base import newest

# Up to this multiple of the critical rate a run may be healthy. It hovers there at the edge of stability
# (arXiv 2103.00065): past their first hundred steps, small networks under full-batch gradient descent reached 1.49 at
# single readings, and stayed at 1.4 where it was measured on a probe batch of 64 samples, whose eigenvalue is larger.
EDGE = 1.5


class CriticalRate:
    """The newest critical learning rate, its step, and the largest rate that the run has had since.

    A reading counts while it is near: `NEAR` steps old at most, or as old as the last two readings lay apart.
    While the rule that owns it sees trouble (`calm` is False), a newer reading does not replace one that is
    near: what a run has blown up to tells nothing of how it came there.

    Example:
        >>> critical = CriticalRate()
        >>> critical.take(400, {"hessian/critical_lr": 0.036, "stop/lr": 0.5})
        >>> critical.words(460)[:80]
        'The learning rate 0.5 was 14 times the critical rate 0.036 (hessian/critical_lr '
        >>> critical.words(1000)
        ''
    """

    NEAR = 500

    def __init__(self) -> None:
        self._rate: float | None = None  # the newest critical rate
        self._step = self._apart = 0  # its step, and how many steps after the one before it came
        self._lr: float | None = None  # the newest learning rate
        self._largest: float | None = None  # the largest one since the critical rate

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
            self._largest = lr if self._largest is None else max(lr, self._largest)
        rate = newest(readings, tags.CRITICAL_LR, None)
        if rate is None or not rate > 0 or not (calm or self.near(step) is None):
            return
        if self._rate is not None:
            self._apart = max(step - self._step, 0)
        self._rate, self._step, self._largest = rate, step, self._lr

    def near(self, step: int) -> float | None:
        """The critical rate if its reading is near a step, else None."""
        return self._rate if step - self._step <= max(self.NEAR, self._apart) else None

    def words(self, step: int, blamed: bool = False) -> str:
        """What the critical rate says of the learning rate: a sentence and a blank, or nothing without a near reading.

        Args:
            step: The step at which it is asked.
            blamed: Whether the rate is known to be too high. Then what would excuse it is not said.
        """
        rate = self.near(step)
        if rate is None:
            return ""
        where = f"({tags.CRITICAL_LR} at step {self._step})"
        if self._largest is None:
            return f"The critical learning rate was {rate:.2g} {where}: keep the learning rate below it. "
        share = self._largest / rate
        lr, times = f"learning rate {self._largest:.3g}", f"was {share:.2g} times the critical rate {rate:.2g} {where}"
        if share > EDGE or (blamed and share > 1):
            return f"The {lr} {times}: set it below {rate:.2g}. "
        if blamed:
            return ""
        if share > 1:
            return f"The {lr} {times}, as in many healthy runs; a lower one is worth a try. "
        return (
            f"Curvature is not the cause as measured: the {lr} was below the critical rate {rate:.2g} {where}; look at "
            "the data of these steps first. "
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it, as primitives."""
        return {
            "rate": self._rate,
            "step": self._step,
            "apart": self._apart,
            "lr": self._lr,
            "largest": self._largest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._rate, self._step, self._apart = state["rate"], state["step"], state["apart"]
        self._lr, self._largest = state["lr"], state["largest"]
