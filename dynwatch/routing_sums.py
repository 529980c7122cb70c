"""All that routing health needs of a forward pass, for several routers at once: a dozen operations, not a dozen each.

The same figures one router at a time, with what they mean, are in `dynwatch.routing`; small models feel the
difference, because there most of the time is that of starting operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynwatch.constants import widest_float
from dynwatch.routing import Score, router_probabilities

# What `routing_sums` gives after the load [E] and the summed probabilities [E] of the experts.
SCALARS = ("tokens", "scored", "entropy", "with_logits", "z", "slots")


def routing_sums(
    indices: Tensor,
    n_experts: int,
    scores: Tensor | None = None,
    score: Score = "softmax",
    valid: Tensor | None = None,
) -> Tensor:
    """Sums over the tokens of G routers that have the same numbers of tokens, slots and experts.

    Args:
        indices: [G, N, k] integers; outside 0 … E - 1 for an empty slot.
        n_experts: E.
        scores: [G, N, E] logits, or for "given" scores that are not negative; None if they are not known.
        score: How experts are scored.
        valid: [N] or [G, N] bool, False for padding; None if every token counts.

    Returns:
        [G, 2 E + 6] in the widest float of the device: loads; summed probabilities; tokens that count; those of them
        with probabilities and their summed entropy in nats; those with logits and their summed z-loss; slots.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> sums = routing_sums(torch.tensor([[[0], [1]]]), 2, torch.zeros(1, 2, 2))
        >>> sums[0, :4].tolist(), round(dict(zip(SCALARS, sums[0, 4:].tolist()))["entropy"], 4)
        ([1.0, 1.0, 1.0, 1.0], 1.3863)
    """
    if indices.dim() != 3 or (scores is not None and scores.shape != (*indices.shape[:2], n_experts)):
        shape = None if scores is None else list(scores.shape)
        raise ValueError(
            f"indices of shape {list(indices.shape)} must be [G, N, k] and scores of shape {shape} [G, N, {n_experts}]."
        )
    groups, n_tokens, k = indices.shape
    device, wide = indices.device, widest_float(indices.device)
    if valid is None:
        tokens = torch.full((groups, 1), n_tokens, dtype=wide, device=device)
    else:
        valid = valid.expand(groups, n_tokens)
        tokens = valid.sum(1, keepdim=True).to(wide)
    zeros = torch.zeros_like(tokens)
    parts = [_loads(indices, n_experts, valid).to(wide)]
    if scores is None:
        parts += [zeros.expand(groups, n_experts), tokens, zeros, zeros]
    else:
        probabilities, log_sum = _probabilities(scores, score)
        # As `torch.special.entr`, several times as fast.
        entropies = -(probabilities * probabilities.clamp_min(1e-38).log()).sum(-1)
        if valid is not None:  # selected and not multiplied: padding may hold NaN
            probabilities = torch.where(valid[..., None], probabilities, 0)
            entropies = torch.where(valid, entropies, 0)
        parts += [probabilities.sum(1, dtype=wide), tokens, tokens, entropies.sum(1, keepdim=True, dtype=wide)]
    if scores is None or log_sum is None:
        parts += [zeros, zeros]
    else:
        # Squared in the widest float: a logit of 1e20 is no reason for infinity.
        squares = log_sum.to(wide).square()
        squares = squares if valid is None else torch.where(valid, squares, 0)
        parts += [tokens, squares.sum(1, keepdim=True)]
    return torch.cat([*parts, tokens * k], dim=1)


def _probabilities(scores: Tensor, score: Score) -> tuple[Tensor, Tensor | None]:
    """As `router_probabilities`, and the logarithm of the sum of exponentials of logits."""
    if score == "given":
        return router_probabilities(scores, score), None
    logits = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    log_sum = logits.logsumexp(-1)
    if score == "sigmoid":
        return router_probabilities(scores, score), log_sum
    return (logits - log_sum[..., None]).exp(), log_sum  # on CPUs a softmax of so few is several times as slow


def _loads(indices: Tensor, n_experts: int, valid: Tensor | None) -> Tensor:
    """[G, E] int64: how often each expert was chosen."""
    groups = indices.shape[0]
    filled = (indices >= 0) & (indices < n_experts)
    if valid is not None:
        filled = filled & valid[..., None]
    # One more expert for what does not count.
    slots = torch.where(filled, indices.long(), n_experts).flatten(1)
    loads = torch.zeros(groups, n_experts + 1, dtype=torch.int64, device=indices.device)
    return loads.scatter_add_(1, slots, torch.ones_like(slots))[:, :-1]
