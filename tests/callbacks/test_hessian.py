"""HessianMonitor on real runs against dense Hessians of the same loss."""

from __future__ import annotations

import copy
import gc
import math
import re
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import pytorch_lightning as pl
import torch
from nets import LowRank, Recurrent, mlp
from pytorch_lightning.plugins.precision import MixedPrecision
from replays import Model
from runs import Classifier, data, scalars, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from dynwatch.callbacks import DynWatch, HessianMonitor
from dynwatch.callbacks import hessian as module
from dynwatch.callbacks.batches import is_small
from dynwatch.callbacks.stream import Stream

Matrix = npt.NDArray[np.float64]
LARGEST, ERROR, SMALLEST = "hessian/lambda_max", "hessian/lambda_max_error", "hessian/lambda_min"
RATIO, CRITICAL, PRECONDITIONED = "hessian/sharpness_ratio", "hessian/critical_lr", "hessian/preconditioned_lambda_max"
AT_BATCH_SIZE = "hessian/critical_lr_at_batch_size/"
EXACT: dict[str, Any] = {"tol": 1e-8, "max_hvps": 400, "max_samples": None}


# --- networks on 5 features and 3 classes


class Attention(nn.Module):
    """A transformer layer with fused attention, on sequences of three."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 12)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(torch.stack([x, x.flip(1), x**2], 1)).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.norm(mixed + v).mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())[:, :3]


def cnn() -> nn.Module:
    front = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.3))
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(9, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": Attention,
    "lstm": Recurrent,
    "tied": Tied,
    "low_rank": LowRank,
}


# --- runs


def batches(count: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


class Dense(pl.Callback):
    """Notes the dense Hessian of the loss, and its gradient, at the steps of readings; added after the monitor."""

    def __init__(self, every: int = 1, probe: str = "first", samples: int | None = None) -> None:
        self.every, self.probe, self.samples = every, probe, samples
        self.hessians: list[Matrix] = []
        self.gradients: list[Matrix] = []
        self.states: list[Any] = []  # of the optimizers
        self._batch: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._batch is None or self.probe == "current":
            self._batch = [part[: self.samples].clone() for part in batch]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if (Stream.step(trainer) + 1) % self.every or trainer.fit_loop._should_accumulate():
            return
        buffers = {name: b.clone() for name, b in pl_module.named_buffers()}
        stream = torch.get_rng_state()
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):
            x, y = (part.clone() for part in self._batch)
            gradient = torch.autograd.grad(cross_entropy(pl_module.net(x), y), parameters, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in gradient])
            rows = []
            for entry in flat:
                found = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
                rows.append(torch.cat([g.reshape(-1) for g in found]))
        self.hessians.append(torch.stack(rows).double().numpy())
        self.gradients.append(flat.detach().double().numpy())
        self.states.append([_settings(optimizer, parameters) for optimizer in trainer.optimizers])
        torch.set_rng_state(stream)
        for name, b in pl_module.named_buffers():
            b.copy_(buffers[name])

    def extremes(self) -> tuple[list[float], list[float]]:
        spectra = [np.linalg.eigvalsh(H) for H in self.hessians]
        return [s[-1] for s in spectra], [s[0] for s in spectra]


def _settings(optimizer: Any, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Of each parameter: its group's settings and its state, as they are now."""
    groups = {id(p): {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups for p in g["params"]}
    return [{"p": p, **groups.get(id(p), {}), **copy.deepcopy(dict(optimizer.state[p]))} for p in parameters]


def fit(model: Any, folder: Path, *callbacks: pl.Callback, loader: Any = None, **settings: Any) -> dict[str, Any]:
    """Train, and give what the event file then holds."""
    loader = DataLoader(batches() if loader is None else loader, batch_size=None)
    trainer(folder, list(callbacks), **({"max_epochs": 1} | settings)).fit(model, loader)
    for callback in callbacks:
        if isinstance(callback, HessianMonitor):
            assert callback.off is None
    return scalars(folder / "run")


def values(readings: dict[str, Any], tag: str) -> list[float]:
    return [value for _, value in readings[tag]]


def steps(readings: dict[str, Any], tag: str) -> list[int]:
    return [step for step, _ in readings.get(tag, [])]


# --- readings


@pytest.mark.parametrize("kind", NETS)
def test_full_readings_in_float64_are_those_of_the_dense_hessian(kind: str, tmp_path: Path) -> None:
    """Extremes, batch sharpness and trace, of the first batch with the dropout mask and the weights after the step."""
    oracle = Dense(every=2)
    monitor = HessianMonitor(every_n_steps=2, full_every_n_readings=1, **EXACT)
    found = fit(Model(NETS[kind]()), tmp_path, monitor, oracle, precision="64-true")
    largest, smallest = oracle.extremes()
    assert steps(found, LARGEST) == [1, 3]
    assert values(found, LARGEST) == pytest.approx(largest, rel=1e-6)
    assert values(found, SMALLEST) == pytest.approx(smallest, rel=1e-6, abs=1e-6 * largest[0])
    along = [float(g @ H @ g / (g @ g)) for g, H in zip(oracle.gradients, oracle.hessians, strict=True)]
    assert values(found, "hessian/batch_sharpness") == pytest.approx(along, rel=1e-6)
    for H, trace, error in zip(
        oracle.hessians, values(found, "hessian/trace"), values(found, "hessian/trace_error"), strict=True
    ):
        assert abs(trace - np.trace(H)) <= 5 * error + 1e-6 * abs(np.trace(H))


@pytest.mark.parametrize(
    ("kind", "storage"), [*((kind, "float32") for kind in NETS), ("mlp", "bfloat16"), ("mlp", "cpu")]
)
def test_errors_in_float32_are_within_the_error_bar(kind: str, storage: Any, tmp_path: Path) -> None:
    """At the default tolerance, of ordinary readings and full ones; the band is what the error bar says."""
    oracle = Dense()
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=2, storage=storage)
    found = fit(Model(NETS[kind]()), tmp_path, monitor, oracle)
    largest, smallest = oracle.extremes()
    errors = values(found, ERROR)
    assert [abs(a - b) <= e for a, b, e in zip(values(found, LARGEST), largest, errors, strict=True)] == [True] * 4
    pairs = zip(values(found, SMALLEST), smallest[1::2], values(found, "hessian/lambda_min_error"), strict=True)
    assert [abs(a - b) <= e for a, b, e in pairs] == [True] * 2
    assert all(0 <= e <= 0.1 * abs(v) for e, v in zip(errors, largest, strict=True))
    for side, sign in (("lower", -1), ("upper", 1)):
        ends = [v + sign * e for v, e in zip(values(found, LARGEST), errors, strict=True)]
        assert values(found, f"hessian/bounds/lambda_max_{side}") == pytest.approx(ends, rel=1e-5)


def test_the_trace_is_within_its_error(tmp_path: Path) -> None:
    """With few products, where it is an estimate: off by no more than five standard errors, which are not zero."""
    oracle = Dense()
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, max_hvps=5)
    found = fit(Model(mlp()), tmp_path, monitor, oracle)
    for H, trace, error in zip(
        oracle.hessians, values(found, "hessian/trace"), values(found, "hessian/trace_error"), strict=True
    ):
        assert 0 < error < abs(np.trace(H))
        assert abs(trace - np.trace(H)) <= 5 * error


def _two_groups(net: nn.Module, first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": net[0].parameters(), **first}, {"params": net[2].parameters(), **second}]


OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], float]] = {
    # With the threshold of lr · λ.
    "sgd": (lambda net: torch.optim.SGD(net.parameters(), lr=0.05, weight_decay=0.3), 2.0),
    "momentum": (lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), 3.8),
    "dampened": (lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, dampening=0.5), 7.6),
    "nesterov": (lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True), 3.8 / 2.8),
    "sgd_rates": (
        lambda net: torch.optim.SGD(_two_groups(net, {"lr": 0.05, "weight_decay": 0.2}, {"lr": 0.02}), momentum=0.5),
        3.0,
    ),
    "sgd_decays": (
        lambda net: torch.optim.SGD(_two_groups(net, {"weight_decay": 0.5}, {"weight_decay": 0.1}), lr=0.05),
        2.0,
    ),
    "adam": (lambda net: torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=0.1), 38.0),
    "adam_groups": (
        lambda net: torch.optim.Adam(
            _two_groups(net, {"lr": 0.02, "weight_decay": 0.3}, {"lr": 0.01}), betas=(0.5, 0.99)
        ),
        6.0,
    ),
    "adamw": (
        lambda net: torch.optim.AdamW(_two_groups(net, {"lr": 0.01, "weight_decay": 0.5}, {"lr": 0.03})),
        38.0,
    ),
    "rmsprop": (lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01), 2.0),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_critical_rates_are_those_of_the_formulas(kind: str, tmp_path: Path) -> None:
    """From the dense Hessian, with v̂ of the optimizer's state, rates relative to the first group's, and both decays."""
    make, threshold = OPTIMIZERS[kind]
    oracle = Dense(every=2)
    model = Model(mlp())
    model.configure_optimizers = lambda: make(model.net)
    monitor = HessianMonitor(every_n_steps=2, full_every_n_readings=1, **EXACT)
    found = fit(model, tmp_path, monitor, oracle, precision="64-true")
    sharpest, rates, ratios = [], [], []
    for H, (state,) in zip(oracle.hessians, oracle.states, strict=True):
        lr = state[0]["lr"]
        parts, decay, apart = [], [], 0.0
        for s in state:
            slow = torch.ones_like(s["p"])
            if "exp_avg_sq" in s:
                slow = (s["exp_avg_sq"] / (1 - s["betas"][1] ** float(s["step"]))).sqrt() + s["eps"]
            elif "square_avg" in s:
                slow = s["square_avg"].sqrt() + s["eps"]
            parts.append((s["lr"] / lr / slow).detach().reshape(-1))
            coupled = 0.0 if kind == "adamw" else s["weight_decay"]
            apart = max(apart, s["lr"] / lr * s["weight_decay"]) if kind == "adamw" else 0.0
            decay.append(torch.full_like(parts[-1], coupled))
        inverse, added = (torch.cat(tensors).double().numpy() for tensors in (parts, decay))
        sharpest.append(float(np.linalg.eigvals(inverse[:, None] * (H + np.diag(added))).real.max()))
        rates.append(2 / (apart + 2 * sharpest[-1] / threshold))
        ratios.append(lr / rates[-1])
    assert values(found, CRITICAL) == pytest.approx(rates, rel=1e-6)
    assert values(found, RATIO) == pytest.approx(ratios, rel=1e-6)
    if kind in ("sgd", "momentum", "dampened", "nesterov"):
        assert PRECONDITIONED not in found
        assert not any(PRECONDITIONED in chart.tags for chart in monitor.charts())
    else:
        assert values(found, PRECONDITIONED) == pytest.approx(sharpest, rel=1e-6)
        assert any(PRECONDITIONED in chart.tags for chart in monitor.charts())


# --- cadence and the probe batch


@pytest.mark.parametrize(("every", "full", "wanted"), [(1, 1, range(24)), (1, 2, range(1, 24, 2)), (2, 10, [3, 23])])
def test_full_readings_come_at_their_cadence(every: int, full: int, wanted: Any, tmp_path: Path) -> None:
    """The first reading is an ordinary one, unless all are full; each stands at its step."""
    monitor = HessianMonitor(every_n_steps=every, full_every_n_readings=full, max_hvps=4)
    found = fit(Model(mlp()), tmp_path, monitor, max_epochs=6)
    assert steps(found, LARGEST) == list(range(every - 1, 24, every))
    for tag in (SMALLEST, "hessian/trace", "hessian/learned_lr", f"{AT_BATCH_SIZE}8"):
        assert steps(found, tag) == list(wanted)


@pytest.mark.parametrize("probe", ["first", "current"])
def test_readings_are_of_the_probe_batch(probe: Any, tmp_path: Path) -> None:
    """With weights that stay as they are, the first batch gives one value again and again, the current one its own."""
    oracle = Dense(probe=probe)
    model = Model(mlp())
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, probe_batch=probe, **EXACT)
    found = fit(model, tmp_path, monitor, oracle, precision="64-true")
    assert values(found, LARGEST) == pytest.approx(oracle.extremes()[0], rel=1e-6)
    assert len({round(value, 4) for value in values(found, LARGEST)}) == (1 if probe == "first" else 4)
    assert values(found, RATIO) == [0.0] * 4


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    """Readings stand at optimizer steps, of the weights after it; "current" is the last micro-batch."""
    oracle = Dense(probe="current")
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, probe_batch="current", **EXACT)
    found = fit(Model(mlp()), tmp_path, monitor, oracle, precision="64-true", accumulate_grad_batches=2, max_epochs=2)
    assert steps(found, LARGEST) == [0, 1, 2, 3]
    assert values(found, LARGEST) == pytest.approx(oracle.extremes()[0], rel=1e-6)
    sizes = sorted(int(tag.rpartition("/")[2]) for tag in found if tag.startswith(AT_BATCH_SIZE))
    assert sizes == [8, 16, 32, 64]  # around 16, the samples of a step


class Overwrites(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step([part.clone() for part in batch], batch_idx)
        batch[0].zero_()
        batch[1].fill_(2)
        return loss


@pytest.mark.parametrize("probe", ["first", "current"])
def test_a_step_that_overwrites_its_batch(probe: Any, tmp_path: Path) -> None:
    """The reading is of the batch as the step got it."""
    oracle = Dense(probe=probe)
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, probe_batch=probe, **EXACT)
    found = fit(Overwrites(mlp()), tmp_path, monitor, oracle, precision="64-true")
    assert values(found, LARGEST) == pytest.approx(oracle.extremes()[0], rel=1e-6)


@pytest.mark.parametrize("probe", ["first", "current"])
def test_no_more_samples_than_asked_for(probe: Any, tmp_path: Path) -> None:
    """The first of the probe batch, and no copy of the others is kept; the run's batch size is the whole one."""
    oracle = Dense(probe=probe, samples=3)
    settings = {"probe_batch": probe, **EXACT, "max_samples": 3}
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, **settings)
    found = fit(Model(mlp()), tmp_path, monitor, oracle, precision="64-true")
    assert values(found, LARGEST) == pytest.approx(oracle.extremes()[0], rel=1e-6)
    assert [len(part) for part in monitor._probe] == [3, 3]
    assert f"{AT_BATCH_SIZE}32" in found


class Uneven(Model):
    """Of a batch with a table beside its samples, or with inputs that cannot be cut."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, table = batch
        x = x.to_dense() if x.is_sparse else x
        return cross_entropy(self.net(x), y) + 0 * table.to_dense().sum()


@pytest.mark.parametrize("kind", ["table", "sparse"])
def test_a_batch_that_cannot_be_cut_is_used_whole(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The summary says so once, and that it holds for max_samples."""
    whole = [(x, y, torch.ones(3)) for x, y in batches()]
    if kind == "sparse":
        whole = [(x.to_sparse(), y, torch.ones(8).to_sparse()) for x, y in batches()]
    found = []
    for folder, most in (("cut", 2), ("whole", None)):
        monitor = HessianMonitor(every_n_steps=1, max_samples=most)
        torch.manual_seed(0)
        watch = DynWatch(hessian=monitor, gradients=False, stop=False, activations=False)
        found.append(fit(Uneven(mlp()), tmp_path / folder, watch, loader=whole))
        assert monitor.off is None
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("hessian max_samples: the") == said.count("all of it is used.") == (most is not None)
    assert values(found[0], LARGEST) == values(found[1], LARGEST)
    assert len(found[0][LARGEST]) == 4


@pytest.mark.parametrize(("given", "tags"), [(None, [4, 8, 16, 32]), ([1, 1000], [1, 1000]), ([], [])])
def test_critical_rates_by_batch_size(given: Any, tags: list[int], tmp_path: Path) -> None:
    """For the sizes asked for, by default around the run's own; smaller batches allow no larger rate."""
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, batch_sizes=given)
    found = fit(Model(mlp()), tmp_path, monitor)
    sizes = sorted(int(tag.rpartition("/")[2]) for tag in found if tag.startswith(AT_BATCH_SIZE))
    assert sizes == tags
    for smaller, larger in pairwise(sizes):
        pair = zip(values(found, f"{AT_BATCH_SIZE}{smaller}"), values(found, f"{AT_BATCH_SIZE}{larger}"), strict=True)
        assert all(a <= b for a, b in pair)
    # What noise there is only lowers the rate, and λ of all data is at least half of the probe's.
    assert all(
        rate <= 2 * critical
        for size in sizes
        for rate, critical in zip(values(found, f"{AT_BATCH_SIZE}{size}"), values(found, CRITICAL), strict=True)
    )


def test_one_sample_has_no_rates_by_batch_size(tmp_path: Path) -> None:
    """There is no spread between samples to tell it from, and the reason is noted; all else is measured."""
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, max_samples=1)
    keeper = Reasons()
    found = fit(Model(mlp()), tmp_path, monitor, keeper)
    assert not any(tag.startswith(AT_BATCH_SIZE) for tag in found)
    assert keeper.reasons[AT_BATCH_SIZE] == "it needs a batch of several samples"
    assert len(found[LARGEST]) == len(found[CRITICAL]) == 4


class Reasons(pl.Callback):
    """Notes why tags have no value, and what else there is to know, while the stream is open."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.reasons = dict(Stream.of(trainer).reasons)
        self.remarks = dict(Stream.of(trainer).remarks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be a whole number of steps, 1 or more"),
        ({"every_n_steps": 2.5}, "every_n_steps=2.5 must be a whole number of steps, 1 or more"),
        ({"full_every_n_readings": 0}, "full_every_n_readings=0 must be a whole number, 1 or more"),
        ({"probe_batch": "last"}, "probe_batch='last' must be one of 'first', 'current'"),
        ({"method": "guess"}, "method='guess' must be one of 'auto', 'exact', 'differences'"),
        ({"storage": "disk"}, "storage='disk' must be one of 'float32', 'bfloat16', 'cpu'"),
        ({"max_samples": 0}, "max_samples=0 must be a whole number, 1 or more"),
        ({"max_samples": True}, "max_samples=True must be a whole number, 1 or more"),
        ({"tol": 0.0}, "tol=0.0 must be a number above 0 and below 1; 0.01 is one per cent"),
        ({"tol": 5}, "tol=5 must be a number above 0 and below 1; 0.01 is one per cent"),
        ({"tol": math.nan}, "tol=nan must be a number above 0 and below 1"),
        ({"max_hvps": 3}, "max_hvps=3 must be a whole number, 4 or more"),
        ({"batch_sizes": 8}, "batch_sizes=8 must be a list of whole numbers, 1 or more"),
        ({"batch_sizes": [8, 0]}, "batch_sizes[1]=0 must be a whole number, 1 or more"),
        ({"loss": "mse"}, "loss='mse' must be a function of module and batch that gives the loss"),
        ({"max_overhead": 0}, "max_overhead=0 must be a number above 0 and below 1; 0.05 is five per cent"),
        ({"max_overhead": 1.0}, "max_overhead=1.0 must be a number above 0 and below 1"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], message: str) -> None:
    """The error names the argument, its value and its bound, where it is given."""
    with pytest.raises(ValueError, match=re.escape(message)):
        HessianMonitor(**arguments)


# --- what else a run can be


class Manual(Classifier):
    """Steps its optimizers itself."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.count = optimizers

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        halves = [self.net[0], self.net[2]] if self.count == 2 else [self.net]
        return [torch.optim.SGD(half.parameters(), lr=0.1) for half in halves]


def loss_of(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module.net(batch[0]), batch[1])


@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization_with_a_loss(optimizers: int, tmp_path: Path) -> None:
    """The function given as loss= is measured; with two optimizers there is no one critical rate, for a reason."""
    oracle, reasons = Dense(), Reasons()
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, loss=loss_of, **EXACT)
    found = fit(Manual(optimizers), tmp_path, monitor, oracle, reasons, loader=list(data(32)), precision="64-true")
    assert values(found, LARGEST) == pytest.approx(oracle.extremes()[0], rel=1e-6)
    assert (CRITICAL in found) == (optimizers == 1)
    if optimizers == 2:
        assert reasons.reasons[CRITICAL].startswith("the run has 2 optimizers, and one loss has no critical rate")


def test_manual_optimization_without_a_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said once what to do, there are no panels of it, no readings, and the run goes on."""
    monitor = HessianMonitor(every_n_steps=1)
    found = fit(Manual(), tmp_path, DynWatch(hessian=monitor), loader=list(data(32)))
    assert monitor.off is None
    assert sum("pass HessianMonitor(loss=...)" in record.getMessage() for record in caplog.records) == 1
    assert monitor.charts() == ()
    said = " ".join(capsys.readouterr().out.split())
    assert "hessian/lambda_max: not available: training_step steps the optimizers itself" in said
    assert not any(tag.startswith("hessian/") for tag in found)


class Sign(torch.optim.Optimizer):
    """Steps by the gradient's sign."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Sign], ids=lambda kind: kind.__name__)
def test_an_optimizer_without_a_known_threshold(kind: Any, tmp_path: Path) -> None:
    """The critical rate has a reason that names the optimizer, and the curvature is measured all the same."""
    reasons, oracle = Reasons(), Dense()
    model = Model(mlp())
    model.configure_optimizers = lambda: kind(model.parameters())
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=2)
    found = fit(model, tmp_path, monitor, oracle, reasons)
    for tag in (CRITICAL, RATIO):
        assert tag not in found
        assert reasons.reasons[tag].startswith(f"The critical learning rate of {kind.__name__} is not known")
    assert values(found, LARGEST) == pytest.approx(oracle.extremes()[0], rel=0.02)
    assert len(found[SMALLEST]) == 2


def test_nothing_to_train(tmp_path: Path) -> None:
    """Without a parameter that requires a gradient the monitor goes off with that cause, and the run goes on."""
    model = Manual()
    model.net.requires_grad_(False)
    model.training_step = lambda batch, batch_idx: None
    monitor = HessianMonitor(every_n_steps=1, loss=loss_of)
    run = trainer(tmp_path, [monitor], max_epochs=1)
    run.fit(model, data(32))
    assert run.fit_loop.epoch_loop.batch_progress.total.completed == 4
    assert monitor.off == "CannotReplayError: no parameter requires a gradient, so there is nothing to measure."


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """After the loss has become NaN the reading is NaN with an infinite error, and the monitor goes on."""
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1)
    found = fit(Classifier(bad_at=3), tmp_path, monitor, loader=list(data(64)))
    assert [math.isnan(value) for value in values(found, LARGEST)] == [False] * 2 + [True] * 6
    assert values(found, ERROR)[2:] == [math.inf] * 6
    assert steps(found, SMALLEST) == [0, 1]


class Hungry(Model):
    """Runs out of memory on more than four samples, when the step runs again."""

    ran = -1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        if self.ran == step and len(batch[0]) > 4:
            raise torch.OutOfMemoryError("out of memory")
        self.ran = step
        return super().training_step(batch, batch_idx)


def test_out_of_memory_is_answered_with_fewer_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half as many at the next reading, until it fits; each time it is said; training goes on."""
    oracle = Dense(samples=4)
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, **(EXACT | {"max_samples": 16}))
    found = fit(Hungry(mlp()), tmp_path, monitor, oracle, loader=batches(5, 16), precision="64-true")
    assert steps(found, LARGEST) == [2, 3, 4]
    assert values(found, LARGEST) == pytest.approx(oracle.extremes()[0][2:], rel=1e-6)
    told = " ".join(r.getMessage() for r in caplog.records if "Memory ran out" in r.getMessage())
    assert re.findall(r"on (\d+) samples; the next ones use max_samples=(\d+)", told) == [("16", "8"), ("8", "4")]


class SmallParts(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) < 3:
            raise ValueError("Expected more than 1 value per channel when training")
        return super().training_step(batch, batch_idx)


def test_a_step_that_cannot_run_on_parts_of_a_batch(tmp_path: Path) -> None:
    """As a net that needs more samples than a chunk has: only rates by batch size are missing, for this reason."""
    reasons = Reasons()
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1)
    found = fit(SmallParts(mlp()), tmp_path, monitor, reasons)
    assert reasons.reasons[AT_BATCH_SIZE].startswith("products on parts of the batch failed (ValueError: Expected more")
    assert len(found[LARGEST]) == len(found[SMALLEST]) == 4


# --- methods


class OnceTanh(torch.autograd.Function):
    """A kernel of its own, of which there is no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return gradient * (1 - y**2)


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnceTanh.apply(x)


def swap(model: Model, activation: nn.Module) -> Model:
    model.net[1] = activation
    return model


def test_without_second_derivatives_differences_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within one per cent of the exact ones; the log and the summary say that they are approximate, and why."""
    plain = Model(mlp())
    oracle = Dense()
    fit(copy.deepcopy(plain), tmp_path / "plain", oracle)
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=2, tol=1e-3)
    watch = DynWatch(hessian=monitor, stop=False)
    found = fit(swap(plain, Once()), tmp_path / "once", watch)
    assert monitor.off is None
    largest, smallest = oracle.extremes()
    assert values(found, LARGEST) == pytest.approx(largest, rel=0.01)
    assert values(found, SMALLEST) == pytest.approx(smallest[1::2], rel=0.02, abs=0.01 * max(largest))
    said = " ".join(capsys.readouterr().out.split())
    why = "there is no second derivative (the backward of OnceTanh cannot be differentiated)"
    assert said.count(f"hessian: differences of gradients, approximate: {why}") == 1
    assert AT_BATCH_SIZE + ": not available: it needs exact products on parts of the batch." in said
    told = [r.getMessage() for r in caplog.records if "uses differences of gradients" in r.getMessage()]
    assert len(told) == 1 and why in told[0]


def test_kinks_have_no_smallest_eigenvalue_by_differences(tmp_path: Path) -> None:
    """With ReLU in a net that cannot be differentiated twice it is refused, with the reason; the largest goes on."""
    net = nn.Sequential(nn.Linear(5, 6), Once(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    reasons = Reasons()
    found = fit(Model(net), tmp_path, HessianMonitor(every_n_steps=1, full_every_n_readings=1), reasons)
    assert len(found[LARGEST]) == 4 and SMALLEST not in found
    assert "only differences of gradients work here, and at the kinks of Relu" in reasons.reasons[SMALLEST]


class Kernel(torch.autograd.Function):
    """Works out its gradient in the forward pass, as fused losses do: torch takes it for a constant."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward((logits.softmax(-1) - nn.functional.one_hot(y, 3)) / len(y))
        return cross_entropy(logits, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0], None


class Twice(torch.autograd.Function):
    """Can be differentiated as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


@pytest.mark.parametrize("kind", ["fused", "twice", "bf16"])
def test_functions_of_the_users_own(kind: str, tmp_path: Path) -> None:
    """A fused loss, of which torch would silently leave out half of the Hessian, is measured by differences."""
    torch.manual_seed(2)
    plain, oracle = Model(mlp()), Dense()
    fit(copy.deepcopy(plain), tmp_path / "plain", oracle)
    if kind == "fused":
        plain.own_loss = lambda model, x, y: Kernel.apply(model.net(x), y)
    else:
        plain.net[1].forward = Twice.apply
    monitor = HessianMonitor(every_n_steps=1, tol=1e-3)
    precision = "bf16-mixed" if kind == "bf16" else "32-true"
    found = fit(plain, tmp_path / "own", monitor, precision=precision)
    assert monitor.way is not None and monitor.way.method == ("differences" if kind == "fused" else "exact")
    assert values(found, LARGEST) == pytest.approx(oracle.extremes()[0], rel=0.03)


def test_method_exact_where_there_is_none(tmp_path: Path) -> None:
    """The monitor is off with the cause and what to do instead; the run goes on."""
    monitor = HessianMonitor(every_n_steps=1, method="exact")
    run = trainer(tmp_path, [monitor], max_epochs=1)
    run.fit(swap(Model(mlp()), Once()), DataLoader(batches(), batch_size=None))
    assert run.global_step == 4
    assert monitor.off is not None
    assert monitor.off.startswith("RuntimeError: method='exact' needs second derivatives, and this model has none (")
    assert monitor.off.endswith("use 'auto'")


def test_method_differences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a smooth net it agrees with the dense Hessian within one per cent, at both ends, and nobody is warned."""
    oracle, reasons = Dense(), Reasons()
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, method="differences", tol=1e-3)
    found = fit(Model(mlp()), tmp_path, monitor, oracle, reasons)
    largest, smallest = oracle.extremes()
    assert values(found, LARGEST) == pytest.approx(largest, rel=0.01)
    assert values(found, SMALLEST) == pytest.approx(smallest, rel=0.01, abs=0.01 * max(largest))
    assert reasons.remarks["hessian"] == "differences of gradients, approximate: asked for"
    assert not [r for r in caplog.records if "differences" in r.getMessage()]


@pytest.mark.parametrize("kind", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(kind: str, tmp_path: Path) -> None:
    """Within two per cent of the dense Hessian in float32, and without the scaler's factor."""
    oracle = Dense()
    settings: dict[str, Any] = {"precision": kind}
    if kind == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        settings = {"plugins": [MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)]}
    monitor = HessianMonitor(every_n_steps=1, tol=1e-3)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    found = fit(Model(net), tmp_path, monitor, oracle, **settings)
    assert monitor.way is not None and monitor.way.method == "exact"
    assert values(found, LARGEST) == pytest.approx(oracle.extremes()[0], rel=0.02)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = mlp()
        self.first = nn.Linear(5, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("kind", ["compiled", "compiled_net", "checkpointed"])
def test_models_that_run_in_another_way(kind: str, tmp_path: Path) -> None:
    """Compiled modules and activation checkpoints have the exact Hessian of the plain ones."""
    oracle = Dense()
    model: Any = Model(Checkpointed(reentrant=False) if kind == "checkpointed" else mlp())
    plain = copy.deepcopy(model)
    if kind == "checkpointed":
        plain.net.forward = lambda x: plain.net.body(plain.net.first(x))
    fit(plain, tmp_path / "plain", oracle, precision="64-true")
    if kind == "compiled":
        model = torch.compile(model, backend="aot_eager")
    elif kind == "compiled_net":
        model.net.compile(backend="eager")
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, **EXACT)
    found = fit(model, tmp_path / "other", monitor, precision="64-true")
    assert monitor.way is not None and monitor.way.method == "exact"
    largest, smallest = oracle.extremes()
    assert values(found, LARGEST) == pytest.approx(largest, rel=1e-6)
    assert values(found, SMALLEST) == pytest.approx(smallest, rel=1e-6, abs=1e-6 * max(largest))


def test_reentrant_checkpoints(tmp_path: Path) -> None:
    """They cannot be differentiated this way; the monitor goes off with what to change, and the run goes on."""
    monitor = HessianMonitor(every_n_steps=1)
    run = trainer(tmp_path, [monitor], max_epochs=1)
    run.fit(Model(Checkpointed(reentrant=True)), DataLoader(batches(), batch_size=None))
    assert run.global_step == 4
    assert monitor.off is not None and "use_reentrant=False" in monitor.off


def _transcription(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """CTC loss of eight sequences of six letters, with two labels each."""
    letters = model.net(torch.stack([x, x.roll(1, 1), -x, x**2, x.flip(0), x.flip(1)])).log_softmax(-1)
    labels = torch.stack([y % 2 + 1, 2 - y % 2], 1)
    return nn.functional.ctc_loss(letters, labels, torch.full((8,), 6), torch.full((8,), 2))


def test_a_loss_without_a_second_derivative(tmp_path: Path) -> None:
    """CTC is measured by differences of gradients, whose λ is that of differences in float64."""
    found = {}
    for precision in ("32-true", "64-true"):
        torch.manual_seed(1)
        monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=2, tol=1e-3)
        model = Model(mlp(), _transcription)
        found[precision] = values(fit(model, tmp_path / precision, monitor, precision=precision), LARGEST)
        assert monitor.way is not None and monitor.way.method == "differences" and monitor.way.kinks == ()
    assert found["32-true"] == pytest.approx(found["64-true"], rel=0.01)
    assert min(found["32-true"]) > 0


# --- TensorBoard


def test_the_density_is_in_the_event_file(tmp_path: Path) -> None:
    """As a histogram whose counts add up to the dimension, and as a picture, at the steps of full readings."""
    oracle = Dense()
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=2, **EXACT)
    fit(Model(mlp()), tmp_path, monitor, oracle, precision="64-true")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    histograms, pictures = events.Histograms("hessian/density"), events.Images("hessian/density")
    assert [event.step for event in histograms] == [event.step for event in pictures] == [1, 3]
    for event, H in zip(histograms, oracle.hessians[1::2], strict=True):
        spectrum, shown = np.linalg.eigvalsh(H), event.histogram_value
        assert sum(shown.bucket) == pytest.approx(len(H))
        assert shown.num == len(H)
        assert [shown.min, shown.max] == pytest.approx([spectrum[0], spectrum[-1]], rel=1e-5)
        assert spectrum[0] < min(shown.bucket_limit) and max(shown.bucket_limit) == pytest.approx(spectrum[-1])
    assert all((event.width, event.height) == (840, 440) for event in pictures)


def test_many_densities_are_thinned_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture keeps the first and the latest, at half as many steps whenever there are too many."""
    monkeypatch.setattr("dynwatch.callbacks.curvature_panels._MOST_DENSITIES", 4)
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, max_hvps=4)
    fit(Model(mlp()), tmp_path, monitor, max_epochs=3)
    kept = [step for step, _ in monitor._densities.kept]
    assert len(kept) <= 4 and kept[0] == 0 and kept[-1] >= 10


# --- state and cost


def test_the_state_is_primitives_and_tensors(tmp_path: Path) -> None:
    """A checkpoint of a run loads with weights_only=True, and a fresh monitor that takes it up has the same state."""
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=2)
    run = trainer(tmp_path, [monitor], max_epochs=1)
    run.fit(Model(mlp()), DataLoader(batches(), batch_size=None))
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["HessianMonitor"]
    fresh = HessianMonitor(every_n_steps=1, full_every_n_readings=2)
    fresh.load_state_dict(saved)
    assert _plain(fresh.state()) == _plain(monitor.state())
    assert saved["own"]["readings"] == 4 and len(saved["own"]["densities"]) == 2
    assert torch.equal(saved["own"]["probe"][0], batches()[0][0])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value


class Wrapped(dict):  # type: ignore[type-arg]
    """A batch of a class that no checkpoint may hold."""


@pytest.mark.parametrize(
    ("batch", "small"),
    [
        (None, True),
        ([torch.ones(3), (torch.ones(2), "text", 1, 2.0, True)], True),
        ({"x": torch.ones(3), 1: [b"1"]}, True),
        (Wrapped(x=torch.ones(3)), False),
        ({"x": np.ones(3)}, False),
        ([nn.Parameter(torch.ones(3))], False),
        ({(1, object): 1}, False),
        ([torch.zeros(2**21), {"y": torch.zeros(2**21 + 1)}], False),
        ([torch.zeros(2**21), {"y": torch.zeros(2**21)}], True),
    ],
    ids=["none", "nested", "dict", "dict_subclass", "numpy", "parameter", "key", "too_large", "large"],
)
def test_which_probe_batches_go_into_a_checkpoint(batch: Any, small: bool, tmp_path: Path) -> None:
    """Those of primitives and tensors, of no more than 16 MiB; what goes in can be loaded with weights_only=True."""
    assert is_small(batch, 16 * 2**20) == small
    if small:
        torch.save(batch, tmp_path / "batch")
        torch.load(tmp_path / "batch", weights_only=True)


@pytest.mark.parametrize(("now", "then", "allowed"), [(64, 64, 64), (64, 16, 16), (16, 64, 64), (64, None, None)])
def test_a_resumed_run_may_use_other_samples(now: int, then: Any, allowed: Any) -> None:
    """max_samples is that of the resumed run, unless memory ran out before."""
    before, after = HessianMonitor(max_samples=now), HessianMonitor(max_samples=then)
    after.load_state(before.state())
    assert after._allowed == allowed
    before._allowed = 8
    after.load_state(before.state())
    assert after._allowed == 8


def test_a_second_fit_starts_afresh(tmp_path: Path) -> None:
    """The same callback in another run reads what a new one would read there, of that run's first batch."""
    used, new = (HessianMonitor(every_n_steps=1, full_every_n_readings=3) for _ in range(2))
    fit(Model(cnn()), tmp_path / "other", used, loader=batches(3, 16))
    found = []
    for name, monitor in (("used", used), ("new", new)):
        torch.manual_seed(5)
        found.append(fit(Model(mlp()), tmp_path / name, monitor))
    assert found[0].keys() == found[1].keys()
    for tag in found[0]:
        if tag != "dynwatch/overhead":
            assert found[0][tag] == found[1][tag], tag


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_held_after_a_run(raises: bool, tmp_path: Path) -> None:
    """No hooks, no weights, no graph: the model can be collected while the monitor lives, also if training raised."""
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=2)
    model = Model(mlp())
    if raises:
        model.on_train_epoch_end = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            fit(model, tmp_path, monitor)
    else:
        fit(model, tmp_path, monitor)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert monitor._readings == 4 and monitor._reader._top == {}
    gone = [weakref.ref(p) for p in model.parameters()]
    del model, monitor.log, monitor.log_dict  # the latter are Lightning's, and of the model
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


def test_nothing_is_done_where_nothing_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays, waits for the device and copies of batches happen at readings only."""
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("Replay", "wait_for", "cloned"):
        count(name)
    monitor = HessianMonitor(every_n_steps=5, probe_batch="current")
    found = fit(Model(mlp()), tmp_path, monitor, loader=batches(12))
    assert steps(found, LARGEST) == [4, 9]
    assert counts == {"Replay": 2, "wait_for": 4, "cloned": 2}


class Holds(pl.Callback):
    """A callback of the user's that holds the monitor, and so leads a replay to it."""

    def __init__(self, monitor: HessianMonitor) -> None:
        self.monitor = monitor


class Own(HessianMonitor):
    """A monitor of the user's."""


def test_what_a_monitor_learns_stays(tmp_path: Path) -> None:
    """A replay puts back what the step changes in callbacks, but not the monitor that runs it."""
    monitor = Own(every_n_steps=1)
    fit(Model(mlp()), tmp_path, monitor, Holds(monitor))
    assert monitor.way is not None and monitor._readings == 4
