"""How an optimizer, as it is now, turns curvature into stability: its preconditioner, decay and threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop

from dynwatch.learning_rate import ema_threshold, rate_at, sgd_threshold
from dynwatch.operators import vector_dtype
from dynwatch.ranks import local_part


class Unsupported(ValueError):  # noqa: N818 - an answer about an optimizer, as much as an error
    """Curvature cannot be turned into a critical learning rate for this optimizer; the message says why.

    Example:
        >>> raise Unsupported("LBFGS has no single step size.")
        Traceback (most recent call last):
        ...
        dynwatch.stability.Unsupported: LBFGS has no single step size.
    """


@dataclass(frozen=True)
class Stability:
    """How an optimizer, as it is now, turns curvature into stability.

    It steps θ ← θ - lr S² m, with m the gradient (and coupled decay) after its momentum, and is stable while
    λ_max(S (H + W) S) < threshold / lr. `dynwatch.operators.preconditioned(H, scale, weight_decay)` is that matrix.

    Attributes:
        kind: The optimizer's class.
        lr: The reference rate: of the first group that has one of the parameters and a rate above zero. Rates of other
            groups are in S², relative to it, so a critical rate is the reference rate at which the run becomes
            unstable when all groups' rates are scaled together.
        scale: [n] diagonal of S, flat in the order of the parameters; zero where the optimizer moves nothing. None if S
            is the identity.
        weight_decay: [n] diagonal of W, or a number: decay that is added to the gradient.
        decoupled_decay: Decay that bypasses the preconditioner (AdamW), relative to `lr`. Where groups differ it is
            the largest, so that the critical rate errs to the safe side, by at most lr · decay / 2 of itself.
        threshold: What lr · λ_max must stay below.
        inverse_gain: 1 over the sum of the momentum filter's weights: 1 where gradients are averaged, (1 - β)/(1 - τ)
            for SGD with momentum.

    Example:
        >>> plain = Stability("SGD", lr=0.1, scale=None, weight_decay=0.0, decoupled_decay=0.0, threshold=2.0)
        >>> plain.critical_lr(40.0), plain.ratio(40.0)
        (0.05, 2.0)
    """

    kind: str
    lr: float
    scale: Tensor | None
    weight_decay: Tensor | float
    decoupled_decay: float
    threshold: float
    inverse_gain: float = 1.0

    def critical_lr(self, sharpness: float) -> float:
        """The reference rate above which the run is unstable, from λ_max of S (H + W) S.

        Returns:
            The rate; infinity if the curvature bounds none, NaN if it is NaN.
        """
        return rate_at(sharpness, self.threshold, self.decoupled_decay)

    def ratio(self, sharpness: float) -> float:
        """The rate in units of the critical one, from λ_max of S (H + W) S: near 1 at the edge of stability."""
        critical = self.critical_lr(sharpness)
        if critical == 0:
            return math.inf if self.lr > 0 else 0.0
        return self.lr / critical


def stability(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Stability:
    r"""How an optimizer, as it is now, turns the curvature along some parameters into stability.

    Threshold and S² without the groups' relative rates, from each optimizer's own update:

    - SGD: 2(1 + β)/(1 - τ), Nesterov (2 + 2β)/(1 + 2β); 1.
    - Adam, AdamW: (2 + 2β₁)/(1 - β₁); 1/(√v̂ + ε) with v̂ = v/(1 - β₂ᵗ), v the maximum under `amsgrad`.
    - NAdam: (2 + 2β₁)/(1 + β₁ - 2β₁μ) with its momentum μ of the next step; as Adam.
    - Adamax: as Adam; 1/u.
    - RMSprop: 2(1 + β); 1/(√v + ε), v less the mean gradient's square if `centered`.
    - Adagrad: 2; 1/(√sum + ε)/(1 + t lr_decay).

    The correction of m's start from zero, 1/(1 - β₁ᵗ), is left out: it makes the first 1/(1 - β₁) steps or so larger.
    S is a snapshot. Parameters that the optimizer does not move (in none of its groups, or never with a gradient so
    far while others had one) have S = 0. Of DTensors it is this process's share.

    Args:
        optimizer: One of the above, or of a subclass that steps alike.
        parameters: Those of the Hessian, in its order, on one device.

    Returns:
        The `Stability`, with vectors in `dynwatch.operators.vector_dtype(parameters)`.

    Raises:
        Unsupported: If the optimizer is another one, has not stepped yet, ascends, holds none of the parameters, has
            groups of different momentum, or a setting or state under which nothing is stable (NaN).

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> state = stability(torch.optim.SGD([weight], lr=0.1, momentum=0.9), [weight])
        >>> state.threshold, round(state.ratio(38.0), 9)
        (3.8, 1.0)
    """
    kind = type(optimizer).__name__
    rule = next((rule for rule in _RULES if isinstance(optimizer, rule.optimizers)), None)
    if rule is None:
        known = ", ".join(each.__name__ for rule in _RULES for each in rule.optimizers)
        raise Unsupported(
            f"The critical learning rate of {kind} is not known, only of {known} and their subclasses; "
            "lambda_max and batch_sharpness stay available."
        )
    parameters = list(parameters)
    owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    owners = [owner.get(id(p)) for p in parameters]
    groups = [group for group in optimizer.param_groups if any(group is other for other in owners)]
    if not groups:
        raise Unsupported(f"None of the {len(parameters)} parameters is in a group of {kind}; pass those it trains.")
    states = [optimizer.state.get(p, {}) for p in parameters]
    steps = [1.0] * len(states) if rule.denominator is None else _steps(states)
    owners = [group if step > 0 else None for group, step in zip(owners, steps, strict=True)]
    if not any(owners):
        raise Unsupported(f"{kind} has not stepped yet: its preconditioner forms with the first step.")

    rates = [_rate(kind, group) for group in groups]
    lr = next((rate for rate in rates if rate > 0), 0.0)
    relative = {id(group): rate / lr if lr else 1.0 for group, rate in zip(groups, rates, strict=True)}
    youngest = min(step for step in steps if step > 0)
    threshold = _common_threshold(kind, rule, [group for group in groups if relative[id(group)] > 0], youngest)

    dtype, device = vector_dtype(parameters), parameters[0].device
    sizes = [local_part(p).numel() for p in parameters]

    def flat(numbers: Sequence[float]) -> Tensor:
        return torch.cat([torch.full((n,), x, dtype=dtype, device=device) for n, x in zip(sizes, numbers, strict=True)])

    shares = [0.0 if group is None else relative[id(group)] for group in owners]
    scale = None
    if rule.denominator is not None or set(shares) != {1.0}:
        scale = flat(shares)
        for part, group, state, step in zip(torch.split(scale, sizes), owners, states, steps, strict=True):
            if group is not None and rule.denominator is not None:
                part.div_(rule.denominator(group, state, step, dtype).reshape(-1))
        scale.sqrt_()
        if not bool(torch.isfinite(scale).all()):
            raise Unsupported(f"{kind} divides by zero or by NaN: a gradient was zero with eps=0, or not finite.")

    bypasses = isinstance(optimizer, AdamW)
    decoupled = [bypasses or bool(group.get("decoupled_weight_decay")) for group in groups]
    decays = [float(group["weight_decay"]) for group in groups]
    coupled = {id(g): 0.0 if apart else w for g, apart, w in zip(groups, decoupled, decays, strict=True)}
    shrinking = [relative[id(g)] * w for g, apart, w in zip(groups, decoupled, decays, strict=True) if apart]
    weight_decay: Tensor | float = next(iter(coupled.values()))
    if len(set(coupled.values())) > 1:
        weight_decay = flat([0.0 if group is None else coupled[id(group)] for group in owners])
    gain = max(_inverse_gain(group) for group in groups)
    return Stability(kind, lr, scale, weight_decay, max(shrinking, default=0.0), threshold, gain)


def _rate(kind: str, group: Mapping[str, Any]) -> float:
    if group.get("maximize"):
        raise Unsupported(f"{kind} has maximize=True: it ascends, and curvature bounds a descent; negate the loss.")
    rate = float(group["lr"])
    if not 0 <= rate < math.inf:
        raise Unsupported(f"{kind} has lr={rate!r} in a group; it must be 0 or more and finite.")
    return rate


def _inverse_gain(group: Mapping[str, Any]) -> float:
    """Of SGD and RMSprop; other optimizers have averages in place of a sum."""
    momentum, kept = float(group.get("momentum", 0.0)), 1 - float(group.get("dampening", 0.0))
    return (1 - momentum) / kept if momentum and kept else 1.0


def _common_threshold(kind: str, rule: _Rule, groups: Sequence[Mapping[str, Any]], step: float) -> float:
    try:
        thresholds = sorted({rule.threshold(group, step) for group in groups})
    except ValueError as error:
        raise Unsupported(f"{kind}: {error}") from error
    if len(thresholds) > 1:
        told = ", ".join(f"{threshold:g}" for threshold in thresholds)
        raise Unsupported(
            f"Groups of {kind} differ in momentum or betas, so lr · sharpness has no single threshold ({told}); "
            "measure one group at a time."
        )
    return thresholds[0]


def _steps(states: Sequence[Mapping[str, Any]]) -> list[float]:
    steps = [torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).reshape(()) for state in states]
    # Fused and capturable optimizers count on the device: one transfer for all.
    away = [local_part(step) for step in steps if step.device.type != "cpu"]
    brought = iter(torch.stack(away).tolist() if away else [])
    return [float(step) if step.device.type == "cpu" else next(brought) for step in steps]


def _ema(group: Mapping[str, Any], step: float) -> float:
    return ema_threshold(float(group["betas"][0]))


def _nadam(group: Mapping[str, Any], step: float) -> float:
    beta1 = float(group["betas"][0])
    momentum = beta1 * (1 - 0.5 * math.pow(0.96, (step + 1) * group["momentum_decay"]))
    return ema_threshold(beta1) * (1 - beta1) / (1 + beta1 - 2 * beta1 * momentum)


def _sgd(group: Mapping[str, Any], step: float) -> float:
    form = {name: group[name] for name in ("momentum", "dampening", "nesterov") if name in group}
    return sgd_threshold(**{"momentum": 0.0, **form})


def _root_of_mean(group: Mapping[str, Any], state: Mapping[str, Any], step: float, dtype: torch.dtype) -> Tensor:
    square = local_part(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]).to(dtype)
    return (square / (1 - math.pow(group["betas"][1], step))).sqrt_().add_(group["eps"])


def _root_of_spread(group: Mapping[str, Any], state: Mapping[str, Any], step: float, dtype: torch.dtype) -> Tensor:
    square = local_part(state["square_avg"]).to(dtype)
    if group["centered"]:
        square = (square - local_part(state["grad_avg"]).to(dtype).square()).clamp_(min=0)
    return square.sqrt().add_(group["eps"])


def _root_of_sum(group: Mapping[str, Any], state: Mapping[str, Any], step: float, dtype: torch.dtype) -> Tensor:
    slowed: float = 1 + step * group["lr_decay"]
    return local_part(state["sum"]).to(dtype).sqrt().add_(group["eps"]).mul_(slowed)


def _maximum(group: Mapping[str, Any], state: Mapping[str, Any], step: float, dtype: torch.dtype) -> Tensor:
    return local_part(state["exp_inf"]).to(dtype)


class _Rule(NamedTuple):
    optimizers: tuple[type[Optimizer], ...]
    threshold: Callable[[Mapping[str, Any], float], float]  # of a group and the steps taken
    denominator: Callable[[Mapping[str, Any], Mapping[str, Any], float, torch.dtype], Tensor] | None


_RULES = (
    _Rule((SGD,), _sgd, None),
    _Rule((Adam, AdamW), _ema, _root_of_mean),
    _Rule((NAdam,), _nadam, _root_of_mean),
    _Rule((RMSprop,), _sgd, _root_of_spread),
    _Rule((Adagrad,), _sgd, _root_of_sum),
    _Rule((Adamax,), _ema, _maximum),
)
