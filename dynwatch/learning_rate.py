"""Learning rates from curvature: where a run becomes unstable, and how an optimizer turns curvature into that.

On ½λx² an update with the momentum filter G(z) is stable until a root of its characteristic polynomial reaches z = -1,
where lr · λ · G(-1) = 2. `threshold` stands for 2 / G(-1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynwatch.constants import widest_float
from dynwatch.rules.base import check_number

# SLQ weight above which a Ritz value stands for the bulk of the spectrum.
_BULK = 0.5
# Share of the largest Ritz value below which one is zero, as far as products in float32 can tell.
_ZERO = 1e-6


def critical_lr(
    sharpness: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> float:
    r"""The learning rate above which `torch.optim.SGD` diverges along a direction of curvature λ.

    .. math:: \frac{2 (1 + \beta)}{(1 - \tau)(\lambda + w)}, \qquad
        \text{Nesterov: } \frac{2 + 2\beta}{(1 + 2\beta)(\lambda + w)}

    with momentum β, dampening τ and weight decay w, from the characteristic polynomial of torch's update (Cohen et al.,
    arXiv 2103.00065, appendix B, for the undamped forms). As in torch, dampening without momentum does nothing.

    Args:
        sharpness: λ, the largest eigenvalue of the Hessian of the loss without the decay.
        momentum: β, 0 or more and below 1.
        dampening: τ, 1 or less; at 1 gradients do not reach the buffer, and no rate is unstable.
        nesterov: Whether it is Nesterov's form, which torch refuses together with dampening.
        weight_decay: w, 0 or more.

    Returns:
        The rate; infinity if λ + w is not positive, NaN if λ is NaN.

    Raises:
        ValueError: If an argument is outside its bounds, or Nesterov's form has dampening.

    Example:
        >>> critical_lr(4.0), critical_lr(4.0, momentum=0.5), critical_lr(4.0, momentum=0.5, nesterov=True)
        (0.5, 0.75, 0.375)
    """
    check_number("weight_decay", weight_decay, least=0.0)
    return rate_at(sharpness + weight_decay, sgd_threshold(momentum, dampening, nesterov))


def critical_lr_adam(preconditioned_sharpness: float, beta1: float = 0.9, decoupled_weight_decay: float = 0.0) -> float:
    r"""The learning rate above which Adam diverges along a direction of preconditioned curvature λ.

    .. math:: \frac{2}{w + \lambda (1 - \beta_1) / (1 + \beta_1)}

    with w the decay of AdamW. Without decay it is (2 + 2β₁) / ((1 - β₁) λ), 38 / λ at β₁ = 0.9 (Cohen et al.,
    arXiv 2207.14484). It holds for a preconditioner that changes slowly against the oscillation.

    Args:
        preconditioned_sharpness: λ, the largest eigenvalue of S H S with S² = 1 / (√v̂ + ε).
        beta1: β₁, 0 or more and below 1.
        decoupled_weight_decay: w, 0 or more. (Coupled decay belongs into H.)

    Returns:
        The rate; infinity if the denominator is not positive, NaN if λ is NaN.

    Raises:
        ValueError: If an argument is outside its bounds.

    Example:
        >>> round(critical_lr_adam(19.0), 9), round(critical_lr_adam(19.0, decoupled_weight_decay=1.0), 9)
        (2.0, 1.0)
    """
    check_number("decoupled_weight_decay", decoupled_weight_decay, least=0.0)
    return rate_at(preconditioned_sharpness, ema_threshold(beta1), decoupled_weight_decay)


def rate_at(sharpness: float, threshold: float, decoupled_decay: float = 0.0) -> float:
    """The rate lr at which lr · (λ · 2 / threshold + decoupled decay) = 2: infinity if nothing pulls.

    Args:
        sharpness: λ.
        threshold: What lr · λ must stay below without the decay.
        decoupled_decay: Decay of the weights that bypasses the gradient.

    Example:
        >>> rate_at(10.0, threshold=2.0)
        0.2
    """
    pull = 2 * sharpness / threshold + decoupled_decay
    return math.inf if pull <= 0 else 2 / pull


def sgd_threshold(momentum: float, dampening: float = 0.0, nesterov: bool = False) -> float:
    """What lr · λ must stay below under `torch.optim.SGD`; see `critical_lr`.

    Raises:
        ValueError: If the momentum is not in [0, 1), dampening is above 1 or both dampening and Nesterov are asked for.

    Example:
        >>> sgd_threshold(momentum=0.9)
        3.8
    """
    check_number("momentum", momentum, least=0.0, below=1.0, remedy="at 1 or more no learning rate is stable")
    if not dampening <= 1:
        raise ValueError(f"dampening={dampening!r} must be 1 or less; above it the optimizer ascends.")
    if nesterov and dampening:
        raise ValueError(
            f"dampening={dampening!r} must be 0 with nesterov=True, as in torch.optim.SGD; leave one of them out."
        )
    if nesterov:
        return (2 + 2 * momentum) / (1 + 2 * momentum)
    gain = 1 - dampening if momentum else 1.0
    return 2 * (1 + momentum) / gain if gain else math.inf


def ema_threshold(beta1: float) -> float:
    """What lr · λ must stay below where the gradient is averaged with weight β₁; see `critical_lr_adam`.

    Raises:
        ValueError: If β₁ is not in [0, 1).

    Example:
        >>> round(ema_threshold(0.9), 9)
        38.0
    """
    check_number("beta1", beta1, least=0.0, below=1.0, remedy="at 1 gradients do not reach the weights")
    return (2 + 2 * beta1) / (1 - beta1)


def _itself(dots: Tensor) -> Tensor:
    return dots


def batch_sharpness(gradient: Tensor, product: Tensor, reduce: Callable[[Tensor], Tensor] = _itself) -> float:
    """The curvature of a mini-batch's loss along its own gradient, gᵀHg / gᵀg.

    Its mean over batches is what SGD holds at 2/lr, with λ_max of the full batch below (Andreyev and Beneventano,
    arXiv 2412.20553); with momentum it is 2(1 - β)/lr for small and 2(1 + β)/lr for large batches (arXiv 2604.14108).

    Args:
        gradient: [n] g, of one batch.
        product: [n] H g, of the same batch.
        reduce: Turns dot products, [2], over this process's entries into those over all.

    Returns:
        The curvature; NaN for a gradient of zero.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> batch_sharpness(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0]))
        2.0
    """
    if gradient.shape != product.shape:
        raise ValueError(
            f"product has shape {tuple(product.shape)} and must have the gradient's, {tuple(gradient.shape)}: "
            "it is the Hessian times the gradient."
        )
    # In the widest type, so that squares of float32 cannot overflow.
    wide = widest_float(gradient.device)
    g, bent = gradient.to(wide), product.to(wide)
    curvature, square = reduce(torch.stack([torch.dot(g, bent), torch.dot(g, g)])).tolist()
    return curvature / square if square else math.nan


def learned_rates(ritz: npt.ArrayLike, weights: npt.ArrayLike, nesterov: bool = False) -> tuple[float, float]:
    r"""Learning rate and momentum that are optimal for a quadratic with the extremes of a measured spectrum.

    .. math:: \eta = \frac{4}{(\sqrt L + \sqrt\mu)^2}, \qquad
        \beta = \left(\frac{\sqrt L - \sqrt\mu}{\sqrt L + \sqrt\mu}\right)^2

    for the heavy ball (Polyak, 1964), η = 1 / L with that β for Nesterov's form; used on Ritz values by Granziol,
    Zohren and Roberts (arXiv 2006.09092). L is the largest absolute Ritz value; μ the smallest outside the bulk near
    zero, for which Ritz values of spectral weight above 0.5 and those of zero to float32's rounding are left out.

    Args:
        ritz: [m] Ritz values of a Lanczos run from a random start.
        weights: [m] their spectral weights (squared first components), which add up to 1.
        nesterov: Whether the rate is for Nesterov's form.

    Returns:
        (learning rate, momentum); NaN, NaN if no Ritz value is left or one is not finite.

    Raises:
        ValueError: If the arguments are not of one length.

    Example:
        >>> learned_rates([1.0, 0.001, 9.0], [0.2, 0.7, 0.1])
        (0.25, 0.25)
    """
    values, shares = np.abs(np.asarray(ritz, dtype=np.float64)), np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or values.shape != shares.shape:
        raise ValueError(f"weights has shape {shares.shape} and must have that of ritz, {values.shape}: [m] each.")
    largest = float(values.max(initial=0.0))
    outside = values[(shares <= _BULK) & (values > _ZERO * largest)]
    if len(outside) == 0 or not np.isfinite(values).all():
        return math.nan, math.nan
    top, bottom = math.sqrt(largest), math.sqrt(float(outside.min()))
    beta = ((top - bottom) / (top + bottom)) ** 2
    return (1 / largest if nesterov else 4 / (top + bottom) ** 2), beta
