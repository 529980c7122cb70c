"""A loss that rises while the curvature is more than the learning rate can bear."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number
from dynwatch.rules.critical_lr import EDGE, CriticalRate
from dynwatch.rules.overfitting import spread_of_steps
from dynwatch.trends import Row, RunMeans, mann_kendall


class Sharpness(Rule):
    r"""The learning rate is above the critical one, reading after reading, and the loss rises.

    It looks at `hessian/sharpness_ratio`: the largest eigenvalue of the training Hessian over the one at which
    the optimizer, with its present learning rate, becomes unstable. A ratio above 1 alone is no fault: many
    healthy runs train at the edge of stability, where it hovers about 1 (arXiv 2103.00065). So it fires at a
    reading only when

    * the last `patience` readings, each at most twice as long after the one before as usual, lay above `margin`;
    * the losses since the first of the last `patience` of them have a rising trend (Mann-Kendall test on their
      means in 10 to 32 blocks, one sided 1 %), and the last third of these means lies above the first third by more
      than 3 robust σ of their noise and more than a tenth of its size (in medians).

    The usual distance is the median of the last 8, or the last one if that is larger. Where readings come on nearly
    every step, those within 10 losses of another do not begin a stretch of losses of their own. The advice quotes the
    largest critical rate of the last `patience` readings: as the loss rises, the curvature often rises with it.

    Args:
        patience: Readings above the margin in a row before it fires, 2 or more.
        margin: The ratio above which a reading counts. The default lies above what healthy small networks hold (1.0
            to 1.1; 1.4 on a probe batch of 64 samples, which has a larger eigenvalue) and below runs that blew up
            (2 and more). Where the probe batch is so small that the ratio stays at 1.5 (32 samples), set it to 3.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = Sharpness()
        >>> for step in range(300):
        ...     readings = {"stop/loss": 0.2 + 0.002 * step, "stop/lr": 0.3}
        ...     if step % 50 == 0:
        ...         readings |= {"hessian/sharpness_ratio": 2.1, "hessian/critical_lr": 0.14}
        ...     verdict = rule.update(step, readings, {})
        ...     if verdict:
        ...         break
        >>> verdict.step
        100
        >>> verdict.advice.split(": ")[0]
        'The learning rate 0.3 was 2.1 times the critical rate 0.14 (hessian/critical_lr at step 100)'
    """

    name = "sharpness"
    reads = (tags.SHARPNESS_RATIO, tags.LOSS, tags.CRITICAL_LR, tags.LR)
    needs = (tags.SHARPNESS_RATIO, tags.LOSS)
    kept = ("_row", "_losses", "_ratios", "_critical")
    _TREND, _NOISE, _RISE = 2.33, 3.0, 0.1

    def __init__(self, patience: int = 3, margin: float = EDGE, action: Action = "warn") -> None:
        self.patience = check_count("patience", patience, least=2)
        self.margin = check_number("margin", margin, least=1, remedy="healthy runs hover about 1")
        self.action = check_action(action)
        self._row = Row()  # of readings above the margin
        self._losses = LossesSince(patience - 1)  # the losses since the present reading are none yet
        self._ratios = Recent(tags.SHARPNESS_RATIO)
        self._critical = CriticalRate(patience)

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self._critical.take(step, readings)
        loss = readings.get(tags.LOSS, math.nan)
        if self._row.length and math.isfinite(loss):
            self._losses.add(loss)
        ratio = readings.get(tags.SHARPNESS_RATIO, math.nan)
        if not math.isfinite(ratio):
            return None
        self._ratios.add(step, ratio)
        if self._row.add(step, ratio > self.margin) <= 1:
            self._losses.clear()
        if not self._row.length:
            return None
        rise, since = self._rise() if self._losses.enough else None, self._losses.first
        self._losses.begin(step)
        if rise is None:
            return None
        remedy = self._critical.words(step, blamed=True) or f"Divide the learning rate by {ratio:.2g} or more. "
        return self.verdict(
            step,
            f"The sharpness is {ratio:.3g} times what the optimizer bears at its learning rate at step {step}, above "
            f"{self.margin:g} at {self._row.length} readings in a row, and the loss has risen from {rise[0]:.4g} to "
            f"{rise[1]:.4g} since step {since}.",
            f"{remedy}A longer warm-up lets the network find flatter places first, and a clipped gradient "
            "(Trainer(gradient_clip_val=1.0)) bounds the steps.",
            self._ratios,
        )

    def _rise(self) -> tuple[float, float] | None:
        """From where to where the loss has risen; None if it has not."""
        blocks = self._losses.blocks
        third = len(blocks) // 3
        low, high = median(blocks[:third]), median(blocks[-third:])
        least = max(self._NOISE * spread_of_steps(blocks), self._RISE * abs(low))
        return (low, high) if mann_kendall(blocks) > self._TREND and high - low > least else None


class LossesSince:
    """Block means of the losses since each of the last few moments.

    Args:
        moments: How many moments.

    Example:
        >>> losses = LossesSince(moments=1)
        >>> losses.begin(step=7)
        >>> for loss in [3.0, 4.0, 5.0, 4.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0]:
        ...     losses.add(loss)
        >>> losses.first, losses.enough, losses.blocks[:3]
        (7, True, [3.0, 4.0, 5.0])
    """

    APART = 10  # losses from one moment to the next, at least: enough for a trend
    MOST = 32  # blocks since a moment, at most

    def __init__(self, moments: int) -> None:
        self._since: deque[tuple[int, RunMeans]] = deque(maxlen=moments)

    @property
    def enough(self) -> bool:
        """Whether so many moments have come, and enough losses since the last of them."""
        return len(self._since) == self._since.maxlen and self._apart

    @property
    def _apart(self) -> bool:
        return not self._since or len(self._since[-1][1]) >= self.APART

    @property
    def first(self) -> int | None:
        """The step of the first of these moments; None without one."""
        return self._since[0][0] if self._since else None

    @property
    def blocks(self) -> list[float]:
        """Means of the losses since the first moment, oldest first."""
        return self._since[0][1].blocks if self._since else []

    def begin(self, step: int) -> None:
        """A new moment, unless the last one is too near; the losses to come are its losses."""
        if self._apart:
            self._since.append((step, RunMeans(self.MOST)))

    def add(self, loss: float) -> None:
        """Take in a finite loss."""
        for _, means in self._since:
            means.add(loss)

    def clear(self) -> None:
        """Forget all moments."""
        self._since.clear()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as primitives."""
        return {"steps": [step for step, _ in self._since], "means": [means.state_dict() for _, means in self._since]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._since.clear()
        for step, saved in zip(state["steps"], state["means"], strict=True):
            means = RunMeans(self.MOST)
            means.load_state_dict(saved)
            self._since.append((step, means))
