"""Readings of pathways, look after look: agreed over the ranks, with the split into memorised samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dynwatch.callbacks.batches import MOST_SAVED_BYTES
from dynwatch.callbacks.curvature import all_could
from dynwatch.callbacks.moe_pathways import MOE, Look, PathwayLooks, parts_of, pathway_readings, summed
from dynwatch.callbacks.moe_probe import ProbeSet
from dynwatch.callbacks.moe_tokens import TokenLayout
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.probe import Forward
from dynwatch.callbacks.snapshot import CannotReplayError
from dynwatch.memorization import MemorizedSamples
from dynwatch.pathways import Unit
from dynwatch.router_capture import RouterCapture
from dynwatch.router_plan import router_weight

Readings = dict[str, float]
# Told of a tag that has no value, with the reason.
Absent = Callable[[str, str], object]


class PathwayReader:
    """Takes looks at a probe and makes readings of them.

    Attributes:
        probe: The samples.
        taken: Looks so far.
        reason: Why there are none in this run.

    Args:
        probe: The samples.
        layout: Of their tokens.
        forward: Run instead of the module's step.
        unit: Of distances.
        threshold: Of pathways.
        memorized: Whether memorised samples are read on their own, too.
    """

    def __init__(
        self,
        probe: ProbeSet,
        layout: TokenLayout,
        forward: Forward | None,
        unit: Unit,
        threshold: float,
        memorized: bool,
    ) -> None:
        self.probe = probe
        self.taken = 0
        self.reason = ""
        self._looks = PathwayLooks(probe, layout, forward)
        self._unit, self._threshold, self._split = unit, threshold, memorized
        self._memorized = MemorizedSamples()
        self._seen: set[str] = set()  # tags that have had a value

    def read(
        self, trainer: Trainer, pl_module: LightningModule, capture: RouterCapture, absent: Absent
    ) -> Readings | None:
        """Take a look; all ranks must call it together.

        Returns:
            Readings, the same on all ranks; None if this or another rank could not look, as `reason` says.
        """
        device, ranks = pl_module.device, trainer.world_size
        self.probe.close()
        if not all_could(bool(self.probe.batches), ranks, device):
            # On all ranks alike, or some would wait for the others at the next look.
            if not all_could(not self.probe.reason, ranks, device):
                self.reason = self.probe.reason or "the probe could not be kept on another rank"
                absent(f"{MOE}distance", self.reason)
            return None
        look, failure = None, None
        try:
            rows = self.probe.max_samples
            look = self._looks.look(trainer, pl_module, capture, rows * ranks, rows * trainer.global_rank)
        except Exception as error:
            failure = error
        if not all_could(look is not None, ranks, device) or look is None:
            # On all ranks: health goes on without pathways.
            cause = str(failure) if isinstance(failure, (CannotReplayError, ValueError)) else repr(failure)
            self.reason = cause.rstrip(".") if failure is not None else "the probe could not be run on another rank"
            absent(f"{MOE}distance", self.reason)
            return None
        if ranks > 1:
            if not all_could(look.groups is not None, ranks, device):
                look.groups = None
            look = summed(look)
        weights = [router_weight(site) for site in capture.sites]  # sharded ones are gathered by all ranks
        self.taken += 1
        return self._readings(look, weights, capture, absent)

    def _readings(self, look: Look, weights: list[Tensor | None], capture: RouterCapture, absent: Absent) -> Readings:
        readings: Readings = {}
        known = look.losses[~look.losses.isnan()]
        settled = self._memorized.update(look.losses)
        if len(known):
            readings[f"{MOE}probe_loss"] = float(known.mean())
            readings[f"{MOE}memorized"] = float(settled.sum()) / len(known)
        else:
            absent(f"{MOE}memorized", "the probe's step computes no cross entropy of its samples")
        for part, layers in parts_of(capture).items():
            prefix = f"{MOE}{part}/" if part else MOE
            subsets = [("", None)] + [("memorized/", settled)] * (self._split and int(settled.sum()) > 1)
            for name, only in subsets:
                found, missing = pathway_readings(look, layers, weights, self._unit, self._threshold, only)
                readings |= {f"{prefix}{name}{tag}": value for tag, value in found.items()}
                for tag, reason in missing.items():
                    if reason and not name and f"{prefix}{tag}" not in self._seen:
                        absent(f"{prefix}{tag}", reason)
        for at, (kept, slots) in enumerate(look.shared.tolist()):
            if slots:
                readings[f"{MOE}layer_{at}/stability"] = kept / slots
        self._seen |= readings.keys()
        return readings

    # --- state

    def state(self, alone: bool) -> dict[str, Any]:
        """What later readings depend on.

        Args:
            alone: Whether this is the only rank: a checkpoint holds the first one's state, and its samples are not the
                others'.
        """
        probe = self.probe.state() if alone else None
        return {
            "taken": self.taken,
            "probe": probe,
            "choices": self._looks.state(MOST_SAVED_BYTES) if probe else {},
            "memorized": self._memorized.state_dict() if probe else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.taken = state["taken"]
        self.probe.load_state(state["probe"])
        self._looks.load_state(state["choices"])
        if state["memorized"] is not None:
            self._memorized.load_state_dict(state["memorized"])
