"""What a training step may change besides its result, noted before and put back after.

Two mechanisms share the work. A `Snapshot` walks the Python objects that a module can reach and puts back attributes,
containers and random generators. A `WriteJournal` watches every operation and copies a tensor's memory just before
it is first written to, so that what is not touched costs nothing.
"""

from __future__ import annotations

import array
import functools
import io
import logging
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# More objects than this are not a module's state but a data set, and looking at each would take seconds.
_MOST_OBJECTS = 2_000_000


class CannotReplayError(RuntimeError):
    """A training step that cannot be run again without leaving traces; the message says why and what to do."""


class WriteJournal(TorchDispatchMode):
    """Copies the memory of tensors before the first operation that writes to them; `restore` puts it back.

    Memory is compared by storage, so that views and `.data` are seen through. BatchNorm's running statistics are
    changed by an operation that does not say so: buffers must be given as copies.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = {pointer for tensor in tensors if (pointer := _pointer(tensor))}
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, name in _written(func):
            written = args[position] if position < len(args) else kwargs.get(name)
            for tensor in written if isinstance(written, (list, tuple)) else (written,):
                self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Any) -> None:
        pointer = _pointer(tensor) if isinstance(tensor, Tensor) else 0
        if pointer in self._watched and pointer not in self._saved:
            storage = tensor.untyped_storage()
            self._saved[pointer] = (storage, storage.clone())

    def restore(self) -> None:
        for storage, before in self._saved.values():
            storage.copy_(before)
        self._saved.clear()


@functools.lru_cache(maxsize=4096)
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _pointer(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 if it has none of its own."""
    inner = getattr(tensor, "_local_tensor", tensor)  # a DTensor's shard
    try:
        return int(inner.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return 0


class Snapshot:
    """The Python state that can be reached from some objects, to be put back by `restore`.

    Attributes:
        tensors: All tensors found on the way; their memory is left to a `WriteJournal`.

    Args:
        roots: Where to begin.
        skip: Types whose objects are not looked into.

    Raises:
        CannotReplayError: If an iterator is found, which cannot be turned back, or too many objects.
    """

    def __init__(self, roots: Iterable[object], skip: tuple[type, ...] = ()) -> None:
        self.tensors: list[Tensor] = []
        self._undo: list[Callable[[], object]] = []
        self._skip = (*_SKIPPED, *skip)
        self._seen: dict[int, object] = {}
        waiting: list[tuple[object, str]] = [(root, type(root).__name__) for root in roots]
        while waiting:  # no recursion: linked structures can be deep
            item, path = waiting.pop()
            if isinstance(item, _PLAIN) or id(item) in self._seen:
                continue
            self._seen[id(item)] = item
            if len(self._seen) > _MOST_OBJECTS:
                raise CannotReplayError(
                    f"{path} is one of more than {_MOST_OBJECTS:,} objects that the module holds; keep data sets out "
                    "of it, or pass loss= (a function of module and batch) to measure without running training_step."
                )
            waiting.extend(self._look(item, path))

    def restore(self) -> None:
        for undo in reversed(self._undo):
            undo()

    def _look(self, item: Any, path: str) -> Iterator[tuple[object, str]]:
        """Note an object's own state; gives what it leads to."""
        if isinstance(item, Tensor):
            self.tensors.append(item)
            self._undo.append(functools.partial(_restore_tensor, item, item.detach(), item.requires_grad))
            if item.is_leaf:
                self._undo.append(functools.partial(_restore_attribute, item, "grad", item.grad))
                yield item.grad, f"{path}.grad"
        elif isinstance(item, self._skip):
            return
        elif isinstance(item, dict):
            before = dict(item)
            self._undo.append(functools.partial(_restore_dict, item, before))
            yield from ((value, f"{path}[{key!r}]") for key, value in before.items() if not isinstance(value, _PLAIN))
        elif isinstance(item, (list, deque)):
            self._undo.append(functools.partial(_restore_sequence, item, list(item)))
            yield from ((value, f"{path}[{i}]") for i, value in enumerate(item) if not isinstance(value, _PLAIN))
        elif isinstance(item, (tuple, frozenset)):
            yield from ((value, f"{path}[…]") for value in item)
        elif isinstance(item, set):
            self._undo.append(functools.partial(_restore_set, item, set(item)))
            yield from ((value, f"{path}{{…}}") for value in item)
        elif isinstance(item, (bytearray, array.array)):
            self._undo.append(functools.partial(item.__setitem__, slice(None), item[:]))
        elif isinstance(item, np.ndarray):
            if item.flags.writeable:
                self._undo.append(functools.partial(np.copyto, item, item.copy()))
        elif isinstance(item, random.Random):
            self._undo.append(functools.partial(item.setstate, item.getstate()))
        elif isinstance(item, np.random.RandomState):
            self._undo.append(functools.partial(item.set_state, item.get_state()))
        elif isinstance(item, np.random.Generator):
            self._undo.append(functools.partial(setattr, item.bit_generator, "state", item.bit_generator.state))
        elif isinstance(item, torch.Generator):
            self._undo.append(functools.partial(item.set_state, item.get_state()))
        elif isinstance(item, functools.partial):
            yield from ((value, f"{path}(…)") for value in (item.func, item.args, item.keywords))
        elif isinstance(item, types.MethodType):
            yield item.__self__, f"{path}.__self__"
        elif isinstance(item, types.FunctionType):
            for cell in item.__closure__ or ():
                yield from self._look_into_cell(cell, path)
        elif isinstance(item, Iterator) and not isinstance(item, io.IOBase):
            raise CannotReplayError(
                f"{path} is an iterator ({type(item).__name__}). If training_step draws from it, replaying the step "
                "would take what belongs to the run. Pass loss= (a function of module and batch)."
            )
        elif isinstance(item, nn.Module) or not type(item).__module__.startswith(_FRAMEWORKS):
            attributes = getattr(item, "__dict__", None)
            if isinstance(attributes, dict):
                yield attributes, path
            for name in _slots(type(item)):  # type: ignore[arg-type]
                if hasattr(item, name):
                    value = getattr(item, name)
                    self._undo.append(functools.partial(_restore_attribute, item, name, value))
                    yield value, f"{path}.{name}"

    def _look_into_cell(self, cell: Any, path: str) -> Iterator[tuple[object, str]]:
        try:
            value = cell.cell_contents
        except ValueError:  # still empty
            return
        self._undo.append(functools.partial(setattr, cell, "cell_contents", value))
        yield value, f"{path}.__closure__"


_PLAIN: tuple[type, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type,
    range,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.Size,
)

# Not the module's state, or not to be looked into: other threads may use them.
_SKIPPED: tuple[type, ...] = (
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
_FRAMEWORKS = ("torch.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "dynwatch.", "threading", "asyncio")


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    if kind.__module__ == "builtins":
        return ()
    found: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def _restore_tensor(tensor: Tensor, memory: Tensor, requires_grad: bool) -> None:
    if _pointer(tensor) != _pointer(memory) or tensor.shape != memory.shape:
        tensor.data = memory  # was replaced by assignment to .data
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _restore_dict(item: dict[Any, Any], before: dict[Any, Any]) -> None:
    same = len(item) == len(before) and all(a is b and item[a] is before[b] for a, b in zip(item, before, strict=True))
    if not same:
        item.clear()
        item.update(before)


def _restore_sequence(item: list[Any] | deque[Any], before: list[Any]) -> None:
    if len(item) != len(before) or any(a is not b for a, b in zip(item, before, strict=True)):
        item.clear()
        item.extend(before)


def _restore_set(item: set[Any], before: set[Any]) -> None:
    if item != before:
        item.clear()
        item.update(before)


def _restore_attribute(item: object, name: str, value: object) -> None:
    if getattr(item, name, None) is not value:
        setattr(item, name, value)
