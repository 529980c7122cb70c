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

    A step that is not finite is taken back whole.

    r = τ/ρ is the step's length over the radius of the softmax on the batch's samples (see `StepRadiusMonitor`; on
    several ranks that of all their samples). The optimizer's own state is left as it is. This is the one callback of
    dynwatch that changes a run, and only on the steps that it caps. Put it before other callbacks that look at updates.

    It looks at each `every_n_steps`-th step. Between these it looks at a step

    * at which the learning rate of any group is more than `lr_jump` times the lowest since the last look, and
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
        lr_jump: A learning rate that has risen by more than this factor, at once or little by little, is looked at;
            None looks at the cadence alone. Where only this may call for a look, the batch is not copied: a training
            step that changes its batch in place is then seen with the changed one.
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
        self._rates: dict[int, list[float]] = {}  # lowest learning rates since the last look, by optimizer

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
            self._look.keep(batch, batch_idx, copy=self._alarmed or self.is_due(trainer))

    def measure_gradients(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._reason:
            return
        if self._wants_to_look(trainer, optimizer) and self._look.before_step(optimizer):
            self._after.add(optimizer, functools.partial(self._guarded_cap, trainer, pl_module))

    def _wants_to_look(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """Whether an optimizer's next step is due, or a rate has risen by more than `lr_jump` since the last look."""
        owners = [getattr(each, "optimizer", each) for each in trainer.optimizers]
        position = next((i for i, each in enumerate(owners) if each is optimizer), -1)
        # None in optimizers that find their own rate.
        rates = [math.inf if g.get("lr") is None else float(g["lr"]) for g in optimizer.param_groups]
        pairs = list(zip(rates, self._rates.get(position, rates), strict=False))
        jumped = self.lr_jump is not None and any(now > self.lr_jump * before for now, before in pairs)
        looks = jumped or self._alarmed or self.is_due(trainer)
        self._rates[position] = rates if looks or len(pairs) != len(rates) else [min(pair) for pair in pairs]
        return looks

    def _guarded_cap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.guarded(trainer, self._cap, trainer, pl_module)

    def _cap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Right after an optimizer's step."""
        try:
            values, length = self._look.take(trainer, pl_module, losses=False)
            stream, step = Stream.of(trainer), Stream.step(trainer)
            r = float(values[0])
            finite = math.isfinite(float(length))
            if finite and r == -math.inf:  # the step skipped its batch, or the loss counts none of the samples
                self._cannot_tell(step, "none of the samples that were looked at counts in its loss")
                return
            self._alarmed = not r <= self.alert
            readings = {WANTED: r}
            if r > self.r_max or (not finite and self.r_max < math.inf):
                readings[SCALE] = share = self.r_max / r if finite else 0.0
                self._look.update.scale_back(share)
                self.capped_steps += 1
            elif math.isnan(r):
                self._cannot_tell(step, "its r is NaN")
            readings[CAPPED] = self.capped_steps
            stream.emit(self, step, list(readings), torch.tensor(list(readings.values()), dtype=torch.float64))
        except NoLogitsError as error:
            if trainer.world_size > 1:
                raise  # another rank may have some; the next flush agrees
            self._reason = str(error).rstrip(".")
            self._tell(trainer)
        finally:
            self._look.update.release()

    def _cannot_tell(self, step: int, why: str) -> None:
        if not self._told:
            log.warning(
                "StepRadiusController cannot tell how long step %d is, because %s: it is not capped. Said once a run.",
                step,
                why,
            )
        self._told = True

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if not trainer.fit_loop._should_accumulate():  # waits still only where the update was skipped
            self.release()

    # --- state

    def state(self) -> dict[str, Any]:
        return {
            "way": self._look.state(),
            "capped_steps": self.capped_steps,
            "alarmed": self._alarmed,
            "rates": {str(position): list(rates) for position, rates in self._rates.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._look.load_state(state["way"])
        self.capped_steps = state["capped_steps"]
        self._alarmed = state["alarmed"]
        self._rates = {int(position): list(rates) for position, rates in state["rates"].items()}

    def release(self) -> None:
        self._look.release()
        self._after.release()
