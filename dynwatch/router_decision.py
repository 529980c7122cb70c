"""What a router decided for the tokens of one forward pass, as it was seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dynwatch.routing import Routing, Score, router_probabilities


@dataclass(frozen=True, eq=False)
class Decision:
    """What one router decided in one forward pass.

    Attributes:
        indices: [N, k] experts of each token; outside 0 … E - 1 for an empty slot.
        n_experts: E.
        scores: [N, E] what the router gave each expert, its own tensor; None if that cannot be seen.
        score: How these become probabilities; "given" if they are no logits.
        weights: [N, k] with which outputs are summed; None if they cannot be seen.
        leading: The shape of the block's input without its last dimension: [batch, sequence], or [sequence, batch], or
            [tokens].
        capacity: Whether an empty slot is a token that was dropped.
        valid: [N] bool, where a user's own reading says which tokens count.
        samples: [N], where it says whose they are.

    Example:
        >>> import torch
        >>> decision = Decision(torch.tensor([[0]]), 2, torch.tensor([[2.0, 0.0]]), "softmax", None, (1,), False)
        >>> decision.routing.probabilities
        tensor([[0.8808, 0.1192]])
    """

    indices: Tensor
    n_experts: int
    scores: Tensor | None
    score: Score
    weights: Tensor | None
    leading: tuple[int, ...]
    capacity: bool
    valid: Tensor | None = None
    samples: Tensor | None = None

    @property
    def logits(self) -> Tensor | None:
        """[N, E] of the router; None if they cannot be seen."""
        return None if self.score == "given" else self.scores

    @property
    def routing(self) -> Routing:
        """The decision as a record, with probabilities."""
        probabilities = None if self.scores is None else router_probabilities(self.scores, self.score)
        return Routing(self.indices, self.n_experts, probabilities, self.weights, self.valid, self.samples)
