"""One look at a step: its radius, what it was expected to do to the loss and what it did, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynwatch.callbacks.logits import Scores
from dynwatch.callbacks.tangents import Along, Logits, Way, tangents
from dynwatch.callbacks.weight_update import Step
from dynwatch.constants import widest_float
from dynwatch.ranks import local_part
from dynwatch.step_forecast import predicted_loss, predicted_loss_sigmoid
from dynwatch.step_radius import Binding, Bound, batch_radius, batch_radius_sigmoid

R = "step_radius/r"
R_PI = "step_radius/r_pi"
R_B2 = "step_radius/r_b2"
RHO = "step_radius/rho"
TAU = "step_radius/tau"
PREDICTED = "step_radius/predicted_loss"
ACTUAL = "step_radius/actual_loss"
BINDING = "step_radius/binding_sample"

# What a rank tells the others, in this order; r and what follows it in the first group are largest where it matters.
RISKS = (R, R_PI, R_B2)
LOSSES = (PREDICTED, ACTUAL)
WHERE = ("sample", "target", "top", "call", "samples")
FIELDS = (*RISKS, *LOSSES, "weight", *WHERE)


def look(logits: Logits, step: Step, way: Way, *, b2: bool = False, losses: bool = True) -> Tensor:
    """What this rank's samples say of a step, [len(FIELDS)], on their device.

    Args:
        logits: Of a replayed step.
        step: Of the weights.
        way: How tangents are computed.
        b2: Whether to scan for the tighter bound, too.
        losses: Whether to compare the loss after the step, which takes one more forward pass; else r is all that is
            told.
    """
    found = tangents(logits, step.start, step.direction, way)
    r, at = _normalized(found, "b1", step)
    nothing = torch.full_like(r, math.nan)
    r_pi = _normalized(found, "pi", step)[0] if losses else nothing
    r_b2 = _normalized(found, "b2", step)[0] if b2 else nothing
    predicted, actual, weight = _losses(logits, found, step) if losses else (nothing, nothing, torch.ones_like(r))
    return torch.stack([r, r_pi, r_b2, predicted, actual, weight, *at])


def skipped(device: torch.device) -> Tensor:
    """What a rank says whose training step skipped its batch: it bounds nothing and counts for nothing."""
    values = dict.fromkeys(FIELDS, -1.0) | dict.fromkeys(RISKS, -math.inf) | dict.fromkeys((*LOSSES, "weight"), 0.0)
    return torch.tensor([values[name] for name in FIELDS], dtype=widest_float(device), device=device)


def unknown(device: torch.device) -> Tensor:
    """What a rank says that failed."""
    return torch.full((len(FIELDS),), math.nan, dtype=widest_float(device), device=device)


def _normalized(found: Sequence[Along], bound: Bound, step: Step) -> tuple[Tensor, list[Tensor]]:
    """The step over the smallest radius, and where that is: sample, target, likeliest class, call, samples."""
    bindings = [_binding(along, bound) for along in found]
    radii = torch.stack([binding.radius for binding in bindings])
    inverse = 1.0 / (radii * step.scale.to(radii))  # tangents are along the step times scale
    counts = torch.stack([binding.index for binding in bindings]) >= 0
    inverse = inverse.masked_fill(~counts, -math.inf)  # of a loss that counts no sample nothing is known
    best = inverse.argmax()  # NaN counts as the largest
    where = torch.stack([_where(along.scores, binding.index) for along, binding in zip(found, bindings, strict=True)])
    return inverse[best], list(where[best].to(inverse))


def _binding(along: Along, bound: Bound) -> Binding:
    z, a, counted = along.scores.logits, along.tangent, along.scores.counted()
    if along.scores.kind == "softmax":
        return batch_radius(z, a, bound, mask=counted)
    if bound == "pi":  # of the two classes z and 0
        return batch_radius(torch.stack([z, z * 0], -1), torch.stack([a, a * 0], -1), bound, mask=counted)
    return batch_radius_sigmoid(z, a, mask=counted)


def _where(scores: Scores, index: Tensor) -> Tensor:
    """Sample, its target and likeliest class, the number of the cross entropy and of its samples: -1 if unknown."""
    at = index.clamp(min=0)
    rows = scores.logits.reshape(-1, scores.logits.shape[-1]) if scores.kind == "softmax" else scores.logits.reshape(-1)
    top = rows[at].argmax(-1) if scores.kind == "softmax" else rows[at] > 0
    target = torch.full_like(index, -1)
    if scores.targets is not None:
        if scores.kind == "softmax" and scores.targets.is_floating_point():
            target = scores.targets.reshape(-1, scores.targets.shape[-1])[at].argmax(-1)
        else:
            target = scores.targets.reshape(-1)[at]
    samples = math.prod(scores.samples)
    wide = widest_float(index.device)
    return torch.stack([each.to(wide) for each in (index, target, top, index * 0 + scores.call, index * 0 + samples)])


def _losses(logits: Logits, found: Sequence[Along], step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """By how much the cross entropies were to change, by how much they did, and over how many samples."""
    device = found[0].tangent.device
    wide = widest_float(device)
    nothing = torch.full((), math.nan, dtype=wide, device=device)
    weight = torch.stack([_count(along.scores, wide) for along in found]).sum()
    if any(along.scores.targets is None for along in found):
        return nothing, nothing, weight
    whole = torch.stack([torch.zeros_like(step.scale), 1 / step.scale]).to(device, wide)
    predicted = torch.stack([_change(along.scores, along.tangent, whole) for along in found]).sum()
    now = {name: local_part(p.detach()) for name, p in logits.replay.parameters.items()}
    after = {scores.call: scores for scores in logits.at(now, shares=False)}
    changes = []
    for along in found:
        before, new = along.scores, after.get(along.scores.call)
        if new is None or new.logits.shape != before.logits.shape:  # a step that takes another way at other weights
            return predicted, nothing, weight
        changes.append(_actual(before, new))
    return predicted, torch.stack(changes).sum(), weight


def _count(scores: Scores, dtype: torch.dtype) -> Tensor:
    counted = scores.counted()
    if counted is None:
        return torch.full((), float(math.prod(scores.samples)), dtype=dtype, device=scores.logits.device)
    return counted.sum().to(dtype)


def _actual(before: Scores, after: Scores) -> Tensor:
    """By how much a cross entropy changed the step's loss."""
    wide = widest_float(before.logits.device)
    if before.share is None or before.value is None or after.value is None:
        change = after.logits.detach().to(before.logits.dtype) - before.logits
        return _change(before, change, torch.tensor([0.0, 1.0], dtype=wide, device=before.logits.device))
    return (before.share.to(wide) * (after.value.detach().to(wide) - before.value.to(wide))).sum()


def _change(scores: Scores, tangent: Tensor, lengths: Tensor) -> Tensor:
    """By how much the step's loss is to change through a cross entropy, from the first to the second length."""
    targets, options, share = scores.targets, dict(scores.options), scores.share
    if targets is None:
        raise ValueError("targets are unknown")  # cannot be: asked before
    wide = widest_float(scores.logits.device)
    factor = torch.ones((), dtype=wide, device=scores.logits.device)
    if scores.kind == "sigmoid":
        if share is not None and scores.reduction == "none":
            options["weight"] = share if "weight" not in options else share * options["weight"]
        elif share is not None:
            factor = share.to(wide)
        if scores.reduction != "mean" and share is not None:
            factor = factor * math.prod(scores.samples)
        at = predicted_loss_sigmoid(scores.logits, tangent, targets, lengths, **options)
        return factor * (at[1] - at[0])
    if share is not None:
        counted = scores.counted()
        if scores.reduction == "none" and counted is not None and not targets.is_floating_point():
            targets = targets.masked_fill(~counted, options.get("ignore_index", -100))
        factor = share.to(wide) if scores.reduction != "none" else _mean_of(share.to(wide), counted)
        if scores.reduction != "mean":
            factor = factor * _mass(scores, targets)
    at = predicted_loss(scores.logits, tangent, targets, lengths, **options)
    return factor * (at[1] - at[0])


def _mean_of(share: Tensor, counted: Tensor | None) -> Tensor:
    return share.mean() if counted is None else share[counted].mean()


def _mass(scores: Scores, targets: Tensor) -> Tensor | int:
    """What a sum over samples is divided by in a mean."""
    if targets.is_floating_point():
        return math.prod(scores.samples)
    counted = targets != scores.options.get("ignore_index", -100)
    weight: Tensor | None = scores.options.get("weight")
    return counted.sum() if weight is None else weight[targets.masked_fill(~counted, 0)][counted].sum()


def over_ranks(own: Tensor, ranks: int) -> Tensor:
    """What `look` says of all ranks' samples, which must call this together: [len(FIELDS) + 1], the rank last.

    NaN on any rank is NaN for all, in that field.
    """
    if ranks == 1:
        return torch.cat([own, torch.zeros_like(own[:1])])
    gathered = [torch.empty_like(own) for _ in range(ranks)]
    torch.distributed.all_gather(gathered, own.contiguous())
    table = torch.stack(gathered)  # [ranks, fields]
    column = dict(zip(FIELDS, table.unbind(1), strict=True))
    worst = column[R].argmax()
    risks = [column[name].max() for name in RISKS]
    total = column["weight"].sum()
    losses = [(column[name] * column["weight"]).sum() / total for name in LOSSES]
    where = [column[name][worst] for name in WHERE]
    return torch.stack([*risks, *losses, total, *where, worst.to(own)])


def in_words(step: int, values: Mapping[str, float], rank: int | None) -> str:
    """Which sample binds the radius, for people.

    Args:
        step: Of the run.
        values: What `over_ranks` gave, by field.
        rank: Of the sample; None if there is only one.
    """
    sample, target, top, call, samples = (int(values[name]) for name in WHERE)
    words = [f"step {step}: r = {values[R]:.3g}, bound by sample {sample} of {samples}"]
    if target >= 0:
        words.append(f"target {target}")
    words.append(f"likeliest class {top}")
    if call:
        words.append(f"in cross entropy number {call + 1} of the step")
    if rank is not None:
        words.append(f"on rank {rank}")
    return ", ".join(words)
