"""The bounds of `dynwatch.step_radius` for [n, K] logits and tangents at temperature 1, in the widest float."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynwatch.step_radius_scan import log_odds, scan_rows


def present(z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Tangents without those of classes that a logit of minus infinity leaves out, and which rows can be judged.

    A class that is absent has no term in the sum, so its tangent must count for nothing: it gets that of the top class.

    Returns:
        [n, K] tangents, and [n] of bool: False where a number is NaN or infinite, or no class is left.
    """
    top = z.argmax(dim=-1, keepdim=True)
    a = torch.where(z == -math.inf, a.gather(-1, top), a)
    low, high = z.aminmax(dim=-1)
    least, most = a.aminmax(dim=-1)
    return a, high.isfinite() & ~low.isnan() & least.isfinite() & most.isfinite()


def spread(a: Tensor) -> Tensor:
    low, high = a.aminmax(dim=-1)
    return high - low


def pi(z: Tensor, a: Tensor) -> Tensor:
    return math.pi / spread(a)


def b1(z: Tensor, a: Tensor) -> Tensor:
    odds, _ = log_odds(z)
    return torch.hypot(odds.clamp_min(0), torch.full_like(odds, math.pi)) / spread(a)


def b1m(z: Tensor, a: Tensor) -> Tensor:
    odds, top = log_odds(z)
    place = a.gather(-1, top).squeeze(-1)
    low, high = a.aminmax(dim=-1)
    spread = high - low
    fastest = torch.maximum(high - place, place - low)
    # Between 1 and 2; 0 where nothing moves, and the radius is infinite.
    gain = spread / fastest.masked_fill(fastest == 0, 1.0)
    most = torch.finfo(odds.dtype).max / 2  # the odds of a class that is alone are infinite
    return torch.hypot(odds.clamp(0, most) * gain, torch.full_like(odds, math.pi)) / spread


def b2(z: Tensor, a: Tensor) -> Tensor:
    return torch.maximum(scan_rows(z, a), b1m(z, a))
