"""Grouping of parameters by layer, from their names alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# With fewer curves than this a model looks like one lump; then the next deeper level is merged instead.
FEWEST_TELLING_GROUPS = 8


@dataclass(frozen=True)
class LayerGroups:
    """Which layer each parameter belongs to.

    Attributes:
        names: The layers, in the order of their first parameter.
        index: For each parameter the position of its layer in `names`, or -1 if it belongs to none.

    Example:
        >>> groups = LayerGroups(names=("conv", "head"), index=(0, 0, 1))
        >>> groups.names[groups.index[2]]
        'head'
    """

    names: tuple[str, ...]
    index: tuple[int, ...]


def group_by_layer(
    parameter_names: Sequence[str],
    *,
    depth: int | None = None,
    max_groups: int = 32,
    patterns: Sequence[str] = (),
) -> LayerGroups:
    """Group parameters into layers by cutting their names at a depth.

    A parameter belongs to the module that holds it: `net.h.0.attn.weight` to `net.h.0.attn`, and at
    `depth=3` to `net.h.0`. Without a depth the deepest one is taken that gives at most `max_groups`
    layers. If that leaves fewer than eight although deeper names exist (a stack of 48 blocks), the
    next depth is taken. Wherever there are more than `max_groups` layers, neighbours in model order
    are merged, equally many at a time, and named `first..last`: every parameter stays in some layer.

    Args:
        parameter_names: Dotted names as `nn.Module.named_parameters` gives them.
        depth: Number of name components to keep; None chooses.
        max_groups: The most layers to return.
        patterns: Regular expressions; if given, only parameters in which one is found are grouped.

    Raises:
        ValueError: If `depth` or `max_groups` is below 1, a pattern is no regular expression, or a
            pattern matches no parameter.

    Example:
        >>> group_by_layer(["conv.weight", "conv.bias", "head.weight"])
        LayerGroups(names=('conv', 'head'), index=(0, 0, 1))
        >>> group_by_layer([f"h.{i}.w" for i in range(6)], max_groups=3, depth=2).names
        ('h.0..h.1', 'h.2..h.3', 'h.4..h.5')
    """
    if depth is not None and depth < 1:
        raise ValueError(f"depth={depth} must be at least 1, or None to have it chosen.")
    if max_groups < 1:
        raise ValueError(f"max_groups={max_groups} must be at least 1.")
    kept = _matching(parameter_names, patterns)
    modules = [_module_path(parameter_names[i]) for i in kept]
    cut_at = depth if depth is not None else _choose_depth(modules, max_groups)
    cuts = [".".join(path[:cut_at]) for path in modules]
    ordered = list(dict.fromkeys(cuts))
    names, position = _merge_neighbours(ordered, max_groups)
    index = [-1] * len(parameter_names)
    for i, cut in zip(kept, cuts, strict=True):
        index[i] = position[cut]
    return LayerGroups(tuple(names), tuple(index))


def _module_path(parameter_name: str) -> list[str]:
    path = parameter_name.split(".")
    return path[:-1] or path  # a parameter held by the root module is its own layer


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[int]:
    if not patterns:
        return list(range(len(names)))
    found: set[int] = set()
    for pattern in patterns:
        try:
            hits = {i for i, name in enumerate(names) if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"layers={pattern!r} is not a regular expression: {error}.") from error
        if not hits:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise ValueError(
                f"layers={pattern!r} matches none of the {len(names)} parameters. Names look like: {shown}."
            )
        found |= hits
    return sorted(found)


def _choose_depth(modules: Sequence[Sequence[str]], max_groups: int) -> int:
    deepest = max((len(path) for path in modules), default=1)
    counts = [len({tuple(path[:depth]) for path in modules}) for depth in range(1, deepest + 1)]
    within = [depth for depth, count in enumerate(counts, start=1) if count <= max_groups]
    depth = max(within, default=1)
    if depth < deepest and counts[depth - 1] < min(FEWEST_TELLING_GROUPS, max_groups):
        return depth + 1
    return depth


def _merge_neighbours(ordered: Sequence[str], max_groups: int) -> tuple[list[str], dict[str, int]]:
    at_a_time = math.ceil(len(ordered) / max_groups) if ordered else 1
    names: list[str] = []
    position: dict[str, int] = {}
    for start in range(0, len(ordered), at_a_time):
        run = ordered[start : start + at_a_time]
        position.update(dict.fromkeys(run, len(names)))
        names.append(run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}")
    return names, position
