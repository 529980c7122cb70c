"""The certified scan for the tightest of the step radii: a branch and bound over the real part of a complex zero.

A zero t = (u + iy) / Δ of F(t) = Σ_k exp(z_k + t a_k), with Δ the spread of a, is ruled out where

- one class has more than half of p(u) = softmax(z + u a / Δ): its term is larger than the sum of all others;
- abs(y) < h(u) = π / (2 σ_u), σ_u² the variance of a / Δ under p(u): for F(u + iy) / F(u) is the characteristic
  function φ of a / Δ under p(u), and abs φ(y) ≥ cos(σ_u y) while σ_u y ≤ π/2.

So abs(t) Δ is at least the least of hypot(u, h(u)) over those u at which no class has more than half. Both tests are
made for whole intervals of u. From a centre to a distance w

- log-odds of the top class change by w · max(1 - s, s) at most, where s is its place in [min a, max a];
- log σ² changes by w at most, as its slope g is the third central moment over the second;
- log σ² ≤ its tangent at the centre + w²/8, as its second derivative is the variance of a / Δ in other weights, which
  is 1/4 at most, less 3 σ². With exp(-x) ≥ 1 - x this leaves a parabola to minimise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dynwatch._logit_rows import row_slices

# How far below the least value of hypot(u, h) the result may stay, relatively.
TOLERANCE = 1e-3
# Intervals this close to the lowest are refined with it: a few more evaluations for fewer rounds.
_SLACK = 1.002
# Enough for any float64 input that was tried four times over; an early end is certified too, only less tight.
_ROUNDS = 200
# Below, a variance has lost its digits to underflow.
_LEAST_VARIANCE = 1e-200
# Log-odds are known to this many units in the last place.
_ROUNDING = 256


@dataclass(frozen=True)
class _Intervals:
    """Intervals [low, high] of abs(u), all tensors of one length; `high` may be infinite.

    Attributes:
        row: Sample.
        side: Sign of u, 1 or -1.
        bound: What abs(t) Δ is at least for a zero in the interval.
        settled: Whether halves would not give a much larger bound.
    """

    row: Tensor
    side: Tensor
    low: Tensor
    high: Tensor
    bound: Tensor
    settled: Tensor

    def pick(self, which: Tensor) -> _Intervals:
        return _Intervals(*(value[which] for value in vars(self).values()))

    def join(self, other: _Intervals) -> _Intervals:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Intervals(*(torch.cat(pair) for pair in pairs))


def scan_rows(logits: Tensor, tangents: Tensor, ceiling: float = math.inf) -> Tensor:
    r"""A certified lower bound of the nearest complex zero of each row's :math:`\sum_k e^{z_k + t a_k}`.

    .. math:: \min_u \frac{1}{\Delta} \sqrt{u^2 + \pi^2 / (4 \operatorname{Var}_{p(u)}(a / \Delta))}
        \quad\text{where}\quad \max_k p_k(u) \le \tfrac 1 2, \quad p(u) = \operatorname{softmax}(z + u a / \Delta)

    up to 2 · `TOLERANCE` below it, never above. The proof stands at the head of this module. A row takes 20 to 60
    evaluations of K terms; most of the memory is a few temporaries of 4 MiB.

    Args:
        logits: [n, K ≥ 2], finite, in the widest float of the device.
        tangents: [n, K], finite, of the same type.
        ceiling: Rows are refined only while their bound is below it: a larger result says "not below the ceiling".

    Returns:
        [n]; infinite where all tangents of a row are equal.

    Example:
        >>> import torch
        >>> three = torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64)
        >>> scan_rows(three, torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)).round(decimals=1)
        tensor([3.9000], dtype=torch.float64)
    """
    rows = logits.shape[0]
    logits = logits - logits.amax(dim=-1, keepdim=True)
    least, most = tangents.aminmax(dim=-1, keepdim=True)
    spread = (most - least).squeeze(-1)
    slopes = (tangents - least) / (most - least).masked_fill(most == least, 1.0)
    intervals = _start(logits, slopes, spread)
    for _ in range(_ROUNDS):
        lowest = _lowest(intervals, rows)
        near = intervals.bound <= _SLACK * lowest[intervals.row]
        unsettled = near & ~intervals.settled & (intervals.bound < ceiling * spread[intervals.row])
        if not bool(unsettled.any()):
            break
        halves = _halve(intervals.pick(unsettled), logits, slopes)
        intervals = intervals.pick(~unsettled).join(halves.pick(halves.bound < math.inf))
    return _lowest(intervals, rows) / spread


def log_odds(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row's most probable class the log-odds log(p / (1 - p)), exact for large ones too, and the index.

    Args:
        logits: [n, K ≥ 2].

    Returns:
        [n], negative if no class has half, and [n, 1].

    Example:
        >>> log_odds(torch.tensor([[1e4, 0.0], [0.0, 0.0]]))
        (tensor([10000.,     0.]), tensor([[0], [0]]))
    """
    highest, top = logits.max(dim=-1, keepdim=True)
    others = logits.scatter(-1, top, -math.inf)
    return highest.squeeze(-1) - others.logsumexp(dim=-1), top


def _start(logits: Tensor, slopes: Tensor, spread: Tensor) -> _Intervals:
    """From where the top class can first have lost its half to infinity, on both sides."""
    odds, top = log_odds(logits)
    place = slopes.gather(-1, top).squeeze(-1)
    # A class that has the largest slope of all never loses to others on the positive side.
    odds = (1 - _ROUNDING * torch.finfo(odds.dtype).eps) * odds
    starts = [torch.where(odds > 0, odds / rate, 0.0) for rate in (1 - place, place)]
    row = torch.arange(len(logits), device=logits.device).repeat(2)
    low = torch.cat(starts)
    side = torch.ones_like(low)
    side[len(logits) :] = -1
    bound = torch.hypot(low, torch.full_like(low, math.pi))
    settled = torch.zeros_like(low, dtype=torch.bool)
    intervals = _Intervals(row, side, low, torch.full_like(low, math.inf), bound, settled)
    return intervals.pick((low < math.inf) & (spread[row] > 0))


def _lowest(intervals: _Intervals, rows: int) -> Tensor:
    """The least bound of each row."""
    lowest = intervals.bound.new_full((rows,), math.inf)
    return lowest.scatter_reduce(0, intervals.row, intervals.bound, "amin")


def _halve(parents: _Intervals, logits: Tensor, slopes: Tensor) -> _Intervals:
    """Both parts of each interval, with their bounds; an endless one is cut at about twice its beginning."""
    endless = parents.high == math.inf
    cut = torch.where(endless, 2 * parents.low + 4, (parents.low + parents.high) / 2)
    row, side = parents.row.repeat(2), parents.side.repeat(2)
    low, high = torch.cat([parents.low, cut]), torch.cat([cut, parents.high])
    bound, settled = torch.empty_like(low), torch.empty_like(low, dtype=torch.bool)
    for part in row_slices(len(low), logits.shape[-1]):
        bound[part], settled[part] = _bound(logits[row[part]], slopes[row[part]], side[part], low[part], high[part])
    return _Intervals(row, side, low, high, torch.maximum(bound, parents.bound.repeat(2)), settled)


def _bound(logits: Tensor, slopes: Tensor, side: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """What abs(t) Δ is at least for a zero with abs(u) in [low, high], and whether the interval is settled."""
    endless = high == math.inf
    # A finite stand-in keeps NaN out of what is then not used.
    width = torch.where(endless, 0.0, (high - low) / 2)
    centre = low + width
    odds, place, variance, slope = _moments(logits.addcmul(slopes, (side * centre).unsqueeze(-1)), slopes)
    slope = side * slope
    square = math.pi**2 / 4 / variance.clamp_min(_LEAST_VARIANCE)
    value = torch.sqrt(centre**2 + square)
    flat = low**2 + (square * torch.exp(-width)).clamp_min(math.pi**2)
    # The parabola; it counts for nothing where the variance, and so its slope, is lost.
    scale = torch.where(variance > _LEAST_VARIANCE, square * torch.exp(-(width**2) / 8), 0.0)
    off = torch.maximum(torch.minimum(scale * slope / 2 - centre, width), -width)
    parabola = (centre + off) ** 2 + scale * (1 - slope * off)
    bound = torch.sqrt(torch.maximum(flat, parabola))
    # Where two classes are level in a single point, rounding must not rule that out.
    rounding = _ROUNDING * torch.finfo(odds.dtype).eps * (1 + centre)
    ruled_out = odds > width * torch.maximum(place, 1 - place) + rounding
    # An endless one is ruled out when the top class at its beginning also has the extreme slope.
    ruled_out &= ~endless | (torch.where(side > 0, 1 - place, place) == 0)
    bound = torch.where(endless, torch.hypot(low, torch.full_like(low, math.pi)), bound)
    # Either a point of it is near its bound, or it is so short that it does not matter which points are ruled out.
    near = (odds <= 0) & (bound >= (1 - TOLERANCE) * value)
    short = width * (centre + square / 2) <= TOLERANCE * bound**2
    settled = ~endless & (near | short)
    return bound.masked_fill(ruled_out, math.inf), settled


def _moments(logits: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-odds of the top class, its slope, the variance of slopes and the third central moment over it."""
    highest, top = logits.max(dim=-1, keepdim=True)
    weights = torch.exp(logits - highest)
    # The sum of the others is taken without the top class, so that it keeps its digits when it is small.
    rest = weights.scatter(-1, top, 0.0).sum(dim=-1)
    odds = -torch.log(rest.clamp_min(torch.finfo(rest.dtype).tiny))
    place = slopes.gather(-1, top)
    # From the top class, for the same reason.
    off = slopes - place
    weights /= 1 + rest.unsqueeze(-1)
    off -= (weights * off).sum(dim=-1, keepdim=True)
    weights *= off * off
    variance = weights.sum(dim=-1)
    third = (weights * off).sum(dim=-1)
    slope = third / torch.where(variance > 0, variance, 1.0)
    return odds, place.squeeze(-1), variance, slope
