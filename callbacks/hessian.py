"""Curvature of a run: extreme eigenvalues of the training Hessian, and the learning rates that they allow."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

from dynwatch.callbacks import curvature_reading as tags
from dynwatch.callbacks.base import Monitor, isolated
from dynwatch.callbacks.batches import MOST_SAVED_BYTES, beginning, cloned, is_small, moved, samples_in
from dynwatch.callbacks.budget import Budget, wait_for
from dynwatch.callbacks.curvature import (
    Method,
    Source,
    Way,
    all_could,
    by_differences_because,
    choose,
    curvature,
    is_out_of_memory,
)
from dynwatch.callbacks.curvature_panels import Densities, charts
from dynwatch.callbacks.curvature_reading import Reader, Reading, Settings
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.optimizer_step import gradients_out_of_reach
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.replay import Loss, Replay, SkippedBatchError
from dynwatch.callbacks.stream import Stream, logging_interval, tensorboard_writers
from dynwatch.krylov import Storage
from dynwatch.ranks import RankFailure
from dynwatch.rules.base import check_count, check_number

log = logging.getLogger("dynwatch")

# Readings in a row that may run out of memory, each on half as many samples, before the monitor gives up.
_MOST_ATTEMPTS = 3
# A reading's cost before the first was taken, for one spectrum, in training steps on as many samples. Measured on a GPT
# with AdamW, which has two: 38 and 71 in two runs, with what the first reading tries once.
_GUESS = {"reading": 36.0, "full": 110.0}


class HessianMonitor(Monitor):
    """Extreme eigenvalues of the training loss's Hessian with error bars, and the critical learning rate.

    A reading replays the training step on a probe batch with nothing left behind, and asks a Lanczos solver for the
    top of the spectrum, from where the last reading found it; every `full_every_n_readings`-th one takes the whole
    spectrum from a random start. It stands at the step at which Lightning logs the same batch and is of the weights
    after that step. Under DDP it is of the ranks' batches together; under FSDP2 products are differences of gradients.

    A replay passes batch_idx=0. Where it gives None, by which Lightning skips a batch, there is no reading this time;
    with `probe_batch="first"` the next batch becomes the probe.

    Logs, at each reading (λ is the largest eigenvalue):

    * `hessian/lambda_max`, `hessian/lambda_max_error`: λ and how far off it can be, by the solver's own bound;
      `hessian/bounds/lambda_max_lower` and `…_upper` draw it. The error does not contain the sampling noise of the
      probe batch.
    * `hessian/batch_sharpness`: gᵀHg / gᵀg of the probe batch (arXiv 2412.20553).
    * `hessian/preconditioned_lambda_max`: λ of D^½ H D^½ for optimizers that precondition by D, such as Adam (arXiv
      2207.14484), or whose groups differ in learning rate or weight decay.
    * `hessian/critical_lr`: the learning rate (of the first group, others in proportion) above which the optimizer is
      unstable along the sharpest direction; `hessian/sharpness_ratio`: the present rate over it. Healthy runs hover
      near 1 (edge of stability).
    * `hessian/hvps`: products with the Hessian that the reading took.

    and at each full reading:

    * `hessian/lambda_min`, `hessian/lambda_min_error`: the smallest eigenvalue.
    * `hessian/trace`, `hessian/trace_error`: the sum of the eigenvalues and its standard error.
    * `hessian/critical_lr_at_batch_size/<B>`: the critical rate for batches of B samples (arXiv 2006.09092, corrected
      for noise that lies in the sharpest direction; see docs/hessian.md).
    * `hessian/learned_lr`, `hessian/learned_momentum`: heavy-ball rate and momentum for the spectrum's extremes.
    * `hessian/density`: the spectrum, to TensorBoard loggers: as a histogram and as a picture over time.

    Args:
        every_n_steps: Cadence, in optimizer steps; None reads as often as `max_overhead` allows, at logging steps.
        full_every_n_readings: Every so many readings the whole spectrum is measured.
        probe_batch: "first" keeps the first batch of the run, so that readings differ by the weights alone; "current"
            takes the batch just trained on.
        max_samples: The most samples of the probe batch to use, on each rank; halved when memory runs out.
        tol: Relative error at which the solver may stop.
        max_hvps: The most products for one end of a spectrum.
        method: "auto" differentiates twice where the model allows it, else takes differences of gradients.
        storage: How the solver keeps its vectors: "float32", "bfloat16" (half the memory) or "cpu".
        batch_sizes: For which the critical rate is estimated; None takes half, once, twice and four times the run's.
        loss: A function of module and batch that gives the loss, used instead of `training_step`; manual optimization
            needs it.
        max_overhead: The most of the run's time to take, as a share; without effect if `every_n_steps` is given.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> monitor = HessianMonitor(every_n_steps=100, max_samples=64)
    """

    side_tags = frozenset(
        {
            *(tags.LAMBDA_MAX_ERROR, tags.LAMBDA_MAX_LOWER, tags.LAMBDA_MAX_UPPER, tags.LAMBDA_MIN_ERROR),
            *(tags.TRACE_ERROR, tags.LEARNED_LR, tags.LEARNED_MOMENTUM, tags.HVPS),
        }
    )

    def __init__(
        self,
        every_n_steps: int | None = None,
        full_every_n_readings: int = 10,
        probe_batch: Literal["first", "current"] = "first",
        max_samples: int | None = 128,
        tol: float = 1e-2,
        max_hvps: int = 30,
        method: Method = "auto",
        storage: Storage = "float32",
        batch_sizes: list[int] | None = None,
        loss: Loss | None = None,
        max_overhead: float = 0.05,
    ) -> None:
        super().__init__(1 if every_n_steps is None else every_n_steps)
        self.full_every_n_readings = check_count("full_every_n_readings", full_every_n_readings)
        for argument, value, known in (
            ("probe_batch", probe_batch, ("first", "current")),
            ("method", method, get_args(Method)),
            ("storage", storage, get_args(Storage)),
        ):
            if value not in known:
                raise ValueError(f"{argument}={value!r} must be one of {', '.join(map(repr, known))}.")
        if max_samples is not None:
            check_count("max_samples", max_samples)
        if batch_sizes is not None and not isinstance(batch_sizes, (list, tuple)):
            raise ValueError(f"batch_sizes={batch_sizes!r} must be a list of whole numbers, 1 or more.")
        for i, size in enumerate(batch_sizes or ()):
            check_count(f"batch_sizes[{i}]", size)
        check_number("tol", tol, above=0.0, below=1.0, remedy="0.01 is one per cent")
        check_count("max_hvps", max_hvps, least=4)
        if loss is not None and not callable(loss):
            raise ValueError(f"loss={loss!r} must be a function of module and batch that gives the loss.")
        self.probe_batch = probe_batch
        self.max_samples = max_samples
        self.method = method
        self.batch_sizes = batch_sizes
        self.loss = loss
        self.way: Way | None = None  # how products are computed, once that is known
        self._budget = Budget(max_overhead) if every_n_steps is None else None
        self._settings = Settings(tol, max_hvps, storage, warm=probe_batch == "first")
        self._ranks = 1
        self._reason = ""  # why nothing can be measured in this run
        self._preconditions = True
        self._forget()

    def _forget(self) -> None:
        self.way = None
        self._reader = Reader(self._settings)
        self._readings = 0
        self._skipped = 0  # readings that there were not, because the step skipped its batch
        self._read: set[str] = set()  # the tags that have had a value
        self._allowed = self.max_samples
        self._short_of_memory = 0  # readings in a row that ran out of it
        self._probe: Any = None  # the batch that is replayed
        self._batch_size = 0  # samples of a whole batch on one rank; 0 if that cannot be told
        self._densities = Densities()

    def charts(self) -> Sequence[Chart]:
        if self._reason:
            return ()
        return charts(self._preconditions)

    # --- on the training process

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ranks = trainer.world_size
        if self._probe is not None:  # from a checkpoint
            self._probe = moved(self._probe, pl_module.device)
        if self._budget is not None:
            self._budget.begin(Stream.step(trainer))
        self._reason = self._reason_against(trainer, pl_module)
        self._preconditions = any(_preconditions(optimizer) for optimizer in trainer.optimizers)
        if self._reason and Stream.of(trainer).unavailable(tags.LAMBDA_MAX, self._reason):
            log.warning("HessianMonitor measures nothing in this run: %s.", self._reason)

    def _reason_against(self, trainer: Trainer, pl_module: LightningModule) -> str:
        if self.loss is None and not pl_module.automatic_optimization:
            return (
                "training_step steps the optimizers itself (manual optimization), so it cannot be run again; pass "
                "HessianMonitor(loss=...), a function of module and batch that gives the loss"
            )
        return gradients_out_of_reach(trainer) or ""

    def is_due(self, trainer: Trainer) -> bool:
        if self._reason:
            return False
        if self._budget is None:
            return super().is_due(trainer)
        step = Stream.step(trainer)
        return (step + 1) % logging_interval(trainer) == 0 and self._budget.is_due(step)

    @property
    def _kind(self) -> str:
        """Of the next reading. The first is an ordinary one, to be early."""
        every = self.full_every_n_readings
        return "full" if self._readings % every == min(1, every - 1) else "reading"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._skipped and not self._readings:
            reason = (
                f"training_step returned None, which skips the batch, at each of {self._skipped} readings; it was "
                "given batch_idx=0"
            )
            Stream.of(trainer).unavailable(tags.LAMBDA_MAX, reason)
        elif self._budget is not None and not self._readings and not self._reason:
            reason = (
                f"none fitted into max_overhead={self._budget.share:g} of so short a run; give every_n_steps to have "
                "readings at any cost"
            )
            Stream.of(trainer).unavailable(tags.LAMBDA_MAX, reason)
        super().on_train_end(trainer, pl_module)

    @isolated
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Here, because the training step may change a batch that it is given.
        wanted = self._probe is None and not self._reason if self.probe_batch == "first" else self.is_due(trainer)
        if wanted:
            self._batch_size = self._batch_size or samples_in(batch) or 0
            self._probe = cloned(beginning(batch, self.max_samples))

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        stream, step = Stream.of(trainer), Stream.step(trainer)
        if self.is_due(trainer):  # also where a rank could not keep its probe batch: the others must not wait for it
            self._read_off(trainer, pl_module)
        if self._budget is not None and not self._reason and (step + 1) % logging_interval(trainer) == 0:
            share = min((self._allowed or self._batch_size) / self._batch_size, 1.0) if self._batch_size else 1.0
            spectra = 2 if self._preconditions else 1
            guesses = {kind: n * spectra * share / trainer.accumulate_grad_batches for kind, n in _GUESS.items()}
            clocks = self._budget.clocks(step, stream.elapsed(), stream.own_seconds(), self._kind, guesses)
            stream.emit(self, step, Budget.TAGS, clocks, mean_over_ranks=True)

    def _read_off(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kind = self._kind
        device = pl_module.device
        wait_for(device)
        began = time.perf_counter()
        failure = RankFailure()
        reading: Reading | None = None
        try:
            reading = self._measure(trainer, pl_module, failure, full=kind == "full")
        except Exception as error:
            failure.error = failure.error or error
        # One rank's batch is all ranks' loss.
        skipped = not all_could(not isinstance(failure.error, SkippedBatchError), trainer.world_size, device)
        wait_for(device)
        if self._budget is not None:
            self._budget.spend(kind, time.perf_counter() - began, whole=not skipped)
        if skipped:
            self._skip(failure)
            reading = None
        else:
            self._readings += 1
        if reading is not None:
            self._hand_over(trainer, reading)
        if failure.error is not None:
            self._bear(failure.error)

    def _skip(self, failure: RankFailure) -> None:
        """No reading this time, on any rank; the next one has another batch."""
        self._skipped += 1
        if self.probe_batch == "first":
            self._probe = None
        if isinstance(failure.error, SkippedBatchError):
            failure.error = None

    def _bear(self, error: Exception) -> None:
        """Go on with fewer samples after running out of memory; anything else ends this monitor."""
        samples = min(self._allowed or self._batch_size, self._batch_size)
        self._short_of_memory += 1
        if not is_out_of_memory(error) or samples <= 1 or self._short_of_memory > _MOST_ATTEMPTS:
            raise error
        error.__traceback__ = None  # its frames hold the graph that did not fit
        self._allowed = samples // 2
        log.warning(
            "Memory ran out in a reading of HessianMonitor on %d samples; the next ones use max_samples=%d. "
            "storage='bfloat16' or 'cpu' needs less, too. Training goes on.",
            samples,
            self._allowed,
        )

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, failure: RankFailure, full: bool
    ) -> Reading | None:
        ranks, remarks = trainer.world_size, Stream.of(trainer).remarks
        with contextlib.ExitStack() as stack:
            replay = None
            try:
                if self._probe is None:
                    raise RuntimeError("the probe batch could not be kept")
                entered = Replay(trainer, pl_module, self._probe, max_samples=self._allowed, loss=self.loss)
                replay = stack.enter_context(entered)
            except Exception as error:
                failure.error = error
            if not all_could(replay is not None, ranks, pl_module.device) or replay is None:
                return None
            if replay.whole:
                remarks["hessian max_samples"] = f"{replay.whole}; all of it is used"
            if self.way is None:
                self.way = self._choose(replay, ranks, failure, pl_module.device)
                if self.way is None:
                    return None
                self._tell(trainer, self.way)
            source = Source(replay, self.way, ranks, failure)
            seen = curvature(source)
            sizes = self.batch_sizes
            if sizes is None:
                sizes = _around(self._batch_size * ranks * trainer.accumulate_grad_batches)
            return self._reader.take(source, seen, trainer.optimizers, full, sizes)

    def _choose(self, replay: Replay, ranks: int, failure: RankFailure, device: torch.device) -> Way | None:
        """How products are computed; None if that failed on any rank."""
        way = None
        try:
            way = choose(replay, self.method)
        except Exception as error:
            failure.error = error
        if not all_could(way is not None, ranks, device) or way is None:
            return None
        everywhere = all_could(way.method == "exact", ranks, device)
        if way.method == "exact" and not everywhere:
            return by_differences_because(replay, "there is no second derivative on another rank")
        return way

    def _tell(self, trainer: Trainer, way: Way) -> None:
        if way.method == "differences":
            Stream.of(trainer).remarks["hessian"] = f"differences of gradients, approximate: {way.why}"
            if self.method != "differences" and trainer.is_global_zero:
                log.warning("HessianMonitor uses differences of gradients, which are approximate: %s.", way.why)

    def _hand_over(self, trainer: Trainer, reading: Reading) -> None:
        stream, step = Stream.of(trainer), Stream.step(trainer)
        for tag, reason in reading.absent.items():
            if tag in self._read:  # what it was before stays in the summary
                stream.remarks[tag] = f"none at step {step}: {reason}"
            else:
                stream.unavailable(tag, reason)
        for tag in reading.values:
            known = tags.AT_BATCH_SIZE if tag.startswith(tags.AT_BATCH_SIZE) else tag
            self._read.add(known)
            stream.reasons.pop(known, None)
            stream.remarks.pop(known, None)
        if reading.values:
            self._short_of_memory = 0
            values = torch.tensor(list(reading.values.values()), dtype=torch.float64)
            stream.emit(self, step, list(reading.values), values)
        if reading.density is not None and len(reading.density.nodes):
            self._densities.add(step, reading.density, tensorboard_writers(trainer))

    # --- at a flush, on the host

    def finish(self, step: int, raw: Mapping[str, float]) -> Mapping[str, float]:
        if self._budget is not None and Budget.TAGS[0] in raw:
            self._budget.plan(step, raw)
            return {}
        return raw

    # --- state

    def state(self) -> dict[str, Any]:
        # Lightning saves rank 0's state only, and one rank's batch is not the others'.
        keep = self.probe_batch == "first" and self._ranks == 1 and is_small(self._probe, MOST_SAVED_BYTES)
        return {
            "readings": self._readings,
            "allowed": None if self._allowed == self.max_samples else self._allowed,
            "batch_size": self._batch_size,
            "probe": self._probe if keep else None,
            "budget": self._budget.state() if self._budget else None,
            "densities": self._densities.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._forget()
        self._readings = state["readings"]
        self._reader.count = self._readings  # for the random vectors that the run would have drawn
        self._allowed = min((n for n in (self.max_samples, state["allowed"]) if n is not None), default=None)
        self._batch_size = state["batch_size"]
        self._probe = state["probe"]
        if self._budget is not None and state["budget"] is not None:
            self._budget.load_state(state["budget"])
        self._densities.load_state(state["densities"])

    def release(self) -> None:
        self._reader = Reader(self._settings)
        if self._probe is not None:  # a checkpoint after the fit still has it
            self._probe = moved(self._probe, torch.device("cpu"))


def _preconditions(optimizer: Optimizer) -> bool:
    """Whether an optimizer's stability is not that of the plain Hessian."""
    if not isinstance(optimizer, torch.optim.SGD):
        return True
    return len({(float(group["lr"]), float(group["weight_decay"])) for group in optimizer.param_groups}) > 1


def _around(batch_size: int) -> list[int]:
    """Half, once, twice and four times a batch size; none if it is not known."""
    return sorted({max(batch_size // 2, 1), batch_size, 2 * batch_size, 4 * batch_size}) if batch_size else []
