"""Gradients that die out on their way to the first layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from statistics import median

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number


class VanishingGradients(Rule):
    r"""The gradient shrinks from layer to layer towards the input, by orders of magnitude.

    It looks at the profile over depth, not at one threshold: with :math:`g_1 \ldots g_n` the gradient norms
    by layer in model order, the profile vanishes when the median of the first third is less than
    `ratio` times the median of the last third, and the norms grow with depth in most pairs of layers
    (Kendall's :math:`\tau \ge 0.6`, equal norms counted as no growth). Fires when `patience` profiles in a row vanish.
    A run that has converged has small gradients everywhere and is left alone.

    Args:
        patience: Profiles in a row before it fires; they come as often as `GradientNormMonitor` measures.
        ratio: How much smaller the first layers' gradients must be.
        min_layers: Profiles with fewer layers are not judged.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = VanishingGradients(patience=1)
        >>> profile = {f"grad_norm/layer/fc{i}": 0.1 ** (8 - i) for i in range(9)}
        >>> rule.update(10, profile, {}).reason
        'The gradient shrinks from 1 at fc8 to 1e-08 at fc0, over 9 layers; so at 1 readings in a row, up to step 10.'
    """

    name = "vanishing_gradients"
    reads = (tags.GRADIENT_BY_LAYER,)
    kept = ("_vanished", "_first", "_last")
    _GROWING = 0.6

    def __init__(self, patience: int = 5, ratio: float = 1e-4, min_layers: int = 4, action: Action = "warn") -> None:
        self.patience = check_count("patience", patience)
        self.ratio = check_number("ratio", ratio, above=0, below=1)
        self.min_layers = check_count("min_layers", min_layers, least=3)
        self.action = check_action(action)
        self._vanished = 0
        self._first, self._last = Recent("first layers"), Recent("last layers")

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        profile = [(tag, norm) for tag, norm in readings.items() if tag.startswith(tags.GRADIENT_BY_LAYER)]
        if len(profile) < self.min_layers:
            return None
        norms = [norm for _, norm in profile]
        if not all(map(math.isfinite, norms)):
            return None  # NonFinite's business, and no profile
        third = len(norms) // 3
        first, last = median(norms[:third]), median(norms[-third:])
        self._first.add(step, first)
        self._last.add(step, last)
        # Most profiles end here; counting pairs of layers costs more.
        if not last > 0 or not first < self.ratio * last or not _growth(norms) >= self._GROWING:
            self._vanished = 0
            return None
        self._vanished += 1
        if self._vanished < self.patience:
            return None
        (low, least), (high, most) = profile[0], profile[-1]
        cut = len(tags.GRADIENT_BY_LAYER)
        return self.verdict(
            step,
            f"The gradient shrinks from {most:.2g} at {high[cut:]} to {least:.2g} at {low[cut:]}, over {len(norms)} "
            f"layers; so at {self._vanished} readings in a row, up to step {step}.",
            "The first layers do not learn: use activations that do not saturate (ReLU, GELU), residual connections or "
            "normalisation, and an initialisation that keeps the variance (Kaiming, Xavier).",
            self._first,
            self._last,
        )


def _growth(norms: list[float]) -> float:
    """Share of growing less share of shrinking among all pairs of layers, in order."""
    signs = [(later > earlier) - (later < earlier) for earlier, later in combinations(norms, 2)]
    return sum(signs) / len(signs)
