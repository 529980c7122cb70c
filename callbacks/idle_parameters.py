"""Trainable parameters that no optimizer has ever moved."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import Tensor
from torch.nn import Module, Parameter

from dynwatch.layers import group_by_layer


class IdleParameters:
    """Counts down the trainable parameters until each was once given to an optimizer with a gradient.

    Costs nothing from then on, which is usually the first step.
    """

    def __init__(self, module: Module) -> None:
        self.told = False
        self._module = module

    @functools.cached_property
    def _left(self) -> dict[int, tuple[str, int]]:
        # Not before the first step: after a validation pass FSDP2 shows other tensors than the optimizer holds.
        found = {id(p): (name, p.numel()) for name, p in self._module.named_parameters() if p.requires_grad}
        self._entries = sum(size for _, size in found.values())
        return found

    def moved(self, parameters: Iterable[Parameter | Tensor]) -> None:
        """Note what an optimizer is about to move."""
        if self._left:
            for parameter in parameters:
                self._left.pop(id(parameter), None)

    @property
    def share(self) -> float:
        """Share of all trainable entries that were never moved."""
        left = sum(size for _, size in self._left.values())
        return left / self._entries if left else 0.0

    @property
    def where(self) -> str:
        """The first of their layers, in words."""
        layers = group_by_layer([name for name, _ in self._left.values()], max_groups=1000).names
        return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more layers" if len(layers) > 3 else "")
