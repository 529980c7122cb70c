"""What tensors around a router mean, told from shapes and values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dynwatch.router_outputs import classify, mask_of_tokens, slots_of_mask, tensors_by_place

N, E, K, C = 6, 4, 2, 3
LOGITS = torch.randn(N, E, generator=torch.Generator().manual_seed(0))
INDICES = LOGITS.topk(K).indices
MASK = torch.zeros(N, E).scatter(1, INDICES, 1.0)
SPARSE = LOGITS.softmax(-1) * MASK
DISPATCH = SPARSE[..., None] * torch.nn.functional.one_hot(torch.arange(N) % C, C)[:, None, :]

CASES: dict[str, tuple[Tensor, str | None]] = {
    "indices": (INDICES, "indices"),
    "indices int32": (INDICES.int(), "indices"),
    "indices of a batch": (INDICES.view(2, 3, K), "indices"),
    "indices of one": (INDICES[:, 0], "indices"),
    "indices of one, in a batch": (INDICES[:, 0].view(2, 3), "indices"),
    "indices with a dropped one": (INDICES.clone().index_fill_(0, torch.tensor([0]), E), "indices"),
    "indices with an empty slot": (torch.where(INDICES == 0, -1, INDICES), "indices"),
    "the same expert twice": (INDICES[:, :1].expand(N, 2), None),
    "positions": (torch.arange(N) + 100, None),
    "counts": (MASK.sum(0).long(), None),
    "logits": (LOGITS, "logits"),
    "logits of a batch": (LOGITS.view(2, 3, E), "logits"),
    "logits, all zero": (torch.zeros(N, E), "logits"),
    "logits with masked experts": (LOGITS.masked_fill(MASK == 0, -torch.inf), "logits"),
    "probabilities": (LOGITS.softmax(-1), "probabilities"),
    "probabilities in half precision": (LOGITS.bfloat16().softmax(-1), "probabilities"),
    "sigmoids": (LOGITS.sigmoid(), "scores"),
    "combine weights": (SPARSE, "sparse"),
    "normalised combine weights": (SPARSE / SPARSE.sum(-1, keepdim=True), "sparse"),
    "combine weights with a dropped token": (SPARSE.clone().index_fill_(0, torch.tensor([1]), 0.0), "sparse"),
    "mask of floats": (MASK, "mask"),
    "mask of ints": (MASK.long(), "mask"),
    "mask of bools": (MASK.bool(), "mask"),
    "dispatch weights": (DISPATCH, "dispatch"),
    "dispatch mask": (DISPATCH.bool(), "dispatch"),
    "not a number": (LOGITS * torch.nan, None),
    "a loss": (torch.tensor(0.1), None),
    "weights": (SPARSE.gather(1, INDICES), None),
    "hidden states": (torch.randn(N, 16), None),
    "empty": (torch.empty(0, E), None),
    "complex": (LOGITS.to(torch.complex64), None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_tensor_is(case: str) -> None:
    tensor, kind = CASES[case]
    assert classify(tensor, N, E) == kind


def test_slots_of_a_mask_are_its_experts() -> None:
    """In descending order of their entries, -1 where fewer were chosen; entries bit for bit."""
    indices, entries = slots_of_mask(SPARSE, K)
    assert torch.equal(indices, INDICES) and torch.equal(entries, SPARSE.gather(1, INDICES))
    indices, _ = slots_of_mask(MASK.bool().index_fill(0, torch.tensor([2]), False), K)
    assert indices[2].tolist() == [-1, -1]
    assert [sorted(row) for row in indices[:2].tolist()] == [sorted(row) for row in INDICES[:2].tolist()]


def test_tokens_that_experts_chose() -> None:
    tokens = torch.tensor([[0, 5], [5, 1], [2, 3], [4, 0]])
    mask = mask_of_tokens(tokens, N)
    assert mask.shape == (N, E) and [mask[:, e].nonzero().flatten().tolist() for e in range(E)] == [
        [0, 5],
        [1, 5],
        [2, 3],
        [0, 4],
    ]


def test_places_of_tensors() -> None:
    """In tuples, lists, mappings and dataclasses; what is no tensor has none."""

    @dataclass
    class Output:
        logits: Tensor
        name: str = "x"

    found = tensors_by_place([Output(LOGITS), (None, 3, {"a": INDICES})], "router")
    assert [place for place, _ in found] == ["router.0.logits", "router.1.2.a"]
