"""The loss of each sample of a batch, from the cross entropies that a step computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dynwatch.callbacks.logits import CROSS_ENTROPIES, Scores, scores_of
from dynwatch.callbacks.snapshot import CannotReplayError


class SampleLosses(TorchFunctionMode):
    """Notes, while it is active, the mean loss of each sample in the step's largest cross entropy.

    Targets that the loss ignores do not count; a sample of which none counts has NaN. A cross entropy whose rows cannot
    be told apart by sample (their number is no multiple of the batch's) is passed over; rows that are flattened are
    taken to be one sample after the other.

    Attributes:
        losses: [B] of the largest so far; None if there was none.

    Args:
        samples: B.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.losses: Tensor | None = None
        self._samples = samples
        self._rows = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CROSS_ENTROPIES:
            try:
                scores = scores_of(func, args, kwargs or {})
            except CannotReplayError:  # an nll_loss of something else
                return result
            rows = scores.samples.numel()
            if scores.targets is not None and rows > self._rows and rows % self._samples == 0:
                self.losses, self._rows = self._by_sample(scores), rows
        return result

    def _by_sample(self, scores: Scores) -> Tensor:
        losses, counted = _each(scores), scores.counted()
        counted = torch.ones_like(losses, dtype=torch.bool) if counted is None else counted
        losses, counted = (t.reshape(self._samples, -1) for t in (losses, counted))
        return torch.where(counted, losses, 0).sum(1, dtype=torch.float32) / counted.sum(1)


def _each(scores: Scores) -> Tensor:
    """The loss of each row, without a graph."""
    logits, targets = scores.logits.detach().float(), scores.targets
    assert targets is not None
    if scores.kind == "sigmoid":
        return functional.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    log_probabilities = logits.log_softmax(-1)
    if targets.is_floating_point():
        return -(targets * log_probabilities).sum(-1)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    picked = log_probabilities.gather(-1, torch.where(inside, targets, 0)[..., None]).squeeze(-1)
    return -picked
