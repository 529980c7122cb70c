"""What happens around the optimizer's actual update: one-shot actions after it, and its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynwatch.callbacks.optimizer_step import StepGradients
from dynwatch.constants import on_device
from dynwatch.gradients import group_norms, tensor_norms, update_and_weight_norms


class AfterStep:
    """Runs actions once, right after the next real update of an optimizer.

    An update that a gradient scaler skips runs nothing. `release` removes the hooks and drops what is still waiting; an
    action may call it, too.
    """

    _running: ClassVar[int] = 0
    _spent: ClassVar[list[RemovableHandle]] = []

    def __init__(self) -> None:
        self._waiting: dict[int, list[Callable[[], object]]] = {}
        self._handles: dict[int, RemovableHandle] = {}

    def add(self, optimizer: Optimizer, action: Callable[[], object]) -> None:
        owner = id(optimizer)
        if owner not in self._handles:
            self._handles[owner] = optimizer.register_step_post_hook(self._run)
        self._waiting.setdefault(owner, []).append(action)

    def _run(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        AfterStep._running += 1
        try:
            for action in self._waiting.pop(id(optimizer), ()):
                action()
        finally:
            AfterStep._running -= 1

    def release(self) -> None:
        self._spent.extend(self._handles.values())
        self._handles.clear()
        self._waiting.clear()
        self.sweep()

    @classmethod
    def sweep(cls) -> None:
        """Remove the hooks that were released, unless torch is going through the hooks now."""
        if not cls._running:
            while cls._spent:
                cls._spent.pop().remove()


class UpdateRatio:
    """|update| / |weights before| by layer, from a copy of the weights that lives as long as the step."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[StepGradients, list[Tensor] | Exception]] = {}
        self._norms: list[tuple[list[str], Tensor, Tensor]] = []  # names, update norms, weight norms

    def before_step(self, optimizer: Optimizer, seen: StepGradients) -> bool:
        """Copy the weights; False if they are copied already: LBFGS comes here several times a step."""
        if id(optimizer) in self._before:
            return False
        try:
            self._before[id(optimizer)] = (seen, [p.detach().clone() for p in seen.parameters])
        except Exception as error:  # most likely too little memory, on this rank alone
            self._before[id(optimizer)] = (seen, error)
        return True

    def after_step(self, optimizer: Optimizer) -> None:
        """Measure the update and drop the copy."""
        seen, before = self._before.pop(id(optimizer))
        after = [p.detach() for p in seen.parameters]
        if isinstance(before, Exception):
            # For sharded weights the other ranks sum over the shards twice now, and wait for this one.
            tensor_norms(after)
            tensor_norms(after)
            raise before
        self._norms.append((seen.names, *update_and_weight_norms(before, after)))

    def take(self, layer_index: Callable[[Sequence[str]], Sequence[int]], n_layers: int) -> dict[int, Tensor]:
        """The ratio of each layer that was updated since the last call: a scalar tensor by layer."""
        self._before.clear()  # left only where the update was skipped
        norms, self._norms = self._norms, []
        if not norms or not n_layers:
            return {}
        index = layer_index([name for names, _, _ in norms for name in names])
        update, weight = (torch.cat(column) for column in list(zip(*norms, strict=True))[1:])
        where = on_device(tuple(index), update.device)
        size = group_norms(weight, where, n_layers)
        ratio = group_norms(update, where, n_layers) / size.masked_fill(size == 0, torch.nan)
        return {layer: ratio[layer] for layer in sorted(set(index) - {-1})}

    def release(self) -> None:
        self._before.clear()
        self._norms.clear()
