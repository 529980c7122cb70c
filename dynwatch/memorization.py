"""Which samples a run has memorised, as far as that can be told while it trains.

"Grokking in LLM pretraining" (arXiv 2506.21551) calls a sample memorised once its loss has come to what it is at the
last checkpoint. A live run has no last checkpoint: here the reference is a running one, the sample's own last losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynwatch.rules.base import check_count, check_number


class MemorizedSamples:
    """Follows the losses of fixed samples and tells which have settled below where they began.

    A sample counts as memorised while its last `window` losses lie within `tolerance` of each other and the last is
    below its first by more than that; both as a share of its first loss. A loss that is not finite says nothing: the
    sample is not memorised until it has `window` finite ones again.

    Args:
        window: Looks at which the loss must have settled, 2 or more.
        tolerance: Share of a sample's first loss, above 0 and below 1.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> memorized = MemorizedSamples(window=2, tolerance=0.1)
        >>> memorized.update(torch.tensor([2.0, 2.0])), memorized.update(torch.tensor([0.5, 1.0]))
        (tensor([False, False]), tensor([False, False]))
        >>> memorized.update(torch.tensor([0.4, 0.2]))
        tensor([ True, False])
    """

    def __init__(self, window: int = 3, tolerance: float = 0.05) -> None:
        self.window = check_count("window", window, least=2)
        self.tolerance = check_number("tolerance", tolerance, above=0.0, below=1.0)
        self._first: Tensor | None = None
        self._last: list[Tensor] = []

    def update(self, losses: Tensor) -> Tensor:
        """Take in the losses of one look.

        Args:
            losses: [S], of the same samples at each look; another number of samples starts afresh.

        Returns:
            [S] bool, True for a memorised sample.

        Raises:
            ValueError: If the losses are not a vector.
        """
        if losses.dim() != 1:
            raise ValueError(f"losses of shape {list(losses.shape)} must be [S], one number a sample.")
        losses = losses.detach().double().cpu()
        if self._first is None or self._first.shape != losses.shape:
            self._first, self._last = torch.full_like(losses, torch.nan), []
        self._first = torch.where(self._first.isfinite(), self._first, losses)
        self._last = [*self._last, losses][-self.window :]
        if len(self._last) < self.window:
            return torch.zeros(len(losses), dtype=torch.bool)
        recent = torch.stack(self._last)
        within = self.tolerance * self._first.abs()
        settled = recent.amax(0) - recent.amin(0) <= within
        fallen = self._first - losses > within
        return recent.isfinite().all(0) & settled & fallen

    def state_dict(self) -> dict[str, Any]:
        return {
            "first": None if self._first is None else self._first.clone(),
            "last": [losses.clone() for losses in self._last],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        first = state["first"]
        self._first = None if first is None else first.detach().clone()
        self._last = [losses.detach().clone() for losses in state["last"]]
