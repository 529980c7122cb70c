"""SKA readings of one layer over a run, from one stored tensor, in sums that several processes can add up.

The formulas and what they are worth are in `dynwatch.ska`. `LayerKnowledge.measure` runs on the device and waits for
nothing, `LayerKnowledge.read` runs on the host, after the sums have been added over the ranks:

    sums = layer.measure(z)                      # each rank, its own samples
    dist.all_reduce(sums)
    reading = layer.read(sums.tolist(), dt=0.1)  # the same on all ranks
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from dynwatch._logit_rows import check_floats
from dynwatch.constants import widest_float
from dynwatch.rules.base import check_number
from dynwatch.ska import decision_change

# What `LayerKnowledge.measure` returns, in this order; z and D are of now, Δ is since the probe before.
SUMS = (
    "began",  # 1 from a rank that had nothing to compare with
    "elements",
    "non_finite",
    "z ΔD",
    "mean ΔD",  # the mean of z now and before, times ΔD
    "z²",
    "ΔD²",
    "Δz²",
    "D Δz",
    "z D' Δz",
    "h",
    "softplus",
)

# Larger pre-activations count as not finite: differences of two could overflow float32.
_LARGEST = 2.0**126

# Below this share of the longest interval the flow is not taken anew: float32 has about seven digits, and over so
# short a time the rounding of z is a part of its movement that counts.
_SHORTEST = 1e-4


Reason = Literal["step", "first", "reshaped", "lost"]


@dataclass(frozen=True)
class KnowledgeReading:
    """One layer at one probe. Numbers are means per element, so that layers of different sizes compare.

    Those of the last step are NaN at a first probe, and all numbers are NaN while an element is not finite.

    Attributes:
        reason: "step"; "first" if there was no probe before, or "reshaped" if the last had another shape (on any rank):
            then everything is counted from this probe on. "lost" if a sum is NaN or infinite, as of a rank that
            failed: a reading without numbers, which the sums over steps leave out.
        elements: Samples times units that were read.
        non_finite: How many of them are NaN, infinite or above 2^126.
        norm: Root mean square of Z: the papers' norm over √elements.
        flow: Root mean square of ΔZ, over Δt; 0 where nothing moved, and else the last one where Δt is next to nothing.
        alignment: cos θ of the step.
        entropy: Exact entropy since the first probe, in bits: with the trapezoid's the one to decide by.
        entropy_published: Of the step, at its right end, as the papers plot it.
        entropy_published_sum: Sum of these, which drifts under noise.
        entropy_trapezoid: Of the step.
        entropy_trapezoid_sum: Sum of these.
        net_paper: Tensor Net of the step with the paper's sign.
        net_paper_sum: Sum of these.
        net_paper_exact: Its limit of small steps since the first probe.
        net_code: Tensor Net of the step with the released code's sign.
        net_code_sum: Sum of these.
        net_code_exact: Its limit of small steps since the first probe.

    Example:
        >>> layer = LayerKnowledge()
        >>> layer.read(layer.measure(torch.ones(2, 3)).tolist()).norm
        1.0
    """

    reason: Reason
    elements: int
    non_finite: int
    norm: float
    flow: float
    alignment: float
    entropy: float
    entropy_published: float
    entropy_published_sum: float
    entropy_trapezoid: float
    entropy_trapezoid_sum: float
    net_paper: float
    net_paper_sum: float
    net_paper_exact: float
    net_code: float
    net_code_sum: float
    net_code_exact: float


# All but the reason and the two counts.
_NUMBERS = tuple(field.name for field in fields(KnowledgeReading))[3:]


class LayerKnowledge:
    """Follows the pre-activations of one layer on fixed samples.

    It stores one float32 tensor, of the last probe. An element that is not finite keeps its last finite value there (0
    before it had one): readings are NaN as long as it lasts, and afterwards the sums and the exact forms are right.
    Each rank measures its own samples; with the sums added up, all of them read the same.

    Example:
        >>> layer = LayerKnowledge()
        >>> for z in (0.5, 1.0, 2.0):
        ...     reading = layer.read(layer.measure(torch.tensor([z])).tolist(), dt=0.1)
        >>> round(reading.entropy_trapezoid, 6), round(reading.flow, 6)
        (-0.324041, 10.0)
    """

    def __init__(self) -> None:
        self._before: Tensor | None = None
        self._start: dict[str, float] = {}  # of the first probe: h, softplus and the number of elements
        self._totals = dict.fromkeys(("published", "trapezoid", "paper", "code"), 0.0)
        self._longest, self._flow = 0.0, math.nan

    def measure(self, z: Tensor) -> Tensor:
        """Take in the pre-activations of a probe, on the device and without waiting for it.

        Args:
            z: [...] pre-activations: the same samples and units each time. Another shape begins anew.

        Returns:
            [len(SUMS)] in the widest float of the device, in the order of `SUMS`: what ranks add up.

        Raises:
            TypeError: If z is not a tensor of real floats.

        Example:
            >>> measured = LayerKnowledge().measure(torch.tensor([1.0, math.nan]))
            >>> dict(zip(SUMS, measured.tolist()))["non_finite"]
            1.0
        """
        check_floats("z", z)
        z = z.detach()
        began = self._before is None or self._before.shape != z.shape
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if self._before is None or began:
                self._before = torch.zeros(z.shape, dtype=torch.float32, device=z.device)
            stored = self._before = self._before.to(z.device)
        wide = widest_float(z.device)
        sums = torch.zeros(len(SUMS), dtype=wide, device=z.device)
        new, old = z.reshape(-1), stored.view(-1)
        with torch.no_grad():
            for part in _slices(new):
                values = new[part].float()
                finite = values.abs() <= _LARGEST
                values = torch.where(finite, values, old[part])
                sums[2] += (~finite).sum()
                sums[3:] += _sums(values, values if began else old[part], wide)
                old[part] = values
        sums[0], sums[1] = float(began), z.numel()
        return sums

    def read(self, sums: Sequence[float], dt: float = 1.0) -> KnowledgeReading:
        """Turn the sums of one probe, added over the ranks, into a reading.

        Args:
            sums: [len(SUMS)] what `measure` returned; every probe's, in order.
            dt: Time since the probe before: a sum of learning rates or a number of steps. Below 1e-4 of the longest
                one so far the flow keeps its last value, because a quotient of two vanishing numbers is unstable.

        Returns:
            The reading.

        Raises:
            ValueError: If there are not as many sums, or dt is negative or not finite.

        Example:
            >>> layer = LayerKnowledge()
            >>> layer.read(layer.measure(torch.zeros(4))).reason, layer.read(layer.measure(torch.zeros(5))).reason
            ('first', 'reshaped')
        """
        if len(sums) != len(SUMS):
            raise ValueError(f"sums has {len(sums)} entries and must have {len(SUMS)}: pass what measure returned.")
        check_number("dt", dt, least=0.0, below=math.inf, remedy="it is the time since the probe before")
        began, elements, non_finite, *rest = values = [float(value) for value in sums]
        if not all(map(math.isfinite, values)):
            return KnowledgeReading("lost", 0, 0, **dict.fromkeys(_NUMBERS, math.nan))
        known = dict(zip(SUMS[3:], (value / elements if elements else math.nan for value in rest), strict=True))
        reason: Reason = "step"
        if began or elements != self._start.get("elements"):
            reason = "reshaped" if self._start else "first"
            self._begin(known, elements)
        step = self._step(known) if reason == "step" else dict.fromkeys(self._totals, math.nan)
        flow = self._flow_of(known, dt, trusted=not non_finite) if reason == "step" else math.nan
        entropy = known["h"] - self._start["h"]
        softplus = known["softplus"] - self._start["softplus"]
        numbers = {
            "norm": math.sqrt(known["z²"]),
            "flow": flow,
            "alignment": _cosine(known) if reason == "step" else math.nan,
            "entropy": entropy,
            "entropy_published": step["published"],
            "entropy_published_sum": self._totals["published"],
            "entropy_trapezoid": step["trapezoid"],
            "entropy_trapezoid_sum": self._totals["trapezoid"],
            "net_paper": step["paper"],
            "net_paper_sum": self._totals["paper"],
            "net_paper_exact": softplus - entropy,
            "net_code": step["code"],
            "net_code_sum": self._totals["code"],
            "net_code_exact": softplus + entropy,
        }
        if non_finite or not elements:
            numbers = dict.fromkeys(_NUMBERS, math.nan)
        return KnowledgeReading(reason, round(elements), round(non_finite), **numbers)

    def restart(self) -> None:
        """Forget the stored tensor, as when the samples are others: the next probe begins anew.

        Example:
            >>> layer = LayerKnowledge()
            >>> for z in (0.5, 1.0):
            ...     reading = layer.read(layer.measure(torch.tensor([z])).tolist())
            ...     layer.restart()
            >>> reading.reason
            'reshaped'
        """
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        """What later readings depend on: numbers, and the stored tensor, which is this rank's own."""
        return {
            "before": None if self._before is None else self._before.clone(),
            "start": dict(self._start),
            "totals": dict(self._totals),
            "longest": self._longest,
            "flow": self._flow,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the tensor goes to the device of the next probe."""
        before = state["before"]
        with torch.inference_mode(False):
            self._before = None if before is None else before.detach().to(torch.float32, copy=True).contiguous()
        self._start, self._totals = dict(state["start"]), dict(state["totals"])
        self._longest, self._flow = state["longest"], state["flow"]

    def _begin(self, known: dict[str, float], elements: float) -> None:
        self._start = {"elements": elements, "h": known["h"], "softplus": known["softplus"]}
        self._totals = dict.fromkeys(self._totals, 0.0)
        self._longest, self._flow = 0.0, math.nan

    def _step(self, known: dict[str, float]) -> dict[str, float]:
        """Entropies and Nets of the step, which are also added to the totals."""
        slope = known["z D' Δz"] / math.log(2)
        step = {
            "published": -known["z ΔD"] / math.log(2),
            "trapezoid": -known["mean ΔD"] / math.log(2),
            "paper": known["D Δz"] + slope,
            "code": known["D Δz"] - slope,
        }
        for name, value in step.items():
            self._totals[name] += value
        return step

    def _flow_of(self, known: dict[str, float], dt: float, trusted: bool) -> float:
        self._longest = max(self._longest, dt)
        if trusted and known["Δz²"] == 0:
            self._flow = 0.0  # however short the time: nothing has moved
        elif trusted and dt > _SHORTEST * self._longest:
            self._flow = math.sqrt(known["Δz²"]) / dt
        return self._flow


def _cosine(known: dict[str, float]) -> float:
    norms = math.sqrt(known["z²"]) * math.sqrt(known["ΔD²"])
    return max(-1.0, min(1.0, known["z ΔD"] / norms)) if norms else 0.0


def _sums(z: Tensor, before: Tensor, wide: torch.dtype) -> Tensor:
    """The sums of `SUMS` from the fourth on, of finite float32 [n]; one exponential serves h and softplus."""
    size = z.abs()
    softplus = torch.log1p(torch.exp(-size))  # of -size
    decision, doubt = torch.sigmoid(z), torch.sigmoid(-z)
    change, dz = decision_change(z, before), z - before
    terms = [
        z * change,
        (z / 2 + before / 2) * change,
        *(x.to(wide).square() for x in (z, change, dz)),  # squares may not fit float32
        decision * dz,
        z * decision * doubt * dz,
        (softplus + size * torch.sigmoid(-size)) / math.log(2),
        softplus + z.clamp_min(0),
    ]
    return torch.stack([x.sum(dtype=wide) for x in terms])


def _slices(z: Tensor) -> Iterator[slice]:
    """Parts of [n] whose temporaries fit a CPU's cache, twice as fast for large n; other devices want few parts."""
    size = 2**16 if z.device.type == "cpu" else 2**22
    for start in range(0, len(z), size):
        yield slice(start, start + size)
