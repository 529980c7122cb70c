"""From a replayed training step to its Hessian as an operator, by the best way that the model allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynwatch.callbacks.replay import Replay, nodes_behind
from dynwatch.callbacks.snapshot import CannotReplayError
from dynwatch.constants import widest_float
from dynwatch.operators import Operator, flatten, hessian, hessian_by_differences, unflatten, vector_dtype
from dynwatch.ranks import RankFailure, local_part, mean_over_ranks, sharded, shares_of

Method = Literal["auto", "exact", "differences"]

# Backward nodes of functions that are linear in pieces; where they bend, differences see curvature that is not there.
_KINKS = (
    *("relu", "leakyrelu", "rrelu", "prelu", "threshold", "hardtanh", "hardsigmoid", "hardswish"),
    *("clamp", "max", "min", "amax", "amin", "adaptivemaxpool", "fractionalmaxpool", "abs"),
)

# How far a product may be from differences of gradients, relative to them, to be taken for the Hessian's.
_CLOSELY, _ROUGHLY = 0.05, 0.3
# Of differences where gradients are rounded to half precision, relative to the weights.
_LARGE_STEP = 0.05


@dataclass(frozen=True)
class Way:
    """How products with the Hessian are computed.

    Attributes:
        method: "exact" or "differences".
        why: The reason, in words.
        kinks: Functions linear in pieces that the loss runs through, where differences are used.
        step: Length of the differences' displacement as a share of |θ|; None takes the usual one.
    """

    method: Literal["exact", "differences"]
    why: str
    kinks: tuple[str, ...] = ()
    step: float | None = None


@dataclass(frozen=True)
class Source:
    """Where a reading's curvature comes from.

    Attributes:
        replay: The training step; entered.
        way: How products are computed, as chosen on the first time.
        ranks: How many processes share the batch. With several, all must take the same steps together.
        failure: Where an error on this rank alone is noted; the others get NaN.
    """

    replay: Replay
    way: Way
    ranks: int
    failure: RankFailure


@dataclass(frozen=True)
class Curvature:
    """The Hessian of a replayed loss, of the global batch.

    Attributes:
        operator: Products with it; its gradient is that of the loss.
        along_gradient: [size] its product with the gradient.
        samples: Of the global batch; None if that cannot be told.
    """

    operator: Operator
    along_gradient: Tensor
    samples: int | None


def choose(replay: Replay, method: Method) -> Way:
    """Try which way works for this model.

    Args:
        replay: Entered.
        method: "auto" takes the exact way where it works.

    Raises:
        RuntimeError: If method="exact" cannot work; or whatever the step itself raises.
    """
    if replay.sharded:
        if method == "exact":
            raise RuntimeError("method='exact' needs whole parameters and FSDP2 spreads them over ranks: use 'auto'.")
        replay.gradient()
        return by_differences_because(replay, "parameters are spread over ranks (FSDP2)")
    first = float(replay.loss(replay.leaves()).detach())
    leaves = replay.leaves()
    loss = replay.loss(leaves)
    _check_repeats(first, float(loss.detach()), loss.device)
    if method == "differences":
        return by_differences_because(replay, "asked for")
    try:
        operator = hessian(loss, list(leaves.values()))
        gradient = operator.gradient
        product = None if gradient is None else operator(gradient)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    else:
        reason = _why_unfaithful(replay, custom_functions(loss), gradient, product)
    if reason and method == "exact":
        raise RuntimeError(f"method='exact' needs second derivatives, and this model has none ({reason}): use 'auto'")
    if reason:
        return by_differences_because(replay, f"there is no second derivative ({reason})")
    return Way("exact", "second derivatives exist")


def _check_repeats(first: float, second: float, device: torch.device) -> None:
    """Refuse a step that gives another loss the second time, at the same weights and on the same batch."""
    tolerance = 1e-6 if device.type == "cpu" else 1e-3  # kernels of accelerators may add in any order
    if abs(first - second) > tolerance * max(abs(first), abs(second)):
        raise CannotReplayError(
            f"training_step gave a loss of {first:.7g} and then of {second:.7g} at the same weights and on the same "
            "batch, so it depends on something that a replay cannot put back, such as an iterator or a generator that "
            "the module does not hold. It has been drawn from twice. Pass loss= (a function of module and batch)"
        )


def by_differences_because(replay: Replay, why: str) -> Way:
    # What autocast rounds needs a larger step: at the usual one products were off by 30 %, at this one by 3 %.
    return Way("differences", why, kinks(replay.operations), _LARGE_STEP if replay.rounds else None)


def _why_unfaithful(replay: Replay, custom: Sequence[str], gradient: Tensor | None, product: Tensor | None) -> str:
    """Why an exact product is not that of the Hessian; empty if it is.

    Where a function of the user's own has a backward that cannot be differentiated, as with `once_differentiable` or
    kernels, torch leaves its part out of the product without a word. Differences of gradients show it.
    """
    if not custom or gradient is None or product is None:
        return ""
    rounded = replay.rounds
    expected = by_differences(replay, _LARGE_STEP if rounded else None)(gradient)
    rough = rounded or bool(kinks(replay.operations))
    if not bool((product - expected).norm() > (_ROUGHLY if rough else _CLOSELY) * expected.norm()):
        return ""
    return f"the backward of {', '.join(custom)} cannot be differentiated"


def custom_functions(loss: Tensor) -> tuple[str, ...]:
    """Names of the subclasses of torch.autograd.Function behind a loss."""
    own = (node for node in nodes_behind(loss) if isinstance(node, torch.autograd.function.BackwardCFunction))
    return tuple(sorted({type(node).__name__.partition("Backward")[0] for node in own}))


def curvature(source: Source) -> Curvature:
    """The Hessian of the replayed loss, of the global batch; on several ranks all must call this together."""
    replay, way, ranks = source.replay, source.way, source.ranks
    if replay.sharded:
        operator = by_differences(replay, way.step)
    elif ranks == 1:
        operator = exact(replay) if way.method == "exact" else by_differences(replay, way.step)
    else:
        operator = mean_over_ranks(_own(source), replay.samples or 1, source.failure)
    gradient = operator.gradient
    if gradient is None:
        raise RuntimeError("the operator has no gradient")  # cannot be: all of the above have
    return Curvature(operator, operator(gradient), _all_samples(replay, ranks, operator.device))


def _own(source: Source) -> Operator:
    """This rank's Hessian; if that fails, one whose products are never asked for."""
    replay, way = source.replay, source.way
    try:
        if source.failure.error is None:
            return exact(replay) if way.method == "exact" else by_differences(replay, way.step)
    except Exception as error:
        source.failure.error = error
    weights = flatten(list(replay.parameters.values()))
    n = len(weights)
    return Operator(torch.zeros_like, n, n, weights.dtype, weights.device, gradient=torch.zeros_like(weights))


def _all_samples(replay: Replay, ranks: int, device: torch.device) -> int | None:
    if ranks == 1:
        return replay.samples
    total, unknown = sums_over_ranks([replay.samples or 0, replay.samples is None], device)
    return None if unknown else int(total)


def sums_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over all ranks, which must call this together."""
    together = torch.tensor(values, dtype=widest_float(device), device=device)
    torch.distributed.all_reduce(together)
    return [float(value) for value in together.tolist()]


def least_over_ranks(value: int, device: torch.device) -> int:
    """The smallest of all ranks' numbers, which must call this together."""
    together = torch.tensor([value], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MIN)
    return int(together.item())


def all_could(could: bool, ranks: int, device: torch.device) -> bool:
    """Whether all ranks could do what this one could or could not; several must call this together."""
    return could if ranks == 1 else not sums_over_ranks([float(not could)], device)[0]


def exact(replay: Replay, start: int = 0, stop: int | None = None, seed: int | None = None) -> Operator:
    """The exact Hessian of the replayed loss on (a part of) the batch, on this rank."""
    leaves = replay.leaves()
    return hessian(replay.loss(leaves, start, stop, seed), list(leaves.values()))


def by_differences(replay: Replay, relative_step: float | None = None) -> Operator:
    """The Hessian by central differences; under FSDP2 in sharded vectors."""
    names = list(replay.parameters)
    like = [local_part(p).detach() for p in replay.parameters.values()]

    def gradient_at(displacement: Tensor | None) -> Tensor:
        moved = None if displacement is None else dict(zip(names, unflatten(displacement, like), strict=True))
        found = replay.gradient(moved)
        gradient = flatten([found[name] for name in names]).to(vector_dtype(like))
        if any_replicated:  # FSDP averages over ranks what it shards, nobody the rest
            common = gradient[replicated]
            torch.distributed.all_reduce(common)
            gradient[replicated] = common / torch.distributed.get_world_size()
        return gradient

    weights = flatten(like)
    any_replicated = False
    if not replay.sharded:
        return hessian_by_differences(gradient_at, weights, relative_step)
    replicated = torch.cat(
        [
            torch.full((part.numel(),), _is_replicated(p), device=part.device)
            for p, part in zip(replay.parameters.values(), like, strict=True)
        ]
    )
    any_replicated = bool(replicated.any())
    own = shares_of(replicated).to(weights)

    def norm(vector: Tensor) -> float:
        square = torch.dot(own * vector, vector).reshape(1)
        torch.distributed.all_reduce(square)
        return math.sqrt(float(square))

    return sharded(hessian_by_differences(gradient_at, weights, relative_step, norm), replicated)


def _is_replicated(parameter: Tensor) -> bool:
    placements = getattr(parameter, "placements", ())
    return not any(placement.is_shard() for placement in placements)


def kinks(operations: frozenset[str]) -> tuple[str, ...]:
    """Those of the operations behind a loss that are linear in pieces."""
    return tuple(sorted(name for name in operations if name.lower().startswith(_KINKS)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
