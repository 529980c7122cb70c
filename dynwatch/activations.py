"""Which units of a ReLU layer fire, and which have not fired for long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def units_that_fired(output: Tensor, most: int = 256) -> Tensor:
    """Whether each unit of a layer was above zero anywhere in a batch.

    A unit is a channel (dimension 1) of an output with four or more dimensions, as after a convolution, and
    an entry of the last dimension otherwise. Of a layer with more than `most` units, `most` are looked at, evenly
    spaced.

    Args:
        output: [batch, units], [batch, …, units] or [batch, units, height, width, …].
        most: The most units to look at.

    Returns:
        [n_units] bool, on the output's device.

    Example:
        >>> import torch
        >>> units_that_fired(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        tensor([False,  True])
    """
    if output.dim() == 0:
        output = output.reshape(1)
    by_unit = output.detach().movedim(1 if output.dim() >= 4 else -1, 0)
    stride = max(-(-by_unit.shape[0] // most), 1)
    by_unit = by_unit[::stride].flatten(1) if output.dim() > 1 else by_unit[::stride, None]
    return (by_unit > 0).any(1)


class SilentUnits:
    """For how many looks in a row each unit of a layer has not fired.

    Args:
        looks: Looks without firing after which a unit counts as dead.

    Example:
        >>> silent = SilentUnits(looks=2)
        >>> silent.update([True, False]), silent.update([True, False])
        (0.0, 0.5)
    """

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self._silent: list[int] = []

    def update(self, fired: Sequence[bool]) -> float:
        """Take in one look at all units; the share of them that counts as dead."""
        if len(fired) != len(self._silent):
            self._silent = [0] * len(fired)
        self._silent = [0 if now else before + 1 for now, before in zip(fired, self._silent, strict=True)]
        return sum(count >= self.looks for count in self._silent) / max(len(self._silent), 1)

    def state_dict(self) -> dict[str, Any]:
        return {"silent": list(self._silent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._silent = list(state["silent"])
