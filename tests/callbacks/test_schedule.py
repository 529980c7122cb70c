"""The budget that is spent, and the lowest learning rate still to come, against what real training then did."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import Classifier, data, scalars, trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, IterableDataset

from dynwatch.callbacks import EarlyTermination
from dynwatch.callbacks.harmless import is_harmless
from dynwatch.callbacks.schedule import PlannedRates, rates_to_come
from dynwatch.rules import Rule

PROGRESS, LR, LR_LOW = "stop/progress", "stop/lr", "stop/lr_low"
STEPS, PER_EPOCH = 24, 8  # three epochs of eight batches, if nothing else is said


class Reader(Rule):
    """Keeps what it is told of the plan, by step."""

    name = "reader"
    reads = (PROGRESS, LR, LR_LOW)

    def __init__(self) -> None:
        self.seen: dict[str, dict[int, float]] = {tag: {} for tag in self.reads}

    def update(self, step: int, readings: Any, notes: Any) -> None:
        for tag in self.reads:
            if tag in readings:
                self.seen[tag][step] = readings[tag]


class Scheduled(Classifier):
    """Trains with what `configure` makes of its optimizer, and notes the highest rate of every step."""

    def __init__(self, configure: Callable[[Scheduled], Any]) -> None:
        super().__init__()
        self.configure = configure
        self.rates: list[float] = []
        self.end = math.inf  # the epoch in which this step is done is the last

    def configure_optimizers(self) -> Any:
        return self.configure(self)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", torch.ones(()))  # never better: a plateau

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.automatic_optimization or not self.trainer.fit_loop._should_accumulate():
            self.rates.append(self.used)

    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = self.trainer.global_step >= self.end

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.used = max(group["lr"] for o in self.trainer.optimizers for group in o.param_groups)


def sgd(model: Scheduled, lr: float = 0.1) -> SGD:
    return SGD(model.parameters(), lr=lr, momentum=0.9)


def scheduled(make: Callable[[Any], Any], **config: Any) -> Callable[[Scheduled], Any]:
    """`configure_optimizers` with one optimizer and the scheduler that `make` makes."""

    def configure(model: Scheduled) -> Any:
        optimizer = sgd(model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **config}}

    return configure


def fit(folder: Path, configure: Callable[[Any], Any], resume: Any = None, **settings: Any) -> tuple[Any, Any, Reader]:
    """Train for three epochs of eight batches with a rule that reads the plan."""
    reader, model = Reader(), Scheduled(configure)
    stop = EarlyTermination(rules=[reader])
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0, "callbacks": [stop]} | settings
    settings["callbacks"] = [stop, *(c for c in settings["callbacks"] if c is not stop)]
    run = trainer(folder, **settings)
    run.fit(model, data(), data(8), **({"ckpt_path": resume, "weights_only": False} if resume else {}))
    assert stop.off is None
    return run, model, reader


def still_to_come(rates: list[float]) -> list[float]:
    return [min(rates[at:]) for at in range(len(rates))]


# --- the lowest rate


def _sequential(o: Any) -> Any:
    return lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=6), lrs.ExponentialLR(o, 0.8)], milestones=[6])


def _chained(o: Any) -> Any:
    return lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, total_iters=4), lrs.ExponentialLR(o, 0.9)], optimizer=o)


STEP = {"interval": "step"}
SCHEDULES: dict[str, Callable[[Scheduled], Any]] = {
    "none": sgd,
    "step_lr_by_epoch": scheduled(lambda o: lrs.StepLR(o, 1, gamma=0.5)),
    "step_lr_by_step": scheduled(lambda o: lrs.StepLR(o, 5, gamma=0.5), **STEP),
    "multi_step": scheduled(lambda o: lrs.MultiStepLR(o, [4, 17], gamma=0.1), **STEP),
    "multi_step_that_rises": scheduled(lambda o: lrs.MultiStepLR(o, [4, 17], gamma=10), **STEP),
    "cosine": scheduled(lambda o: lrs.CosineAnnealingLR(o, STEPS, eta_min=1e-4), **STEP),
    "cosine_by_epoch": scheduled(lambda o: lrs.CosineAnnealingLR(o, 3)),
    "cosine_that_turns": scheduled(lambda o: lrs.CosineAnnealingLR(o, 10), **STEP),
    "warm_restarts": scheduled(lambda o: lrs.CosineAnnealingWarmRestarts(o, 7, eta_min=1e-3), **STEP),
    "cyclic": scheduled(lambda o: lrs.CyclicLR(o, 0.01, 0.2, step_size_up=5), **STEP),
    "one_cycle": scheduled(lambda o: lrs.OneCycleLR(o, 0.3, total_steps=STEPS + 1), **STEP),
    "exponential": scheduled(lambda o: lrs.ExponentialLR(o, 0.9), **STEP),
    "polynomial": scheduled(lambda o: lrs.PolynomialLR(o, total_iters=20, power=2), **STEP),
    "lambda_warm_up": scheduled(lambda o: lrs.LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)), **STEP),
    "multiplicative": scheduled(lambda o: lrs.MultiplicativeLR(o, lambda _: 0.95), **STEP),
    "sequential": scheduled(_sequential, **STEP),
    "chained": scheduled(_chained, **STEP),
    "frequency_by_step": scheduled(lambda o: lrs.ExponentialLR(o, 0.5), frequency=5, **STEP),
    "frequency_by_epoch": scheduled(lambda o: lrs.ExponentialLR(o, 0.5), frequency=2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 3}, {"max_epochs": -1, "max_steps": 20}, {"max_epochs": 5, "max_steps": 13}],
    ids=["epochs", "accumulation", "steps", "both"],
)
def test_the_lowest_rate_is_the_one_that_comes(schedule: str, settings: dict[str, int], tmp_path: Path) -> None:
    """At every step it is the minimum over the rates that training then used, or that the schedule reached at its end.

    The schedule makes one more change after the last update, which may or may not count.
    """
    run, model, reader = fit(tmp_path, SCHEDULES[schedule], **settings)
    used = list(reader.seen[LR].values())
    assert used == pytest.approx(model.rates, rel=1e-12)
    last = max(group["lr"] for group in run.optimizers[0].param_groups)
    most = still_to_come(used)
    for step, low in reader.seen[LR_LOW].items():
        assert min(most[step], last) * (1 - 1e-6) <= low <= most[step] * (1 + 1e-6), step


def test_a_plateau_schedule(tmp_path: Path) -> None:
    """Nobody knows when it falls, so its min_lr may come, at any step."""
    configure = scheduled(lambda o: lrs.ReduceLROnPlateau(o, patience=0, min_lr=0.003), monitor="val_loss")
    _, model, reader = fit(tmp_path, configure)
    assert model.rates[-1] < 0.1
    assert set(reader.seen[LR_LOW].values()) == {0.003}


def _groups(model: Scheduled) -> Any:
    first, last = model.net[0], model.net[2]
    groups = [{"params": first.parameters(), "lr": 0.01}, {"params": last.parameters(), "lr": 0.2}]
    optimizer = SGD(groups)
    # The group with the higher rate at first is the lower one at the end.
    schedule = lrs.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.7**step])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **STEP}}


def test_several_parameter_groups(tmp_path: Path) -> None:
    """The rate of a step is the highest of its groups, in what is used and in what comes."""
    _, model, reader = fit(tmp_path, _groups)
    expected = still_to_come([max(0.01, 0.2 * 0.7**step) for step in range(STEPS)])
    assert list(reader.seen[LR_LOW].values()) == pytest.approx(expected, rel=1e-6)
    assert list(reader.seen[LR].values()) == pytest.approx(model.rates)


def _planned_by_hand(model: Scheduled) -> Any:
    model.automatic_optimization = False
    optimizers = [SGD(model.net[0].parameters(), 0.1), SGD(model.net[2].parameters(), 0.05)]
    return optimizers, [lrs.ExponentialLR(optimizers[0], 0.9), lrs.ExponentialLR(optimizers[1], 0.5)]


class ByHand(Scheduled):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return loss


def test_manual_optimization(tmp_path: Path) -> None:
    """The user steps the schedules when they like: a decay to zero may come. The rate is that of the step itself."""
    reader = Reader()
    trainer(tmp_path, [EarlyTermination(rules=[reader])]).fit(ByHand(_planned_by_hand), data())
    assert list(reader.seen[LR].values()) == pytest.approx([0.1 * 0.9**step for step in range(16)])
    assert set(reader.seen[LR_LOW].values()) == {0.0}


class OwnSchedule(lrs.LRScheduler):
    """A scheduler of the user's, whose step may do anything; counts its steps."""

    stepped = 0

    def step(self, epoch: int | None = None) -> None:
        type(self).stepped += 1
        super().step()

    def get_lr(self) -> list[float]:
        return [group["lr"] * 0.9 for group in self.optimizer.param_groups]


def test_a_schedule_of_the_users_own(tmp_path: Path) -> None:
    """It is not tried out, because its step may do anything; a decay to zero may come."""
    OwnSchedule.stepped = 0
    _, _, reader = fit(tmp_path, scheduled(OwnSchedule, **STEP))
    assert set(reader.seen[LR_LOW].values()) == {0.0}
    assert OwnSchedule.stepped == STEPS + 1  # one of them in its own __init__


@pytest.mark.parametrize("schedule", ["none", "cosine"])
def test_a_run_without_end(schedule: str, tmp_path: Path) -> None:
    """There is no share of a budget; without a schedule the rate stays, with one anything may come."""

    reader, model = Reader(), Scheduled(SCHEDULES[schedule])
    model.end = 12
    run = trainer(tmp_path, [EarlyTermination(rules=[reader])], max_epochs=-1, limit_train_batches=4)
    run.fit(model, data())
    assert reader.seen[PROGRESS] == {}
    assert len(reader.seen[LR_LOW]) == 12
    assert set(reader.seen[LR_LOW].values()) == ({0.1} if schedule == "none" else {0.0})


@pytest.mark.parametrize("schedule", ["step_lr_by_epoch", "cosine", "cosine_by_epoch", "lambda_warm_up", "sequential"])
@pytest.mark.parametrize("at", [5, 8, 11])
def test_a_resumed_run(schedule: str, at: int, tmp_path: Path) -> None:
    """From a checkpoint in the middle of an epoch or at its end, the plan goes on as in the run without a break."""
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=at, save_top_k=-1, filename="{step}")
    _, whole, reader = fit(tmp_path / "a", SCHEDULES[schedule], callbacks=[keep], enable_checkpointing=True)
    path = tmp_path / "kept" / f"step={at}.ckpt"
    run, _, resumed = fit(tmp_path / "b", SCHEDULES[schedule], resume=path)
    assert min(resumed.seen[LR]) == at and max(resumed.seen[LR]) == STEPS - 1
    assert resumed.seen[PROGRESS] == {s: v for s, v in reader.seen[PROGRESS].items() if s >= at}
    last, most = run.optimizers[0].param_groups[0]["lr"], still_to_come(whole.rates)
    for step, low in resumed.seen[LR_LOW].items():
        assert min(most[step], last) * (1 - 1e-6) <= low <= most[step] * (1 + 1e-6), step


# --- trying it out leaves everything as it was


def _state(run: Any) -> Any:
    schedules = [config.scheduler for config in run.lr_scheduler_configs]
    state = [copy.deepcopy(thing.state_dict()) for thing in (*schedules, *run.optimizers)]
    return [state, [vars(s).keys() for s in schedules], torch.get_rng_state().tolist(), _tensors(run)]


def _tensors(run: Any) -> list[Any]:
    return [[id(p), p.tolist()] for o in run.optimizers for group in o.param_groups for p in group["params"]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_real_schedule_is_left_alone(schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state, the optimizer's, the weights and the random stream are the same before and after it is tried out."""
    states: list[Any] = []
    real = PlannedRates.__init__

    def watched(self: Any, run: Any, model: Any) -> None:
        states.append(_state(run))
        real(self, run, model)
        states.append(_state(run))

    monkeypatch.setattr(PlannedRates, "__init__", watched)
    fit(tmp_path, SCHEDULES[schedule])
    assert len(states) == 2 and states[0] == states[1]


class WithMethod(Scheduled):
    """Its schedule is a method of its own, which falls once an epoch and draws; deep copies of it are counted."""

    copies = 0

    def __init__(self) -> None:
        super().__init__(lambda _: scheduled(lambda o: lrs.LambdaLR(o, self.rate), **STEP)(self))

    def rate(self, step: int) -> float:
        random.random(), np.random.random(), torch.rand(1)
        return 0.5 ** (step // PER_EPOCH)

    def __deepcopy__(self, memo: Any) -> Any:
        type(self).copies += 1
        return self


@pytest.mark.parametrize("max_steps", [STEPS, 5000])
def test_a_schedule_that_is_a_method_of_the_module(max_steps: int, tmp_path: Path) -> None:
    """A method may change its object, so it is not called ahead, nor the module copied: a decay is assumed to come."""
    WithMethod.copies = 0
    found: list[Any] = []
    for watched in (True, False):
        pl.seed_everything(1, verbose=False)
        model, reader = WithMethod(), Reader()
        model.end = STEPS
        callbacks = [EarlyTermination(rules=[reader])] if watched else []
        run = trainer(tmp_path / str(watched), callbacks, max_epochs=-1, max_steps=max_steps)
        run.fit(model, data())
        found.append([random.random(), np.random.random(), torch.rand(1).item()])
        if watched:
            assert len(reader.seen[LR_LOW]) == STEPS
            assert reader.seen[LR_LOW][0] == 0
    assert WithMethod.copies == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("count", [1000, 1001, 4567])
def test_a_long_warm_up_is_thinned(count: int) -> None:
    """Of a function of the step at most about a thousand points are asked; each stands at its step, to one stride."""
    calls: list[int] = []

    def rate(step: int) -> float:
        calls.append(step)
        return min(1.0, (step + 1) / 2000) * (0.01 if step > 4000 else 1.0)

    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = lrs.LambdaLR(optimizer, rate)
    calls.clear()
    rates = rates_to_come(schedule, count, {})
    assert rates is not None and len(calls) <= 1001
    stride = math.ceil(count / 1000)
    for step, value in enumerate(rates[: count + 1]):
        assert value == pytest.approx(0.1 * rate(step - step % stride))
    assert len(rates) >= count + 1


def test_too_many_steps_are_not_tried() -> None:
    """Other schedules of more than 50 000 steps would delay the start: their rate is unknown."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert rates_to_come(lrs.ExponentialLR(optimizer, 0.9), 50_001, {}) is None


# --- the budget


@pytest.mark.parametrize(
    ("settings", "planned"),
    [
        ({"max_epochs": 3}, 24),
        ({"max_epochs": -1, "max_steps": 20}, 20),
        ({"max_epochs": 3, "max_steps": 20}, 20),
        ({"max_epochs": 2, "max_steps": 20}, 16),
        ({"max_epochs": 3, "limit_train_batches": 5}, 15),
        ({"max_epochs": -1, "max_steps": 6, "accumulate_grad_batches": 4}, 6),
    ],
)
def test_the_share_that_is_spent(settings: dict[str, int], planned: int, tmp_path: Path) -> None:
    """After each step it is that step's share of the plan, and 1 at the end, whichever bound comes first."""
    _, _, reader = fit(tmp_path, sgd, **settings)
    assert list(reader.seen[PROGRESS].values()) == pytest.approx([(step + 1) / planned for step in range(planned)])


def test_the_share_with_accumulation(tmp_path: Path) -> None:
    """In an epoch of windows of 3, 3 and 2 batches it is counted in batches."""
    _, _, reader = fit(tmp_path, sgd, max_epochs=2, accumulate_grad_batches=3)
    assert list(reader.seen[PROGRESS].values()) == pytest.approx([b / 16 for b in (3, 6, 8, 11, 14, 16)])


def test_the_share_with_two_optimizers_by_hand(tmp_path: Path) -> None:
    """Lightning counts each optimizer's step in max_steps, and so does the share."""
    for folder, settings, planned in (("a", {"max_steps": 20}, 10), ("b", {"max_epochs": 2}, 16)):
        reader = Reader()
        run = trainer(tmp_path / folder, [EarlyTermination(rules=[reader])], **{"max_epochs": 9, **settings})
        run.fit(ByHand(_planned_by_hand), data())
        assert list(reader.seen[PROGRESS].values()) == pytest.approx([(s + 1) / planned for s in range(planned)])


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """A dataset that does not know its length: 40 samples."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(40):
            yield torch.randn(8, generator=generator), torch.tensor(1)


@pytest.mark.parametrize(
    ("settings", "planned"), [({"max_epochs": 2}, None), ({"max_epochs": 9, "max_steps": 12}, 12)], ids=["no", "steps"]
)
@pytest.mark.parametrize("schedule", ["none", "cosine", "step_lr_by_epoch"])
def test_a_dataset_without_length(schedule: str, settings: dict[str, int], planned: int | None, tmp_path: Path) -> None:
    """Epochs alone are then no plan, steps are; nothing is switched off."""
    reader, model = Reader(), Scheduled(SCHEDULES[schedule])
    stop = EarlyTermination(rules=[reader])
    trainer(tmp_path, [stop], **settings).fit(model, DataLoader(Endless(), batch_size=8))
    assert stop.off is None and len(reader.seen[LR]) == (planned or 10)
    shares = list(reader.seen[PROGRESS].values())
    assert shares == pytest.approx([(s + 1) / planned for s in range(planned)] if planned else [])
    for low, most in zip(reader.seen[LR_LOW].values(), still_to_come(model.rates), strict=True):
        assert low <= most * (1 + 1e-6)


def test_nothing_of_the_plan_is_logged(tmp_path: Path) -> None:
    """Learning rate and budget are for the rules alone."""
    fit(tmp_path, SCHEDULES["cosine"])
    assert not {PROGRESS, LR, LR_LOW} & scalars(tmp_path / "run").keys()


def counting() -> Callable[[int], float]:
    """A warm-up that counts its own calls, as a closure can."""
    calls = [0]

    def rate(_: int) -> float:
        calls[0] += 1
        return min(1.0, calls[0] / 40)

    return rate


def nonlocal_counting() -> Callable[[int], float]:
    calls = 0

    def rate(_: int) -> float:
        nonlocal calls
        calls += 1
        return 1.0 / calls

    return rate


@pytest.mark.parametrize("make", [counting, nonlocal_counting])
@pytest.mark.parametrize("scheduler", [lrs.LambdaLR, lrs.MultiplicativeLR])
def test_a_function_that_counts_its_calls_is_not_called_ahead(make: Any, scheduler: Any, tmp_path: Path) -> None:
    """The weights are those of a run without dynwatch, bit for bit."""
    weights = []
    for watched in (True, False):
        pl.seed_everything(1, verbose=False)
        model = Scheduled(scheduled(lambda o: scheduler(o, make()), **STEP))
        model.end = STEPS
        callbacks = [EarlyTermination()] if watched else []
        trainer(tmp_path / str(watched), callbacks, max_epochs=-1, max_steps=STEPS).fit(model, data())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


TABLE = [1.0, 0.5]
HALF = 0.5


@pytest.mark.parametrize(
    ("function", "harmless"),
    [
        (lambda epoch: HALF**epoch, True),
        (lambda epoch: max(0.1, 1 - math.sqrt(epoch)), True),
        (functools.partial(lambda epoch, n: epoch / n, n=5), True),
        (lambda epoch: TABLE[epoch], False),  # another may change it, or this one by a method of it
        (functools.partial(lambda epoch, seen: len(seen), seen=[]), False),
        (lambda epoch, seen=[]: seen.append(epoch) or 1.0, False),
        (counting(), False),
        (nonlocal_counting(), False),
        ([].append, False),
        (WithMethod.rate, True),
    ],
)
def test_what_may_be_called_ahead(function: Any, harmless: bool) -> None:
    """Functions that can reach nothing that lasts."""
    assert is_harmless(function) is harmless
