r"""Where the tokens of a mixture of experts go: one record for any router, and measures of its health.

Notation: T tokens count, each chooses k of E experts; c_e is the load of expert e (how often it was chosen) and p the
router's probabilities. Everything runs on the device of its input without waiting for it, and adds up: loads are
counts, means are kept as `Ratio`, so batches and processes can be summed before a figure is made of them. Sums are in
the widest float of the device, token by token work in float32 or wider.

Tokens that `valid` masks out count nowhere, whatever they hold. NaN in the probabilities or logits of a token that
counts makes the mean NaN; loads depend on indices alone. Where no token counts, every share and mean is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dynwatch.constants import widest_float
from dynwatch.expert_load import (
    DeadExperts,
    aux_loss,
    coactivation,
    effective_experts,
    load_cv,
    load_entropy,
    max_vio,
    normalized_entropy,
)
from dynwatch.rules.base import check_count, check_number

__all__ = [
    "DeadExperts",
    "Ratio",
    "Routing",
    "Score",
    "aux_loss",
    "coactivation",
    "coactivation_counts",
    "dropped_share",
    "effective_experts",
    "load_counts",
    "load_cv",
    "load_entropy",
    "max_vio",
    "mean_probabilities",
    "normalized_entropy",
    "router_entropy",
    "router_probabilities",
    "stability",
    "z_loss",
]

Score = Literal["softmax", "sigmoid", "given"]


@dataclass(frozen=True, eq=False)
class Routing:
    """What one router decided for the tokens of a batch.

    Attributes:
        indices: [N, k] integers, the experts of each token, all different. A number outside 0 … E - 1, such as -1, is
            an empty slot: dropped for capacity, or of a token that fewer than k experts chose.
        n_experts: E.
        probabilities: [N, E] over all experts, rows that sum to one (`router_probabilities`); None if not known.
        weights: [N, k] with which the experts' outputs are summed; None if not known.
        valid: [N] bool, False for padding; None if every token counts.
        samples: [N] integers, the sample (sequence) of each token; None if not known.

    Raises:
        TypeError: If a tensor is not of the kind above.
        ValueError: If shapes do not fit each other, or k is not within 1 … E.

    Example:
        >>> routing = Routing(torch.tensor([[0, 1], [1, 2]]), n_experts=4, valid=torch.tensor([True, False]))
        >>> load_counts(routing)
        tensor([1, 1, 0, 0])
    """

    indices: Tensor
    n_experts: int
    probabilities: Tensor | None = None
    weights: Tensor | None = None
    valid: Tensor | None = None
    samples: Tensor | None = None

    def __post_init__(self) -> None:
        check_count("n_experts", self.n_experts)
        if self.indices.dim() != 2 or not 1 <= self.indices.shape[1] <= self.n_experts:
            raise ValueError(
                f"indices of shape {list(self.indices.shape)} must be [N, k] with k from 1 to n_experts="
                f"{self.n_experts}; flatten batch and sequence into N."
            )
        n, k = self.indices.shape
        _check_tensor("indices", self.indices, (n, k), "integers")
        _check_tensor("probabilities", self.probabilities, (n, self.n_experts), "floats")
        _check_tensor("weights", self.weights, (n, k), "floats")
        _check_tensor("valid", self.valid, (n,), "bools")
        _check_tensor("samples", self.samples, (n,), "integers")


@dataclass(frozen=True, eq=False)
class Ratio:
    """A mean as total and count, so that those of batches and processes can be added before they are divided.

    Attributes:
        total: Sum of what is averaged, of any shape.
        count: How many there were, of a shape that divides `total`.

    Example:
        >>> one, other = Ratio(torch.tensor(4.0), torch.tensor(1)), Ratio(torch.tensor(2.0), torch.tensor(2))
        >>> (one + other).value
        tensor(2.)
    """

    total: Tensor
    count: Tensor

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Tensor:
        """The mean; NaN of nothing."""
        return self.total / self.count


def router_probabilities(values: Tensor, score: Score = "softmax") -> Tensor:
    """Probabilities over the experts from what a router emits.

    Sigmoid scores are divided by their sum, as a softmax of log σ, which no logit makes 0/0. Given scores that are all
    zero (a token that was dropped) have no preference: they become 1/E each, so that means still sum to one.

    Args:
        values: [..., E] logits, or for "given" scores that are not negative.
        score: How experts are scored: "softmax" or "sigmoid" of logits, or "given".

    Returns:
        [..., E] in float32 or wider, detached; rows sum to one. NaN in a row makes the row NaN.

    Raises:
        ValueError: If `score` is none of the three.

    Example:
        >>> router_probabilities(torch.tensor([0.3, 0.1, 0.0]), "given")
        tensor([0.7500, 0.2500, 0.0000])
    """
    if score not in get_args(Score):
        raise ValueError(f"score={score!r} must be 'softmax' or 'sigmoid' (of logits) or 'given' (scores).")
    values = _wide(values)
    if score == "softmax":
        return values.softmax(-1)
    if score == "sigmoid":
        return torch.nn.functional.logsigmoid(values).softmax(-1)
    # The largest score is divided out first: a sum of huge scores may not fit, a quotient of tiny ones may.
    top = values.amax(-1, keepdim=True)
    values = torch.where(top == 0, torch.ones_like(values), values / top)
    return values / values.sum(-1, keepdim=True)


def load_counts(routing: Routing) -> Tensor:
    """How often each expert was chosen, c_e.

    Args:
        routing: Of one router.

    Returns:
        [E] int64; it sums to k times the tokens that count, less empty slots.

    Example:
        >>> load_counts(Routing(torch.tensor([[0, 1], [1, -1]]), n_experts=3))
        tensor([1, 2, 0])
    """
    return _count(_slots(routing).flatten(), routing.n_experts + 1)[:-1]


def mean_probabilities(routing: Routing) -> Ratio:
    """The router's mean probability of each expert over the tokens that count, P_e.

    Args:
        routing: With probabilities.

    Returns:
        total [E], count of tokens.

    Raises:
        ValueError: If the probabilities are not known.

    Example:
        >>> mean_probabilities(Routing(torch.tensor([[0], [1]]), 2, torch.tensor([[0.8, 0.2], [0.4, 0.6]]))).value
        tensor([0.6000, 0.4000], dtype=torch.float64)
    """
    return _mean_over_tokens(_known_probabilities(routing), routing.valid)


def router_entropy(routing: Routing) -> Ratio:
    r"""Mean over tokens of the entropy of the router's probabilities, :math:`-\sum_e p_e \log p_e`.

    Args:
        routing: With probabilities.

    Returns:
        total in nats, count of tokens. The mean is from 0 to log E (`normalized_entropy`).

    Raises:
        ValueError: If the probabilities are not known.

    Example:
        >>> router_entropy(Routing(torch.tensor([[0]]), 2, torch.tensor([[0.5, 0.5]]))).value
        tensor(0.6931, dtype=torch.float64)
    """
    entropies = torch.special.entr(_known_probabilities(routing)).sum(-1)
    return _mean_over_tokens(entropies, routing.valid)


def z_loss(logits: Tensor, valid: Tensor | None = None) -> Ratio:
    """The router's z-loss, the mean over tokens of (log Σ exp logits)² (arXiv 2202.08906).

    Args:
        logits: [N, E].
        valid: [N] bool, False for padding; None if every token counts.

    Returns:
        total, count of tokens.

    Raises:
        TypeError: If the logits are not floats or the mask is not bool.
        ValueError: If the shapes do not fit.

    Example:
        >>> z_loss(torch.tensor([[1.0, 1.0]])).value
        tensor(2.8667, dtype=torch.float64)
    """
    if logits.dim() != 2:
        raise ValueError(f"logits of shape {list(logits.shape)} must be [N, E]; flatten batch and sequence into N.")
    _check_tensor("logits", logits, tuple(logits.shape), "floats")
    _check_tensor("valid", valid, (logits.shape[0],), "bools")
    # Squared in the widest float: a logit of 1e20 is no reason for infinity.
    return _mean_over_tokens(_wide(logits).logsumexp(-1).to(widest_float(logits.device)).square(), valid)


def dropped_share(load: Tensor, capacity: float) -> Ratio:
    """The share of assignments above what an expert takes, Σ max(c_e - capacity, 0) / Σ c_e.

    Args:
        load: [..., E] counts before anything is dropped, each row of one forward pass, which is what a capacity bounds:
            add the ratios of several passes, not their loads.
        capacity: The most tokens that an expert takes.

    Returns:
        total dropped and count of assignments, summed over all rows.

    Raises:
        ValueError: If the capacity is negative or no number.

    Example:
        >>> dropped_share(torch.tensor([4, 3, 1, 0]), capacity=2).value
        tensor(0.3750, dtype=torch.float64)
    """
    check_number("capacity", capacity, least=0)
    wide = load.detach().to(widest_float(load.device))
    return Ratio((wide - capacity).clamp(min=0).sum(), wide.sum())


def coactivation_counts(routing: Routing) -> Tensor:
    """How many tokens chose experts i and j together, N_ij; the diagonal is the load.

    Args:
        routing: Of one router.

    Returns:
        [E, E] int64, symmetric.

    Example:
        >>> coactivation_counts(Routing(torch.tensor([[0, 1], [1, 0], [0, 2]]), n_experts=3))
        tensor([[3, 2, 1],
                [2, 2, 0],
                [1, 0, 1]])
    """
    # Counted pair by pair and not as a product of matrices, which under autocast would round.
    slots, side = _slots(routing), routing.n_experts + 1
    pairs = slots[:, :, None] * side + slots[:, None, :]
    return _count(pairs.flatten(), side * side).view(side, side)[:-1, :-1]


def stability(now: Routing, before: Routing) -> Ratio:
    r"""How much of the choice stayed between two looks at the same tokens, mean of :math:`|S_t \cap S'_t| / k`.

    "Router saturation" (arXiv 2409.02060) is this with the last checkpoint as one of the looks. With empty slots the
    k of a token is the larger of its two sets.

    Args:
        now: Routing of a fixed set of tokens.
        before: Routing of the same tokens, earlier. A token counts if it is valid in both.

    Returns:
        total of shared slots, count of slots.

    Raises:
        ValueError: If the two are not of the same shape and number of experts.

    Example:
        >>> before, now = (Routing(torch.tensor(chosen), 4) for chosen in ([[0, 1], [2, 3]], [[1, 0], [2, 1]]))
        >>> stability(now, before).value
        tensor(0.7500)
    """
    shapes = [(*routing.indices.shape, routing.n_experts) for routing in (now, before)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"now and before have (tokens, k, experts) {shapes[0]} and {shapes[1]}, which must be equal: "
            "stability compares one router on one fixed probe."
        )
    empty = now.n_experts
    ours, theirs = _slots(now), _slots(before)
    shared = (ours[:, :, None] == theirs[:, None, :]) & (ours[:, :, None] < empty)
    slots = torch.maximum((ours < empty).sum(1), (theirs < empty).sum(1))
    for valid in (now.valid, before.valid):
        if valid is not None:
            slots = torch.where(valid, slots, 0)
    return Ratio(shared.sum(), slots.sum())


def _check_tensor(argument: str, tensor: Tensor | None, shape: tuple[int, ...], kind: str) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{argument} of shape {list(tensor.shape)} must be {list(shape)}, one row a token.")
    is_bool, is_float = tensor.dtype == torch.bool, tensor.is_floating_point()
    fits = {"bools": is_bool, "floats": is_float, "integers": not (is_bool or is_float or tensor.is_complex())}
    if not fits[kind]:
        raise TypeError(f"{argument} of {tensor.dtype} must be {kind}; convert them first.")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _known_probabilities(routing: Routing) -> Tensor:
    if routing.probabilities is None:
        raise ValueError("routing.probabilities is None and must be [N, E]; router_probabilities makes them of logits.")
    return _wide(routing.probabilities)


def _slots(routing: Routing) -> Tensor:
    """[N, k] experts, with E where a slot is empty or its token does not count."""
    indices = routing.indices.long()
    filled = (indices >= 0) & (indices < routing.n_experts)
    if routing.valid is not None:
        filled = filled & routing.valid[:, None]
    return torch.where(filled, indices, routing.n_experts)


def _count(numbers: Tensor, n: int) -> Tensor:
    """As torch.bincount, which would wait for the device."""
    return torch.zeros(n, dtype=torch.int64, device=numbers.device).scatter_add_(0, numbers, torch.ones_like(numbers))


def _mean_over_tokens(values: Tensor, valid: Tensor | None) -> Ratio:
    """The mean over dimension 0, of the valid ones."""
    if valid is None:
        count = torch.full((), values.shape[0], device=values.device)
    else:
        # Selected and not multiplied: padding may hold NaN.
        values = torch.where(valid.view(-1, *[1] * (values.dim() - 1)), values, 0)
        count = valid.sum()
    return Ratio(values.sum(0, dtype=widest_float(values.device)), count)
