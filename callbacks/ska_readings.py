"""What a probe's sums say, on the host: readings by layer, of the network, and the run's characteristic times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynwatch.rules import tags
from dynwatch.ska_equilibrium import SETTLED, Change, Equilibrium, Moment
from dynwatch.ska_layer import KnowledgeReading, LayerKnowledge

EQUILIBRIUM = tags.EQUILIBRIUM
KINDS = ("entropy", "entropy_published", "alignment", "flow", "net", "norm")
NETWORK = {kind: f"ska/{kind}" for kind in ("entropy", "flow", "time", "peak_time", "settled_time")}
# Which of a layer's readings stand under a kind's name.
_FIELDS = dict(zip(KINDS, ("entropy", "entropy_published", "alignment", "flow", "net_code", "norm"), strict=True))
# A layer that begins anew so many times has other samples at each probe, as an expert has.
_OFTEN = 3
# Probes below which nothing is said of an end without equilibrium.
_FEW = 6


class Readings:
    """Follows the probes of a run, on the host: sums to readings."""

    def __init__(self) -> None:
        self._equilibrium = Equilibrium()
        self._time = 0.0  # since the first probe
        self._judged = 0  # probes that were compared with the one before
        self._begun: dict[str, int] = {}  # how often each layer began anew
        self._remarks: dict[str, str] = {}

    def take(
        self,
        step: int,
        layers: Mapping[str, LayerKnowledge],
        sums: Mapping[str, Sequence[float]],
        time: float,
        steps: int,
    ) -> dict[str, float]:
        """Turn one probe's sums, added over the ranks, into readings by tag.

        Args:
            step: The training step.
            layers: The layers' own memory.
            sums: What they measured.
            time: Since the probe before.
            steps: The same, in steps.
        """
        first = not self._begun
        self._time += 0.0 if first else time
        found = {use: layers[use].read(values, time) for use, values in sums.items()}
        readings = {NETWORK["time"]: self._time}
        for use, reading in found.items():
            if reading.reason != "step":
                self._begun[use] = self._begun.get(use, 0) + (reading.reason != "lost")
                if reading.reason == "reshaped":
                    self._equilibrium.forget(use)
            numbers = {kind: getattr(reading, field) for kind, field in _FIELDS.items()}
            readings |= {f"ska/{use}/{kind}": value for kind, value in numbers.items() if math.isfinite(value)}
        self._remark(step, found, time)
        stepped = {use: reading for use, reading in found.items() if reading.reason == "step"}
        whole = all(reading.reason != "lost" and not reading.non_finite for reading in found.values())
        if stepped and whole:
            readings[NETWORK["entropy"]] = _mean(reading.entropy for reading in stepped.values())
            flow = _mean(reading.flow for reading in stepped.values())
            if math.isfinite(flow):
                readings[NETWORK["flow"]] = flow
            readings |= self._judge(stepped, Moment(self._time, step), steps)
        return readings

    def _judge(self, stepped: Mapping[str, KnowledgeReading], now: Moment, steps: int) -> dict[str, float]:
        changes = {use: Change(r.flow, r.entropy_trapezoid / max(steps, 1)) for use, r in stepped.items()}
        level = self._equilibrium.update(changes, now)
        self._judged += 1
        readings = {EQUILIBRIUM: level} if math.isfinite(level) else {}
        if self._equilibrium.peak is not None:
            readings[NETWORK["peak_time"]] = self._equilibrium.peak.time
        if self._equilibrium.settled is not None:
            readings[NETWORK["settled_time"]] = self._equilibrium.settled.time
        return readings

    def _remark(self, step: int, found: Mapping[str, KnowledgeReading], time: float) -> None:
        if any(reading.reason == "step" and math.isnan(reading.flow) for reading in found.values()) and time == 0:
            self._remarks["ska/flow"] = "none where no learning rate was above zero; SKAMonitor(time='steps') has one"
        else:
            self._remarks.pop("ska/flow", None)
        lost = [use for use, reading in found.items() if reading.reason == "lost"]
        if lost and len(lost) < len(found):
            what = f"{lost[0]} ({len(lost)} layers)" if len(lost) > 1 else lost[0]
            self._remarks["ska network"] = f"{what} did not run at step {step}, so that means over layers are left out"
        bad = [use for use, reading in found.items() if reading.non_finite]
        if bad:
            self._remarks["ska"] = f"at step {step} pre-activations of {bad[0]} were not finite ({len(bad)} layers)"
        often = [use for use, times in self._begun.items() if times >= _OFTEN]
        if often:
            what = f"{often[0]} and {len(often) - 1} more have" if len(often) > 1 else f"{often[0]} has"
            self._remarks["ska layers"] = f"{what} other samples from probe to probe, so that steps cannot be told"

    def remarks(self, unit: str) -> dict[str, str]:
        """What to know about the readings so far, by subject; the characteristic times among it."""
        peak, settled = self._equilibrium.peak, self._equilibrium.settled
        if peak is None:
            return dict(self._remarks)
        amount = "sum of learning rates" if unit == "lr" else "number of steps"
        text = f"flow peaked at a {amount} of {peak.time:.3g} (step {peak.step})"
        if settled is None and self._judged < _FEW:
            text += f"; {self._judged} probes are too few to tell whether it came to equilibrium"
        elif settled is None:
            text += f"; not at equilibrium (ska/equilibrium at most {SETTLED:g}) at the end"
        else:
            text += f"; at equilibrium from {settled.time:.3g} on (step {settled.step})"
        return {**self._remarks, "ska/peak_time": text}

    def state(self) -> dict[str, Any]:
        return {
            "equilibrium": self._equilibrium.state_dict(),
            "time": self._time,
            "judged": self._judged,
            "begun": dict(self._begun),
            "remarks": dict(self._remarks),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._equilibrium.load_state_dict(state["equilibrium"])
        self._time, self._judged = state["time"], state["judged"]
        self._begun = dict(state["begun"])
        self._remarks = dict(state["remarks"])


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
