"""What the run's plan says: how much of the budget is spent, and the lowest learning rate still to come."""

from __future__ import annotations

import copy
import logging
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

from dynwatch.callbacks.harmless import is_harmless
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


class SchedulerSteps:
    """How often Lightning steps a schedule.

    That is after an epoch, or after an optimizer step, if the number of epochs, or of batches in this epoch, is a
    multiple of the schedule's `frequency`.
    """

    def __init__(self, trainer: Trainer, by_epoch: bool, frequency: int) -> None:
        self._by_epoch, self._frequency = by_epoch, frequency
        self._batches, self._window = trainer.num_training_batches, trainer.accumulate_grad_batches
        known = 0 < self._batches < math.inf
        self._per_epoch = math.ceil(self._batches / self._window) if known else 0  # optimizer steps; 0: not known

    def taken(self, step: int, epoch: int) -> int:
        """How often before the update of this optimizer step in this epoch, both counted from 0."""
        if self._by_epoch:
            return epoch // self._frequency
        every = self._frequency // math.gcd(self._frequency, self._window)  # optimizer steps
        if not self._per_epoch:
            return step // every
        epochs, rest = divmod(step, self._per_epoch)
        whole = self._per_epoch // every
        if self._batches % self._window:  # the last window is shorter
            whole = (self._per_epoch - 1) // every + (self._batches % self._frequency == 0)
        return int(epochs * whole + rest // every)

    def planned(self, trainer: Trainer) -> int | None:
        """How often in the whole run; None without a planned end."""
        ends = []
        if trainer.max_epochs and trainer.max_epochs > 0 and (self._by_epoch or self._per_epoch):
            ends.append(self.taken(trainer.max_epochs * self._per_epoch, trainer.max_epochs))
        if trainer.max_steps > 0:
            # Without a known length each step may end an epoch.
            ends.append(self.taken(trainer.max_steps, trainer.max_steps // max(self._per_epoch, 1)))
        return min(ends, default=None)


class PlannedRates:
    """The lowest learning rate still to come, from trying out copies of the run's schedulers.

    Only torch's own schedulers are tried out, and of those with a function of the user's only where calling it can
    leave nothing behind: another's `step` may do anything, and a function may count its calls. With one that is
    not tried, is stepped by the user (manual optimization) or has too many steps, a decay to zero is assumed to come.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._plans: list[tuple[SchedulerSteps, int, list[float]]] = []  # taken before, lowest from each one on
        self._lowest_by_plateau: float | None = None
        self._unknown = False
        known = {id(thing): thing for thing in (trainer, pl_module)}
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                self._lowest_by_plateau = max(self._lowest_by_plateau or 0.0, *map(float, scheduler.min_lrs))
                continue
            steps, rates = SchedulerSteps(trainer, config.interval == "epoch", config.frequency), None
            # A checkpoint of within a batch end has not counted that batch yet, except as a global step.
            taken = steps.taken(trainer.global_step, trainer.current_epoch)
            try:
                planned = steps.planned(trainer) if pl_module.automatic_optimization else None
                if planned is not None and may_be_tried(scheduler):
                    with _generators_kept():  # a function of the user's may draw
                        rates = rates_to_come(scheduler, max(planned - taken, 0), known)
            except Exception as error:
                log.debug("A copy of %s could not be stepped: %s", type(scheduler).__name__, error)
            if rates is None:
                self._unknown = True
            else:
                lowest = list(accumulate(reversed(rates), min))[::-1]
                self._plans.append((steps, taken, lowest))

    def lowest(self, trainer: Trainer, now: float) -> float:
        """The lowest rate from this step to the end of the run, given the rate now."""
        if self._unknown:
            return 0.0
        at = (Stream.step(trainer), trainer.current_epoch)
        lows = [low[min(max(steps.taken(*at) - before, 0), len(low) - 1)] for steps, before, low in self._plans]
        if self._lowest_by_plateau is not None:
            lows.append(self._lowest_by_plateau)
        return min(max(lows, default=now), now)


def rates_to_come(scheduler: Any, count: int, known: dict[int, Any]) -> list[float] | None:
    """The largest learning rate over the parameter groups, now and after each of `count` steps.

    Args:
        scheduler: A scheduler that `may_be_tried`; it and its optimizer are left as they are.
        count: Steps to try.
        known: Objects by `id` that a copy must share rather than copy.

    Returns:
        [count + 1] rates, the later ones thinned out for a long `LambdaLR`; None if they cannot be told.
    """
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


@contextmanager
def _generators_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def may_be_tried(scheduler: Any) -> bool:
    """Whether stepping a copy of a scheduler can leave nothing behind."""
    functions = [*getattr(scheduler, "lr_lambdas", ()), getattr(scheduler, "_scale_fn_custom", None)]
    inner: Sequence[Any] = getattr(scheduler, "_schedulers", ())
    return (
        type(scheduler).__module__ == lr_scheduler.__name__
        and all(function is None or is_harmless(function) for function in functions)
        and all(map(may_be_tried, inner))
    )
