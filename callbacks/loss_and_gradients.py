"""The loss and the gradient norm of every optimizer step, kept on the device until they are looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynwatch.callbacks.base import Monitor
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.optimizer_step import StepGradients, gradient_scaler
from dynwatch.callbacks.stream import Stream
from dynwatch.rules import tags

LOSS_SUM, LOSS_COUNT, FIRST_BAD = "loss_sum", "loss_count", "first_bad"


class LossAndGradients:
    """Collects what belongs to one optimizer step and emits it at its end."""

    def __init__(self) -> None:
        self.bad_names: dict[int, list[str]] = {}  # by step: names that FIRST_BAD points into
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._unlooked: list[StepGradients] = []  # where looking at them would wait for the device
        self._note = ""  # what is known in words about this step's gradients

    def add_gradients(self, seen: StepGradients, look: bool) -> bool:
        """Take in what one optimizer is about to step; True if a look has found it not finite."""
        self._norms.append(seen.total)
        if not look:
            self._unlooked.append(seen)
        elif seen.nonfinite:
            self._note = self._note or f"gradient of {seen.nonfinite}"
            return True
        return False

    def add_loss(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        """Take in what `training_step` returned for one micro-batch."""
        loss = loss_in(outputs)
        if loss is not None:
            # Lightning has divided it for accumulation in automatic optimization only.
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach().float().reshape(()) * scale)

    def emit(self, source: Monitor, trainer: Trainer) -> bool:
        """Hand everything to the stream; False if there was no loss on the only rank."""
        stream, step = Stream.of(trainer), Stream.step(trainer)
        has_loss = bool(self._losses) or trainer.world_size > 1
        if has_loss:
            device = self._losses[0].device if self._losses else trainer.strategy.root_device
            total = torch.stack(self._losses).sum() if self._losses else torch.zeros((), device=device)
            values = torch.stack([total, torch.full_like(total, len(self._losses))])
            stream.emit(source, step, [LOSS_SUM, LOSS_COUNT], values, mean_over_ranks=True)
        if self._norms:
            total = torch.stack([norm.to(self._norms[0]) for norm in self._norms]).square().sum().sqrt()
            names, norms = [tags.GRADIENT], [total]
            if self._unlooked:
                bad = torch.cat([~seen.norms.isfinite().to(total.device) for seen in self._unlooked])
                names.append(FIRST_BAD)
                norms.append(bad.to(total).argmax().to(total))
                self.bad_names[step] = [name for seen in self._unlooked for name in seen.names]
            notes = {tags.GRADIENT: self._note} if self._note else {}
            stream.emit(source, step, names, torch.stack(norms), notes=notes)
        if gradient_scaler(trainer) is not None:
            stream.emit(source, step, [tags.SCALER], torch.ones(1))
        self._losses.clear()
        self._norms.clear()
        self._unlooked.clear()
        self._note = ""
        return has_loss

    @staticmethod
    def finish(readings: dict[str, float]) -> None:
        """Turn the raw sums of the loss into its mean, in place."""
        count = readings.pop(LOSS_COUNT, None)
        if count is not None:
            total = readings.pop(LOSS_SUM)
            if count:
                readings[tags.LOSS] = total / count

    def note(self, step: int, readings: Mapping[str, float]) -> Mapping[str, str]:
        """What is now known of a bad gradient that could not be looked at in time."""
        first_bad, names = readings.get(FIRST_BAD), self.bad_names.pop(step, [])
        if first_bad is not None and names and not math.isfinite(readings[tags.GRADIENT]):
            return {tags.GRADIENT: f"gradient of {names[int(first_bad)]} first"}
        return {}


def loss_in(outputs: Any) -> Tensor | None:
    """The loss in what `training_step` returned, if it is there."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
