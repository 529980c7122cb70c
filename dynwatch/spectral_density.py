"""The density of an operator's eigenvalues, and their sum, from a few products with random vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynwatch.krylov import Krylov, Storage
from dynwatch.lanczos import lanczos
from dynwatch.operators import Operator
from dynwatch.rules.base import check_count, check_number

Array = NDArray[np.float64]

# Not the seed of Lanczos' own default: a probe that equals the start lies in the basis and is projected away.
_SEED = 19011095


@dataclass(frozen=True)
class SpectralDensity:
    r"""A density of eigenvalues as weighted points: :math:`\sum_k w_k f(\theta_k) \approx \operatorname{tr} f(H) / n`.

    For polynomials f of degree below twice the steps the only error is that of the random start: about
    :math:`\sqrt{2 / (n \cdot \text{probes})}` of f's root mean square. Single outliers have weights that are off by
    about their own size, so a trace is better taken from `trace`.

    Attributes:
        nodes: [k] points θ, ascending: the outer ones near single eigenvalues, the inner ones for many together.
        weights: [k] shares of the eigenvalues, which add up to 1.
        hvps: Products spent.
        dimension: Rows of the operator.
        reason: "complete", or "non_finite" if a product was not finite: then there are no nodes.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> density = spectral_density(from_matrix(torch.diag(torch.tensor([1.0, 1.0, 1.0, 3.0]))))
        >>> density.nodes.round(3), float(density.weights.sum().round(6))
        (array([1., 3.]), 1.0)
    """

    nodes: Array
    weights: Array
    hvps: int
    dimension: int
    reason: Literal["complete", "non_finite"]

    @classmethod
    def from_krylov(cls, runs: Sequence[Krylov]) -> SpectralDensity:
        """The mean of the densities of Lanczos runs that have been made anyway.

        Args:
            runs: From random starts, of one operator. After a restart only what belongs to the first start has
                weight: the second one's share is not known.

        Raises:
            ValueError: If there is none, or one had a given start or another dimension.

        Example:
            >>> from dynwatch.operators import from_matrix
            >>> SpectralDensity.from_krylov([lanczos(from_matrix(torch.eye(2)))]).weights
            array([1.])
        """
        if not runs:
            raise ValueError("runs=[] must hold at least one Lanczos run.")
        given = [i for i, run in enumerate(runs) if not run.random_start]
        if given:
            raise ValueError(
                f"runs[{given[0]}] has a given start and must have a random one: other weights say nothing about the "
                "density. Call lanczos() or extreme_eigenvalues() without start."
            )
        dimensions = sorted({run.dimension for run in runs})
        if len(dimensions) > 1:
            raise ValueError(f"runs have dimensions {dimensions} and must have one: pass runs of one operator.")
        hvps = sum(run.hvps for run in runs)
        if any(run.reason == "non_finite" for run in runs):
            return cls(np.empty(0), np.empty(0), hvps, dimensions[0], "non_finite")
        nodes = np.concatenate([run.ritz for run in runs])
        weights = np.concatenate([run.weights / run.weights.sum() for run in runs]) / len(runs)
        order = np.argsort(nodes, kind="stable")
        return cls(nodes[order], weights[order], hvps, dimensions[0], "complete")

    def histogram(self, bins: int) -> tuple[Array, Array]:
        """The number of eigenvalues in bins of equal width.

        Args:
            bins: How many.

        Returns:
            The edges, [bins + 1], and the counts, [bins], which add up to `dimension`; counts of 0 without nodes.

        Raises:
            ValueError: If `bins` is not a whole number of 1 or more.

        Example:
            >>> from dynwatch.operators import from_matrix
            >>> spectral_density(from_matrix(torch.diag(torch.tensor([0.0, 2.0])))).histogram(2)[0].round(3) + 0.0
            array([0., 1., 2.])
        """
        check_count("bins", bins)
        low, high = (self.nodes[0], self.nodes[-1]) if len(self.nodes) else (0.0, 0.0)
        size = max(abs(low), abs(high))
        if high - low <= 1e-9 * size or size == 0:  # all the same: a bin of no width has no room for edges
            low, high = low - (size or 1.0) / 2, high + (size or 1.0) / 2
        edges = np.linspace(low, high, bins + 1)
        place = np.clip(np.searchsorted(edges, self.nodes, side="right") - 1, 0, bins - 1)
        counts = np.bincount(place, self.weights * self.dimension, minlength=bins)
        return edges, counts.astype(np.float64)

    def density(self, grid: Array, width: float) -> Array:
        """The density with each node broadened to a normal distribution.

        Args:
            grid: [g] where to evaluate it.
            width: Standard deviation of the normal distributions.

        Returns:
            [g], with integral 1 over the whole line; NaN without nodes.

        Raises:
            ValueError: If `width` is not a positive number.

        Example:
            >>> from dynwatch.operators import from_matrix
            >>> spectral_density(from_matrix(torch.zeros(2, 2))).density(np.array([0.0]), width=1.0).round(4)
            array([0.3989])
        """
        check_number("width", width, above=0.0)
        if not len(self.nodes):
            return np.full(len(grid), math.nan)
        apart = (np.asarray(grid)[:, None] - self.nodes) / width
        return np.asarray((np.exp(-(apart**2) / 2) @ self.weights) / (width * math.sqrt(2 * math.pi)))


def spectral_density(
    operator: Operator,
    *,
    probes: int = 1,
    steps: int = 30,
    generator: torch.Generator | None = None,
    storage: Storage = "float32",
) -> SpectralDensity:
    """The density of the eigenvalues by stochastic Lanczos quadrature.

    Args:
        operator: The matrix.
        probes: Random starts, of which the mean is taken.
        steps: The most products for each; fewer where a start's Krylov space is smaller.
        generator: For the starts; None takes one with a fixed seed.
        storage: How to keep the basis; see `dynwatch.krylov.Basis`.

    Returns:
        The density as weighted points.

    Raises:
        ValueError: If an argument is out of its bounds.

    Source: Ubaru, Chen, Saad (2017), SIAM J. Matrix Anal. Appl. 38, 1075; for nets Ghorbani et al., arXiv 1901.10159.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> spectral_density(from_matrix(torch.eye(5)), probes=2).hvps
        2
    """
    check_count("probes", probes)
    generator = generator if generator is not None else torch.Generator().manual_seed(_SEED)
    runs = [lanczos(operator, steps=steps, generator=generator, storage=storage) for _ in range(probes)]
    return SpectralDensity.from_krylov(runs)


@dataclass(frozen=True)
class Trace:
    """The sum of the eigenvalues.

    Attributes:
        value: The estimate; NaN if a product was not finite.
        standard_error: Of the estimate, from the spread of the probes: itself a rough figure where they are few.
            Infinite for one probe, which has no spread, and for a value of NaN; 0 where the basis spans all.
        hvps: Products spent here, without those of a Lanczos run that was passed.
        reason: "complete", "exact" (the basis spans all) or "non_finite".

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> trace(from_matrix(torch.eye(3)), probes=2)
        Trace(value=3.0, standard_error=0.0, hvps=2, reason='complete')
    """

    value: float
    standard_error: float
    hvps: int
    reason: Literal["complete", "exact", "non_finite"]


def trace(
    operator: Operator,
    krylov: Krylov | None = None,
    *,
    probes: int = 8,
    generator: torch.Generator | None = None,
) -> Trace:
    r"""The trace by Hutchinson's estimator, in the part of the space that a Lanczos run has not seen.

    .. math:: \operatorname{tr} H = \operatorname{tr}(Q^\top H Q) + \operatorname{E} z^\top P H P z,
        \qquad P = I - Q Q^\top

    with z of random signs. The run has the outliers, which make most of the variance, in Q. Where the entries of
    vectors have weights of their own (shards), random signs have no meaning: there the projected z are normal vectors
    scaled to the norm √(n − m).

    Args:
        operator: The matrix.
        krylov: A run on the same operator, from any start; None is Hutchinson's plain estimator.
        probes: Random vectors, one product each.
        generator: For the probes; None takes one with a fixed seed. With the seed that a run has started from, the
            probes would not be independent of its basis.

    Returns:
        The estimate with its standard error.

    Raises:
        ValueError: If `probes` is not a whole number of 1 or more, or the run is of another dimension.

    Source: Hutchinson (1990), Commun. Stat. Simul. Comput. 19, 433; the deflation as in Hutch++, arXiv 2010.09649.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> operator = from_matrix(torch.diag(torch.tensor([1.0, 2.0, 30.0])))
        >>> found = trace(operator, lanczos(operator))
        >>> round(found.value, 3), found.hvps, found.reason
        (33.0, 0, 'exact')
    """
    check_count("probes", probes)
    if krylov is not None and krylov.dimension != operator.dimension:
        raise ValueError(
            f"krylov has dimension {krylov.dimension} and must have the operator's, {operator.dimension}: pass a run "
            "on the same operator."
        )
    generator = generator if generator is not None else torch.Generator().manual_seed(_SEED)
    seen, known = (0.0, 0) if krylov is None else (math.fsum(krylov.alpha), len(krylov.alpha))
    rest = operator.dimension - known
    if krylov is not None and krylov.reason == "non_finite":
        return Trace(math.nan, math.inf, 0, "non_finite")
    if rest == 0:
        return Trace(seen, 0.0, 0, "exact")
    numbers: list[Tensor] = []
    for _ in range(probes):
        z = operator.random(generator)
        if operator.draw is None:
            z = torch.where(z < 0, -1.0, 1.0).to(z.dtype)
        if krylov is not None:
            z = krylov.basis.project_out(z)
        dots = torch.stack([torch.dot(z, operator(z).detach().to(z.dtype)), torch.dot(z, z)])
        numbers.append(operator.reduce(dots))
    found, squares = torch.stack(numbers, 1).cpu().double().numpy()
    if operator.draw is not None:
        found = found * (rest / squares)
    if not np.isfinite(found).all():
        return Trace(math.nan, math.inf, probes, "non_finite")
    error = float(found.std(ddof=1)) / math.sqrt(probes) if probes > 1 else math.inf
    return Trace(seen + float(found.mean()), error, probes, "complete")
