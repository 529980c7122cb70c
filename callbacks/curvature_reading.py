"""One reading of a run's curvature: which solvers are asked, in which order, and what their answers are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynwatch.batch_size import HessianSpread, critical_lr_in_noise, spread_of_chunks
from dynwatch.callbacks.curvature import Curvature, Source, Way, all_could, exact, is_out_of_memory, least_over_ranks
from dynwatch.callbacks.memory import free_memory
from dynwatch.krylov import Storage
from dynwatch.lanczos import Ends, Extremes, extreme_eigenvalues
from dynwatch.learning_rate import batch_sharpness, learned_rates
from dynwatch.operators import Operator, preconditioned
from dynwatch.ranks import sum_of_ranks
from dynwatch.rules import tags
from dynwatch.spectral_density import SpectralDensity, trace
from dynwatch.stability import Stability, Unsupported, stability

LAMBDA_MAX = tags.LAMBDA_MAX
LAMBDA_MAX_ERROR = "hessian/lambda_max_error"
LAMBDA_MAX_LOWER = "hessian/bounds/lambda_max_lower"
LAMBDA_MAX_UPPER = "hessian/bounds/lambda_max_upper"
LAMBDA_MIN = "hessian/lambda_min"
LAMBDA_MIN_ERROR = "hessian/lambda_min_error"
BATCH_SHARPNESS = tags.BATCH_SHARPNESS
SHARPNESS_RATIO = tags.SHARPNESS_RATIO
CRITICAL_LR = tags.CRITICAL_LR
AT_BATCH_SIZE = "hessian/critical_lr_at_batch_size/"
PRECONDITIONED = "hessian/preconditioned_lambda_max"
TRACE = "hessian/trace"
TRACE_ERROR = "hessian/trace_error"
LEARNED_LR = "hessian/learned_lr"
LEARNED_MOMENTUM = "hessian/learned_momentum"
HVPS = "hessian/hvps"
DENSITY = "hessian/density"

# Chunks that the probe batch is split into, to see how much the Hessian differs between samples.
_CHUNKS = 8
# Vectors of a basis: the fewest that can end a search, and the fewest that are worth a full reading.
_LEAST_VECTORS, _LEAST_FOR_FULL = 4, 12
# Other vectors of all parameters that are alive meanwhile, chunk products among them.
_OTHER_VECTORS = 14


@dataclass(frozen=True)
class Settings:
    """How exact a reading is to be, and at what cost."""

    tol: float = 1e-2
    max_hvps: int = 30
    storage: Storage = "float32"
    trace_probes: int = 8
    warm: bool = True  # whether the last reading's top vector is where the next one starts


@dataclass
class Reading:
    """What was found.

    Attributes:
        values: By tag.
        absent: Why a tag has no value.
        density: Of the spectrum, at a full reading.
    """

    values: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    density: SpectralDensity | None = None


class Reader:
    """Takes readings; what one found is where the next one starts.

    Args:
        settings: How exact, at what cost.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.count = 0
        self._top: dict[str, Tensor] = {}

    def take(
        self,
        source: Source,
        seen: Curvature,
        optimizers: Sequence[Optimizer],
        full: bool,
        batch_sizes: Sequence[int] = (),
    ) -> Reading:
        """Measure.

        Args:
            source: The training step that is replayed.
            seen: Its curvature.
            optimizers: Of the run.
            full: Whether to measure the whole spectrum too, from a random start.
            batch_sizes: For which a full reading is to say the critical rate.
        """
        reading = Reading()
        values = reading.values
        self.count += 1
        most = self._affordable(seen.operator, source.ranks)
        if most < _LEAST_VECTORS:
            reading.absent[LAMBDA_MAX] = f"memory is too short for {_LEAST_VECTORS} vectors of all parameters"
            return reading
        if full and most < min(_LEAST_FOR_FULL, self.settings.max_hvps):
            reading.absent |= dict.fromkeys((LAMBDA_MIN, TRACE, AT_BATCH_SIZE), "memory is too short for full readings")
            full = False
        generator = torch.Generator(seen.operator.device).manual_seed(self.count)
        extremes = self._extremes(
            "hessian", seen.operator, seen.along_gradient, generator, full, "both" if full else "max", most
        )
        hvps = 1 + extremes.hvps
        values[LAMBDA_MAX] = extremes.lambda_max
        values[LAMBDA_MAX_ERROR] = extremes.lambda_max_error
        if extremes.reason == "non_finite":
            values[HVPS] = hvps
            return reading  # the loss is not finite here, or a rank has failed
        values[LAMBDA_MAX_LOWER] = extremes.lambda_max - extremes.lambda_max_error
        values[LAMBDA_MAX_UPPER] = extremes.lambda_max + extremes.lambda_max_error
        gradient = seen.operator.gradient
        if gradient is not None:
            values[BATCH_SHARPNESS] = batch_sharpness(gradient, seen.along_gradient, seen.operator.reduce)
        if full:
            hvps += self._spectrum(reading, seen.operator, extremes, source.way, generator)
        sharpness, top = extremes.lambda_max, extremes.top
        del extremes  # and its basis, before the next one
        steps = self._stability(reading, source, optimizers, seen.operator.device)
        if steps is not None:
            if steps.scale is not None or isinstance(steps.weight_decay, Tensor):
                scale = torch.ones_like(seen.along_gradient) if steps.scale is None else steps.scale
                operator = preconditioned(seen.operator, scale, steps.weight_decay)
                found = self._extremes(
                    "preconditioned", operator, scale * seen.along_gradient, generator, full, "max", most
                )
                hvps += found.hvps
                sharpness, top = found.lambda_max, found.top
                values[PRECONDITIONED] = sharpness
            else:
                sharpness += steps.weight_decay
            values[CRITICAL_LR] = steps.critical_lr(sharpness)
            values[SHARPNESS_RATIO] = steps.ratio(sharpness)
            if full and batch_sizes:
                hvps += self._at_batch_sizes(reading, source, seen, steps, sharpness, top, batch_sizes)
        values[HVPS] = hvps
        _leave_out_nothings(reading)
        return reading

    def _affordable(self, operator: Operator, ranks: int) -> int:
        """How many vectors of a basis fit into half of the memory that is free, on all ranks."""
        storage, width = self.settings.storage, torch.finfo(operator.dtype).bits // 8
        device = torch.device("cpu") if storage == "cpu" else operator.device
        room = free_memory(device) / 2 - _OTHER_VECTORS * operator.size * width
        each = max(operator.size * (2 if storage == "bfloat16" else width), 1)
        most = int(min(max(room, 0.0) / each, 1e6))
        return most if ranks == 1 else least_over_ranks(most, operator.device)

    def _extremes(
        self,
        which: str,
        operator: Operator,
        along_gradient: Tensor,
        generator: torch.Generator,
        full: bool,
        ends: Ends,
        most: int,
    ) -> Extremes:
        """From a random start at full readings, so that nothing is missed for long; else from what is known."""
        start = None
        if not full:
            start = along_gradient / (operator.norm(along_gradient) or 1.0)
            if self.settings.warm and which in self._top and len(self._top[which]) == operator.size:
                # The gradient turns towards where the top vector goes, when it has moved on.
                start = self._top[which].to(start) + 0.3 * start
        found = extreme_eigenvalues(
            operator,
            ends=ends,
            tol=self.settings.tol,
            max_hvps=min(self.settings.max_hvps, most),
            start=start,
            generator=generator,
            storage=self.settings.storage,
        )
        if found.reason != "non_finite":
            self._top[which] = found.top.to(torch.bfloat16)
        return found

    def _spectrum(
        self, reading: Reading, operator: Operator, extremes: Extremes, way: Way, generator: torch.Generator
    ) -> int:
        """What a random start tells beside the upper end; returns the products spent in addition."""
        values = reading.values
        if way.method == "differences" and way.kinks:
            reading.absent[LAMBDA_MIN] = (
                "only differences of gradients work here, and at the kinks of "
                f"{', '.join(way.kinks)} they see negative curvature that the Hessian does not have"
            )
        elif extremes.lambda_min is not None and extremes.lambda_min_error is not None:
            values[LAMBDA_MIN] = extremes.lambda_min
            values[LAMBDA_MIN_ERROR] = extremes.lambda_min_error
        krylov = extremes.krylov
        reading.density = SpectralDensity.from_krylov([krylov])
        values[LEARNED_LR], values[LEARNED_MOMENTUM] = learned_rates(krylov.ritz, krylov.weights)
        total = trace(operator, krylov, probes=self.settings.trace_probes, generator=generator)
        values[TRACE], values[TRACE_ERROR] = total.value, total.standard_error
        return total.hvps

    def _stability(
        self,
        reading: Reading,
        source: Source,
        optimizers: Sequence[Optimizer],
        device: torch.device,
    ) -> Stability | None:
        reason, found = "", None
        if len(optimizers) != 1:
            reason = f"the run has {len(optimizers)} optimizers, and one loss has no critical rate for all of them"
        else:
            try:
                optimizer = getattr(optimizers[0], "optimizer", optimizers[0])
                found = stability(optimizer, list(source.replay.parameters.values()))
            except Unsupported as error:
                reason = str(error)
            except Exception as error:
                if source.ranks == 1:
                    raise
                source.failure.error, reason = error, f"{type(error).__name__}: {error}"
        if not all_could(found is not None, source.ranks, device):
            reason, found = reason or "another rank cannot tell how its optimizer steps", None
        if found is None:
            reading.absent[SHARPNESS_RATIO] = reading.absent[CRITICAL_LR] = reason.rstrip(".")
        return found

    def _at_batch_sizes(
        self,
        reading: Reading,
        source: Source,
        seen: Curvature,
        steps: Stability,
        sharpness: float,
        top: Tensor,
        batch_sizes: Sequence[int],
    ) -> int:
        """The critical rate at other batch sizes, from how much the Hessian along its top vector differs by chunk."""
        if source.way.method != "exact":
            reading.absent[AT_BATCH_SIZE] = "it needs exact products on parts of the batch"
            return 0
        if seen.samples is None:
            own = source.replay
            where = "the batch cannot be cut into samples" if own.samples is None else "another rank's cannot be cut"
            reading.absent[AT_BATCH_SIZE] = f"it needs parts of the batch: {own.whole or where}"
            return 0
        failed, why = False, "on another rank"
        products, sizes = [top * math.nan], [1]
        try:
            products, sizes = self._on_chunks(source, steps, top)
        except Exception as error:
            if is_out_of_memory(error):
                source.failure.error = error
            # As BatchNorm, of which a part of the batch may be too small for a variance.
            failed, why = True, f"{type(error).__name__}: {error}".splitlines()[0]
        if source.ranks > 1:
            spread = spread_of_chunks(products, top, sizes, pool=sum_of_ranks)
            failed = not all_could(not failed, source.ranks, top.device)
        elif len(products) > 1:
            spread = spread_of_chunks(products, top, sizes)
        else:
            spread = HessianSpread(math.nan, math.nan, 1)
        if not math.isfinite(spread.outer):
            few = "it needs a batch of several samples"
            reading.absent[AT_BATCH_SIZE] = f"products on parts of the batch failed ({why})" if failed else few
            return 0
        for size in batch_sizes:
            reading.values[f"{AT_BATCH_SIZE}{size}"] = critical_lr_in_noise(
                sharpness, spread, size, seen.samples, steps.threshold, steps.inverse_gain
            )
        return 1

    def _on_chunks(self, source: Source, steps: Stability, top: Tensor) -> tuple[list[Tensor], list[int]]:
        """Products of the Hessians of this rank's chunks with the top vector, and the chunks' sizes."""
        samples = source.replay.samples or 0
        count = min(max(_CHUNKS // source.ranks, 1), max(samples // 2, 1))  # BatchNorm needs two samples
        if samples in (2, 3) and source.ranks == 1:
            count = 2
        edges = [samples * k // count for k in range(count + 1)]
        products = []
        for k, (start, stop) in enumerate(pairwise(edges)):
            operator = exact(source.replay, start, stop, seed=k)
            if steps.scale is not None:
                operator = preconditioned(operator, steps.scale)
            products.append(operator(top))
        return products, [stop - start for start, stop in pairwise(edges)]


# Why a full reading may have no such value, although the loss is finite.
_FLAT = "the largest eigenvalue is not above zero, so that curvature bounds no learning rate"
_BULK_ALONE = "no eigenvalue lies outside the bulk near zero"
_NOTHINGS = {CRITICAL_LR: _FLAT, AT_BATCH_SIZE: _FLAT, LEARNED_LR: _BULK_ALONE, LEARNED_MOMENTUM: _BULK_ALONE}


def _leave_out_nothings(reading: Reading) -> None:
    """Leave out what this spectrum does not have, instead of infinity and NaN, and note why."""
    for tag, value in list(reading.values.items()):
        kind = AT_BATCH_SIZE if tag.startswith(AT_BATCH_SIZE) else tag
        if kind in _NOTHINGS and not math.isfinite(value):
            del reading.values[tag]
            reading.absent[kind] = _NOTHINGS[kind]
