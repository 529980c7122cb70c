"""Snapshots and journals: Python state and memory that are put back."""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import itertools
import random
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynwatch.callbacks import snapshot
from dynwatch.callbacks.journal import WriteJournal
from dynwatch.callbacks.snapshot import CannotReplayError, Snapshot


class Slotted:
    __slots__ = ("__hidden", "late", "x")

    def __init__(self) -> None:
        self.x = 1
        self.__hidden = 2

    def change(self) -> None:
        self.x, self.__hidden, self.late = 5, 6, 7

    def seen(self) -> Any:
        return self.x, self.__hidden, hasattr(self, "late")


class Talking(dict):  # type: ignore[type-arg]
    """A dictionary with a mind of its own."""

    def __init__(self, *items: Any) -> None:
        super().__init__(*items)
        self.changes = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("read-only")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("read-only")


class Holder(nn.Module):
    shared: list[int] = [1]  # noqa: RUF012 - as users write it
    count = 0

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


def _talk(item: Talking) -> None:
    dict.__setitem__(item, "a", 9)
    item.changes += 1


def _counter() -> tuple[Callable[[], int], Callable[[], Any]]:
    count, found = 0, []

    def call(history: list[int] = []) -> int:  # noqa: B006 - as users write it
        nonlocal count
        count += 1
        found.append(count)
        history.append(count)
        call.calls = count  # type: ignore[attr-defined]
        return count

    return call, lambda: (count, list(found), list(call.__defaults__[0]), dict(vars(call)))  # type: ignore[index]


# What a module may hold: how it is made, changed and looked at.
STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "list": (lambda: [1, [2]], lambda v: (v.append(3), v[1].clear()), repr),
    "empty_list": (list, lambda v: v.append(1), repr),
    "dict": (lambda: {"a": {"b": 1}}, lambda v: (v["a"].update(b=2), v.pop("a")), repr),
    "dict_order": (lambda: {"a": 1, "b": 2}, lambda v: v.update(a=v.pop("a")), repr),
    "empty_dict": (dict, lambda v: v.update(a=1), repr),
    "ordered": (lambda: OrderedDict(a=1, b=2), lambda v: v.move_to_end("a"), repr),
    "counter": (lambda: Counter("aab"), lambda v: v.update("abc"), repr),
    "default": (lambda: defaultdict(list, a=[1]), lambda v: (v["b"], v["a"].append(2)), repr),
    "subclass": (lambda: Talking({"a": 1}), _talk, lambda v: (dict(v), v.changes)),
    "set": (lambda: {1, 2}, lambda v: (v.add(3), v.discard(1)), sorted),
    "empty_set": (set, lambda v: v.add(3), sorted),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda v: v.append(3), repr),
    "bytes": (lambda: bytearray(b"ab"), lambda v: v.append(1), repr),
    "array": (lambda: array.array("d", [1.0]), lambda v: v.extend([2.0]), repr),
    "numpy": (lambda: np.array([1.0, np.nan]), lambda v: v.fill(2), lambda v: v.tobytes()),
    "numpy_objects": (lambda: np.array([[1], None], dtype=object), lambda v: v[0].append(2), repr),
    "random": (lambda: random.Random(1), lambda v: v.random(), lambda v: v.getstate()),
    "numpy_generator": (
        lambda: np.random.default_rng(1),
        lambda v: v.random(),
        lambda v: repr(v.bit_generator.state),
    ),
    "numpy_state": (lambda: np.random.RandomState(1), lambda v: v.rand(), lambda v: repr(v.get_state())),
    "torch_generator": (
        lambda: torch.Generator().manual_seed(1),
        lambda v: torch.rand(1, generator=v),
        lambda v: v.get_state().tolist(),
    ),
    "slots": (Slotted, Slotted.change, Slotted.seen),
    "tuple": (lambda: ([1], frozenset({2})), lambda v: v[0].append(2), repr),
    "closure": (_counter, lambda v: v[0](), lambda v: v[1]()),
    "partial": (lambda: functools.partial(print, [1]), lambda v: v.args[0].append(2), lambda v: repr(v.args)),
    "method": (lambda: Slotted().change, lambda v: v(), lambda v: v.__self__.seen()),
    "module": (lambda: Holder([1]), lambda v: setattr(v, "value", 2), lambda v: repr(v.value)),
    "itself": (lambda: (v := [1], v.append(v))[0], lambda v: v.append(2), len),
}


@pytest.mark.parametrize("kind", STATES)
def test_state_is_put_back(kind: str) -> None:
    """Whatever kind of object a module holds has its content again, as often as it is asked for."""
    make, change, look = STATES[kind]
    holder = Holder(make())
    value, before = holder.value, look(holder.value)
    taken = Snapshot({"model": holder})
    for _ in range(2):
        change(holder.value)
        assert look(holder.value) != before  # otherwise the test would be idle
        holder.value, holder.new = None, 1
        taken.restore()
        assert holder.value is value
        assert look(holder.value) == before
        assert "new" not in vars(holder)


def test_variables_of_a_class_are_put_back() -> None:
    """A list or a number in the class of a module is state of the module as well."""
    holder = Holder()
    taken = Snapshot({"model": holder})
    Holder.shared.append(2)
    Holder.count += 1
    taken.restore()
    assert (Holder.shared, Holder.count) == ([1], 0)


def test_deep_structures_are_no_problem() -> None:
    """A linked list of 20,000 nodes is walked without recursion."""
    node: list[Any] = []
    first = node
    for _ in range(20_000):
        node.append([])
        node = node[0]
    taken = Snapshot({"model": Holder(first)})
    node.append(1)
    taken.restore()
    assert node == []


@pytest.mark.parametrize(
    ("value", "kind"),
    [(itertools.count(), "count"), ((i for i in ()), "generator"), (iter([1]), "list_iterator"), (map(abs, []), "map")],
    ids=["count", "generator", "list", "map"],
)
def test_an_iterator_is_refused_by_name(value: Any, kind: str) -> None:
    """The message says where the iterator is, what it is, and what to do."""
    model = nn.Sequential(Holder({"streams": [value]}))
    with pytest.raises(
        CannotReplayError, match=rf"^model\.0\.value\['streams'\]\[0\] is an iterator \({kind}\).*loader"
    ):
        Snapshot({"model": model})


def test_too_many_objects_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set in a module is named instead of being looked through."""
    monkeypatch.setattr(snapshot, "_MOST_OBJECTS", 50)
    with pytest.raises(CannotReplayError, match=r"^model\.value\[\d+\] is one of more than 50 objects"):
        Snapshot({"model": Holder([[] for _ in range(100)])})


def test_tensors_are_put_back() -> None:
    """Memory that was replaced, gradients, `requires_grad` and attributes of a parameter."""
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    layer.weight.history = []  # type: ignore[assignment]
    before, grad, pointer = layer.weight.detach().clone(), layer.weight.grad, layer.weight.data_ptr()
    taken = Snapshot({"model": layer})
    layer.weight.data = torch.zeros(3)
    layer.weight.requires_grad_(False)
    layer.weight.history.append(1)  # type: ignore[operator]
    layer.weight.grad = None
    layer.bias.grad = torch.ones(2)
    taken.restore()
    assert torch.equal(layer.weight, before)
    assert layer.weight.data_ptr() == pointer
    assert layer.weight.requires_grad
    assert layer.weight.history == []
    assert layer.weight.grad is grad
    assert layer.bias.grad is None


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in_place": lambda t: t.mul_(2),
    "data": lambda t: t.data.add_(1),
    "view": lambda t: t[0].zero_(),
    "index": lambda t: t.__setitem__((slice(None), 1), 5.0),
    "foreach": lambda t: torch._foreach_mul_([torch.ones(1), t], 3.0),
    "out": lambda t: torch.add(t, 1, out=t),
    "out_of_view": lambda t: torch.sum(t, 0, out=t[1]),
    "lerp": lambda t: t.lerp_(torch.ones_like(t), 0.5),
    "copy": lambda t: t.copy_(torch.ones(2, 2)),
    "random": lambda t: t.uniform_(),
    "init": lambda t: nn.init.normal_(t),
    "renorm": lambda t: nn.functional.embedding(torch.tensor([0]), t, max_norm=0.1),
    "resize": lambda t: t.resize_(5, 5).fill_(2),
    "scatter": lambda t: t.index_add_(0, torch.tensor([0]), torch.ones(1, 2)),
}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().clone().numpy().tobytes()  # a clone, because memory that numpy has seen cannot grow


@pytest.mark.parametrize("kind", WRITES)
def test_memory_that_is_written_to_is_put_back(kind: str) -> None:
    """Every way of writing is seen, once or again; other tensors are not copied."""
    tensor, untouched = torch.tensor([[1.0, 2.0], [torch.nan, 1e15]]), torch.ones(3)
    taken = Snapshot({"tensors": [tensor, untouched]})
    journal = WriteJournal(taken.tensors)
    before = _bytes(tensor)
    for _ in range(2):
        with journal, torch.no_grad():
            WRITES[kind](tensor)
        assert _bytes(tensor) != before
        assert len(journal._saved) == 1
        journal.restore()
        taken.restore()
        assert tensor.shape == (2, 2)
        assert _bytes(tensor) == before


def test_a_graph_over_memory_that_was_put_back_says_so() -> None:
    """It needs numbers that are gone; computing with others would be silently wrong."""
    center, weight = torch.ones(2), torch.ones(2, requires_grad=True)
    journal = WriteJournal([center])
    with journal:
        center.mul_(3)
        loss = (weight * center).sum()
    journal.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_places_of_parameters() -> None:
    """Wherever a parameter is kept, another tensor can stand in for it, until it is put back."""
    weight = nn.Parameter(torch.ones(2))
    holder = Holder({"list": [weight], "queue": deque([weight])})
    holder.weight = weight
    slotted = Slotted()
    slotted.x = weight  # type: ignore[assignment]
    holder.slotted = slotted
    holder.function = lambda: weight
    taken = Snapshot({"model": holder})
    stand_in = torch.zeros(2)
    for put in taken.places[id(weight)]:
        put(stand_in)
    found = [holder.weight, *holder.value["list"], *holder.value["queue"], slotted.x, holder.function()]
    assert all(tensor is stand_in for tensor in found)
    taken.restore()
    found = [holder.weight, *holder.value["list"], *holder.value["queue"], slotted.x, holder.function()]
    assert all(isinstance(tensor, nn.Parameter) for tensor in found)


def test_it_is_let_go_without_a_garbage_collection() -> None:
    """Nothing in it leads back to it, so that copies of tensors do not wait for the collector."""
    module = nn.Linear(3, 2)
    module.kept = [1, {"a": torch.ones(2)}]
    gc.collect()
    gc.disable()
    try:
        snapshot = Snapshot({"module": module})
        seen = weakref.ref(snapshot)
        del snapshot
        assert seen() is None
    finally:
        gc.enable()


def test_a_decorator_with_a_generator_of_its_own() -> None:
    """A function that a context manager decorates is no iterator: each call makes the generator anew."""

    @contextlib.contextmanager
    def quietly() -> Iterator[None]:
        yield

    module = nn.Linear(3, 2)
    module.act = quietly()(lambda: 3)  # type: ignore[assignment]
    Snapshot({"module": module}).restore()
    assert module.act() == 3  # type: ignore[operator]
