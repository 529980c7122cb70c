"""A network that has stopped changing its decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number
from dynwatch.ska_equilibrium import SETTLED
from dynwatch.trends import Row


class SKAEquilibrium(Rule):
    """Knowledge flow and entropy steps of all layers have come down to next to nothing, by their own peaks.

    It looks at `ska/equilibrium` of `SKAMonitor`: flow and entropy of a step (trapezoid), smoothed and over their
    peaks, the largest over all layers. It fires once that was at most `level` at `patience` probes in a row, each at
    most twice as long after the one before as usual, at step `min_steps` or later, and for as long as it stays there.

    It says that the network has stopped changing its decisions on the probe samples, which is no fault, and not that
    it generalises best now or that a lower learning rate would move nothing. The papers behind it (arXiv 2503.13942,
    2504.03214) give no threshold: this is dynwatch's reading of "convergence of entropy and knowledge flow". So it is
    not among the default rules, and warns unless told otherwise.

    Args:
        level: Share of the peaks up to which a probe counts.
        patience: Probes in a row before it fires.
        min_steps: Training steps before which it does not.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = SKAEquilibrium(patience=2, min_steps=100)
        >>> for step in range(49, 400, 50):
        ...     verdict = rule.update(step, {"ska/equilibrium": 0.98 ** step}, {})
        ...     if verdict:
        ...         break
        >>> verdict.step
        199
    """

    name = "ska_equilibrium"
    reads = (tags.EQUILIBRIUM,)
    kept = ("_row", "_levels")

    def __init__(
        self, level: float = SETTLED, patience: int = 5, min_steps: int = 500, action: Action = "warn"
    ) -> None:
        self.level = check_number("level", level, above=0, below=1, remedy="0.1 is a tenth of the peaks")
        self.patience = check_count("patience", patience)
        self.min_steps = check_count("min_steps", min_steps, least=0)
        self.action = check_action(action)
        self._row = Row()
        self._levels = Recent(tags.EQUILIBRIUM)

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        level = readings.get(tags.EQUILIBRIUM, math.nan)
        if not math.isfinite(level):
            return None
        self._levels.add(step, level)
        self._row.add(step, level <= self.level)
        if self._row.length < self.patience or step < self.min_steps:
            return None
        return self.verdict(
            step,
            f"The network has stopped changing its decisions: flow and entropy steps of all layers are at {level:.2g} "
            f"of their peaks or less at step {step}, and were at most {self.level:g} at {self._row.length} probes in a "
            "row.",
            "If the loss and its validation have settled as well, end the run, or lower the rate; if the loss still "
            "falls, let it run: stillness is measured against the run's own peak, which a large first change makes "
            "high. This tells nothing of how well the network generalises; keep the checkpoint that validates best.",
            self._levels,
        )
