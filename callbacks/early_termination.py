"""Ends a poor run, and says why."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dynwatch.callbacks.base import Monitor, check_cadence, check_count
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.optimizer_step import StepGradients, gradient_scaler, gradients_out_of_reach
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.records import append_record, print_verdict, write_text
from dynwatch.callbacks.stopping import StopHandle
from dynwatch.callbacks.stream import Stream, logging_interval
from dynwatch.gradients import combine_norms, find_nonfinite, tensor_norms
from dynwatch.rules import Divergence, NonFinite, Rule, Verdict, tags

log = logging.getLogger("dynwatch")

_LOSS_SUM, _LOSS_COUNT, _FIRST_BAD = "loss_sum", "loss_count", "first_bad"


class EarlyTermination(Monitor):
    """Ends a run that is going nowhere, with the reason, the evidence and what to do.

    Every optimizer step it keeps the loss and the gradient norm on the device; every
    `check_every_n_steps` it looks at them and asks its rules. So a verdict names the very step, even
    when it is found some steps later. A non-finite gradient that is seen before its update (always
    when every step is checked) is thrown away, and the weights stay as they were.

    When it stops a run: the decision is agreed over all ranks; training ends after the batch, in
    Lightning's regular way (`should_stop`, so `on_train_end` hooks run); the final validation pass is
    skipped unless asked for; `ModelCheckpoint` does not overwrite an earlier checkpoint with weights
    that may be spoilt. The verdict goes to `dynwatch.jsonl` in the log folder, to TensorBoard's Text
    tab (`stop/verdict`), to the Python log ("dynwatch") and to the terminal. `Trainer(min_steps=…)`
    and `min_epochs` delay a stop.

    Logs, as often as the Trainer logs (`log_every_n_steps`) and at a verdict:

    * `stop/loss`: the loss of the global batch (mean over micro-batches and ranks).
    * `stop/loss_limit`: the end of the band that the divergence rule allows.
    * `stop/<rule>`: once, at the step at which the rule fired, that step (`stop/non_finite`, `stop/divergence`).

    Args:
        rules: The rules to ask; None takes `NonFinite()` and `Divergence()`, with their defaults.
        check_every_n_steps: How often readings are looked at. None: every step where looking is free
            (one process on a CPU), else as often as the Trainer logs, because each look waits for the
            accelerator or for other ranks.
        min_steps: No stop before this many optimizer steps; a non-finite update is not thrown away either.
        final_validation: Whether to run Lightning's validation pass after a stop.

    Raises:
        ValueError: For an argument out of bounds, or two rules of one name.

    Example:
        >>> stop = EarlyTermination(rules=[NonFinite(), Divergence(patience=50)])
    """

    hidden_tags = frozenset({tags.GRADIENT, tags.SCALER, tags.WEIGHTS, _FIRST_BAD})
    sparse_tags = frozenset({tags.LOSS, tags.LOSS_LIMIT})

    def __init__(
        self,
        rules: list[Rule] | None = None,
        check_every_n_steps: int | None = None,
        min_steps: int = 0,
        final_validation: bool = False,
    ) -> None:
        super().__init__()
        self.rules: list[Rule] = [NonFinite(), Divergence()] if rules is None else list(rules)
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise ValueError(f"rules has {rule!r}, which must be an instance of Rule, such as NonFinite().")
        names = [rule.name for rule in self.rules]
        if len(set(names)) < len(names):
            raise ValueError(f"rules has two rules of one name: {', '.join(names)}. Keep one of each.")
        if check_every_n_steps is not None:
            check_cadence("check_every_n_steps", check_every_n_steps)
        check_count("min_steps", min_steps, least=0)
        self.check_every_n_steps = check_every_n_steps
        self.min_steps = min_steps
        self.final_validation = final_validation
        self.prints = True  # DynWatch(report=False) turns it off
        self._reset()

    def _reset(self) -> None:
        self.verdict: Verdict | None = None
        self._stop = StopHandle()
        self._outcome = ""
        self._told_delay = False
        self._gradient_norms: list[Tensor] = []
        self._unlooked: list[StepGradients] = []  # this step's, where looking at them would wait for the device
        self._bad_names: dict[int, list[str]] = {}  # by step: names that first_bad points into
        self._note = ""  # what is known in words about this step's gradients
        self._losses: list[Tensor] = []
        self._discarded_at: int | None = None
        self._log_dir: str | None = None
        self._gradients_hidden: str | None = None

    def charts(self) -> Sequence[Chart]:
        category = "dynwatch · run"
        title = "Loss, and the limit above which it diverges"
        return (Chart(category, title, (tags.LOSS, tags.LOSS_LIMIT), pinned=True),)

    # --- on the training process

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._reset()
            Stream.of(trainer).flush_every_n_steps = self._cadence(trainer)

    def _cadence(self, trainer: Trainer) -> int:
        if self.check_every_n_steps is not None:
            return self.check_every_n_steps
        on_host = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
        return 1 if on_host else logging_interval(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Every rank asks, also one whose `begin` fails: the folder's name is broadcast.
        self.guarded(trainer, self._find_log_dir, trainer)
        super().on_train_start(trainer, pl_module)

    def _find_log_dir(self, trainer: Trainer) -> None:
        # A fast_dev_run leaves nothing on the disk.
        self._log_dir = None if getattr(trainer, "fast_dev_run", False) else trainer.log_dir

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gradients_hidden = gradients_out_of_reach(trainer)
        if self._gradients_hidden:
            log.warning("EarlyTermination watches the loss alone: %s.", self._gradients_hidden)

    def measure_gradients(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._gradients_hidden:
            return
        seen = StepGradients.of(trainer, pl_module, optimizer, norm_type=None)
        if seen is None:
            return
        self._gradient_norms.append(seen.total)
        look = seen.free_to_look or Stream.of(trainer).flush_due(trainer)
        if not look:
            self._unlooked.append(seen)
        elif seen.nonfinite:
            self._note = self._note or f"gradient of {seen.nonfinite}"
            self._discard(trainer, seen)
        if seen.failure:
            raise seen.failure

    def _discard(self, trainer: Trainer, seen: StepGradients) -> None:
        """Keep a non-finite gradient away from the weights, when its verdict is going to end the run."""
        fatal = any(isinstance(rule, NonFinite) for rule in self.rules) and gradient_scaler(trainer) is None
        if not (fatal and self._may_stop(trainer) and Stream.of(trainer).flush_due(trainer)):
            return
        for parameter in seen.parameters:
            parameter.grad = None  # every torch optimizer leaves a parameter without gradient alone
        self._discarded_at = Stream.step(trainer)

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        loss = _loss_in(outputs)
        if loss is not None:
            # Lightning has divided it for accumulation in automatic optimization only.
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach().float().reshape(()) * scale)
        if trainer.fit_loop._should_accumulate():
            return
        stream, step = Stream.of(trainer), Stream.step(trainer)
        if self._losses or trainer.world_size > 1:
            device = self._losses[0].device if self._losses else trainer.strategy.root_device
            total = torch.stack(self._losses).sum() if self._losses else torch.zeros((), device=device)
            values = torch.stack([total, torch.full_like(total, len(self._losses))])
            stream.emit(self, step, [_LOSS_SUM, _LOSS_COUNT], values, mean_over_ranks=True)
        elif stream.unavailable(tags.LOSS, "training_step returned no loss, so only gradients are watched"):
            log.warning("EarlyTermination: %s.", stream.reasons[tags.LOSS])
        if self._gradient_norms:
            total = torch.stack([n.to(self._gradient_norms[0]) for n in self._gradient_norms]).square().sum().sqrt()
            names, norms = [tags.GRADIENT], [total]
            if self._unlooked:
                bad = torch.cat([~seen.norms.isfinite().to(total.device) for seen in self._unlooked])
                names.append(_FIRST_BAD)
                norms.append(bad.to(total).argmax().to(total))
                self._bad_names[step] = [name for seen in self._unlooked for name in seen.names]
            notes = {tags.GRADIENT: self._note} if self._note else {}
            stream.emit(self, step, names, torch.stack(norms), notes=notes)
        if gradient_scaler(trainer) is not None:
            stream.emit(self, step, [tags.SCALER], torch.ones(1))
        self._losses.clear()
        self._gradient_norms.clear()
        self._unlooked.clear()
        self._note = ""

    def _may_stop(self, trainer: Trainer) -> bool:
        return trainer.fit_loop._can_stop_early and Stream.step(trainer) + 1 >= self.min_steps

    # --- at a flush, on the host

    def finish(self, step: int, raw: Mapping[str, float]) -> Mapping[str, float]:
        readings = dict(raw)
        count = readings.pop(_LOSS_COUNT, None)
        if count is not None:
            total = readings.pop(_LOSS_SUM)
            if count:
                readings[tags.LOSS] = total / count
        return readings

    def read(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Mapping[str, float]:
        more: dict[str, float] = {}
        first_bad = readings.get(_FIRST_BAD)
        names = self._bad_names.pop(step, [])
        if first_bad is not None and names and not math.isfinite(readings[tags.GRADIENT]):
            notes = {**notes, tags.GRADIENT: f"gradient of {names[int(first_bad)]} first"}
        for rule in self.rules:
            verdict = rule.update(step, readings, notes)
            if isinstance(rule, Divergence) and tags.LOSS in readings and math.isfinite(rule.limit):
                more[tags.LOSS_LIMIT] = rule.limit
            if verdict is not None and self.verdict is None and step + 1 >= self.min_steps:
                self.verdict = verdict
                more[f"stop/{rule.name}"] = float(step)
        return more

    def after_flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Every rank asks, also one whose rules failed.
        if not trainer.strategy.reduce_boolean_decision(self.verdict is not None, all=False):
            return
        if self._stop.active:
            return
        if not trainer.fit_loop._can_stop_early:
            if not self._told_delay and self.verdict:
                self._told_delay = True
                log.warning(
                    "%s The run goes on until Trainer(min_steps=%s, min_epochs=%s) allows a stop.",
                    self.verdict.reason,
                    trainer.min_steps,
                    trainer.min_epochs,
                )
            return
        verdict = self.verdict = self._locate(pl_module, self._agreed_verdict(trainer))
        # First of all the stop itself: what fails from here on, on one rank, no longer parts the ranks.
        kept = self._stop.stop(trainer, protect_checkpoints=verdict.weights_suspect, validate=self.final_validation)
        verdict = self.verdict = self._add_circumstances(trainer, verdict)
        self._outcome = self._describe_outcome(verdict, kept)
        self._record(trainer, verdict, kept)

    def _agreed_verdict(self, trainer: Trainer) -> Verdict:
        """The verdict of the first rank that has one; the ranks must agree on what it says of checkpoints."""
        verdicts = [self.verdict] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(verdicts, self.verdict)
        return next(verdict for verdict in verdicts if verdict is not None)

    def _locate(self, pl_module: LightningModule, verdict: Verdict) -> Verdict:
        """Say in a non-finite verdict whether, and where, the weights are spoilt."""
        if verdict.rule != NonFinite.name:
            return verdict
        # Buffers too: bad input spoils BatchNorm's running statistics although its update is thrown away.
        held = [*pl_module.named_parameters(), *(b for b in pl_module.named_buffers() if b[1].is_floating_point())]
        found = find_nonfinite((name, tensor.detach()) for name, tensor in held)
        state = f"Weights are not finite: {found}." if found else "All weights are finite."
        return replace(verdict, reason=f"{verdict.reason} {state}", weights_suspect=found is not None)

    def _add_circumstances(self, trainer: Trainer, verdict: Verdict) -> Verdict:
        """Add what the advice should be read with: the learning rate, and whether gradients are clipped."""
        rates = [f"{float(g['lr']):.3g}" for o in trainer.optimizers for g in o.param_groups if "lr" in g]
        facts = [f"Learning rate when it was stopped: {', '.join(dict.fromkeys(rates))}."] if rates else []
        if trainer.gradient_clip_val:
            facts.append(f"Gradients were clipped at {trainer.gradient_clip_val}.")
        return replace(verdict, reason=" ".join([verdict.reason, *facts]))

    def _describe_outcome(self, verdict: Verdict, checkpoint: str | None) -> str:
        parts = []
        if self._discarded_at is not None and not verdict.weights_suspect:
            parts.append(f"The update of step {self._discarded_at} was thrown away: weights are those before it.")
        if checkpoint:
            parts.append(f"Last checkpoint: {checkpoint}")
        return " ".join(parts) or "No checkpoint was saved before the stop."

    def _record(self, trainer: Trainer, verdict: Verdict, checkpoint: str | None) -> None:
        if not trainer.is_global_zero:
            return
        log.warning("dynwatch ends this run (%s): %s %s", verdict.rule, verdict.reason, verdict.advice)
        record = {
            "time": time.time(),
            "action": "stop",
            **verdict.to_dict(),
            "epoch": trainer.current_epoch,
            "stopped_after_step": Stream.step(trainer),
            "update_discarded_at_step": self._discarded_at,
            "last_checkpoint": checkpoint,
        }
        append_record(self._log_dir, record)
        write_text(trainer, verdict, self._outcome)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.guarded(trainer, self._emit_weights, trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _emit_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last update has no next loss to show that it spoilt the weights, so they are looked at once."""
        weights = [p.detach() for p in pl_module.parameters()]
        if weights:
            total = combine_norms(tensor_norms(weights))
            Stream.of(trainer).emit(self, Stream.step(trainer), [tags.WEIGHTS], total.reshape(1))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now: before, it would stand in the middle of the progress bar.
        if self.prints and self._stop.active and self.verdict and trainer.is_global_zero:
            print_verdict(self.verdict, self._outcome)

    def release(self) -> None:
        self._stop.release()

    # --- state

    def state(self) -> dict[str, Any]:
        # A verdict that has ended its run is not kept: who resumes from its checkpoint wants to go on.
        waiting = None if self._stop.active else self.verdict
        return {
            "rules": {rule.name: rule.state_dict() for rule in self.rules},
            "verdict": asdict(waiting) if waiting else None,
            "bad_names": dict(self._bad_names),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for rule in self.rules:
            if rule.name in state["rules"]:
                rule.load_state_dict(state["rules"][rule.name])
        self.verdict = Verdict(**state["verdict"]) if state["verdict"] else None
        self._bad_names = dict(state["bad_names"])


def _loss_in(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
