"""Python state that a training step may change, noted before and put back after; `journal.py` sees to memory."""

from __future__ import annotations

import array
import contextlib
import functools
import io
import logging
import random
import re
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynwatch.callbacks.journal import memory_of

# More objects than this are not a module's state but a data set, and looking at each would take seconds.
_MOST_OBJECTS = 2_000_000

# An object that another leads to, and by which path: a format and what goes into it.
_Way = tuple[object, str, object]


class CannotReplayError(RuntimeError):
    """A training step that cannot be run again without leaving traces; the message says why and what to do."""


class Snapshot:
    """The Python state that can be reached from some objects, to be put back by `restore`.

    Attributes:
        tensors: All tensors found on the way; their memory is left to a `WriteJournal`.
        generators: All random generators found on the way, of torch, NumPy and the standard library.
        places: For each leaf that requires a gradient, by its id, what puts another tensor where it was found.

    Args:
        roots: Where to begin, by name.
        skip: Types whose objects are not looked into.
        lenient: Names of roots below which iterators are left alone.

    Raises:
        CannotReplayError: If an iterator is found, which cannot be turned back, or too many objects.
    """

    def __init__(
        self, roots: Mapping[str, object], skip: tuple[type, ...] = (), lenient: frozenset[str] = frozenset()
    ) -> None:
        self.tensors: list[Tensor] = []
        self.places: dict[int, list[Callable[[Tensor], object]]] = {}
        self.generators: list[Any] = []
        self._undo: list[tuple[Any, ...]] = []  # functions with their arguments
        self._empty: list[Any] = []  # containers: most of a module's own are, and need no copy
        self._skip = (*_SKIPPED, *skip)
        self._looks: dict[type, Callable[[Any], Iterator[_Way]] | None] = {}
        self._classes: set[type] = set()
        seen: dict[int, object] = {}  # keeps what it has seen alive, so that no id is used twice
        # The last is looked at first: what the first root leads to is found by way of it.
        waiting: list[tuple[Any, Any]] = [(root, (None, "{}", name)) for name, root in reversed(list(roots.items()))]
        while waiting:  # no recursion: linked structures can be deep
            item, path = waiting.pop()
            if id(item) in seen:
                continue
            seen[id(item)] = item
            if len(seen) > _MOST_OBJECTS:
                raise CannotReplayError(
                    f"{_written_out(path)} is one of more than {_MOST_OBJECTS:,} objects that the module holds, too "
                    "many to be put back after a replay: keep data sets out of the module."
                )
            kind = type(item)
            if kind not in self._looks:
                self._looks[kind] = self._look_for(kind)
            look = self._looks[kind]
            if look is None and _root(path) in lenient:
                continue
            if look is None:
                raise CannotReplayError(
                    f"{_written_out(path)} is an iterator ({kind.__name__}), and what training_step drew from it could "
                    "not be put back. Keep it out of the module, for instance in the data loader."
                )
            for value, form, key in look(item):
                if type(value) not in _PLAIN:
                    waiting.append((value, (path, form, key)))
        self._looks.clear()  # methods of this object: a cycle would keep copies alive until a garbage collection

    def restore(self) -> None:
        failed: Exception | None = None
        for undo, *arguments in reversed(self._undo):
            try:
                undo(*arguments)
            except Exception as error:  # of one object; the others must be put back all the same
                failed = failed or error
        for item in self._empty:
            if item:
                _restore_empty(item)
        if failed is not None:
            raise failed

    def _look_for(self, kind: type) -> Callable[[Any], Iterator[_Way]] | None:
        """How to look at objects of a type; None if there is no way."""
        if issubclass(kind, self._skip) and not issubclass(kind, (io.StringIO, io.BytesIO)):
            return self._pass
        for types_, look in (
            (Tensor, self._tensor),
            (dict, self._dict),
            ((list, deque), self._sequence),
            ((tuple, frozenset), self._fixed),
            (set, self._set),
            ((bytearray, array.array), self._bytes),
            (np.ndarray, self._array),
            (random.SystemRandom, self._pass),
            (contextlib._GeneratorContextManager, self._pass),  # a decorator's, which makes itself anew at each call
            ((io.StringIO, io.BytesIO), self._stream),
            ((random.Random, np.random.RandomState, np.random.Generator, torch.Generator), self._generator),
            ((functools.partial, types.MethodType, types.FunctionType), self._function),
        ):
            if issubclass(kind, types_):
                return look
        if issubclass(kind, Iterator):
            return None
        if issubclass(kind, nn.Module):
            return self._module
        return self._pass if kind.__module__.startswith(_FRAMEWORKS) else self._object

    # --- each of these notes an object's own state and gives what it leads to

    def _pass(self, item: Any) -> Iterator[_Way]:
        return iter(())

    def _tensor(self, item: Tensor) -> Iterator[_Way]:
        self.tensors.append(item)
        if item.is_leaf:
            self._undo.append((_restore_attribute, item, "grad", item.grad))
            yield item.grad, ".grad", None
        self._undo.append((_restore_tensor, item, item.detach(), item.requires_grad))  # first: a gradient must fit
        if item.__dict__:
            yield from self._mapping(item.__dict__, ".{}")

    def _dict(self, item: dict[Any, Any]) -> Iterator[_Way]:
        yield from self._mapping(item, "[{!r}]")
        yield from self._attributes(item)

    def _mapping(self, item: dict[Any, Any], form: str) -> Iterator[_Way]:
        if not item:
            self._empty.append(item)
            return
        before = dict(item)
        self._undo.append((_restore_dict, item, before))
        for key, value in before.items():
            if isinstance(value, Tensor):
                self._note_place(value, item.__setitem__, key)
            if type(value) in _CONTAINERS and not value:  # most of a module's attributes, and worth a short way
                self._empty.append(value)
            elif type(value) not in _PLAIN:
                yield value, form, key

    def _sequence(self, item: list[Any] | deque[Any]) -> Iterator[_Way]:
        if item:
            before = list(item)
            self._undo.append((_restore_sequence, item, before))
            for i, value in enumerate(before):
                if isinstance(value, Tensor):
                    self._note_place(value, item.__setitem__, i)
                yield value, "[{}]", i
        else:
            self._empty.append(item)
        yield from self._attributes(item)

    def _fixed(self, item: tuple[Any, ...] | frozenset[Any]) -> Iterator[_Way]:
        for i, value in enumerate(item):
            yield value, "[{}]", i

    def _set(self, item: set[Any]) -> Iterator[_Way]:
        self._undo.append((_restore_set, item, set(item)))
        for value in item:
            yield value, "{{…}}", None

    def _bytes(self, item: bytearray | array.array[Any]) -> Iterator[_Way]:
        self._undo.append((item.__setitem__, slice(None), item[:]))
        return iter(())

    def _array(self, item: np.ndarray[Any, Any]) -> Iterator[_Way]:
        if item.flags.writeable:
            self._undo.append((np.copyto, item, item.copy()))
        if item.dtype == object:
            yield from self._fixed(tuple(item.flat))

    def _stream(self, item: Any) -> Iterator[_Way]:
        if not item.closed:
            self._undo.append((_restore_stream, item, item.getvalue(), item.tell()))
        return iter(())

    def _generator(self, item: Any) -> Iterator[_Way]:
        self.generators.append(item)
        if isinstance(item, random.Random):
            self._undo.append((item.setstate, item.getstate()))
        elif isinstance(item, np.random.Generator):
            self._undo.append((setattr, item.bit_generator, "state", item.bit_generator.state))
        else:
            self._undo.append((item.set_state, item.get_state()))
        return iter(())

    def _function(self, item: Any) -> Iterator[_Way]:
        if isinstance(item, functools.partial):
            yield from ((value, "(…)", None) for value in (item.func, item.args, item.keywords))
        elif isinstance(item, types.MethodType):
            yield item.__self__, ".__self__", None
        else:
            yield from ((value, "(…)", None) for value in (item.__defaults__, item.__kwdefaults__))
            if _is_users(item):
                yield from self._globals(item)
            names = item.__code__.co_freevars
            for name, cell in zip(names, item.__closure__ or (), strict=False):
                try:
                    value = cell.cell_contents
                except ValueError:  # still empty
                    continue
                self._undo.append((setattr, cell, "cell_contents", value))
                if isinstance(value, Tensor):
                    self._note_place(value, setattr, cell, "cell_contents")
                yield value, " (variable {})", name
        yield from self._attributes(item)

    def _globals(self, function: types.FunctionType) -> Iterator[_Way]:
        """Variables of a file that a function of the user's names, as a generator for mixup or a list of losses."""
        for name in _names_in(function.__code__):
            value = function.__globals__.get(name, _ABSENT)
            if value is _ABSENT or isinstance(value, (type, types.ModuleType)):
                continue
            if not isinstance(value, types.FunctionType):
                self._undo.append((_restore_key, function.__globals__, name, value))
            yield value, " (global {})", name

    def _module(self, item: nn.Module) -> Iterator[_Way]:
        yield from self._object(item)
        for kind in type(item).__mro__:
            if kind is object or kind in self._classes or kind.__module__.startswith(_FRAMEWORKS):
                continue
            self._classes.add(kind)
            for name, value in vars(kind).items():  # `losses = []` in a class is state of its modules, too
                value = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(value, types.FunctionType):
                    yield value, ".{}", name
                elif not name.startswith("__") and not isinstance(value, type) and not hasattr(type(value), "__get__"):
                    self._undo.append((_restore_attribute, kind, name, value))
                    yield value, ".{}", name

    def _object(self, item: Any) -> Iterator[_Way]:
        yield from self._attributes(item)
        for name in _slots(type(item)):  # type: ignore[arg-type]
            value = getattr(item, name, _ABSENT)
            self._undo.append((_restore_slot, item, name, value))
            if isinstance(value, Tensor):
                self._note_place(value, object.__setattr__, item, name)
            yield value, ".{}", name

    def _attributes(self, item: Any) -> Iterator[_Way]:
        attributes = getattr(item, "__dict__", None)
        if isinstance(attributes, dict):
            yield from self._mapping(attributes, ".{}")

    def _note_place(self, tensor: Tensor, put: Callable[..., object], *where: object) -> None:
        if tensor.requires_grad and tensor.is_leaf:
            self.places.setdefault(id(tensor), []).append(functools.partial(put, *where))


# Without state of their own, and by far the most frequent.
_PLAIN = frozenset(
    {
        *(int, float, complex, bool, str, bytes, range, type(None), type(...), type, object),
        *(types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size),
    }
)

_CONTAINERS = (dict, OrderedDict, set, list)

# Not the module's state, or not to be looked into: other threads may use them.
_SKIPPED: tuple[type, ...] = (
    *(type, int, float, str, bytes, torch.Size),
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.utils.data.DataLoader,
    torch.utils.data.Dataset,
    torch.utils.data.Sampler,
    torch.utils.hooks.RemovableHandle,
    logging.Logger,
    io.IOBase,
)

# Objects of these packages that are not modules work between steps and ranks; they are not the module's state.
_FRAMEWORKS = (
    "torch.",
    "dynwatch.",
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "threading",
    "asyncio",
    "builtins",
)

_NOT_USERS = {*sys.stdlib_module_names, "dynwatch", "torch", "numpy", "pytorch_lightning", "lightning"} - {"__main__"}

_ABSENT = object()


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    found: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def _is_users(function: types.FunctionType) -> bool:
    """Whether a function is of the user's own project, rather than of the standard library or an installed package."""
    package = (function.__module__ or "").partition(".")[0]
    where = function.__code__.co_filename
    return package not in _NOT_USERS and "site-packages" not in where and "dist-packages" not in where


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """Names that code may look up among globals, with those of the functions inside of it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return (*code.co_names, *(name for each in inner for name in _names_in(each)))


def _root(path: Any) -> str:
    while path[0] is not None:
        path = path[0]
    return str(path[2])


def _written_out(path: Any) -> str:
    """Where something was found, as one would write it in code."""
    parts: list[str] = []
    while path is not None:
        path, form, key = path
        parts.append(form.format(key))
    return re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", "".join(reversed(parts)))


def _restore_tensor(tensor: Tensor, memory: Tensor, requires_grad: bool) -> None:
    if memory_of(tensor) != memory_of(memory) or tensor.shape != memory.shape:
        tensor.data = memory  # was replaced by assignment to .data
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _restore_dict(item: dict[Any, Any], before: dict[Any, Any]) -> None:
    # Not through methods that a subclass may have changed; an OrderedDict keeps its order in its own.
    plain: Any = OrderedDict if isinstance(item, OrderedDict) else dict
    pairs = zip(plain.items(item), before.items(), strict=False)
    if len(item) != len(before) or not all(a is b and now is then for (a, now), (b, then) in pairs):
        plain.clear(item)
        plain.update(item, before)


def _restore_sequence(item: list[Any] | deque[Any], before: list[Any]) -> None:
    if len(item) != len(before) or any(a is not b for a, b in zip(item, before, strict=True)):
        plain: Any = list if isinstance(item, list) else deque
        plain.clear(item)
        plain.extend(item, before)


def _restore_set(item: set[Any], before: set[Any]) -> None:
    if item != before:
        set.clear(item)
        set.update(item, before)


def _restore_empty(item: Any) -> None:
    plain: Any = next(kind for kind in (OrderedDict, dict, list, deque, set) if isinstance(item, kind))
    plain.clear(item)


def _restore_stream(item: Any, text: Any, position: int) -> None:
    if item.getvalue() != text:
        item.seek(0)
        item.truncate()
        item.write(text)
    item.seek(position)


def _restore_key(item: dict[str, Any], name: str, value: object) -> None:
    if item.get(name, _ABSENT) is not value:
        item[name] = value


def _restore_attribute(item: Any, name: str, value: object) -> None:
    if getattr(item, name, None) is not value:
        setattr(item, name, value)


def _restore_slot(item: object, name: str, value: object) -> None:
    if getattr(item, name, _ABSENT) is value:
        return
    if value is _ABSENT:
        object.__delattr__(item, name)
    else:
        object.__setattr__(item, name, value)
