"""The certified scan for the tightest of the step radii: a branch and bound over the real part of a complex zero.

A zero t = (u + iy) / Δ of F(t) = Σ_k exp(z_k + t a_k), with Δ the spread of a, is ruled out where

- one class has more than half of p(u) = softmax(z + u a / Δ): its term is larger than the sum of all others;
- abs(y) < h(u) = π / (2 σ_u), σ_u² the variance of a / Δ under p(u): for F(u + iy) / F(u) is the characteristic
  function φ of a / Δ under p(u), and abs φ(y) ≥ cos(σ_u y) while σ_u y ≤ π/2.

So abs(t) Δ is at least the least of hypot(u, h(u)) over those u at which no class has more than half. Both tests are
made for whole intervals of u. The log-odds of a class are concave in u, as minus a log of a sum of exponentials; so a
class that has more than half at both ends has it in between. From a centre to a distance w

- log-odds of the top class change by w · max(1 - s, s) at most, where s is its place in [min a, max a];
- log σ² changes by w at most, as its slope g is the third central moment over the second;
- log σ² ≤ its tangent at the centre + w²/8, as its second derivative is the variance of a / Δ in other weights, which
  is 1/4 at most, less 3 σ². With exp(-x) ≥ 1 - x this leaves a parabola to minimise;
- logits are known to e = ε (1 + abs u), so log-odds to e and log σ² to 2 e. An interval of that width is not halved.

Where σ is tiny over a long way (two classes are level and move alike, others are far below) this would take very many
intervals. A row that has used up its share of them keeps the bound that it has: true, only less tight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynwatch._logit_rows import row_slices

# How far below the least value of hypot(u, h) the result may stay, relatively.
TOLERANCE = 1e-3
# Intervals this close to the lowest are refined with it: a few more evaluations for fewer rounds.
_SLACK = 1.002
# A row's intervals are no longer halved after so many halvings. Rows of normal logits take 40 at the most.
_HALVINGS = 500
# Log-odds are known to this many units in the last place.
_ROUNDING = 256


@dataclass(frozen=True)
class _Intervals:
    """Intervals [low, high] of abs(u), all tensors of one length; `high` may be infinite.

    Attributes:
        row: Sample.
        side: Sign of u, 1 or -1.
        below: Index of a class that certainly has more than half at `low`; -1 if none is known.
        within: The same at the centre, or at the beginning of an endless one.
        above: The same at `high`.
        bound: What abs(t) Δ is at least for a zero in the interval.
        settled: Whether halves would not give a much larger bound.
    """

    row: Tensor
    side: Tensor
    low: Tensor
    high: Tensor
    below: Tensor
    within: Tensor
    above: Tensor
    bound: Tensor
    settled: Tensor

    def pick(self, which: Tensor | slice) -> _Intervals:
        return _Intervals(*(value[which] for value in vars(self).values()))

    def join(self, other: _Intervals) -> _Intervals:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Intervals(*(torch.cat(pair) for pair in pairs))


def scan_rows(logits: Tensor, tangents: Tensor, ceiling: float = math.inf) -> Tensor:
    r"""A certified lower bound of the nearest complex zero of each row's :math:`\sum_k e^{z_k + t a_k}`.

    .. math:: \min_u \frac{1}{\Delta} \sqrt{u^2 + \pi^2 / (4 \operatorname{Var}_{p(u)}(a / \Delta))}
        \quad\text{where}\quad \max_k p_k(u) \le \tfrac 1 2, \quad p(u) = \operatorname{softmax}(z + u a / \Delta)

    up to 2 · `TOLERANCE` below it, never above; further below for logits beyond 1e10 and where it takes too many
    evaluations. The proof stands at the head of this module. A row takes 20 to 60 evaluations of K terms, and a few
    thousand at the very most; most of the memory is a few temporaries of 4 MiB.

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
    halvings = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    while True:
        lowest = _lowest(intervals, rows)
        near = intervals.bound <= _SLACK * lowest[intervals.row]
        unsettled = near & ~intervals.settled & (intervals.bound < ceiling * spread[intervals.row])
        unsettled &= (halvings < _HALVINGS)[intervals.row]
        if not bool(unsettled.any()):
            break
        parents = intervals.pick(unsettled)
        halvings.scatter_add_(0, parents.row, torch.ones_like(parents.row))
        halves = _halve(parents, logits, slopes)
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
    nobody = torch.full_like(row, -1)
    intervals = _Intervals(row, side, low, torch.full_like(low, math.inf), nobody, nobody, nobody, bound, settled)
    return intervals.pick((low < math.inf) & (spread[row] > 0))


def _lowest(intervals: _Intervals, rows: int) -> Tensor:
    """The least bound of each row."""
    lowest = intervals.bound.new_full((rows,), math.inf)
    return lowest.scatter_reduce(0, intervals.row, intervals.bound, "amin")


def _halve(parents: _Intervals, logits: Tensor, slopes: Tensor) -> _Intervals:
    """The parts of each interval that are not ruled out by their ends; an endless one is cut at about twice its low."""
    endless = parents.high == math.inf
    cut = torch.where(endless, 2 * parents.low + 4, parents.low + (parents.high - parents.low) / 2)
    row, side = parents.row.repeat(2), parents.side.repeat(2)
    low, high = torch.cat([parents.low, cut]), torch.cat([cut, parents.high])
    first = torch.where(endless, parents.within, parents.below)
    middle = parents.within.masked_fill(endless, -1)
    below, above = torch.cat([first, middle]), torch.cat([middle, parents.above])
    within, unsettled = torch.full_like(row, -1), torch.zeros_like(row, dtype=torch.bool)
    halves = _Intervals(row, side, low, high, below, within, above, parents.bound.repeat(2), unsettled)
    halves = halves.pick((below < 0) | (below != above))
    parts = [
        _bound(logits[part.row], slopes[part.row], part)
        for part in (halves.pick(rows) for rows in row_slices(len(halves.low), logits.shape[-1]))
    ]
    within, bound, settled = (torch.cat(values) for values in zip(*parts, strict=True))
    return replace(halves, within=within, bound=torch.maximum(bound, halves.bound), settled=settled)


def _bound(logits: Tensor, slopes: Tensor, part: _Intervals) -> tuple[Tensor, Tensor, Tensor]:
    """The class that has more than half within each interval, abs(t) Δ at least, and whether it is settled."""
    side, low, high = part.side, part.low, part.high
    numbers = torch.finfo(low.dtype)
    endless = high == math.inf
    # A finite stand-in keeps NaN out of what is then not used.
    width = torch.where(endless, 0.0, (high - low) / 2)
    centre = low + width
    odds, top, place, variance, slope = _moments(logits.addcmul(slopes, (side * centre).unsqueeze(-1)), slopes)
    slope = side * slope
    rounding = _ROUNDING * numbers.eps * (1 + centre)
    # Below, a variance has lost its digits to underflow.
    least = numbers.tiny ** (2 / 3)
    square = math.pi**2 / 4 / variance.clamp_min(least)
    flat = torch.hypot(low, torch.sqrt(square * torch.exp(-width - rounding)).clamp_min(math.pi))
    # The parabola; it counts for nothing where the variance, and so its slope, is lost, or where squares overflow.
    counts = (variance > least) & (centre < numbers.max**0.25)
    scale = torch.where(counts, square * torch.exp(-(width**2) / 8 - rounding), 0.0)
    off = torch.maximum(torch.minimum(scale * slope / 2 - centre, width), -width)
    parabola = torch.where(counts, (centre + off) ** 2 + scale * (1 - slope * off), 0.0)
    bound = torch.maximum(flat, torch.sqrt(parabola.clamp_min(0)))
    ruled_out = odds > width * torch.maximum(place, 1 - place) + rounding
    # An endless one is ruled out when the top class at its beginning also has the extreme slope.
    ruled_out &= ~endless | (torch.where(side > 0, 1 - place, place) == 0)
    bound = torch.where(endless, torch.hypot(low, torch.full_like(low, math.pi)), bound)
    # Either a point of it is near its bound, or it is so short that it does not matter which points are ruled out, or
    # that its parts could not be told apart.
    near = (odds <= 0) & (bound >= (1 - TOLERANCE) * torch.hypot(centre, torch.sqrt(square)))
    short = width * (centre + square / 2) <= TOLERANCE * bound**2
    settled = torch.where(endless, low > numbers.max / 8, near | short | (width <= rounding))
    # Where two classes are level in a single point, rounding must not rule that out.
    return top.masked_fill(odds <= rounding, -1), bound.masked_fill(ruled_out, math.inf), settled


def _moments(logits: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-odds of the top class, its index and slope, the variance of slopes and the third central moment over it."""
    highest, top = logits.max(dim=-1, keepdim=True)
    # The sum of the others is taken without the top class and from the second on, so that it keeps its digits when it
    # is small, and neither it nor the log-odds are lost to underflow.
    weights = logits.scatter(-1, top, -math.inf)
    second = weights.amax(dim=-1, keepdim=True)
    weights = torch.exp(weights - second)
    total = weights.sum(dim=-1, keepdim=True)
    odds = highest - second - torch.log(total)
    ratio = torch.exp(second - highest)
    weights *= ratio
    weights.scatter_(-1, top, 1.0)
    weights /= 1 + ratio * total
    place = slopes.gather(-1, top)
    # From the top class, for the same reason.
    off = slopes - place
    off -= (weights * off).sum(dim=-1, keepdim=True)
    weights *= off * off
    variance = weights.sum(dim=-1)
    third = (weights * off).sum(dim=-1)
    slope = third / torch.where(variance > 0, variance, 1.0)
    return odds.squeeze(-1), top.squeeze(-1), place.squeeze(-1), variance, slope
