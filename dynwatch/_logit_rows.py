"""Logits and tangents as rows of the widest float, a few rows at a time, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dynwatch.constants import widest_float

# Numbers in one temporary: 4 MiB of float64, of which a handful live at a time.
ELEMENTS = 2**19


def check_floats(argument: str, value: Tensor) -> None:
    """Raise a TypeError unless it is a tensor of real floating-point numbers."""
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        what = f"dtype {value.dtype}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise TypeError(f"{argument} has {what} and must be a tensor of real floats: pass it before any rounding.")


def check_alike(logits: Tensor, tangents: Tensor) -> None:
    """Raise unless both are float tensors of one shape on one device."""
    check_floats("logits", logits)
    check_floats("tangents", tangents)
    if tangents.shape != logits.shape:
        raise ValueError(
            f"tangents has shape {tuple(tangents.shape)} and must have that of logits, {tuple(logits.shape)}: it is "
            "their derivative along the step."
        )
    if tangents.device != logits.device:
        raise ValueError(f"tangents is on {tangents.device} and must be where logits is, on {logits.device}; move it.")


def check_classes(argument: str, value: Tensor) -> None:
    """Raise a ValueError unless the last dimension has two classes or more."""
    if value.ndim == 0 or value.shape[-1] < 2:
        raise ValueError(
            f"{argument} has shape {tuple(value.shape)} and must have 2 classes or more in its last dimension; for "
            "one logit a label use radius_sigmoid (and batch_radius_sigmoid, predicted_loss_sigmoid)."
        )


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raise unless the mask is boolean and of this shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        what = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise TypeError(
            f"mask has {what} and must be boolean, True where a sample counts: pass targets != ignore_index."
        )
    if mask.shape != shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and must have one entry a sample, shape {tuple(shape)}: for softmax "
            "that of logits without the classes."
        )


def wide(value: Tensor) -> Tensor:
    """The values in the widest float of their device, without a graph."""
    return value.detach().to(widest_float(value.device))


def row_slices(rows: int, classes: int) -> Iterator[slice]:
    """Slices of rows that together have `ELEMENTS` numbers at the most, but always one row."""
    size = max(1, ELEMENTS // max(classes, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def by_rows(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of wide [rows, K], to [rows], applied to [..., K] in slices; [...]."""
    first = tensors[0]
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    rows = flat[0].shape[0]
    out = torch.empty(rows, dtype=widest_float(first.device), device=first.device)
    for part in row_slices(rows, first.shape[-1]):
        out[part] = function(*(wide(tensor[part]) for tensor in flat))
    return out.reshape(first.shape[:-1])
