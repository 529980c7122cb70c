"""Ends a poor run, and says why."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from dynwatch.callbacks.base import Monitor, check_cadence
from dynwatch.callbacks.ending import RaiseLast, check_exit_code, check_trial, ending, tell_outside
from dynwatch.callbacks.loss_and_gradients import FIRST_BAD, LossAndGradients
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.optimizer_step import StepGradients, gradient_scaler, gradients_out_of_reach
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.records import describe_outcome, print_verdicts, record_verdict, with_circumstances
from dynwatch.callbacks.run_context import RunContext
from dynwatch.callbacks.stopping import StopHandle
from dynwatch.callbacks.stream import Stream, logging_interval
from dynwatch.callbacks.unseen import Unseen
from dynwatch.gradients import combine_norms, find_nonfinite, tensor_norms
from dynwatch.rules import (
    Action,
    Divergence,
    NonFinite,
    Rule,
    Rulebook,
    Verdict,
    apply_actions,
    default_rules,
    tags,
)

log = logging.getLogger("dynwatch")

# For the rules alone: inner values, and what the user or another callback logs already.
_HIDDEN = frozenset({tags.GRADIENT, tags.SCALER, tags.WEIGHTS, tags.VAL_LOSS, tags.LR, tags.LR_LOW, tags.PROGRESS})
_HIDDEN |= {tags.IDLE, FIRST_BAD}


class EarlyTermination(Monitor):
    """Ends a run that is going nowhere, with the reason, the evidence and what to do.

    Every optimizer step it keeps the loss and the gradient norm on the device; every
    `check_every_n_steps` it looks at them, and at what other monitors have measured, and asks its rules. So a
    verdict names the very step, even when it is found some steps later. A non-finite gradient that is seen before
    its update (always when every step is checked) is thrown away, and the weights stay as they were.

    Each rule has an action. "stop": the decision is agreed over all ranks; training ends after the batch, in
    Lightning's regular way (`should_stop`, so `on_train_end` hooks run); the final validation pass is
    skipped unless asked for; `ModelCheckpoint` does not overwrite an earlier checkpoint with weights
    that may be spoilt; `Trainer(min_steps=…)` and `min_epochs` delay it. "warn": the run goes on. "shadow": the
    run goes on, and what would have ended it is noted without a warning. By default non-finite numbers and
    divergence stop a run, and everything else warns.

    Every verdict goes to `dynwatch.jsonl` in the log folder, to TensorBoard's Text tab (`stop/verdict`), to the
    Python log ("dynwatch"; in shadow mode at level INFO), to `trainer.callback_metrics` and, at the end of fit,
    to the terminal.

    Logs, as often as the Trainer logs (`log_every_n_steps`) and at a verdict:

    * `stop/loss`: the loss of the global batch (mean over micro-batches and ranks).
    * `stop/loss_limit`: the end of the band that the divergence rule allows.
    * `stop/<rule>`: at the step at which the rule fired, that step: `stop/non_finite`, `stop/divergence`,
      `stop/loss_spike`, `stop/gradient_explosion`, `stop/vanishing_gradients`, `stop/dead_layers`,
      `stop/no_learning`, `stop/plateau`, `stop/overfitting`, `stop/sharpness`, `stop/large_steps`,
      `stop/router_collapse`, `stop/dead_experts`, `stop/router_logits`, and those of your own rules.

    Args:
        rules: The rules to ask; None takes `dynwatch.rules.default_rules()`.
        check_every_n_steps: How often readings are looked at. None: every step where looking is free
            (one process on a CPU), else as often as the Trainer logs, because each look waits for the
            accelerator or for other ranks.
        min_steps: No verdict before this many optimizer steps; a non-finite update is not thrown away either.
        final_validation: Whether to run Lightning's validation pass after a stop.
        actions: What is done about a rule's verdicts, by the rule's name: "stop", "warn", "shadow", or "off" to
            leave the rule out (False, which is what YAML reads `off` as, is the same). One word instead of a
            dict holds for all rules: `actions="shadow"`.
        cooldown: Steps for which a rule that has warned, or fired in shadow mode, stays silent.
        validation_loss: Name of the validation loss that you log, for the overfitting rule; None takes
            `val_loss`, `val/loss` and the like, or the only validation metric with "loss" in its name.
        on_stop: Called as `on_stop(trainer, verdict)` on the first rank when a run is ended, for alerts.
        exit_code: Raise `SystemExit` with this status when a stopped fit has been torn down, so that a
            script or a scheduler can tell. None: `fit` returns.
        trial: An Optuna trial, which a stop prunes: `optuna.TrialPruned` is raised when fit has been torn down,
            and the trial's user attributes `dynwatch/rule`, `/step` and `/reason` say why.

    Raises:
        ValueError: For an argument out of bounds, two rules of one name, or an action for an unknown rule.
        ModuleNotFoundError: If a trial is given and Optuna is not installed.

    Example:
        >>> stop = EarlyTermination(actions={"no_learning": "stop", "plateau": "off"}, min_steps=100)
    """

    sparse_tags = frozenset({tags.LOSS, tags.LOSS_LIMIT})

    def __init__(
        self,
        rules: list[Rule] | None = None,
        check_every_n_steps: int | None = None,
        min_steps: int = 0,
        final_validation: bool = False,
        actions: dict[str, str | bool] | str | bool | None = None,
        cooldown: int = 1000,
        validation_loss: str | None = None,
        on_stop: Callable[[Any, Verdict], None] | None = None,
        exit_code: int | None = None,
        trial: Any = None,
    ) -> None:
        super().__init__()
        self._named_by_user = rules is not None
        if isinstance(rules, Rule) or (rules is not None and not rules):
            raise ValueError(f"rules={rules!r} must be a list of at least one rule, or None for the default ones.")
        chosen = apply_actions(default_rules() if rules is None else rules, actions)
        self._rulebook = Rulebook(chosen, min_steps, cooldown)
        if check_every_n_steps is not None:
            check_cadence("check_every_n_steps", check_every_n_steps)
        self.check_every_n_steps = check_every_n_steps
        self.min_steps = min_steps
        self.final_validation = final_validation
        if validation_loss is not None and not isinstance(validation_loss, str):
            raise ValueError(f"validation_loss={validation_loss!r} must be the name of a metric that you log, or None.")
        self.validation_loss = validation_loss
        if on_stop is not None and not callable(on_stop):
            raise ValueError(f"on_stop={on_stop!r} must be a function of the trainer and the verdict.")
        self.on_stop = on_stop
        self.exit_code = check_exit_code(exit_code)
        self.trial = check_trial(trial)
        if trial is not None and exit_code is not None:
            raise ValueError(
                f"exit_code={exit_code!r} and trial= exclude each other: a pruned trial goes on with the next."
            )
        self.prints = True  # DynWatch(report=False) turns it off
        self.hidden_tags = _HIDDEN
        self._reset()

    @property
    def rules(self) -> list[Rule]:
        """The rules that are asked."""
        return self._rulebook.rules

    def _reset(self) -> None:
        self.verdict: Verdict | None = None  # the one that ends the run
        self.verdicts: list[tuple[Action, Verdict]] = []  # all that counted
        self._untold: list[tuple[Action, Verdict]] = []
        self._told_failures: set[str] = set()
        self._rulebook.failed.clear()  # a rule that raised is off for the rest of its run only
        self._stop = StopHandle()
        self._ending: BaseException | None = None
        self._outcome = ""
        self._told_delay = False
        self._measured = LossAndGradients()
        self._context: RunContext | None = None
        self._unseen = Unseen(self.rules if self._named_by_user else (), self.validation_loss)
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
        reads = [tag for rule in self.rules for tag in rule.reads]
        self._context = RunContext(trainer, pl_module, reads, self.validation_loss)

    def measure_gradients(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        seen = None if self._gradients_hidden else StepGradients.of(trainer, pl_module, optimizer, norm_type=None)
        if self._context:
            self._context.before_step(optimizer, seen.parameters if seen else ())
        if seen is None:
            return
        look = seen.free_to_look or Stream.of(trainer).flush_due(trainer)
        if self._measured.add_gradients(seen, look):
            self._discard(trainer, seen)
        if seen.failure:
            raise seen.failure

    def _discard(self, trainer: Trainer, seen: StepGradients) -> None:
        """Keep a non-finite gradient away from the weights, when its verdict is going to end the run."""
        fatal = any(isinstance(rule, NonFinite) and rule.action == "stop" for rule in self.rules)
        may_stop = trainer.fit_loop._can_stop_early and Stream.step(trainer) + 1 >= self.min_steps
        if not (fatal and may_stop and gradient_scaler(trainer) is None and Stream.of(trainer).flush_due(trainer)):
            return
        for parameter in seen.parameters:
            parameter.grad = None  # every torch optimizer leaves a parameter without gradient alone
        self._discarded_at = Stream.step(trainer)

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        self._measured.add_loss(trainer, pl_module, outputs)
        if trainer.fit_loop._should_accumulate():
            return
        stream = Stream.of(trainer)
        if not self._measured.emit(self, trainer) and stream.unavailable(
            tags.LOSS, "training_step returned no loss, so only gradients are watched"
        ):
            log.warning("EarlyTermination: %s.", stream.reasons[tags.LOSS])
        if self._context:
            self._context.emit_step(self, trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._context:
            self.guarded(trainer, self._context.emit_epoch, self, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._context and not trainer.sanity_checking:  # Trainer.validate has no context
            self.guarded(trainer, self._context.emit_validation, self, trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.guarded(trainer, self._emit_last, trainer, pl_module)
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            self._unseen.tell()

    def _emit_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last update has no next loss to show that it spoilt the weights, so they are looked at once."""
        if self._context:
            self._context.emit_epoch(self, trainer)
        weights = [p.detach() for p in pl_module.parameters()]
        if weights:
            total = combine_norms(tensor_norms(weights))
            Stream.of(trainer).emit(self, Stream.step(trainer), [tags.WEIGHTS], total.reshape(1))

    # --- at a flush, on the host

    def finish(self, step: int, raw: Mapping[str, float]) -> Mapping[str, float]:
        readings = dict(raw)
        LossAndGradients.finish(readings)
        self.hidden_tags = self.hidden_tags.union(RunContext.finish(readings))  # the user logs those already
        return readings

    def read(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Mapping[str, float]:
        self._unseen.look(readings)
        notes = {**notes, **self._measured.note(step, readings)}
        more: dict[str, float] = {}
        for rule, verdict in self._rulebook.update(step, readings, notes):
            if rule.action != "stop":
                self._untold.append((rule.action, verdict))
            elif self.verdict is None:
                self.verdict = verdict
            else:
                continue
            more[f"stop/{rule.name}"] = float(step)
        for rule in self.rules:
            if isinstance(rule, Divergence) and tags.LOSS in readings and math.isfinite(rule.limit):
                more[tags.LOSS_LIMIT] = rule.limit
        return more

    def after_flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, why in self._rulebook.failed.items():
            if name not in self._told_failures:
                self._told_failures.add(name)
                log.warning("The rule %s is off for the rest of this run, because it raised %s.", name, why)
        untold, self._untold = self._untold, []
        for action, verdict in untold:
            verdict = with_circumstances(trainer, verdict, "Learning rate")
            self.verdicts.append((action, verdict))
            self._record(trainer, action, verdict)
        if not any(rule.action == "stop" for rule in self.rules):
            return
        # Every rank asks, also one whose rules failed.
        if not trainer.strategy.reduce_boolean_decision(self.verdict is not None, all=False):
            return
        if not self._stop.active and self._allowed(trainer):
            self._end_run(trainer, pl_module)

    def _allowed(self, trainer: Trainer) -> bool:
        if trainer.fit_loop._can_stop_early:
            return True
        if not self._told_delay and self.verdict:
            self._told_delay = True
            log.warning(
                "%s The run goes on until Trainer(min_steps=%s, min_epochs=%s) allows a stop.",
                self.verdict.reason,
                trainer.min_steps,
                trainer.min_epochs,
            )
        return False

    def _end_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        verdict = self.verdict = self._locate(pl_module, self._agreed_verdict(trainer))
        # First of all the stop itself: what fails from here on, on one rank, no longer parts the ranks.
        kept = self._stop.stop(trainer, protect_checkpoints=verdict.weights_suspect, validate=self.final_validation)
        self._ending = ending(verdict, self.exit_code, self.trial)
        verdict = self.verdict = with_circumstances(trainer, verdict, "Learning rate when it was stopped")
        self.verdicts.append(("stop", verdict))
        self._outcome = describe_outcome(verdict, kept, self._discarded_at)
        self._record(
            trainer,
            "stop",
            verdict,
            stopped_after_step=Stream.step(trainer),
            update_discarded_at_step=self._discarded_at,
            last_checkpoint=kept,
        )
        if trainer.is_global_zero:
            tell_outside(trainer, verdict, self.on_stop, self.trial)

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

    def _record(self, trainer: Trainer, action: Action, verdict: Verdict, **more: Any) -> None:
        if trainer.is_global_zero:
            record_verdict(trainer, self._log_dir, action, verdict, self._outcome if action == "stop" else "", **more)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raised, self._ending = self._ending, None
        if raised is not None:
            trainer.callbacks.append(RaiseLast(raised))  # type: ignore[attr-defined]
        # Only now: before, they would stand in the middle of the progress bar.
        if self.prints and trainer.is_global_zero:
            print_verdicts(self.verdicts, self._outcome)

    def release(self) -> None:
        self._stop.release()
        self._context = None

    # --- state

    def state(self) -> dict[str, Any]:
        # A verdict that has ended its run is not kept: who resumes from its checkpoint wants to go on.
        waiting = None if self._stop.active else self.verdict
        return {
            "rulebook": self._rulebook.state_dict(),
            "verdict": asdict(waiting) if waiting else None,
            "bad_names": dict(self._measured.bad_names),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._rulebook.load_state_dict(state["rulebook"])
        self.verdict = Verdict(**state["verdict"]) if state["verdict"] else None
        self._measured.bad_names = dict(state["bad_names"])
