"""What rules must know of a run besides its loss and gradients: learning rate, budget, metrics, idle parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynwatch.callbacks.base import Monitor
from dynwatch.callbacks.idle_parameters import IdleParameters
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.optimizer_step import gradients_out_of_reach
from dynwatch.callbacks.schedule import PlannedRates, spent_share
from dynwatch.callbacks.stream import Stream, logging_interval
from dynwatch.callbacks.user_metrics import UserMetrics
from dynwatch.rules import tags

_SUM, _COUNT = "user_sum:", "user_count:"


class RunContext:
    """Emits hidden readings for the rules.

    Args:
        trainer: The trainer, with training about to start.
        pl_module: The module.
        reads: The tags that the rules look at; metrics of the user are looked up only if they are among these.
        validation_loss: Name of the user's validation loss; None picks it by its name.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, reads: Collection[str], validation_loss: str | None
    ) -> None:
        self._metrics = UserMetrics(
            tag for tag in dict.fromkeys(reads) if tag not in tags.OWN and not tag.endswith("/")
        )
        self._wants_validation = tags.VAL_LOSS in reads
        self._validation_loss = validation_loss
        self._rates = PlannedRates(trainer, pl_module)
        self._idle = IdleParameters(pl_module)
        self._idle.told = gradients_out_of_reach(trainer) is not None  # what moves cannot be told then
        self._lr: list[float | Tensor] = []

    def before_step(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        """Note an optimizer's learning rate before its scheduler changes it, and what it moves."""
        self._lr += [group["lr"] for group in optimizer.param_groups if "lr" in group]
        self._idle.moved(parameters)

    def emit_step(self, source: Monitor, trainer: Trainer) -> None:
        """At the end of an optimizer step."""
        stream, step = Stream.of(trainer), Stream.step(trainer)
        share = spent_share(trainer)
        names, values = [tags.PROGRESS], [math.nan if share is None else share]
        rates, self._lr = self._lr, []
        plain = [float(lr) for lr in rates if not isinstance(lr, Tensor)]
        if plain and len(plain) == len(rates):
            now = max(plain)
            names += [tags.LR, tags.LR_LOW]
            values += [now, self._rates.lowest(trainer, now)]
        elif rates:  # on the device for a captured optimizer; a look would wait for it
            held = torch.stack([torch.as_tensor(lr, dtype=torch.float32).reshape(()) for lr in rates])
            stream.emit(source, step, [tags.LR], held.max().reshape(1))
        stream.emit(source, step, names, torch.tensor(values, dtype=torch.float64))
        if not self._idle.told and (step + 1) % logging_interval(trainer) == 0:
            share = self._idle.share
            self._idle.told = share == 0
            notes = {tags.IDLE: self._idle.where} if share else {}
            stream.emit(source, step, [tags.IDLE], torch.tensor([share]), notes=notes)
        if self._metrics.names:
            found = self._metrics.of_step(trainer)
            self._emit_metrics(source, trainer, step, found, self._metrics.names)

    def emit_epoch(self, source: Monitor, trainer: Trainer) -> None:
        """When a training epoch is over and its metrics are computed."""
        if self._metrics.names:
            # Lightning logs them at the epoch's last step.
            step = max(Stream.step(trainer) - 1, 0)
            self._emit_metrics(source, trainer, step, self._metrics.of_epoch(trainer), self._metrics.names)

    def emit_validation(self, source: Monitor, trainer: Trainer) -> None:
        """When a validation pass is over; every rank must call this."""
        found, names = self._metrics.of_epoch(trainer), list(self._metrics.names)
        if self._wants_validation:
            names.append(tags.VAL_LOSS)
            name = self._validation_loss or tags.pick_validation_loss(trainer._logger_connector._callback_metrics)
            if name:
                value = self._metrics.of_epoch(trainer, [name]).get(name, found.get(name))
                if value is not None:
                    found[tags.VAL_LOSS] = value
        if names:
            self._emit_metrics(source, trainer, Stream.step(trainer), found, names)

    @staticmethod
    def _emit_metrics(
        source: Monitor, trainer: Trainer, step: int, found: Mapping[str, Tensor], names: Iterable[str]
    ) -> None:
        stream = Stream.of(trainer)
        # A metric that is logged on one rank only must not part the ranks: all emit all names, with a count.
        kept = list(names) if trainer.world_size > 1 else [name for name in names if name in found]
        kept = [name for name in kept if name not in stream.series]  # dynwatch's own, seen through Lightning
        if not kept:
            return
        device = trainer.strategy.root_device
        values: list[Any] = []
        for name in kept:
            value = found.get(name)
            values += [
                torch.zeros((), device=device) if value is None else value.detach().to(device).float().reshape(())
            ]
        counts = torch.tensor([float(name in found) for name in kept], device=device)
        raw = [_SUM + name for name in kept] + [_COUNT + name for name in kept]
        stream.emit(source, step, raw, torch.cat([torch.stack(values), counts]), mean_over_ranks=True)

    @staticmethod
    def finish(readings: dict[str, float]) -> list[str]:
        """Turn raw values into readings, in place; names of the user's metrics among them."""
        if math.isnan(readings.get(tags.PROGRESS, 0.0)):
            del readings[tags.PROGRESS]
        names = [tag.removeprefix(_COUNT) for tag in readings if tag.startswith(_COUNT)]
        for name in names:
            total, count = readings.pop(_SUM + name), readings.pop(_COUNT + name)
            if count:
                readings[name] = total / count
        return names
