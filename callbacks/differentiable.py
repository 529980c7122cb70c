"""How a model must run so that it can be differentiated more than once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dynwatch.callbacks.snapshot import CannotReplayError


@contextlib.contextmanager
def dense_gradients(module: nn.Module) -> Iterator[None]:
    """Embeddings with dense gradients, which those with sparse=True do not have and vectors are made of."""
    sparse = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
    for child in sparse:
        child.sparse = False
    try:
        yield
    finally:
        for child in sparse:
            child.sparse = True


@contextlib.contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Only kernels that have a second derivative: no fused attention, no cuDNN for LSTMs, nothing compiled."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(_has_weight_norm(child) for child in module.modules()):
            stack.enter_context(_WeightNormByFormula())
        if torch.backends.cudnn.enabled and any(isinstance(child, nn.RNNBase) for child in module.modules()):
            torch._C._set_cudnn_enabled(False)  # flags() would change the run's other settings, too
            stack.callback(torch._C._set_cudnn_enabled, True)
        stack.enter_context(eager(module, "compiled ones have no second derivative"))
        yield


@contextlib.contextmanager
def eager(module: nn.Module, why: str) -> Iterator[None]:
    """Nothing compiled: modules and functions run as they are written.

    Args:
        module: The module that will run.
        why: What is wrong with running it compiled, for the message.

    Raises:
        CannotReplayError: If a module is compiled and this torch cannot run it eagerly.
    """
    if not is_compiled(module) and "torch._dynamo.eval_frame" not in sys.modules:  # a function may be compiled as well
        yield
    elif hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    elif is_compiled(module):
        raise CannotReplayError(
            f"torch {torch.__version__} cannot run a compiled module eagerly, and {why}: update to torch 2.6 or newer."
        )
    else:
        yield


class _WeightNormByFormula(TorchFunctionMode):
    """Writes weight norms out: the second derivative of torch's own is wrong (2.13: `gradgradcheck` fails)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        direction, length, *dim = args
        return direction * (length / torch.norm_except_dim(direction, 2, *dim))


def _has_weight_norm(module: nn.Module) -> bool:
    old = (type(hook).__name__ == "WeightNorm" for hook in module._forward_pre_hooks.values())
    return type(module).__name__ == "_WeightNorm" or any(old)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or one of its children runs compiled."""
    return any(
        type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None or getattr(m, "_compiler_ctx", None)
        for m in module.modules()
    )


def compiled_frames() -> int:
    """How many frames torch.compile has looked at in this process so far; 0 where it has not been used."""
    counters: Any = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
    return sum(counters["frames"].values()) if "frames" in counters else 0
