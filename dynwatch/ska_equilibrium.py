"""When the knowledge of a network has settled: flow and entropy steps of all layers next to nothing, by their peaks.

The papers (arXiv 2503.13942, 2504.03214) speak of the convergence of entropy and knowledge flow and give no threshold.
What is here is dynwatch's own way to put that into a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynwatch.rules.base import check_number

# The level at which a network counts as settled.
SETTLED = 0.1


@dataclass(frozen=True)
class Change:
    """What moved in one layer from one probe to the next.

    Attributes:
        flow: How fast its knowledge moved, as `KnowledgeReading.flow`.
        entropy: The trapezoid entropy of a training step: that of the interval over its number of steps.

    Example:
        >>> Change(flow=2.0, entropy=-1e-4).entropy
        -0.0001
    """

    flow: float
    entropy: float


@dataclass(frozen=True)
class Moment:
    """A probe.

    Attributes:
        time: Since the first probe, in the unit of the flow: a sum of learning rates or a number of steps.
        step: The training step.

    Example:
        >>> Moment(time=0.5, step=50).step
        50
    """

    time: float
    step: int


class Equilibrium:
    """How far each layer's movement has come down from its peak, and the two characteristic times of a run.

    Of each layer the flow and the size of the entropy of a step are smoothed (an exponential average over probes, the
    first one whole), and divided by the largest value that they have had. The level is the largest of these ratios
    over all layers: 1 while anything moves as it never did before, near 0 when nothing moves any more. A layer that
    has never moved does not count; when none has, there is no level.

    Args:
        smoothing: The weight of the past, from one probe to the next.

    Attributes:
        peak: When the mean flow of the layers was largest; None before there was one.
        settled: Since when the level has been `SETTLED` or less without a break; None while it is not.

    Raises:
        ValueError: If the smoothing is not at least 0 and below 1.

    Example:
        >>> equilibrium = Equilibrium(smoothing=0.5)
        >>> for step in range(8):
        ...     change = Change(flow=2.0**-step, entropy=-(4.0**-step))
        ...     level = equilibrium.update({"body": change}, Moment(0.1 * step, step))
        >>> round(level, 4), equilibrium.peak, equilibrium.settled
        (0.0352, Moment(time=0.0, step=0), Moment(time=0.6000000000000001, step=6))
    """

    def __init__(self, smoothing: float = 0.7) -> None:
        self.smoothing = check_number("smoothing", smoothing, least=0.0, below=1.0, remedy="0.7 forgets half in 2")
        self.peak: Moment | None = None
        self.settled: Moment | None = None
        self._largest = 0.0  # mean flow
        self._means: dict[str, list[float]] = {}  # of each layer: flow, entropy
        self._peaks: dict[str, list[float]] = {}

    def update(self, changes: Mapping[str, Change], now: Moment) -> float:
        """Take in a probe.

        Args:
            changes: By layer. One that is missing keeps its place; one with a NaN makes this probe none.
            now: When it was.

        Returns:
            The level; NaN if there is none.

        Example:
            >>> Equilibrium().update({"body": Change(1.0, 0.0)}, Moment(0.1, 1))
            1.0
        """
        if not changes or not all(math.isfinite(c.flow) and math.isfinite(c.entropy) for c in changes.values()):
            return math.nan
        flow = sum(change.flow for change in changes.values()) / len(changes)
        if flow > self._largest:
            self._largest, self.peak = flow, now
        for layer, change in changes.items():
            values = (change.flow, abs(change.entropy))
            means = self._means.get(layer, list(values))
            weight = self.smoothing
            means = [weight * mean + (1 - weight) * value for mean, value in zip(means, values, strict=True)]
            peaks = self._peaks.get(layer, means)
            self._means[layer], self._peaks[layer] = means, list(map(max, means, peaks))
        level = self._level()
        if not level <= SETTLED:
            self.settled = None
        elif self.settled is None:
            self.settled = now
        return level

    def forget(self, layer: str) -> None:
        """Begin anew with a layer, as when its samples are others.

        Example:
            >>> equilibrium = Equilibrium()
            >>> _ = equilibrium.update({"body": Change(1.0, 1.0)}, Moment(0.1, 1))
            >>> equilibrium.forget("body")
            >>> equilibrium.update({"body": Change(0.001, 0.001)}, Moment(0.2, 2))
            1.0
        """
        self._means.pop(layer, None)
        self._peaks.pop(layer, None)

    def _level(self) -> float:
        ratios = [
            mean / peak
            for layer, means in self._means.items()
            for mean, peak in zip(means, self._peaks[layer], strict=True)
            if peak > 0
        ]
        return max(ratios, default=math.nan)

    def state_dict(self) -> dict[str, Any]:
        """What later levels depend on, as primitives."""
        moments = {"peak": self.peak, "settled": self.settled}
        return {
            "means": {layer: list(values) for layer, values in self._means.items()},
            "peaks": {layer: list(values) for layer, values in self._peaks.items()},
            "largest": self._largest,
            **{name: None if at is None else [at.time, at.step] for name, at in moments.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._means = {layer: list(values) for layer, values in state["means"].items()}
        self._peaks = {layer: list(values) for layer, values in state["peaks"].items()}
        self._largest = state["largest"]
        self.peak, self.settled = (
            None if state[name] is None else Moment(*state[name]) for name in ("peak", "settled")
        )
