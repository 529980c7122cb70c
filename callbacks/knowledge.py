"""What Linear and Conv modules give on a probe batch: which modules there are, and a fixed part of their outputs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from dynwatch.ranks import local_part

# Told of a use of a module: its name (".use2" after it at the second use in a pass), the module, what it gave.
See = Callable[[str, nn.Module, Tensor], None]

_MOST_NAMES = 8  # in a message


def readable_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The Linear and Conv modules by name, and Hugging Face's Conv1D, which is a Linear."""
    return {
        name.replace("_orig_mod.", ""): child
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, _ConvNd)) or type(child).__name__ == "Conv1D"
    }


def check_pattern(pattern: object) -> None:
    """Raise a ValueError that names `layers` unless this is a regular expression."""
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError) as error:
        raise ValueError(f"layers has {pattern!r}, which is not a regular expression: {error}.") from error


def matching(names: Sequence[str], patterns: Sequence[str] | None) -> set[str]:
    """The names in which one of the patterns is found; all if there are no patterns.

    Raises:
        ValueError: If a pattern is no regular expression or is found in no name.
    """
    if patterns is None:
        return set(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if re.search(pattern, name)}
        if not hits:
            more = len(names) - _MOST_NAMES
            shown = ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
            raise ValueError(f"layers={pattern!r} matches none of the {len(names)} Linear and Conv modules: {shown}.")
        found |= hits
    return found


def module_of(use: str) -> str:
    """The module's name in that of a use."""
    return re.sub(r"\.use\d+$", "", use)


def fixed_part(module: nn.Module, output: Tensor, max_samples: int, max_units: int) -> Tensor:
    """Samples and units of an output that are the same each time, evenly spaced, as a view.

    Args:
        module: Whose output it is: after a convolution channels come before positions, else last.
        output: [samples, channels, …] or [samples, …, channels], or without samples.
        max_samples: The most samples.
        max_units: The most units of a sample: channels, and of each as many positions as fit.

    Returns:
        [samples, channels, positions].
    """
    output = local_part(output)
    first = isinstance(module, _ConvNd)
    if output.dim() < (len(module.kernel_size) + 2 if first else 2):  # type: ignore[arg-type]
        output = output.unsqueeze(0)
    z = output.flatten(2) if first else output.reshape(len(output), -1, output.shape[-1]).transpose(1, 2)
    samples, channels, positions = (max(size, 1) for size in z.shape)
    some = _spacing(channels, max_units)
    kept = len(range(0, channels, some))
    return z[:: _spacing(samples, max_samples), ::some, :: _spacing(positions, max(max_units // kept, 1))]


def _spacing(size: int, most: int) -> int:
    return -(-size // most)


class Watched:
    """Shows what modules give, while it is entered.

    What `see` raises is kept for `check`, after the pass, because other ranks wait within it under FSDP2.

    Args:
        modules: The modules to look at, by name.
        see: Called at each use of one of them that gives a tensor of floats.
    """

    def __init__(self, modules: Mapping[str, nn.Module], see: See) -> None:
        self._modules = modules
        self._see = see
        self._uses: dict[str, int] = {}
        self._error: Exception | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(functools.partial(self._hook, name)))

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def check(self) -> None:
        """Raise what `see` has raised first."""
        if self._error is not None:
            raise self._error

    def _hook(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        use = self._uses[name] = self._uses.get(name, 0) + 1
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.is_nested:
            return
        try:
            self._see(name if use == 1 else f"{name}.use{use}", module, output.detach())
        except Exception as error:
            self._error = self._error or error
