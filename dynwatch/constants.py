"""What depends on the device alone: its widest float, and small constants that stay there.

Each copy to an accelerator waits for it, so constants are copied once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def on_device(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a tensor; the same tensor for the same arguments, so it must not be changed in place.

    Args:
        values: The entries.
        device: Where the tensor is to be.
        dtype: Its type.

    Returns:
        [len(values)].

    Example:
        >>> on_device((2, 0), torch.device("cpu"))
        tensor([2, 0])
    """
    return torch.tensor(values, dtype=dtype, device=device)


def widest_float(device: torch.device) -> torch.dtype:
    """The most exact float type that a device has: float32 on Apple's, float64 elsewhere.

    Example:
        >>> widest_float(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64
