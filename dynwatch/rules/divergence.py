"""A loss that leaves the band of its own history for good."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number
from dynwatch.rules.critical_lr import CriticalRate
from dynwatch.trends import RobustWindow


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

    The advice compares the learning rate with the critical one, if that was measured (see `CriticalRate`).

    Args:
        patience: Losses outside the band in a row before it fires.
        window: Losses in the history.
        k: Width of the band in robust standard deviations.
        min_rise: The least rise above the centre that can matter, in the loss's unit. The default suits
            losses of the order of 1; it keeps a loss that begins at nearly 0 (a penalty, a value loss
            before the first reward) from being called divergent for becoming 3.
        warm_up: Finite losses that make the start; none of them is judged.
        action: What is done about its verdict.

    Raises:
        ValueError: If `patience`, `window` or `warm_up` is no whole number of at least 1, `k` is not
            positive, `min_rise` is negative, or `action` is unknown.

    Example:
        >>> rule = Divergence(patience=2)
        >>> losses = [2.3] * 20 + [2.2, 90.0, 400.0]
        >>> [step for step, loss in enumerate(losses) if rule.update(step, {"stop/loss": loss}, {})]
        [22]
    """

    name = "divergence"
    reads = (tags.LOSS, tags.CRITICAL_LR, tags.LR)
    needs = (tags.LOSS,)
    kept = ("limit", "_first", "_inside", "_outside", "_latest_outside", "_recent", "_critical")
    _BEGIN, _TIMES, _FARTHEST = 5, 3.0, 10.0

    def __init__(
        self,
        patience: int = 20,
        window: int = 100,
        k: float = 6.0,
        min_rise: float = 10.0,
        warm_up: int = 20,
        action: Action = "stop",
    ) -> None:
        self.patience = check_count("patience", patience)
        check_count("window", window)
        self.warm_up = check_count("warm_up", warm_up)
        self.k = check_number("k", k, above=0, remedy="6 is the default, less is stricter")
        self.min_rise = check_number("min_rise", min_rise, least=0, remedy="0 turns it off")
        self.action = check_action(action)
        self.limit = math.nan  # the band's upper end at the last loss; NaN while there is none
        self._first: list[float] = []
        self._inside = RobustWindow(window)
        self._outside = 0
        self._latest_outside: deque[float] = deque(maxlen=patience)
        self._recent = Recent(tags.LOSS)
        self._critical = CriticalRate()

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self._critical.take(step, readings, calm=not self._outside)
        loss = readings.get(tags.LOSS)
        if loss is None:
            return None
        self._recent.add(step, loss)
        if len(self._first) < self.warm_up:
            if math.isfinite(loss):
                self._first.append(loss)
                self._inside.add(loss)
            return None
        centre, self.limit = self._band()
        if math.isfinite(loss) and not loss > self.limit:
            self._outside = 0
            self._latest_outside.clear()
            self._inside.add(loss)
            return None
        self._outside += 1
        self._latest_outside.append(loss if math.isfinite(loss) else math.inf)
        if self._outside < self.patience or comes_back(self._latest_outside, centre):
            return None
        return self.verdict(
            step,
            f"The loss is {loss:.4g} at step {step} and has been above {self.limit:.4g} for {self._outside} steps; "
            f"it began at {median(self._first[: self._BEGIN]):.4g} and its usual value was {self._inside.median:.4g}.",
            self._critical.words(step)
            + "Lower the learning rate or lengthen its warm-up, clip the gradient if it is not clipped yet "
            "(Trainer(gradient_clip_val=1.0)); resume from a checkpoint of before the rise, if there is one. If the "
            "loss rises by its nature or because you changed it, EarlyTermination(actions={'divergence': 'warn'}) "
            "lets it.",
            self._recent,
            weights_suspect=True,
        )

    def _band(self) -> tuple[float, float]:
        """Centre and upper end of the band."""
        begin, usual = median(self._first[: self._BEGIN]), self._inside.median
        centre = max(median(self._first), usual)
        rise = max(self.k * self._inside.sigma, self._TIMES * abs(centre), self.min_rise)
        return centre, min(centre + rise, begin + self._FARTHEST * max(abs(begin), self.min_rise))


def comes_back(losses: Sequence[float], centre: float, share: float = 0.1) -> bool:
    """Whether the second half of the losses lies more than a share closer to a centre below than the first half.

    Args:
        losses: [n] numbers above the centre, oldest first.
        centre: Where they would come back to.
        share: How much closer, of the first half's distance.

    Example:
        >>> comes_back([9.0, 8.0, 3.0, 2.0], centre=1.0)
        True
    """
    half = len(losses) // 2
    if half == 0:
        return False
    numbers = list(losses)
    return median(numbers[-half:]) - centre < (1 - share) * (median(numbers[:half]) - centre)
