"""Extreme eigenvalues of a symmetric operator, with error bars, by Lanczos iteration in few products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dynwatch.constants import widest_float
from dynwatch.krylov import Basis, Krylov, Reason, Storage
from dynwatch.operators import Operator
from dynwatch.rules.base import check_count, check_number

Ends = Literal["max", "both"]

# Multiples of the rounding error: below the first β is nothing but rounding, by the second eigenvalues are uncertain.
_NEGLIGIBLE = 32
_FLOOR = 16
# Products before convergence is believed, from a random and from a given start.
_LEAST_RANDOM, _LEAST_GIVEN = 4, 3
# The error bar may exceed the tolerance this many times: it bounds what may hide beyond the Ritz value and falls far
# slower than the error itself, by a factor of three a product against ten to a hundred.
_HIDDEN = 10
_SEED = 20060909


@dataclass(frozen=True)
class Extremes:
    """The largest eigenvalue, and the smallest where it was asked for, with error bars.

    Attributes:
        lambda_max: The largest; NaN if a product was not finite.
        lambda_max_error: It is off by no more than this, in about 99 of 100 cases.
        lambda_min: The smallest; None unless asked for.
        lambda_min_error: The same for it.
        top: [size] the Ritz vector of the largest, of norm 1.
        bottom: [size] that of the smallest; None unless asked for.
        hvps: Products spent.
        reason: "converged" (the errors are within the tolerance), "noise" (the products are not exact enough for it;
            more of them would not help), "max_hvps", "invariant_subspace" (no product leaves the span of the basis),
            "exhausted" (the basis spans all) or "non_finite".
        krylov: The basis and the small matrix behind it.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> extreme_eigenvalues(from_matrix(torch.eye(3))).reason
        'invariant_subspace'
    """

    lambda_max: float
    lambda_max_error: float
    lambda_min: float | None
    lambda_min_error: float | None
    top: Tensor
    bottom: Tensor | None
    hvps: int
    reason: Reason
    krylov: Krylov


def extreme_eigenvalues(
    operator: Operator,
    *,
    ends: Ends = "max",
    tol: float = 1e-2,
    max_hvps: int = 30,
    start: Tensor | None = None,
    mix: float = 0.1,
    storage: Storage = "float32",
    generator: torch.Generator | None = None,
) -> Extremes:
    """The largest eigenvalue of an operator, or both extremes, by Lanczos with full reorthogonalisation.

    It ends when the residual bounds the error of the largest by `tol` of its size, and of the smallest by `tol` of
    its own or of `tol` times the largest in size. The error bar is wider, but no more than ten times that: it covers
    what the start may have missed, for a random start in 99 of 100 cases whatever the matrix, for a given one if it
    meets the true eigenvector with a cosine of 0.03.

    Args:
        operator: The matrix.
        ends: "max" for the largest, "both" for the smallest too (many more products).
        tol: The relative error that will do.
        max_hvps: The most products.
        start: [size] what is near the eigenvector, as the gradient, the Ritz vector of an earlier call or a sum of
            both. None, zero or not finite: a random vector.
        mix: How much random vector to mix into a given start, relative to its norm. 0.1 costs a product in three runs
            or so, and brings back a start that has lost the eigenvector within about eight calls, each started with
            the Ritz vector of the last. Until then the error bar is too narrow: start at random now and then.
        storage: How to keep the basis; see `dynwatch.krylov.Basis`.
        generator: For random vectors; None takes one with a fixed seed.

    Returns:
        The eigenvalues with error bars and how it ended.

    Raises:
        ValueError: If an argument is out of its bounds.

    Source: Golub and Van Loan, Matrix Computations, chapter 10; the bounds of `Krylov`.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> found = extreme_eigenvalues(from_matrix(torch.diag(torch.tensor([1.0, -5.0]))), ends="both")
        >>> round(found.lambda_max, 4), round(found.lambda_min, 4), found.reason
        (1.0, -5.0, 'exhausted')
    """
    if ends not in get_args(Ends):
        raise ValueError(f"ends={ends!r} must be 'max' (the largest eigenvalue) or 'both' (the smallest too).")
    check_number("tol", tol, above=0.0)
    check_count("max_hvps", max_hvps)
    asked: tuple[Literal[0, -1], ...] = (-1,) if ends == "max" else (-1, 0)

    def stop(krylov: Krylov) -> Reason | None:
        if len(krylov.alpha) < (_LEAST_RANDOM if krylov.random_start else _LEAST_GIVEN):
            return None
        largest, drowned = float(np.abs(krylov.ritz).max()), False
        for end in asked:
            size = abs(krylov.ritz[end])
            bound = tol * (size if end == -1 else max(size, tol * largest))
            found, hidden = krylov.ritz_error(end), krylov.hidden(end)
            if max(found, hidden / _HIDDEN) + krylov.noise > bound:
                drowned = True
                if max(found, hidden) > krylov.noise:
                    return None
        return "noise" if drowned else "converged"

    krylov = lanczos(operator, steps=max_hvps, start=start, mix=mix, storage=storage, generator=generator, stop=stop)
    values: list[tuple[float, float, Tensor]] = []
    for end in asked:
        if krylov.reason == "non_finite":
            nothing = torch.full((operator.size,), math.nan, dtype=operator.dtype, device=operator.device)
            values.append((math.nan, math.inf, nothing))
        else:
            values.append((float(krylov.ritz[end]), krylov.error(end), krylov.vector(end)))
    top, bottom = values[0], values[1] if len(values) > 1 else (None, None, None)
    return Extremes(
        lambda_max=top[0],
        lambda_max_error=top[1],
        lambda_min=bottom[0],
        lambda_min_error=bottom[1],
        top=top[2],
        bottom=bottom[2],
        hvps=krylov.hvps,
        reason=krylov.reason,
        krylov=krylov,
    )


def lanczos(
    operator: Operator,
    *,
    steps: int = 30,
    start: Tensor | None = None,
    mix: float = 0.1,
    storage: Storage = "float32",
    generator: torch.Generator | None = None,
    stop: Callable[[Krylov], Reason | None] | None = None,
) -> Krylov:
    """Lanczos iteration with full reorthogonalisation (classical Gram-Schmidt, twice).

    Where the products stay within the span of the basis it ends, which for a random start says that only copies of
    eigenvalues are left; a given start is first followed by a random one, once.

    Args:
        operator: The matrix.
        steps: The most products.
        start: [size]; None, zero or not finite: a random vector.
        mix: How much random vector to mix into a given start, relative to its norm.
        storage: How to keep the basis; see `dynwatch.krylov.Basis`.
        generator: For random vectors; None takes one with a fixed seed.
        stop: Asked after each product; a reason ends it.

    Returns:
        The basis and the small matrix, up to the last product that was finite.

    Raises:
        ValueError: If an argument is out of its bounds or the operator has no rows.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> krylov = lanczos(from_matrix(torch.eye(4)))
        >>> krylov.hvps, krylov.reason
        (1, 'invariant_subspace')
    """
    check_count("steps", steps)
    check_number("mix", mix, least=0.0, below=math.inf)
    if operator.dimension < 1:
        raise ValueError("operator has dimension 0 and must have at least one row: pass parameters.")
    if start is not None and start.shape != (operator.size,):
        raise ValueError(f"start has shape {tuple(start.shape)} and must have shape ({operator.size},): use flatten().")
    generator = generator if generator is not None else torch.Generator().manual_seed(_SEED)
    basis = Basis(operator, storage)
    vector, share = _start(operator, start, mix, generator)
    alpha: list[float] = []
    beta: list[float] = []
    asymmetry, restarted = 0.0, share == 1
    epsilon = torch.finfo(operator.dtype).eps

    def krylov(hvps: int, reason: Reason) -> Krylov:
        diagonal, beside = np.array(alpha), np.array(beta)
        ritz, rotation = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
        scale = float(np.abs(ritz).max()) if alpha else 0.0
        return Krylov(
            alpha=diagonal,
            beta=beside,
            basis=basis,
            ritz=ritz,
            rotation=rotation,
            weights=rotation[0] ** 2 if alpha else diagonal,
            residuals=np.abs(beside[-1] * rotation[-1]) if alpha else diagonal,
            noise=math.sqrt(asymmetry) + _FLOOR * epsilon * scale,
            hvps=hvps,
            reason=reason,
            random_share=share,
            dimension=operator.dimension,
        )

    for step in range(1, steps + 1):
        rest = vector
        try:
            # All memory that this step needs, before the ranks meet in the product.
            rest = torch.empty(operator.size, dtype=operator.dtype, device=basis.device)
            basis.append(vector)
        except Exception as error:
            if operator.failed is None:
                raise
            operator.failed(error)
            _go_along(operator, vector, step)
            return krylov(step, "non_finite")
        # A copy: the product may be a tensor that the operator uses again.
        rest.copy_(operator(vector).detach())
        first = basis.dots(rest)
        basis.subtract(rest, first)
        second = basis.dots(rest)
        basis.subtract(rest, second)
        # All that decides goes to the host in one transfer.
        numbers = [n.to(basis.device, widest_float(basis.device)) for n in (first, second, operator.square(rest))]
        *dots, square = torch.cat(numbers).tolist()
        if not math.isfinite(math.fsum(dots) + square):
            return krylov(step, "non_finite")
        above = np.array(dots[: step - 1])
        if beta:
            above[-1] -= beta[-1]
        asymmetry += float(above @ above)
        alpha.append(dots[step - 1] + dots[-1])
        beta.append(math.sqrt(square))
        scale = max(map(abs, (*alpha, *beta[:-1])))
        if step == operator.dimension:
            beta[-1] = 0.0
            return krylov(step, "exhausted")
        broken = beta[-1] <= _NEGLIGIBLE * epsilon * scale
        if broken and restarted:
            return krylov(step, "invariant_subspace")
        if broken and step < steps:
            beta[-1], restarted = 0.0, True
        elif stop is not None and (reason := stop(krylov(step, "max_hvps"))) is not None:
            return krylov(step, reason)
        if step < steps:
            vector = basis.project_out(operator.random(generator)) if broken else rest.to(operator.device)
            # In place, as this is past the point where a rank that runs out of memory can meet the others.
            vector.div_(operator.norm(vector) if broken else beta[-1])
    return krylov(steps, "max_hvps")


def _go_along(operator: Operator, vector: Tensor, step: int) -> None:
    """On a rank that failed before a step's product: all that the others ask of it until they see the NaN."""
    operator(vector)  # NaN on all ranks now
    dots = torch.full((step,), math.nan, dtype=operator.dtype, device=operator.device)
    for numbers in (dots, dots.clone(), dots[:1].to(widest_float(operator.device))):
        operator.reduce(numbers)


def _start(operator: Operator, start: Tensor | None, mix: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """A unit vector to start from, and the random part of its square."""
    drawn = operator.random(generator)
    drawn = drawn / operator.norm(drawn)
    if start is None:
        return drawn, 1.0
    start = start.detach().to(operator.device, operator.dtype)
    length = operator.norm(start)
    if length == 0 or not math.isfinite(length):
        return drawn, 1.0
    mixed = start / length + mix * drawn
    return mixed / operator.norm(mixed), mix**2 / (1 + mix**2)
