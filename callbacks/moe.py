"""Mixtures of experts: routing health from live batches, and pathways of fixed samples."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dynwatch.callbacks.base import Monitor, check_cadence, isolated
from dynwatch.callbacks.batches import cloned
from dynwatch.callbacks.budget import Budget, wait_for
from dynwatch.callbacks.differentiable import compiled_frames, is_compiled
from dynwatch.callbacks.moe_health import HealthTally, RouterHealth, sum_tags
from dynwatch.callbacks.moe_panels import charts, write_layers, write_pictures
from dynwatch.callbacks.moe_pathways import COMPLEXITY, DIMENSION, LENGTH, MOE, decoder_names, parts_of
from dynwatch.callbacks.moe_probe import GroupBy, ProbeSet
from dynwatch.callbacks.moe_reader import PathwayReader
from dynwatch.callbacks.moe_tokens import PaddingMask, TokenLayout
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.probe import Forward, ProbePass
from dynwatch.callbacks.stream import Stream, logging_interval, tensorboard_writers
from dynwatch.pathways import Unit
from dynwatch.router_capture import Extract, RouterCapture
from dynwatch.router_decision import Decision
from dynwatch.router_search import chosen_routers, find_routers, suspects
from dynwatch.routing import Score
from dynwatch.rules.base import check_count, check_number

log = logging.getLogger("dynwatch")

# Optimizer steps from one look at pathways to the next, where time allows.
_USUAL = 100
# A look's cost before one was measured, in training steps on as many samples: a forward pass, and Python.
_GUESS = {"look": 1.0}
# Every so many readings of health, pictures are drawn, and pairs of experts counted.
_PICTURES_EVERY = 10
# Readings that say in another way what others say, and are left to the panels.
_SIDE = ("max_vio", "load_cv", "aux_loss", "z_loss", "router_entropy", "stability")
# Readings that rules judge: their verdicts name the router.
NOTED = ("effective_experts", "dead_experts", "z_loss")
# Training batches in which routers may show themselves.
_MOST_TRIES = 10


class MoEPathwayMonitor(Monitor):
    """Routing health and expert pathways of any mixture of experts, which it finds by itself.

    Routers are found by structure and by what they do on the first training batch, not by name; see docs/moe.md for
    what is known to work. In a dense model nothing is found, said or paid. Health comes from live training batches at
    each `every_n_steps`-th step, summed over micro-batches and ranks; pathways from a fixed probe of samples under
    evaluation mode, with nothing left behind. Padding counts nowhere.

    Logs, for each router i in the order of the model's modules (what it does not show is left out):

    * `moe/layer_{i}/effective_experts`: exp of the load's entropy, from k to E.
    * `moe/layer_{i}/load_cv`, `…/max_vio`: standard deviation of the load over its mean; busiest over mean, minus 1.
    * `moe/layer_{i}/max_load`: share of the tokens that chose the busiest expert.
    * `moe/layer_{i}/dead_experts`: experts without a token in the last `dead_window` looked-at steps.
    * `moe/layer_{i}/router_entropy`: mean entropy of the router's probabilities, in nats.
    * `moe/layer_{i}/aux_loss`: E Σ f P, balanced is 1; `moe/layer_{i}/z_loss`: mean of logsumexp(logits)².
    * `moe/layer_{i}/dropped`: share of the slots that a capacity left empty.
    * `moe/layer_{i}/experts`, `…/top_k`: E and k, once.
    * `moe/load`, `moe/coactivation` (pictures, to TensorBoard): load of all layers; which experts are chosen together.

    and at each look at the probe (arXiv 2506.21551; for an encoder and a decoder as `moe/encoder/…`, `moe/decoder/…`):

    * `moe/distance`, `moe/distance_normalized`: mean edit distance between pathways of samples (of a group), raw and
      over the longer one; `moe/pathway_length`: mean experts in a pathway.
    * `moe/consistency`: mean cosine between the expert embeddings of neighbouring layers; `moe/complexity`: the paper's
      1 - mean / max of it.
    * `moe/effective_dimension`: tr H(H + 0.1)⁻¹ of the samples' gates, mean over layers.
    * `moe/layer_{i}/stability`: share of the probe's choices that are as at the look before.
    * `moe/probe_loss`, `moe/memorized`: mean loss of the probe's samples, and the share of them whose loss has settled;
      with `memorized`, `moe/memorized/distance` and so on of these samples alone.

    Args:
        every_n_steps: Cadence of health, in optimizer steps.
        probe_every_n_steps: Cadence of pathways; None looks at each 100th step, and more rarely where that would take
            more than `max_overhead`.
        probe: "train" takes the first training batches, "validate" the first validation batches; or a batch.
        max_samples: The most samples of the probe, over all ranks.
        max_tokens: The most positions of a sequence in the probe; None keeps all.
        group_by: Key of the batch, or a function of it, with one value a sample: distances are of samples of one value.
            A batch without the key is one group.
        unit: Of distances, "expert" or "char" (see `dynwatch.pathways`).
        threshold: Share of a layer's gate that a pathway keeps.
        memorized: Whether pathways of memorised samples are measured on their own, too.
        padding_mask: Key of the batch, or a function of it, that gives [B, S], True or not zero for padding; None
            uses an `attention_mask`.
        routers: Patterns for names of router modules; None searches.
        extract: A function of router module, arguments and output that gives a `dynwatch.routing.Routing`.
        num_experts: E, where it cannot be told.
        top_k: k, where it cannot be seen.
        score: "softmax" or "sigmoid", how the router's logits become probabilities; None finds out.
        forward: A function of module and batch that runs the model, for manual optimization.
        dead_window: Looked-at steps without a token after which an expert is dead.
        max_overhead: The most of the run's time for pathways, as a share, beside the first look; without effect if
            `probe_every_n_steps` is given.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> monitor = MoEPathwayMonitor(every_n_steps=20, probe="validate", group_by="language")
    """

    side_tags = frozenset(
        {f"{MOE}layer_*/{name}" for name in (*_SIDE, "experts", "top_k")}
        | {f"{MOE}{name}" for name in (LENGTH, COMPLEXITY, DIMENSION, "probe_loss")}
    )

    def __init__(
        self,
        every_n_steps: int = 50,
        probe_every_n_steps: int | None = None,
        probe: Any = "train",
        max_samples: int = 64,
        max_tokens: int | None = 512,
        group_by: GroupBy | None = "domain",
        unit: Unit = "expert",
        threshold: float = 0.7,
        memorized: bool = False,
        padding_mask: PaddingMask | None = None,
        routers: list[str] | None = None,
        extract: Extract | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
        score: Score | None = None,
        forward: Forward | None = None,
        dead_window: int = 10,
        max_overhead: float = 0.01,
    ) -> None:
        super().__init__(every_n_steps)
        for argument, value, known in (("unit", unit, get_args(Unit)), ("score", score, ("softmax", "sigmoid", None))):
            if value not in known:
                raise ValueError(f"{argument}={value!r} must be one of {', '.join(map(repr, known))}.")
        if probe is None or (isinstance(probe, str) and probe not in ("train", "validate")):
            raise ValueError(f"probe={probe!r} must be 'train', 'validate' or a batch.")
        for argument, count in (("max_tokens", max_tokens), ("num_experts", num_experts), ("top_k", top_k)):
            if count is not None:
                check_count(argument, count)
        for argument, key in (("group_by", group_by), ("padding_mask", padding_mask)):
            if not (key is None or isinstance(key, str) or callable(key)):
                raise ValueError(f"{argument}={key!r} must be a key of the batch or a function of it.")
        if not isinstance(memorized, bool):
            raise ValueError(f"memorized={memorized!r} must be True or False.")
        if num_experts is not None and top_k is not None and top_k > num_experts:
            raise ValueError(f"top_k={top_k!r} must be num_experts={num_experts!r} or less.")
        for argument, function in (("extract", extract), ("forward", forward)):
            if function is not None and not callable(function):
                raise ValueError(f"{argument}={function!r} must be a function.")
        if routers is not None and (isinstance(routers, (str, nn.Module)) or not routers):
            raise ValueError(f"routers={routers!r} must be a list of patterns for module names, or of modules.")
        for each in routers or ():
            if not isinstance(each, (str, nn.Module)):
                raise ValueError(f"routers has {each!r}, and must have patterns for module names, or modules.")
        check_number("threshold", threshold, least=0, below=1)
        self.probe_every_n_steps = (
            _USUAL if probe_every_n_steps is None else check_cadence("probe_every_n_steps", probe_every_n_steps)
        )
        self.unit, self.threshold, self.memorized = unit, threshold, memorized
        self.routers, self.num_experts, self.top_k, self.score = routers, num_experts, top_k, score
        self.extract, self.forward = extract, forward
        self.dead_window = check_count("dead_window", dead_window)
        self.max_samples = check_count("max_samples", max_samples, least=2)
        self.max_tokens, self.group_by = max_tokens, group_by
        self._probe_source = probe
        self._layout = TokenLayout(padding_mask)
        self._ranks = 1
        self._budget = Budget(max_overhead) if probe_every_n_steps is None else None
        self._forget()

    def _forget(self) -> None:
        self._capture: RouterCapture | None = None
        self._decoders: frozenset[str] = frozenset()
        self._parts: list[str] = []  # of the model that have pathways of their own
        self._sizes: tuple[int, ...] = ()  # experts of each router, and how many of them a token gets
        self._ks: tuple[int, ...] = ()
        self._settled = self._eager = False
        self._tries = self._frames = 0
        self._readings = 0  # of health
        self._tally: HealthTally | None = None  # of this step
        self._top_k: dict[str, int] = {}  # as seen, by router
        self._sizes_by_name: dict[str, int] = {}
        self._masks: dict[tuple[tuple[int, ...], bool], Tensor | None] = {}  # of the present batch
        self._batch: Any = None
        self._health = RouterHealth(self.dead_window)
        self._announced: set[int] = set()  # routers whose E and k have been logged
        self._pictures_at: int | None = None
        probe = ProbeSet(self._probe_source, self.max_samples, self.max_tokens, self.group_by)
        self._reader = PathwayReader(
            probe, self._layout, self.forward, self.unit, self.threshold, memorized=self.memorized
        )

    def charts(self) -> Sequence[Chart]:
        return charts(self._parts, self.memorized) if self._parts else ()

    # --- on the training process

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.routers is not None:
            sites = chosen_routers(pl_module, self.routers, self.num_experts, self.top_k)
            unknown = [site.name for site in sites if not site.n_experts and self.extract is None]
            if unknown:
                raise ValueError(f"the number of experts of {unknown[0]} cannot be told; pass num_experts=.")
        else:
            found = find_routers(pl_module)
            sites = [site for site in found if self.num_experts in (None, site.n_experts)]
        if not sites:
            self._reader.probe.clear()
            self._tell_nothing(trainer, suspects(pl_module))
            return
        guard = functools.partial(self.guarded, trainer)
        self._capture = RouterCapture(
            sites, self._deliver, guard, extract=self.extract, score=self.score, top_k=self.top_k
        )
        self._ranks = trainer.world_size
        self._decoders = decoder_names(self._capture)
        telling = any(site.telling for site in sites)
        self._parts = list(parts_of(self._capture)) if telling else []
        runnable = pl_module.automatic_optimization or self.forward is not None
        # Also where a function may be compiled, which only a step can show.
        possible = runnable and "torch._dynamo.eval_frame" in sys.modules and telling
        self._eager = is_compiled(pl_module) or possible
        self._frames = compiled_frames()
        self._settled, self._tries = False, 0
        self._reader.probe.max_samples = max(self.max_samples // trainer.world_size, 1)
        self._reader.probe.to(pl_module.device)
        self._reader.probe.take_given(pl_module.device)
        if self._budget is not None:
            self._budget.begin(Stream.step(trainer))
        if not runnable and self._reader.probe.stage == "train":
            self._reader.reason = (
                "training_step steps the optimizers itself (manual optimization), so the probe cannot be run; pass "
                "MoEPathwayMonitor(forward=...), a function of module and batch that runs the model"
            )
            Stream.of(trainer).unavailable(f"{MOE}distance", self._reader.reason)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        probe = self._reader.probe
        if trainer.state.fn == "fit" and dataloader_idx == 0 and probe.wants("validate"):
            if self._capture is None and self.routers is None and not find_routers(pl_module):
                return  # nothing to look at
            probe.max_samples = max(self.max_samples // trainer.world_size, 1)
            self.guarded(trainer, probe.offer, batch, batch_idx)

    @isolated
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._capture is None:
            return
        if self._reader.probe.wants("train"):
            self._reader.probe.offer(batch, batch_idx)
        due = self.is_due(trainer)
        if self._settled and not due:
            return
        # With a dictionary of its own: the step may take things out.
        self._batch = dict(batch) if isinstance(batch, Mapping) else batch
        self._masks.clear()
        if due and self._tally is None:
            self._tally = HealthTally(pairs=self._readings % _PICTURES_EVERY == 0)
        if self._eager:
            try:
                self._look_ahead(trainer, pl_module, batch, batch_idx)
                return
            except Exception:
                if is_compiled(pl_module):
                    raise
                self._eager = False  # the step itself will show whether hooks fire
                self._tally = HealthTally(self._tally.pairs) if self._tally else None
        self._capture.attach()

    def _look_ahead(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hooks do not fire in compiled modules: the step is looked at before it comes, uncompiled."""
        assert self._capture is not None
        self._batch = cloned(batch)
        with ProbePass(trainer, pl_module, [batch], forward=self.forward, training=True) as run:
            run.run(batch, batch_idx, self._capture)

    def _deliver(self, at: int, decision: Decision) -> None:
        assert self._capture is not None
        site = self._capture.sites[at]
        self._top_k.setdefault(site.name, decision.indices.shape[1])
        self._sizes_by_name.setdefault(site.name, decision.n_experts)
        if self._tally is not None:
            valid = self._valid(site.name, decision)
            self._tally.add(site.name, decision, valid)

    def _valid(self, name: str, decision: Decision) -> Tensor | None:
        """Which tokens count; one tensor for all routers that see the same tokens."""
        key = (decision.leading, name in self._decoders)
        if key not in self._masks:
            self._masks[key] = self._layout.valid(self._batch, *key)
        valid = self._masks[key]
        if decision.valid is not None:
            valid = decision.valid if valid is None else valid & decision.valid
        return valid

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self._capture is None:
            return
        self._capture.detach()
        if not self._settled:
            self._settle(trainer, pl_module)
        if trainer.fit_loop._should_accumulate() or self._capture is None:
            return
        tally, self._tally, self._batch = self._tally, None, None
        self._masks.clear()
        if tally is not None:
            self._emit_health(trainer, tally, pl_module.device)
        if self._look_is_due(trainer):
            self._look_at_pathways(trainer, pl_module)
        stream, step = Stream.of(trainer), Stream.step(trainer)
        if self._budget is not None and not self._reader.reason and (step + 1) % logging_interval(trainer) == 0:
            clocks = self._budget.clocks(step, stream.elapsed(), self._budget.spent, "look", _GUESS)
            stream.emit(self, step, Budget.TAGS, clocks, mean_over_ranks=True)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what has shown itself as a router; after some batches, give up on the rest."""
        assert self._capture is not None
        self._eager = is_compiled(pl_module) or (self._eager and compiled_frames() > self._frames)
        dropped = self._capture.settle()
        self._tries += 1
        open_ = [at for at in range(len(self._capture.sites)) if not self._capture.reads(at)]
        found = len(open_) < len(self._capture.sites)
        if found and (not open_ or self._tries >= _MOST_TRIES):
            self._settled = True
            self._capture.close()
            self._tell_layers(trainer)
        elif not found and (not open_ or self._tries >= _MOST_TRIES):
            telling = [site.name for site in [*dropped, *self._capture.sites] if site.telling]
            self.release()
            self._reader.probe.clear()
            self._tell_nothing(trainer, telling)

    def _tell_nothing(self, trainer: Trainer, suspects: Sequence[str]) -> None:
        """Warn, if there are modules whose names speak of experts or routers."""
        if suspects and trainer.is_global_zero:
            log.warning(
                "MoEPathwayMonitor measures nothing in this run: these looked like routers, but showed no choice of "
                "experts: %s. Pass routers= (patterns for names) with top_k= or extract=, or leave it out.",
                ", ".join(suspects[:8]) + " and others" * (len(suspects) > 8),
            )

    def _tell_layers(self, trainer: Trainer) -> None:
        assert self._capture is not None
        write_layers(self._capture, tensorboard_writers(trainer), Stream.step(trainer))
        names = [site.name for site in self._capture.sites]
        ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        plan = self._capture.plans[0]
        Stream.of(trainer).remarks["moe"] = f"{len(names)} routers, {ends}" + (f"; {plan}" if plan else "")

    def _emit_health(self, trainer: Trainer, tally: HealthTally, device: torch.device) -> None:
        assert self._capture is not None
        sizes = {site.name: self._sizes_by_name.get(site.name, site.n_experts) for site in self._capture.sites}
        self._readings += 1
        self._sizes, self._ks = tuple(sizes.values()), tuple(self._top_k.get(name, 0) for name in sizes)
        sums = tally.vectors(sizes, device)
        stream = Stream.of(trainer)
        notes = {f"{MOE}layer_{i}/{tag}": name for i, name in enumerate(sizes) for tag in NOTED}
        tags = sum_tags(self._sizes, tally.pairs)
        stream.emit(self, Stream.step(trainer), tags, sums, mean_over_ranks=True, notes=notes)
        if self._layout.remark:
            stream.remarks["moe padding"] = self._layout.remark

    # --- pathways

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._settled and self._capture is not None and not self._reader.taken and not self._reader.reason:
            first = f"the first look comes at step {self.probe_every_n_steps - 1}, or once there is a probe"
            Stream.of(trainer).unavailable(f"{MOE}distance", f"{first}; probe_every_n_steps= makes it earlier")
        super().on_train_end(trainer, pl_module)

    def _look_is_due(self, trainer: Trainer) -> bool:
        step = Stream.step(trainer)
        if self._reader.reason or not self._settled or (step + 1) % self.probe_every_n_steps:
            return False
        # The first in any case, so that short runs have one.
        return self._budget is None or not self._reader.taken or self._budget.is_due(step)

    def _look_at_pathways(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._capture is not None
        stream, step, began = Stream.of(trainer), Stream.step(trainer), time.perf_counter()
        try:
            readings = self._reader.read(trainer, pl_module, self._capture, stream.unavailable)
        finally:
            if self._budget is not None:
                wait_for(pl_module.device)
                self._budget.spend("look", time.perf_counter() - began)
        if self._reader.reason and trainer.is_global_zero:
            log.warning(
                "MoEPathwayMonitor looks at no pathways in this run: %s. Routing health goes on.", self._reader.reason
            )
        if readings:
            values = torch.tensor(list(readings.values()), dtype=torch.float64)
            stream.emit(self, step, list(readings), values)

    # --- at a flush, on the host

    def finish(self, step: int, raw: Mapping[str, float]) -> Mapping[str, float]:
        if self._budget is not None and Budget.TAGS[0] in raw:
            self._budget.plan(step, raw)
            return {}
        if "\n" not in next(iter(raw)):
            return raw
        pairs = next(iter(raw)).endswith("pairs")
        found = self._health.read(list(raw.values()), self._sizes, pairs)
        for layer in found.keys() - self._announced:
            if self._ks[layer]:
                self._announced.add(layer)
                found[layer] |= {"experts": float(self._sizes[layer]), "top_k": float(self._ks[layer])}
        if pairs and found:
            self._pictures_at = step
        return {f"{MOE}layer_{i}/{name}": value for i, layer in found.items() for name, value in layer.items()}

    def after_flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pictures_at is not None:
            step, self._pictures_at = self._pictures_at, None
            write_pictures(self._health, tensorboard_writers(trainer), step)

    # --- state

    def state(self) -> dict[str, Any]:
        return {
            "readings": self._readings,
            "layers": [list(layer) for layer in zip(self._sizes, self._ks, strict=True)],
            "health": self._health.state(),
            "pathways": self._reader.state(alone=self._ranks == 1),
            "budget": self._budget.state() if self._budget else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._forget()
        self._readings = state["readings"]
        self._sizes = tuple(n_experts for n_experts, _ in state["layers"])
        self._ks = tuple(top_k for _, top_k in state["layers"])
        self._health.load_state(state["health"])
        self._reader.load_state(state["pathways"])
        if self._budget is not None and state["budget"] is not None:
            self._budget.load_state(state["budget"])

    def release(self) -> None:
        if self._capture is not None:
            self._capture.detach()
        self._capture = self._tally = self._batch = None  # they hold the model
        self._masks.clear()
        self._reader.probe.to(torch.device("cpu"))  # a checkpoint after the fit still has it
