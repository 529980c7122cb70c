"""Batches: parts, copies and the tensors in them, for every container that loaders give."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dynwatch.callbacks.batches import cloned, part, samples_in, tensors_in


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Size(NamedTuple):
    height: int
    width: int


@dataclasses.dataclass
class Plain:
    x: Tensor
    texts: list[str]
    late: Any = dataclasses.field(init=False)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: float


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    """As Hugging Face's BatchEncoding: items are attributes, and there is more beside them."""

    def __init__(self, data: dict[str, Any], encodings: object = None) -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError as error:
            raise AttributeError(name) from error


def _x() -> Tensor:
    return torch.arange(12.0).reshape(4, 3)


BATCHES: dict[str, Any] = {
    "tensor": _x(),
    "list": [_x(), torch.arange(4)],
    "nested": [_x(), [torch.arange(4), {"mask": torch.ones(4, 2)}]],
    "dict": {"x": _x(), "step": torch.tensor(3.0), "name": "train"},
    "ordered": OrderedDict(x=_x()),
    "proxy": MappingProxyType({"x": _x()}),
    "namedtuple": Pair(_x(), torch.arange(4)),
    "dataclass": Plain(_x(), ["a", "b", "c", "d"]),
    "frozen": Frozen(_x(), 0.5),
    "slotted": Slotted(_x()),
    "encoding": Encoding({"x": _x(), "ids": torch.arange(4)}, encodings="kept"),
    "parameter": [nn.Parameter(_x())],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_part_has_the_rows_and_the_type_of_the_batch(kind: str) -> None:
    """Every tensor with a dimension is cut to the same rows, in containers of the same kind."""
    batch = BATCHES[kind]
    assert samples_in(batch) == 4
    cut = part(batch, 4, 1, 3)
    assert type(cut) is type(batch) or kind in ("proxy", "parameter")
    for before, after in zip(tensors_in(batch), tensors_in(cut), strict=True):
        assert torch.equal(after, before[1:3] if before.dim() else before)
    assert samples_in(cut) == 2
    assert samples_in(batch) == 4


@pytest.mark.parametrize("kind", BATCHES)
def test_a_clone_shares_neither_memory_nor_containers(kind: str) -> None:
    """What is done to a clone, in place or to its containers, does not reach the batch."""
    batch = BATCHES[kind]
    before = [tensor.detach().clone() for tensor in tensors_in(batch)]
    copy = cloned(batch)
    for tensor in tensors_in(copy):
        tensor.data.add_(1)
    for container in (copy, getattr(copy, "texts", None)):
        if isinstance(container, (list, dict, UserDict)):
            container.clear()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_in(batch), strict=True))


def test_what_a_clone_keeps() -> None:
    """A tensor that occurs twice is one in the clone, too; gradients are still asked for; extras stay."""
    x = _x().requires_grad_()
    first, second = cloned([x, x])
    assert first is second
    assert first.requires_grad
    assert first.is_leaf
    assert cloned(BATCHES["encoding"]).encodings == "kept"
    assert cloned(BATCHES["encoding"]).ids.tolist() == [0, 1, 2, 3]
    assert cloned(BATCHES["dataclass"]).texts == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (["a", "b", "c", "d"], ["b"]),
        (("a", "b", "c", "d"), ("b",)),
        ([1, 2, 3, 4], [2]),
        ([1, 2, 3], [1, 2, 3]),
        ((32, 32, 3, 1), (32, 32, 3, 1)),
        (Size(32, 32), Size(32, 32)),
        (None, None),
        ("abcd", "abcd"),
        ([], []),
    ],
)
def test_what_is_cut_beside_tensors(item: Any, expected: Any) -> None:
    """Lists and texts with one entry a sample are cut; a size, a text or nothing is not."""
    assert part([_x(), item], 4, 1, 2)[1] == expected


def test_a_namedtuple_as_long_as_the_batch_is_not_cut() -> None:
    """Its fields are not samples, also when there are as many."""
    assert part([torch.ones(2, 3), Size(32, 16)], 2, 0, 1)[1] == Size(32, 16)


@pytest.mark.parametrize(
    "batch",
    [
        [_x(), torch.ones(5)],
        [[torch.ones(3, 8), torch.ones(3, 8)], torch.arange(2)],  # images of a detector, and labels
        torch.tensor(1.0),
        None,
        [],
        ["a", "b"],
        object(),
    ],
    ids=["sizes", "images", "number", "none", "empty", "texts", "object"],
)
def test_samples_that_cannot_be_told(batch: Any) -> None:
    """Tensors of different lengths, or none with a dimension."""
    assert samples_in(batch) is None


def test_an_empty_batch_has_no_samples() -> None:
    """Zero is an answer: it is not that the number cannot be told."""
    assert samples_in([torch.zeros(0, 3), torch.zeros(0)]) == 0
    assert samples_in(part([torch.zeros(0, 3)], 0, 0, 5)) == 0
