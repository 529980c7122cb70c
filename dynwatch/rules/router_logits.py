"""Routers of a mixture of experts whose logits explode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Rule, Verdict, check_action, check_count, check_number
from dynwatch.rules.expert_layers import ExpertLayers, by_layer, named, so_do


class RouterLogits(Rule):
    r"""A router's logits have grown so large that half precision loses the differences between them.

    It looks at the z-loss, the mean over tokens of :math:`(\log \sum_e \exp z_e)^2` (arXiv 2202.08906), which is there
    whether it is trained on or not. A reading is outside when it is above `floor` **and** above `factor` times the
    layer's calmest, the lowest median of three readings so far (of fewer at first). So a router whose logits are large
    from the start, as of a model trained before, is measured by itself. The default floor of 900 is a logsumexp of
    30, where neighbouring bfloat16 numbers lie 0.125 apart: experts whose logits differ by less are tied. A z-loss of
    undecided routers is (log E)², 31 for 256 experts.

    Fires at `patience` readings outside in a row. Infinity counts as outside, and so does NaN, unless the load of the
    same reading is NaN as well: then no token was counted, which breaks no row. `NonFinite` ends a run whose loss or
    gradients are not finite; this rule tells where that may come from.

    Args:
        patience: Readings in a row before it fires.
        factor: How many times its calmest value the z-loss must be.
        floor: z-loss up to which nothing is wrong.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = RouterLogits(patience=2)
        >>> for step, z in [(49, 4.5), (99, 30.0), (149, 1200.0), (199, 2500.0)]:
        ...     verdict = rule.update(step, {"moe/layer_1/z_loss": z}, {})
        >>> verdict.reason.split(":")[0]
        'The z-loss of MoE layer 1 is 2500 at step 199, that of logits about 50 in size'
    """

    name = "router_logits"
    reads = (tags.Z_LOSS, tags.EFFECTIVE_EXPERTS)
    needs = (tags.Z_LOSS,)
    kept = ("_layers", "_recent", "_calmest")
    _WINDOW = 3

    def __init__(self, patience: int = 3, factor: float = 10.0, floor: float = 900.0, action: Action = "warn") -> None:
        self.patience = check_count("patience", patience)
        self.factor = check_number("factor", factor, above=1)
        self.floor = check_number("floor", floor, least=0)
        self.action = check_action(action)
        self._layers = ExpertLayers()
        self._recent: dict[str, list[float]] = {}  # by layer the last finite readings
        self._calmest: dict[str, float] = {}

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        found, judged = {}, 0
        for layer, now in by_layer(readings).items():
            z = now.get(tags.Z_LOSS)
            if z is None or (math.isnan(z) and math.isnan(now.get(tags.EFFECTIVE_EXPERTS, 0.0))):
                continue
            judged += 1
            calmest = self._calm(layer, z)
            seen = not math.isfinite(z) or (calmest is not None and z > max(self.floor, self.factor * calmest))
            if (length := self._layers.row(layer, step, {tags.Z_LOSS: z}, seen)) >= self.patience:
                what = named(layer, notes.get(tags.Z_LOSS.replace("*", layer)))
                found[layer] = (z if math.isfinite(z) else math.inf, self._words(what, z, calmest, step, length))
        if not found:
            return None
        worst = max(found, key=lambda layer: found[layer][0])
        return self.verdict(
            step,
            found[worst][1] + so_do(list(found), judged),
            "Train on the z-loss as well (0.001 times it is usual), lower the router's learning rate, compute the "
            "router in float32, and clip the gradient (Trainer(gradient_clip_val=1.0)). If what goes into the router "
            "grows from layer to layer, normalise it first.",
            *self._layers.evidence(worst),
        )

    def _calm(self, layer: str, z: float) -> float | None:
        """The lowest median of a few readings so far; None before the first finite one."""
        if math.isfinite(z):
            self._recent[layer] = [*self._recent.get(layer, ())[1 - self._WINDOW :], z]
            self._calmest[layer] = min(self._calmest.get(layer, math.inf), median(self._recent[layer]))
        return self._calmest.get(layer)

    def _words(self, what: str, z: float, calmest: float | None, step: int, length: int) -> str:
        if not math.isfinite(z):
            why = f"with {length} bad readings in a row"
            return f"The router logits of {what} are not finite (z-loss {z}) at step {step}, {why}."
        return (
            f"The z-loss of {what} is {z:.4g} at step {step}, that of logits about {math.sqrt(z):.3g} in size: "
            f"{length} readings in a row were above {self.floor:g} and {self.factor:g} times its calmest {calmest:.4g}."
        )
