"""Whether the layers of a network still change their decisions: entropy, alignment, flow and Tensor Net (SKA)."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time as clock
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynwatch.callbacks.base import Monitor, isolated
from dynwatch.callbacks.batches import MOST_SAVED_BYTES, beginning, cloned, is_small, moved
from dynwatch.callbacks.budget import Budget, wait_for
from dynwatch.callbacks.curvature import all_could
from dynwatch.callbacks.knowledge import See, Watched, check_pattern, fixed_part, matching, module_of, readable_modules
from dynwatch.callbacks.learning_time import LearningTime
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.probe import Forward, ProbePass
from dynwatch.callbacks.ska_readings import EQUILIBRIUM, NETWORK, Readings
from dynwatch.callbacks.stream import Stream, logging_interval
from dynwatch.rules.base import check_count
from dynwatch.ska_layer import SUMS, LayerKnowledge

log = logging.getLogger("dynwatch")

Time = Literal["lr", "steps"]

_USUAL = 50  # optimizer steps from one probe to the next, where time allows
# A probe's cost before one was measured, in training steps on as many samples.
_GUESS = {"probe": 0.5}
_MOST_ATTEMPTS = 10  # batches on which no layer may run before this monitor gives up
_TIME, _STEPS = "\ntime", "\nsteps"


class SKAMonitor(Monitor):
    """Entropy, alignment, flow and Tensor Net of each layer's pre-activations on fixed samples.

    A probe runs the training step on a batch that is kept, in evaluation mode, without a graph and with random streams
    that begin alike, and compares what the Linear and Conv modules give with the probe before. With D = sigmoid(Z), Z
    the pre-activations, and Δ from one probe to the next, it follows arXiv 2503.13942 and 2504.03214 (SKA). Small flow
    and entropy steps mean that the network has stopped changing its decisions. They do not mean that it generalises
    best: see docs/ska.md.

    The first probe is taken before the first step (after it, where modules are lazy). Of the modules that run, the one
    that runs last is taken for the one that gives the logits, whose common shift is free, and left out. A module that
    runs several times counts as several layers, `<layer>.use2` the second. Numbers are means per element: samples times
    units, on all ranks.

    Logs, at each probe and for each layer:

    * `ska/<layer>/entropy`: exact entropy since the first probe, in bits: negative where decisions became surer.
    * `ska/<layer>/entropy_published`: entropy of the step since the last probe, as the papers plot it.
    * `ska/<layer>/alignment`: cosine of the angle between knowledge and change of decisions.
    * `ska/<layer>/flow`: root mean square of ΔZ, over the time since the last probe.
    * `ska/<layer>/net`: Tensor Net of the step, with the sign of the papers' code.
    * `ska/<layer>/norm`: root mean square of Z.

    and for the network:

    * `ska/entropy`, `ska/flow`: means over layers.
    * `ska/equilibrium`: how far flow and entropy steps have come down from their peaks: smoothed, over the peak, the
      largest over layers. The rule `ska_equilibrium` reads it.
    * `ska/time`: since the first probe, a sum of learning rates or a number of steps.
    * `ska/peak_time`, `ska/settled_time`: where the flow was largest so far, and since when the network has been at
      equilibrium, on that clock.

    Args:
        every_n_steps: Cadence, in optimizer steps; None reads each 50th step, and more rarely where that would take
            more than `max_overhead`.
        probe: "first" keeps the first batch of the run; else a batch as `training_step` takes it.
        max_samples: The most samples of the probe batch to use, on each rank.
        layers: Regular expressions; only Linear and Conv modules in whose name one is found are read.
        include_last: Whether the module that runs last is read, too.
        max_units: The most units of a layer to read: channels, and of each as many positions as fit.
        max_layers: The most layers to read, evenly spaced over the model.
        time: What the flow is divided by: "lr", the sum of learning rates since the last probe as in the papers, or
            "steps", for optimizers whose rate is no step of time (momentum, Adam) and modules that step none.
        forward: A function of module and batch that runs the model, used instead of `training_step`; manual
            optimization needs it.
        max_overhead: The most of the run's time to take, as a share, beside the first probes; without effect if
            `every_n_steps` is given.

    Raises:
        ValueError: For an argument out of bounds, and in a run for a pattern that matches no module.

    Example:
        >>> monitor = SKAMonitor(every_n_steps=20, layers=["mlp"])
    """

    side_tags = frozenset({"ska/*/*", *(NETWORK[kind] for kind in ("time", "peak_time", "settled_time"))})

    def __init__(
        self,
        every_n_steps: int | None = None,
        probe: Any = "first",
        max_samples: int = 128,
        layers: list[str] | None = None,
        include_last: bool = False,
        max_units: int = 1024,
        max_layers: int = 32,
        time: Time = "lr",
        forward: Forward | None = None,
        max_overhead: float = 0.01,
    ) -> None:
        super().__init__(_USUAL if every_n_steps is None else every_n_steps)
        if probe is None or (isinstance(probe, str) and probe != "first"):
            raise ValueError(f"probe={probe!r} must be 'first' or a batch, as training_step takes it.")
        if layers is not None and (isinstance(layers, str) or not layers):
            raise ValueError(f"layers={layers!r} must be a list of regular expressions, or None for all.")
        for pattern in layers or ():
            check_pattern(pattern)
        if not isinstance(include_last, bool):
            raise ValueError(f"include_last={include_last!r} must be True or False.")
        if time not in get_args(Time):
            raise ValueError(f"time={time!r} must be 'lr' (sum of learning rates) or 'steps'.")
        if forward is not None and not callable(forward):
            raise ValueError(f"forward={forward!r} must be a function of module and batch that runs the model.")
        self.level = logging.WARNING  # of the message that a run has nothing to measure
        self.probe = probe
        self.max_samples = check_count("max_samples", max_samples)
        self.layers = layers
        self.include_last = include_last
        self.max_units = check_count("max_units", max_units)
        self.max_layers = check_count("max_layers", max_layers)
        self.time = time
        self.forward = forward
        self._budget = Budget(max_overhead) if every_n_steps is None else None
        self._ranks = 1
        self._reason = ""  # why nothing can be measured in this run
        self._forget()

    def _forget(self) -> None:
        self._probe: Any = None
        self._lazy = False
        self._attempts = 0  # batches on which no layer ran
        self._taken = 0  # probes after the first
        self._layers: dict[str, LayerKnowledge] = {}  # by use of a module
        self._shapes: dict[str, list[int]] = {}  # of their whole outputs
        self._since = LearningTime()  # the last probe
        self._readings = Readings()

    def charts(self) -> Sequence[Chart]:
        if self._reason:
            return ()
        category = "dynwatch · SKA"
        titles = {
            "entropy": "Entropy since the first probe by layer",
            "flow": "Knowledge flow by layer",
            "alignment": "Alignment by layer",
            "net": "Tensor Net of the step by layer",
            "entropy_published": "Entropy of the step, as published, by layer",
            "norm": "Size of the pre-activations by layer",
        }
        by_layer = [Chart(category, title, (f"ska/*/{kind}",)) for kind, title in titles.items()]
        return (
            Chart(category, "Entropy since the first probe, mean of the layers", (NETWORK["entropy"],), pinned=True),
            Chart(category, "Equilibrium: flow and entropy steps over their peaks", (EQUILIBRIUM,)),
            Chart(category, "Knowledge flow, mean of the layers", (NETWORK["flow"],)),
            *by_layer,
            Chart(category, "Time since the first probe, at the peak of flow and at equilibrium", ("ska/*time",)),
        )

    # --- on the training process

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ranks = trainer.world_size
        if self._ranks > 1:  # what a checkpoint holds is of one process
            self._probe, self._layers = None, {}
        if self._probe is not None:
            self._probe = moved(self._probe, pl_module.device)
        if self._budget is not None:
            self._budget.begin(Stream.step(trainer))
        self._reason = ""
        modules = readable_modules(pl_module)
        if self.forward is None and not pl_module.automatic_optimization:
            reason = (
                "training_step steps the optimizers itself (manual optimization), so it cannot be run again; pass "
                "SKAMonitor(forward=...), a function of module and batch that runs the model"
            )
            self._give_up(trainer, reason)
        elif not modules:
            self._give_up(trainer, "the module has no Linear and no Conv modules")
        else:
            matching(list(modules), self.layers)  # tells a wrong pattern before the run is on its way

    def _give_up(self, trainer: Trainer, reason: str) -> None:
        self._reason = reason
        if Stream.of(trainer).unavailable(NETWORK["entropy"], reason):
            log.log(self.level, "SKAMonitor measures nothing in this run: %s.", reason)

    def is_due(self, trainer: Trainer) -> bool:
        if self._reason or not super().is_due(trainer):
            return False
        # One in any case, so that short runs have a step.
        return self._budget is None or not self._taken or self._budget.is_due(Stream.step(trainer))

    @isolated
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._reason or self._layers:
            return
        if self._probe is None:
            # Where it cannot be kept the pass says so, in which other ranks wait.
            with contextlib.suppress(Exception):
                own = batch if isinstance(self.probe, str) else moved(self.probe, pl_module.device)
                self._probe = cloned(beginning(own, self.max_samples))
        # A pass would give lazy modules their shapes, and draw their weights.
        self._lazy = any(map(is_lazy, pl_module.parameters()))
        if not self._lazy:
            self._first_probe(trainer, pl_module)

    def measure_gradients(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._since.note(optimizer)

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self._since.step()
        if self.is_due(trainer):
            if self._layers:
                self._timed(pl_module, whole=True, probe=lambda: self._measure(trainer, pl_module))
                self._taken += 1
            elif self._lazy:
                self._first_probe(trainer, pl_module)
        stream, step = Stream.of(trainer), Stream.step(trainer)
        if self._budget is not None and not self._reason and (step + 1) % logging_interval(trainer) == 0:
            clocks = self._budget.clocks(step, stream.elapsed(), self._budget.spent, "probe", _GUESS)
            stream.emit(self, step, Budget.TAGS, clocks, mean_over_ranks=True)

    def _timed(self, pl_module: LightningModule, whole: bool, probe: Any) -> None:
        began = clock.perf_counter()
        try:
            probe()
        finally:
            if self._budget is not None:
                wait_for(pl_module.device)
                self._budget.spend("probe", clock.perf_counter() - began, whole=whole)

    def _first_probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def probe() -> None:
            self._find_layers(trainer, pl_module)
            if self._layers:
                self._since = LearningTime()
                self._measure(trainer, pl_module)

        self._timed(pl_module, whole=False, probe=probe)

    def _find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Which modules run on the probe batch; all ranks go on only if there are some on each."""
        uses: list[str] = []
        kept: list[str] = []
        chosen: set[str] = set()
        last = ""
        error: Exception | None = None
        modules = readable_modules(pl_module)
        try:  # the run first, in which other ranks wait
            self._run(trainer, pl_module, modules, lambda use, module, output: uses.append(use))
            chosen = matching(list(modules), self.layers)
            last = module_of(uses[-1]) if uses else ""
            kept = [use for use in uses if module_of(use) in chosen and (self.include_last or module_of(use) != last)]
        except Exception as raised:
            error = raised
        self._attempts += 1
        if all_could(bool(kept), self._ranks, pl_module.device):
            kept = kept[:: -(-len(kept) // self.max_layers)]
            self._layers = {use: LayerKnowledge() for use in kept}
            return
        if isinstance(self.probe, str):
            self._probe = None  # the next batch has another chance
        if error is not None:
            raise error
        if uses and not kept and any(module_of(use) == last and last in chosen for use in uses):
            self._give_up(trainer, f"only the module that runs last, {last}, is left; include_last=True reads it")
        elif uses and not kept:
            self._give_up(trainer, f"no module that layers={self.layers!r} names runs in the step by itself")
        elif self._attempts >= _MOST_ATTEMPTS or not isinstance(self.probe, str):
            self._give_up(trainer, "none of the Linear and Conv modules runs in the step")

    def _run(self, trainer: Trainer, pl_module: LightningModule, modules: dict[str, nn.Module], see: See) -> bool:
        """Show what modules give on the probe batch; False if another rank could not begin."""
        error: Exception | None = None
        with contextlib.ExitStack() as stack:
            run: ProbePass | None = None
            try:
                if self._probe is None:
                    raise RuntimeError("the probe batch could not be kept")
                run = stack.enter_context(ProbePass(trainer, pl_module, [self._probe], forward=self.forward))
            except Exception as raised:
                error = raised
            if all_could(run is not None, self._ranks, pl_module.device) and run is not None:
                watch = Watched(modules, see)
                run.run(self._probe, 0, watch)
                watch.check()
                return True
        if error is not None:
            raise error
        return False

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sums: dict[str, Tensor] = {}

        def see(use: str, module: nn.Module, output: Tensor) -> None:
            layer = self._layers.get(use)
            if layer is None:
                return
            shape = list(output.shape)
            if self._shapes.setdefault(use, shape) != shape:  # even if as much of it is read
                layer.restart()
                self._shapes[use] = shape
            sums[use] = layer.measure(fixed_part(module, output, self.max_samples, self.max_units))

        wanted = {module_of(use) for use in self._layers}
        modules = {name: module for name, module in readable_modules(pl_module).items() if name in wanted}
        if not self._run(trainer, pl_module, modules, see):
            return
        device = pl_module.device
        for use in self._layers.keys() - sums.keys():  # it did not run this time
            self._layers[use].restart()
        like = next(iter(sums.values()), torch.zeros(0, dtype=torch.float32))
        lost = like.new_full((len(SUMS),), math.nan).to(device)
        found = [sums[use].to(device) if use in sums else lost for use in self._layers]
        since = self._since.so_far(self.time, like=lost)
        values = torch.cat([*found, since])
        self._since = LearningTime()
        stream = Stream.of(trainer)
        stream.emit(self, Stream.step(trainer), _raw_tags(tuple(self._layers)), values, mean_over_ranks=True)

    # --- at a flush, on the host

    def finish(self, step: int, raw: Mapping[str, float]) -> Mapping[str, float]:
        if self._budget is not None and Budget.TAGS[0] in raw:
            self._budget.plan(step, raw)
            return {}
        sums = {
            use: [raw[f"{use}\n{name}"] * self._ranks for name in SUMS]
            for use in self._layers
            if f"{use}\n{SUMS[0]}" in raw
        }
        readings = self._readings.take(step, self._layers, sums, raw[_TIME], round(raw[_STEPS]))
        if self._stream is not None:
            remarks = self._stream.remarks
            for subject in [known for known in remarks if known.startswith("ska")]:
                del remarks[subject]  # it may have ended
            remarks.update(self._readings.remarks(self.time))
        return readings

    # --- state

    def state(self) -> dict[str, Any]:
        # Lightning saves rank 0's state only, and one rank's batch is not the others'.
        alone = self._ranks == 1
        keep = alone and is_small(self._probe, MOST_SAVED_BYTES)
        return {
            "taken": self._taken,
            "probe": self._probe if keep else None,
            "layers": {use: layer.state_dict() for use, layer in self._layers.items()} if keep else {},
            "shapes": {use: list(shape) for use, shape in self._shapes.items()},
            "since": self._since.state(),
            "readings": self._readings.state(),
            "budget": self._budget.state() if self._budget else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._forget()
        self._taken = state["taken"]
        self._probe = state["probe"]
        for use, saved in state["layers"].items():
            self._layers[use] = LayerKnowledge()
            self._layers[use].load_state_dict(saved)
        self._shapes = {use: list(shape) for use, shape in state["shapes"].items()}
        self._since.load_state(state["since"])
        self._readings.load_state(state["readings"])
        if self._budget is not None and state["budget"] is not None:
            self._budget.load_state(state["budget"])

    def release(self) -> None:
        if self._probe is not None:  # a checkpoint after the fit still has it
            self._probe = moved(self._probe, torch.device("cpu"))
        for layer in self._layers.values():
            layer.load_state_dict(moved(layer.state_dict(), torch.device("cpu")))


@functools.lru_cache(maxsize=8)
def _raw_tags(uses: tuple[str, ...]) -> tuple[str, ...]:
    """Inner tags: the layer's name, a line break, the sum."""
    return (*(f"{use}\n{name}" for use in uses for name in SUMS), _TIME, _STEPS)
