"""A cadence that follows cost: the next reading comes when it can be afforded, on all ranks at the same step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynwatch.rules.base import check_number


class Budget:
    """Plans readings so that they take no more than a share of a run's time.

    The ranks agree without a collective of their own: each emits its clocks with the readings that go through a flush
    anyway (`clocks`), and all of them plan from the same averages (`plan`). Before the first reading its cost is
    guessed from the time of a training step.

    Args:
        share: The most that all of dynwatch may take, as a share of the run's time; at least half of it is for these
            readings.

    Raises:
        ValueError: If the share is not above 0 and below 1.
    """

    TAGS = ("elapsed", "others", "spent", "steps", "cost")

    def __init__(self, share: float) -> None:
        self.share = check_number("max_overhead", share, above=0.0, below=1.0, remedy="0.05 is five per cent")
        self.costs: dict[str, float] = {}  # seconds of the latest reading of each kind
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start the count at the first step of a run, or of its resumption."""
        self._first_step = step
        self._due: int | None = None
        self.spent = 0.0  # seconds of readings since then

    def spend(self, kind: str, seconds: float, whole: bool = True) -> None:
        """Note what a reading took; one that is not whole tells nothing of what the next one takes."""
        self.spent += seconds
        if whole:
            self.costs[kind] = seconds
        self._due = None  # until the ranks have planned anew

    def is_due(self, step: int) -> bool:
        """Whether the next reading is affordable at this step; the same answer on all ranks."""
        return self._due is not None and step >= self._due

    def clocks(self, step: int, elapsed: float, own: float, kind: str, guesses: Mapping[str, float]) -> Tensor:
        """What `plan` needs from each rank, [5], in the order of `TAGS`.

        Args:
            step: The current step.
            elapsed: Seconds since training started.
            own: Of these, seconds in dynwatch.
            kind: Which kind of reading comes next.
            guesses: For the first time: the cost of each kind in training steps. Where another kind has been measured,
                only their ratio is used.
        """
        steps = step + 1 - self._first_step
        others = max(own - self.spent, 0.0)
        a_step = max(elapsed - own, 0.0) / max(steps, 1)
        cost = self.costs.get(kind, guesses[kind] * a_step)
        if kind not in self.costs and self.costs:
            cost = max(seconds * guesses[kind] / guesses[other] for other, seconds in self.costs.items())
        return torch.tensor([elapsed, others, self.spent, steps, cost], dtype=torch.float64)

    def plan(self, step: int, clocks: Mapping[str, float]) -> None:
        """Choose the next step, from the ranks' averaged clocks of this one."""
        elapsed, others, spent, steps, cost = (clocks[tag] for tag in self.TAGS)
        if not elapsed > 0:
            return
        rate = self.share - min(others / elapsed, self.share / 2)
        seconds = (spent + cost) / rate - elapsed
        a_step = (elapsed - spent) / max(steps, 1)
        self._due = step + 1 + max(0, math.ceil(seconds / max(a_step, 1e-9)))

    def state(self) -> dict[str, Any]:
        return {"costs": dict(self.costs)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.costs = dict(state["costs"])


def wait_for(device: torch.device) -> None:
    """Let a device finish what it has been given, so that a clock tells who took the time."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
