"""Pathways of fixed samples through the experts: one look, over all ranks, and the readings made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynwatch.callbacks.batches import samples_in
from dynwatch.callbacks.moe_probe import ProbeSet
from dynwatch.callbacks.moe_tokens import TokenLayout, is_ambiguous, sample_of_tokens
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.probe import Forward, ProbePass
from dynwatch.callbacks.sample_losses import SampleLosses
from dynwatch.constants import widest_float
from dynwatch.pathways import (
    Unit,
    effective_dimension,
    pathway_consistency,
    pathway_distance,
    pathways,
    sample_gates,
)
from dynwatch.router_capture import RouterCapture
from dynwatch.router_decision import Decision
from dynwatch.routing import Ratio, Routing, stability

MOE = "moe/"
DISTANCE, NORMALIZED, LENGTH = "distance", "distance_normalized", "pathway_length"
CONSISTENCY, COMPLEXITY, DIMENSION = "consistency", "complexity", "effective_dimension"


class _AmbiguousError(Exception):
    """As many samples as positions in a batch."""


@dataclass(eq=False)
class Look:
    """What one pass over the probe has shown, on this rank or summed over all.

    Attributes:
        gates: For each router the totals [S, E] and counts [S, 1] of its samples' probabilities.
        shared: For each router the slots that are as at the last look, and all of them, [L, 2].
        losses: [S], NaN where unknown.
        groups: [S] numbers; None if there is one group.
    """

    gates: list[Ratio]
    shared: Tensor
    losses: Tensor
    groups: Tensor | None


@dataclass(eq=False)
class PathwayLooks:
    """Looks at pathways again and again, and keeps what the next look is compared with.

    Args:
        probe: The samples.
        layout: Of their tokens.
        forward: Run instead of the module's step.
    """

    probe: ProbeSet
    layout: TokenLayout
    forward: Forward | None
    choices: dict[str, Routing] = field(default_factory=dict)  # of the last look, by router and pass

    def look(self, trainer: Trainer, pl_module: LightningModule, capture: RouterCapture, rows: int, first: int) -> Look:
        """Run the probe once.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            capture: Of its routers.
            rows: Samples of all ranks.
            first: The row of this rank's first sample.

        Raises:
            ValueError: If tokens cannot be assigned to samples.
        """
        for _ in range(len(self.probe.batches) + 1):
            try:
                return self._look(trainer, pl_module, capture, rows, first)
            except _AmbiguousError as error:
                self.probe.without_last(int(str(error)))
        raise ValueError("the order of tokens cannot be told from batches of one sample; pass extract=.")

    def _look(
        self, trainer: Trainer, pl_module: LightningModule, capture: RouterCapture, rows: int, first: int
    ) -> Look:
        device = pl_module.device
        wide = widest_float(device)
        sizes = [site.n_experts for site in capture.sites]
        gates = [
            Ratio(torch.zeros(rows, e, dtype=wide, device=device), torch.zeros(rows, 1, dtype=wide, device=device))
            for e in sizes
        ]
        shared = torch.zeros(len(sizes), 2, dtype=wide, device=device)
        losses = torch.full((rows,), math.nan, dtype=wide, device=device)
        decoders = decoder_names(capture)
        now: dict[str, Routing] = {}
        batch: Any = None
        start = number = 0
        seen: dict[int, int] = {}

        def deliver(at: int, decision: Decision) -> None:
            samples = samples_in(batch) or 0
            if is_ambiguous(decision.leading, samples):
                raise _AmbiguousError(str(number))
            routing = decision.routing
            device = routing.indices.device
            owner = routing.samples
            if owner is None:
                owner = sample_of_tokens(decision.leading or (len(routing.indices),), samples, device)
            valid = self.layout.valid(batch, decision.leading, capture.sites[at].name in decoders)
            if routing.valid is not None:
                valid = routing.valid if valid is None else valid & routing.valid
            if routing.probabilities is not None:
                gates[at] += sample_gates(routing.probabilities, owner + start, rows, valid)
            seen[at] = seen.get(at, 0) + 1
            key = f"{at}:{number}:{seen[at]}"
            narrow = torch.int16 if routing.n_experts < 2**15 else torch.int32
            now[key] = Routing(routing.indices.to(narrow), routing.n_experts, valid=valid)
            before = self.choices.get(key)
            if before is not None and before.indices.shape == routing.indices.shape:
                kept = stability(now[key], _on(before, device))
                shared[at] += torch.stack([kept.total, kept.count]).to(wide)

        everything = [each for each, _ in self.probe.batches]
        with ProbePass(trainer, pl_module, everything, forward=self.forward, stage=self.probe.stage) as run:
            start = first
            for number, (batch, batch_idx) in enumerate(self.probe.batches):  # noqa: B007 - deliver uses it
                seen.clear()
                samples = samples_in(batch) or 0
                watch = SampleLosses(samples)
                run.run(batch, batch_idx, capture.twin(deliver), watch)
                if watch.losses is not None:
                    losses[start : start + samples] = watch.losses.to(wide)
                start += samples
        self.choices = now
        numbers = self.probe.groups()
        groups = None
        if numbers is not None:
            groups = torch.zeros(rows, dtype=wide, device=device)
            groups[first : first + len(numbers)] = torch.tensor(numbers, dtype=wide, device=device)
        return Look(gates, shared, losses, groups)

    # --- state

    def state(self, most_bytes: int) -> dict[str, Any]:
        """The last look's choices, if they are small enough for a checkpoint."""
        if sum(routing.indices.nbytes for routing in self.choices.values()) > most_bytes:
            return {}
        return {
            key: [routing.indices.clone(), routing.n_experts, None if routing.valid is None else routing.valid.clone()]
            for key, routing in self.choices.items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.choices = {key: Routing(indices, n, valid=valid) for key, (indices, n, valid) in state.items()}


def summed(look: Look) -> Look:
    """A look at the samples of all ranks, which must call this together and have the same routers."""
    known = ~look.losses.isnan()
    parts = [part for gate in look.gates for part in (gate.total, gate.count)]
    parts += [look.shared, torch.where(known, look.losses, 0), known]
    if look.groups is not None:
        parts.append(look.groups)
    together = torch.cat([part.reshape(-1).to(look.shared.dtype) for part in parts])
    torch.distributed.all_reduce(together)
    pieces = iter(
        piece.view(part.shape)
        for piece, part in zip(torch.split(together, [p.numel() for p in parts]), parts, strict=True)
    )
    gates = [Ratio(next(pieces), next(pieces)) for _ in look.gates]
    shared, losses, counts = next(pieces), next(pieces), next(pieces)
    losses = torch.where(counts > 0, losses / counts, math.nan)
    return Look(gates, shared, losses, next(pieces) if look.groups is not None else None)


def pathway_readings(
    look: Look,
    layers: Sequence[int],
    weights: Sequence[Tensor | None],
    unit: Unit,
    threshold: float,
    only: Tensor | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """What pathways through some layers say, by the last part of the tag; and why what is missing is.

    Args:
        look: Summed over ranks.
        layers: Which of its routers, in order.
        weights: For each router of the look its matrix [E, d], or None.
        unit: Of distances.
        threshold: Of pathways.
        only: [S] bool, samples to look at; None for all.
    """
    kept = [at for at in layers if bool(look.gates[at].count.sum() > 0)]
    if not kept:
        return {}, {DISTANCE: "no router shows its scores, of which pathways are made; pass extract="}
    rows = look.gates[kept[0]].count.squeeze(1) > 0
    if only is not None:
        rows = rows & only.to(rows.device)
    gates = [look.gates[at].value[rows].cpu() for at in kept]
    groups = None if look.groups is None else look.groups[rows].tolist()
    if not len(gates[0]):
        return {}, {DISTANCE: "no sample has a token that counts"}
    distance = pathway_distance(pathways(gates, threshold), groups, unit)
    readings = {LENGTH: distance.length, DIMENSION: _mean([effective_dimension(g).item() for g in gates])}
    absent: dict[str, str] = {}
    if distance.n_pairs:
        readings |= {DISTANCE: distance.distance, NORMALIZED: distance.normalized}
    elif distance.n_samples < 2:
        absent[DISTANCE] = "the probe has fewer than two samples whose router scores are finite"
    else:
        absent[DISTANCE] = "no two samples of the probe are of one group"
    known = [weight for weight in (weights[at] for at in kept) if weight is not None]
    if len(kept) < 2:
        absent[CONSISTENCY] = "there is one router, and it compares neighbouring layers"
    elif len(known) < len(kept) or len({weight.shape[1] for weight in known}) > 1:
        absent[CONSISTENCY] = "it needs a matrix of each router, all of one width"
    else:
        found = pathway_consistency(gates, [weight.cpu() for weight in known])
        readings[CONSISTENCY] = _mean(found.mean.tolist())
        readings[COMPLEXITY] = _mean(found.complexity.tolist())
        if math.isnan(readings[COMPLEXITY]):
            del readings[COMPLEXITY]
            absent[COMPLEXITY] = "there are fewer than three routers, of which it is always 0" if len(kept) < 3 else ""
    return readings, absent


def parts_of(capture: RouterCapture) -> dict[str, list[int]]:
    """The routers whose pathways belong together: all, or those of encoder and decoder apart."""
    names = {at: _components(site.name) for at, site in enumerate(capture.sites)}
    parts = {part: [at for at in names if part in names[at]] for part in ("encoder", "decoder")}
    if not all(parts.values()):
        return {"": list(names)}
    rest = [at for at in names if not any(at in members for members in parts.values())]
    return parts | ({"rest": rest} if rest else {})


def decoder_names(capture: RouterCapture) -> frozenset[str]:
    """The routers of a decoder beside an encoder, by name."""
    return frozenset(capture.sites[at].name for at in parts_of(capture).get("decoder", ()))


def _components(name: str) -> set[str]:
    return set(name.lower().split("."))


def _mean(values: Sequence[float]) -> float:
    """Of the finite ones; NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _on(routing: Routing, device: torch.device) -> Routing:
    valid = None if routing.valid is None else routing.valid.to(device)
    return Routing(routing.indices.to(device), routing.n_experts, valid=valid)
