"""Whether a router scores experts by a softmax of its logits or by sigmoids, told from what it made of them."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from dynwatch.routing import Score

# How far weights may be from what a way of scoring gives, as a share, to be taken for it.
_CLOSE = 0.02


def score_of(
    logits: Tensor,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
    chosen_by: Tensor | None = None,
    operations: Collection[str] = (),
) -> Score:
    """How logits become probabilities: by the weights, else by what the largest were taken of, else by what was run.

    Args:
        logits: [N, E].
        indices: [N, k] chosen experts, if known.
        weights: [N, k] with which their outputs are summed, but for a factor, if known.
        chosen_by: Of N · E entries, what the chosen ones are the largest of, perhaps with a number added to each
            expert's; if known.
        operations: Names of what was run, among them "op.softmax" or "op.sigmoid".

    Returns:
        "softmax" or "sigmoid"; "softmax" where nothing tells.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]])
        >>> score_of(logits, torch.tensor([[0, 1], [2, 1]]), logits.sigmoid().topk(2).values)
        'sigmoid'
    """
    logits = logits.detach().double()
    ways: dict[Score, Tensor] = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}
    if indices is not None and weights is not None:
        kept = ((indices >= 0) & (indices < logits.shape[1])).all(-1)
        theirs = weights.detach().double()[kept]
        apart = {}
        for way, values in ways.items():
            mine = values[kept].gather(1, indices[kept])
            apart[way] = _apart(mine, theirs)
            if mine.shape[1] > 1:
                apart[way] = min(apart[way], _apart(mine / mine.sum(-1, keepdim=True), theirs))
        best = min(apart, key=lambda way: apart[way])
        if apart[best] < _CLOSE < max(apart.values()):  # of nearly equal scores either way gives nearly equal weights
            return best
    if chosen_by is not None and chosen_by.numel() == logits.numel():
        wide = chosen_by.detach().double().reshape(logits.shape)
        for way, values in ways.items():
            left = wide - values  # a bias of each expert's is the same for all tokens
            spread = float((left - left.mean(0, keepdim=True)).abs().mean().item())
            if spread < _CLOSE * float((values - values.mean(0, keepdim=True)).abs().mean().item()):
                return way
    return "sigmoid" if "op.sigmoid" in operations and "op.softmax" not in operations else "softmax"


def _apart(mine: Tensor, theirs: Tensor) -> float:
    """How far two sets of weights are apart but for a factor, as a share."""
    scale = (mine * theirs).sum() / mine.square().sum().clamp_min(1e-300)
    return float(((mine * scale - theirs).norm() / theirs.norm().clamp_min(1e-300)).item())
