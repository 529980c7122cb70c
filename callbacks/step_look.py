"""Looks at one step of the weights through the batch that it was taken on: shared by the monitor and the controller."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynwatch.callbacks.batches import beginning, cloned
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.optimizer_step import gradients_out_of_reach
from dynwatch.callbacks.replay import Replay, SkippedBatchError
from dynwatch.callbacks.step_reading import look, over_ranks, skipped, unknown
from dynwatch.callbacks.stream import Stream
from dynwatch.callbacks.tangents import Logits, Method, NoLogitsError, Way, choose
from dynwatch.callbacks.weight_update import WeightUpdate
from dynwatch.rules.base import check_count

# Logits [..., K] of a module on a batch, or logits and targets.
LogitsOf = Callable[[LightningModule, Any], Any]


class StepLook:
    """Keeps a batch and the weights before the optimizer's step, and then tells what the step does to the logits.

    Args:
        max_samples: Of the batch, on each rank.
        method: How tangents are computed.
        logits: A function of module and batch that gives logits, or logits and targets; None watches the training
            step.

    Raises:
        ValueError: For an argument out of bounds.
    """

    def __init__(self, max_samples: int, method: Method, logits: LogitsOf | None) -> None:
        self.max_samples = check_count("max_samples", max_samples)
        if method not in get_args(Method):
            raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, get_args(Method)))}.")
        if logits is not None and not callable(logits):
            raise ValueError(
                f"logits={logits!r} must be a function of module and batch that gives logits, or logits and targets."
            )
        self.method = method
        self.logits = logits
        self.update = WeightUpdate()
        self.way: Way | None = None  # once a step has shown it
        self._batch: Any = None
        self._batch_idx = 0

    def reason_against(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Why no step of this run can be looked at; empty if that can only be seen by trying."""
        if self.logits is None and not pl_module.automatic_optimization:
            return (
                "training_step steps the optimizers itself (manual optimization), so it cannot be run again; pass "
                "logits=, a function of module and batch that gives logits and targets"
            )
        return gradients_out_of_reach(trainer) or ""

    def keep(self, batch: Any, batch_idx: int, copy: bool = True) -> None:
        """Keep the samples to look at, by default a copy: the training step may change them."""
        kept = beginning(batch, self.max_samples)
        self._batch, self._batch_idx = cloned(kept) if copy else kept, batch_idx

    def before_step(self, optimizer: Optimizer) -> bool:
        """Copy what an optimizer is about to change; False if that is done."""
        return self.update.before_step(optimizer)

    def take(
        self, trainer: Trainer, pl_module: LightningModule, *, b2: bool = False, losses: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Look at the step from the copied weights to those that are now; all ranks must call it together.

        Returns:
            What `over_ranks` gives, and the step's length.

        Raises:
            Exception: What failed on this rank, when no collective is left; the others get NaN.
        """
        ranks, device = trainer.world_size, pl_module.device
        failure: Exception | None = None
        own, remarks = unknown(device), Stream.of(trainer).remarks
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        length = torch.full((), math.nan, dtype=own.dtype, device=device)
        try:
            step = self.update.step(trained)
            length = step.length
            with Replay(
                trainer, pl_module, self._batch, self._batch_idx, max_samples=self.max_samples, loss=self.logits
            ) as replay:
                if replay.whole:
                    remarks["step_radius max_samples"] = f"{replay.whole}; all of it is used"
                logits = Logits(replay, given=self.logits is not None)
                way = self.way
                if way is None:
                    way = choose(logits, step.start, step.direction, self.method)
                    # A step that goes nowhere, or to infinity, shows nothing.
                    self.way = way if 0 < float(length) < math.inf else None
                remarks["step_radius/method"] = str(way)
                own = look(logits, step, way, b2=b2, losses=losses)
        except SkippedBatchError:
            own = skipped(device)
        except NoLogitsError as error:
            if self.way is None:
                failure = error
            own = skipped(device)  # on this batch, after others had some
        except Exception as error:
            failure, own = error, unknown(device)
        if failure is not None and ranks == 1:
            raise failure
        values = over_ranks(own, ranks)
        if failure is not None:
            raise failure
        return values, length

    def release(self) -> None:
        """Drop the copies of weights and batch, and the hooks."""
        self.update.release()
        self._batch = None

    def state(self) -> list[Any] | None:
        return None if self.way is None else [self.way.method, self.way.why, self.way.step]

    def load_state(self, state: list[Any] | None) -> None:
        self.way = None if state is None else Way(*state)
