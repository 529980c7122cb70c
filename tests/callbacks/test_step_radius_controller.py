"""StepRadiusController: what a capped step is, when steps are looked at, and what it leaves alone."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from nets import mlp
from replays import Model
from runs import scalars, trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from dynwatch.callbacks import DynWatch, GradientNormMonitor, StepRadiusController, StepRadiusMonitor
from dynwatch.callbacks.after_step import AfterStep

WANTED, SCALE, CAPPED = "step_radius/wanted_r", "step_radius/scale", "step_radius/capped_steps"
R, TAU = "step_radius/r", "step_radius/tau"

# --- runs


class Spikes(Model):
    """Steps with the learning rates of a list."""

    def __init__(self, rates: list[float], make: Callable[..., torch.optim.Optimizer] | None = None) -> None:
        super().__init__(mlp())
        self.rates = rates
        self.make = make or (lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=0.01))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.rates[self.trainer.global_step]

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters())


class Track(pl.Callback):
    """The weights before each batch and after it, and the optimizer's state then; with what it wanted, by a hook."""

    def __init__(self) -> None:
        self.before: list[list[Tensor]] = []
        self.wanted: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []
        self.states: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def note(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.wanted.append(_copies(pl_module))

        for optimizer in trainer.optimizers:  # registered before those of a step, so called before them
            optimizer.register_step_post_hook(note)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.before.append(_copies(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.after.append(_copies(pl_module))
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))


def _copies(module: Any) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def fit(model: Any, folder: Path, *callbacks: pl.Callback, **settings: Any) -> dict[str, Any]:
    """Train for as many steps as there are rates, and give what the event file then holds."""
    generator = torch.Generator().manual_seed(1)
    loader: Any = [
        (torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(len(getattr(model, "rates", range(6))))
    ]
    trainer(folder, list(callbacks), **({"max_epochs": 1} | settings)).fit(model, DataLoader(loader, batch_size=None))
    return scalars(folder / "run")


def dict_of(readings: dict[str, Any], tag: str) -> dict[int, float]:
    return dict(readings.get(tag, []))


CALM, SPIKE = [0.05] * 6, [0.05, 0.05, 50.0, 0.05, 0.05, 0.05]


# --- what a capped step is


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer] | None] = {
    "momentum": None,
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.0),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.1),
}


@pytest.mark.parametrize("r_max", [1.0, 0.3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_capped_step_is_a_share_of_the_one_that_was_wanted(kind: str, r_max: float, tmp_path: Path) -> None:
    """In float64 before + s·p to the bit, with r = r_max; others keep their bits, and so does the optimizer's state."""
    controller, track = StepRadiusController(r_max=r_max), Track()
    model = Spikes(SPIKE, OPTIMIZERS[kind])
    found = fit(model, tmp_path, controller, track, StepRadiusMonitor(every_n_steps=1), precision="64-true")
    assert controller.off is None
    scale, wanted, r = (dict_of(found, tag) for tag in (SCALE, WANTED, R))
    assert 2 in scale and list(wanted) == list(range(6))
    for step, (before, p, after) in enumerate(zip(track.before, track.wanted, track.after, strict=True)):
        if step not in scale:
            assert wanted[step] <= r_max and same(after, p)
            assert r[step] == pytest.approx(wanted[step], rel=1e-6)
            continue
        assert wanted[step] > r_max and r[step] == pytest.approx(r_max, rel=1e-6)
        assert scale[step] == pytest.approx(r_max / wanted[step], rel=1e-6)
        moved = torch.cat([(a - b).reshape(-1) for a, b in zip(after, before, strict=True)])
        whole = torch.cat([(a - b).reshape(-1) for a, b in zip(p, before, strict=True)])
        share = float(moved @ whole / (whole @ whole))
        assert share == pytest.approx(scale[step], rel=1e-6)  # which an event file rounds to float32
        for b, w, a in zip(before, p, after, strict=True):
            torch.testing.assert_close(a, b + share * (w - b), rtol=1e-13, atol=1e-15)
    assert controller.capped_steps == len(scale)
    assert dict_of(found, CAPPED)[5] == len(scale)


def test_the_optimizer_keeps_its_state(tmp_path: Path) -> None:
    """At the step that is capped it has the momentum that it has without; the weights differ."""
    tracks = []
    for folder, callbacks in (("with", [StepRadiusController(r_max=0.5)]), ("without", [])):
        torch.manual_seed(0)
        tracks.append(Track())
        fit(Spikes([0.01, 0.01, 50.0]), tmp_path / folder, *callbacks, tracks[-1], precision="64-true")
    for mine, theirs in zip(tracks[0].states, tracks[1].states, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k]["momentum_buffer"], theirs[k]["momentum_buffer"]) for k in mine)
    assert same(tracks[0].wanted[2], tracks[1].after[2]) and not same(tracks[0].after[2], tracks[1].after[2])


def test_the_spike_is_survived(tmp_path: Path) -> None:
    """With the controller the weights stay near, without they are thrown far."""
    norms = []
    for folder, callbacks in (("with", [StepRadiusController()]), ("without", [])):
        torch.manual_seed(0)
        model = Spikes(SPIKE)
        fit(model, tmp_path / folder, *callbacks)
        norms.append(max(float(p.detach().norm()) for p in model.parameters()))
    assert norms[0] < 10 < norms[1]


def test_with_no_bound_no_bit_changes(tmp_path: Path) -> None:
    """r_max = inf looks at all steps and caps none: weights and optimizer state are those of the run without."""
    tracks = []
    for folder, callbacks in (("with", [StepRadiusController(r_max=math.inf)]), ("without", [])):
        torch.manual_seed(0)
        tracks.append(Track())
        found = fit(Spikes(SPIKE), tmp_path / folder, *callbacks, tracks[-1])
        if callbacks:
            assert len(found[WANTED]) == 6 and SCALE not in found and max(dict_of(found, CAPPED).values()) == 0
    assert all(map(same, tracks[0].after, tracks[1].after))
    for mine, theirs in zip(tracks[0].states, tracks[1].states, strict=True):
        assert all(torch.equal(mine[k]["momentum_buffer"], theirs[k]["momentum_buffer"]) for k in mine)


def test_half_precision_weights_stay_themselves(tmp_path: Path) -> None:
    """A capped step of bfloat16 weights is on the way, as far as they can say."""
    track = Track()
    fit(Spikes(SPIKE), tmp_path, StepRadiusController(r_max=0.5), track, precision="bf16-true")
    for before, p, after in zip(track.before, track.wanted, track.after, strict=True):
        for b, w, a in zip(before, p, after, strict=True):
            assert a.dtype == torch.bfloat16
            low, high = torch.minimum(b, w), torch.maximum(b, w)
            assert bool(((low <= a) & (a <= high)).all())


# --- which steps are looked at


def looked_at(found: dict[str, Any]) -> list[int]:
    return list(dict_of(found, WANTED))


def test_the_cadence_and_the_jump(tmp_path: Path) -> None:
    """Between the steps of the cadence it looks where the rate has risen by more than the factor since a look."""
    calm: dict[str, Any] = {"every_n_steps": 4, "alert": 1e9, "r_max": math.inf}
    rates = [0.1, 0.2, 0.21, 0.1, 0.25, 0.3]
    for jump, wanted in ((None, [3]), (2.0, [2, 3, 4]), (1.5, [1, 3, 4]), (1.1, [1, 3, 4, 5])):
        torch.manual_seed(0)
        controller = StepRadiusController(lr_jump=jump, **calm)
        assert looked_at(fit(Spikes(rates), tmp_path / str(jump), controller)) == wanted


def test_a_rate_that_was_zero(tmp_path: Path) -> None:
    """A warm-up from nothing is a jump, and then each time that it has risen by the factor."""
    controller = StepRadiusController(every_n_steps=100, alert=1e9)
    assert looked_at(fit(Spikes([0.0, 0.01, 0.015, 0.02, 0.025, 0.03]), tmp_path, controller)) == [1, 4]


def test_the_alert(tmp_path: Path) -> None:
    """After a step that wanted more than the level it looks at the next, until one wants less."""
    found = fit(Spikes(SPIKE), tmp_path / "jump", StepRadiusController(every_n_steps=100, r_max=2.0, alert=1.0))
    wanted = dict_of(found, WANTED)
    assert wanted[2] > 1 and min(wanted) == 2
    for step in range(3, 6):
        assert (step in wanted) == (wanted.get(step - 1, 0.0) > 1.0)
    everything = StepRadiusController(every_n_steps=3, lr_jump=None, alert=1e-9)
    assert looked_at(fit(Spikes(CALM), tmp_path / "all", everything)) == [2, 3, 4, 5]
    default = StepRadiusController(r_max=0.7)
    assert default.alert == 0.7


def test_two_groups_and_the_larger_rate(tmp_path: Path) -> None:
    """The largest rate of an optimizer counts; it may jump in the training step itself."""

    class Late(Model):
        def __init__(self) -> None:
            super().__init__(mlp())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 3:
                self.optimizers().param_groups[1]["lr"] = 1.0  # type: ignore[union-attr]
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}], lr=0.1)

    assert looked_at(fit(Late(), tmp_path, StepRadiusController(every_n_steps=100, alert=1e9))) == [3]


# --- with others in the run


@pytest.mark.parametrize("first", [True, False])
def test_beside_a_monitor_of_update_ratios(first: bool, tmp_path: Path) -> None:
    """After the controller in the list it sees the step that was taken; before it, the one that was wanted."""
    controller, ratios, track = (
        StepRadiusController(r_max=0.5),
        GradientNormMonitor(update_ratio_every_n_steps=1),
        Track(),
    )
    order = (controller, ratios) if first else (ratios, controller)
    found = fit(Spikes(SPIKE), tmp_path, *order, track, precision="64-true")
    assert controller.off is None and ratios.off is None
    assert list(dict_of(found, SCALE)) and 2 in dict_of(found, SCALE)
    seen = track.after if first else track.wanted
    read = dict_of(found, "update_ratio/net.0")
    assert len(read) == 6
    for step, (before, end) in enumerate(zip(track.before, seen, strict=True)):
        weights = torch.cat([b.reshape(-1) for b in before[:2]])
        moved = torch.cat([e.reshape(-1) for e in end[:2]]) - weights
        assert read[step] == pytest.approx(float(moved.norm() / weights.norm()), rel=1e-5)


def test_the_users_own_hooks_run(tmp_path: Path) -> None:
    """Those registered before the run and in the middle of it, each once a step, and they stay."""
    calls: list[str] = []

    class Hooked(Spikes):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(lambda *_: calls.append("early"))
            return optimizer

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 2 and "late" not in calls:
                optimizer: Any = self.optimizers()
                optimizer.optimizer.register_step_post_hook(lambda *_: calls.append("late"))
            return super().training_step(batch, batch_idx)

    class AlsoLate(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 4:
                optimizer.register_step_post_hook(lambda *_: calls.append("last"))

    optimizers: list[Any] = []

    class Keep(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            optimizers.extend(trainer.optimizers)

    controller, monitor = StepRadiusController(r_max=0.1), StepRadiusMonitor(every_n_steps=1)
    fit(Hooked(SPIKE), tmp_path, controller, AlsoLate(), monitor, Keep())
    assert (calls.count("early"), calls.count("last")) == (6, 2)
    assert calls.count("late") >= 4
    left = optimizers[0]._optimizer_step_post_hooks
    assert len(left) == 2 + calls.count("late") // 4 and not AfterStep._spent and not AfterStep._running


def test_a_scheduler_and_a_counter_of_steps(tmp_path: Path) -> None:
    """Lightning counts a capped step like any other."""
    model = Spikes(SPIKE)
    controller = StepRadiusController(r_max=0.1)
    run = trainer(tmp_path, [controller], max_epochs=1)
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    run.fit(model, DataLoader([(x, y)] * 6, batch_size=None))
    assert run.global_step == 6 and controller.capped_steps > 0


class Manual(Model):
    """Steps two optimizers in each batch."""

    def __init__(self, rates: tuple[float, float]) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False
        self.rates_of_two = rates

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        pairs = zip((self.net[0], self.net[2]), self.rates_of_two, strict=True)
        return [torch.optim.SGD(half.parameters(), lr=rate) for half, rate in pairs]


def logits_of(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return module.net(batch[0]), batch[1]


def test_two_optimizers_that_are_stepped_by_hand(tmp_path: Path) -> None:
    """Each step is capped by itself, and the other's weights are left alone."""
    controller, track = StepRadiusController(logits=logits_of), Track()
    fit(Manual((1e-3, 1e3)), tmp_path, controller, track, precision="64-true")
    assert controller.off is None and controller.capped_steps == 6
    for i in range(6):
        first, last = track.wanted[2 * i], track.wanted[2 * i + 1]
        assert same(track.after[i][:2], first[:2]) and same(first[2:], track.before[i][2:])
        assert not same(track.after[i][2:], last[2:])


def test_manual_optimization_without_logits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One message that says what to pass, and nothing is capped."""
    controller = StepRadiusController()
    fit(Manual((1.0, 1.0)), tmp_path, controller)
    (message,) = [r.getMessage() for r in caplog.records if "StepRadiusController" in r.getMessage()]
    assert message.startswith(
        "StepRadiusController caps nothing in this run: training_step steps the optimizers itself"
    )
    assert controller.capped_steps == 0 and controller.off is None and controller.charts() == ()


def test_lbfgs(tmp_path: Path) -> None:
    """Which evaluates its closure several times a step: the step is capped once, as a whole."""
    controller, track = StepRadiusController(r_max=0.05), Track()
    model = Model(mlp())
    model.configure_optimizers = lambda: torch.optim.LBFGS(model.net.parameters(), lr=1.0, max_iter=5)
    found = fit(model, tmp_path, controller, track, StepRadiusMonitor(every_n_steps=1), precision="64-true")
    assert controller.off is None and controller.capped_steps > 0
    assert all(dict_of(found, R)[step] == pytest.approx(0.05, rel=1e-6) for step in dict_of(found, SCALE))


def test_accumulated_batches(tmp_path: Path) -> None:
    """One look at an optimizer step, at the last batch of it."""
    controller = StepRadiusController(r_max=0.01)
    found = fit(Spikes(CALM), tmp_path, controller, StepRadiusMonitor(every_n_steps=1), accumulate_grad_batches=2)
    assert looked_at(found) == [0, 1, 2]
    assert dict_of(found, R) == pytest.approx(dict.fromkeys(range(3), 0.01), rel=1e-4)


def test_in_dynwatch(tmp_path: Path) -> None:
    """Off unless asked for, and then first."""
    assert not any(isinstance(each, StepRadiusController) for each in DynWatch().monitors)
    own = StepRadiusController(r_max=0.5)
    assert isinstance(DynWatch(controller=True).monitors[0], StepRadiusController)
    watch = DynWatch(controller=own, stop=False, hessian=False, report=False)
    assert watch.monitors[0] is own
    found = fit(Spikes(SPIKE), tmp_path, watch)
    assert own.off is None and own.capped_steps > 0 and 2 in dict_of(found, SCALE)


# --- what goes wrong


def test_a_failure_inside_the_optimizers_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on with the update as it was, the controller is off, and its hooks are gone."""
    tracks = []
    for failing in (True, False):
        torch.manual_seed(0)
        tracks.append(Track())
        controller = StepRadiusController(r_max=0.01)

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError("inside the step")

        monkeypatch.setattr(controller._look, "take", fail)
        found = fit(Spikes(SPIKE), tmp_path / str(failing), *([controller] if failing else []), tracks[-1])
        if failing:
            assert controller.off == "ZeroDivisionError: inside the step" and WANTED not in found
            assert not controller._look.update.before and not AfterStep._spent and not AfterStep._running
    assert all(map(same, tracks[0].after, tracks[1].after))


def test_a_failure_in_the_middle_of_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are the optimizer's or the capped ones, as far as it came; training goes on."""
    controller = StepRadiusController(r_max=0.01)

    def fail(share: float) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(controller._look.update, "scale_back", fail)
    track = Track()
    fit(Spikes(CALM), tmp_path, controller, track)
    assert controller.off == "RuntimeError: no more memory" and controller.capped_steps == 0
    assert all(map(same, track.after, track.wanted))


def test_a_loss_of_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps that are not finite are taken back whole, so that the weights stay as they were."""

    def bad(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model.net(x), y) * (math.nan if model.trainer.global_step >= 2 else 1.0)

    for r_max, finite in ((1.0, True), (math.inf, False)):
        controller, model = StepRadiusController(r_max=r_max), Model(mlp(), bad)
        found = fit(model, tmp_path / str(r_max), controller)
        assert controller.off is None
        assert [math.isnan(value) for value in dict_of(found, WANTED).values()] == [False] * 2 + [True] * 4
        assert all(bool(p.isfinite().all()) for p in model.parameters()) == finite
        assert controller.capped_steps == (4 if finite else 0)
        if finite:
            assert dict_of(found, SCALE) == dict.fromkeys((2, 3, 4, 5), 0.0)
    (said,) = [r.getMessage() for r in caplog.records if "cannot tell" in r.getMessage()]
    assert said.startswith(
        "StepRadiusController cannot tell how long step 2 is, because its r is NaN: it is not capped"
    )


def test_a_regression_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One message, and nothing is copied or capped from then on."""

    def squares(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return model.net(x).square().mean()

    controller = StepRadiusController()
    found = fit(Model(mlp(), squares), tmp_path, controller)
    assert WANTED not in found and controller.off is None and controller.failure is None
    (message,) = [r.getMessage() for r in caplog.records if "StepRadiusController" in r.getMessage()]
    assert message.startswith("StepRadiusController caps nothing in this run: training_step computes no cross_entropy")


def test_a_step_that_is_skipped(tmp_path: Path) -> None:
    """training_step returned None: there is nothing to look at, and the next step is as ever."""

    class Skips(Spikes):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)

    controller = StepRadiusController(r_max=0.01)
    assert looked_at(fit(Skips(CALM), tmp_path, controller)) == [1, 2, 4, 5]
    assert controller.off is None and controller.capped_steps == 4


def test_a_step_of_length_zero(tmp_path: Path) -> None:
    """It is none, and stays none."""
    controller, track = StepRadiusController(r_max=1e-9), Track()
    found = fit(Spikes([0.0] * 6), tmp_path, controller, track)
    assert list(dict_of(found, WANTED).values()) == [0.0] * 6 and controller.capped_steps == 0
    assert all(map(same, track.before, track.after))


# --- state


def test_the_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    """The counter, the rates and the way: a run that is resumed looks and counts as if it had not stopped."""

    def controller() -> StepRadiusController:
        return StepRadiusController(r_max=0.2, every_n_steps=100, alert=1e9)

    rates = [0.01, 0.01, 50.0, 0.01, 50.0, 0.01]
    torch.manual_seed(0)
    whole = controller()
    straight = Spikes(rates)
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    loader: Any = DataLoader([(x, y)] * 2, batch_size=None)
    start = copy.deepcopy(straight.net.state_dict())
    trainer(tmp_path / "whole", [whole], max_epochs=3).fit(straight, loader)
    assert whole.capped_steps == 2
    first, model = controller(), Spikes(rates)
    model.net.load_state_dict(start)
    run = trainer(tmp_path / "first", [first], max_epochs=2)
    run.fit(model, loader)
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert first.capped_steps == 1 and first._rates == {0: [0.01]}
    second, model = controller(), Spikes(rates)
    trainer(tmp_path / "second", [second], max_epochs=3).fit(model, loader, ckpt_path=str(tmp_path / "half.ckpt"))
    assert second.capped_steps == 2 and second._look.way == whole._look.way
    assert looked_at(scalars(tmp_path / "second" / "run")) == [4]
    assert same(_copies(model), _copies(straight))


def test_another_run_begins_anew(tmp_path: Path) -> None:
    """The counter and the rates of one run are not those of the next with the same callback."""
    controller = StepRadiusController(r_max=0.1)
    for folder in ("one", "two"):
        torch.manual_seed(0)
        found = fit(Spikes(SPIKE), tmp_path / folder, controller)
        assert dict_of(found, CAPPED)[5] == controller.capped_steps
    assert dict_of(scalars(tmp_path / "one" / "run"), CAPPED) == dict_of(found, CAPPED)


def test_a_state_that_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    """It is told and left out."""
    controller = StepRadiusController()
    with caplog.at_level(logging.WARNING):
        controller.load_state_dict({"own": {"way": None}})
    assert "The state of StepRadiusController in the checkpoint does not fit: KeyError" in caplog.text
    assert controller.capped_steps == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r_max": 0.0}, "r_max=0.0 must be a number above 0"),
        ({"r_max": -1}, "r_max=-1 must be a number above 0"),
        ({"r_max": math.nan}, "r_max=nan must be a number above 0"),
        ({"r_max": "1"}, "r_max='1' must be a number above 0"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be a whole number of steps, 1 or more"),
        ({"lr_jump": 1.0}, "lr_jump=1.0 must be a number above 1"),
        ({"lr_jump": 0}, "lr_jump=0 must be a number above 1"),
        ({"alert": 0.0}, "alert=0.0 must be a number above 0"),
        ({"alert": math.nan}, "alert=nan must be a number above 0"),
        ({"max_samples": 0}, "max_samples=0 must be a whole number, 1 or more"),
        ({"method": "guess"}, "method='guess' must be one of 'auto', 'forward', 'reverse', 'differences'."),
        ({"logits": 1}, "logits=1 must be a function of module and batch that gives logits, or logits and targets."),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], message: str) -> None:
    """The error names the argument, its value and its bound, where it is given."""
    with pytest.raises(ValueError, match=re.escape(message)):
        StepRadiusController(**arguments)


def test_rates_of_all_groups(tmp_path: Path) -> None:
    """A group whose rate jumps is seen below one with a higher rate, a slow ramp too, and a rate of None is none."""
    looks = {"low": [3], "ramp": [2, 4], "none": []}
    for kind, wanted in looks.items():
        rates = {
            "low": [(1.0, 1e-4)] * 3 + [(1.0, 0.9)] * 3,
            "ramp": [(0.01 * 1.9**i, 0.01) for i in range(6)],
            "none": [(0.01, None)] * 6,
        }[kind]

        class Groups(Model):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                for group, rate in zip(
                    self.optimizers().param_groups, self.rates[self.trainer.global_step], strict=True
                ):
                    group["lr"] = rate

            def configure_optimizers(self) -> Any:
                first, *others = self.net.parameters()
                return Nothing([{"params": [first]}, {"params": others}], {"lr": 0.01})

        controller = StepRadiusController(every_n_steps=100, alert=math.inf)
        model = Groups(mlp())
        model.rates = rates
        found = fit(model, tmp_path / kind, controller)
        assert looked_at(found) == wanted if wanted else WANTED not in found
        assert controller.off is None and controller.failure is None


class Nothing(torch.optim.Optimizer):
    """Moves the weights a little, whatever the rate."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(1e-3 * p.grad)
        return loss


def test_a_batch_of_which_nothing_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is known of such a step: it is not said to be short, and that it was not judged is told once."""

    def ignoring(model: Any, x: Tensor, y: Tensor) -> Tensor:
        late = model.trainer.global_step >= 2
        return cross_entropy(model.net(x), y * 0 - 100 if late else y, reduction="sum")

    controller = StepRadiusController(max_samples=4)
    assert looked_at(fit(Model(mlp(), ignoring), tmp_path, controller)) == [0, 1]
    (said,) = [r.getMessage() for r in caplog.records if "cannot tell" in r.getMessage()]
    assert "none of the samples that were looked at counts" in said
