"""SKAMonitor on real runs against numbers that are computed here by hand, and where there is nothing to measure."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from runs import Classifier, data, scalars, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynwatch.callbacks import DynWatch, EarlyTermination, SKAMonitor, ska
from dynwatch.callbacks.knowledge import fixed_part
from dynwatch.callbacks.learning_time import LearningTime
from dynwatch.callbacks.stream import Stream
from dynwatch.rules import SKAEquilibrium, replay

LN2 = math.log(2)
KINDS = ("entropy", "entropy_published", "alignment", "flow", "net", "norm")


class Deep(Classifier):
    """Three Linear modules: the last gives the logits."""

    def __init__(self, lr: float = 0.3, net: nn.Module | None = None) -> None:
        super().__init__(lr)
        torch.manual_seed(0)
        self.net = net or nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))  # type: ignore[assignment]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ByHand(pl.Callback):
    """The pre-activations of `Deep` on the first batch, in float64, at the first weights and after some steps."""

    def __init__(self, every: int, samples: int = 8) -> None:
        self.every, self.samples = every, samples
        self.z: list[tuple[Tensor, Tensor]] = []
        self.steps: list[int] = []
        self.dt: list[float] = []
        self._x = self._sum = None  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._x is None:
            self._x = batch[0][: self.samples].double()
            self._look(pl_module, 0, 0.0)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._sum = (self._sum or 0.0) + optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        step = trainer.global_step - 1
        if (step + 1) % self.every == 0:
            self._look(pl_module, step, self._sum)
            self._sum = None

    def _look(self, module: Any, step: int, dt: Any) -> None:
        first, second = module.net[0], module.net[2]
        one = self._x @ first.weight.detach().double().T + first.bias.detach().double()
        two = one.tanh() @ second.weight.detach().double().T + second.bias.detach().double()
        self.z.append((one, two))
        self.steps.append(step)
        self.dt.append(dt)

    def expected(self, layer: int) -> dict[str, list[tuple[int, float]]]:
        """The closed forms, written out."""
        series = [pair[layer] for pair in self.z]
        found: dict[str, list[tuple[int, float]]] = {kind: [] for kind in KINDS}

        def h(z: Tensor) -> Tensor:
            p = torch.sigmoid(z)
            return -(p * p.log2() + (1 - p) * (1 - p).log2())

        for k, (step, z, dt) in enumerate(zip(self.steps, series, self.dt, strict=True)):
            n = z.numel()
            found["norm"].append((step, float(z.square().mean().sqrt())))
            found["entropy"].append((step, float((h(z) - h(series[0])).mean())))
            if not k:
                continue
            before = series[k - 1]
            d, dz = torch.sigmoid(z), z - before
            dd = d - torch.sigmoid(before)
            found["entropy_published"].append((step, -float((z * dd).sum()) / LN2 / n))
            found["alignment"].append((step, float((z * dd).sum() / (z.norm() * dd.norm()))))
            found["flow"].append((step, float(dz.norm()) / math.sqrt(n) / dt))
            found["net"].append((step, float(((d - z * d * (1 - d) / LN2) * dz).sum()) / n))
        return found


def fit(folder: Path, *callbacks: pl.Callback, model: Any = None, loader: Any = None, **settings: Any) -> Any:
    """Train and give what the event file then holds."""
    run = trainer(folder, list(callbacks), **settings)
    run.fit(Deep() if model is None else model, data() if loader is None else loader)
    return scalars(folder / "run")


def layers(readings: dict[str, Any]) -> list[str]:
    return sorted({tag.split("/")[1] for tag in readings if tag.count("/") == 2 and tag.startswith("ska/")})


class Told(pl.Callback):
    """Notes what the stream knows beside readings, while it is open."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.reasons, self.remarks = dict(Stream.of(trainer).reasons), dict(Stream.of(trainer).remarks)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_readings_are_those_by_hand(settings: dict[str, Any], tmp_path: Path) -> None:
    """All six numbers of both hidden layers at each probe, with momentum and a rate that falls, in float64."""
    by_hand = ByHand(every=3)
    found = fit(tmp_path, SKAMonitor(every_n_steps=3), by_hand, **settings)
    assert layers(found) == ["net.0", "net.2"]
    close = {"rel": 2e-4, "abs": 2e-7} if "precision" not in settings else {"rel": 0.05, "abs": 0.02}
    for layer, name in enumerate(("net.0", "net.2")):
        for kind, expected in by_hand.expected(layer).items():
            series = found[f"ska/{name}/{kind}"]
            assert [step for step, _ in series] == [step for step, _ in expected], (name, kind)
            assert [v for _, v in series] == pytest.approx([v for _, v in expected], **close), (name, kind)
    for kind in ("entropy", "flow"):
        mean = [
            sum(pair) / 2
            for pair in zip(
                *(
                    [value for step, value in found[f"ska/{name}/{kind}"] if step or kind == "flow"]
                    for name in ("net.0", "net.2")
                ),
                strict=True,
            )
        ]
        assert [value for _, value in found[f"ska/{kind}"]] == pytest.approx(mean, rel=1e-5)
    elapsed = [sum(by_hand.dt[: k + 1]) for k in range(len(by_hand.dt))]
    assert [value for _, value in found["ska/time"]] == pytest.approx(elapsed)


def test_the_clock_can_count_steps(tmp_path: Path) -> None:
    """With time="steps" the flow is per step, whatever the rate."""
    by_rate = fit(tmp_path / "a", SKAMonitor(every_n_steps=4))
    by_step = fit(tmp_path / "b", SKAMonitor(every_n_steps=4, time="steps"))
    assert [v for _, v in by_step["ska/time"]] == [0, 4, 8, 12, 16]
    rates = [b - a for a, b in zip(*(([v for _, v in by_rate["ska/time"]][i:]) for i in (0, 1)), strict=False)]
    for (_, slow), (_, fast), rate in zip(by_step["ska/flow"], by_rate["ska/flow"], rates, strict=True):
        assert slow * 4 == pytest.approx(fast * rate, rel=1e-5)


def test_a_probe_and_its_samples_can_be_given(tmp_path: Path) -> None:
    """A batch of the user's own is cut to `max_samples`; the first batch of the run is then of no matter."""
    batch = next(iter(data(n=64, batch_size=64)))
    given = fit(tmp_path / "a", SKAMonitor(every_n_steps=4, probe=list(batch), max_samples=8))
    first = fit(tmp_path / "b", SKAMonitor(every_n_steps=4))
    assert given["ska/entropy"] == first["ska/entropy"]


class Noisy(Deep):
    """Draws in its step and has dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 4)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x + torch.randn_like(x)), y)

    def configure_optimizers(self) -> Any:
        self.net[1].momentum = 0.0  # statistics stand still
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_what_stands_still_has_no_flow(tmp_path: Path) -> None:
    """With weights that do not move, no draw and no mask is taken for movement."""
    found = fit(tmp_path, SKAMonitor(every_n_steps=2, time="steps"), model=Noisy())
    assert {value for _, value in found["ska/flow"]} == {0.0}
    assert {value for _, value in found["ska/entropy"]} == {0.0}
    assert "ska/equilibrium" not in found  # nothing ever moved


def test_which_layers_are_read(tmp_path: Path) -> None:
    """The module that runs last is left out unless asked for; patterns choose; `max_layers` spaces evenly."""
    assert layers(fit(tmp_path / "a", SKAMonitor(1, include_last=True))) == ["net.0", "net.2", "net.4"]
    assert layers(fit(tmp_path / "b", SKAMonitor(1, layers=["net.2", "net.4"]))) == ["net.2"]
    assert layers(fit(tmp_path / "c", SKAMonitor(1, layers=["4"], include_last=True))) == ["net.4"]
    assert layers(fit(tmp_path / "d", SKAMonitor(1, max_layers=1))) == ["net.0"]


class Shared(Deep):
    """Uses one layer twice, and never another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.idle = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.net = nn.Linear(6, 4)  # type: ignore[assignment]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(self.again(self.again(self.stem(x)).tanh()).relu_()), y)


def test_a_module_that_is_used_twice_is_two_layers(tmp_path: Path) -> None:
    """And one that never runs is none; what is overwritten in place afterwards is read before."""
    found = fit(tmp_path, SKAMonitor(every_n_steps=2), model=Shared())
    assert layers(found) == ["again", "again.use2", "stem"]
    assert found["ska/again/norm"] != found["ska/again.use2/norm"]


def test_units_are_a_fixed_part() -> None:
    """As many channels as fit and positions evenly, as a view of at most samples times units."""
    convolution, linear = nn.Conv2d(1, 4, 3), nn.Linear(2, 6)
    images = torch.arange(3 * 4 * 5 * 5.0).view(3, 4, 5, 5)
    assert torch.equal(fixed_part(convolution, images, 9, 1000), images.flatten(2))
    part = fixed_part(convolution, images, 2, 8)  # 4 channels, 2 positions, 2 samples
    assert torch.equal(part, images.flatten(2)[::2, :, ::13])
    assert torch.equal(fixed_part(convolution, images, 3, 2), images.flatten(2)[:, ::2, ::25])
    tokens = torch.randn(3, 5, 6)
    assert torch.equal(fixed_part(linear, tokens, 3, 12), tokens.transpose(1, 2)[:, :, ::3])
    assert fixed_part(linear, torch.randn(6), 3, 12).shape == (1, 6, 1)
    assert fixed_part(convolution, images[0], 3, 100).shape == (1, 4, 25)
    for samples, units in ((1, 1), (2, 3), (7, 5), (100, 7)):
        for output in (torch.randn(50, 37), torch.randn(5, 11, 13)):
            part = fixed_part(linear, output, samples, units)
            assert part.shape[0] <= samples and part.shape[1] * part.shape[2] <= units


def test_memory_is_one_float_a_tracked_unit_and_sample(tmp_path: Path) -> None:
    """What the monitor holds beside its probe batch."""
    monitor = SKAMonitor(every_n_steps=1, max_samples=4, max_units=3)
    fit(tmp_path, monitor)
    held = [layer.state_dict()["before"] for layer in monitor._layers.values()]
    assert [(part.dtype, part.shape[0], part.shape[1] * part.shape[2]) for part in held] == [(torch.float32, 4, 3)] * 2


def test_the_sum_of_rates() -> None:
    """The largest of a step's groups and optimizers, each as often as it steps; tensors of rates are copied."""
    p = nn.Parameter(torch.zeros(1))
    one = torch.optim.SGD([{"params": [p], "lr": 0.1}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3}], lr=1.0)
    two = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.2))
    time, like = LearningTime(), torch.zeros(1, dtype=torch.float64)
    for optimizers in ([one], [one, two], [two, two], []):
        for optimizer in optimizers:
            time.note(optimizer)
        time.step()
    two.param_groups[0]["lr"].fill_(9.0)
    assert time.so_far("lr", like).tolist() == pytest.approx([0.3 + 0.3 + 0.4, 4])
    assert time.so_far("steps", like).tolist() == [4, 4]
    again = LearningTime()
    again.load_state(time.state())
    assert again.so_far("lr", like).tolist() == pytest.approx([1.0, 4])


# --- where there is nothing to measure


class Manual(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class NoOptimizer(Manual):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        with torch.no_grad():
            self.net[0].weight.mul_(0.9)

    def configure_optimizers(self) -> None:
        return None


class Skips(Deep):
    """Skips its batch, before its layers run."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until = until

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return None if self.trainer.global_step + batch_idx < self.until else super().training_step(batch, batch_idx)


class Bare(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Identity()  # type: ignore[assignment]
        self.weight = nn.Parameter(torch.randn(8, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(batch[0] @ self.weight, batch[1])


NOTHING: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "manual": (Manual, {}, r"manual optimization.*SKAMonitor\(forward=...\)"),
    "no layers": (Bare, {}, "no Linear and no Conv modules"),
    "one layer": (lambda: Deep(net=nn.Linear(8, 4)), {}, "only the module that runs last, net, is left; include_last"),
    "never runs": (lambda: Skips(100), {}, "none of the Linear and Conv modules runs"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_run_with_nothing_to_measure_says_why(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning if the monitor was asked for, a line of the summary if not, and the run goes on."""
    model, arguments, words = NOTHING[kind]
    told = Told()
    monitor = SKAMonitor(every_n_steps=1, **arguments)
    with caplog.at_level(logging.WARNING, "dynwatch"):
        found = fit(tmp_path / "a", monitor, told, model=model())
    assert monitor.off is None and not any(tag.startswith("ska/") for tag in found)
    (message,) = [record.getMessage() for record in caplog.records if "SKAMonitor" in record.getMessage()]
    assert re.search(words, message) and told.reasons["ska/entropy"] in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dynwatch"):
        fit(tmp_path / "b", DynWatch(report=False, hessian=False, step_radius=False), told, model=model())
    assert "SKAMonitor" not in caplog.text and "ska/entropy" in told.reasons


def test_a_step_that_skips_a_batch_has_another_chance(tmp_path: Path) -> None:
    """The next batch becomes the probe."""
    found = fit(tmp_path, SKAMonitor(every_n_steps=1), model=Skips(1))
    assert layers(found) == ["net.0", "net.2"]


def test_a_pattern_that_matches_nothing_is_told_with_the_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The monitor is off before the first step, and the run goes on."""
    monitor = SKAMonitor(every_n_steps=1, layers=["attn"])
    fit(tmp_path, monitor)
    assert monitor.off is not None
    assert "layers='attn' matches none of the 3 Linear and Conv modules: net.0, net.2, net.4" in monitor.off


def test_manual_optimization_with_a_forward(tmp_path: Path) -> None:
    """What it gives is that of automatic optimization; without an optimizer only steps are a clock."""
    automatic = fit(tmp_path / "a", SKAMonitor(every_n_steps=2), model=Deep())
    manual = SKAMonitor(every_n_steps=2, forward=lambda module, batch: module.net(batch[0]))
    found = fit(tmp_path / "b", manual, model=Manual())
    assert found["ska/entropy"][0] == automatic["ska/entropy"][0]
    told = Told()
    by_rate = SKAMonitor(every_n_steps=2, forward=lambda module, batch: module.net(batch[0]))
    found = fit(tmp_path / "c", by_rate, told, model=NoOptimizer())
    assert "ska/flow" not in found and "time='steps'" in told.remarks["ska/flow"] and "ska/entropy" in found
    by_step = SKAMonitor(every_n_steps=2, time="steps", forward=lambda module, batch: module.net(batch[0]))
    assert all(value > 0 for _, value in fit(tmp_path / "d", by_step, model=NoOptimizer())["ska/flow"])


def test_lazy_modules_get_their_weights_from_training(tmp_path: Path) -> None:
    """The first probe waits until they have shapes; weights have the bits of a run without the monitor."""
    ends = []
    for name, callbacks in (("bare", []), ("watched", [SKAMonitor(every_n_steps=2)])):
        torch.manual_seed(3)
        model = Deep(net=nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(4)))
        torch.manual_seed(4)
        found = fit(tmp_path / name, *callbacks, model=model)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert [step for step, _ in found["ska/net.0/norm"]][:2] == [1, 3]


class Breaks(Deep):
    """Turns to NaN for a while."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        z = self.net[0](x)
        if 6 <= self.trainer.fit_loop.epoch_loop._batches_that_stepped < 9:
            z = z * math.nan
        with torch.no_grad():
            self.net[2](z)
        return nn.functional.cross_entropy(self.net(x), y)


def test_numbers_that_are_not_finite_are_left_out_and_told(tmp_path: Path) -> None:
    """A layer with NaN has no reading while it lasts, nor has the network; afterwards both go on."""
    told, monitor = Told(), SKAMonitor(every_n_steps=1)
    found = fit(tmp_path, monitor, told, model=Breaks())
    assert monitor.off is None and layers(found) == ["net.0", "net.0.use2", "net.2", "net.2.use2"]
    steps = [step for step, _ in found["ska/net.2/norm"]]
    assert steps == [0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14, 15]
    assert not any(6 <= step < 9 for step, _ in found["ska/entropy"])
    assert all(math.isfinite(value) for series in found.values() for _, value in series)
    assert "net.2 were not finite" in told.remarks["ska"]


class Growing(Deep):
    """Sees one sample less at each step, as an expert might."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        self.net[2](torch.ones(20 - step, 6))
        return nn.functional.cross_entropy(self.net(x), y)


def test_a_layer_with_other_samples_each_time_begins_anew(tmp_path: Path) -> None:
    """It has a norm and no steps, does not count for the network, and is told; other layers are read as ever."""
    told = Told()
    found = fit(tmp_path, SKAMonitor(every_n_steps=2), told, model=Growing())
    assert "ska/net.2/flow" not in found and "ska/net.2.use2/flow" in found
    assert "net.2 has other samples" in told.remarks["ska layers"]
    assert "ska/equilibrium" in found


class FailsOnce(Deep):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if not self.training:
            raise ZeroDivisionError("only in a probe")
        return super().training_step(batch, batch_idx)


def test_a_step_that_fails_in_a_probe_switches_the_monitor_off(tmp_path: Path) -> None:
    """The run goes on to its end with the weights that it has without it."""
    ends = []
    for name, callbacks in (("bare", []), ("watched", [SKAMonitor(every_n_steps=1)])):
        model = FailsOnce()
        fit(tmp_path / name, *callbacks, model=model)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert "only in a probe" in str(callbacks[0].off)


@pytest.mark.parametrize("compiled", ["module", "part"])
def test_compiled_modules_are_read_and_not_compiled_again(compiled: str, tmp_path: Path) -> None:
    """Names are those without compilation, and hooks that come and go cost no second compilation."""
    counted: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        counted.append(1)
        return graph.forward

    model: Any = Deep()
    if compiled == "part":
        model.net = torch.compile(model.net, backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    fit(tmp_path / "bare", model=model)
    times = len(counted)
    found = fit(tmp_path / "watched", SKAMonitor(every_n_steps=2), model=model)
    assert layers(found) == ["net.0", "net.2"] and len(counted) == times


def test_transformer_layers_of_torch_are_seen(tmp_path: Path) -> None:
    """Though in evaluation mode they would run as one fused kernel."""
    body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = fit(tmp_path, SKAMonitor(every_n_steps=4), model=Deep(net=nn.Sequential(body, nn.Linear(8, 4))))
    assert layers(found) == ["net.0.linear1", "net.0.linear2"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_frozen_layers_do_not_keep_a_network_from_equilibrium(tmp_path: Path) -> None:
    """They have no flow, and the level is that of the others."""
    model = Deep()
    model.net[0].requires_grad_(False)
    found = fit(tmp_path, SKAMonitor(every_n_steps=2), model=model)
    assert {value for _, value in found["ska/net.0/flow"]} == {0.0}
    assert all(0 < value <= 1 for _, value in found["ska/equilibrium"])


def test_a_callback_can_fit_twice(tmp_path: Path) -> None:
    """The second run is read from its own start, also of a model with other layers."""
    monitor = SKAMonitor(every_n_steps=4)
    first, again = fit(tmp_path / "a", monitor), fit(tmp_path / "b", monitor)
    assert all(first[tag] == again[tag] for tag in first.keys() | again.keys() if tag.startswith("ska/"))
    other = fit(tmp_path / "c", monitor, model=Deep(net=nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 4))))
    assert layers(other) == ["net.0"] and monitor.off is None


def test_a_probe_that_is_not_saved_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume the next batch is the probe and entropies count from there; peaks and times go on."""
    monkeypatch.setattr(ska, "MOST_SAVED_BYTES", 0)
    run = trainer(tmp_path / "a", [SKAMonitor(every_n_steps=4)], max_epochs=1)
    run.fit(Deep(), data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    before = scalars(tmp_path / "a" / "run")
    monitor = SKAMonitor(every_n_steps=4)
    again = trainer(tmp_path / "b", [monitor], max_epochs=2)
    again.fit(Deep(), data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    after = scalars(tmp_path / "b" / "run")
    assert monitor.off is None and layers(after) == ["net.0", "net.2"]
    assert after["ska/net.0/entropy"][0] == (8, 0.0) and after["ska/net.0/flow"][0][0] == 11
    assert after["ska/time"][0][1] == before["ska/time"][-1][1] < after["ska/time"][-1][1]
    peak = max(before["ska/flow"] + after["ska/flow"], key=lambda reading: reading[1])[0]
    clock = dict(before["ska/time"] + after["ska/time"])
    assert after["ska/peak_time"][-1][1] == pytest.approx(clock[peak])


def test_a_fast_run_is_read_too(tmp_path: Path) -> None:
    """One batch, without loggers."""
    run = trainer(tmp_path, [monitor := SKAMonitor(every_n_steps=1)], fast_dev_run=True)
    run.fit(Deep(), data())
    assert monitor.off is None and "ska/entropy" in run.callback_metrics


def test_dicts_and_half_precision(tmp_path: Path) -> None:
    """A batch of a dict, weights of bfloat16: arithmetic is in float32, so that small steps are not lost."""

    class Half(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch["x"].bfloat16(), batch["y"]], batch_idx)

    rows = [{"x": x, "y": y} for x, y in data()]
    found = fit(
        tmp_path, SKAMonitor(every_n_steps=2), model=Half().bfloat16(), loader=DataLoader(rows, batch_size=None)
    )
    assert 0 < abs(found["ska/entropy"][0][1]) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probe": "last"}, "probe='last' must be 'first' or a batch"),
        ({"probe": None}, "probe=None must be 'first' or a batch"),
        ({"layers": "attn"}, "layers='attn' must be a list of regular expressions"),
        ({"layers": []}, r"layers=\[\] must be a list of regular expressions, or None for all"),
        ({"time": "hours"}, "time='hours' must be 'lr'"),
        ({"max_units": 0}, "max_units=0 must be a whole number, 1 or more"),
        ({"max_samples": 0}, "max_samples=0 must be"),
        ({"max_layers": 1.5}, "max_layers=1.5 must be"),
        ({"forward": 3}, "forward=3 must be a function"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be"),
        ({"max_overhead": 0.0}, "max_overhead=0.0 must be a number above 0"),
    ],
)
def test_arguments_out_of_bounds_are_told(arguments: dict[str, Any], message: str) -> None:
    """Before any training."""
    with pytest.raises(ValueError, match=message):
        SKAMonitor(**arguments)


# --- what comes of it


def test_the_rule_ends_a_run_at_equilibrium_live_and_in_replay(tmp_path: Path) -> None:
    """A run whose rate goes to zero is ended; its log, asked again, gives the same step; the times are told."""
    told = Told()
    stop = EarlyTermination([SKAEquilibrium(action="stop", patience=3, min_steps=20)])

    class Fading(Deep):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def settling(module: Any, batch: Any) -> Any:
        return module.net(batch[0])

    monitor = SKAMonitor(every_n_steps=2, time="steps", forward=settling)
    found = fit(tmp_path, DynWatch(stop=stop, ska=monitor, report=False), told, model=Fading(), max_epochs=20)
    assert stop.verdict is not None and stop.verdict.rule == "ska_equilibrium"
    assert "stopped changing its decisions" in stop.verdict.reason
    assert max(step for step, _ in found["ska/equilibrium"]) == stop.verdict.step
    levels = [value for step, value in found["ska/equilibrium"] if step >= stop.verdict.step - 4]
    assert len(levels) == 3 and all(level <= 0.1 for level in levels)
    (outcome,) = replay(tmp_path, [SKAEquilibrium(patience=3, min_steps=20)])
    assert outcome.step == stop.verdict.step
    assert "flow peaked at a number of steps of" in told.remarks["ska/peak_time"]
    assert f"at equilibrium from {found['ska/settled_time'][0][1]:.3g} on" in told.remarks["ska/peak_time"]
