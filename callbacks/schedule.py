"""What the run's plan says: how much of the budget is spent, and the lowest learning rate still to come."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.optim import lr_scheduler

from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.stream import Stream

log = logging.getLogger("dynwatch")

# Scheduler steps that are tried out in advance, a few microseconds each.
_MOST_STEPS = 50_000
# Of a schedule given as a function of the step, this many points are looked at.
_POINTS = 1000


def spent_share(trainer: Trainer) -> float | None:
    """Share of the planned steps or epochs that is spent at the end of this batch; None without a planned end."""
    shares = []
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    batches = trainer.num_training_batches
    if trainer.max_epochs and trainer.max_epochs > 0 and 0 < batches < math.inf:
        done = trainer.current_epoch * batches + trainer.fit_loop.epoch_loop.batch_idx + 1
        shares.append(done / (trainer.max_epochs * batches))
    return min(max(shares), 1.0) if shares else None


class PlannedRates:
    """The lowest learning rate still to come, from trying out copies of the run's schedulers.

    Only torch's own schedulers are tried out: another's `step` may do anything. With one that is unknown,
    is stepped by the user (manual optimization) or has too many steps, a decay to zero is assumed to come.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = (Stream.step(trainer), trainer.current_epoch)
        self._plans: list[tuple[bool, int, list[float]]] = []  # by epoch?, frequency, lowest from each point on
        self._lowest_by_plateau: float | None = None
        self._unknown = False
        known = {id(thing): thing for thing in (trainer, pl_module)}
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                self._lowest_by_plateau = max(self._lowest_by_plateau or 0.0, *map(float, scheduler.min_lrs))
                continue
            by_epoch = config.interval == "epoch"
            rates = None
            try:
                count = self._steps_to_come(trainer, by_epoch) if pl_module.automatic_optimization else None
                if count is not None:
                    rates = rates_to_come(scheduler, math.ceil(count / config.frequency), known)
            except Exception as error:
                log.debug("A copy of %s could not be stepped: %s", type(scheduler).__name__, error)
            if rates is None:
                self._unknown = True
            else:
                lowest = list(accumulate(reversed(rates), min))[::-1]
                self._plans.append((by_epoch, config.frequency, lowest))

    @staticmethod
    def _steps_to_come(trainer: Trainer, by_epoch: bool) -> int | None:
        """Scheduler intervals left in the budget; None without a planned end."""
        share = spent_share(trainer) if trainer.global_step else 0.0
        batches = trainer.num_training_batches
        planned = []
        if trainer.max_epochs and trainer.max_epochs > 0:
            per_epoch = 1.0 if by_epoch else math.ceil(batches / trainer.accumulate_grad_batches)
            planned.append(trainer.max_epochs * per_epoch)
        if trainer.max_steps > 0:
            per_interval = math.ceil(batches / trainer.accumulate_grad_batches) if by_epoch else 1
            planned.append(trainer.max_steps / per_interval)
        left = min(planned, default=math.inf) * (1 - (share or 0.0))
        return math.ceil(left) if left < math.inf else None

    def lowest(self, trainer: Trainer, now: float) -> float:
        """The lowest rate from this step to the end of the run, given the rate now."""
        if self._unknown:
            return 0.0
        step, epoch = Stream.step(trainer) - self._start[0], trainer.current_epoch - self._start[1]
        lows = [low[min((epoch if by_epoch else step) // every, len(low) - 1)] for by_epoch, every, low in self._plans]
        if self._lowest_by_plateau is not None:
            lows.append(self._lowest_by_plateau)
        return min(max(lows, default=now), now)


def rates_to_come(scheduler: Any, count: int, known: dict[int, Any]) -> list[float] | None:
    """The largest learning rate over the parameter groups, now and after each of `count` steps.

    Args:
        scheduler: A scheduler; it and its optimizer are left as they are.
        count: Steps to try.
        known: Objects by `id` that a copy must share rather than copy.

    Returns:
        [count + 1] rates, the later ones thinned out for a long `LambdaLR`; None if they cannot be told.
    """
    if not _is_torchs(scheduler):
        return None
    base = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    if type(scheduler) is lr_scheduler.LambdaLR and count > _POINTS:
        stride = math.ceil(count / _POINTS)
        first = scheduler.last_epoch
        points = [
            max(float(b) * float(f(first + at)) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True))
            for at in range(0, count + 1, stride)
        ]
        return [point for point in points for _ in range(stride)]
    if count > _MOST_STEPS:
        return None
    groups = [
        {"params": [torch.zeros(())], **{k: v for k, v in group.items() if k != "params"}}
        for group in scheduler.optimizer.param_groups
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr
    trial = copy.deepcopy(scheduler, {**known, id(scheduler.optimizer): optimizer})
    rates = [max(base)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer steps between these steps, and that is meant
        for _ in range(count):
            try:
                trial.step()
            except ValueError:  # OneCycleLR refuses to go past its end, and so will the run
                break
            rates.append(max(float(group["lr"]) for group in optimizer.param_groups))
    return rates


def _is_torchs(scheduler: Any) -> bool:
    inner: Sequence[Any] = getattr(scheduler, "_schedulers", ())
    return type(scheduler).__module__ == lr_scheduler.__name__ and all(map(_is_torchs, inner))
