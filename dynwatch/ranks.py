"""Operators of several processes: replicated vectors (DDP) and sharded ones (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynwatch.constants import widest_float
from dynwatch.operators import Operator


class RankFailure:
    """What went wrong in a product on this rank alone; the others get NaN and do not wait.

    Example:
        >>> RankFailure().error is None
        True
    """

    def __init__(self) -> None:
        self.error: Exception | None = None


def local_part(tensor: Tensor) -> Tensor:
    """The entries of a tensor that this process holds: all of them, unless it is a DTensor.

    Args:
        tensor: Of any shape.

    Returns:
        Its share if it is a DTensor, else the tensor itself.

    Example:
        >>> local_part(torch.ones(2))
        tensor([1., 1.])
    """
    share: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return share


def let_go_of_gathered(module: nn.Module) -> None:
    """Let FSDP2 drop the weights that a forward pass has gathered, which else waits for a backward pass.

    Args:
        module: Sharded or not; without shards nothing happens.

    Example:
        >>> let_go_of_gathered(nn.Linear(2, 2))
    """
    for child in module.modules():
        if callable(let_go := getattr(child, "reshard", None)):
            let_go()


def sum_of_ranks(tensor: Tensor) -> Tensor:
    """The sum of each process's tensor, in place, which all must call together.

    Args:
        tensor: Of one shape on all processes.

    Example:
        >>> sum_of_ranks(torch.ones(2))
        Traceback (most recent call last):
        ...
        ValueError: Default process group has not been initialized, please make sure to call init_process_group.
    """
    dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(operator: Operator, samples: float, failure: RankFailure) -> Operator:
    """The Hessian of the global batch from each rank's own, with one all-reduce a product.

    All ranks must have the same parameters (DDP) and ask for the same products. The ranks' means are weighted by
    their samples. Dot products are rank 0's, so that all ranks decide alike. A rank whose product raises sends NaN,
    notes why in `failure`, and goes on to the next collective: nobody waits for it.

    Args:
        operator: This rank's.
        samples: How many samples it stands for.
        failure: Where an error on this rank is noted.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> mean_over_ranks(from_matrix(torch.eye(2)), 8, RankFailure()).size  # products need a process group
        2
    """
    weight = float(samples)

    def mean(compute: Callable[[], Tensor]) -> Tensor:
        together = torch.full((operator.size + 1,), math.nan, dtype=operator.dtype, device=operator.device)
        try:
            if failure.error is None:
                together[:-1] = compute()
                together[:-1] *= weight
                together[-1] = weight
        except Exception as error:
            together.fill_(math.nan)
            failure.error = error
        dist.all_reduce(together)
        return together[:-1] / together[-1]

    def reduce(dots: Tensor) -> Tensor:
        dist.broadcast(dots, src=0)
        return dots

    def failed(error: Exception) -> None:
        failure.error = failure.error or error

    gradient = operator.gradient
    return replace(
        operator,
        apply=lambda vector: mean(lambda: operator(vector)),
        failed=failed,
        gradient=None if gradient is None or not dist.is_initialized() else mean(lambda: gradient),
        reduce=reduce,
    )


def sharded(operator: Operator, replicated: Tensor) -> Operator:
    """An operator on vectors of which each rank holds a share (FSDP2), and some entries are held by all.

    Entries that all ranks hold are scaled by 1/√ranks, so that sums over ranks count them once; products are in these
    coordinates. Every step of a solver then needs one small all-reduce.

    Args:
        operator: On this rank's entries, in plain coordinates. Its products must be the global ones.
        replicated: [size] bool, which entries all ranks hold, in the same order on all.

    Raises:
        ValueError: If `replicated` has another shape.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> sharded(from_matrix(torch.eye(2)), torch.tensor([True]))
        Traceback (most recent call last):
        ...
        ValueError: replicated has shape (1,) and must have shape (2,), one entry for each of the vector's.
    """
    if replicated.shape != (operator.size,):
        raise ValueError(
            f"replicated has shape {tuple(replicated.shape)} and must have shape ({operator.size},), one entry for "
            "each of the vector's."
        )
    shrink = shares_of(replicated).sqrt().to(operator.dtype)
    rows = shares_of(replicated).sum()
    dist.all_reduce(rows)

    def reduce(dots: Tensor) -> Tensor:
        dist.all_reduce(dots)
        return dots

    def draw(generator: torch.Generator) -> Tensor:
        # One number from the generator, which so stays alike on all ranks whatever their shares.
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        both = [torch.Generator(generator.device).manual_seed(seed + i) for i in (0, 1 + dist.get_rank())]
        mask = replicated.to(generator.device)
        drawn = torch.empty(operator.size, dtype=operator.dtype, device=generator.device).normal_(generator=both[1])
        drawn[mask] = torch.empty_like(drawn[mask]).normal_(generator=both[0])
        return drawn.to(operator.device) * shrink

    gradient = operator.gradient
    return replace(
        operator,
        apply=lambda vector: shrink * operator(vector / shrink),
        dimension=round(float(rows)),
        gradient=None if gradient is None else shrink * gradient,
        reduce=reduce,
        draw=draw,
    )


def shares_of(replicated: Tensor) -> Tensor:
    """How much of each entry belongs to this rank: all of a sharded one, 1/ranks of one that all hold.

    Args:
        replicated: [n] bool.

    Returns:
        [n], in the widest float of the device.

    Example:
        >>> shares_of(torch.tensor([True, False]))  # a single process
        tensor([1., 1.], dtype=torch.float64)
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    one = torch.ones(len(replicated), dtype=widest_float(replicated.device), device=replicated.device)
    return one.masked_fill(replicated, 1 / ranks)
