"""What a block computes by itself on the way to its experts, seen by watching a few operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_TOP = {torch.topk: "topk", Tensor.topk: "topk", torch.max: "max", Tensor.max: "max"}
_ARGMAX = {torch.argmax, Tensor.argmax}
_SCATTER = {torch.scatter, Tensor.scatter, Tensor.scatter_}
_MULTINOMIAL = {torch.multinomial, Tensor.multinomial}
_SCORES: dict[Any, str] = {
    torch.softmax: "softmax",
    Tensor.softmax: "softmax",
    functional.softmax: "softmax",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    functional.sigmoid: "sigmoid",
}
_WATCHED = {*_TOP, *_ARGMAX, *_SCATTER, *_MULTINOMIAL, *_SCORES, functional.one_hot}


class OperationWatch(TorchFunctionMode):
    """Hands on the operations by which routers choose, while it is active.

    Args:
        found: Called with a name, the tensor, and how many scores it was made of (0 if that cannot be told): "topk" and
            "multinomial" the chosen experts [..., k], "topk.input" the scores that they are the largest of, "one_hot"
            the experts of which it was made, "scatter" what was scattered into, "softmax" and "sigmoid" what these
            gave; and "tokens" [E, C] where experts choose tokens.
        n_experts: E.

    Example:
        >>> with OperationWatch(lambda name, tensor, n_scores: print(name, tuple(tensor.shape)), n_experts=3):
        ...     _ = torch.randn(2, 3).topk(1)
        topk (2, 1)
        topk.input (2, 3)
    """

    def __init__(self, found: Callable[[str, Tensor, int], None], n_experts: int) -> None:
        super().__init__()
        self._found = found
        self._n_experts = n_experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _WATCHED:
            self._look(func, args, kwargs or {}, result)
        return result

    def _look(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = args[0] if args else kwargs.get("input")
        if not isinstance(given, Tensor):
            return
        if func in _TOP or func in _ARGMAX:
            self._look_at_top(func, given, args, kwargs, result)
        elif func in _MULTINOMIAL and given.shape[-1] == self._n_experts:
            self._found("multinomial", result, given.numel())
        elif func is functional.one_hot:
            if result.shape[-1] in (self._n_experts, self._n_experts + 1):
                self._found("one_hot", given, 0)
        elif result.dim() and result.shape[-1] == self._n_experts:
            self._found("scatter" if func in _SCATTER else _SCORES[func], result, result.numel())

    def _look_at_top(self, func: Any, given: Tensor, args: Any, kwargs: Any, result: Any) -> None:
        at = 2 if _TOP.get(func) == "topk" else 1
        dim = kwargs.get("dim", args[at] if len(args) > at else None)
        if not isinstance(dim, int):
            if at == 1:  # the largest of all
                return
            dim = -1
        dim %= max(given.dim(), 1)
        indices = result if func in _ARGMAX else result[1]
        if at == 1 and not kwargs.get("keepdim", len(args) > 2 and args[2]):
            indices = indices.unsqueeze(dim)
        if given.dim() and dim == given.dim() - 1 and given.shape[-1] == self._n_experts:
            self._found("topk", indices, given.numel())
            self._found("topk.input", given, given.numel())
        elif given.dim() == 2 and given.shape[1 - dim] == self._n_experts:
            self._found("tokens", indices if dim == 1 else indices.t(), given.numel())
        elif given.dim() == 3 and dim == 2 and given.shape[1] == self._n_experts:  # of each sequence of a batch
            starts = torch.arange(given.shape[0], device=given.device)[:, None, None] * given.shape[2]
            self._found("tokens", (indices + starts).transpose(0, 1).flatten(1), given.numel())
