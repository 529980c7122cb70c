"""What the optimizers really did to the weights on one batch: the weights before, and the change."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynwatch.callbacks.after_step import AfterStep
from dynwatch.gradients import combine_norms, tensor_norms
from dynwatch.ranks import local_part


@dataclass(frozen=True)
class Step:
    """One step of the weights, all optimizers together.

    Attributes:
        start: Weights before it, by name; of this rank's shards under FSDP2.
        direction: The step times `scale`, by name, of the weights that moved; about as long as the weights, so that
            derivatives along it neither vanish nor overflow in half precision.
        scale: A power of two, a scalar tensor.
        length: 2-norm of the step over all parameters, of all shards; a scalar tensor.
    """

    start: dict[str, Tensor]
    direction: dict[str, Tensor]
    scale: Tensor
    length: Tensor


class WeightUpdate:
    """Keeps the weights from before the optimizers' steps of one batch until they have been looked at.

    Momentum, decay, clipping and closures are all in the update. With several optimizers the copy of a parameter is
    from before the first that steps it.
    """

    def __init__(self) -> None:
        self.before: dict[nn.Parameter, Tensor] = {}
        self.stepped = False  # not where a gradient scaler skipped the update
        self._after = AfterStep()
        self._waiting: set[int] = set()

    def before_step(self, optimizer: Optimizer) -> bool:
        """Copy the weights that an optimizer is about to step; False if it is known to: LBFGS comes here often."""
        if id(optimizer) in self._waiting:
            return False
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in self.before:
                    self.before[p] = p.detach().clone()
        self._waiting.add(id(optimizer))
        self._after.add(optimizer, functools.partial(self._has_stepped, optimizer))
        return True

    def _has_stepped(self, optimizer: Optimizer) -> None:
        self._waiting.discard(id(optimizer))
        self.stepped = True

    def step(self, parameters: Mapping[str, nn.Parameter]) -> Step:
        """The step from the copies to the weights as they are now; ranks with shards must call it together.

        Args:
            parameters: All that are trained, by name.
        """
        with torch.no_grad():
            moved = {name: p for name, p in parameters.items() if p in self.before}
            update = {name: p.detach() - self.before[p] for name, p in moved.items()}
            length = combine_norms(tensor_norms(list(update.values())))
            weights = combine_norms(tensor_norms([self.before[p] for p in moved.values()]))
            ratio = weights / length
            usable = ratio.isfinite() & (ratio > 0)
            scale = torch.where(usable, ratio, 1.0).log2().round().clamp(-60, 60).exp2()
            start = {name: local_part(self.before.get(p, p.detach())) for name, p in parameters.items()}
            direction = {name: _times(local_part(by), scale) for name, by in update.items()}
        return Step(start, direction, scale, length)

    def scale_back(self, share: float) -> None:
        """Put the weights at a share of the way from before to now."""
        with torch.no_grad():
            for p, before in self.before.items():
                now, then = local_part(p.detach()), local_part(before)
                now.copy_(then + share * (now - then) if share else then)

    def release(self) -> None:
        """Drop the copies and the hooks."""
        self.before.clear()
        self.stepped = False
        self._waiting.clear()
        self._after.release()


def _times(tensor: Tensor, scale: Tensor) -> Tensor:
    return (tensor.to(scale.dtype) * scale).to(tensor.dtype)
