"""What every dynwatch callback shares: cadence, isolation of failures, and its place in the stream."""

from __future__ import annotations

import copy
import functools
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from dynwatch.callbacks.after_step import AfterStep
from dynwatch.callbacks.namespaces import Callback, LightningModule, Trainer
from dynwatch.callbacks.optimizer_step import StepGradients
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.stream import Stream

log = logging.getLogger("dynwatch")

_T = TypeVar("_T")


def isolated(hook: Callable[..., None]) -> Callable[..., None]:
    """Make a Lightning hook of a `Monitor` unable to end the run.

    What it raises switches its monitor off; its time is counted as dynwatch's own.
    """

    @functools.wraps(hook)
    def run(self: Monitor, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.guarded(trainer, hook, self, trainer, pl_module, *args, **kwargs)

    return run


def check_cadence(argument: str, value: int) -> int:
    """Return a cadence, or raise a ValueError that says what one looks like."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}={value!r} must be a whole number of steps, 1 or more (1 is every step).")
    return value


class Monitor(Callback):
    """A callback that measures at a cadence, emits readings and cannot break the run.

    A subclass overrides `begin`, `measure_gradients`, `end_step` and `release` (called on the training
    process, isolated) and `finish`, `read` and `after_flush` (called at a flush, with numbers on the
    host). Lightning's own hooks below keep the round in order; a subclass that needs more of them
    decorates each with `isolated`.

    A step is due when `(step + 1) % every_n_steps == 0`, which is how Lightning's own logging counts, so
    that readings stand at the same steps as the user's.
    """

    hidden_tags: frozenset[str] = frozenset()  # readings for stop rules only, not logged
    side_tags: frozenset[str] = frozenset()  # logged, but not in the terminal's summary
    sparse_tags: frozenset[str] = frozenset()  # read on every step, logged only as often as the Trainer logs

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__()
        self.every_n_steps = check_cadence("every_n_steps", every_n_steps)
        self.failure: str | None = None
        self.off: str | None = None
        self._stream: Stream | None = None
        self._restored: dict[str, Any] = {}
        self._fresh: dict[str, Any] | None = None  # the state before the first run

    # --- for subclasses

    def charts(self) -> Sequence[Chart]:
        """The TensorBoard charts of this monitor."""
        return ()

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare, when training starts."""

    def measure_gradients(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure before an optimizer step: gradients are final, unscaled and not yet clipped."""

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Emit what was measured, at the end of a training batch."""

    def finish(self, step: int, raw: Mapping[str, float]) -> Mapping[str, float]:
        """Turn the raw values that this monitor emitted for one step into readings.

        Called on every rank with the same values (if emitted with `mean_over_ranks`), in the order
        of steps: running statistics live here.
        """
        return raw

    def read(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Mapping[str, float]:
        """See all readings of one step; what is returned is added to them."""
        return {}

    def after_flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on what was read."""

    def release(self) -> None:
        """Remove hooks and drop tensors; may be called more than once."""

    # --- shared

    def is_due(self, trainer: Trainer) -> bool:
        """Whether this monitor measures on the current step; the same answer on all ranks."""
        return (Stream.step(trainer) + 1) % self.every_n_steps == 0

    def guarded(self, trainer: Trainer, action: Callable[..., _T], *args: Any, **kwargs: Any) -> _T | None:
        """Run an action of this monitor; if it raises, note the failure and return None."""
        if self.off:
            return None
        with Stream.of(trainer).stopwatch():
            try:
                return action(*args, **kwargs)
            except Exception as error:
                self._failed(trainer, error)
                return None

    def _failed(self, trainer: Trainer, error: Exception) -> None:
        if self.failure is None:
            self.failure = f"{type(error).__name__}: {error}"
            log.debug("%s", traceback.format_exc())
        # Alone, off at once. With other ranks it keeps taking part, so that none of them waits for a
        # collective in vain, until the next flush tells all of them.
        if trainer.world_size == 1:
            self.switch_off(self.failure)

    def switch_off(self, reason: str) -> None:
        """Stop measuring for the rest of the run and say why, once."""
        if self.off:
            return
        self.off = self.failure or reason
        log.warning(
            "%s is off for the rest of this run; training goes on. Cause: %s. If the cause is not in your model, "
            "please report it with the traceback: logging.getLogger('dynwatch').setLevel('DEBUG') shows it.",
            type(self).__name__,
            self.off.rstrip("."),
        )
        try:
            self.release()
        except Exception as error:
            log.debug("%s could not be released: %s", type(self).__name__, error)

    def state(self) -> dict[str, Any]:
        """What later readings depend on, as primitives and tensors; no collectives."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""

    def state_dict(self) -> dict[str, Any]:
        """`state`, and the readings that wait for a flush.

        Rank 0's is what Lightning saves, and every rank goes on from it. It never raises: a checkpoint
        without this monitor's history is better than none.
        """
        try:
            queue = self._stream.unflushed(self) if self._stream else []
            told = sorted(self._stream.told) if self._stream else []
            return {"unflushed": queue, "told": told, "own": self.state()}
        except Exception as error:
            self._tell_lost("could not be saved", error)
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; one that does not fit (another version's) is told and left out."""
        self._restored = state_dict
        if "own" not in state_dict:
            return
        try:
            self.load_state(state_dict["own"])
        except Exception as error:
            self._tell_lost("does not fit", error)
            if self._fresh is not None:
                self.load_state(copy.deepcopy(self._fresh))

    def _tell_lost(self, what: str, error: Exception) -> None:
        log.warning(
            "The state of %s in the checkpoint %s: %s: %s. After a resume its history starts afresh.",
            type(self).__name__,
            what,
            type(error).__name__,
            error,
        )

    # --- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.failure = self.off = None
            if self._fresh is None:
                self._fresh = copy.deepcopy(self.guarded(trainer, self.state) or {})
            elif trainer.global_step == 0:
                # Another run with the same callback is not judged by the history of this one.
                self.guarded(trainer, self.load_state, copy.deepcopy(self._fresh))
            self._restored = {}  # Lightning loads state after this
            self._stream = Stream.of(trainer)
            self._stream.join(self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream = Stream.of(trainer)
        restored, self._restored = self._restored, {}
        stream.told.update(restored.get("told", ()))
        stream.requeue(self, restored.get("unflushed", ()))
        self.guarded(trainer, self.begin, trainer, pl_module)
        if stream.is_last(self):
            stream.start(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        StepGradients.forget(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.guarded(trainer, self.measure_gradients, trainer, pl_module, getattr(optimizer, "optimizer", optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.guarded(trainer, self.end_step, trainer, pl_module, outputs, batch)
        stream = Stream.of(trainer)
        if stream.is_last(self):
            AfterStep.sweep()
            StepGradients.forget(trainer)
            if stream.flush_due(trainer) and not trainer.fit_loop._should_accumulate():
                self._flush(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if Stream.of(trainer).is_last(self):
            self._flush(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if Stream.of(trainer).is_last(self):
            self._flush(trainer, pl_module)
        self.guarded(trainer, self.release)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.guarded(trainer, self.release)
        stream = Stream.of(trainer)
        if not stream.members:  # raised after the teardown, or before a setup: nothing waits
            stream.close(trainer)
        if stream.is_last(self):
            try:
                with stream.stopwatch():
                    stream.flush(trainer, agree=False)
            except Exception as error:  # after a device error every transfer fails; the user's error matters
                log.warning("dynwatch's last readings are lost: %s: %s.", type(error).__name__, error)
            StepGradients.forget(trainer)
            stream.close(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.guarded(trainer, self.release)
            if Stream.of(trainer).is_last(self):
                Stream.of(trainer).close(trainer)

    def _flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream = Stream.of(trainer)
        with stream.stopwatch():
            try:
                stream.flush(trainer)
            except Exception as error:  # nobody's own fault, as after a device error: nobody goes on
                for member in stream.members:
                    member._failed(trainer, error)
        for member in stream.members:
            member.guarded(trainer, member.after_flush, trainer, pl_module)
