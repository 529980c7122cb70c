"""How the sharpness of a mini-batch depends on its size: noise in the Hessian makes small batches sharper.

The largest stable learning rate at a batch size is that of the corrected sharpness (`learning_rate.critical_lr`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynwatch.constants import widest_float
from dynwatch.rules.base import check_count, check_number

# More samples than any data set has.
_MANY = 10**15


def isotropic(lambda_: float, variance: float, batch: int, full: int) -> float:
    r"""An extreme eigenvalue of a mini-batch's Hessian, if the noise of the Hessian has no preferred direction.

    .. math:: \lambda' = \begin{cases} \lambda + v / \lambda & |\lambda| > \sqrt v \\
        \pm 2 \sqrt v & \text{else} \end{cases}, \qquad v = \sigma^2 \left(\frac 1 B - \frac 1 N\right)

    the spiked Wigner form on which Granziol, Zohren and Roberts (arXiv 2006.09092) build. Trained nets are not like
    that: their Hessian's noise lies in the directions of its outliers, and this falls short; see `directional`.

    Args:
        lambda_: λ, of the full batch.
        variance: σ² of one sample: E |(H_i - H) z|² for a random unit vector z.
        batch: B, samples in the mini-batch.
        full: N, samples in the full batch, B or more.

    Returns:
        λ', NaN if λ is NaN. Below √v the outlier is lost in the noise and λ' is the noise's edge, on λ's side.

    Raises:
        ValueError: If the variance is negative or the sizes are not 1 ≤ B ≤ N.

    Example:
        >>> isotropic(4.0, variance=20.0, batch=4, full=20), isotropic(-0.5, variance=20.0, batch=4, full=20)
        (5.0, -4.0)
    """
    v = _noise(variance, batch, full)
    if math.isnan(lambda_):
        return math.nan
    if abs(lambda_) > math.sqrt(v):
        return lambda_ + v / lambda_
    return math.copysign(2 * math.sqrt(v), lambda_)


def isotropic_inverse(observed: float, variance: float, batch: int, full: int) -> float | None:
    r"""The full batch's eigenvalue from that of a mini-batch: the inverse of `isotropic`.

    .. math:: \lambda = \tfrac 1 2 \left(\lambda' \pm \sqrt{\lambda'^2 - 4 v}\right)

    Args:
        observed: λ', of the mini-batch.
        variance: σ² of one sample, as in `isotropic`.
        batch: B, samples in the mini-batch.
        full: N, samples in the full batch, B or more.

    Returns:
        λ; None if it is buried: |λ'| is not above the noise's edge 2√v, where every |λ| up to √v looks the same.

    Raises:
        ValueError: If the variance is negative or the sizes are not 1 ≤ B ≤ N.

    Example:
        >>> isotropic_inverse(5.0, variance=20.0, batch=4, full=20)
        4.0
        >>> isotropic_inverse(3.9, variance=20.0, batch=4, full=20) is None
        True
    """
    v = _noise(variance, batch, full)
    edge = 2 * math.sqrt(v)
    size = abs(observed)
    if v > 0 and size <= edge:
        return None
    # As a product, so that squares of huge or tiny numbers do not leave the range.
    root = math.sqrt(size - edge) * math.sqrt(size + edge)
    return math.copysign((size + root) / 2, observed)


def _noise(variance: float, batch: int, full: int) -> float:
    check_number("variance", variance, least=0.0)
    check_count("batch", batch)
    check_count("full", full, least=batch)
    return variance * (1 / batch - 1 / full)


@dataclass(frozen=True)
class HessianSpread:
    """How much the Hessians H_i of single samples differ along a direction u.

    Attributes:
        outer: E |(H_i - H) u|² - Var(uᵀH_i u): the part that turns u, and so raises the largest eigenvalue.
        along: Var(uᵀH_i u): the part that makes the eigenvalue fluctuate.
        samples: Samples of the batch that they were estimated from.

    Example:
        >>> HessianSpread(outer=4.0, along=1.0, samples=256).outer
        4.0
    """

    outer: float
    along: float
    samples: int


def _itself(dots: Tensor) -> Tensor:
    return dots


def spread_of_chunks(
    products: Sequence[Tensor],
    u: Tensor,
    sizes: Sequence[int],
    reduce: Callable[[Tensor], Tensor] = _itself,
    pool: Callable[[Tensor], Tensor] = _itself,
) -> HessianSpread:
    r"""The per-sample spread of the Hessian along u, from H_k u on chunks of a batch.

    .. math:: \Sigma u = \frac{1}{K - 1} \sum_k c_k\, |H_k u - \bar h|^2, \qquad
        \bar h = \sum_k c_k H_k u / \sum_k c_k

    (one-way analysis of variance): with random chunks it is unbiased for every split into sizes c_k, in the convention
    in which a batch of B out of N has the variance Σ (1/B - 1/N). It rests on K - 1 degrees of freedom, so `along` has
    a relative error near √(2 / (K - 1)).

    Args:
        products: K ≥ 2 of [n]: H_k u, where H_k is the Hessian of the mean loss of chunk k.
        u: [n], as a rule the top Ritz vector; of any length but zero.
        sizes: K samples c_k.
        reduce: Turns dot products, [2K + 1], over this process's entries into those over all.
        pool: Sums over processes that have chunks of their own of one batch, and the same u; with it one chunk on each
            is enough.

    Returns:
        The spread; NaN in it if a product is not finite.

    Raises:
        ValueError: If there are fewer than two chunks, numbers or shapes do not fit, or u is zero.

    Example:
        >>> u = torch.tensor([1.0, 0.0])
        >>> spread_of_chunks([torch.tensor([3.0, 1.0]), torch.tensor([1.0, -1.0])], u, sizes=[4, 4])
        HessianSpread(outer=8.0, along=8.0, samples=8)
    """
    count = len(products)
    if count < (2 if pool is _itself else 1) or len(sizes) != count:
        raise ValueError(
            f"products has {count} chunks and sizes {len(sizes)}: give one size each for 2 chunks or more; "
            "split the batch further."
        )
    for k, size in enumerate(sizes):
        check_count(f"sizes[{k}]", size)
        if products[k].shape != u.shape:
            raise ValueError(
                f"products[{k}] has shape {tuple(products[k].shape)} and must have that of u, {tuple(u.shape)}."
            )
    wide = widest_float(u.device)
    total_product = torch.zeros_like(products[0])
    for size, product in zip(sizes, products, strict=True):
        total_product.add_(product, alpha=size)
    chunks, samples = (round(n) for n in pool(torch.tensor([count, sum(sizes)], dtype=wide, device=u.device)).tolist())
    mean = pool(total_product) / samples
    # In the widest type, so that squares of float32 cannot overflow.
    u = u.to(wide)
    dots = [torch.dot(u, u)]
    for product in products:
        off = (product - mean).to(wide)
        dots += [torch.dot(off, off), torch.dot(u, off)]
    square, *rest = reduce(torch.stack(dots)).tolist()
    if square == 0:
        raise ValueError("u has norm 0 and must point somewhere: pass the top Ritz vector.")
    own = [
        math.fsum(size * off for size, off in zip(sizes, rest[::2], strict=True)) / square,
        math.fsum(size * off * off for size, off in zip(sizes, rest[1::2], strict=True)) / square**2,
    ]
    if pool is not _itself:
        own = pool(torch.tensor(own, dtype=wide, device=u.device)).tolist()
    total, along = (each / (chunks - 1) if chunks > 1 else math.nan for each in own)
    # Rounding alone can make it negative.
    outer = total - along
    return HessianSpread(0.0 if outer < 0 else outer, along, samples)


def directional(lambda_: float, spread: HessianSpread, batch: int, full: int) -> tuple[float, float]:
    r"""The mean largest eigenvalue of the Hessian of batches of a size, from the noise along the top eigenvector.

    .. math:: \lambda' = \lambda + \frac{U}{\lambda} \left(\frac 1 B - \frac 1 N\right), \qquad
        \mathrm{sd} = \sqrt{\mathrm{Var}(u^T H_i u) \left|\frac 1 B - \frac 1 N\right|}

    second-order perturbation of λ against a bulk near zero; the correction for the batch size of arXiv 2006.09092 with
    the noise where trained nets have it. B > N extrapolates to a larger set than was measured. λ' is then never less
    than λ / 2: read that as "mostly noise".

    On ensembles of known covariance the shift is right to a tenth, both ways, while it is below a tenth of λ and the
    noise in other directions is weaker than λ. Beyond that it is too small: the largest eigenvalue becomes that of the
    noise, which is above λ' (up to 2.8 times at B = 8 in the worst ensemble tried).

    Args:
        lambda_: λ, measured on N samples.
        spread: Along λ's eigenvector.
        batch: B, samples in the batches asked about.
        full: N, samples of the batch that λ was measured on.

    Returns:
        (λ', sd): the mean over batches and the standard deviation of one. NaN, NaN if λ is not positive.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> directional(4.0, HessianSpread(outer=80.0, along=20.0, samples=20), batch=4, full=20)
        (8.0, 2.0)
    """
    check_count("batch", batch)
    check_count("full", full)
    if not lambda_ > 0:
        return math.nan, math.nan
    share = 1 / batch - 1 / full
    mean = lambda_ + spread.outer * share / lambda_
    return (lambda_ / 2 if mean < lambda_ / 2 else mean), math.sqrt(spread.along * abs(share))


def critical_lr_in_noise(
    lambda_: float, spread: HessianSpread, batch: int, full: int, threshold: float = 2.0, inverse_gain: float = 1.0
) -> float:
    r"""The learning rate above which a run on fresh random batches leaves a valley in the mean square.

    .. math:: \frac{2}{2 \lambda / T + v / (\lambda G)}, \qquad v = (U + \mathrm{Var}(u^T H_i u)) / B

    with λ that of all data, T what lr · λ must stay below without noise, and 1/G the sum of the momentum filter's
    weights. For SGD without momentum it is 2 / (λ + v/λ), the form of arXiv 2006.09092 with the noise along the top
    eigenvector: linear in B while v is larger than λ², saturating at 2/λ. Momentum averages the oscillation away but
    not the noise, which comes anew with each batch: so it helps large batches only.

    Args:
        lambda_: λ, measured on N samples; that of all data is extrapolated with `directional`.
        spread: Along λ's eigenvector.
        batch: B, samples in each batch of the run.
        full: N.
        threshold: T: 2 for SGD, see `dynwatch.stability.Stability`.
        inverse_gain: G: 1 for SGD without momentum and for averaged gradients (Adam).

    Returns:
        The rate; NaN if λ is not positive.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> spread = HessianSpread(outer=0.0, along=16.0, samples=64)
        >>> [round(critical_lr_in_noise(4.0, spread, batch, full=64), 3) for batch in (1, 4, 10**9)]
        [0.25, 0.4, 0.5]
    """
    check_count("batch", batch)
    of_all, _ = directional(lambda_, spread, _MANY, full)
    if not of_all > 0:
        return math.nan
    noise = (spread.outer + spread.along) / batch
    return 2 / (2 * of_all / threshold + noise / (of_all * inverse_gain))
