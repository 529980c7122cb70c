"""Readings as often as a share of the run's time allows, with clocks that the tests turn by hand."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from runs import Classifier, data, trainer
from torch import Tensor

from dynwatch.callbacks import HessianMonitor, hessian, stream
from dynwatch.callbacks.budget import Budget
from dynwatch.operators import Operator

STEP = 0.1  # seconds
GUESSES = {"reading": 20.0, "full": 60.0}  # steps


class Run:
    """Drives a budget as a monitor does, on a clock of its own."""

    def __init__(self, budget: Budget, others: float = 0.0, interval: int = 1, first_step: int = 0) -> None:
        self.budget = budget
        self.others = others  # seconds a step in other monitors
        self.interval = interval
        self.step = first_step
        self.elapsed = self.own = self.spent = 0.0
        self.readings: list[int] = []
        self.shares: list[float] = []  # after each reading
        budget.begin(first_step)

    def go(self, steps: int, cost: Callable[[int], float], kind: Callable[[int], str] = lambda i: "reading") -> Run:
        for _ in range(steps):
            self.elapsed += STEP + self.others
            self.own += self.others
            if (self.step + 1) % self.interval == 0:
                if self.budget.is_due(self.step):
                    seconds = cost(len(self.readings))
                    self.budget.spend(kind(len(self.readings)), seconds)
                    self.elapsed += seconds
                    self.own += seconds
                    self.spent += seconds
                    self.readings.append(self.step)
                    self.shares.append(self.own / self.elapsed)
                next_kind = kind(len(self.readings))
                clocks = self.budget.clocks(self.step, self.elapsed, self.own, next_kind, GUESSES)
                self.budget.plan(self.step, dict(zip(Budget.TAGS, clocks.tolist(), strict=True)))
            self.step += 1
        return self


@pytest.mark.parametrize("interval", [1, 7, 50])
@pytest.mark.parametrize("share", [0.005, 0.05, 0.5])
@pytest.mark.parametrize("cost", [1e-4, 1.0, 10.0])
def test_never_more_than_the_share(share: float, cost: float, interval: int) -> None:
    """With a cost that is as foreseen, no reading ever takes the run over its share, and the share is used."""
    budget = Budget(share)
    budget.costs["reading"] = cost
    run = Run(budget, interval=interval).go(40_000, lambda i: cost)
    assert run.readings and max(run.shares) <= share * (1 + 1e-9)
    between = [after - before for before, after in zip(run.readings, run.readings[1:], strict=False)]
    assert all(gap % interval == 0 for gap in between)
    if len(between) > 3 and min(between) > interval:
        assert run.own / run.elapsed > 0.7 * share


def test_costs_that_change() -> None:
    """Readings that cost more or less than the last ones are paid for by the next: no more than one too many."""
    rng = random.Random(0)
    costs = [rng.choice([0.01, 0.5, 3.0]) for _ in range(10_000)]
    run = Run(Budget(0.05)).go(60_000, costs.__getitem__)
    assert len(run.readings) > 100
    for i, share in enumerate(run.shares):
        assert share <= 0.05 * (1 + 1e-9) or share - 3.0 / (run.readings[i] * STEP) <= 0.05
    assert 0.04 < run.own / run.elapsed < 0.055


@pytest.mark.parametrize(("others", "expected"), [(0.0, 0.05), (0.02, 0.05), (0.06, 0.085)])
def test_what_others_take_counts(others: float, expected: float) -> None:
    """All of dynwatch stays within the share, down to half of it for readings."""
    run = Run(Budget(0.05), others=STEP * others / (1 - others)).go(100_000, lambda i: 0.5)
    assert run.own / run.elapsed == pytest.approx(expected, rel=0.03)
    assert run.spent / run.elapsed == pytest.approx(expected - others, rel=0.05)


def test_the_first_reading_waits_for_its_guess() -> None:
    """A guess of 20 steps at a share of 5 % is affordable after 400 steps, however long a step takes."""
    run = Run(Budget(0.05)).go(1000, lambda i: 1e-9)
    assert run.readings[0] in (399, 400, 401)


def test_an_unknown_kind_is_guessed_from_a_known_one() -> None:
    """Once an ordinary reading has been measured, a full one is thought to cost three times as much, not 60 steps."""
    run = Run(Budget(0.05)).go(3000, lambda i: 1.0 if i else 0.5, lambda i: "full" if i == 1 else "reading")
    # Of 0.5 + 1.5 s, at 0.05 s of budget a second.
    assert run.readings[1] in (399, 400, 401)


def test_dearer_readings_wait_longer() -> None:
    """Each kind waits for its own cost."""
    kinds = ["reading", "full"]
    costs = {"reading": 1.0, "full": 10.0}
    run = Run(Budget(0.05)).go(100_000, lambda i: costs[kinds[i % 2]], lambda i: kinds[i % 2])
    waits = [after - before for before, after in zip(run.readings, run.readings[1:], strict=False)][6:]
    before_full, before_ordinary = waits[::2], waits[1::2]
    # 10 s are 5 % of 200 s; of the 20 s that 1 s needs, the dear reading before it took 10.
    assert before_full == pytest.approx([2000] * len(before_full), rel=0.1)
    assert before_ordinary == pytest.approx([100] * len(before_ordinary), rel=0.1)
    assert len(waits) > 50


def test_ranks_with_other_clocks_plan_alike() -> None:
    """Two ranks with clocks and costs of their own have the same readings, and those that the averages afford."""
    ranks = [Budget(0.1), Budget(0.1)]
    rng, elapsed, own = random.Random(1), [0.0, 0.0], [0.0, 0.0]
    readings = 0
    for step in range(5000):
        due = {budget.is_due(step) for budget in ranks}
        assert len(due) == 1
        for rank, budget in enumerate(ranks):
            elapsed[rank] += STEP * rng.uniform(0.5, 1.5 + rank)
            if due == {True}:
                seconds = rng.uniform(0.1, 1.0) * (1 + 2 * rank)
                budget.spend("reading", seconds)
                elapsed[rank] += seconds
                own[rank] += seconds
        readings += due == {True}
        clocks = [b.clocks(step, elapsed[r], own[r], "reading", GUESSES) for r, b in enumerate(ranks)]
        mean = dict(zip(Budget.TAGS, torch.stack(clocks).mean(0).tolist(), strict=True))
        for budget in ranks:
            budget.plan(step, mean)
    assert readings > 20
    assert sum(own) / sum(elapsed) == pytest.approx(0.1, rel=0.1)


def test_no_reading_before_a_plan() -> None:
    """Neither at the start nor after a reading is one due before the ranks have agreed when."""
    budget = Budget(0.5)
    assert not budget.is_due(10**9)
    budget.plan(0, dict(zip(Budget.TAGS, (1e9, 0.0, 0.0, 1.0, 0.0), strict=True)))
    assert not budget.is_due(0) and budget.is_due(1)
    budget.spend("reading", 1.0)
    assert not budget.is_due(10**9)


def test_a_clock_that_stands_still() -> None:
    """No time at all plans nothing, and does not divide by it."""
    budget = Budget(0.5)
    budget.plan(0, dict.fromkeys(Budget.TAGS, 0.0))
    assert not budget.is_due(10**9)
    budget.plan(0, dict(zip(Budget.TAGS, budget.clocks(0, 1e-300, 0.0, "reading", GUESSES).tolist(), strict=True)))


def test_a_resumed_run_knows_the_costs() -> None:
    """It waits for what the last readings cost, not for the guess, and counts time from its own start."""
    first = Budget(0.05)
    Run(first).go(2000, lambda i: 5.0)
    second = Budget(0.05)
    second.load_state(first.state())
    run = Run(second, first_step=2000).go(4000, lambda i: 5.0)
    assert run.readings[0] == pytest.approx(2000 + 1000, abs=2)  # 5 s are 5 % of 100 s
    assert max(run.shares) <= 0.05
    assert first.state() == {"costs": {"reading": 5.0}} == second.state()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_shares_out_of_bounds(share: float) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match=re.escape(f"max_overhead={share!r}")):
        HessianMonitor(max_overhead=share)


# --- in a run: the clock stands still but in training steps and in products


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    """Training steps take 1 s and products 2 s; all else takes no time."""
    Clock.now = 0.0
    turned = SimpleNamespace(perf_counter=lambda: Clock.now)
    monkeypatch.setattr(hessian, "time", turned)
    monkeypatch.setattr(stream, "time", turned)
    product = Operator.__call__

    def slow(self: Operator, vector: Tensor) -> Tensor:
        Clock.now += 2.0
        return product(self, vector)

    monkeypatch.setattr(Operator, "__call__", slow)
    return Clock


class Timed(pl.Callback):
    """Lets a step take a second, and notes the share of dynwatch after each."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_before_backward(self, *args: Any) -> None:
        Clock.now += 1.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.shares.append(float(trainer.callback_metrics.get("dynwatch/overhead", math.nan)))


def steps_of_readings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """A list that fills with the step and the kind of each reading."""
    seen: list[tuple[int, str]] = []
    whole = HessianMonitor._read_off

    def noting(self: HessianMonitor, trainer: Any, pl_module: Any) -> None:
        seen.append((stream.Stream.step(trainer), self._kind))
        whole(self, trainer, pl_module)

    monkeypatch.setattr(HessianMonitor, "_read_off", noting)
    return seen


def fit(monitor: HessianMonitor, folder: Path, epochs: int, **settings: Any) -> Timed:
    timed = Timed()
    settings = {"log_every_n_steps": 5, "logger": False, "max_epochs": epochs} | settings
    trainer(folder, [timed, monitor], **settings).fit(Classifier(lr=0.01), data(n=128))
    assert monitor.off is None
    return timed


def test_a_run_keeps_within_its_share(clock: type[Clock], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At 5 % a run of 2400 steps has ordinary and full readings, at logging steps, and ends near the share."""
    seen = steps_of_readings(monkeypatch)
    monitor = HessianMonitor(max_overhead=0.05, full_every_n_readings=3)
    timed = fit(monitor, tmp_path, 150)
    assert len(seen) >= 4 and {kind for _, kind in seen} == {"reading", "full"}
    assert all((step + 1) % 5 == 0 for step, _ in seen)
    assert seen[0][0] >= 719  # a guess of 36 steps
    assert 0.025 < timed.shares[-1] <= 0.055
    assert monitor._readings == len(seen)


def test_a_short_run_says_that_nothing_fitted(clock: type[Clock], tmp_path: Path) -> None:
    """The reason names the share and the remedy."""
    monitor = HessianMonitor(max_overhead=0.05)
    fit(monitor, tmp_path, 2)
    assert monitor._readings == 0 and monitor._stream is not None
    assert re.search(r"max_overhead=0.05 .* every_n_steps", monitor._stream.reasons["hessian/lambda_max"])


def test_an_explicit_cadence_is_kept_at_any_cost(
    clock: type[Clock], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """every_n_steps knows no budget: each of its steps has a reading, at logging steps or not."""
    seen = steps_of_readings(monkeypatch)
    timed = fit(HessianMonitor(every_n_steps=3, max_overhead=0.001), tmp_path, 2)
    assert [step for step, _ in seen] == list(range(2, 32, 3))
    assert timed.shares[-1] > 0.5
