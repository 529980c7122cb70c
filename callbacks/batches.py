"""Batches of any kind: how many samples they hold, parts of them, and the tensors in them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

# What monitors keep of batches goes into checkpoints if it is no larger.
MOST_SAVED_BYTES = 16 * 2**20


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
    sizes = {tensor.size(0) for tensor in tensors_in(batch) if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def part(batch: Any, samples: int, start: int, stop: int) -> Any:
    """The samples from `start` to `stop` of a batch of `samples`, in the batch's own types.

    Tensors are views. Lists as long as the batch that hold neither tensors nor containers (texts, identifiers) are
    cut as well, and tuples of texts; everything else is kept: a tuple of numbers is rather a size.
    """

    def cut(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item[start:stop] if item.dim() else item
        if isinstance(item, (list, tuple)) and len(item) == samples and _is_one_per_sample(item):
            return _like(item, item[start:stop])
        return _rebuild(item, cut)

    return cut(batch)


def beginning(batch: Any, most: int | None) -> Any:
    """The first samples of a batch, no more than so many; all of it if that is None or the batch cannot be cut."""
    samples = samples_in(batch)
    if samples is not None and most is not None:
        with contextlib.suppress(Exception):  # which a replay of the whole batch tells
            return part(batch, samples, 0, most)
    return batch


def cloned(batch: Any) -> Any:
    """A batch with containers and tensors of its own. A tensor that occurs twice still does."""
    clones: dict[int, Tensor] = {}

    def clone(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return _rebuild(item, clone)
        if id(item) not in clones:
            clones[id(item)] = item.detach().clone().requires_grad_(item.requires_grad)
        return clones[id(item)]

    return clone(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch whose tensors are on a device."""
    return batch.to(device) if isinstance(batch, Tensor) else _rebuild(batch, lambda item: moved(item, device))


def is_small(batch: Any, most: int) -> bool:
    """Whether a batch can go into a checkpoint: primitives and tensors, of at most so many bytes."""
    if type(batch) is dict:
        parts = [*batch.keys(), *batch.values()]
    elif type(batch) in (list, tuple):
        parts = list(batch)
    else:
        parts = []
        if batch is not None and type(batch) not in (Tensor, bool, int, float, str, bytes):
            return False
    return all(is_small(each, most) for each in parts) and sum(t.nbytes for t in tensors_in(batch)) <= most


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
    if isinstance(item, tuple):
        return tuple(values)  # torch.Size and its relatives: a tuple will do or the step says so
    new = copy.copy(item)
    new[:] = values
    return new


def _is_one_per_sample(item: list[Any] | tuple[Any, ...]) -> bool:
    if isinstance(item, tuple):
        return type(item) is tuple and all(isinstance(value, (str, bytes)) for value in item)
    return not any(isinstance(value, (Tensor, Mapping, list, tuple)) or _is_dataclass(value) for value in item)


def _is_dataclass(item: Any) -> bool:
    return dataclasses.is_dataclass(item) and not isinstance(item, type)
