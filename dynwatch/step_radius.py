r"""How far a step can go before the Taylor series of a cross entropy along it breaks down (Sao, arXiv 2603.13552).

Along a unit direction v the logits z of a sample move with the tangent a = J v. With z + t a in their place the loss is
:math:`\log F(t) = \log \sum_k e^{z_k + t a_k}` up to linear terms, and its series in the step length t converges up to
the nearest complex zero of F: the sample's step radius. A batch's is the least of its samples': singularities of a sum
over samples do not cancel. Label smoothing, class weights and the targets themselves change linear terms only.

Lower bounds of the radius, each at least the one before, but for `b2` all in closed form. With the spread
Δ = max a - min a, o = max(0, log(p / (1 - p))) of the top class and Δ_m = max abs(a - a_top):

======  ================================================  =================================================
``pi``  π T / Δ                                           the paper's
``b1``  T √(o² + π²) / Δ                                  exact for two classes
``b1m`` T √((o / Δ_m)² + (π / Δ)²)                        the same, with the slope of the top class
``b2``  `dynwatch.step_radius_scan`                       a search on a line, certified
======  ================================================  =================================================

Proof of `b1` and `b1m`: at a zero u + iy the top term must not be larger than the sum of the others, and its log-odds
change by Δ_m per unit of u at most, so abs(u) ≥ o / Δ_m ≥ o / Δ; and abs(y) ≥ π / Δ, or all terms would point into one
half-plane. Everything is computed in the widest float of the device, a few rows at a time. A logit of minus infinity (a
masked class) leaves its class out; any other infinity or NaN among a sample's logits or tangents makes its radius NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dynwatch._logit_rows import ELEMENTS, by_rows, check_alike, check_classes, check_floats, check_mask, wide
from dynwatch._radius_forms import b1, b1m, b2, pi, present
from dynwatch.rules.base import check_number
from dynwatch.step_forecast import kl_bound, predicted_loss, predicted_loss_sigmoid
from dynwatch.step_radius_scan import scan_rows

__all__ = [
    "Binding",
    "Bound",
    "batch_radius",
    "batch_radius_sigmoid",
    "kl_bound",
    "normalized_step",
    "predicted_loss",
    "predicted_loss_sigmoid",
    "radius_b1",
    "radius_b1m",
    "radius_b2",
    "radius_pi",
    "radius_sigmoid",
]

Bound = Literal["pi", "b1", "b1m", "b2"]


@dataclass(frozen=True)
class Binding:
    """The radius of a batch and the sample that sets it.

    Attributes:
        radius: Scalar in the widest float: the least radius; infinite if no sample counts or none moves.
        index: Scalar int64: where that sample is among the flattened leading dimensions; -1 if no sample counts.
        scanned: Samples that the scan of `b2` looked at; 0 for closed forms.

    Example:
        >>> batch_radius(torch.zeros(2, 3), torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]]), "pi").index
        tensor(1)
    """

    radius: Tensor
    index: Tensor
    scanned: int


def radius_pi(tangents: Tensor, temperature: float = 1.0) -> Tensor:
    r"""The paper's radius of each sample, :math:`\pi T / (\max_k a_k - \min_k a_k)` (arXiv 2603.13552).

    Args:
        tangents: [..., K ≥ 2] derivatives of the logits along the step.
        temperature: T that the logits are divided by in the loss.

    Returns:
        [...]; infinite where all tangents are equal, NaN where one is not finite.

    Raises:
        TypeError: If the tangents are not real floats.
        ValueError: If there is one class, or the temperature is not positive.

    Example:
        >>> radius_pi(torch.tensor([[1.0, -1.0], [0.5, 0.5]]))
        tensor([1.5708,    inf], dtype=torch.float64)
    """
    check_floats("tangents", tangents)
    check_classes("tangents", tangents)
    scale = _temperature(temperature)

    def of_rows(a: Tensor) -> Tensor:
        low, high = a.aminmax(dim=-1)
        return _nan_unless(torch.isfinite(low) & torch.isfinite(high), math.pi * scale / (high - low))

    return by_rows(of_rows, tangents)


def radius_b1(logits: Tensor, tangents: Tensor, temperature: float = 1.0) -> Tensor:
    r"""A bound in closed form that is exact for two classes: :math:`T \sqrt{o^2 + \pi^2} / \Delta`.

    o is max(0, log-odds of the most probable class) at this temperature. For the proof see the head of this module.

    Args:
        logits: [..., K ≥ 2] z before the step.
        tangents: [..., K] derivatives of the logits along the step.
        temperature: T that the logits are divided by in the loss.

    Returns:
        [...]; infinite where all tangents are equal, NaN where a number is not finite.

    Raises:
        TypeError: If an argument is not real floats.
        ValueError: If shapes differ, there is one class, or the temperature is not positive.

    Example:
        >>> radius_b1(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]))  # √(9 + π²)
        tensor(4.3439, dtype=torch.float64)
    """
    return _closed(logits, tangents, temperature, b1)


def radius_b1m(logits: Tensor, tangents: Tensor, temperature: float = 1.0) -> Tensor:
    r"""`radius_b1` with the slope of the top class: :math:`T \sqrt{(o / \Delta_m)^2 + (\pi / \Delta)^2}`.

    :math:`\Delta_m = \max_k |a_k - a_{top}|` lies between Δ/2 and Δ: it helps where the top class moves in the middle.

    Args:
        logits: [..., K ≥ 2] z before the step.
        tangents: [..., K] derivatives of the logits along the step.
        temperature: T that the logits are divided by in the loss.

    Returns:
        [...]; infinite where all tangents are equal, NaN where a number is not finite.

    Raises:
        TypeError: If an argument is not real floats.
        ValueError: If shapes differ, there is one class, or the temperature is not positive.

    Example:
        >>> z, a = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, -1.0])
        >>> radius_b1(z, a), radius_b1m(z, a)
        (tensor(4.4405, dtype=torch.float64), tensor(8.4541, dtype=torch.float64))
    """
    return _closed(logits, tangents, temperature, b1m)


def radius_b2(logits: Tensor, tangents: Tensor, temperature: float = 1.0) -> Tensor:
    """The tightest bound of each sample, by the certified scan of `dynwatch.step_radius_scan`, at least `radius_b1m`.

    It takes tens of evaluations of the softmax a sample, and waits for the device; for the least of a batch
    `batch_radius` scans few samples.

    Args:
        logits: [..., K ≥ 2] z before the step.
        tangents: [..., K] derivatives of the logits along the step.
        temperature: T that the logits are divided by in the loss.

    Returns:
        [...]; infinite where all tangents are equal, NaN where a number is not finite.

    Raises:
        TypeError: If an argument is not real floats.
        ValueError: If shapes differ, there is one class, or the temperature is not positive.

    Example:
        >>> z, a = torch.zeros(10), torch.tensor([1.0] + [0.0] * 9)  # the nearest zero: ln 9 + πi
        >>> radius_pi(a).item(), round(radius_b2(z, a).item(), 2), round(math.hypot(math.log(9), math.pi), 2)
        (3.141592653589793, 3.65, 3.83)
    """
    return _closed(logits, tangents, temperature, b2)


def radius_sigmoid(logits: Tensor, tangents: Tensor, temperature: float = 1.0) -> Tensor:
    r"""The exact radius of each binary label with one logit, :math:`\sqrt{z^2 + \pi^2 T^2} / |a|`.

    For `binary_cross_entropy_with_logits`: a label is a softmax of (z, 0), and every label is a sample of its own.

    Args:
        logits: [...] z before the step, one a label.
        tangents: [...] their derivatives along the step.
        temperature: T that the logits are divided by in the loss.

    Returns:
        [...]; infinite where the tangent is 0, NaN where a number is not finite.

    Raises:
        TypeError: If an argument is not real floats.
        ValueError: If shapes differ, or the temperature is not positive.

    Example:
        >>> radius_sigmoid(torch.tensor([0.0, 3.0]), torch.tensor([2.0, -1.0]))
        tensor([1.5708, 4.3439], dtype=torch.float64)
    """
    check_alike(logits, tangents)
    z, a = wide(logits), wide(tangents)
    radius = torch.hypot(z, torch.full_like(z, math.pi * _temperature(temperature))) / a.abs()
    return _nan_unless(torch.isfinite(z) & torch.isfinite(a), radius)


def batch_radius(
    logits: Tensor,
    tangents: Tensor,
    bound: Bound = "b1",
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Binding:
    """The least radius of the samples that count, and which sample it is.

    Closed forms stay on the device. `b2` looks: it takes samples in ascending order of `b1m`, which is never above
    `b2`, in blocks, and ends at the first that cannot have the least.

    Args:
        logits: [..., K ≥ 2] z before the step.
        tangents: [..., K] derivatives of the logits along the step.
        bound: "pi", "b1", "b1m" or "b2", see the head of this module.
        mask: [...] of bool, True where a sample counts (`targets != ignore_index`); None for all.
        temperature: T that the logits are divided by in the loss.

    Returns:
        The radius: NaN with the index of the first such sample if one that counts has a NaN or an infinity; infinite
        with index -1 if no sample counts.

    Raises:
        TypeError: If logits or tangents are not real floats, or the mask is not boolean.
        ValueError: If shapes differ, there is one class, the bound is unknown, or the temperature is not positive.

    Example:
        >>> z, a = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
        >>> found = batch_radius(z, a, mask=torch.tensor([True, False, True]))
        >>> found.radius, found.index, found.scanned
        (tensor(1.5708, dtype=torch.float64), tensor(2), 0)
    """
    if bound not in get_args(Bound):
        raise ValueError(
            f"bound={bound!r} must be 'pi' (the paper's), 'b1', 'b1m' (closed forms) or 'b2' (the tightest, a scan)."
        )
    check_alike(logits, tangents)
    check_classes("logits", logits)
    if mask is not None:
        check_mask(mask, logits.shape[:-1])
    form = {"pi": pi, "b1": b1, "b1m": b1m, "b2": b1m}[bound]
    lower = _closed(logits, tangents, temperature, form)
    if bound != "b2":
        return _least(lower, mask, scanned=0)
    if mask is not None:
        lower = lower.masked_fill(~mask, math.inf)
    radii, scanned = _scan_in_order(logits, tangents, lower.flatten(), temperature)
    return _least(radii.reshape(lower.shape), mask, scanned)


def batch_radius_sigmoid(
    logits: Tensor, tangents: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Binding:
    """`batch_radius` for binary labels with one logit each: the least of `radius_sigmoid`, which is exact.

    Args:
        logits: [...] z before the step, one a label.
        tangents: [...] their derivatives along the step.
        mask: [...] of bool, True where a label counts; None for all.
        temperature: T that the logits are divided by in the loss.

    Returns:
        The radius, and the index among the flattened labels; NaN and -1 as in `batch_radius`.

    Raises:
        TypeError: If logits or tangents are not real floats, or the mask is not boolean.
        ValueError: If shapes differ, or the temperature is not positive.

    Example:
        >>> batch_radius_sigmoid(torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [-2.0, 0.5]])).index
        tensor(2)
    """
    radii = radius_sigmoid(logits, tangents, temperature)
    if mask is not None:
        check_mask(mask, radii.shape)
    return _least(radii, mask, scanned=0)


def normalized_step(length: float | Tensor, radius: float | Tensor) -> float | Tensor:
    """The step's length in units of the radius: 0 for an infinite radius, infinite for a radius of 0.

    Args:
        length: τ, the norm of the update; a finite one.
        radius: ρ, in units of the same direction's unit vector; a scalar tensor stays on its device.

    Returns:
        r = τ / ρ, a tensor if either is; NaN if either is, or for 0 / 0.

    Raises:
        ValueError: If a length or radius that is a Python number is negative.

    Example:
        >>> normalized_step(3.0, 1.5), normalized_step(3.0, math.inf)
        (2.0, 0.0)
    """
    for argument, value in (("length", length), ("radius", radius)):
        if not isinstance(value, Tensor) and value < 0:
            raise ValueError(f"{argument}={value!r} must be 0 or more; pass a norm.")
    if not isinstance(length, Tensor) and not isinstance(radius, Tensor):
        if radius == 0:
            return math.inf if length > 0 else math.nan
        return length / radius
    return length / radius


def _temperature(temperature: float) -> float:
    return float(check_number("temperature", temperature, above=0.0, below=math.inf))


def _nan_unless(fine: Tensor, radius: Tensor) -> Tensor:
    return radius.masked_fill(~fine, math.nan)


def _closed(logits: Tensor, tangents: Tensor, temperature: float, form: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A bound of [rows, K] logits and tangents at temperature 1, for all samples and at this temperature."""
    check_alike(logits, tangents)
    check_classes("logits", logits)
    scale = _temperature(temperature)

    def radius(z: Tensor, a: Tensor) -> Tensor:
        a, fine = present(z, a)
        rows = fine.unsqueeze(-1)
        return _nan_unless(fine, scale * form(z.where(rows, 0.0) / scale, a.where(rows, 0.0)))

    return by_rows(radius, logits, tangents)


def _scan_in_order(logits: Tensor, tangents: Tensor, lower: Tensor, temperature: float) -> tuple[Tensor, int]:
    """The `b2` of samples in ascending order of `lower`, infinity for those that were not scanned; how many were."""
    if lower.isnan().any():
        return lower, 0
    z, a = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (logits, tangents))
    ascending, order = lower.sort(stable=True)
    floors = ascending.tolist()
    radii = torch.full_like(lower, math.inf)
    best, done, block = math.inf, 0, 1
    limit = max(1, ELEMENTS // z.shape[-1])
    while done < len(floors) and floors[done] < best:
        fitting = [floor for floor in floors[done : done + block] if floor < best]
        which = order[done : done + len(fitting)]
        start = wide(z[which])
        slopes, _ = present(start, wide(a[which]))
        found = temperature * scan_rows(start / temperature, slopes, best / temperature)
        radii[which] = torch.maximum(found, lower[which])
        best = min(best, radii[which].min().item())
        done += len(fitting)
        block = min(2 * block, limit)
    return radii, done


def _least(radii: Tensor, mask: Tensor | None, scanned: int) -> Binding:
    """The least of the radii that count, NaN before all, without a look at any value."""
    flat = radii.flatten()
    if not flat.numel():
        nowhere = torch.full((), -1, dtype=torch.int64, device=flat.device)
        return Binding(flat.new_full((), math.inf), nowhere, scanned)
    counts = torch.ones_like(flat, dtype=torch.bool) if mask is None else mask.to(flat.device).flatten()
    least = flat.masked_fill(~counts, math.inf).min()
    # The first of them: what argmin picks among equals differs between devices, and may be one that does not count.
    binds = counts & torch.where(least.isnan(), flat.isnan(), flat == least)
    index = torch.where(binds.any(), binds.to(torch.uint8).argmax(), -1)
    return Binding(least, index, scanned)
