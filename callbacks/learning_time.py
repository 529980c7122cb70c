"""How much time has gone by for an optimizer: steps, and the sum of their learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_Rate = float | Tensor


class LearningTime:
    """Counts steps and adds up learning rates: the largest of a step's parameter groups and optimizers.

    A learning rate that is a tensor stays where it is, so that nothing waits for its device.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._sum: _Rate = 0.0
        self._rates: dict[int, _Rate] = {}  # of each optimizer, in the present batch

    def note(self, optimizer: Optimizer) -> None:
        """Before an optimizer steps; one that steps twice in a batch counts twice."""
        rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
        if rates:
            self._rates[id(optimizer)] = self._rates.get(id(optimizer), 0.0) + _largest(rates)

    def step(self) -> None:
        """At the end of a batch after which the optimizers have stepped."""
        self._steps += 1
        if self._rates:
            self._sum = self._sum + _largest(list(self._rates.values()))
            self._rates.clear()

    def so_far(self, unit: str, like: Tensor) -> Tensor:
        """The time in a unit ("lr" or "steps") and the number of steps, [2], of the kind of another tensor."""
        time = self._sum if unit == "lr" else float(self._steps)
        parts = [torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in (time, float(self._steps))]
        return torch.stack([part.detach().reshape(()) for part in parts])

    def state(self) -> dict[str, Any]:
        """As primitives. Waits for the device if a rate is on one."""
        return {"steps": self._steps, "sum": float(self._sum)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._steps, self._sum = state["steps"], state["sum"]


def _largest(rates: Sequence[_Rate]) -> _Rate:
    plain = [rate for rate in rates if not isinstance(rate, Tensor)]
    if len(plain) == len(rates):
        return float(max(plain))
    # A copy: the optimizer's own changes in place.
    return torch.stack([torch.as_tensor(rate, dtype=torch.float32).detach().reshape(()) for rate in rates]).max()
