"""The nearest complex zero of F(t) = Σ_k exp(z_k + t a_k), certified by the argument principle. For tests only."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]


def terms(z: Array, a: Array, t: ComplexArray) -> ComplexArray:
    """[m, K]: the terms of F at t, over the size of the largest, which changes no zero and no phase."""
    exponents = z + t[:, None] * a
    return np.exp(exponents - exponents.real.max(axis=1, keepdims=True))  # type: ignore[no-any-return]


def zeros_within(z: Array, a: Array, radius: float) -> int:
    """How many zeros F has in the disc of this radius: turns of F's phase along its rim.

    F(conj t) = conj F(t), so the upper half of the rim is enough: there the phase turns by π a zero. Arcs are halved
    until it turns by less than 1 on each; arcs on which it is far from linear are halved once more to be sure.
    """
    count = max(64, int(4 * radius * np.ptp(a)))
    angles = np.linspace(0, math.pi, count + 1)
    values = _on_rim(z, a, radius, angles)
    for _ in range(40):
        turns = np.angle(values[1:] / values[:-1])
        steep = np.abs(turns) > 1
        # A change of the turn from arc to arc is what a zero nearby shows first.
        bent = np.abs(np.diff(turns)) > 0.5
        steep[1:] |= bent
        steep[:-1] |= bent
        if not steep.any():
            break
        middle = (angles[1:][steep] + angles[:-1][steep]) / 2
        where = np.flatnonzero(steep) + 1
        angles = np.insert(angles, where, middle)
        values = np.insert(values, where, _on_rim(z, a, radius, middle))
    else:
        raise ArithmeticError(f"a zero lies on the rim, radius {radius}")
    zeros = turns.sum() / math.pi
    assert abs(zeros - round(zeros)) < 1e-3, zeros
    return round(zeros)


def nearest_zero(z: Array, a: Array) -> float:
    """The distance from 0 of F's nearest zero, to about ten digits; infinite if all of `a` are equal.

    A disc without zeros and one with are narrowed down to one hundredth, Newton's method starts from many points
    between their rims, and the nearest zero that it finds is confirmed: there is none in a disc 1e-5 smaller.
    """
    z, a = np.asarray(z, np.float64), np.asarray(a, np.float64)
    unit = np.ptp(a)
    if unit == 0:
        return math.inf
    # The middle as origin: a factor exp(-t · middle) has no zeros.
    z, a = z - z.max(), (a - (a.max() + a.min()) / 2) / unit
    inner = outer = math.pi * (1 - 1e-6)
    while zeros_within(z, a, outer) == 0:
        inner, outer = outer, outer * 1.5
    while outer > 1.01 * inner:
        middle = math.sqrt(inner * outer)
        inner, outer = (inner, middle) if zeros_within(z, a, middle) else (middle, outer)
    for starts in (64, 512, 4096):
        found = _newton(z, a, _ring(inner, outer, starts))
        sizes = np.abs(found)
        sizes = sizes[(sizes > inner * (1 - 1e-9)) & (sizes < outer * (1 + 1e-9))]
        if len(sizes) and zeros_within(z, a, float(sizes.min()) * (1 - 1e-5)) == 0:
            return float(sizes.min() / unit)
    raise ArithmeticError("Newton's method missed the nearest zero")


def _on_rim(z: Array, a: Array, radius: float, angles: Array) -> ComplexArray:
    points = radius * np.exp(1j * angles)
    size = max(1, 2**18 // len(z))
    return np.concatenate([terms(z, a, points[i : i + size]).sum(axis=1) for i in range(0, len(points), size)])


def _ring(inner: float, outer: float, count: int) -> ComplexArray:
    """Points of the upper half plane between two circles, denser than the zeros can be."""
    count = max(count, int(2 * outer))
    angles = (np.arange(count) + 0.5) * math.pi / count
    return np.sqrt(inner * outer) * np.exp(1j * angles)  # type: ignore[no-any-return]


def _newton(z: Array, a: Array, t: ComplexArray) -> ComplexArray:
    """Where Newton's method ends, for the starts from which it converges.

    On the log of minus the largest term over the sum of the others: with two terms that is linear in t, so that one
    step is enough, also from where F itself gives no direction.
    """
    size = max(1, 2**18 // len(z))
    ends = []
    for start in range(0, len(t), size):
        part = t[start : start + size]
        for _ in range(40):
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                exponents = z + part[:, None] * a
                top = exponents.real.argmax(axis=1)
                others = exponents.copy()
                others[np.arange(len(part)), top] = -np.inf
                second = others.real.max(axis=1)
                rest = np.exp(others - second[:, None])
                total = rest.sum(axis=1)
                ratio = exponents[np.arange(len(part)), top] - second - np.log(-total)
                turned = ratio.imag - 2 * math.pi * np.round(ratio.imag / (2 * math.pi))
                step = (ratio.real + 1j * turned) / (a[top] - rest @ a / total)
            alive = np.isfinite(step)
            part, step = part[alive] - step[alive], step[alive]
            if not len(step) or np.abs(step).max() < 1e-13 * np.abs(part).max():
                break
        residual = np.abs(terms(z, a, part).sum(axis=1)) if len(part) else np.array([])
        ends.append(part[residual < 1e-9])
    return np.concatenate(ends)
