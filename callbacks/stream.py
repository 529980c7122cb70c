"""Where readings go: one stream per trainer, shared by all dynwatch callbacks.

Readings stay on the device until a flush, then move to the host in one transfer, are averaged over the
ranks where that is asked for, and go to every logger, to `trainer.callback_metrics` and to the members
that read them. Nothing here synchronises the device between flushes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from dynwatch.callbacks.namespaces import Logger, Trainer
from dynwatch.callbacks.panels import Chart, layout
from dynwatch.callbacks.series import Series
from dynwatch.constants import widest_float

if TYPE_CHECKING:
    from dynwatch.callbacks.base import Monitor

log = logging.getLogger("dynwatch")

OVERHEAD = "dynwatch/overhead"


@dataclass(frozen=True)
class Entry:
    """Raw values of one member at one step, still on their device."""

    source: Monitor
    step: int
    tags: tuple[str, ...]
    values: Tensor  # [len(tags)]
    mean_over_ranks: bool
    notes: Mapping[str, str] = field(default_factory=dict)  # what is known in words about a reading, by tag


class Stream:
    """Collects, flushes and hands on the readings of one fit."""

    def __init__(self) -> None:
        self.members: list[Monitor] = []
        self.series: dict[str, Series] = {}
        self.reasons: dict[str, str] = {}  # why a tag has no value
        self.remarks: dict[str, str] = {}  # what to know about readings that have one, by subject
        self.told: set[str] = set()  # the tags of which that was said, also before a resume
        self.flush_every_n_steps = 0  # 0: as often as the Trainer logs
        self._pending: list[Entry] = []
        self._broken_loggers: set[int] = set()
        self._own_seconds = 0.0
        self._overhead_at = -1
        self._measuring = False
        self._started = time.perf_counter()

    @staticmethod
    def of(trainer: Trainer) -> Stream:
        """The stream of this trainer's current fit; made on first use."""
        stream = _streams.get(trainer)
        if stream is None:
            stream = _streams[trainer] = Stream()
        return stream

    @staticmethod
    def step(trainer: Trainer) -> int:
        """The step at which Lightning itself logs what belongs to the current batch."""
        return trainer.fit_loop.epoch_loop._batches_that_stepped

    # --- members

    def join(self, member: Monitor) -> None:
        """Add a member, in the order of the trainer's callbacks.

        Raises:
            ValueError: If a member of the same class writes the same tags already.
        """
        if any(type(other) is type(member) for other in self.members if other is not member):
            name = type(member).__name__
            raise ValueError(
                f"The Trainer has two {name} callbacks, which would write the same tags. Keep one; "
                f"DynWatch already holds a {name}, and takes yours as an argument."
            )
        if member not in self.members:
            self.members.append(member)

    def start(self, trainer: Trainer) -> None:
        """Begin the clock and write the panels, once, when training starts."""
        self._started = time.perf_counter()
        self._own_seconds = 0.0
        for writer in tensorboard_writers(trainer):
            try:
                writer.add_custom_scalars(layout(self.charts()))
            except Exception as error:
                log.warning("dynwatch could not write its TensorBoard panels: %s. Scalars are still logged.", error)

    def charts(self) -> list[Chart]:
        own = Chart("dynwatch · run", "Share of the run's time spent in dynwatch", (OVERHEAD,))
        return [chart for member in self.members for chart in member.charts()] + [own]

    def is_last(self, member: Monitor) -> bool:
        """Whether this member's hook is the last of the round, after which a flush is complete."""
        return bool(self.members) and self.members[-1] is member

    def close(self, trainer: Trainer) -> None:
        _streams.pop(trainer, None)

    # --- readings

    def emit(
        self,
        source: Monitor,
        step: int,
        tags: Sequence[str],
        values: Tensor,
        *,
        mean_over_ranks: bool = False,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Queue raw values for the next flush, where `source.finish` turns them into readings.

        Args:
            source: The member that measured.
            step: The step that the values belong to.
            tags: Names of the raw values.
            values: [len(tags)], on any device, not to be changed afterwards.
            mean_over_ranks: Average the values over the ranks; every rank must then emit them.
            notes: What is known in words about a reading of this step, by its tag.
        """
        self._pending.append(Entry(source, step, tuple(tags), values.detach(), mean_over_ranks, dict(notes or {})))

    def unflushed(self, source: Monitor) -> list[dict[str, Any]]:
        """A member's queue as primitives, for its state. Waits for the device, as a checkpoint does anyway."""
        entries = [entry for entry in self._pending if entry.source is source]
        return [
            {
                "step": entry.step,
                "tags": list(entry.tags),
                "values": values,
                "mean_over_ranks": entry.mean_over_ranks,
                "notes": dict(entry.notes),
            }
            for entry, values in zip(entries, _to_host([entry.values for entry in entries]), strict=True)
        ]

    def requeue(self, source: Monitor, unflushed: Sequence[Mapping[str, Any]]) -> None:
        """Go on with a queue that `unflushed` saved."""
        for saved in unflushed:
            values = torch.tensor(saved["values"], dtype=torch.float64)
            self.emit(
                source,
                saved["step"],
                saved["tags"],
                values,
                mean_over_ranks=saved["mean_over_ranks"],
                notes=saved["notes"],
            )

    def unavailable(self, tag: str, reason: str) -> bool:
        """Say once why a tag has no value; True the first time, when the caller emits one NaN."""
        self.reasons[tag] = reason
        if tag in self.told:
            return False
        self.told.add(tag)
        return True

    def flush_due(self, trainer: Trainer) -> bool:
        """Whether readings are looked at on the current step; the same answer on all ranks."""
        every = self.flush_every_n_steps or logging_interval(trainer)
        return (self.step(trainer) + 1) % every == 0

    def flush(self, trainer: Trainer, *, agree: bool = True) -> None:
        """Move all pending readings to the host and hand them on.

        Args:
            trainer: The trainer.
            agree: Whether all ranks are here, so that collectives are safe. If not, values that need
                an average over ranks are dropped.
        """
        pending, self._pending = self._pending, []
        if trainer.world_size > 1:
            if agree:
                pending = self._agree(trainer, pending)
            else:
                pending = [entry for entry in pending if not entry.mean_over_ranks]
        by_step: dict[int, dict[str, float]] = {}
        notes: dict[int, dict[str, str]] = {}
        for entry, values in zip(pending, _to_host([entry.values for entry in pending]), strict=True):
            raw = dict(zip(entry.tags, values, strict=True))
            readings = entry.source.guarded(trainer, entry.source.finish, entry.step, raw)
            by_step.setdefault(entry.step, {}).update(readings or {})
            notes.setdefault(entry.step, {}).update(entry.notes)
        hidden, sparse = self._tags("hidden_tags"), self._tags("sparse_tags")
        for step in sorted(by_step):
            readings = by_step[step]
            for member in self.members:
                readings.update(member.guarded(trainer, member.read, step, readings, notes[step]) or {})
            shown = self._shown(trainer, step, readings, hidden, sparse)
            for tag, value in readings.items():
                if tag in shown or tag in sparse:
                    self.series.setdefault(tag, Series()).add(value)
            self._hand_on(trainer, step, shown)

    def _shown(
        self, trainer: Trainer, step: int, readings: dict[str, float], hidden: set[str], sparse: set[str]
    ) -> dict[str, float]:
        """What of a step's readings is for people: no inner values, and some only as often as the Trainer logs."""
        verdict = any(tag.startswith("stop/") for tag in readings.keys() - hidden - sparse)
        logging_step = (step + 1) % logging_interval(trainer) == 0
        if not logging_step and not verdict:
            hidden = hidden | sparse
        shown = {tag: value for tag, value in readings.items() if tag not in hidden}
        if logging_step and step > self._overhead_at:  # not again for what comes later, as after validation
            self._overhead_at = step
            shown[OVERHEAD] = self.overhead()
        return shown

    def _tags(self, kind: str) -> set[str]:
        return {tag for member in self.members for tag in getattr(member, kind)}

    def _hand_on(self, trainer: Trainer, step: int, readings: dict[str, float]) -> None:
        if not readings:
            return
        # The public property would compute the user's epoch metrics early; its dict takes no such action.
        trainer._logger_connector._callback_metrics.update({t: torch.tensor(v) for t, v in readings.items()})
        for logger in trainer.loggers:
            if id(logger) in self._broken_loggers:
                continue
            try:
                logger.log_metrics(readings, step=step)
            except Exception as error:
                self._broken_loggers.add(id(logger))
                log.warning(
                    "dynwatch stops writing to %s, which refused its readings at step %d: %s: %s. The run goes on.",
                    type(logger).__name__,
                    step,
                    type(error).__name__,
                    error,
                )

    def _agree(self, trainer: Trainer, pending: list[Entry]) -> list[Entry]:
        """Average over ranks; a member that failed or fell out of step anywhere goes off everywhere."""
        device = trainer.strategy.root_device
        shared = [entry for entry in pending if entry.mean_over_ranks]
        head: list[float] = []
        for member in self.members:
            size = float(sum((entry.step + 1) * len(entry.tags) for entry in shared if entry.source is member))
            head += [size, -size, float(member.failure is not None)]
        wide = widest_float(device)
        top = torch.tensor(head, dtype=wide, device=device)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        agreed = top.tolist()
        off = set()
        for i, member in enumerate(self.members):
            largest, smallest, failed = agreed[3 * i], -agreed[3 * i + 1], agreed[3 * i + 2]
            if failed or largest != smallest:
                off.add(member)
                member.switch_off("it failed on another rank" if failed else "its readings differ between the ranks")
        shared = [entry for entry in shared if entry.source not in off]
        if shared:
            together = torch.cat([entry.values.to(device, wide) for entry in shared])
            dist.all_reduce(together)
            means = iter(torch.split(together / trainer.world_size, [len(entry.tags) for entry in shared]))
        result = []
        for entry in pending:
            if entry.source in off:
                continue
            values = next(means) if entry.mean_over_ranks else entry.values
            result.append(replace(entry, values=values, mean_over_ranks=False))
        return result

    # --- own cost

    @contextmanager
    def stopwatch(self) -> Iterator[None]:
        """Count the time inside as dynwatch's own; nested uses count once."""
        if self._measuring:
            yield
            return
        self._measuring = True
        start = time.perf_counter()
        try:
            yield
        finally:
            self._own_seconds += time.perf_counter() - start
            self._measuring = False

    def elapsed(self) -> float:
        """Seconds since training started."""
        return time.perf_counter() - self._started

    def own_seconds(self) -> float:
        """Of these, what was spent in dynwatch, as the host sees it."""
        return self._own_seconds

    def overhead(self) -> float:
        """Share of the time since training started that was spent in dynwatch, as the host sees it."""
        return self._own_seconds / max(self.elapsed(), 1e-9)


_streams: WeakKeyDictionary[Trainer, Stream] = WeakKeyDictionary()


def _to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """All values on the host, with one transfer per device."""
    values: dict[int, list[float]] = {}
    for device in {t.device for t in tensors}:
        where = [i for i, t in enumerate(tensors) if t.device == device]
        flat = iter(torch.cat([tensors[i].reshape(-1).to(widest_float(device)) for i in where]).tolist())
        for i in where:
            values[i] = list(islice(flat, tensors[i].numel()))
    return [values[i] for i in range(len(tensors))]


def logging_interval(trainer: Trainer) -> int:
    """How often the Trainer logs, in steps; its own default where it is told not to log."""
    return int(getattr(trainer, "log_every_n_steps", 0)) or 50


def tensorboard_loggers(trainer: Trainer) -> list[Logger]:
    """The trainer's TensorBoard loggers, of either Lightning namespace."""
    return [
        logger for logger in trainer.loggers if any(c.__name__ == "TensorBoardLogger" for c in type(logger).__mro__)
    ]


def tensorboard_writers(trainer: Trainer) -> list[Any]:
    """Their `SummaryWriter`s; none on ranks other than the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in tensorboard_loggers(trainer)]  # type: ignore[attr-defined]
