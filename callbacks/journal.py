"""Memory that a training step writes to, kept just before; what is not touched costs nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class WriteJournal(TorchDispatchMode):
    """Copies the memory of tensors before the first operation that writes to them; `restore` puts it back.

    Memory is compared by storage, so that views and `.data` are seen through. A graph that has saved such a tensor
    raises when it is used after `restore`, instead of computing with other numbers than it was built from. BatchNorm's
    running statistics are changed by an operation that does not say so: buffers must be copied beside this.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if pointer := memory_of(tensor):
                self._watched.setdefault(pointer, []).append(tensor)
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, name in _written(func):
            written = args[position] if position < len(args) else kwargs.get(name)
            for tensor in written if isinstance(written, (list, tuple)) else (written,):
                self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Any) -> None:
        pointer = memory_of(tensor) if isinstance(tensor, Tensor) else 0
        if pointer in self._watched and pointer not in self._saved:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            self._saved[pointer] = (storage, storage.clone())

    def restore(self) -> None:
        for pointer, (storage, before) in self._saved.items():
            if storage.nbytes() != before.nbytes():
                storage.resize_(before.nbytes())
                self._watched.setdefault(storage.data_ptr(), self._watched[pointer])
            storage.copy_(before)
            for tensor in self._watched[pointer]:
                if not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        self._saved.clear()


@functools.lru_cache(maxsize=4096)
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes to."""
    if not hasattr(func, "_schema"):  # of higher order: what it runs is seen in turn
        return ()
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def memory_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 if it has none of its own."""
    inner = getattr(tensor, "_local_tensor", tensor)  # a DTensor's shard
    try:
        return int(inner.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return 0
