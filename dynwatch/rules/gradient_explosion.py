"""Gradient norms that have left their own scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number
from dynwatch.rules.critical_lr import CriticalRate
from dynwatch.trends import RobustWindow


class GradientExplosion(Rule):
    r"""The gradient norm, before clipping, stays far above its own scale.

    A norm is outside when it exceeds both `min_norm` and `factor` times
    :math:`\max(\text{start}, \min(\text{median}, 10\,\text{start}))`, with start the median of the first
    `warm_up` norms and the median over the last `window` norms inside. So one scale serves a run whose
    gradients grow as it learns, and a slow growth without end is found all the same. Fires after
    `patience` norms outside in a row. A non-finite norm counts as outside, except under a gradient
    scaler, where it is routine and left out. The advice compares the learning rate with the critical
    one, if that was measured (see `CriticalRate`).

    Args:
        patience: Norms outside in a row before it fires.
        factor: How many times the usual norm is an explosion.
        min_norm: Norms below this are never one: networks that begin at zero output have tiny gradients first.
        window: Norms in the history.
        warm_up: Finite norms that make the start; none of them is judged.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = GradientExplosion(patience=2)
        >>> norms = [1.5] * 30 + [4000.0] * 3
        >>> [step for step, norm in enumerate(norms) if rule.update(step, {"stop/grad_norm": norm}, {})]
        [31, 32]
    """

    name = "gradient_explosion"
    reads = (tags.GRADIENT, tags.SCALER, tags.CRITICAL_LR, tags.LR)
    needs = (tags.GRADIENT,)
    kept = ("_first", "_inside", "_outside", "_recent", "_critical")
    _DRIFT = 10.0

    def __init__(
        self,
        patience: int = 10,
        factor: float = 100.0,
        min_norm: float = 1.0,
        window: int = 100,
        warm_up: int = 20,
        action: Action = "warn",
    ) -> None:
        self.patience = check_count("patience", patience)
        self.factor = check_number("factor", factor, above=1)
        self.min_norm = check_number("min_norm", min_norm, least=0)
        self.warm_up = check_count("warm_up", warm_up)
        check_count("window", window)
        self.action = check_action(action)
        self._first: list[float] = []
        self._inside = RobustWindow(window)
        self._outside = 0
        self._recent = Recent(tags.GRADIENT)
        self._critical = CriticalRate()

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self._critical.take(step, readings, calm=not self._outside)
        norm = readings.get(tags.GRADIENT)
        finite = norm is not None and math.isfinite(norm)
        if norm is None or (not finite and readings.get(tags.SCALER)):
            return None
        self._recent.add(step, norm)
        if len(self._first) < self.warm_up:
            if finite:
                self._first.append(norm)
                self._inside.add(norm)
            return None
        start = median(self._first)
        usual = max(start, min(self._inside.median, self._DRIFT * start))
        if finite and norm <= max(self.factor * usual, self.min_norm):
            self._outside = 0
            self._inside.add(norm)
            return None
        self._outside += 1
        if self._outside < self.patience:
            return None
        return self.verdict(
            step,
            f"The gradient norm is {norm:.4g} at step {step} and has been more than {self.factor:g} times its usual "
            f"{usual:.4g} for {self._outside} steps.",
            self._critical.words(step)
            + "Clip the gradient (Trainer(gradient_clip_val=1.0)) and lower the learning rate or lengthen its warm-up; "
            "in a recurrent or very deep network look at the initialisation and at normalisation.",
            self._recent,
        )
