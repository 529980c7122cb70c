"""Routing health of one router: what is counted on the device, and the readings made of it on the host."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynwatch.constants import widest_float
from dynwatch.router_capture import Decision
from dynwatch.routing import (
    DeadExperts,
    aux_loss,
    coactivation_counts,
    effective_experts,
    load_counts,
    load_cv,
    max_vio,
    mean_probabilities,
    router_entropy,
    z_loss,
)

# Beside the load and the summed probabilities of the experts: tokens; those with probabilities, and their summed
# entropy; those with logits, and their summed z-loss; slots of tokens where slots can be empty, and the empty ones.
_SCALARS = ("tokens", "scored", "entropy", "with_logits", "z", "slots", "empty")


class RouterCounts:
    """Sums over the tokens of a step, of one router; those of micro-batches and ranks add up.

    Args:
        n_experts: E.
        pairs: Whether to count which experts are chosen together, too.
        device: Of the sums.
    """

    def __init__(self, n_experts: int, pairs: bool, device: torch.device) -> None:
        self.n_experts = n_experts
        self.pairs = pairs
        wide = widest_float(device)
        self._load, self._probabilities = torch.zeros(2, n_experts, dtype=wide, device=device)
        self._scalars = torch.zeros(len(_SCALARS), dtype=wide, device=device)
        self._together = torch.zeros(n_experts, n_experts, dtype=wide, device=device) if pairs else None

    def add(self, decision: Decision, valid: Tensor | None) -> None:
        """Take in one forward pass; nothing waits for the device.

        Args:
            decision: What the router decided.
            valid: [N] bool, False for padding; None if every token counts.
        """
        routing = decision.routing if valid is None else replace(decision.routing, valid=valid)
        wide = self._load.dtype
        n_tokens, k = routing.indices.shape
        tokens = self._load.new_full((), n_tokens) if valid is None else valid.sum().to(wide)
        load = load_counts(routing).to(wide)
        zero = tokens.new_zeros(())
        scalars = [tokens, zero, zero, zero, zero, zero, zero]
        if routing.probabilities is not None:
            mean, entropy = mean_probabilities(routing), router_entropy(routing)
            self._probabilities += mean.total
            scalars[1:3] = [mean.count.to(wide), entropy.total]
        if decision.logits is not None:
            z = z_loss(decision.logits, valid)
            scalars[3:5] = [z.count.to(wide), z.total]
        if decision.capacity:
            scalars[5:7] = [tokens * k, tokens * k - load.sum()]
        self._load += load
        self._scalars += torch.stack(scalars)
        if self._together is not None:
            self._together += coactivation_counts(routing)

    def vector(self) -> Tensor:
        """All sums, [`size`]."""
        parts = [self._load, self._probabilities, self._scalars]
        return torch.cat(parts if self._together is None else [*parts, self._together.flatten()])

    @staticmethod
    def size(n_experts: int, pairs: bool) -> int:
        """How many sums there are."""
        return 2 * n_experts + len(_SCALARS) + pairs * n_experts**2


class RouterHealth:
    """The readings of one router, from the summed counts of a step; keeps which experts are dead.

    Attributes:
        load: [E] of the last step that had tokens; empty before.
        together: [E, E] tokens that chose two experts, of the last step in which they were counted.

    Args:
        window: Looks without a token after which an expert is dead.
    """

    def __init__(self, window: int) -> None:
        self._dead = DeadExperts(window)
        self.load = torch.empty(0, dtype=torch.float64)
        self.together: Tensor | None = None

    def read(self, sums: Sequence[float], n_experts: int, pairs: bool) -> dict[str, float]:
        """Readings by the last part of their tag; empty where no token was seen.

        Args:
            sums: What `RouterCounts.vector` gave, summed (or averaged) over ranks.
            n_experts: E.
            pairs: Whether pairs of experts were counted.
        """
        values = torch.tensor(sums, dtype=torch.float64)
        sizes = [n_experts, n_experts, len(_SCALARS)] + [n_experts**2] * pairs
        load, probabilities, scalars, *together = torch.split(values, sizes)
        tokens, scored, entropy, with_logits, z, slots, empty = scalars.tolist()
        dead = self._dead.update(load)
        if not tokens > 0:
            return {}
        self.load = load
        if together:
            self.together = together[0].view(n_experts, n_experts)
        readings = {
            "load_cv": load_cv(load).item(),
            "max_vio": max_vio(load).item(),
            "max_load": load.max().item() / tokens,
            "effective_experts": effective_experts(load).item(),
            "dead_experts": float(dead.sum()),
        }
        if scored:
            readings["router_entropy"] = entropy / scored
            readings["aux_loss"] = aux_loss(load, probabilities / scored).item()
        if with_logits:
            readings["z_loss"] = z / with_logits
        if slots:
            readings["dropped"] = max(empty, 0.0) / slots
        # Nobody got a token: all were dropped, and of no load there is nothing to say.
        return {name: value for name, value in readings.items() if not (math.isnan(value) and load.sum() == 0)}

    def state(self) -> dict[str, object]:
        return self._dead.state_dict()

    def load_state(self, state: dict[str, object]) -> None:
        self._dead.load_state_dict(state)


@functools.lru_cache(maxsize=64)
def sum_tags(sizes: tuple[int, ...], pairs: bool) -> tuple[str, ...]:
    """Inner tags of the sums of all routers, by their numbers of experts."""
    return tuple(
        f"{layer}\n{i}{' pairs' * pairs}"
        for layer, size in enumerate(sizes)
        for i in range(RouterCounts.size(size, pairs))
    )
