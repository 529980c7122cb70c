"""How far the optimizer's steps go, beside the radius in which the loss follows its own Taylor series."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from dynwatch.callbacks.base import Monitor, isolated
from dynwatch.callbacks.budget import Budget, wait_for
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.step_look import LogitsOf, StepLook
from dynwatch.callbacks.step_reading import ACTUAL, BINDING, FIELDS, PREDICTED, R_B2, R_PI, RHO, TAU, R, in_words
from dynwatch.callbacks.stream import Stream, logging_interval, tensorboard_writers
from dynwatch.callbacks.tangents import Method, NoLogitsError

log = logging.getLogger("dynwatch")

_RANK = "rank"
# Optimizer steps from one reading to the next, where time allows.
_USUAL = 50
# A reading's cost before one was measured, in training steps on as many samples: about five forward passes.
_GUESS = {"reading": 2.0}


class StepRadiusMonitor(Monitor):
    """The optimizer's step over the softmax radius of the model that it is taken on: r = τ/ρ.

    A reading takes the actual update (momentum, decay, clipping and learning rate in it, all optimizers of the batch
    together), replays the training step on some of the batch's samples at the weights before it, and gets the
    logits' derivative along the update from one forward-mode pass. ρ is a lower bound of the distance at which the
    Taylor series of the loss along the step stops converging, the smallest over all samples (arXiv 2603.13552, with a
    tighter bound; see docs/step_radius.md). r is a scale of risk, not a limit: healthy
    runs were seen at 0.1 as well as at 10.

    Logits are those that `cross_entropy`, `nll_loss` and `binary_cross_entropy_with_logits` get in the training step,
    each token of a sequence a sample of its own, ignored ones left out. A model without any is not measured.

    Logs, at each reading:

    * `step_radius/r`: the step over the radius, with the bound B1, which is exact for two classes.
    * `step_radius/r_pi`: with the paper's bound π/Δ; never below r.
    * `step_radius/r_b2`: with the tightest bound, if `b2` is set; never above r_pi.
    * `step_radius/rho`, `step_radius/tau`: the radius of B1 and the step's length, 2-norms over all parameters.
    * `step_radius/predicted_loss`, `step_radius/actual_loss`: by how much the linearised logits say that the cross
      entropy of the same samples changes in the step, and by how much it does.
    * `step_radius/binding_sample` (text, to TensorBoard): the sample that has the smallest radius, and its target.

    Args:
        every_n_steps: Cadence, in optimizer steps; None reads each 50th step, and more rarely where that would take
            more than `max_overhead`.
        max_samples: The most samples of the batch to use, on each rank.
        b2: Whether to compute the tightest bound as well, by a scan without further passes.
        method: How derivatives of logits are taken: "auto" uses forward mode where the model allows it, else reverse
            mode twice, else central differences; the report names the one in use.
        logits: A function of module and batch that gives the logits [..., K] (K = 1 for a sigmoid), or a pair of
            logits and targets, used instead of the training step; manual optimization needs it.
        max_overhead: The most of the run's time to take, as a share, beside the first reading; without effect if
            `every_n_steps` is given.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> monitor = StepRadiusMonitor(every_n_steps=20, max_samples=64)
    """

    side_tags = frozenset({R_PI, R_B2, RHO, TAU})

    def __init__(
        self,
        every_n_steps: int | None = None,
        max_samples: int = 32,
        b2: bool = False,
        method: Method = "auto",
        logits: LogitsOf | None = None,
        max_overhead: float = 0.01,
    ) -> None:
        super().__init__(_USUAL if every_n_steps is None else every_n_steps)
        self.level = logging.WARNING  # of the message that a run has nothing to measure
        self.b2 = b2
        self._budget = Budget(max_overhead) if every_n_steps is None else None
        self._taken = 0  # readings
        self._look = StepLook(max_samples, method, logits)
        self._reason = ""  # why nothing can be measured in this run
        self._ranks = 1
        self._texts: list[tuple[int, str]] = []

    def charts(self) -> Sequence[Chart]:
        if self._reason:
            return ()
        category = "dynwatch · step radius"
        radii = (R, R_PI, R_B2) if self.b2 else (R, R_PI)
        return (
            Chart(category, "Normalised step r (risk above 1, alarm above 4)", radii, pinned=True),
            Chart(category, "Change of the loss in a step, predicted and actual", (PREDICTED, ACTUAL)),
            Chart(category, "Radius and length of the step", (RHO, TAU)),
        )

    # --- on the training process

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ranks = trainer.world_size
        if self._budget is not None:
            self._budget.begin(Stream.step(trainer))
        self._reason = self._look.reason_against(trainer, pl_module)
        if self._reason:
            self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        if Stream.of(trainer).unavailable(R, self._reason):
            log.log(self.level, "StepRadiusMonitor measures nothing in this run: %s.", self._reason)

    def is_due(self, trainer: Trainer) -> bool:
        if self._reason or not super().is_due(trainer):
            return False
        # The first in any case, so that short runs have one.
        return self._budget is None or not self._taken or self._budget.is_due(Stream.step(trainer))

    @isolated
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.is_due(trainer):
            self._look.keep(batch, batch_idx)

    def measure_gradients(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.is_due(trainer):
            self._look.before_step(optimizer)

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        if self.is_due(trainer):
            self._read_off(trainer, pl_module)
        stream, step = Stream.of(trainer), Stream.step(trainer)
        if self._budget is not None and not self._reason and (step + 1) % logging_interval(trainer) == 0:
            clocks = self._budget.clocks(step, stream.elapsed(), self._budget.spent, "reading", _GUESS)
            stream.emit(self, step, Budget.TAGS, clocks, mean_over_ranks=True)

    def _read_off(self, trainer: Trainer, pl_module: LightningModule) -> None:
        began = time.perf_counter()
        try:
            if self._look.update.stepped:
                self._measure(trainer, pl_module)
                self._taken += 1
        except NoLogitsError as error:
            if trainer.world_size > 1:
                raise  # another rank may have some; the next flush agrees
            self._reason = str(error).rstrip(".")
            self._tell(trainer)
        finally:
            self._look.release()
            if self._budget is not None:
                wait_for(pl_module.device)
                # The first also tries which way works.
                self._budget.spend("reading", time.perf_counter() - began, whole=self._taken > 1)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream, step = Stream.of(trainer), Stream.step(trainer)
        values, length = self._look.take(trainer, pl_module, b2=self.b2)
        stream.emit(self, step, (*FIELDS, _RANK, TAU), torch.cat([values, length.to(values).reshape(1)]))

    # --- at a flush, on the host

    def finish(self, step: int, raw: Mapping[str, float]) -> Mapping[str, float]:
        if self._budget is not None and Budget.TAGS[0] in raw:
            self._budget.plan(step, raw)
            return {}
        r, tau = raw[R], raw[TAU]
        if r == -math.inf:  # the step skipped its batch
            return {}
        readings = {R: r, R_PI: raw[R_PI], TAU: tau}
        if self.b2:
            readings[R_B2] = raw[R_B2]
        if 0 < r < math.inf:
            readings[RHO] = tau / r
            self._texts.append((step, in_words(step, raw, int(raw[_RANK]) if self._ranks > 1 else None)))
        readings |= {tag: raw[tag] for tag in (PREDICTED, ACTUAL) if math.isfinite(raw[tag]) or not math.isfinite(r)}
        return readings

    def after_flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        texts, self._texts = self._texts, []
        for writer in tensorboard_writers(trainer):
            for step, text in texts:
                writer.add_text(BINDING, text, global_step=step)

    # --- state

    def state(self) -> dict[str, Any]:
        budget = self._budget.state() if self._budget else None
        return {"way": self._look.state(), "taken": self._taken, "budget": budget}

    def load_state(self, state: dict[str, Any]) -> None:
        self._look.load_state(state["way"])
        self._taken = state["taken"]
        if self._budget is not None and state["budget"] is not None:
            self._budget.load_state(state["budget"])

    def release(self) -> None:
        self._look.release()
