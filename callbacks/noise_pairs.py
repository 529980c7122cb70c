"""Gradients of two batch sizes in one step, for the gradient noise scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.optimizer_step import loss_scale
from dynwatch.gradients import combine_norms, tensor_norms


class NoisePairs:
    """Finds a small-batch gradient next to the one that is stepped.

    Where gradients are accumulated, the small batch is the first micro-batch: its gradient is all that
    there is after the first backward, so one norm tells it, and no copy is needed. Under DDP without
    accumulation it is the rank's own batch, seen by hooks on the leaves before gradients are averaged.
    """

    TAGS = ("small_square", "big_square", "inverse_small", "inverse_big")

    def __init__(self, batch_size: int | None) -> None:
        self._batch_size = batch_size
        self.size_unknown = False
        self._handles: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self._backwards = 0
        self._squares: list[Tensor] = []
        self._small_square: Tensor | None = None
        self._inverse_sizes: list[float] = []
        self._big_norm: Tensor | None = None

    @staticmethod
    def reason_against(trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Why this run cannot give a pair, or None if it can."""
        if not pl_module.automatic_optimization:
            return "in manual optimization it is not known which backward passes make up one gradient"
        if trainer.accumulate_grad_batches > 1:
            return None
        if trainer.world_size > 1:
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                return None
            return f"{type(trainer.strategy).__name__} averages gradients before a rank's own can be seen"
        return "it needs gradients of two batch sizes: accumulate gradients (accumulate_grad_batches) or use DDP"

    def before_backward(
        self, trainer: Trainer, pl_module: LightningModule, guard: Callable[[Callable[[], None]], object]
    ) -> None:
        if trainer.accumulate_grad_batches > 1 or self.reason_against(trainer, pl_module):
            return

        def see(gradient: Tensor) -> None:
            guard(lambda: self._squares.append(tensor_norms([gradient]).square()))

        self.release()
        self._handles = [p.register_hook(see) for p in pl_module.parameters() if p.requires_grad]  # type: ignore[no-untyped-call]

    def after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._backwards += 1
        if self._backwards > 1 or self.reason_against(trainer, pl_module):
            return
        share = trainer.accumulate_grad_batches / loss_scale(trainer)  # Lightning divided the loss by it
        if self._handles:
            self.release()
            self._small_square = torch.cat(self._squares).sum() * share**2
        else:
            held = [p.grad for g in trainer.optimizers[0].param_groups for p in g["params"] if p.grad is not None]
            self._small_square = (combine_norms(tensor_norms(held)) * share) ** 2

    def before_step(self, total: Tensor) -> None:
        """Take the 2-norm of the gradient that is stepped."""
        self._big_norm = total

    def end_batch(self, batch: Any) -> None:
        size = self._batch_size or samples_in(batch)
        self.size_unknown = size is None
        self._inverse_sizes.append(1.0 / size if size else torch.nan)

    def take(self, trainer: Trainer) -> Tensor | None:
        """The pair of this step as [4] values named by `TAGS`, to be averaged over the ranks."""
        small, big, sizes, backwards = self._small_square, self._big_norm, self._inverse_sizes, self._backwards
        self._reset()
        # A shorter window at an epoch's end is divided by the full count too: its gradient is no mean.
        if small is None or big is None or not backwards == len(sizes) == trainer.accumulate_grad_batches:
            return None
        sharded = trainer.world_size > 1 and not isinstance(trainer.strategy.model, DistributedDataParallel)
        inverse_small = sizes[0] / (trainer.world_size if sharded else 1)
        inverse_big = sum(sizes) / len(sizes) ** 2 / trainer.world_size
        sizes_here = (torch.full_like(small, inverse) for inverse in (inverse_small, inverse_big))
        return torch.stack([small, big**2, *sizes_here])

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def samples_in(batch: Any) -> int | None:
    """The first dimension of the first tensor in a batch; None if there is no tensor with one.

    Example:
        >>> samples_in({"x": [torch.zeros(7, 3)]})
        7
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim and batch.shape[0] else None
    if isinstance(batch, Mapping):
        inside = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        inside = list(batch)
    elif dataclasses.is_dataclass(batch):
        inside = [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    else:
        inside = list(vars(batch).values()) if hasattr(batch, "__dict__") else []
    return next((size for size in map(samples_in, inside) if size), None)
