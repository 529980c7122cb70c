"""Logits of a replayed step and their tangents along a change of its weights, by the best way that the model allows."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dynwatch.callbacks.curvature import is_out_of_memory
from dynwatch.callbacks.logits import WATCHED, LogitsWatch, Scores, given_scores, with_shares
from dynwatch.callbacks.replay import Replay, SkippedBatchError
from dynwatch.callbacks.snapshot import CannotReplayError
from dynwatch.constants import widest_float

Method = Literal["auto", "forward", "reverse", "differences"]
Weights = Mapping[str, Tensor]
_T = TypeVar("_T")

# How far tangents may be from differences of logits, relative to them, and where half precision rounds.
_CLOSELY, _ROUGHLY = 0.05, 0.3
# How far two derivatives may be from each other where differences cannot judge them.
_ALIKE = 0.01
# Of the differences' displacement as a share of the direction, where half precision rounds.
_LARGE_STEP = 0.05
# How many times the rounding of logits may stand behind a difference before it counts.
_ROUNDINGS = 8.0


@dataclass(frozen=True)
class Along:
    """The logits of one cross entropy, and how they change along a direction.

    Attributes:
        scores: At the start; without a graph.
        tangent: [as the logits] their derivative.
    """

    scores: Scores
    tangent: Tensor


@dataclass(frozen=True)
class Way:
    """How tangents are computed.

    Attributes:
        method: "forward" (forward mode), "reverse" (reverse mode, twice) or "differences" (central).
        why: The reason, in words; empty for the usual way.
        step: Of differences, as a share of the direction.
    """

    method: Literal["forward", "reverse", "differences"]
    why: str = ""
    step: float = 0.0

    def __str__(self) -> str:
        words = {
            "forward": "forward-mode differentiation",
            "reverse": "reverse-mode differentiation, twice",
            "differences": "central differences, approximate",
        }[self.method]
        return f"{words}: {self.why}" if self.why else words


class NoLogitsError(CannotReplayError):
    """A training step without a softmax or sigmoid cross entropy that depends on the parameters."""


class Logits:
    """The logits of a replayed step as a function of its parameters.

    Args:
        replay: Entered.
        given: Whether the replay runs a function of the user's that returns logits; else the step is watched.
    """

    def __init__(self, replay: Replay, given: bool = False) -> None:
        self.replay = replay
        self.given = given

    def at(self, parameters: Weights, *, cut: bool = False, shares: bool = True) -> list[Scores]:
        """What each cross entropy gets at these parameters (of this rank's shards under FSDP2).

        Args:
            parameters: By name.
            cut: Whether the parameters ask for no graph, so that one begins at the cross entropies.
            shares: Whether to look what weight each has in the step's loss, and to leave out those that have none.
        """
        if self.given:
            return [given_scores(self.replay.run(parameters))]
        watch = LogitsWatch(cut)
        with watch:
            result = self.replay.run(parameters)
        if result is None and not watch.scores:
            raise SkippedBatchError("training_step returned None, which skips the batch, so that it has no loss.")
        watch.check_unchanged()
        return with_shares(result, watch.scores) if shares else watch.scores


def tangents(logits: Logits, start: Weights, direction: Weights, way: Way) -> list[Along]:
    """Logits at the start and their derivatives along a direction; those that do not change are left out.

    Args:
        logits: Of a replayed step.
        start: Parameters by name, of this rank's shards under FSDP2.
        direction: By name, of the same shapes; parameters that are left out do not move.
        way: How.

    Raises:
        NoLogitsError: If the step computes no cross entropy, or none that depends on the parameters.
    """
    ways = {"forward": _forward, "reverse": _reverse, "differences": _differences}
    found = ways[way.method](logits, start, direction, way)
    moving = any(bool(by.any()) for by in direction.values())
    # A constant's tangent is zero: a teacher's logits, detached ones that are only logged.
    kept = [each for each in found if bool(each.tangent.any())] if moving else found
    return kept or found


def _forward(logits: Logits, start: Weights, direction: Weights, way: Way) -> list[Along]:
    with forward_ad.dual_level():
        duals = {
            name: _dual(value.detach(), direction[name]) if name in direction else value.detach()
            for name, value in start.items()
        }
        found = []
        for scores in _some(logits.at(duals, cut=True), logits.given):
            primal, tangent = forward_ad.unpack_dual(scores.logits)  # type: ignore[no-untyped-call]
            primal = primal.detach()
            tangent = torch.zeros_like(primal) if tangent is None else tangent.detach()
            found.append(Along(replace(scores, logits=primal), tangent))
    return found


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def _reverse(logits: Logits, start: Weights, direction: Weights, way: Way) -> list[Along]:
    """The derivative of v ↦ ⟨Jᵀv, p⟩, which is J p for every v."""
    leaves = {name: value.detach().requires_grad_() for name, value in start.items()}
    scores = _some([s for s in logits.at(leaves) if s.logits.requires_grad], logits.given)
    outputs = [s.logits for s in scores]
    ones = [torch.zeros_like(z, requires_grad=True) for z in outputs]
    moved = [leaves[name] for name in direction]
    pulled = torch.autograd.grad(outputs, moved, ones, create_graph=True, allow_unused=True)
    pairs = zip(pulled, direction.values(), strict=True)
    products = [(g * by).sum() for g, by in pairs if g is not None and g.requires_grad]
    if not products:
        raise RuntimeError("no gradient can be differentiated once more")
    total = torch.stack([product.to(products[0]) for product in products]).sum()
    found = torch.autograd.grad(total, ones, allow_unused=True)
    return [
        Along(replace(s, logits=s.logits.detach()), torch.zeros_like(v) if a is None else a)
        for s, v, a in zip(scores, ones, found, strict=True)
    ]


def _differences(logits: Logits, start: Weights, direction: Weights, way: Way) -> list[Along]:
    def at(t: float) -> dict[int, Tensor]:
        with torch.no_grad():
            moved = {name: value.detach() for name, value in start.items()}
            moved |= {name: moved[name] + t * by for name, by in direction.items()}
        return {s.call: s.logits.detach() for s in logits.at(moved, shares=False)}

    # With a graph, which tells what is detached: differences see that change as well.
    leaves = {name: value.detach().requires_grad_() for name, value in start.items()}
    here = _some([s for s in logits.at(leaves) if s.logits.requires_grad], logits.given)
    here = [replace(s, logits=s.logits.detach()) for s in here]
    after, before = at(way.step), at(-way.step)
    found = []
    for scores in here:
        high, low = after.get(scores.call), before.get(scores.call)
        if high is None or low is None or not high.shape == low.shape == scores.logits.shape:
            raise CannotReplayError(
                f"training_step computed {len(here)} cross entropies, and others at weights a little away, so that its "
                "logits cannot be compared. Pass logits= (a function of module and batch)."
            )
        wide = widest_float(scores.logits.device)
        found.append(Along(scores, (high.to(wide) - low.to(wide)) / (2 * way.step)))
    return found


def _some(found: list[_T], given: bool) -> list[_T]:
    if not found and given:
        raise NoLogitsError(
            "the function logits= returned logits that depend on no parameter: they were detached, or computed under "
            "no_grad"
        )
    if not found:
        raise NoLogitsError(
            f"training_step computes no {WATCHED} of logits that depend on the parameters for its loss, and the step "
            "radius is that of a softmax or sigmoid. Where the loss is one in other words, pass logits=, a function of "
            "module and batch that gives logits and targets"
        )
    return found


def choose(logits: Logits, start: Weights, direction: Weights, method: Method = "auto") -> Way:
    """Try which way works for this model, and whether it agrees with differences.

    Args:
        logits: Of a replayed step.
        start: Parameters by name.
        direction: By name, about as long as the parameters; not zero.
        method: "auto" takes the first that works of forward, reverse and differences.

    Raises:
        RuntimeError: If a method that was asked for cannot work; or whatever the step itself raises.
    """
    replay = logits.replay
    if replay.sharded:
        if method in ("forward", "reverse"):
            raise RuntimeError(
                f"method={method!r} needs whole parameters and FSDP2 spreads them over ranks: use 'auto'."
            )
        return Way("differences", "parameters are spread over ranks (FSDP2)", _usual_step(start))
    leaves = {name: value.detach().requires_grad_() for name, value in start.items()}
    first = _some([s for s in logits.at(leaves) if s.logits.requires_grad], logits.given)
    replay.look_through(functools.reduce(torch.add, [s.logits.sum() for s in first]), leaves)
    first = [replace(s, logits=s.logits.detach()) for s in first]
    del leaves
    differences = Way("differences", "asked for", _LARGE_STEP if replay.rounds else _usual_step(start))
    expected = tangents(logits, start, direction, differences)
    _check_repeats(first, [along.scores for along in expected])
    if method == "differences":
        return differences
    reasons: dict[str, str] = {}
    others: list[list[Along]] = []
    for kind in ("forward", "reverse") if method == "auto" else (method,):
        way = Way(kind, reasons.get("forward", ""))
        try:
            found = tangents(logits, start, direction, way)
        except (torch.OutOfMemoryError, CannotReplayError):
            raise
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            reasons[kind] = f"{kind} mode does not work here ({line[:120]})"
            continue
        if _agree(found, expected, differences.step, replay.rounds):
            return way
        # A kink or a rounding makes differences wrong. Where a reentrant checkpoint's input is frozen, both derivatives
        # lose what is inside, alike and without a word.
        if any(_alike(found, other) for other in others) and "CheckpointFunction" not in replay.operations:
            return Way("forward")
        others.append(found)
        reasons[kind] = f"{kind} mode misses a part of the model, as differences show"
    if method != "auto":
        raise RuntimeError(f"method={method!r} was asked for, and {reasons[method]}: use 'auto'")
    return replace(differences, why="; ".join(reasons.values()))


def _usual_step(start: Weights) -> float:
    """The share of the direction that balances rounding against the third derivative."""
    return math.pow(max(torch.finfo(value.dtype).eps for value in start.values()), 1 / 3)


def _check_repeats(first: list[Scores], again: list[Scores]) -> None:
    """Refuse a step that gives other logits the second time, at the same weights and on the same batch."""
    by_call = {s.call: _wide(s.logits) for s in first}
    for s in again:
        z = by_call.get(s.call)
        if z is None or z.shape != s.logits.shape or bool((z - _wide(s.logits)).norm() > 0.05 * z.norm()):
            raise CannotReplayError(
                "training_step gave other logits the second time, at the same weights and on the same batch, so it "
                "depends on something that a replay cannot put back, such as an iterator or a generator that the "
                "module does not hold. Pass logits= (a function of module and batch)"
            )


def _agree(found: list[Along], expected: list[Along], step: float, rounds: bool) -> bool:
    """Whether tangents are those of differences, as far as these can tell."""
    if len(found) != len(expected):
        return False
    apart = size = noise = 0.0
    for one, other in zip(found, expected, strict=True):
        expected_tangent, logits = _wide(other.tangent), other.scores.logits
        eps = torch.finfo(torch.bfloat16 if rounds else logits.dtype).eps
        apart += float((_wide(one.tangent) - expected_tangent).square().sum())
        size += float(expected_tangent.square().sum())
        noise += float(_wide(logits).square().sum()) * (_ROUNDINGS * eps / step) ** 2
    if not math.isfinite(apart + size):
        return True  # a model that has blown up tells nothing about the way
    return math.sqrt(apart) <= (_ROUGHLY if rounds else _CLOSELY) * math.sqrt(size) + math.sqrt(noise)


def _alike(one: list[Along], other: list[Along]) -> bool:
    if len(one) != len(other):
        return False
    pairs = [(_wide(a.tangent), _wide(b.tangent)) for a, b in zip(one, other, strict=True)]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return apart <= _ALIKE**2 * sum(float(b.square().sum()) for _, b in pairs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(widest_float(tensor.device))
