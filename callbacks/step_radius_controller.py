"""Keeps the optimizer's steps within the softmax radius."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from dynwatch.callbacks.after_step import AfterStep
from dynwatch.callbacks.base import Monitor, isolated
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.step_look import LogitsOf, StepLook
from dynwatch.callbacks.stream import Stream
from dynwatch.callbacks.tangents import Method, NoLogitsError
from dynwatch.rules.base import check_number

log = logging.getLogger("dynwatch")

WANTED = "step_radius/wanted_r"
SCALE = "step_radius/scale"
CAPPED = "step_radius/capped_steps"


class StepRadiusController(Monitor):
    """Caps the optimizer's actual update: θ ← θ_before + min(1, r_max / r) · (θ_after - θ_before).

    r = τ/ρ is the step's length over the radius of the softmax on the batch's samples (see `StepRadiusMonitor`; on
    several ranks that of all their samples). The optimizer's own state is left as it is. This is the one callback of
    dynwatch that changes a run, and only on the steps that it caps. Put it before other callbacks that look at updates.

    It looks at each `every_n_steps`-th step. Between these it looks at a step

    * whose learning rate is more than `lr_jump` times that of the step before, and
    * after one that would have had r above `alert`, until one has not.

    A step that is looked at costs about four forward passes of its samples, and waits for the device.

    Logs, at each step that is looked at, as often as the Trainer logs:

    * `step_radius/wanted_r`: r as the optimizer wanted it.
    * `step_radius/capped_steps`: steps capped since the run began.

    and at each capped step:

    * `step_radius/scale`: the share of the update that was left.

    Args:
        r_max: The largest r that a step may have; inf looks but never caps.
        every_n_steps: Cadence, in optimizer steps; 1 looks at all.
        lr_jump: A learning rate that rises by more than this factor from one step to the next is looked at; None looks
            at the cadence alone.
        alert: An r above which the steps that follow are looked at, too; None takes `r_max`.
        max_samples: The most samples of the batch to use, on each rank.
        method: How derivatives of logits are taken; see `StepRadiusMonitor`.
        logits: A function of module and batch that gives logits, or logits and targets, used instead of the training
            step; manual optimization needs it.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> controller = StepRadiusController(r_max=1.0, every_n_steps=50)
    """

    sparse_tags = frozenset({WANTED, CAPPED})

    def __init__(
        self,
        r_max: float = 1.0,
        every_n_steps: int = 1,
        lr_jump: float | None = 2.0,
        alert: float | None = None,
        max_samples: int = 32,
        method: Method = "auto",
        logits: LogitsOf | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        if r_max != math.inf:
            check_number("r_max", r_max, above=0.0, remedy="1 is the radius itself, inf never caps")
        self.r_max = r_max
        if lr_jump is not None:
            check_number("lr_jump", lr_jump, above=1.0, remedy="2 looks at a rate that doubles")
        if alert not in (None, math.inf):
            check_number("alert", alert, above=0.0, remedy="leave it out to take r_max")
        self.lr_jump = lr_jump
        self.alert = r_max if alert is None else alert
        self.capped_steps = 0
        self._look = StepLook(max_samples, method, logits)
        self._after = AfterStep()
        self._reason = ""
        self._alarmed = False  # by the last step that was looked at
        self._told = False  # that it cannot tell
        self._rates: dict[int, float] = {}  # learning rate of the last step, by the optimizer's position

    def charts(self) -> Sequence[Chart]:
        if self._reason:
            return ()
        category = "dynwatch · step radius"
        return (
            Chart(category, "Normalised step that the optimizer wanted", (WANTED,)),
            Chart(category, "Share of a capped step that was left", (SCALE,)),
            Chart(category, "Capped steps", (CAPPED,)),
        )

    # --- on the training process

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._told = False
        self._reason = self._look.reason_against(trainer, pl_module)
        if self._reason:
            self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        if Stream.of(trainer).unavailable(WANTED, self._reason):
            log.warning("StepRadiusController caps nothing in this run: %s.", self._reason)

    @isolated
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # On every step, because a learning rate may jump as late as in the training step itself.
        if not self._reason:
            self._look.keep(batch, batch_idx)

    def measure_gradients(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._reason:
            return
        jumped = self._jumped(trainer, optimizer)
        if (jumped or self._alarmed or self.is_due(trainer)) and self._look.before_step(optimizer):
            self._after.add(optimizer, functools.partial(self._guarded_cap, trainer, pl_module))

    def _jumped(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """Whether the largest learning rate of an optimizer has risen by more than `lr_jump` since its last step."""
        owners = [getattr(each, "optimizer", each) for each in trainer.optimizers]
        position = next((i for i, each in enumerate(owners) if each is optimizer), -1)
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        before = self._rates.get(position)
        self._rates[position] = rate
        return self.lr_jump is not None and before is not None and rate > self.lr_jump * before

    def _guarded_cap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.guarded(trainer, self._cap, trainer, pl_module)

    def _cap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Right after an optimizer's step."""
        try:
            values, _, whole = self._look.take(trainer, pl_module, losses=False)
            stream, step = Stream.of(trainer), Stream.step(trainer)
            if whole:
                stream.remarks["step_radius max_samples"] = f"{whole}; all of it is used"
            if self._look.way is not None:
                stream.remarks["step_radius/method"] = str(self._look.way)
            r = float(values[0])
            if r == -math.inf:  # the step skipped its batch
                return
            self._alarmed = not r <= self.alert
            readings = {WANTED: r}
            if r > self.r_max:
                readings[SCALE] = share = self.r_max / r
                self._look.update.scale_back(share)
                self.capped_steps += 1
            elif math.isnan(r) and not self._told:  # once: a model that has blown up stays so
                self._told = True
                log.warning(
                    "StepRadiusController cannot tell how long step %d is and leaves it as it is: its r is NaN, as "
                    "where weights, logits or the update are not finite. It says so once.",
                    step,
                )
            readings[CAPPED] = self.capped_steps
            stream.emit(self, step, list(readings), torch.tensor(list(readings.values()), dtype=torch.float64))
        except NoLogitsError as error:
            if trainer.world_size > 1:
                raise  # another rank may have some; the next flush agrees
            self._reason = str(error).rstrip(".")
            self._tell(trainer)
        finally:
            self._look.update.release()

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if not trainer.fit_loop._should_accumulate():  # waits still only where the update was skipped
            self.release()

    # --- state

    def state(self) -> dict[str, Any]:
        return {
            "way": self._look.state(),
            "capped_steps": self.capped_steps,
            "alarmed": self._alarmed,
            "rates": {str(position): rate for position, rate in self._rates.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._look.load_state(state["way"])
        self.capped_steps = state["capped_steps"]
        self._alarmed = state["alarmed"]
        self._rates = {int(position): rate for position, rate in state["rates"].items()}

    def release(self) -> None:
        self._look.release()
        self._after.release()
