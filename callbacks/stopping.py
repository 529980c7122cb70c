"""How a run is ended through Lightning, and what is put back afterwards."""

from __future__ import annotations

from typing import Any

from dynwatch.callbacks.namespaces import Trainer


class StopHandle:
    """Ends a run after the current batch, in Lightning's regular way."""

    def __init__(self) -> None:
        self.active = False
        self._trainer: Trainer | None = None
        self._limit_val_batches: int | float | None = None

    def stop(self, trainer: Trainer, *, protect_checkpoints: bool, validate: bool) -> str | None:
        """Ask the trainer to stop.

        Args:
            trainer: The trainer; every rank must call this on the same step.
            protect_checkpoints: Keep ModelCheckpoint from saving the weights of this step.
            validate: Let Lightning run its validation pass after the stop.

        Returns:
            The newest checkpoint saved before the stop, or None.
        """
        self.active = True
        trainer.should_stop = True
        if not validate and not _something_waits_for_validation(trainer):
            self._trainer = trainer
            self._limit_val_batches = trainer.limit_val_batches
            trainer.limit_val_batches = 0
        newest = None
        callback: Any  # other checkpoint callbacks than ModelCheckpoint have none of these attributes
        for callback in trainer.checkpoint_callbacks:
            newest = newest or getattr(callback, "_last_checkpoint_saved", None) or None
            if protect_checkpoints and hasattr(callback, "_last_global_step_saved"):
                # ModelCheckpoint saves a step only once: this one now counts as saved.
                callback._last_global_step_saved = trainer.global_step
                # With save_last it writes at the end of training if it believes that it never saved. After a
                # resume that would overwrite the checkpoint from which the run came.
                if not callback._last_checkpoint_saved:
                    callback._last_checkpoint_saved = callback.last_model_path or callback.best_model_path
        return newest

    def release(self) -> None:
        """Give the trainer its own settings back."""
        if self._trainer is not None and self._limit_val_batches is not None:
            self._trainer.limit_val_batches = self._limit_val_batches
        self._trainer = self._limit_val_batches = None


def _something_waits_for_validation(trainer: Trainer) -> bool:
    """Whether ending without validation would make Lightning raise for a metric that is missing."""
    known = trainer._logger_connector._callback_metrics
    plateau = [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    at_epoch_end = [c.monitor for c in trainer.early_stopping_callbacks if c._check_on_train_epoch_end]
    return any(monitor is not None and monitor not in known for monitor in plateau + at_epoch_end)
