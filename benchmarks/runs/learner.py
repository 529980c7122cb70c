"""The LightningModule of most runs: a network, an objective, an optimizer, a schedule, and faults in the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

Batch = list[Tensor]
Objective = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]


class Learner(pl.LightningModule):
    """Trains a network in the usual way.

    Args:
        net: The network.
        objective: Gives the loss of a batch, and metrics that are logged in validation as `val_<name>`.
        optimizer: Makes the optimizer from parameters.
        schedule: Makes a scheduler, stepped each batch, from the optimizer and the number of steps.
        change: Changes a training batch, given the share of the run that is over.
        trained: Which parameters of the network the optimizer gets; None: all.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        change: Callable[[Batch, float], Batch] | None = None,
        trained: Callable[[Any], Iterable[nn.Parameter]] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self._objective, self._optimizer, self._schedule = objective, optimizer, schedule
        self._change, self._trained = change, trained

    @property
    def share(self) -> float:
        """The share of the run's optimizer steps that is over."""
        return self.trainer.global_step / self.trainer.estimated_stepping_batches

    def training_loss(self, batch: Batch) -> Tensor:
        if self._change:
            batch = self._change(batch, self.share)
        loss, _ = self._objective(self.net, batch)
        self.log("train_loss", loss)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.training_loss(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, metrics = self._objective(self.net, batch)
        self.log("val_loss", loss)
        self.log_dict({f"val_{name}": value for name, value in metrics.items()})

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self._trained(self.net) if self._trained else self.net.parameters())
        if self._schedule is None:
            return optimizer
        scheduler = self._schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# --- objectives


def classify(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of classes."""
    x, y = batch
    logits = net(x)
    return functional.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}


def predict_next(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of each next symbol."""
    (text,) = batch
    return functional.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()), {}


def regress(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error."""
    x, y = batch
    return functional.mse_loss(net(x), y), {}


def reconstruct(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the input itself."""
    x = batch[0].flatten(1)
    return functional.mse_loss(net(x), x), {}


# --- optimizers and schedules


def sgd(lr: float, momentum: float = 0.9, **more: Any) -> MakeOptimizer:
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, **more)


def adam(lr: float, **more: Any) -> MakeOptimizer:
    return partial(torch.optim.Adam, lr=lr, **more)


def adamw(lr: float, **more: Any) -> MakeOptimizer:
    return partial(torch.optim.AdamW, lr=lr, **more)


def by_share(factor: Callable[[float], float]) -> MakeSchedule:
    """A learning rate that is multiplied by a function of the share of the run that is over."""
    return lambda optimizer, steps: LambdaLR(optimizer, lambda step: factor(step / steps))
