"""The logits of a training step, found by watching its cross entropies, without a change to the user's code."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dynwatch.callbacks.snapshot import CannotReplayError

# torch 2.13 and later: the last linear layer and its cross entropy in one.
_LINEAR_CROSS_ENTROPY = getattr(functional, "linear_cross_entropy", None)
_SOFTMAX = (functional.cross_entropy, functional.nll_loss)
CROSS_ENTROPIES = frozenset(
    {*_SOFTMAX, functional.binary_cross_entropy_with_logits, _LINEAR_CROSS_ENTROPY or functional.cross_entropy}
)

# How far the probabilities given to nll_loss may sum from 1, in the logarithm; half precision is off by hundredths.
_NORMALIZED = 0.1

# How far below the likeliest class a masked one is put: e^-100 is nothing, and 100 costs no digits.
_FAR = 100.0

WATCHED = "cross_entropy, nll_loss or binary_cross_entropy_with_logits"


@dataclass(frozen=True)
class Scores:
    """The logits that one cross entropy got, with what it got beside them.

    Attributes:
        kind: "softmax", or "sigmoid" where each logit stands alone.
        logits: [..., K] for a softmax, of any shape for a sigmoid.
        targets: Class indices [...], probabilities [..., K], or for a sigmoid the shape of the logits; None if unknown.
        options: Arguments of the loss that its value depends on.
        version: Of the logits when the loss saw them.
        call: Which of the step's cross entropies it was, from 0.
        value: What the cross entropy gave; None if only logits are known.
        reduction: "mean", "sum" or "none", by which it gave that.
        share: [as the value] the derivative of the step's own loss by it, so its weight in it; None if unknown.
    """

    kind: Literal["softmax", "sigmoid"]
    logits: Tensor
    targets: Tensor | None
    options: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0
    call: int = 0
    value: Tensor | None = None
    reduction: str = "mean"
    share: Tensor | None = None

    @property
    def samples(self) -> torch.Size:
        """The shape of the samples: without the dimension of classes."""
        return self.logits.shape[:-1] if self.kind == "softmax" else self.logits.shape

    def counted(self) -> Tensor | None:
        """Which samples the loss counts, [...] of bool; None for all."""
        masks = []
        weight: Tensor | None = self.options.get("weight")
        if self.kind == "sigmoid":
            if weight is not None:
                masks.append((weight != 0).expand(self.samples))
        elif self.targets is not None and self.targets.is_floating_point():
            masks.append((self.targets != 0).any(-1))
        elif self.targets is not None:
            masks.append(self.targets != self.options.get("ignore_index", -100))
            if weight is not None:
                masks.append((weight != 0)[self.targets.clamp(0, len(weight) - 1)])
        if self.reduction == "none" and self.share is not None and self.share.shape == self.samples:
            masks.append(self.share != 0)  # masked by the step itself
        return functools.reduce(torch.logical_and, masks) if masks else None


class LogitsWatch(TorchFunctionMode):
    """Notes the logits of every cross entropy of two classes or more that is computed where gradients are on.

    It sees `cross_entropy`, `nll_loss`, `binary_cross_entropy_with_logits` and `linear_cross_entropy` of
    `torch.nn.functional` and the modules that call them.

    Attributes:
        scores: One a call, in order.

    Args:
        cut: Give the step the values of the cross entropies as leaves of a graph of their own, where its parameters
            ask for none: so that it shows which weight each has in the step's loss.
    """

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.scores: list[Scores] = []
        self._cut = cut
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in CROSS_ENTROPIES or not torch.is_grad_enabled():
            return result
        scores = scores_of(func, args, kwargs)
        self._calls += 1
        if scores.kind == "softmax" and scores.logits.shape[-1] < 2:  # a constant
            return result
        value = result.detach().requires_grad_() if self._cut else result
        self.scores.append(replace(scores, call=self._calls - 1, value=value))
        return value.clone() if self._cut else result  # not the leaf itself, which must not be changed in place

    def check_unchanged(self) -> None:
        """Refuse logits that were written to after their loss was computed."""
        if any(s.logits._version != s.version for s in self.scores):
            raise CannotReplayError(
                "training_step changes its logits in place after it computed their cross entropy. Work on a copy of "
                "them (logits.clone()), or pass logits=, a function of module and batch that gives logits and targets."
            )


def with_shares(result: Any, scores: list[Scores]) -> list[Scores]:
    """Those cross entropies that a step's loss depends on, with their weights in it.

    Args:
        result: What the step returned.
        scores: Of its cross entropies, whose values have a graph to it.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not scores:
        return scores
    if not loss.requires_grad:
        return []
    valued = [(s, s.value) for s in scores if s.value is not None and s.value.requires_grad]
    if not valued:
        return []
    shares = torch.autograd.grad(loss.reshape(()), [value for _, value in valued], allow_unused=True, retain_graph=True)
    return [
        replace(s, share=share.detach(), value=value.detach())
        for (s, value), share in zip(valued, shares, strict=True)
        if share is not None
    ]


def scores_of(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Scores:
    """What one of `CROSS_ENTROPIES` was given."""
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    values = given.arguments
    logits, targets = values["input"], values["target"]
    if func is functional.binary_cross_entropy_with_logits:
        options = {name: values[name] for name in ("weight", "pos_weight") if values[name] is not None}
        return Scores("sigmoid", logits, targets, options, logits._version, reduction=_reduction(values))
    if func is _LINEAR_CROSS_ENTROPY:
        logits = _linear(logits, values["linear_weight"], values["linear_bias"])
    if logits.dim() > 2:
        logits = logits.movedim(1, -1)
        targets = targets.movedim(1, -1) if targets.is_floating_point() else targets
    if func is functional.nll_loss:
        _check_normalized(logits)
    options = {n: values[n] for n in ("weight", "ignore_index", "label_smoothing") if values.get(n) is not None}
    logits = _finite(logits)
    return Scores("softmax", logits, targets, options, logits._version, reduction=_reduction(values))


def _reduction(values: Mapping[str, Any]) -> str:
    if values.get("reduce") is False:
        return "none"
    return "sum" if values.get("size_average") is False else str(values["reduction"])


def _finite(logits: Tensor) -> Tensor:
    """Classes that are masked out by -inf move with the likeliest one, far below it: so they bound nothing."""
    masked = logits.detach() == -math.inf
    return torch.where(masked, logits.amax(-1, keepdim=True) - _FAR, logits) if bool(masked.any()) else logits


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [N, C, ...] or [C] of a weight [C, ..., features], of more than two dimensions for tokens or pixels."""
    if weight.dim() == 2:
        return functional.linear(hidden, weight, bias)
    logits = functional.linear(hidden, weight.flatten(0, -2)).reshape(*hidden.shape[:-1], *weight.shape[:-1])
    return logits if bias is None else logits + bias.reshape(*bias.shape, *[1] * (weight.dim() - 1 - bias.dim()))


def _check_normalized(log_probabilities: Tensor) -> None:
    """Refuse what nll_loss got if it is no logarithm of probabilities: its gradient is not a softmax's."""
    with torch.no_grad():
        if bool(log_probabilities.detach().float().logsumexp(-1).abs().gt(_NORMALIZED).any()):
            raise CannotReplayError(
                "nll_loss was given numbers that are no log-probabilities, so they are no logits of a softmax: use "
                "log_softmax before it, or pass logits=, a function of module and batch that gives logits and targets."
            )


def given_scores(result: Any) -> Scores:
    """What a function `logits=` of the user's returned: logits, or logits and targets.

    Args:
        result: Logits [..., K], of which K = 1 is a sigmoid's; or a pair of these and targets: class indices [...],
            probabilities [..., K], for a sigmoid [...] or [..., 1]. Targets of -100 do not count.

    Raises:
        CannotReplayError: If it is something else.
    """
    logits, targets = result if isinstance(result, (tuple, list)) and len(result) == 2 else (result, None)
    whole = isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() > 0
    if not whole or not (targets is None or isinstance(targets, Tensor)):
        kinds = ", ".join(type(each).__name__ for each in (logits, targets))
        raise CannotReplayError(
            f"the function logits= returned {kinds} and must return logits, a float tensor with the classes in its "
            "last dimension, or a pair of logits and targets."
        )
    one = logits.shape[-1] == 1
    if targets is not None:
        indices = targets.shape == logits.shape[:-1] and (one or not targets.is_floating_point())
        if not indices and (targets.shape != logits.shape or not (one or targets.is_floating_point())):
            raise CannotReplayError(
                f"the function logits= returned targets of shape {tuple(targets.shape)} and {targets.dtype} for logits "
                f"of shape {tuple(logits.shape)}: they must be class indices, or probabilities in the logits' shape."
            )
    if one:
        logits = logits.squeeze(-1)
        if targets is not None:
            targets = targets.reshape(logits.shape).to(logits.dtype)
        return Scores("sigmoid", logits, targets, {}, logits._version)
    logits = _finite(logits)
    return Scores("softmax", logits, targets, {}, logits._version)
