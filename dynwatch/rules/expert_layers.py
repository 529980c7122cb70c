"""Readings of mixtures of experts, layer by layer, for the rules that judge routers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dynwatch.rules import tags
from dynwatch.rules.base import EVIDENCE_LENGTH, Recent
from dynwatch.rules.replaying import listed


def by_layer(readings: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The readings of layers of experts, by the layer's number and, as `tags` has them, by tag.

    Example:
        >>> by_layer({"stop/loss": 2.3, "moe/layer_3/experts": 8.0, "moe/consistency": 0.9})
        {'3': {'moe/layer_*/experts': 8.0}}
    """
    found: dict[str, dict[str, float]] = {}
    for tag, value in readings.items():
        if tag.startswith(tags.MOE_LAYER):  # most steps have none
            layer, _, name = tag[len(tags.MOE_LAYER) :].partition("/")
            if layer.isdecimal():
                found.setdefault(layer, {})[f"{tags.MOE_LAYER}*/{name}"] = value
    return found


class ExpertLayers:
    """What a rule remembers of each layer: its E and k, and the readings in a row that showed a sign.

    Example:
        >>> layers = ExpertLayers()
        >>> [layers.size("0", now, "moe/layer_*/experts") for now in ({"moe/layer_*/experts": 8.0}, {})]
        [8.0, 8.0]
        >>> [layers.row("0", step, {"moe/layer_*/z_loss": 4.0}, seen=step != 50) for step in (0, 50, 100, 150)]
        [1, 0, 1, 2]
        >>> [(recent.tag, list(recent)) for recent in layers.evidence("0")]
        [('moe/layer_0/z_loss', [(100, 4.0), (150, 4.0)])]
    """

    def __init__(self) -> None:
        self._sizes: dict[str, dict[str, float]] = {}
        self._lengths: dict[str, int] = {}  # readings in a row
        self._last: dict[str, list[tuple[int, dict[str, float]]]] = {}  # the last of these

    def size(self, layer: str, now: Mapping[str, float], tag: str) -> float:
        """E or k, which come once, as known by now; NaN if they are not."""
        value = now.get(tag, math.nan)
        if math.isfinite(value):
            self._sizes.setdefault(layer, {})[tag] = value
        return self._sizes.get(layer, {}).get(tag, math.nan)

    def row(self, layer: str, step: int, values: dict[str, float], seen: bool) -> int:
        """Take in a reading; how many in a row have shown the sign. Those that do not come break no row."""
        if not seen:
            self._lengths.pop(layer, None)
            self._last.pop(layer, None)
            return 0
        self._lengths[layer] = self._lengths.get(layer, 0) + 1
        self._last[layer] = [*self._last.get(layer, ())[-EVIDENCE_LENGTH + 1 :], (step, values)]
        return self._lengths[layer]

    def last(self, layer: str, tag: str, most: int) -> list[float]:
        """The last readings of a tag in a layer's row, oldest first; up to `EVIDENCE_LENGTH` are known."""
        return [values[tag] for _, values in self._last[layer][-most:]]

    def evidence(self, layer: str) -> list[Recent]:
        """The readings of a layer's row, by tag."""
        recents: dict[str, Recent] = {}
        for step, values in self._last.get(layer, ()):
            for tag, value in values.items():
                recents.setdefault(tag, Recent(tag.replace("*", layer))).add(step, value)
        return list(recents.values())

    def state_dict(self) -> dict[str, Any]:
        """All of it, as primitives."""
        return {
            "sizes": {layer: dict(sizes) for layer, sizes in self._sizes.items()},
            "lengths": dict(self._lengths),
            "last": {layer: [[step, dict(values)] for step, values in row] for layer, row in self._last.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._sizes = {layer: dict(sizes) for layer, sizes in state["sizes"].items()}
        self._lengths = dict(state["lengths"])
        self._last = {layer: [(step, dict(values)) for step, values in row] for layer, row in state["last"].items()}


def named(layer: str, note: str | None) -> str:
    """A layer in words, with what the monitor notes of it, such as the name of its module.

    Example:
        >>> named("3", "blocks.3.mlp.gate")
        'MoE layer 3 (blocks.3.mlp.gate)'
    """
    return f"MoE layer {layer} ({note})" if note else f"MoE layer {layer}"


def so_do(layers: Sequence[str], of: int) -> str:
    """How many layers show a sign, if it is more than one.

    Example:
        >>> so_do(["0", "2"], of=4)
        ' It is so in 2 of 4 layers: 0, 2.'
    """
    return f" It is so in {len(layers)} of {of} layers: {listed(layers)}." if len(layers) > 1 else ""
