"""Routing health: what is counted on the device in a step, and the readings made of it on the host."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynwatch.constants import widest_float
from dynwatch.router_capture import version_of
from dynwatch.router_decision import Decision
from dynwatch.routing import (
    DeadExperts,
    Routing,
    aux_loss,
    coactivation_counts,
    effective_experts,
    load_cv,
    max_vio,
)
from dynwatch.routing_sums import SCALARS, routing_sums

# Beside what `routing_sums` gives: slots of tokens where slots can be empty.
_SIZE = len(SCALARS) + 1
# Scores that wait to be summed together: 4 MiB of them.
_MOST_WAITING = 2**20


@dataclass(eq=False)
class _Waiting:
    name: str
    decision: Decision
    valid: Tensor | None
    version: int


class HealthTally:
    """Sums over the tokens of a step, by router; those of micro-batches and ranks add up.

    Decisions wait until several can be summed in one go, or the step is over.

    Args:
        pairs: Whether to count which experts are chosen together, too.
    """

    def __init__(self, pairs: bool) -> None:
        self.pairs = pairs
        self._waiting: list[_Waiting] = []
        self._elements = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, decision: Decision, valid: Tensor | None) -> None:
        """Take in one forward pass of a router; nothing waits for the device.

        Args:
            name: The router.
            decision: What it decided.
            valid: [N] bool, False for padding; None if every token counts.
        """
        version = 0 if decision.scores is None else version_of(decision.scores)
        self._waiting.append(_Waiting(name, decision, valid, version))
        self._elements += decision.indices.shape[0] * decision.n_experts
        if self._elements >= _MOST_WAITING:
            self._reduce()

    def vectors(self, sizes: Mapping[str, int], device: torch.device) -> Tensor:
        """The sums of all routers, one after the other.

        Args:
            sizes: E of each router, in their order; one that has not run has zeros.
            device: Of the answer.
        """
        self._reduce()
        wide = widest_float(device)
        parts = []
        for name, n_experts in sizes.items():
            found = self._sums.get(name)
            if found is None:
                found = torch.zeros(tally_size(n_experts, self.pairs), dtype=wide, device=device)
            parts.append(found.to(device))
        return torch.cat(parts)

    def _reduce(self) -> None:
        alike: dict[object, list[_Waiting]] = {}
        for each in self._waiting:
            d = each.decision
            scores = None if d.scores is None else d.scores.dtype
            key = (tuple(d.indices.shape), d.n_experts, d.score, scores, d.indices.device, id(each.valid), d.capacity)
            alike.setdefault(key, []).append(each)
        self._waiting, self._elements = [], 0
        for group in alike.values():
            for each, sums in zip(group, self._sum(group), strict=True):
                self._sums[each.name] = self._sums[each.name] + sums if each.name in self._sums else sums

    def _sum(self, group: Sequence[_Waiting]) -> Tensor:
        """[G, size] of decisions that are of one shape and kind."""
        first, valid = group[0].decision, group[0].valid
        scores = [each.decision.scores for each in group if each.decision.scores is not None]
        changed = [
            each.name
            for each in group
            if each.decision.scores is not None and version_of(each.decision.scores) != each.version
        ]
        if changed:
            raise RuntimeError(
                f"the logits of {changed[0]} were changed in place after its block had run, so that what it decided "
                "by is lost; work on a copy of them (logits.clone()), or pass extract=."
            )
        with torch.no_grad():
            indices = torch.stack([each.decision.indices for each in group])
            together = torch.stack(scores) if scores else None
            sums = routing_sums(indices, first.n_experts, together, first.score, valid)
            parts = [sums, sums[:, -1:] * first.capacity]
            if self.pairs:
                counts = [
                    coactivation_counts(Routing(i, first.n_experts, valid=valid)).flatten().to(sums) for i in indices
                ]
                parts.append(torch.stack(counts))
            return torch.cat(parts, dim=1)


def tally_size(n_experts: int, pairs: bool) -> int:
    """How many sums there are of one router."""
    return 2 * n_experts + _SIZE + pairs * n_experts**2


class RouterHealth:
    """The readings of all routers, from the summed counts of a step; keeps which experts are dead.

    Attributes:
        loads: For each router [E] of the last step that had tokens; empty before.
        together: For each router [E, E] tokens that chose two experts, of the last step in which they were counted.

    Args:
        window: Looks without a token after which an expert is dead.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._dead: dict[int, DeadExperts] = {}
        self.loads: dict[int, Tensor] = {}
        self.together: dict[int, Tensor] = {}

    def read(self, sums: Sequence[float], sizes: Sequence[int], pairs: bool) -> dict[int, dict[str, float]]:
        """Readings of each router by the last part of their tag; nothing of one that saw no token.

        Args:
            sums: What `HealthTally.vectors` gave, summed (or averaged) over ranks.
            sizes: E of each router.
            pairs: Whether pairs of experts were counted.
        """
        pieces = torch.split(torch.tensor(sums, dtype=torch.float64), [tally_size(size, pairs) for size in sizes])
        readings: dict[int, dict[str, float]] = {}
        for n_experts in dict.fromkeys(sizes):  # those of one size together: most models have one
            layers = [layer for layer, size in enumerate(sizes) if size == n_experts]
            readings |= self._of_one_size(layers, torch.stack([pieces[layer] for layer in layers]), n_experts, pairs)
        return dict(sorted(readings.items()))

    def _of_one_size(
        self, layers: Sequence[int], sums: Tensor, n_experts: int, pairs: bool
    ) -> dict[int, dict[str, float]]:
        parts = torch.split(sums, [n_experts, n_experts, _SIZE] + [n_experts**2] * pairs, dim=1)
        load, probabilities, scalars = parts[:3]
        tokens, scored, entropy, with_logits, z, slots, can_be_empty = scalars.t()
        figures = {
            "load_cv": load_cv(load),
            "max_vio": max_vio(load),
            "max_load": load.amax(1) / tokens,
            "effective_experts": effective_experts(load),
            "router_entropy": entropy / scored,
            "aux_loss": aux_loss(load, probabilities / scored[:, None]),
            "z_loss": z / with_logits,
            "dropped": (slots - load.sum(1)).clamp_min(0) / can_be_empty,
        }
        # What tells whether a figure is known: a NaN of a router that has it is a reading.
        needs = {"router_entropy": scored, "aux_loss": scored, "z_loss": with_logits, "dropped": can_be_empty}
        routed = load.sum(1)
        columns = {name: (values.tolist(), needs.get(name, routed).tolist()) for name, values in figures.items()}
        found: dict[int, dict[str, float]] = {}
        for i, layer in enumerate(layers):
            dead = self._dead.setdefault(layer, DeadExperts(self._window)).update(load[i])
            if not tokens[i] > 0:
                continue
            self.loads[layer] = load[i]
            if pairs:
                self.together[layer] = parts[3][i].view(n_experts, n_experts)
            found[layer] = {name: values[i] for name, (values, known) in columns.items() if known[i] != 0}
            found[layer]["dead_experts"] = float(dead.sum())
            if math.isnan(found[layer].get("aux_loss", 0.0)) and routed[i] == 0:
                del found[layer]["aux_loss"]  # all tokens were dropped
        return found

    def state(self) -> dict[int, object]:
        return {layer: dead.state_dict() for layer, dead in self._dead.items()}

    def load_state(self, state: Mapping[int, dict[str, object]]) -> None:
        self._dead = {}
        for layer, saved in state.items():
            self._dead[layer] = DeadExperts(self._window)
            self._dead[layer].load_state_dict(saved)


@functools.lru_cache(maxsize=64)
def sum_tags(sizes: tuple[int, ...], pairs: bool) -> tuple[str, ...]:
    """Inner tags of the sums of all routers, by their numbers of experts."""
    return tuple(
        f"{layer}\n{i}{' pairs' * pairs}" for layer, size in enumerate(sizes) for i in range(tally_size(size, pairs))
    )
