"""Routers of a mixture of experts that send nearly all tokens to a few of the experts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Rule, Verdict, check_action, check_count, check_number
from dynwatch.rules.expert_layers import ExpertLayers, by_layer, named, so_do


class RouterCollapse(Rule):
    r"""A router sends its tokens to few of the experts, reading after reading.

    A layer has E experts, of which each token uses k. A reading shows a collapse if

    * the effective experts, the exponential of the load's entropy, are fewer than k + `min_share` (E - k), or
    * the busiest expert is chosen by a share of the tokens above k/E + `max_share` (1 - k/E).

    Both count the room that a router has: a token needs k different experts, so the effective experts go from k to E
    and the busiest expert's share from k/E to 1, however bad the router is. A plain share of E would be blind where
    k/E is large: with k = 4 of E = 8 a router that always takes the same four keeps half of E.

    Fires when a layer has shown it at `patience` readings in a row, unless the effective experts have risen over these,
    from their lowest to their highest, by more than a tenth of the room. So what the initialisation has left uneven
    gets the first 200 steps (with a reading each 50 steps) to be evened out by the balance loss, and more where that is
    under way. A reading whose
    effective experts are not finite counts for nothing and breaks no row; a layer whose E and k have not come yet is
    not judged, nor is one without a choice (k = E).

    Args:
        patience: Readings in a row before it fires.
        min_share: Share of the room between k and E below which a router has collapsed. Small networks with a
            balance loss whose routers begin even hold 0.5 and more.
        max_share: Share of the room between k/E and 1 above which one expert takes too many tokens.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = RouterCollapse(patience=2)
        >>> sizes = {"moe/layer_0/experts": 8, "moe/layer_0/top_k": 2}
        >>> poor = {"moe/layer_0/effective_experts": 2.1, "moe/layer_0/max_load": 0.98}
        >>> rule.update(49, sizes | poor, {})
        >>> rule.update(99, poor, {}).reason.split(",")[0]
        'The router of MoE layer 0 sends its tokens to 2.1 effective experts of 8 (top-2) at step 99'
    """

    name = "router_collapse"
    reads = (tags.EFFECTIVE_EXPERTS, tags.MAX_LOAD, tags.EXPERTS, tags.TOP_K)
    needs = (tags.EFFECTIVE_EXPERTS, tags.EXPERTS, tags.TOP_K)
    kept = ("_layers",)
    _RISE = 0.1

    def __init__(
        self, patience: int = 5, min_share: float = 0.25, max_share: float = 0.9, action: Action = "warn"
    ) -> None:
        self.patience = check_count("patience", patience)
        self.min_share = check_number("min_share", min_share, above=0, below=1)
        self.max_share = check_number("max_share", max_share, above=0, below=1)
        self.action = check_action(action)
        self._layers = ExpertLayers()

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        found, judged = {}, 0
        for layer, now in by_layer(readings).items():
            n, k = (self._layers.size(layer, now, tag) for tag in (tags.EXPERTS, tags.TOP_K))
            loads = {t: now[t] for t in (tags.EFFECTIVE_EXPERTS, tags.MAX_LOAD) if math.isfinite(now.get(t, math.nan))}
            if not 1 <= k < n or tags.EFFECTIVE_EXPERTS not in loads:
                continue
            judged += 1
            effective, busiest = loads[tags.EFFECTIVE_EXPERTS], loads.get(tags.MAX_LOAD)
            least, most = k + self.min_share * (n - k), k / n + self.max_share * (1 - k / n)
            seen = effective < least or (busiest is not None and busiest > most)
            length = self._layers.row(layer, step, loads, seen)
            if length >= self.patience and not self._rises(layer, n - k):
                note = notes.get(tags.EFFECTIVE_EXPERTS.replace("*", layer))
                share = f", {busiest:.0%} of them to the busiest one (balanced is {k / n:.0%})" if busiest else ""
                words = (
                    f"The router of {named(layer, note)} sends its tokens to {effective:.3g} effective experts of "
                    f"{n:g} (top-{k:g}) at step {step}{share}. At {length} readings in a row it had fewer than "
                    f"{least:.3g} or one expert for more than {most:.0%}."
                )
                found[layer] = ((effective - k) / (n - k), words)
        if not found:
            return None
        worst = min(found, key=lambda layer: found[layer][0])
        return self.verdict(
            step,
            found[worst][1] + so_do(list(found), judged),
            "See that a load balancing loss is part of the loss that is trained on (models of transformers add it only "
            "with output_router_logits=True) and raise its coefficient (0.01 is usual), or move a bias on the experts' "
            "scores against their load. Lower the router's learning rate, initialise it smaller so that it begins "
            "undecided, and add a z-loss (0.001) or noise to its logits.",
            *self._layers.evidence(worst),
        )

    def _rises(self, layer: str, room: float) -> bool:
        """Whether a router is being evened out."""
        lately = self._layers.last(layer, tags.EFFECTIVE_EXPERTS, self.patience)
        # From the lowest of them to the highest: noise seldom does so.
        ordered = lately[0] == min(lately) and lately[-1] == max(lately)
        return ordered and lately[-1] - lately[0] > self._RISE * room
