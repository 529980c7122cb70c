"""Batches of any kind: how many samples they hold, parts of them, and the tensors in them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from tensors_in(item)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from tensors_in(item)
    elif _is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from tensors_in(getattr(batch, field.name, None))


def samples_in(batch: Any) -> int | None:
    """How many samples a batch holds: the first dimension of all its tensors; None if they do not agree on one.

    Numbers in tensors without a dimension do not count.
    """
    sizes = {len(tensor) for tensor in tensors_in(batch) if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def part(batch: Any, samples: int, start: int, stop: int) -> Any:
    """The samples from `start` to `stop` of a batch of `samples`, in the batch's own types.

    Tensors are views. Lists and tuples as long as the batch that hold anything but tensors and containers (texts,
    identifiers) are cut as well; everything else is kept.
    """

    def cut(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item[start:stop] if item.dim() else item
        if isinstance(item, (list, tuple)) and len(item) == samples and item and not _holds_tensors(item):
            return _like(item, item[start:stop])
        return _rebuild(item, cut)

    return cut(batch)


def copied(batch: Any) -> Any:
    """A batch in fresh containers; the tensors are the same."""
    return _rebuild(batch, copied)


def cloned(batch: Any) -> Any:
    """A batch with tensors of its own."""

    def clone(item: Any) -> Any:
        return item.detach().clone() if isinstance(item, Tensor) else _rebuild(item, clone)

    return clone(batch)


def _rebuild(item: Any, change: Callable[[Any], Any]) -> Any:
    """A container of the same kind with changed items; anything else as it is."""
    if isinstance(item, MutableMapping):
        new = copy.copy(item)  # keeps what a class such as Hugging Face's BatchEncoding has beside its items
        for key in list(item):
            new[key] = change(item[key])
        return new
    if isinstance(item, Mapping):
        return {key: change(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return _like(item, [change(value) for value in item])
    if _is_dataclass(item):
        new = copy.copy(item)
        for field in dataclasses.fields(item):
            if hasattr(item, field.name):
                object.__setattr__(new, field.name, change(getattr(item, field.name)))
        return new
    return item


def _like(item: list[Any] | tuple[Any, ...], values: Any) -> Any:
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*values)
    if type(item) in (list, tuple):
        return type(item)(values)
    new = copy.copy(item)
    if isinstance(new, list):
        new[:] = values
        return new
    return tuple(values)  # torch.Size, PackedSequence's relatives: a tuple will do or the step says so


def _holds_tensors(item: Any) -> bool:
    return any(isinstance(value, (Tensor, Mapping, list, tuple)) or _is_dataclass(value) for value in item)


def _is_dataclass(item: Any) -> bool:
    return dataclasses.is_dataclass(item) and not isinstance(item, type)
