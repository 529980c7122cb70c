"""Experts of a mixture that get no tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Rule, Verdict, check_action, check_count, check_number
from dynwatch.rules.expert_layers import ExpertLayers, by_layer, named, so_do


class DeadExperts(Rule):
    """Experts of a layer get no tokens, reading after reading: they cost memory and learn nothing.

    It judges what `dynwatch.expert_load.DeadExperts` counts. Fires when at `patience` readings in a row more than
    `share` of a layer's experts, and at least one, were dead: without a token over the monitor's window of looks. A
    count that is not finite counts for nothing and breaks no row; a layer whose number of experts has not come yet is
    not judged.

    Args:
        patience: Readings in a row before it fires. Each of them looks back over a window already.
        share: Share of a layer's experts; 0 objects to the first one.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = DeadExperts(patience=2)
        >>> rule.update(49, {"moe/layer_0/experts": 8, "moe/layer_0/dead_experts": 1}, {})
        >>> rule.update(99, {"moe/layer_0/dead_experts": 1}, {}).reason
        'MoE layer 0 has 1 of 8 experts without tokens at step 99, more than 10% at 2 readings in a row.'
    """

    name = "dead_experts"
    reads = (tags.DEAD_EXPERTS, tags.EXPERTS)
    needs = reads
    kept = ("_layers",)

    def __init__(self, patience: int = 3, share: float = 0.1, action: Action = "warn") -> None:
        self.patience = check_count("patience", patience)
        self.share = check_number("share", share, least=0, below=1)
        self.action = check_action(action)
        self._layers = ExpertLayers()

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        found, judged = {}, 0
        for layer, now in by_layer(readings).items():
            n, dead = self._layers.size(layer, now, tags.EXPERTS), now.get(tags.DEAD_EXPERTS, math.nan)
            if not n >= 1 or not math.isfinite(dead):
                continue
            judged += 1
            seen = dead >= 1 and dead > self.share * n
            if (length := self._layers.row(layer, step, {tags.DEAD_EXPERTS: dead}, seen)) >= self.patience:
                note = notes.get(tags.DEAD_EXPERTS.replace("*", layer))
                words = (
                    f"{named(layer, note)} has {dead:g} of {n:g} experts without tokens at step {step}, more than "
                    f"{self.share:.0%} at {length} readings in a row."
                )
                found[layer] = (dead / n, words)
        if not found:
            return None
        worst = max(found, key=lambda layer: found[layer][0])
        return self.verdict(
            step,
            found[worst][1] + so_do(list(found), judged),
            "An expert without tokens gets no gradient from the loss and seldom comes back by itself: raise the "
            "coefficient of the load balancing loss, move a bias on the experts' scores against their load, or add "
            "noise to the router's logits; initialise the router's rows of the dead ones anew, or use fewer experts.",
            *self._layers.evidence(worst),
        )
