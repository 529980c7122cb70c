"""Layers that do not move, or whose units never fire."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dynwatch.rules import tags
from dynwatch.rules.base import (
    EVIDENCE_LENGTH,
    Action,
    Recent,
    Rule,
    Verdict,
    check_action,
    check_count,
    check_number,
    newest,
)

# A sign that was seen for long enough: its own name, the tag that shows it, and what it says.
_Sign = tuple[str, str, str]


class DeadLayers(Rule):
    """A layer does not learn: its weights stand still, it gets no gradient, or its ReLU units never fire.

    Five signs, each of which must be seen `patience` times in a row:

    * the update-to-weight ratio of a layer is below `min_ratio`, while that of another layer is at least a
      thousand times `min_ratio`;
    * no layer moves at all (every ratio below a hundredth of `min_ratio`) before 95 % of the budget are spent;
    * the gradient of a layer is exactly zero, while another's is not;
    * more than `dead_units` of a layer's ReLU units did not fire on any of the batches that were looked at;
    * more than `idle` of all trainable parameters have never been given to an optimizer with a gradient
      (a backbone that was forgotten, a `detach` or `no_grad` on the way).

    Layers that were frozen with `requires_grad=False` are not trainable and do not count.

    Args:
        patience: Readings of a sign in a row before it fires.
        min_ratio: Update-to-weight ratio below which a layer stands still; about 1e-3 is usual, and 6e-8
            is the resolution of float32.
        dead_units: Share of a layer's units.
        idle: Share of all trainable parameters.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = DeadLayers(patience=2)
        >>> readings = {"update_ratio/stem": 0.0, "update_ratio/head": 1e-3}
        >>> rule.update(50, readings, {})
        >>> rule.update(100, readings, {}).reason
        'Layer stem stands still: its updates are 0 times its weights at step 100, at 2 readings in a row.'
    """

    name = "dead_layers"
    reads = (tags.UPDATE_RATIO, tags.GRADIENT_BY_LAYER, tags.DEAD_UNITS, tags.IDLE, tags.PROGRESS)
    kept = ("_counts", "_values", "_progress")
    _OTHERS_MOVE, _NONE_MOVES, _LATE = 1e3, 1e-2, 0.95

    def __init__(
        self,
        patience: int = 3,
        min_ratio: float = 1e-7,
        dead_units: float = 0.9,
        idle: float = 0.1,
        action: Action = "warn",
    ) -> None:
        self.patience = check_count("patience", patience)
        self.min_ratio = check_number("min_ratio", min_ratio, above=0, below=1)
        self.dead_units = check_number("dead_units", dead_units, above=0, below=1)
        self.idle = check_number("idle", idle, above=0, below=1)
        self.action = check_action(action)
        self._counts: dict[str, int] = {}  # readings in a row, by sign and layer
        self._values: dict[str, list[tuple[int, float]]] = {}  # the last of these
        self._step, self._progress = 0, 0.0

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self._step, self._progress = step, newest(readings, tags.PROGRESS, self._progress)
        groups: dict[str, dict[str, float]] = {}
        for tag, value in readings.items():
            # Few steps have any of these, and most tags are told apart by their first letter.
            if tag[:1] in "uga" and math.isfinite(value):
                for prefix in (tags.UPDATE_RATIO, tags.GRADIENT_BY_LAYER, tags.DEAD_UNITS):
                    if tag.startswith(prefix):
                        groups.setdefault(prefix, {})[tag] = value
        found = self._still(groups.get(tags.UPDATE_RATIO, {}))
        found += self._without_gradient(groups.get(tags.GRADIENT_BY_LAYER, {}))
        found += self._dead_units(groups.get(tags.DEAD_UNITS, {}))
        if math.isfinite(readings.get(tags.IDLE, math.nan)):
            value = readings[tags.IDLE]
            if self._long_enough(tags.IDLE, value, value > self.idle):
                where = notes.get(tags.IDLE)
                what = f"{value:.0%} of the trainable parameters have never been moved by an optimizer"
                found.append((tags.IDLE, tags.IDLE, f"{what}{f' ({where})' if where else ''}"))
        if not found:
            return None
        sign, tag, what = found[0]
        recent = Recent(tag)
        for at, value in self._values[sign]:
            recent.add(at, value)
        more = f" Signs of this kind: {len(found)} layers." if len(found) > 1 else ""
        return self.verdict(
            step,
            f"{what} at step {step}, at {self.patience} readings in a row.{more}",
            "If the layer was meant to be frozen, set requires_grad=False on its parameters. Else look for a detach() "
            "or no_grad() on its way, for parameters that the optimizer was not given, for ReLU units pushed below "
            "zero by a large learning rate or bias, and for a learning rate of zero.",
            recent,
        )

    def _still(self, ratios: Mapping[str, float]) -> list[_Sign]:
        if not ratios:
            return []
        fastest = max(ratios.values())
        others_move = fastest >= self._OTHERS_MOVE * self.min_ratio
        found = [
            (tag, tag, f"Layer {_layer(tag)} stands still: its updates are {ratio:.2g} times its weights")
            for tag, ratio in ratios.items()
            if self._long_enough(tag, ratio, ratio < self.min_ratio and others_move)
        ]
        none_moves = fastest < self._NONE_MOVES * self.min_ratio and self._progress < self._LATE
        if self._long_enough("none moves", fastest, none_moves):
            tag = max(ratios, key=lambda tag: ratios[tag])
            found.append(("none moves", tag, f"No layer moves: updates are at most {fastest:.2g} times the weights"))
        return found

    def _without_gradient(self, norms: Mapping[str, float]) -> list[_Sign]:
        others = any(norms.values())
        return [
            (tag, tag, f"Layer {_layer(tag)} gets no gradient: its norm is exactly 0")
            for tag, norm in norms.items()
            if self._long_enough(tag, norm, norm == 0 and others)
        ]

    def _dead_units(self, shares: Mapping[str, float]) -> list[_Sign]:
        return [
            (tag, tag, f"{share:.0%} of the ReLU units of {_layer(tag)} do not fire any more")
            for tag, share in shares.items()
            if self._long_enough(tag, share, share > self.dead_units)
        ]

    def _long_enough(self, sign: str, value: float, seen: bool) -> bool:
        """Count a sign; whether it has been seen `patience` times in a row."""
        if not seen:
            if sign in self._counts:
                del self._counts[sign], self._values[sign]
            return False
        self._counts[sign] = self._counts.get(sign, 0) + 1
        self._values[sign] = [*self._values.get(sign, ())[-EVIDENCE_LENGTH + 1 :], (self._step, value)]
        return self._counts[sign] >= self.patience


def _layer(tag: str) -> str:
    return tag.split("/", 2)[-1] if tag.startswith((tags.GRADIENT_BY_LAYER, tags.DEAD_UNITS)) else tag.split("/", 1)[-1]
