"""StepRadiusMonitor on real runs against numbers that are computed here by hand."""

from __future__ import annotations

import copy
import gc
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from nets import mlp
from pytorch_lightning.plugins.precision import MixedPrecision
from replays import Model
from runs import Classifier, data, scalars, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader

from dynwatch.callbacks import DynWatch, StepRadiusMonitor
from dynwatch.callbacks.after_step import AfterStep
from dynwatch.callbacks.stream import Stream

R, R_PI, R_B2 = "step_radius/r", "step_radius/r_pi", "step_radius/r_b2"
RHO, TAU = "step_radius/rho", "step_radius/tau"
PREDICTED, ACTUAL = "step_radius/predicted_loss", "step_radius/actual_loss"
ALL = {R, R_PI, RHO, TAU, PREDICTED, ACTUAL}


# --- runs


def batches(count: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


class ByHand(pl.Callback):
    """The numbers of each step of the weights, from a copy of the net before and after it, by differences."""

    def __init__(self, samples: int | None = None, loss: Callable[..., Tensor] = cross_entropy) -> None:
        self.samples, self.loss = samples, loss
        self.found: dict[str, list[float]] = {tag: [] for tag in (*ALL, R_B2)}
        self.binding: list[tuple[int, int]] = []
        self._before: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._net = copy.deepcopy(pl_module.net).double()  # micro-batches do not move it
        self._batch = [part[: self.samples].clone() for part in batch]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        x, y = self._batch[0].double(), self._batch[1]
        after = [p.detach().double() for p in pl_module.net.parameters()]
        held = list(self._net.parameters())
        before = [p.detach().clone() for p in held]
        step = [b - a for a, b in zip(before, after, strict=True)]
        tau = math.sqrt(sum(float(by.square().sum()) for by in step))

        def at(t: float) -> Tensor:
            with torch.no_grad():
                for p, start, by in zip(held, before, step, strict=True):
                    p.copy_(start + t * by)
                return self._net(x)

        z, h = at(0.0), 1e-4
        a = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)  # along the step itself: τ times the unit one
        if z.shape[-1] == 1:  # one logit against 0
            z, a = (torch.cat([each, 0 * each], 1) for each in (z, a))
        spread = (a.max(1).values - a.min(1).values).numpy()
        p = z.softmax(1).max(1).values.numpy()
        odds = np.maximum(0, np.log(p / (1 - p)))
        r = spread / np.sqrt(odds**2 + math.pi**2)
        found = {R: r.max(), R_PI: spread.max() / math.pi, TAU: tau, RHO: tau / r.max() if r.max() else math.nan}
        losses = [float(self.loss(logits, y)) for logits in (at(0.0), at(0.0) + self._tangent(a), at(1.0))]
        found |= {PREDICTED: losses[1] - losses[0], ACTUAL: losses[2] - losses[0]}
        for tag, value in found.items():
            self.found[tag].append(float(value))
        self.binding.append((int(r.argmax()), int(y.reshape(-1)[r.argmax()])))

    def _tangent(self, a: Tensor) -> Tensor:
        (*_, last) = self._net.parameters()
        return a[:, :1] if last.numel() == 1 else a


def fit(model: Any, folder: Path, *callbacks: pl.Callback, loader: Any = None, **settings: Any) -> dict[str, Any]:
    """Train, and give what the event file then holds."""
    loader = DataLoader(batches() if loader is None else loader, batch_size=None)
    trainer(folder, list(callbacks), **({"max_epochs": 1} | settings)).fit(model, loader)
    return scalars(folder / "run")


def values(readings: dict[str, Any], tag: str) -> list[float]:
    return [value for _, value in readings[tag]]


def steps(readings: dict[str, Any], tag: str) -> list[int]:
    return [step for step, _ in readings.get(tag, [])]


def agree(found: dict[str, Any], expected: dict[str, list[float]], rel: float = 1e-5) -> None:
    """What was read is what was computed by hand; event files hold float32."""
    for tag in ALL:
        assert values(found, tag) == pytest.approx(expected[tag], rel=rel, abs=1e-7), tag


class Reasons(pl.Callback):
    """Notes what the stream knows beside readings, while it is open."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.reasons = dict(Stream.of(trainer).reasons)
        self.remarks = dict(Stream.of(trainer).remarks)


# --- readings


def _momentum(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)


def _groups(net: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}], lr=0.02)


OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum and decay": (_momentum, {}),
    "clipped": (_momentum, {"gradient_clip_val": 0.1}),
    "adam": (lambda net: torch.optim.Adam(net.parameters(), lr=0.1), {}),
    "groups": (_groups, {}),
    "large steps": (lambda net: torch.optim.SGD(net.parameters(), lr=30.0), {}),
    "tiny steps": (lambda net: torch.optim.SGD(net.parameters(), lr=1e-7), {}),
    "lbfgs": (lambda net: torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4), {}),
    "accumulated": (_momentum, {"accumulate_grad_batches": 2, "max_epochs": 2}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_readings_are_those_by_hand(kind: str, tmp_path: Path) -> None:
    """r, r_pi, ρ, τ and the loss, predicted and actual, of the update that was really made, in float64."""
    make, settings = OPTIMIZERS[kind]
    model, oracle = Model(mlp()), ByHand()
    model.configure_optimizers = lambda: make(model.net)
    monitor = StepRadiusMonitor(every_n_steps=1)
    found = fit(model, tmp_path, monitor, oracle, precision="64-true", **settings)
    assert monitor.off is None
    assert steps(found, R) == [0, 1, 2, 3]
    agree(found, oracle.found, rel=1e-4 if kind == "tiny steps" else 1e-5)


def test_readings_in_float32(tmp_path: Path) -> None:
    """The same to some roundings; a change of the loss is a difference of rounded losses."""
    oracle = ByHand()
    model = Model(mlp())
    model.configure_optimizers = lambda: _momentum(model.net)
    found = fit(model, tmp_path, StepRadiusMonitor(every_n_steps=1), oracle)
    for tag in ALL - {PREDICTED, ACTUAL}:
        assert values(found, tag) == pytest.approx(oracle.found[tag], rel=1e-4), tag
    for tag in (PREDICTED, ACTUAL):
        assert values(found, tag) == pytest.approx(oracle.found[tag], abs=1e-6), tag


def test_the_bounds_and_identities(tmp_path: Path) -> None:
    """r_pi ≥ r ≥ r_b2, and r = τ/ρ; r_b2 only where it is asked for, with a chart."""
    monitor = StepRadiusMonitor(every_n_steps=1, b2=True)
    found = fit(Model(mlp()), tmp_path, monitor, precision="64-true")
    rows = zip(*(values(found, tag) for tag in (R_PI, R, R_B2, TAU, RHO)), strict=True)
    for r_pi, r, r_b2, tau, rho in rows:
        assert r_pi >= r >= r_b2 > 0
        assert r == pytest.approx(tau / rho, rel=1e-6)
    assert any(R_B2 in chart.tags for chart in monitor.charts())
    assert not any(R_B2 in chart.tags for chart in StepRadiusMonitor().charts())


def test_two_classes_have_the_exact_radius(tmp_path: Path) -> None:
    """One logit and a sigmoid give the radius of their zero, r = |a| τ / √(z² + π²)."""

    def binary(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(model.net(x), y)

    oracle = ByHand(loss=binary_cross_entropy_with_logits)
    loader = [(x, (x[:, :1] > 0).double()) for x, _ in batches()]
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
    monitor = StepRadiusMonitor(every_n_steps=1, b2=True)
    found = fit(Model(net, binary), tmp_path, monitor, oracle, loader=loader, precision="64-true")
    agree(found, oracle.found)
    assert values(found, R_B2) == values(found, R)


@pytest.mark.parametrize("method", ["forward", "reverse", "differences"])
def test_a_class_that_is_masked_out(method: Any, tmp_path: Path) -> None:
    """By -inf, as actions that are not allowed: the numbers are those of the other two classes."""

    def masked(model: Any, x: Tensor, y: Tensor) -> Tensor:
        forbidden = torch.tensor([False, False, True])
        return cross_entropy(model.net(x).masked_fill(forbidden, -math.inf), y)

    class TwoClasses(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :2]

    loader = [(x, y.clamp(max=1)) for x, y in batches()]
    found = []
    for folder, loss, net in (("masked", masked, mlp()), ("two", None, TwoClasses(*mlp()))):
        torch.manual_seed(0)
        for p in net.parameters():
            nn.init.normal_(p)
        monitor = StepRadiusMonitor(every_n_steps=1, b2=True, method=method)
        found.append(fit(Model(net, loss), tmp_path / folder, monitor, loader=loader, precision="64-true"))
        assert monitor.off is None
    for tag in (*ALL, R_B2):
        assert values(found[0], tag) == pytest.approx(values(found[1], tag), rel=1e-6, abs=1e-12), tag


def test_no_more_samples_than_asked_for(tmp_path: Path) -> None:
    """The first of the batch, for all numbers."""
    oracle = ByHand(samples=3)
    found = fit(Model(mlp()), tmp_path, StepRadiusMonitor(every_n_steps=1, max_samples=3), oracle, precision="64-true")
    agree(found, oracle.found)


def test_the_cadence(tmp_path: Path) -> None:
    """Every so many optimizer steps, with nothing else at other steps."""
    found = fit(Model(mlp()), tmp_path, StepRadiusMonitor(every_n_steps=3), max_epochs=2)
    assert {tag: steps(found, tag) for tag in ALL} == {tag: [2, 5] for tag in ALL}


class Overwrites(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step([part.clone() for part in batch], batch_idx)
        batch[0].zero_()
        batch[1].fill_(2)
        return loss


def test_a_step_that_overwrites_its_batch(tmp_path: Path) -> None:
    """The reading is of the batch as the step got it."""
    oracle = ByHand()
    agree(
        fit(Overwrites(mlp()), tmp_path, StepRadiusMonitor(every_n_steps=1), oracle, precision="64-true"), oracle.found
    )


def test_dropout_and_batch_statistics(tmp_path: Path) -> None:
    """The actual change is that of the same dropout mask: for a tiny step it is the predicted one."""
    net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3))
    model = Model(net)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=1e-5)
    found = fit(model, tmp_path, StepRadiusMonitor(every_n_steps=1), precision="64-true")
    assert values(found, ACTUAL) == pytest.approx(values(found, PREDICTED), rel=1e-3)
    assert all(value < 0 for value in values(found, ACTUAL))


# --- optimizers that are stepped by hand


class Manual(Model):
    """Steps one or two optimizers itself, once or twice a batch."""

    def __init__(self, optimizers: int = 1, times: int = 1) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False
        self.count, self.times = optimizers, times

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for _ in range(self.times):
            self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        halves = [self.net[0], self.net[2]] if self.count == 2 else [self.net]
        return [torch.optim.SGD(half.parameters(), lr=0.5, momentum=0.9) for half in halves]


def logits_of(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return module.net(batch[0]), batch[1]


@pytest.mark.parametrize(("optimizers", "times"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_manual_optimization_with_logits(optimizers: int, times: int, tmp_path: Path) -> None:
    """The step is that of all optimizers of a batch together, from before the first to after the last."""
    oracle = ByHand()
    monitor = StepRadiusMonitor(every_n_steps=1, logits=logits_of)
    found = fit(Manual(optimizers, times), tmp_path, monitor, oracle, precision="64-true")
    assert monitor.off is None and len(found[R]) == 4
    agree(found, oracle.found)


def test_manual_optimization_without_logits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One message that says what to pass; no readings and no charts."""
    monitor, reasons = StepRadiusMonitor(every_n_steps=1), Reasons()
    assert not ALL & fit(Manual(), tmp_path, monitor, reasons).keys()
    assert reasons.reasons[R].startswith("training_step steps the optimizers itself (manual optimization)")
    (message,) = [r.getMessage() for r in caplog.records if "StepRadiusMonitor" in r.getMessage()]
    assert message.startswith("StepRadiusMonitor measures nothing in this run: training_step steps the optimizers")
    assert message.endswith("that gives logits and targets.") and monitor.charts() == () and monitor.off is None


def test_logits_without_targets(tmp_path: Path) -> None:
    """There is a radius, but no loss."""
    oracle = ByHand()
    monitor = StepRadiusMonitor(every_n_steps=1, logits=lambda module, batch: module.net(batch[0]))
    found = fit(Model(mlp()), tmp_path, monitor, oracle, precision="64-true")
    assert values(found, R) == pytest.approx(oracle.found[R], rel=1e-5)
    assert PREDICTED not in found and ACTUAL not in found


def test_updates_that_a_gradient_scaler_skips(tmp_path: Path) -> None:
    """A scale that overflows skips steps: they have no reading, and those that are made have one."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60, growth_interval=1000)
    plugin = MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)
    monitor = StepRadiusMonitor(every_n_steps=1)
    made = Moves()
    found = fit(Model(mlp()), tmp_path, monitor, made, plugins=[plugin])
    assert monitor.off is None
    assert steps(found, R) == made.steps and 0 < len(made.steps) < 4
    assert not monitor._look.update.before and monitor._look._batch is None


class Moves(pl.Callback):
    """The steps at which weights move."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self._before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if not all(map(torch.equal, self._before, pl_module.parameters())):
            self.steps.append(Stream.step(trainer))


# --- what is written


def test_the_text_names_the_binding_sample(tmp_path: Path) -> None:
    """With its target, for each reading, in the event file."""
    oracle = ByHand()
    fit(Model(mlp()), tmp_path, StepRadiusMonitor(every_n_steps=1), oracle, precision="64-true")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0})
    events.Reload()
    texts = events.Tensors("step_radius/binding_sample/text_summary")
    assert [event.step for event in texts] == [0, 1, 2, 3]
    for event, (sample, target), r in zip(texts, oracle.binding, oracle.found[R], strict=True):
        (text,) = (value.decode() for value in event.tensor_proto.string_val)
        wanted = f"step {event.step}: r = {r:.3g}, bound by sample {sample} of 8, target {target}, likeliest class "
        assert text.startswith(wanted) and text[len(wanted) :] in ("0", "1", "2")


def test_the_report_names_the_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What derivatives are taken by, and why not by the usual way."""
    watch = DynWatch(step_radius=StepRadiusMonitor(every_n_steps=1), hessian=False, stop=False)
    fit(Model(mlp()), tmp_path / "usual", watch)
    assert "step_radius/method: forward-mode differentiation" in " ".join(capsys.readouterr().out.split())
    monitor = StepRadiusMonitor(every_n_steps=1, method="differences")
    fit(Model(mlp()), tmp_path / "asked", DynWatch(step_radius=monitor, hessian=False, stop=False))
    printed = " ".join(capsys.readouterr().out.split())
    assert "step_radius/method: central differences, approximate: asked for" in printed


@pytest.mark.parametrize("method", ["forward", "reverse", "differences"])
def test_methods_agree(method: Any, tmp_path: Path) -> None:
    """All three give the numbers computed by hand."""
    oracle = ByHand()
    found = fit(Model(mlp()), tmp_path, StepRadiusMonitor(every_n_steps=1, method=method), oracle, precision="64-true")
    agree(found, oracle.found)


# --- what else a run can be


def test_a_regression_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One message, no readings, and the run goes on to the weights that it has without the monitor."""

    def squares(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return model.net(x).square().mean()

    ends = []
    for folder, callbacks in (("with", [StepRadiusMonitor(every_n_steps=1)]), ("without", [])):
        torch.manual_seed(0)
        model = Model(mlp(), squares)
        found = fit(model, tmp_path / folder, *callbacks)
        assert not ALL & found.keys()
        ends.append([p.detach() for p in model.parameters()])
        if callbacks:
            assert callbacks[0].off is None and callbacks[0].failure is None
    assert all(map(torch.equal, *ends))
    (message,) = [r.getMessage() for r in caplog.records if "StepRadiusMonitor" in r.getMessage()]
    assert message == (
        "StepRadiusMonitor measures nothing in this run: training_step computes no cross_entropy, nll_loss or "
        "binary_cross_entropy_with_logits of logits that depend on the parameters for its loss, and the step radius is "
        "that of a softmax or sigmoid. Where the loss is one in other words, pass logits=, a function of module and "
        "batch that gives logits and targets."
    )


def test_a_loss_of_nan(tmp_path: Path) -> None:
    """NaN weights have a reading of NaN, not of zero; the monitor stays on, and those before are as ever."""
    monitor = StepRadiusMonitor(every_n_steps=1)
    found = fit(Classifier(bad_at=2), tmp_path, monitor, loader=list(data(32)))
    assert monitor.off is None
    assert [math.isnan(value) for value in values(found, R)] == [False, False, True, True]
    assert [math.isnan(value) for value in values(found, TAU)] == [False, False, True, True]
    assert steps(found, RHO) == [0, 1]


def test_a_step_of_length_zero(tmp_path: Path) -> None:
    """It has r = 0 and no radius; the method is chosen once a step has shown it."""
    model = Model(mlp())
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = StepRadiusMonitor(every_n_steps=1, b2=True)
    found = fit(model, tmp_path, monitor)
    for tag in (R, R_PI, R_B2, TAU, PREDICTED, ACTUAL):
        assert values(found, tag) == [0.0] * 4
    assert RHO not in found and monitor._look.way is None and monitor.off is None


@pytest.mark.parametrize("skipped", [{0}, {1, 2}, {0, 1, 2, 3}])
def test_a_step_that_skips_its_batch(skipped: set[int], tmp_path: Path) -> None:
    """training_step returned None: no reading of that batch, also where momentum moves the weights."""

    class Skips(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    monitor = StepRadiusMonitor(every_n_steps=1)
    found = fit(Skips(mlp()), tmp_path, monitor)
    assert monitor.off is None and monitor.failure is None
    assert steps(found, R) == [step for step in range(4) if step not in skipped]


def test_a_batch_without_targets_that_count(tmp_path: Path) -> None:
    """Of padding alone nothing is known: no reading, as of a batch that is skipped; batches around it have theirs."""

    def sums(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model.net(x), y, reduction="sum")

    loader = batches()
    loader[2] = (loader[2][0], torch.full_like(loader[2][1], -100))
    monitor = StepRadiusMonitor(every_n_steps=1)
    model = Model(mlp(), sums)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = fit(model, tmp_path, monitor, loader=loader)
    assert monitor.off is None
    assert steps(found, R) == steps(found, TAU) == steps(found, PREDICTED) == steps(found, ACTUAL) == [0, 1, 3]
    assert min(values(found, R)) > 0


@pytest.mark.parametrize("kind", ["table", "sparse"])
def test_a_batch_that_cannot_be_cut(kind: str, tmp_path: Path) -> None:
    """All of it is used, and the report says so."""

    class Uneven(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, table = batch
            x = x.to_dense() if x.is_sparse else x
            return cross_entropy(self.net(x), y) + 0 * table.to_dense().sum()

    whole: list[Any] = [(x, y, torch.ones(3)) for x, y in batches()]
    if kind == "sparse":
        whole = [(x.to_sparse(), y, torch.ones(8).to_sparse()) for x, y in batches()]
    found = []
    for folder, most in (("cut", 2), ("whole", 1000)):
        torch.manual_seed(0)
        monitor, reasons = StepRadiusMonitor(every_n_steps=1, max_samples=most), Reasons()
        found.append(fit(Uneven(mlp()), tmp_path / folder, monitor, reasons, loader=whole))
        assert monitor.off is None
        if most == 2 or kind == "table":
            assert reasons.remarks["step_radius max_samples"].endswith("; all of it is used")
    assert values(found[0], R) == values(found[1], R) and len(found[0][R]) == 4


def test_parts_that_are_frozen(tmp_path: Path) -> None:
    """They do not move and do not count; those of an optimizer that are not the module's do not matter."""
    oracle = ByHand()
    model = Model(mlp())
    model.net[0].requires_grad_(False)
    apart = nn.Parameter(torch.ones(3))
    apart.grad = torch.ones(3)
    model.configure_optimizers = lambda: torch.optim.SGD([*model.net.parameters(), apart], lr=0.1)
    agree(fit(model, tmp_path, StepRadiusMonitor(every_n_steps=1), oracle, precision="64-true"), oracle.found)


def test_a_model_that_is_frozen_on_the_way(tmp_path: Path) -> None:
    """A training step without parameters has nothing to measure; the run goes on."""

    class Freezes(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.net.requires_grad_(False)

    def constant(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model.net(x) + model.bias, y)

    model = Model(mlp(), constant)
    model.bias = nn.Parameter(torch.zeros(3))
    monitor = StepRadiusMonitor(every_n_steps=1)
    found = fit(model, tmp_path, Freezes(), monitor)
    assert monitor.off is None and len(found[R]) == 4


def test_a_replay_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor goes off with the cause, holds nothing, and the weights are those of the run without it."""
    ends = []
    for failing in (True, False):
        torch.manual_seed(0)
        model = Model(mlp())
        monitor = StepRadiusMonitor(every_n_steps=1)
        if failing:
            real, calls = monitor._look.take, []

            def take(*args: Any, real: Any = real, calls: list[int] = calls, **kwargs: Any) -> Any:
                calls.append(1)
                if len(calls) == 3:
                    raise ZeroDivisionError("in the middle")
                return real(*args, **kwargs)

            monkeypatch.setattr(monitor._look, "take", take)
        found = fit(model, tmp_path / str(failing), *([monitor] if failing else []))
        ends.append([p.detach() for p in model.parameters()])
        if failing:
            assert monitor.off == "ZeroDivisionError: in the middle" and steps(found, R) == [0, 1]
            assert not monitor._look.update.before and monitor._look._batch is None
    assert all(map(torch.equal, *ends))


# --- what is kept


def _hooks(optimizer: Any) -> int:
    return len(optimizer._optimizer_step_post_hooks) + len(optimizer._optimizer_step_pre_hooks)


class Looks(pl.Callback):
    """Counts the optimizer's hooks after each batch, or raises before the optimizer steps; added after the monitor."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.hooks: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.optimizer = trainer.optimizers[0]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.error is not None and trainer.global_step == 2:
            assert _hooks(optimizer) > 0
            raise self.error

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.hooks.append(_hooks(self.optimizer))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 37), nn.Tanh(), nn.Linear(37, 3))


class Copies(pl.Callback):
    """Counts the tensors of a weight's shape after each batch; added after the monitor."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        gc.collect()
        tensors = (each for each in gc.get_objects() if isinstance(each, Tensor))
        self.found.append(sum(1 for each in tensors if each.shape == (37, 5)))


def test_no_copy_of_weights_is_kept_between_readings(tmp_path: Path) -> None:
    """Nothing beside weights, gradients and momentum after a batch, measured or not; the batch is let go, too."""
    copies = Copies()
    model = Model(wide())
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    monitor = StepRadiusMonitor(every_n_steps=2)
    fit(model, tmp_path, monitor, copies, loader=batches(2))
    assert copies.found == [3, 3]
    look = monitor._look
    assert not look.update.before and not look.update._waiting and look._batch is None and not AfterStep._spent


@pytest.mark.parametrize("error", [None, RuntimeError("in the user's code"), KeyboardInterrupt()], ids=str)
def test_hooks_are_removed(error: BaseException | None, tmp_path: Path) -> None:
    """After each batch, and when the user's code or keyboard ends the run between the copy and the step."""
    looks, monitor = Looks(error), StepRadiusMonitor(every_n_steps=1)
    try:
        fit(Model(wide()), tmp_path, monitor, looks)
    except (RuntimeError, KeyboardInterrupt, SystemExit):
        assert error is not None
    assert looks.hooks == [0] * (4 if error is None else 2) and _hooks(looks.optimizer) == 0
    assert not monitor._look.update.before and monitor._look._batch is None and not AfterStep._spent


def test_the_state(tmp_path: Path) -> None:
    """The way that was chosen survives a round trip; a state of another version is told and left out."""
    monitor, other = StepRadiusMonitor(every_n_steps=1, method="differences"), StepRadiusMonitor(every_n_steps=1)
    assert other.state() == {"way": None, "taken": 0, "budget": None}
    fit(Model(mlp()), tmp_path, monitor)
    saved = torch.tensor(0), monitor.state_dict()
    file = tmp_path / "state.pt"
    torch.save(saved, file)
    other.load_state_dict(torch.load(file, weights_only=True)[1])
    assert other._look.way == monitor._look.way and other._look.way is not None
    fresh = StepRadiusMonitor()
    fresh.load_state(fresh.state())
    assert fresh._look.way is None
    fresh.load_state_dict({"own": {"another": "version"}})
    assert fresh._look.way is None


def masked(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """As language models often have it: half of the samples are padding."""
    mask = (torch.arange(len(y)) % 2).to(x)
    return (cross_entropy(model.net(x), y, reduction="none") * mask).sum() / mask.sum()


def ignoring(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model.net(x), y.masked_fill(torch.arange(len(y)) % 2 == 0, -100))


def logged(model: Any, x: Tensor, y: Tensor) -> Tensor:
    z = model.net(x)
    model.log("other", cross_entropy(50 * z, y))  # not in the loss
    return cross_entropy(z, y)


def in_parts(model: Any, x: Tensor, y: Tensor) -> Tensor:
    z = model.net(x)
    losses = [cross_entropy(z[i : i + 1], y[i : i + 1], reduction="sum") for i in range(len(y))]
    return torch.stack(losses).mean()


def weighed(model: Any, x: Tensor, y: Tensor) -> Tensor:
    z = model.net(x)
    loss = 0.75 * cross_entropy(z, y)
    loss += 0.25 * cross_entropy(z, y, reduction="sum") / len(y)
    return loss


def plain(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model.net(x), y)


@pytest.mark.parametrize("method", ["forward", "reverse", "differences"])
@pytest.mark.parametrize(("loss", "same"), [(masked, ignoring), (logged, plain), (in_parts, plain), (weighed, plain)])
def test_what_the_loss_makes_of_its_cross_entropies(loss: Any, same: Any, method: Any, tmp_path: Path) -> None:
    """Masked samples do not count, what is only logged does not either, and weights and sums are those of the loss."""
    found = []
    for folder, each in (("one", loss), ("other", same)):
        torch.manual_seed(0)
        monitor = StepRadiusMonitor(every_n_steps=1, method=method)
        found.append(fit(Model(mlp(), each), tmp_path / folder, monitor, precision="64-true"))
        assert monitor.off is None
    for tag in ALL:
        assert values(found[0], tag) == pytest.approx(values(found[1], tag), rel=1e-4, abs=1e-7), tag


def test_a_batch_without_a_cross_entropy_after_others(tmp_path: Path) -> None:
    """It has no reading, and the batches after it have theirs; so it is with a batch of a single class."""

    def now_and_then(model: Any, x: Tensor, y: Tensor) -> Tensor:
        z = model.net(x)
        if bool((y == 2).all()):
            return z.square().mean()
        return cross_entropy(z[:, :1], y * 0) + z.mean() if bool((y == 1).all()) else cross_entropy(z, y)

    loader = batches()
    loader[1], loader[2] = ((x, torch.full_like(y, kind)) for (x, y), kind in zip(loader[1:3], (2, 1), strict=True))
    monitor = StepRadiusMonitor(every_n_steps=1)
    readings = fit(Model(mlp(), now_and_then), tmp_path, monitor, loader=loader)
    assert monitor.off is None and not monitor._reason
    assert steps(readings, R) == [0, 3]


@pytest.mark.parametrize(("share", "later"), [(1e-6, False), (0.9, True)])
def test_the_usual_cadence(share: float, later: bool, tmp_path: Path) -> None:
    """The first reading comes at step 50; later ones at multiples of it, and only as the share of the time allows."""
    monitor = StepRadiusMonitor(max_overhead=share)
    found = steps(fit(Model(mlp()), tmp_path, monitor, loader=batches(10), max_epochs=40, log_every_n_steps=10), R)
    assert found[0] == 49 and all((step + 1) % 50 == 0 for step in found)
    assert (len(found) > 1) == later
    assert monitor._taken == len(found)
    other = StepRadiusMonitor()
    other.load_state(monitor.state())
    assert other.state() == monitor.state() and (other.state()["budget"]["costs"] != {}) == later


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_overhead": 1.0}, "max_overhead=1.0 must be"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be a whole number of steps, 1 or more"),
        ({"every_n_steps": 2.5}, "every_n_steps=2.5 must be a whole number of steps, 1 or more"),
        ({"max_samples": 0}, "max_samples=0 must be a whole number, 1 or more"),
        ({"max_samples": True}, "max_samples=True must be a whole number, 1 or more"),
        ({"method": "exact"}, "method='exact' must be one of 'auto', 'forward', 'reverse', 'differences'."),
        ({"logits": "head"}, "logits='head' must be a function of module and batch that gives logits, or logits and"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], message: str) -> None:
    """The error names the argument, its value and its bound, where it is given."""
    with pytest.raises(ValueError, match=re.escape(message)):
        StepRadiusMonitor(**arguments)
