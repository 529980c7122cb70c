"""What a stop tells the outside: an exit status, or a pruned Optuna trial."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dynwatch.callbacks.namespaces import Callback, LightningModule, Trainer
from dynwatch.rules import Verdict

log = logging.getLogger("dynwatch")


def check_exit_code(exit_code: int | None) -> int | None:
    """Return an exit status, or raise a ValueError that says its bounds."""
    if exit_code is None:
        return None
    if isinstance(exit_code, bool) or not isinstance(exit_code, int) or not 0 < exit_code < 256:
        raise ValueError(
            f"exit_code={exit_code!r} must be a whole number from 1 to 255, or None to go on after fit; "
            "75 (temporary failure) is a usual choice."
        )
    return exit_code


def check_trial(trial: Any) -> Any:
    """Return an Optuna trial, or raise what helps.

    Raises:
        ModuleNotFoundError: If Optuna is not installed.
        ValueError: If it is no trial.
    """
    if trial is None:
        return None
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("trial= needs Optuna: pip install 'dynwatch[optuna]'.") from error
    if not isinstance(trial, optuna.trial.BaseTrial):
        raise ValueError(f"trial={trial!r} must be the optuna.Trial that the objective was given.")
    return trial


def ending(verdict: Verdict, exit_code: int | None, trial: Any) -> BaseException | None:
    """What to raise when a stopped fit has been torn down; None if it just returns."""
    if trial is not None:
        import optuna

        pruned: BaseException = optuna.TrialPruned(f"dynwatch: {verdict.rule} at step {verdict.step}: {verdict.reason}")
        return pruned
    return SystemExit(exit_code) if exit_code is not None else None


class RaiseLast(Callback):
    """Raises when all else is torn down; for the end of a trainer's list of callbacks, which it leaves then."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.callbacks.remove(self)  # type: ignore[attr-defined]
        pl_module.teardown(stage)  # what Lightning would do next
        raise self._error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.callbacks.remove(self)  # type: ignore[attr-defined]  # another callback's teardown raised


def tell_outside(trainer: Any, verdict: Verdict, on_stop: Callable[[Any, Verdict], None] | None, trial: Any) -> None:
    """Tell the trial and the user's own function of a stop; what they raise is logged, and the stop goes on."""
    if trial is not None:
        try:
            for key in ("rule", "step", "reason"):
                trial.set_user_attr(f"dynwatch/{key}", getattr(verdict, key))
        except Exception as error:
            log.warning("The Optuna trial could not be told why it ends: %s: %s.", type(error).__name__, error)
    if on_stop is not None:
        try:
            on_stop(trainer, verdict)
        except Exception as error:
            log.warning("on_stop raised %s: %s. The run ends all the same.", type(error).__name__, error)
