"""A validation loss that rises while the training loss falls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number
from dynwatch.trends import MAD_TO_SIGMA, mann_kendall


class Overfitting(Rule):
    r"""Since its best value the validation loss has risen while the training loss fell.

    It looks at the ends of validation, with the training loss averaged since the one before. Over the
    ends since the best validation loss (at least `patience` more, at most the last 64) the validation loss
    must have a rising trend, the best one left out, and the training loss a falling one (Mann-Kendall, |z| above 1.64,
    one sided 5 %), and the last three validation losses must all lie above the best by more than
    `tolerance` of what the training loss has gained since its start, and by six robust σ of the noise. The
    last three training losses must lie two σ below that at the best. Noise is told from the differences between
    neighbours among the last 30 validation losses, and among the training losses since the best one.

    Args:
        patience: Ends of validation after the best one.
        tolerance: The least rise, as a share of the training loss's gain.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = Overfitting()
        >>> for epoch in range(12):
        ...     readings = {"stop/loss": 2.3 / (1 + epoch), "stop/val_loss": 1.0 + 0.1 * abs(epoch - 4)}
        ...     verdict = rule.update(100 * epoch, readings, {})
        ...     if verdict:
        ...         break
        >>> verdict.step
        900
    """

    name = "overfitting"
    reads = (tags.LOSS, tags.VAL_LOSS)
    kept = ("_sum", "_count", "_start", "_since_best", "_train", "_best_step", "_val_recent", "_train_recent")
    _TREND, _NOISE, _TRAIN_NOISE, _MOST = 1.64, 6.0, 2.0, 64

    def __init__(self, patience: int = 5, tolerance: float = 0.05, action: Action = "warn") -> None:
        self.patience = check_count("patience", patience, least=4)
        self.tolerance = check_number("tolerance", tolerance, least=0, below=1)
        self.action = check_action(action)
        self._sum, self._count = 0.0, 0  # training losses since the last validation
        self._start = math.nan  # the first of them, averaged
        self._since_best: list[float] = []  # validation losses from the best on
        self._train: list[float] = []  # training losses at the same ends
        self._best_step = 0
        self._val_recent, self._train_recent = Recent(tags.VAL_LOSS), Recent(tags.LOSS)

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        loss = readings.get(tags.LOSS)
        if loss is not None and math.isfinite(loss):
            self._sum += loss
            self._count += 1
            if math.isnan(self._start):
                self._start = loss
        validation = readings.get(tags.VAL_LOSS)
        if validation is None:
            return None
        if not math.isfinite(validation) or self._count == 0:
            return None
        self._val_recent.add(step, validation)
        train = self._sum / self._count
        self._sum, self._count = 0.0, 0
        self._train_recent.add(step, train)
        if not self._since_best or validation < self._since_best[0]:
            self._since_best, self._train, self._best_step = [], [], step
        self._since_best.append(validation)
        self._train.append(train)
        if len(self._since_best) > self._MOST:  # the best one stays
            del self._since_best[1], self._train[1]
        best, gain = self._since_best[0], self._start - train
        if len(self._since_best) <= self.patience or not gain > 0:
            return None
        # The best one was chosen as the lowest, so it is no witness of a rise; and in noise it is far below the others.
        rises = mann_kendall(self._since_best[1:]) > self._TREND and mann_kendall(self._train) < -self._TREND
        least = max(self.tolerance * gain, self._NOISE * spread_of_steps([value for _, value in self._val_recent]))
        if not rises or not min(self._since_best[-3:]) > best + least:
            return None
        if not max(self._train[-3:]) < self._train[0] - self._TRAIN_NOISE * spread_of_steps(self._train):
            return None
        return self.verdict(
            step,
            f"The validation loss has risen from {best:.4g} at step {self._best_step} to {validation:.4g} at step "
            f"{step} while the training loss fell from {self._train[0]:.4g} to {train:.4g}.",
            f"Use the checkpoint of about step {self._best_step}; for a better one, more data or augmentation, weight "
            "decay, dropout or a smaller model.",
            self._val_recent,
            self._train_recent,
        )


def spread_of_steps(numbers: Sequence[float]) -> float:
    """Robust σ of noise around a slow change, from the differences of neighbours.

    Args:
        numbers: [n] numbers in order, two or more.

    Example:
        >>> spread_of_steps([1.0, 2.0, 3.0, 4.0])
        0.0
    """
    steps = [later - earlier for earlier, later in pairwise(numbers)]
    middle = median(steps)
    return MAD_TO_SIGMA * median([abs(step - middle) for step in steps]) / math.sqrt(2)
