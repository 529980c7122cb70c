"""The gradients of one optimizer at one step: measured once, shared by all members that want them."""

from __future__ import annotations

import functools
import math
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from dynwatch import gradients
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.constants import on_device


def parameter_names(module: Module) -> dict[int, str]:
    """Name of each parameter by its `id`; a tied parameter has the first of its names."""
    # torch.compile wraps a module and puts this component into its parameters' names.
    return {id(p): name.replace("_orig_mod.", "") for name, p in module.named_parameters()}


class StepGradients:
    """Names, parameters and gradient norms of what one optimizer is about to step.

    Attributes:
        names: Names of the parameters that have a gradient; one that the module does not hold is
            called `optimizer.<position>`.
        parameters: The parameters themselves.
        norm_type: The p of the norms.
        norms: [n_parameters] p-norms of the gradients, on their device.
        failure: What went wrong on this rank alone. The other ranks have got NaN for sharded gradients
            and go on to the next collective, so this one has NaN and goes on too; whoever uses these
            gradients raises the failure when no collective is left.
    """

    _latest: ClassVar[WeakKeyDictionary[Trainer, dict[tuple[int, float], StepGradients]]] = WeakKeyDictionary()
    _names: ClassVar[WeakKeyDictionary[Module, dict[int, str]]] = WeakKeyDictionary()

    def __init__(self, names: list[str], parameters: list[Parameter], norm_type: float, alone: bool = True) -> None:
        self.names = names
        self.parameters = parameters
        self.norm_type = norm_type
        self.failure: Exception | None = None
        self._alone = alone
        held = [p.grad for p in parameters if p.grad is not None]
        try:
            self.norms = gradients.tensor_norms(held, norm_type)
        except Exception as error:
            if alone:
                raise
            self.failure = error
            self.norms = torch.full((len(held),), math.nan, dtype=torch.float64, device=held[0].device)

    @functools.cached_property
    def total(self) -> Tensor:
        """The norm over all parameters, a scalar tensor."""
        return gradients.combine_norms(self.norms, self.norm_type)

    @functools.cached_property
    def nonfinite(self) -> gradients.NonFinite | None:
        """What is NaN or Inf in the gradients; looks at the norm on the host and searches if it is not finite."""
        if math.isfinite(self.total.item()):
            return None
        named = zip(self.names, self.parameters, strict=True)
        try:
            return gradients.find_nonfinite((name, p.grad) for name, p in named if p.grad is not None)
        except Exception as error:
            if self._alone:
                raise
            self.failure = self.failure or error
            return None

    @property
    def free_to_look(self) -> bool:
        """Whether reading a value costs no synchronisation, because it is on the host already."""
        return self.norms.device.type == "cpu"

    @property
    def entries(self) -> int:
        """How many gradient entries there are."""
        return sum(p.numel() for p in self.parameters)

    @functools.cached_property
    def suspect_entries(self) -> Tensor:
        """For when a search would have to wait for the device: an upper bound of the non-finite entries.

        It is the number of entries of all parameters whose norm is not finite, a scalar on the device.
        """
        bad = ~self.norms.isfinite()
        sizes = on_device(tuple(p.numel() for p in self.parameters), self.norms.device, self.norms.dtype)
        return (sizes * bad).sum()

    @classmethod
    def of(
        cls, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, norm_type: float | None = 2.0
    ) -> StepGradients | None:
        """The gradients that `optimizer` sees now; None if there are none.

        Args:
            trainer: The trainer.
            pl_module: The module whose parameter names are used.
            optimizer: The optimizer that is about to step.
            norm_type: The p; None takes whichever was measured already on this step, else 2.
        """
        cache = cls._latest.setdefault(trainer, {})
        if norm_type is None:
            norm_type = next((p for owner, p in cache if owner == id(optimizer)), 2.0)
        found = cache.get((id(optimizer), norm_type))
        if found is None:
            with_gradient = [
                (i, p)
                for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
                if p.grad is not None
            ]
            if not with_gradient:
                return None
            known = cls._names.get(pl_module, {})
            if any(id(p) not in known for _, p in with_gradient):
                known = cls._names[pl_module] = parameter_names(pl_module)
            names = [known.get(id(p), f"optimizer.{i}") for i, p in with_gradient]
            found = cache[id(optimizer), norm_type] = cls(
                names, [p for _, p in with_gradient], norm_type, alone=trainer.world_size == 1
            )
        return found

    @classmethod
    def forget(cls, trainer: Trainer) -> None:
        """Drop what was measured, because gradients change or the batch has ended."""
        cls._latest.pop(trainer, None)


def gradient_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """The scaler that fp16 training uses, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale(trainer: Trainer) -> Tensor | float:
    """The factor by which a gradient scaler has multiplied gradients that are not unscaled yet."""
    # The public get_scale() would wait for the device.
    scale = getattr(gradient_scaler(trainer), "_scale", None)
    return 1.0 if scale is None else scale


def gradients_out_of_reach(trainer: Trainer) -> str | None:
    """Why `p.grad` does not hold the gradient under this trainer's strategy; None if it does."""
    strategy = type(trainer.strategy).__name__
    if strategy.startswith("DeepSpeed"):
        return f"{strategy} keeps gradients in buffers of its own, not in p.grad"
    if strategy.startswith("FSDPStrategy"):
        return f"{strategy} (FSDP1) holds shards of flattened gradients; use ModelParallelStrategy (FSDP2)"
    return None
