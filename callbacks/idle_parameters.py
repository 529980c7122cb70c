"""Trainable parameters that no optimizer has ever moved."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn import Module, Parameter

from dynwatch.layers import group_by_layer


class IdleParameters:
    """Counts down the trainable parameters until each was once given to an optimizer with a gradient.

    Costs nothing from then on, which is usually the first step.
    """

    def __init__(self, module: Module) -> None:
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._left = {id(p): (name, p.numel()) for name, p in trainable}
        self._entries = sum(size for _, size in self._left.values())
        self.told = not self._left

    def moved(self, parameters: Iterable[Parameter | Tensor]) -> None:
        """Note what an optimizer is about to move."""
        if self._left:
            for parameter in parameters:
                self._left.pop(id(parameter), None)

    @property
    def share(self) -> float:
        """Share of all trainable entries that were never moved."""
        return sum(size for _, size in self._left.values()) / self._entries if self._entries else 0.0

    @property
    def where(self) -> str:
        """The first of their layers, in words."""
        layers = group_by_layer([name for name, _ in self._left.values()], max_groups=1000).names
        return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more layers" if len(layers) > 3 else "")
