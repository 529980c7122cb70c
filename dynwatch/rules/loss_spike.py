"""A loss that jumps up and does not come back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number
from dynwatch.rules.divergence import comes_back
from dynwatch.trends import RobustWindow


class LossSpike(Rule):
    r"""The loss has jumped up, has lost much of what was learnt, and does not recover.

    Smaller than a `Divergence`: the run falls back towards its start, or a little above it, and stays.
    With start the median of the first `window` losses and best the lowest median of `window` losses so
    far, the loss is outside when it is above

    .. math:: \mathrm{best} + \max(\mathrm{lost} \cdot (\mathrm{start} - \mathrm{best}),\
        k \cdot 1.4826 \cdot \mathrm{MAD},\ 0.1 |\mathrm{best}|)

    with the MAD of the last `window` losses inside. Fires when `patience` losses in a row are outside and
    the later half of them is not more than a tenth closer to best than the earlier half (in medians).

    Args:
        patience: Losses outside in a row before it fires.
        window: Losses that make the start, and each level.
        lost: Share of the progress since the start that must be lost, in (0, 1].
        k: The least rise in robust standard deviations.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = LossSpike(patience=10)
        >>> losses = [2.3] * 20 + [0.4] * 60 + [2.2] * 20
        >>> fired = [step for step, loss in enumerate(losses) if rule.update(step, {"stop/loss": loss}, {})]
        >>> fired[0]
        89
    """

    name = "loss_spike"
    reads = (tags.LOSS,)
    kept = ("_first", "_inside", "_best", "_outside", "_recent")

    def __init__(
        self, patience: int = 50, window: int = 20, lost: float = 0.5, k: float = 6.0, action: Action = "warn"
    ) -> None:
        self.patience = check_count("patience", patience)
        self.window = check_count("window", window)
        self.lost = check_number("lost", lost, above=0, below=1 + 1e-9, remedy="0.5 is half of the progress")
        self.k = check_number("k", k, above=0)
        self.action = check_action(action)
        self._first: list[float] = []
        self._inside = RobustWindow(window)
        self._best = math.inf
        self._outside: deque[float] = deque(maxlen=patience)
        self._recent = Recent(tags.LOSS)

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        loss = readings.get(tags.LOSS)
        if loss is None:
            return None
        self._recent.add(step, loss)
        if len(self._first) < self.window:
            if math.isfinite(loss):
                self._first.append(loss)
                self._inside.add(loss)
                self._best = self._inside.median
            return None
        start = median(self._first)
        limit = self._best + max(self.lost * (start - self._best), self.k * self._inside.sigma, 0.1 * abs(self._best))
        if math.isfinite(loss) and loss <= limit:
            self._outside.clear()
            self._inside.add(loss)
            self._best = min(self._best, self._inside.median)
            return None
        self._outside.append(loss if math.isfinite(loss) else math.inf)
        if len(self._outside) < self.patience or comes_back(self._outside, self._best):
            return None
        return self.verdict(
            step,
            f"The loss has been above {limit:.4g} for {self.patience} steps and is {loss:.4g} at step {step}; "
            f"it began at {start:.4g}, had reached {self._best:.4g} and does not come back.",
            "Resume from a checkpoint of before the jump with a lower learning rate or clipped gradients, and look at "
            "the data of the steps where it began; if you changed the loss or the data there, all is well.",
            self._recent,
            weights_suspect=True,
        )
