"""Norms of gradients and updates, in one pass over the tensors and without a host transfer.

Everything here takes lists of tensors (dense, sparse or `DTensor`) and returns small tensors on the
same device. For sharded tensors the norms are those of the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from dynwatch.constants import on_device, widest_float
from dynwatch.ranks import local_part

# A float32 sum over a long vector loses digits on a CPU (1e-4 at 6e5 entries was seen for
# torch.linalg.vector_norm). Pieces of these lengths keep the error of a norm below 1e-6.
_DOT_PIECE = 1 << 16
# Squares of half-precision numbers share their last digits, so that rounding errors add up instead of
# cancelling; a CPU with short vectors lost 5e-6 with the longer pieces.
_HALF_DOT_PIECE = 1 << 13
_NORM_PIECE = 1 << 13


def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    r"""The p-norm of each tensor, :math:`(\sum_i |x_i|^p)^{1/p}`.

    One fused pass over the data. Half-precision tensors are accumulated in float32. A `DTensor`
    counts as the whole tensor it stands for: all its shards are summed with one all-reduce for each
    set of tensors with the same layout, so every rank must call this at the same time. If the local
    part fails on one rank, that rank raises after the all-reduce and the others get NaN.

    Args:
        tensors: Real or complex tensors of any shapes, dtypes and devices; sparse COO is summed first.
        norm_type: p > 0; `math.inf` for the largest absolute entry.

    Returns:
        [n_tensors], float64 (float32 where the device has no float64), on the first tensor's device.

    Raises:
        ValueError: If `norm_type` is not positive.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(5)])
        tensor([5., 0.], dtype=torch.float64)
    """
    norms, failure = _norms_or_failure(tensors, norm_type)
    if failure is not None:
        raise failure
    return norms


def combine_norms(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """The norm of the concatenation of tensors whose norms are given.

    Args:
        norms: [n_tensors].
        norm_type: The p with which `norms` were taken.

    Returns:
        A scalar tensor; 0 for no tensors.

    Example:
        >>> combine_norms(torch.tensor([3.0, 4.0])).item()
        5.0
    """
    if norms.numel() == 0:
        return norms.new_zeros(())
    if math.isinf(norm_type):
        return norms.max()  # NaN stays NaN
    if norms.device.type == "cpu":
        return norms.new_tensor(_combine(norms.tolist(), norm_type))
    # The largest norm is divided out: its p-th power may not fit.
    top = norms.max()
    scale = torch.where((top > 0) & top.isfinite(), top, torch.ones_like(top))
    return (norms / scale).pow(norm_type).sum().pow(1.0 / norm_type) * scale


def group_norms(norms: Tensor, index: Tensor, n_groups: int, norm_type: float = 2.0) -> Tensor:
    """The norm of each group of tensors, as `combine_norms` for each group.

    Args:
        norms: [n_tensors].
        index: [n_tensors] int64, the group of each tensor; -1 for none.
        n_groups: How many groups there are.
        norm_type: The p with which `norms` were taken.

    Returns:
        [n_groups]; 0 for an empty group.

    Example:
        >>> group_norms(torch.tensor([3.0, 4.0, 7.0]), torch.tensor([0, 0, 1]), 2)
        tensor([5., 7.])
    """
    # Group n_groups takes what belongs to none; it is cut off at the end.
    slot = torch.where(index < 0, n_groups, index)
    top = norms.new_zeros(n_groups + 1).scatter_reduce(0, slot, norms, "amax")
    if math.isinf(norm_type):
        return top[:n_groups]
    scale = torch.where((top > 0) & top.isfinite(), top, torch.ones_like(top))
    powers = (norms / scale[slot]).pow(norm_type)
    sums = norms.new_zeros(n_groups + 1).index_add(0, slot, powers)
    return (sums.pow(1.0 / norm_type) * scale)[:n_groups]


@dataclass(frozen=True)
class NonFinite:
    """What a search for NaN and Inf found.

    Attributes:
        first: Name of the first tensor, in the given order, that holds a non-finite entry.
        tensors: How many tensors hold one, of how many searched.
        n_tensors: How many tensors were searched.
        entries: How many entries are NaN or Inf.
        n_entries: How many entries were searched.

    Example:
        >>> print(NonFinite(first="conv.weight", tensors=1, n_tensors=2, entries=3, n_entries=40))
        conv.weight first, 1 of 2 tensors, 3 of 40 entries
    """

    first: str
    tensors: int
    n_tensors: int
    entries: int
    n_entries: int

    @property
    def fraction(self) -> float:
        """Share of non-finite entries, in (0, 1]."""
        return self.entries / self.n_entries

    def __str__(self) -> str:
        return (
            f"{self.first} first, {self.tensors} of {self.n_tensors} tensors, "
            f"{self.entries} of {self.n_entries} entries"
        )


def find_nonfinite(named_tensors: Iterable[tuple[str, Tensor]]) -> NonFinite | None:
    """Search tensors for NaN and Inf; for when a norm has told that there is something to find.

    One pass and one host transfer. For `DTensor` every rank must call this at the same time.

    Args:
        named_tensors: (name, tensor) pairs in the order in which "first" is meant.

    Returns:
        What was found, or None if every entry is finite.

    Example:
        >>> find_nonfinite([("a", torch.ones(2)), ("b", torch.tensor([1.0, float("nan")]))])
        NonFinite(first='b', tensors=1, n_tensors=2, entries=1, n_entries=4)
    """
    named = list(named_tensors)
    if not named:
        return None
    tensors = [t for _, t in named]
    device = _local_values(tensors[0]).device
    failure: Exception | None = None
    try:
        local = torch.stack([(~torch.isfinite(_local_values(t))).sum().to(device) for t in tensors]).double()
    except Exception as error:
        if not any(_is_sharded(t) for t in tensors):
            raise
        failure = error
        local = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    # Shards are disjoint: their counts add up as 1-norms do.
    bad = [int(c) for c in _sum_over_shards(tensors, local, 1.0).tolist()]
    if failure is not None:
        raise failure
    if not any(bad):
        return None
    return NonFinite(
        first=next(name for (name, _), count in zip(named, bad, strict=True) if count),
        tensors=sum(count > 0 for count in bad),
        n_tensors=len(bad),
        entries=sum(bad),
        n_entries=sum(_local_values(t).numel() if t.is_sparse else t.numel() for t in tensors),
    )


def update_and_weight_norms(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The 2-norm of the change of each tensor, and of the tensor before it.

    Args:
        before: Copies of the tensors; **overwritten** with `before - after`, so that no third copy
            of the model is needed.
        after: The tensors now.

    Returns:
        ([n_tensors], [n_tensors]): norms of the updates and of the weights before. The update-to-weight
        ratio of a group is the quotient of their group norms.

    Example:
        >>> update, weight = update_and_weight_norms([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 3.0])])
        >>> update / weight
        tensor([0.2000], dtype=torch.float64)
    """
    # For sharded tensors a rank that fails takes part in both sums before it raises.
    weights, failure = _norms_or_failure(before)
    if not before:
        return weights, weights.clone()
    try:
        with torch.no_grad():
            torch._foreach_sub_([_local_values(t) for t in before], [_local_values(t) for t in after])
    except Exception as error:
        if not any(_is_sharded(t) for t in before):
            raise
        failure = failure or error
    updates, later = _norms_or_failure(before)
    if failure := failure or later:
        raise failure
    return updates, weights


def _norms_or_failure(tensors: Sequence[Tensor], norm_type: float = 2.0) -> tuple[Tensor, Exception | None]:
    """The norms, and what failed in the local part of sharded ones: then NaN has taken its place in the sum."""
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type} must be positive; use math.inf for the largest entry.")
    if not tensors:
        return torch.zeros(0, dtype=torch.float64), None
    local: list[Tensor] = [_local_values(t) for t in tensors]
    failure: Exception | None = None
    try:
        norms = _local_norms(local, norm_type)
    except Exception as error:
        if not any(_is_sharded(t) for t in tensors):
            raise
        failure = error
        norms = torch.full((len(tensors),), math.nan, dtype=torch.float64, device=local[0].device)
    return _sum_over_shards(tensors, norms, norm_type), failure


def _combine(norms: Sequence[float], norm_type: float) -> float:
    """As `combine_norms`, on the host: a few tensor operations would cost more than all the numbers."""
    top = max(norms)
    if not 0 < top < math.inf or any(math.isnan(norm) for norm in norms):
        return float(sum(norms))  # 0, infinite or NaN
    return top * math.pow(math.fsum(math.pow(norm / top, norm_type) for norm in norms), 1.0 / norm_type)


def _is_sharded(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, Parameter):
        return False  # most are, and the question is asked for each of them on each step
    return _dtensor_type() is not None and isinstance(tensor, _dtensor_type() or ())


def _dtensor_type() -> type | None:
    """DTensor, or None where there cannot be one (its import is slow, and not every build has it)."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import DTensor  # type: ignore[attr-defined, no-redef, unused-ignore]
    return DTensor


def _local_values(tensor: Tensor) -> Tensor:
    """The entries that this rank holds, dense."""
    tensor = local_part(tensor).detach()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _local_norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    home = tensors[0].device
    wide = widest_float(home)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        alike.setdefault((t.device, t.dtype), []).append(i)
    norms = torch.zeros(len(tensors), dtype=wide, device=home)
    for (device, dtype), where in alike.items():
        batch = [tensors[i] for i in where]
        if device.type == "cpu":
            found = _cpu_norms(batch, norm_type)
        else:
            filled = [t for t in batch if t.numel()]
            accumulate = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
            each = iter(torch._foreach_norm(filled, norm_type, dtype=accumulate) if filled else ())
            found = torch.stack([next(each) if t.numel() else norms.new_zeros(()) for t in batch])
        if len(alike) == 1:
            return found.to(wide)
        norms[on_device(tuple(where), home)] = found.to(device=home, dtype=wide)
    return norms


def _cpu_norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    norms = []
    for t in tensors:
        flat, piece = t.reshape(-1), _DOT_PIECE
        if flat.dtype in (torch.float16, torch.bfloat16):
            flat, piece = flat.float(), _HALF_DOT_PIECE
        norms.append(_cpu_norm(flat, norm_type, piece))
    return torch.tensor(norms, dtype=torch.float64)


def _cpu_norm(flat: Tensor, norm_type: float, dot_piece: int) -> float:
    if flat.numel() == 0:
        return 0.0
    if math.isinf(norm_type):
        return float(torch.linalg.vector_norm(flat, norm_type))
    if norm_type == 2 and not flat.is_complex():
        # A dot product is the fastest reduction that a CPU has: half the time of vector_norm.
        square = sum(torch.dot(piece, piece).item() for piece in torch.split(flat, dot_piece))
        if 1e-24 < square < 1e36 or (square == 0 and not flat.any()):
            return math.sqrt(square)
    else:
        norm = _norm_by_pieces(flat, norm_type)
        if norm > 0 and -24 < norm_type * math.log10(norm) < 36:
            return norm
    # Powers that leave the range of float32 say nothing about the norm; this pass is slower.
    top = float(torch.linalg.vector_norm(flat, math.inf))
    return top * _norm_by_pieces(flat, norm_type, top) if top > 0 and math.isfinite(top) else top


def _norm_by_pieces(flat: Tensor, norm_type: float, unit: float | None = None) -> float:
    """The norm, in the tensor's own precision, or of the entries over `unit` in float64."""
    wide = torch.complex128 if flat.is_complex() else torch.float64
    norms = [
        float(torch.linalg.vector_norm(piece if unit is None else piece.to(wide) / unit, norm_type))
        for piece in torch.split(flat, _NORM_PIECE)
    ]
    return _combine(norms, norm_type)


def _sum_over_shards(tensors: Sequence[Tensor], norms: Tensor, norm_type: float) -> Tensor:
    """Turn the norms of local shards into those of the whole tensors."""
    layouts: dict[tuple[object, tuple[int, ...]], list[int]] = {}
    for i, t in enumerate(tensors):
        if _is_sharded(t):
            if any(p.is_partial() for p in t.placements):  # type: ignore[attr-defined]
                raise ValueError("A DTensor with a Partial placement has no entries of its own yet: redistribute it.")
            split_over = tuple(d for d, p in enumerate(t.placements) if p.is_shard())  # type: ignore[attr-defined]
            if split_over:
                layouts.setdefault((t.device_mesh, split_over), []).append(i)  # type: ignore[attr-defined]
    for (mesh, mesh_dims), where in layouts.items():
        rows = on_device(tuple(where), norms.device)
        shard = norms[rows]
        # The p-th powers add up; the largest norm over the ranks is divided out first, so that they fit.
        top = torch.nan_to_num(shard, nan=0.0, posinf=0.0)
        for d in mesh_dims:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=mesh.get_group(d))  # type: ignore[attr-defined]
        scale = torch.where(top > 0, top, torch.ones_like(top))
        value = shard / scale
        if math.isinf(norm_type):
            bad = torch.where(shard.isfinite(), torch.zeros_like(shard), torch.ones_like(shard))
            for d in mesh_dims:
                dist.all_reduce(bad, op=dist.ReduceOp.SUM, group=mesh.get_group(d))  # type: ignore[attr-defined]
            norms = norms.index_copy(0, rows, torch.where(bad > 0, torch.full_like(top, math.nan), top))
            continue
        value = value.pow(norm_type)
        for d in mesh_dims:
            dist.all_reduce(value, op=dist.ReduceOp.SUM, group=mesh.get_group(d))  # type: ignore[attr-defined]
        norms = norms.index_copy(0, rows, value.pow(1.0 / norm_type) * scale)
    return norms
