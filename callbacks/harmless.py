"""Whether a user's function may be called ahead of time."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

_WRITES = ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "DELETE_")
_DEEPEST = 4


def is_harmless(function: Any, depth: int = 0) -> bool:
    """Whether calling a function can leave nothing behind, as far as its code tells.

    True for a plain function, or a `functools.partial` of one, that writes to nothing but its local variables and can
    reach only numbers, texts, modules, classes and functions of the same kind. A method, a callable object and a
    closure over a list or a dict may keep count of their calls, so they are not called.

    Example:
        >>> is_harmless(lambda epoch: 0.95**epoch), is_harmless([].append)
        (True, False)
    """
    if depth > _DEEPEST:
        return False
    if isinstance(function, functools.partial):
        values = (*function.args, *function.keywords.values())
        return is_harmless(function.func, depth + 1) and all(_is_constant(value, depth) for value in values)
    if isinstance(function, types.BuiltinFunctionType):
        return isinstance(function.__self__, (types.ModuleType, type(None)))
    if not isinstance(function, types.FunctionType):
        return False
    try:
        held = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # a cell that is not filled yet
        return False
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for code in _codes(function.__code__):
        if any(step.opname.startswith(_WRITES) for step in dis.get_instructions(code)):
            return False
        held += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    return all(value is function or _is_constant(value, depth) for value in held)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_constant(value: Any, depth: int) -> bool:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type, types.ModuleType)):
        return True
    if isinstance(value, (tuple, frozenset)):
        return all(_is_constant(item, depth) for item in value)
    return callable(value) and is_harmless(value, depth + 1)
