r"""Entropies, alignment, flow and Tensor Net of one layer's "structured knowledge" (SKA: arXiv 2503.13942, 2504.03214).

A layer's knowledge Z is its pre-activations on fixed samples, its decisions are :math:`D = \sigma(Z)`, and Δ is the
change since the probe before. Sums here are over all samples and units, as in the papers; `dynwatch.ska_layer` tracks a
layer over a run and gives means per element, so that layers compare. Entropies are in bits.

What the papers claim, and what holds:

- The entropy :math:`-\frac{1}{\ln 2}\int z \, dD` of a path is the change of h, the entropy of a yes or no of
  probability D: it depends on the ends of the path alone and is at most one bit an element. The published sum takes z
  at the right end of every step. Under noise it drifts without bound: show it, but decide by the trapezoid or exact
  form.
- The trapezoid is 0 along a path that turns back over its own points. Around another closed path it is small, not 0.
- The Tensor Net has the sign of one term one way in the paper and the other way in the released code, whose per-step
  values have the published zero crossings. A crossing is said to mark the onset of structured learning, never its end.
- Entropy and flow that settle mean that a network has stopped changing its decisions. That it generalises best there
  does not follow, and in five checks on ordinary training crossings and peaks did not track the validation minimum.
- Curves over t = Σ learning rate converge as the rate goes to 0, as those of any Euler scheme. With momentum or Adam
  the learning rate is not a step of time.
- Equations 23, 31 and 32 of 2503.13942 are misprinted. The Euler–Lagrange statement says nothing: that Lagrangian is a
  total derivative.

Everything is computed in float32, in float64 for tensors of float64, and summed in the widest float of the device.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dynwatch._logit_rows import check_floats
from dynwatch.constants import widest_float
from dynwatch.rules.base import check_number

StepForm = Literal["published", "trapezoid", "exact"]
NetForm = Literal["paper", "code"]


def decision_entropy(z: Tensor) -> Tensor:
    r"""The entropy of each decision, :math:`h(z) = -[D \log_2 D + (1-D) \log_2 (1-D)]`, in a form without overflow.

    .. math:: h(z) = [\mathrm{softplus}(-|z|) + |z| \, \sigma(-|z|)] / \ln 2

    Its derivative is :math:`-z D' / \ln 2`, so that it is the antiderivative of the papers' entropy (arXiv 2503.13942).

    Args:
        z: [...] pre-activations.

    Returns:
        [...] in bits, between 0 and 1.

    Raises:
        TypeError: If z is not a tensor of real floats.

    Example:
        >>> decision_entropy(torch.tensor([0.0, 2.0, -2.0, 1e30]))
        tensor([1.0000, 0.5271, 0.5271, 0.0000])
    """
    size = _float("z", z).abs()
    entropy = (torch.log1p(torch.exp(-size)) + size * torch.sigmoid(-size)) / math.log(2)
    return entropy.clamp_max(1.0)  # rounding


def decision_change(z: Tensor, before: Tensor) -> Tensor:
    r"""How far each decision moved, :math:`\Delta D = \sigma(z) - \sigma(b)`, without the cancellation.

    It is :math:`\tanh\frac{z-b}{2} \, [\sigma(z) \sigma(-b) + \sigma(b) \sigma(-z)]`, exact to rounding also for small
    steps and for decisions that are all but certain.

    Args:
        z: [...] pre-activations.
        before: [...], the same shape, of the probe before.

    Returns:
        [...].

    Raises:
        TypeError: If one is not a tensor of real floats.
        ValueError: If shapes differ.

    Example:
        >>> decision_change(torch.tensor([1.0, 30.0]), torch.tensor([0.0, 29.0]))
        tensor([2.3106e-01, 1.6079e-13])
    """
    z, before = _pair(z, before)
    either = torch.sigmoid(z) * torch.sigmoid(-before) + torch.sigmoid(before) * torch.sigmoid(-z)
    return torch.tanh((z - before) / 2) * either


def step_entropy(z: Tensor, before: Tensor, form: StepForm = "trapezoid") -> Tensor:
    r"""The entropy of one step, summed over all elements, in bits.

    ``published`` :math:`-\frac{1}{\ln 2} Z \cdot \Delta D`, at the right end of the step (arXiv 2503.13942, eq. 29);
    ``trapezoid`` the same with the mean of Z at both ends; ``exact`` :math:`\sum h(Z) - h(Z_b)`, the limit of small
    steps on any path between the two. With :math:`\theta` of `alignment` the published form is
    :math:`-|Z| \, |\Delta D| \cos\theta / \ln 2`.

    Args:
        z: [...] pre-activations.
        before: [...], the same shape, of the probe before; for the exact form of any earlier probe.
        form: "published", "trapezoid" or "exact".

    Returns:
        Scalar; negative where decisions became surer.

    Raises:
        TypeError: If a tensor is not of real floats.
        ValueError: If shapes differ or the form is unknown.

    Example:
        >>> now, before = torch.tensor([1.0]), torch.tensor([0.5])
        >>> [round(step_entropy(now, before, form).item(), 4) for form in ("published", "trapezoid", "exact")]
        [-0.1567, -0.1175, -0.1163]
    """
    if form not in get_args(StepForm):
        raise ValueError(f"form={form!r} must be 'published' (right end), 'trapezoid' or 'exact' (path-independent).")
    z, before = _pair(z, before)
    if form == "exact":
        return _total(decision_entropy(z) - decision_entropy(before))
    # Halved before they are added: the sum of two large numbers may not fit.
    point = z if form == "published" else z / 2 + before / 2
    return -_total(point * decision_change(z, before)) / math.log(2)


def entropy_gradient(z: Tensor, before: Tensor) -> Tensor:
    r"""The gradient of the published step entropy by z, :math:`G = -\frac{1}{\ln 2} [z D' + \Delta D]`.

    Source: arXiv 2503.13942, eq. 22. The forward-only learner descends along it (`dynwatch.ska_learner`).

    Args:
        z: [...] pre-activations.
        before: [...], the same shape, of the probe before.

    Returns:
        [...].

    Raises:
        TypeError: If a tensor is not of real floats.
        ValueError: If shapes differ.

    Example:
        >>> entropy_gradient(torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([-0.4403])
    """
    z, before = _pair(z, before)
    return -(z * _slope(z) + decision_change(z, before)) / math.log(2)


def alignment(z: Tensor, before: Tensor) -> Tensor:
    r"""The cosine between knowledge and the change of decisions, :math:`Z \cdot \Delta D / (|Z| \, |\Delta D|)`.

    Source: arXiv 2503.13942. Near 1 decisions become surer where they stand already.

    Args:
        z: [...] pre-activations.
        before: [...], the same shape, of the probe before.

    Returns:
        Scalar in [-1, 1]; 0 if a norm is 0.

    Raises:
        TypeError: If a tensor is not of real floats.
        ValueError: If shapes differ.

    Example:
        >>> alignment(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
        tensor(1., dtype=torch.float64)
    """
    z, before = _pair(z, before)
    change = decision_change(z, before)
    norms = knowledge_norm(z) * knowledge_norm(change)
    return (_total(z * change) / torch.where(norms == 0, 1.0, norms)).clamp(-1.0, 1.0)


def knowledge_norm(z: Tensor) -> Tensor:
    r"""The Frobenius norm of the knowledge tensor, :math:`|Z|`.

    Args:
        z: [...] pre-activations.

    Returns:
        Scalar.

    Raises:
        TypeError: If z is not a tensor of real floats.

    Example:
        >>> knowledge_norm(torch.tensor([3e30, 4e30]))
        tensor(5.0000e+30, dtype=torch.float64)
    """
    z = _float("z", z)
    norm: Tensor = torch.linalg.vector_norm(z, dtype=widest_float(z.device))
    return norm


def knowledge_flow(z: Tensor, before: Tensor, dt: float) -> Tensor:
    r"""How fast the knowledge moves, :math:`|\Delta Z| / \Delta t` (arXiv 2504.03214, eq. 7).

    Args:
        z: [...] pre-activations.
        before: [...], the same shape, of the probe before.
        dt: Time between the probes: the sum of learning rates, as in the papers, or a number of steps.

    Returns:
        Scalar.

    Raises:
        TypeError: If a tensor is not of real floats.
        ValueError: If shapes differ or dt is not positive.

    Example:
        >>> knowledge_flow(torch.tensor([3.0, 4.0]), torch.zeros(2), dt=0.5)
        tensor(10., dtype=torch.float64)
    """
    check_number("dt", dt, above=0.0, below=math.inf, remedy="it is the time between two probes")
    z, before = _pair(z, before)
    return knowledge_norm(z - before) / dt


def tensor_net(z: Tensor, before: Tensor, sign: NetForm = "code", *, exact: bool = False) -> Tensor:
    r"""The Tensor Net of one step, :math:`(D \pm \frac{1}{\ln 2} z D') \cdot \Delta Z`, summed over all elements.

    The paper has the plus (arXiv 2504.03214, eqs. 8 and 26–29), the code released with it the minus; the published zero
    crossings come from the code's, step by step. Both add up to :math:`2 D \cdot \Delta Z`. In the limit of small steps
    it is :math:`\sum \mathrm{softplus}(Z) - \mathrm{softplus}(Z_b)`, minus (paper) or plus (code) the exact entropy.

    Args:
        z: [...] pre-activations.
        before: [...], the same shape, of the probe before; for the exact form of any earlier probe.
        sign: "paper" or "code".
        exact: Whether to take the limit, which does not depend on the path.

    Returns:
        Scalar.

    Raises:
        TypeError: If a tensor is not of real floats.
        ValueError: If shapes differ or the sign is unknown.

    Example:
        >>> now, before = torch.tensor([1.0]), torch.tensor([0.5])
        >>> [round(tensor_net(now, before, sign).item(), 4) for sign in ("paper", "code")]
        [0.5074, 0.2237]
    """
    if sign not in get_args(NetForm):
        raise ValueError(f"sign={sign!r} must be 'paper' (plus) or 'code' (minus, as in the released code).")
    z, before = _pair(z, before)
    plus = 1.0 if sign == "paper" else -1.0
    if exact:
        return _total(_softplus(z) - _softplus(before)) - plus * step_entropy(z, before, "exact")
    return _total((torch.sigmoid(z) + plus * z * _slope(z) / math.log(2)) * (z - before))


def _float(argument: str, value: Tensor) -> Tensor:
    """The values in float32, or float64 if they are that; half precision would lose every small step."""
    check_floats(argument, value)
    return value if value.dtype == torch.float64 else value.float()


def _pair(z: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    z, before = _float("z", z), _float("before", before)
    if before.shape != z.shape:
        raise ValueError(
            f"before has shape {tuple(before.shape)} and must have that of z, {tuple(z.shape)}: pass the same samples "
            "and units."
        )
    return z, before


def _total(values: Tensor) -> Tensor:
    return values.sum(dtype=widest_float(values.device))


def _slope(z: Tensor) -> Tensor:
    """D' = σ(z) σ(-z), which 1 - D would round away."""
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _softplus(z: Tensor) -> Tensor:
    """Without the threshold of torch's own, beyond which it is the identity and wrong by 2e-9."""
    return z.clamp_min(0) + torch.log1p(torch.exp(-z.abs()))
