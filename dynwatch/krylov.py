"""What Lanczos iteration has found out about an operator: its basis, Ritz values and their error bars."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynwatch.operators import Operator

# How basis vectors are kept: as they are, rounded (with arithmetic in the vectors' own type), or on the host.
Storage = Literal["float32", "bfloat16", "cpu"]
Reason = Literal["converged", "noise", "max_hvps", "invariant_subspace", "exhausted", "non_finite"]
Array = NDArray[np.float64]

# A random unit vector in n dimensions meets an eigenvector with a squared cosine below this / n in 8 % of draws.
# Measured on 1000 matrices: with it the error bar holds in 99.5 % of cases, without it in 83 %.
_UNLUCKY = 0.01
# A given start is trusted to meet the top eigenvector, should it have missed it, with this squared cosine, or with this
# share of that with which it meets the Ritz vector found; of the bottom one only the latter is expected. Measured:
# error bars hold from gradients in about 99.2 %, from Ritz vectors of nearby matrices in 99.7 % of cases.
_TRUSTED_OVERLAP = 0.001
_TRUSTED_SHARE = 0.03
# How far beyond a Ritz value is looked for others, in units of the largest; 16 % apart.
_OFFSETS = np.geomspace(1e-17, 1e9, 400)
_ROWS = 4


class Basis:
    """Orthonormal vectors, kept in small blocks of rows so that memory grows with their number.

    Args:
        operator: Whose vectors they are; dot products are its global ones.
        storage: "float32" keeps them in the operator's type (float32 or wider), "bfloat16" rounds all but the last
            two, "cpu" keeps them, and computes with them, on the host.

    Raises:
        ValueError: If `storage` is none of these.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> basis = Basis(from_matrix(torch.eye(3)))
        >>> basis.append(torch.tensor([1.0, 0.0, 0.0]))
        >>> basis.project_out(torch.tensor([2.0, 3.0, 0.0]))
        tensor([0., 3., 0.])
    """

    def __init__(self, operator: Operator, storage: Storage = "float32") -> None:
        if storage not in get_args(Storage):
            raise ValueError(
                f"storage={storage!r} must be 'float32' (fast), 'bfloat16' (half the memory) or 'cpu' (none on the "
                "accelerator)."
            )
        self.device = torch.device("cpu") if storage == "cpu" else operator.device
        self.operator = operator
        self._rounds = storage == "bfloat16"
        self._blocks: list[Tensor] = []
        self._recent: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, vector: Tensor) -> None:
        """Take in one more, [size], orthogonal to the others."""
        if self._count % _ROWS == 0:
            dtype = torch.bfloat16 if self._rounds else self.operator.dtype
            self._blocks.append(torch.empty(_ROWS, self.operator.size, dtype=dtype, device=self.device))
        self._blocks[-1][self._count % _ROWS] = vector
        self._count += 1
        if self._rounds:
            # The recurrence's large coefficients belong to the last two: rounding those would cost digits.
            self._recent = [*self._recent[-1:], vector.to(self.device)]

    def _chunks(self) -> Iterator[Tensor]:
        left = self._count - len(self._recent)
        for block in self._blocks:
            if left > 0:
                yield block[:left].to(self.operator.dtype)
            left -= _ROWS
        for row in self._recent:
            yield row[None]

    def dots(self, vector: Tensor) -> Tensor:
        """Dot products with a vector, [size], over all processes: [len(self)], on the operator's device."""
        vector = vector.to(self.device)
        parts = torch.cat([chunk.mv(vector) for chunk in self._chunks()])
        return self.operator.reduce(parts.to(self.operator.device))

    def combine(self, coefficients: Tensor) -> Tensor:
        """The sum of the vectors, each with its coefficient ([len(self)]): [size]."""
        total = torch.zeros(self.operator.size, dtype=self.operator.dtype, device=self.device)
        return self.subtract(total, -coefficients).to(self.operator.device)

    def subtract(self, vector: Tensor, coefficients: Tensor) -> Tensor:
        """Take the sum of the vectors, each with its coefficient ([len(self)]), off a vector in place."""
        coefficients = coefficients.to(self.device, self.operator.dtype)
        done = 0
        for chunk in self._chunks():
            vector.addmv_(chunk.T, coefficients[done : done + len(chunk)], alpha=-1)
            done += len(chunk)
        return vector

    def project_out(self, vector: Tensor) -> Tensor:
        """The part of a vector, [size], that is orthogonal to all of them."""
        rest = vector.to(self.device, copy=True)
        for _ in range(2 if self._count else 0):  # the second pass removes what rounding left of the first
            self.subtract(rest, self.dots(rest))
        return rest.to(self.operator.device)


@dataclass(frozen=True)
class Krylov:
    r"""What m products have told about an operator: :math:`Q^\top H Q = T`, tridiagonal.

    Attributes:
        alpha: [m] the diagonal of T.
        beta: [m] the numbers beside it; the last couples to what has not been seen. A 0 inside marks a restart.
        basis: The rows of Qᵀ.
        ritz: [m] the eigenvalues of T, ascending.
        rotation: [m, m] the eigenvectors of T, one a column.
        weights: [m] squared first entries of the eigenvectors: the start's squared cosines with the Ritz vectors.
        residuals: [m] :math:`|H y - \theta y|` of each Ritz vector y.
        noise: How far the eigenvalues may be off because the products are not those of a symmetric matrix:
            :math:`Q^\top H Q` above its diagonal against T, in the Frobenius norm, and rounding.
        hvps: Products spent.
        reason: How it ended.
        random_share: The random part of the start's square; 1 for a random start.
        dimension: Rows of the operator.

    Example:
        >>> from dynwatch.operators import from_matrix
        >>> from dynwatch.lanczos import lanczos
        >>> lanczos(from_matrix(torch.diag(torch.tensor([1.0, -5.0])))).ritz.round(4)
        array([-5.,  1.])
    """

    alpha: Array
    beta: Array
    basis: Basis
    ritz: Array
    rotation: Array
    weights: Array
    residuals: Array
    noise: float
    hvps: int
    reason: Reason
    random_share: float
    dimension: int

    @property
    def random_start(self) -> bool:
        """Whether the start was random alone, so that the weights are those of a spectral density."""
        return self.random_share == 1

    def vector(self, index: int) -> Tensor:
        """The Ritz vector of one Ritz value, of norm 1: [size]."""
        vector = self.basis.combine(torch.from_numpy(self.rotation[:, index].copy()))
        return vector / self.basis.operator.norm(vector)

    def ritz_error(self, end: Literal[0, -1]) -> float:
        r"""How far the lowest (0) or highest (-1) Ritz value is from an eigenvalue: :math:`\min(r, r^2 / \text{gap})`.

        r is the residual, the gap that to the next Ritz value less its own residual (Kato and Temple). It says nothing
        of an eigenvalue beyond, which the start may have met too little.
        """
        residual, value = self.residuals[end], self.ritz[end]
        if len(self.ritz) > 1:
            near = 1 if end == 0 else -2
            gap = abs(value - self.ritz[near]) - self.residuals[near]
            if gap > residual:
                residual = residual**2 / gap
        return float(residual)

    def error(self, end: Literal[0, -1]) -> float:
        """The error bar of the lowest (0) or highest (-1) Ritz value: what may hide beyond it, and `noise`."""
        return max(self.ritz_error(end), self.hidden(end)) + self.noise

    def hidden(self, end: Literal[0, -1]) -> float:
        r"""How far beyond the lowest (0) or highest (-1) Ritz value an eigenvalue may be.

        One at λ whose eigenvector meets the start with a squared cosine ω has
        :math:`\omega \sum_j p_j(\lambda)^2 \le 1`, with p_j the polynomials that make the basis from the start: for the
        least ω that is to be expected this says how far off λ can be (van Dorsselaer et al. 2000, SIAM J. Matrix
        Anal. Appl. 22, 837).
        """
        scale = float(np.abs(self.ritz).max())
        if scale == 0 or self.beta[-1] == 0:
            return 0.0
        overlap = self.random_share * _UNLUCKY / self.dimension
        restarts = np.flatnonzero(self.beta[:-1] == 0)
        if len(restarts):
            overlap = _UNLUCKY / self.dimension
        elif not self.random_start:
            overlap = max(overlap, _TRUSTED_OVERLAP * (end == -1), _TRUSTED_SHARE * self.weights[end])
        sign = 1.0 if end == -1 else -1.0
        first = restarts[-1] + 1 if len(restarts) else 0
        alpha, beta = sign * self.alpha[first:] / scale, self.beta[first:] / scale
        found = sign * self.ritz[end] / scale + _OFFSETS
        before, now, total = np.zeros_like(found), np.ones_like(found), np.ones_like(found)
        reached, last = total * overlap >= 1, 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for a, b in zip(alpha, beta, strict=True):
                before, now, last = now, ((found - a) * now - last * before) / b, b
                total += now**2
                reached |= total * overlap >= 1
        return scale * float(_OFFSETS[np.argmax(reached)]) if reached.any() else math.inf
