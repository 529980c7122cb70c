"""Sums of several routers at once, against the measures of one router at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynwatch.routing import (
    Routing,
    load_counts,
    mean_probabilities,
    router_entropy,
    router_probabilities,
    z_loss,
)
from dynwatch.routing_sums import SCALARS, routing_sums


def one_by_one(indices: Tensor, e: int, scores: Tensor | None, score: Any, valid: Tensor | None) -> Tensor:
    rows = []
    for g in range(len(indices)):
        p = None if scores is None else router_probabilities(scores[g], score)
        routing = Routing(indices[g], e, p, valid=valid)
        tokens = float(len(indices[g]) if valid is None else valid.sum())
        row = [load_counts(routing).double()]
        if scores is None:
            row += [torch.zeros(e), torch.tensor([tokens, 0, 0])]
        else:
            entropy = router_entropy(routing)
            row += [
                mean_probabilities(routing).total,
                torch.stack([torch.tensor(tokens), entropy.count, entropy.total]),
            ]
        z = None if scores is None or score == "given" else z_loss(scores[g], valid)
        row += [torch.zeros(2) if z is None else torch.stack([z.count, z.total])]
        rows.append(torch.cat([*row, torch.tensor([tokens * indices.shape[2]])]).double())
    return torch.stack(rows)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 7),
    st.sampled_from(["softmax", "sigmoid", "given", None]),
    st.booleans(),
    st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    st.integers(0, 10**6),
)
def test_they_are_those_of_single_routers(
    g: int, n: int, e: int, score: Any, padded: bool, scale: float, seed: int
) -> None:
    """For any sizes, scores, padding and empty slots."""
    generator = torch.Generator().manual_seed(seed)
    k = int(torch.randint(1, e + 1, (), generator=generator))
    indices = torch.stack(
        [torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(n)]) for _ in range(g)]
    )
    indices[torch.rand(indices.shape, generator=generator) < 0.2] = -1
    scores = None if score is None else scale * torch.randn(g, n, e, generator=generator)
    if score == "given" and scores is not None:
        scores = scores.abs()
    valid = torch.rand(n, generator=generator) < 0.6 if padded else None
    found = routing_sums(indices, e, scores, score or "softmax", valid)
    expected = one_by_one(indices, e, scores, score, valid)
    assert found.shape == (g, 2 * e + len(SCALARS)) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "given"])
def test_hard_scores(score: Any) -> None:
    """Masked experts, huge logits; NaN of padding counts nowhere, NaN of a token is NaN in its own router alone."""
    scores = torch.zeros(2, 3, 4)
    scores[0, 0] = torch.tensor([1.0, 0.0, 2.0, 0.0])
    if score == "softmax":
        scores[0, 1, 2:] = -torch.inf
        scores[1, 1, 0] = 1e20
    scores[1, 2] = torch.nan
    indices = torch.zeros(2, 3, 1, dtype=torch.int64)
    padded = routing_sums(indices, 4, scores, score, torch.tensor([True, True, False]))
    assert bool(padded.isfinite().all())
    found = routing_sums(indices, 4, scores, score)
    assert bool(found[0].isfinite().all())
    assert found[1, :4].tolist() == [3, 0, 0, 0] and bool(found[1, 4:8].isnan().all())


def test_half_precision_is_widened() -> None:
    """Sums of bfloat16 scores are those of the same numbers in float32."""
    scores = torch.randn(2, 5, 4).bfloat16()
    indices = torch.randint(0, 4, (2, 5, 1))
    torch.testing.assert_close(routing_sums(indices, 4, scores), routing_sums(indices, 4, scores.float()))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"indices of shape \[3, 1\] must be \[G, N, k\] and scores of shape None"):
        routing_sums(torch.zeros(3, 1, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"scores of shape \[1, 3, 5\] \[G, N, 4\]"):
        routing_sums(torch.zeros(1, 3, 1, dtype=torch.int64), 4, torch.zeros(1, 3, 5))
