"""A loss that cannot be told from its start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import median

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number, newest
from dynwatch.trends import RobustWindow, RunMeans, mann_kendall


class NoLearning(Rule):
    r"""After a share of the budget the loss is still where it started.

    The losses so far are averaged in 16 to 32 blocks, and best is the lowest mean of two neighbouring ones. With
    start the median of the first five losses, or of the first three blocks where that is higher, and σ the robust
    scatter of the last 50, the loss cannot be told from its start if

    * the blocks have no falling trend (Mann-Kendall z above −2.33, one sided 1 %) and best is less than 1.5 σ
      below the start, or
    * whatever the trend, best is less than 0.1 σ, or less than 0.5 % of the start, below it.

    Once it can be told with a falling trend (before the rule asks only with a very clear one, z below −4), the run is
    left alone for good: one that has learnt and forgotten is `LossSpike`'s business.

    Args:
        share: Share of the budget after which it asks, in (0, 1).
        min_readings: Losses that must have been seen.
        without_budget: Losses after which it asks in a run without a planned end.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = NoLearning()
        >>> for step in range(60):
        ...     verdict = rule.update(step, {"stop/loss": 2.3 + 0.01 * (step % 3), "stop/progress": step / 100}, {})
        ...     if verdict:
        ...         break
        >>> verdict.step, verdict.severity
        (49, 'warn')
    """

    name = "no_learning"
    reads = (tags.LOSS, tags.PROGRESS)
    kept = ("_first", "_means", "_scatter", "_progress", "_learnt", "_recent")
    _NO_TREND, _CLEAR_TREND, _NOISE, _OF_SCATTER, _OF_START, _BEGIN = -2.33, -4.0, 1.5, 0.1, 0.005, 5

    def __init__(
        self, share: float = 0.25, min_readings: int = 50, without_budget: int = 2000, action: Action = "warn"
    ) -> None:
        self.share = check_number("share", share, above=0, below=1, remedy="0.25 is a quarter of the budget")
        self.min_readings = check_count("min_readings", min_readings, least=16)
        self.without_budget = check_count("without_budget", without_budget, least=16)
        self.action = check_action(action)
        self._first: list[float] = []
        self._means = RunMeans(32)
        self._scatter = RobustWindow(50)
        self._progress: float | None = None
        self._learnt = False
        self._recent = Recent(tags.LOSS)

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self._progress = newest(readings, tags.PROGRESS, self._progress)
        loss = readings.get(tags.LOSS)
        if loss is None:
            return None
        self._recent.add(step, loss)
        if not math.isfinite(loss):
            return None
        if len(self._first) < self._BEGIN:
            self._first.append(loss)
        self._scatter.add(loss)
        if not self._means.add(loss) or self._learnt or len(self._means) < 16:
            return None
        blocks = self._means.blocks
        # Single losses of skewed noise lie below their mean, so their median alone would make a start that is too low.
        start, sigma = max(median(self._first), median(blocks[:3])), self._scatter.sigma
        best = min(a / 2 + b / 2 for a, b in pairwise(blocks))
        z = mann_kendall(blocks)
        within_noise = z > self._NO_TREND and start - best < self._NOISE * sigma
        small = start - best <= max(self._OF_SCATTER * sigma, self._OF_START * abs(start))
        asks, stands = self._asks(), within_noise or small
        self._learnt = not stands and z < (self._NO_TREND if asks else self._CLEAR_TREND)
        if not asks or not stands:
            return None
        spent = f"after {self._progress:.0%} of the budget" if self._progress is not None else f"after {step} steps"
        trend = "has no falling trend" if z > self._NO_TREND else "has hardly fallen"
        return self.verdict(
            step,
            f"The loss {trend} {spent}: it was {start:.4g} at first and at best {best:.4g} up to step {step} "
            f"(Mann-Kendall z = {z:.1f}).",
            "Look whether labels belong to their inputs, whether inputs are normalised, and whether gradients reach "
            "the first layers; try to overfit a single batch; then raise the learning rate, or lower it if the loss "
            "is noisy. Tasks that learn late (grokking, reinforcement learning) look like this, too.",
            self._recent,
        )

    def _asks(self) -> bool:
        if self._progress is None:
            return len(self._means) >= max(self.without_budget, self.min_readings)
        return self._progress >= self.share and len(self._means) >= self.min_readings
