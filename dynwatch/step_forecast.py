"""What one Jacobian-vector product says of the loss after a step of any length, and how much predictions can change."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from dynwatch._logit_rows import by_rows, check_alike, check_classes, check_floats, check_mask, row_slices, wide
from dynwatch.constants import widest_float
from dynwatch.rules.base import check_number


def predicted_loss(
    logits: Tensor,
    tangents: Tensor,
    targets: Tensor,
    length: float | Tensor = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The mean cross entropy with the logits :math:`z + \tau a`: the loss after a step along which logits are linear.

    The options are those of `torch.nn.functional.cross_entropy`, but classes are the last dimension.

    Args:
        logits: [..., K ≥ 2] z before the step.
        tangents: [..., K] their derivatives along the step's unit vector.
        targets: [...] of class indices, or [..., K] of probabilities.
        length: τ: one, or [m] of them.
        weight: [K] of the classes.
        ignore_index: Target index of samples that do not count; not for probabilities.
        label_smoothing: Share of the uniform distribution in the targets.

    Returns:
        A scalar, or [m], in the widest float; NaN if no sample counts, as in torch.

    Raises:
        TypeError: If logits or tangents are not real floats.
        ValueError: If shapes differ, there is one class, or targets have neither shape.

    Example:
        >>> z, a = torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
        >>> predicted_loss(z, a, torch.tensor([1]), length=torch.tensor([0.0, 1.0]))
        tensor([2.1269, 0.6931], dtype=torch.float64)
    """
    check_alike(logits, tangents)
    check_classes("logits", logits)
    lengths = _lengths(length, logits.device)
    indices = targets.shape == logits.shape[:-1] and not targets.dtype.is_floating_point
    if not indices and not (targets.shape == logits.shape and targets.dtype.is_floating_point):
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype} and must have class indices, shape "
            f"{tuple(logits.shape[:-1])}, or float probabilities, shape {tuple(logits.shape)}."
        )
    check_number("label_smoothing", label_smoothing, least=0.0, below=math.nextafter(1.0, 2.0))
    classes = logits.shape[-1]
    z, a = logits.reshape(-1, classes), tangents.reshape(-1, classes)
    flat = targets.reshape(-1) if indices else targets.reshape(-1, classes)
    wide_weight = None if weight is None else wide(weight)
    loss = z.new_zeros(len(lengths), dtype=widest_float(z.device))
    for part in row_slices(len(z), classes):
        start, slope = wide(z[part]), wide(a[part])
        wanted = flat[part] if indices else wide(flat[part])
        for k in range(len(lengths)):
            loss[k] += F.cross_entropy(
                start + lengths[k] * slope,
                wanted,
                weight=wide_weight,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction="sum",
            )
    loss /= _mass(flat, wide_weight, ignore_index) if indices else len(z)
    return loss.reshape(length.shape) if isinstance(length, Tensor) else loss[0]


def predicted_loss_sigmoid(
    logits: Tensor,
    tangents: Tensor,
    targets: Tensor,
    length: float | Tensor = 1.0,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""The mean binary cross entropy with the logits :math:`z + \tau a`.

    The options are those of `torch.nn.functional.binary_cross_entropy_with_logits`.

    Args:
        logits: [...] z before the step, one a label.
        tangents: [...] their derivatives along the step's unit vector.
        targets: [...] from 0 to 1.
        length: τ: one, or [m] of them.
        weight: Of the labels, of a shape that extends to theirs.
        pos_weight: Of positive targets, the same.

    Returns:
        A scalar, or [m], in the widest float.

    Raises:
        TypeError: If logits or tangents are not real floats.
        ValueError: If shapes differ.

    Example:
        >>> predicted_loss_sigmoid(torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([0.0]), length=2.0)
        tensor(0.6931, dtype=torch.float64)
    """
    check_alike(logits, tangents)
    if targets.shape != logits.shape:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} and must have that of logits, {tuple(logits.shape)}."
        )
    lengths = _lengths(length, logits.device)
    z, a, wanted = wide(logits), wide(tangents), targets.to(widest_float(logits.device))
    weight, pos_weight = (None if value is None else wide(value) for value in (weight, pos_weight))
    losses = [
        F.binary_cross_entropy_with_logits(z + each * a, wanted, weight, pos_weight=pos_weight) for each in lengths
    ]
    return torch.stack(losses).reshape(length.shape) if isinstance(length, Tensor) else losses[0]


def kl_bound(tangents: Tensor, length: float | Tensor = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""What the mean KL divergence from the predictions before to those after a step is at most, in nats.

    .. math:: \mathrm{KL}(p(0) \,\|\, p(\tau)) = \int_0^\tau (\tau - s) \operatorname{Var}_{p(s)}(a)\, ds
        \le \tau^2 \Delta^2 / 8

    because numbers with the spread Δ have a variance of Δ²/4 at most (Popoviciu; for p(τ) of the logits z + τ a). With
    x = τ Δ the least bound that holds for all logits is :math:`\log((e^x - 1) / x) - 1 + x / (e^x - 1)`, met by two
    classes. A step of length π / Δ, r_pi = 1, has x = π: the KL of a sample is then 1.0946 at most, and this gives
    π²/8 = 1.2337.

    Args:
        tangents: [..., K ≥ 2] derivatives of the logits along the step's unit vector.
        length: τ.
        mask: [...] of bool, True where a sample counts; None for all.

    Returns:
        A scalar in the widest float; NaN if no sample counts, or one that counts has a NaN or an infinity.

    Raises:
        TypeError: If the tangents are not real floats, or the mask is not boolean.
        ValueError: If there is one class, or the mask does not fit.

    Example:
        >>> kl_bound(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), length=4.0)
        tensor(1., dtype=torch.float64)
    """
    check_floats("tangents", tangents)
    check_classes("tangents", tangents)
    if mask is not None:
        check_mask(mask, tangents.shape[:-1])

    def swing(a: Tensor) -> Tensor:
        low, high = a.aminmax(dim=-1)
        return torch.where(low.isfinite() & high.isfinite(), high - low, math.nan)

    each = (length * by_rows(swing, tangents)) ** 2 / 8
    if mask is None:
        return each.mean()
    return each.masked_fill(~mask, 0.0).sum() / mask.sum()


def _lengths(length: float | Tensor, device: torch.device) -> Tensor:
    """Lengths as [m] on the device."""
    if isinstance(length, Tensor):
        if length.ndim > 1:
            raise ValueError(f"length has shape {tuple(length.shape)} and must be a number or have one dimension.")
        return length.detach().to(device, widest_float(device)).reshape(-1)
    return torch.full((1,), float(length), dtype=widest_float(device), device=device)


def _mass(targets: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What torch divides a sum over class indices by: the weights of the classes that were to be found."""
    counts = targets != ignore_index
    if weight is None:
        return counts.sum()
    return (weight[targets.where(counts, 0)] * counts).sum()
