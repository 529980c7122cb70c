"""What the tensors around a router mean, told from their shapes and values, and a `Routing` made of them.

Routers of different libraries emit logits, probabilities, chosen experts with or without weights, masks, dispatch
tensors with a place for each token, in any order and under any name. So each tensor is looked at once, on a real batch
(`classify`, which waits for the device); afterwards it is known what is where and nothing waits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

# indices [N, k]; weights [N, k]; mask [N, E] of 0 and 1; sparse [N, E], zero where not chosen; probabilities [N, E];
# scores [N, E] ≥ 0, not normalised; logits [N, E]; dispatch [N, E, C]; tokens [E, C], which tokens each expert chose.
Kind = Literal["indices", "weights", "mask", "sparse", "probabilities", "scores", "logits", "dispatch", "tokens"]

# How far a row of probabilities in half precision is from 1.
_NORMALIZED = 2e-2


def tensors_by_place(output: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a module was given or returned, each with its place.

    Example:
        >>> [place for place, _ in tensors_by_place((torch.ones(1), {"a": torch.ones(1)}))]
        ['.0', '.1.a']
    """
    if isinstance(output, Tensor):
        yield place, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors_by_place(value, f"{place}.{key}")
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from tensors_by_place(value, f"{place}.{i}")
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_by_place(getattr(output, field.name, None), f"{place}.{field.name}")


def tokens_given(args: Any, kwargs: Any) -> tuple[int, tuple[int, ...]]:
    """How many tokens a module is given, and in which shape: by the first float tensor of two or more dimensions.

    Example:
        >>> tokens_given((torch.zeros(2, 3, 8),), {})
        (6, (2, 3))
    """
    for _, tensor in tensors_by_place((*args, *kwargs.values())):
        if tensor.is_floating_point() and tensor.dim() >= 2:
            return tensor.numel() // max(tensor.shape[-1], 1), tuple(tensor.shape[:-1])
    return 0, ()


def classify(tensor: Tensor, n_tokens: int, n_experts: int, top_k: int | None = None) -> Kind | None:
    """What a tensor says of the routing of N tokens to E experts; None if nothing, or not with these values.

    Waits for the device. Weights [N, k] are not told here, because any float of that shape could be some.

    Args:
        tensor: Of any shape.
        n_tokens: N.
        n_experts: E.
        top_k: k, if an attribute says so: then a token may have the same expert twice, as by a table.

    Returns:
        "indices", "mask", "sparse", "probabilities", "scores", "logits" or "dispatch".

    Example:
        >>> classify(torch.tensor([[2, 0], [1, 2]]), n_tokens=2, n_experts=3)
        'indices'
        >>> classify(torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]]), n_tokens=2, n_experts=3)
        'sparse'
    """
    tensor = tensor.detach()
    if tensor.is_complex() or tensor.numel() == 0 or tensor.dim() < 2 - (n_tokens == tensor.numel()):
        return None
    last = tensor.shape[-1]
    if tensor.numel() == n_tokens * n_experts and last == n_experts:
        return _of_rows(tensor.reshape(n_tokens, n_experts))
    if tensor.dim() >= 3 and tensor.shape[-2] == n_experts and tensor.numel() == n_tokens * n_experts * last:
        plain = tensor.dtype == torch.bool or bool(((tensor >= 0).all() & (tensor == 0).any()).item())
        return "dispatch" if plain else None
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.numel() % n_tokens:
        return None
    k = tensor.numel() // n_tokens
    if k > n_experts or (k > 1 and last != k):
        return None
    rows = tensor.reshape(n_tokens, k).long()
    inside = ((rows >= -1) & (rows <= n_experts)).all() & ((rows >= 0) & (rows < n_experts)).any()
    ordered = rows.sort(-1).values
    apart = ((ordered[:, 1:] != ordered[:, :-1]) | (ordered[:, 1:] < 0) | (ordered[:, 1:] >= n_experts)).all()
    return "indices" if bool((inside & (apart | (k == top_k))).item()) else None


def _of_rows(rows: Tensor) -> Kind | None:
    """What [N, E] is."""
    if rows.dtype == torch.bool:
        return "mask"
    wide = rows.to(torch.float32)
    chosen = (wide != 0).sum(-1)
    sums = wide.sum(-1)
    facts = [
        wide.isnan().any(),
        ((wide == 0) | (wide == 1)).all(),
        (wide >= 0).all(),
        (chosen.max() < rows.shape[1]) & (chosen.max() > 0),
        ((sums - 1).abs() < _NORMALIZED).all(),
    ]
    missing, binary, positive, some, normalized = torch.stack(facts).tolist()
    if not rows.is_floating_point():
        return "mask" if binary and some else None
    if missing:
        return None
    if positive and some:
        return "mask" if binary else "sparse"
    if positive and normalized:
        return "probabilities"
    return "scores" if positive and bool((chosen.min() > 0).item()) else "logits"


def slots_of_mask(mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The chosen experts of each token and their entries, from what is zero where an expert was not chosen.

    Args:
        mask: [N, E], not negative.
        top_k: k, the most that a token chose.

    Returns:
        [N, k] indices, -1 for an empty slot, largest entry first; [N, k] entries.

    Example:
        >>> slots_of_mask(torch.tensor([[0.2, 0.0, 0.5], [0.0, 0.0, 0.0]]), 2)
        (tensor([[ 2,  0],
                [-1, -1]]), tensor([[0.5000, 0.2000],
                [0.0000, 0.0000]]))
    """
    values = mask.detach()
    ranked = values.to(torch.int32) if values.dtype == torch.bool else values
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    kept = ranked.gather(1, order)
    return torch.where(kept != 0, order, -1), kept


def mask_of_tokens(tokens: Tensor, n_tokens: int) -> Tensor:
    """Which experts hold each token, where experts choose tokens.

    Args:
        tokens: [E, C] the tokens that each expert chose.
        n_tokens: N.

    Returns:
        [N, E] bool.

    Example:
        >>> mask_of_tokens(torch.tensor([[0, 2], [2, 1]]), 3)
        tensor([[ True, False],
                [False,  True],
                [ True,  True]])
    """
    mask = torch.zeros(tokens.shape[0], n_tokens, dtype=torch.bool, device=tokens.device)
    return mask.scatter_(1, tokens.detach().long(), True).t()
