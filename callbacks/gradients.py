"""Gradient norms, clipping, update-to-weight ratios and the gradient noise scale of a run."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynwatch.callbacks.after_step import AfterStep, UpdateRatio
from dynwatch.callbacks.base import Monitor, check_cadence, isolated
from dynwatch.callbacks.clipping import clipping_expected, norm_after_clipping
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.noise_pairs import NoisePairs
from dynwatch.callbacks.optimizer_step import (
    StepGradients,
    gradients_out_of_reach,
    loss_scale,
    parameter_names,
)
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.stream import Stream
from dynwatch.constants import on_device
from dynwatch.gradients import combine_norms, group_norms, tensor_norms
from dynwatch.layers import LayerGroups, group_by_layer
from dynwatch.noise_scale import NoiseScale
from dynwatch.rules import tags as known_tags
from dynwatch.rules.base import check_count

TOTAL = "grad_norm/total"
CLIPPED = "grad_norm/clipped"
CLIP_FRACTION = "grad_norm/clip_fraction"
NOISE_SCALE = "grad_norm/noise_scale"
NONFINITE = "grad_norm/nonfinite"
LAYER = known_tags.GRADIENT_BY_LAYER
UPDATE_RATIO = known_tags.UPDATE_RATIO

# Readings over which the share of clipped steps is taken.
_CLIP_WINDOW = 100
# Lightning's clipping leaves a norm that is within rounding of the bound when it does act.
_CLIPPED_BELOW = 1 - 1e-5


@dataclass
class _Measured:
    """What was seen of one optimizer on this batch."""

    seen: StepGradients
    norms: Tensor  # [n_parameters] before clipping
    total: Tensor  # before clipping
    clipped: Tensor  # total after clipping
    bad_entries: Tensor  # how many are not finite, or an upper bound
    bad: str = ""  # which, in words, if they were searched


class GradientNormMonitor(Monitor):
    """Norms of the gradients that the optimizer gets, before and after clipping, in total and by layer.

    Norms are of the parameters that the optimizer steps and that have a gradient, unscaled under mixed
    precision, of the mean gradient over micro-batches and ranks, and of the whole tensors under FSDP2.
    Readings stand at the step at which Lightning logs the same batch.

    Logs, when due:

    * `grad_norm/total`: the norm over all parameters before clipping. With several optimizers, over all
      that stepped on this batch, and `grad_norm/optimizer_<i>` for each.
    * `grad_norm/clipped`: the same after clipping; equal to the total where nothing clips.
    * `grad_norm/clip_fraction`: share of the last 100 readings at which clipping took something away.
    * `grad_norm/nonfinite`: share of gradient entries that are NaN or infinite. On an accelerator, at
      steps where nothing is looked at, the share of entries in tensors that hold one (an upper bound).
    * `grad_norm/layer/<name>`: the norm of each layer, before clipping; a layer without any gradient
      (frozen) is left out.
    * `update_ratio/<name>`: |weights after - weights before| / |weights before| of each layer (2-norms),
      the optimizer's actual update with momentum, decay and learning rate; NaN for all-zero weights.
    * `grad_norm/noise_scale`: the simple gradient noise scale tr Σ / |G|² in samples (arXiv 1812.06162),
      from micro-batches where gradients are accumulated, else from the ranks under DDP. With neither
      there is one NaN, and the report says why.

    Args:
        every_n_steps: Cadence of the norms, in optimizer steps.
        norm_type: p of the norms, above 0; `inf` (in YAML `.inf`) for the largest entry. Update ratios and the noise
            scale always use 2.
        layers: Regular expressions; only layers of parameters in whose name one is found are drawn.
            None draws all, an empty list none.
        depth: Components of a parameter's name that make a layer; None chooses the deepest that gives
            at most `max_layers`.
        max_layers: The most layers to draw; neighbours are merged beyond it.
        update_ratio_every_n_steps: Cadence of the update ratios, which need a copy of the weights for the
            time of the optimizer step; 0 turns them off.
        noise_scale: Whether to estimate the noise scale.
        batch_size: Samples in one batch of one rank, for the noise scale; None takes the first
            dimension of the first tensor in the batch.

    Raises:
        ValueError: At construction for an argument out of bounds; when training starts for a pattern
            in `layers` that matches no parameter.

    Example:
        >>> monitor = GradientNormMonitor(every_n_steps=10, layers=["attn"])
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        norm_type: float = 2.0,
        layers: list[str] | None = None,
        depth: int | None = None,
        max_layers: int = 32,
        update_ratio_every_n_steps: int = 50,
        noise_scale: bool = True,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        self.norm_type = _check_norm_type(norm_type)
        if isinstance(layers, str):
            raise ValueError(f"layers={layers!r} must be a list of regular expressions: layers=[{layers!r}].")
        self.layers = layers
        self.depth = depth
        self.max_layers = max_layers
        if depth is not None:
            check_count("depth", depth)
        check_count("max_layers", max_layers)
        if update_ratio_every_n_steps != 0:
            check_cadence("update_ratio_every_n_steps", update_ratio_every_n_steps)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        self.update_ratio_every_n_steps = update_ratio_every_n_steps
        self.noise_scale = noise_scale
        self._after_step = AfterStep()
        self._updates = UpdateRatio()
        self._noise_pairs = NoisePairs(batch_size)
        self._noise = NoiseScale()
        self._noise_scale_expected = self._clipping_expected = True
        self._clips: deque[bool] = deque(maxlen=_CLIP_WINDOW)
        self._layers = LayerGroups((), ())
        self._layer_of: dict[str, int] = {}
        self._considered: set[str] = set()  # names that have been put into layers, or left out of all
        self._measured: dict[int, _Measured] = {}  # by optimizer
        self._after_backward: dict[int, Tensor] = {}  # by parameter, in manual optimization only

    def charts(self) -> Sequence[Chart]:
        category = "dynwatch · gradients"
        charts = [Chart(category, "Gradient norm, before and after clipping", (TOTAL, CLIPPED), pinned=True)]
        if self.layers != []:
            charts.append(Chart(category, "Gradient norm by layer", (LAYER,)))
            if self.update_ratio_every_n_steps:
                charts.append(Chart(category, "Update-to-weight ratio by layer", (UPDATE_RATIO,)))
        # An empty or flat chart would look like a fault.
        if self._clipping_expected:
            charts.append(Chart(category, "Share of steps clipped", (CLIP_FRACTION,), pinned=True))
        if self.noise_scale and self._noise_scale_expected:
            charts.append(Chart(category, "Gradient noise scale (samples)", (NOISE_SCALE,)))
        charts.append(Chart(category, "Share of non-finite gradient entries", (NONFINITE,)))
        return charts

    # --- on the training process

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not isolated: a wrong pattern is the user's mistake, and nothing is lost before the first step.
        self._find_layers(pl_module)
        super().on_train_start(trainer, pl_module)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clipping_expected = clipping_expected(trainer, pl_module)
        self._noise_scale_expected = self._noise_pairs.reason_against(trainer, pl_module) is None
        reason = gradients_out_of_reach(trainer)
        if reason:
            self.switch_off(reason)

    def _find_layers(self, pl_module: LightningModule) -> None:
        """Group what is trained, now or before: a layer that is unfrozen later joins when it has a gradient."""
        if self.layers == []:
            return
        names = list(parameter_names(pl_module).values())
        matched = group_by_layer(names, patterns=tuple(self.layers or ())).index if names else ()
        self._considered |= {name for name, p in zip(names, pl_module.parameters(), strict=True) if p.requires_grad}
        drawn = [name for name, at in zip(names, matched, strict=True) if at >= 0 and name in self._considered]
        self._layers = group_by_layer(drawn, depth=self.depth, max_groups=self.max_layers)
        self._layer_of = dict(zip(drawn, self._layers.index, strict=True))

    def _layer_index(self, names: Sequence[str]) -> list[int]:
        return [self._layer_of.get(name, -1) for name in names]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        if self.noise_scale and self.is_due(trainer):
            guard = functools.partial(self.guarded, trainer)
            self.guarded(trainer, self._noise_pairs.before_backward, trainer, pl_module, guard)

    @isolated
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.is_due(trainer):
            return
        if self.noise_scale:
            self._noise_pairs.after_backward(trainer, pl_module)
        if not pl_module.automatic_optimization:
            # Users clip between backward and step, where no hook is: this is the last look before it.
            held = [p for p in pl_module.parameters() if p.grad is not None]
            norms = tensor_norms([p.grad for p in held if p.grad is not None], self.norm_type) / loss_scale(trainer)
            self._after_backward = dict(zip(map(id, held), norms, strict=True))

    def measure_gradients(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        every = self.update_ratio_every_n_steps
        ratio_due = every > 0 and (Stream.step(trainer) + 1) % every == 0
        if not (ratio_due or self.is_due(trainer)):
            return
        seen = StepGradients.of(trainer, pl_module, optimizer, self.norm_type)
        if seen is None:
            return
        if not self._considered.issuperset(seen.names):
            self._considered.update(seen.names)
            self._find_layers(pl_module)
        if ratio_due and self._updates.before_step(optimizer, seen):
            self._after_step.add(
                optimizer, functools.partial(self.guarded, trainer, self._updates.after_step, optimizer)
            )
        if not self.is_due(trainer):
            return
        measured = self._measured[id(optimizer)] = self._before_clipping(trainer, seen)
        clipped = norm_after_clipping(trainer, pl_module, seen.total, self.norm_type)
        if clipped is None:
            self._after_step.add(optimizer, functools.partial(self.guarded, trainer, self._look_again, measured))
        else:
            measured.clipped = clipped
        if self.noise_scale and not NoisePairs.reason_against(trainer, pl_module):
            two = StepGradients.of(trainer, pl_module, optimizer, 2.0)
            self._noise_pairs.before_step(seen.total if two is None else two.total)

    def _before_clipping(self, trainer: Trainer, seen: StepGradients) -> _Measured:
        norms, total = seen.norms, seen.total
        known = [self._after_backward[id(p)] for p in seen.parameters if id(p) in self._after_backward]
        if len(known) == len(seen.parameters):
            norms = torch.stack(known)
            total = combine_norms(norms, self.norm_type)
        if not (seen.free_to_look or Stream.of(trainer).flush_due(trainer)):
            return _Measured(seen, norms, total, total, seen.suspect_entries)
        bad = seen.nonfinite
        entries = norms.new_tensor(bad.entries if bad else 0)
        return _Measured(seen, norms, total, total, entries, str(bad) if bad else "")

    def _look_again(self, measured: _Measured) -> None:
        held = [p.grad for p in measured.seen.parameters if p.grad is not None]
        measured.clipped = combine_norms(tensor_norms(held, self.norm_type), self.norm_type)

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self.noise_scale and self.is_due(trainer):
            self._noise_pairs.end_batch(batch)
        stream, step = Stream.of(trainer), Stream.step(trainer)
        ratios = self._updates.take(self._layer_index, len(self._layers.names))
        if ratios:
            tags = [UPDATE_RATIO + self._layers.names[layer] for layer in ratios]
            stream.emit(self, step, tags, torch.stack(list(ratios.values())))
        measured = list(self._measured.values())
        if measured:
            bad = "; ".join(m.bad for m in measured if m.bad)
            stream.emit(self, step, *self._norms(trainer, measured), notes={NONFINITE: bad} if bad else None)
            if self.noise_scale:
                self._emit_noise_scale(trainer, pl_module)
            self._measured.clear()
            self._after_backward.clear()
        self._after_step.release()  # waits still only where the update was skipped
        for one in measured:
            if one.seen.failure:
                raise one.seen.failure

    def _norms(self, trainer: Trainer, measured: Sequence[_Measured]) -> tuple[list[str], Tensor]:
        """Tags and values of all norms of this step, over all optimizers that stepped."""
        norms = torch.cat([m.norms for m in measured])
        index = self._layer_index([name for m in measured for name in m.seen.names])
        layers = sorted(set(index) - {-1})
        by_layer = group_norms(norms, on_device(tuple(index), norms.device), len(self._layers.names), self.norm_type)
        entries = sum(m.seen.entries for m in measured)
        totals = torch.stack([m.total for m in measured])
        clipped = torch.stack([m.clipped for m in measured])
        tags = [TOTAL, CLIPPED, NONFINITE, *(LAYER + self._layers.names[layer] for layer in layers)]
        values = [
            combine_norms(totals, self.norm_type).reshape(1),
            combine_norms(clipped, self.norm_type).reshape(1),
            (torch.stack([m.bad_entries.to(norms) for m in measured]).sum() / entries).reshape(1),
            by_layer[on_device(tuple(layers), norms.device)],
        ]
        if len(trainer.optimizers) > 1:
            tags += [f"grad_norm/optimizer_{i}" for i, o in enumerate(trainer.optimizers) if id(o) in self._measured]
            values.append(
                torch.stack([self._measured[id(o)].total for o in trainer.optimizers if id(o) in self._measured])
            )
        return tags, torch.cat([value.to(norms) for value in values])

    def _emit_noise_scale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream, step = Stream.of(trainer), Stream.step(trainer)
        reason = self._noise_pairs.reason_against(trainer, pl_module)
        pair = self._noise_pairs.take(trainer)
        if pair is not None:
            stream.emit(self, step, NoisePairs.TAGS, pair, mean_over_ranks=True)  # NaN if the size is unknown
            if self._noise_pairs.size_unknown:
                stream.unavailable(NOISE_SCALE, "no tensor in the batch tells its size: pass batch_size=")
        elif reason and stream.unavailable(NOISE_SCALE, reason):
            stream.emit(self, step, [NOISE_SCALE], torch.tensor([math.nan]))

    # --- at a flush, on the host

    def finish(self, step: int, raw: Mapping[str, float]) -> Mapping[str, float]:
        if NoisePairs.TAGS[0] in raw:
            return {NOISE_SCALE: self._noise.update(*(raw[tag] for tag in NoisePairs.TAGS))}
        readings = dict(raw)
        if TOTAL in raw and math.isfinite(raw[TOTAL]):
            self._clips.append(raw[CLIPPED] < raw[TOTAL] * _CLIPPED_BELOW)
            readings[CLIP_FRACTION] = sum(self._clips) / len(self._clips)
        return readings

    # --- state

    def state(self) -> dict[str, Any]:
        return {"clips": list(self._clips), "noise": self._noise.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._clips = deque(state["clips"], maxlen=_CLIP_WINDOW)
        self._noise.load_state_dict(state["noise"])

    def release(self) -> None:
        self._after_step.release()
        self._updates.release()
        self._noise_pairs.release()
        self._measured.clear()
        self._after_backward.clear()


def _check_norm_type(norm_type: float) -> float:
    try:
        value = float(norm_type)
    except (TypeError, ValueError):
        value = math.nan
    if not value > 0:
        raise ValueError(f"norm_type={norm_type!r} must be a number above 0, or inf for the largest entry; 2 is usual.")
    return value
