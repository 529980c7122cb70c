"""Non-finite losses, gradients and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count
from dynwatch.rules.critical_lr import CriticalRate


class NonFinite(Rule):
    """The loss, the gradients or the weights are NaN or infinite.

    Fires at the first bad step. Under a gradient scaler (fp16) a non-finite gradient is routine: the
    scaler skips the step and halves its scale. Such steps (reading `stop/scaler` = 1) count only after
    `scaler_patience` of them in a row, by which time the scale has been halved to nothing.

    Where the loss or the gradient is not finite, the advice compares the learning rate with the critical one, if that
    was measured (see `CriticalRate`).

    Args:
        scaler_patience: Overflows in a row that are still routine.
        action: What is done about its verdict.

    Raises:
        ValueError: If `scaler_patience` is below 1, or `action` is unknown.

    Example:
        >>> NonFinite().update(7, {"stop/loss": float("nan")}, {}).reason
        'The loss is nan at step 7.'
    """

    name = "non_finite"
    reads = (tags.LOSS, tags.GRADIENT, tags.WEIGHTS, tags.SCALER, tags.CRITICAL_LR, tags.LR)
    quotes = (tags.CRITICAL_LR, tags.LR)
    kept = ("_overflows", "_losses", "_gradients", "_critical")

    def __init__(self, scaler_patience: int = 25, action: Action = "stop") -> None:
        self.scaler_patience = check_count("scaler_patience", scaler_patience)
        self.action = check_action(action)
        self._overflows = 0
        self._losses, self._gradients = Recent(tags.LOSS), Recent(tags.GRADIENT)
        self._critical = CriticalRate()

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self._critical.take(step, readings, calm=not self._overflows)
        loss = readings.get(tags.LOSS)
        gradient = readings.get(tags.GRADIENT)
        weights = readings.get(tags.WEIGHTS)
        if loss is not None:
            self._losses.add(step, loss)
        if gradient is not None:
            self._gradients.add(step, gradient)
        bad_gradient = gradient is not None and not math.isfinite(gradient)
        if gradient is not None:
            self._overflows = self._overflows + 1 if bad_gradient and readings.get(tags.SCALER) else 0
        if weights is not None and not math.isfinite(weights):
            return self._bad(step, f"The weights are not finite after step {step}", notes.get(tags.WEIGHTS))
        if loss is not None and not math.isfinite(loss):
            what = f"The loss is {loss} at step {step}"
            return self._bad(step, what, notes.get(tags.WEIGHTS) or notes.get(tags.GRADIENT), self._critical)
        if bad_gradient and not self._overflows:
            what = f"The gradient is not finite at step {step}"
            return self._bad(step, what, notes.get(tags.GRADIENT), self._critical)
        if bad_gradient and self._overflows >= self.scaler_patience:
            what = f"The gradient scaler has skipped {self._overflows} steps in a row, up to step {step}"
            return self._bad(step, what, notes.get(tags.GRADIENT), self._critical)
        return None

    def _bad(self, step: int, what: str, where: str | None, critical: CriticalRate | None = None) -> Verdict:
        return self.verdict(
            step,
            f"{what}: {where}." if where else f"{what}.",
            ("Look for a wrong sign: the loss fell below all bounds. " if what.startswith("The loss is -inf") else "")
            + (critical.words(step) if critical else "")
            + "Lower the learning rate or lengthen its warm-up, clip the gradient if it is not clipped yet "
            "(Trainer(gradient_clip_val=1.0)), and look for bad values in this batch; "
            "torch.autograd.detect_anomaly() names the operation.",
            self._losses,
            self._gradients,
            weights_suspect=True,
        )
