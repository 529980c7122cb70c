"""Stop rules: small state machines that read numbers and say when a run is poor, and why.

A rule knows nothing of models, devices or Lightning. It is fed the readings of one step after the
other and answers with a `Verdict` or None.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

# How many readings of a rule's own tags go into a verdict as evidence.
EVIDENCE_LENGTH = 30


@dataclass(frozen=True)
class Verdict:
    """Why a run should end, in a form that a person and a program can read.

    Attributes:
        rule: Name of the rule.
        step: The step whose readings decided.
        reason: One sentence with numbers.
        advice: What to do about it.
        evidence: For each tag the last readings as (step, value) pairs, oldest first.
        weights_suspect: Whether the weights may have been spoilt, so that they should not replace an
            earlier checkpoint.

    Example:
        >>> verdict = Verdict("patience", step=7, reason="Enough.", advice="Rest.", evidence={"loss": [(7, math.inf)]})
        >>> verdict.to_dict()["evidence"]
        {'loss': [[7, 'inf']]}
    """

    rule: str
    step: int
    reason: str
    advice: str
    evidence: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    weights_suspect: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The verdict as primitives, for JSON; non-finite numbers become the strings "nan" and "inf"."""
        record = asdict(self)
        record["evidence"] = {
            tag: [[step, value if math.isfinite(value) else str(value)] for step, value in readings]
            for tag, readings in self.evidence.items()
        }
        return record


class Rule(ABC):
    """What `EarlyTermination` asks of a rule.

    Example:
        >>> class Budget(Rule):
        ...     name = "budget"
        ...     def update(self, step, readings, notes):
        ...         return Verdict(self.name, step, "100 steps are spent.", "Buy more.") if step >= 100 else None
        ...     def state_dict(self):
        ...         return {}
        ...     def load_state_dict(self, state):
        ...         pass
        >>> Budget().update(100, {}, {}).reason
        '100 steps are spent.'
    """

    name: str

    @abstractmethod
    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        """Take in the readings of one step.

        Args:
            step: The step, not decreasing from call to call.
            readings: Values by tag; a rule ignores tags that it does not know.
            notes: What is known in words about a reading, by its tag ("conv1.weight first, …").
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on, as primitives."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""


class NonFinite(Rule):
    """The loss, the gradients or the weights are NaN or infinite.

    Fires at the first bad step. Under a gradient scaler (fp16) a non-finite gradient is routine: the
    scaler skips the step and halves its scale. Such steps (reading `stop/scaler` = 1) count only after
    `scaler_patience` of them in a row, by which time the scale has been halved to nothing.

    Args:
        scaler_patience: Overflows in a row that are still routine.

    Raises:
        ValueError: If `scaler_patience` is below 1.

    Example:
        >>> NonFinite().update(7, {"stop/loss": float("nan")}, {}).reason
        'The loss is nan at step 7.'
    """

    name = "non_finite"
    LOSS, GRADIENT, WEIGHTS, SCALER = "stop/loss", "stop/grad_norm", "stop/weight_norm", "stop/scaler"

    def __init__(self, scaler_patience: int = 25) -> None:
        _check_count("scaler_patience", scaler_patience)
        self.scaler_patience = scaler_patience
        self._overflows = 0
        self._recent: deque[tuple[int, float | None, float | None]] = deque(maxlen=EVIDENCE_LENGTH)

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        loss = readings.get(self.LOSS)
        gradient = readings.get(self.GRADIENT)
        weights = readings.get(self.WEIGHTS)
        if loss is not None or gradient is not None:
            self._recent.append((step, loss, gradient))
        bad_gradient = gradient is not None and not math.isfinite(gradient)
        self._overflows = self._overflows + 1 if bad_gradient and readings.get(self.SCALER) else 0
        if weights is not None and not math.isfinite(weights):
            return self._verdict(step, f"The weights are not finite after step {step}", notes.get(self.WEIGHTS))
        if loss is not None and not math.isfinite(loss):
            what = f"The loss is {loss} at step {step}"
            return self._verdict(step, what, notes.get(self.WEIGHTS) or notes.get(self.GRADIENT))
        if bad_gradient and not self._overflows:
            return self._verdict(step, f"The gradient is not finite at step {step}", notes.get(self.GRADIENT))
        if self._overflows >= self.scaler_patience:
            what = f"The gradient scaler has skipped {self._overflows} steps in a row, up to step {step}"
            return self._verdict(step, what, notes.get(self.GRADIENT))
        return None

    def _verdict(self, step: int, what: str, where: str | None) -> Verdict:
        return Verdict(
            rule=self.name,
            step=step,
            reason=f"{what}: {where}." if where else f"{what}.",
            advice=(
                "Lower the learning rate or lengthen its warm-up, clip the gradient if it is not clipped yet "
                "(Trainer(gradient_clip_val=1.0)), and look for bad values in this batch; "
                "torch.autograd.detect_anomaly() names the operation."
            ),
            evidence={
                self.LOSS: [(s, loss) for s, loss, _ in self._recent if loss is not None],
                self.GRADIENT: [(s, gradient) for s, _, gradient in self._recent if gradient is not None],
            },
        )

    def state_dict(self) -> dict[str, Any]:
        return {"overflows": self._overflows, "recent": [list(r) for r in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._overflows = state["overflows"]
        self._recent = deque(((r[0], r[1], r[2]) for r in state["recent"]), maxlen=EVIDENCE_LENGTH)


class Divergence(Rule):
    r"""The loss has left the band of its own history, stays outside and is not on its way back.

    The band ends at

    .. math:: c + \max(k \cdot 1.4826 \cdot \mathrm{MAD},\ 3|c|,\ \mathrm{min\_rise}),
        \qquad c = \max(\text{start}, \text{median})

    with start the median of the first `warm_up` losses, median and MAD (median absolute deviation, as a robust σ)
    over the last `window` losses inside the band. So the loss must be worse than at the start and than
    lately, four times as large, and k robust sigmas away, `patience` times in a row. Losses outside do not
    enter the history, so that a divergence cannot move its own band; a spike that recovers resets the
    count. A non-finite loss counts as outside. Three more cases:

    * The first `warm_up` finite losses are taken as they come: a few lucky batches are no start.
    * The band never reaches further above the median of the first five losses than ten times its size
      (or ten times `min_rise`), so that neither a slow rise nor a blow-up among the first losses can take
      it along.
    * It does not fire while the loss comes back: while the second half of the last `patience` losses lies
      more than a tenth closer to the band's centre than the first half (in medians).

    Args:
        patience: Losses outside the band in a row before it fires.
        window: Losses in the history.
        k: Width of the band in robust standard deviations.
        min_rise: The least rise above the centre that can matter, in the loss's unit. The default suits
            losses of the order of 1; it keeps a loss that begins at nearly 0 (a penalty, a value loss
            before the first reward) from being called divergent for becoming 3.
        warm_up: Finite losses that make the start; none of them is judged.

    Raises:
        ValueError: If `patience`, `window` or `warm_up` is no whole number of at least 1, `k` is not
            positive, or `min_rise` is negative.

    Example:
        >>> rule = Divergence(patience=2)
        >>> losses = [2.3] * 20 + [2.2, 90.0, 400.0]
        >>> [step for step, loss in enumerate(losses) if rule.update(step, {"stop/loss": loss}, {})]
        [22]
    """

    name = "divergence"
    LOSS, LIMIT = "stop/loss", "stop/loss_limit"
    _BEGIN, _TIMES, _FARTHEST, _BACK = 5, 3.0, 10.0, 0.9

    def __init__(
        self, patience: int = 20, window: int = 100, k: float = 6.0, min_rise: float = 10.0, warm_up: int = 20
    ) -> None:
        for argument, value in (("patience", patience), ("window", window), ("warm_up", warm_up)):
            _check_count(argument, value)
        if not _is_number(k) or not k > 0:
            raise ValueError(f"k={k!r} must be a number above 0; 6 is the default, less is stricter.")
        if not _is_number(min_rise) or not min_rise >= 0:
            raise ValueError(f"min_rise={min_rise!r} must be a number, 0 or more; 0 turns it off.")
        self.patience = patience
        self.k = k
        self.min_rise = min_rise
        self.warm_up = warm_up
        self.limit = math.nan  # the band's upper end at the last loss; NaN while there is none
        self._first: list[float] = []
        self._inside: deque[float] = deque(maxlen=window)
        self._outside = 0
        self._latest_outside: deque[float] = deque(maxlen=patience)
        self._recent: deque[tuple[int, float]] = deque(maxlen=EVIDENCE_LENGTH)

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        loss = readings.get(self.LOSS)
        if loss is None:
            return None
        self._recent.append((step, loss))
        if len(self._first) < self.warm_up:
            if math.isfinite(loss):
                self._first.append(loss)
                self._inside.append(loss)
            return None
        centre, self.limit = self._band()
        if math.isfinite(loss) and not loss > self.limit:
            self._outside = 0
            self._latest_outside.clear()
            self._inside.append(loss)
            return None
        self._outside += 1
        self._latest_outside.append(loss if math.isfinite(loss) else math.inf)
        if self._outside < self.patience or self._comes_back(centre):
            return None
        began, usual = median(self._first[: self._BEGIN]), median(self._inside)
        return Verdict(
            rule=self.name,
            step=step,
            reason=(
                f"The loss is {loss:.4g} at step {step} and has been above {self.limit:.4g} for {self._outside} steps; "
                f"it began at {began:.4g} and its usual value was {usual:.4g}."
            ),
            advice=(
                "Lower the learning rate or lengthen its warm-up, clip the gradient if it is not clipped yet "
                "(Trainer(gradient_clip_val=1.0)); resume from a checkpoint of before the rise, if there is one."
            ),
            evidence={self.LOSS: list(self._recent)},
        )

    def _band(self) -> tuple[float, float]:
        """Centre and upper end of the band."""
        begin, usual = median(self._first[: self._BEGIN]), median(self._inside)
        sigma = 1.4826 * median(abs(loss - usual) for loss in self._inside)
        centre = max(median(self._first), usual)
        rise = max(self.k * sigma, self._TIMES * abs(centre), self.min_rise)
        return centre, min(centre + rise, begin + self._FARTHEST * max(abs(begin), self.min_rise))

    def _comes_back(self, centre: float) -> bool:
        half = self.patience // 2
        if half == 0:
            return False
        losses = list(self._latest_outside)
        return median(losses[-half:]) - centre < self._BACK * (median(losses[:half]) - centre)

    def state_dict(self) -> dict[str, Any]:
        return {
            "limit": self.limit,
            "first": list(self._first),
            "inside": list(self._inside),
            "outside": self._outside,
            "latest_outside": list(self._latest_outside),
            "recent": [list(r) for r in self._recent],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.limit = state["limit"]
        self._first = list(state["first"])
        self._inside = deque(state["inside"], maxlen=self._inside.maxlen)
        self._outside = state["outside"]
        self._latest_outside = deque(state["latest_outside"], maxlen=self.patience)
        self._recent = deque(((r[0], r[1]) for r in state["recent"]), maxlen=EVIDENCE_LENGTH)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_count(argument: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{argument}={value!r} must be a whole number, at least 1.")
