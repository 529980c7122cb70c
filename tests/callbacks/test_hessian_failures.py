"""Readings that fail in a single process: the run goes on with the bits that it has without the monitor."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Classifier, data, scalars, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynwatch.callbacks import DynWatch, HessianMonitor, hessian
from dynwatch.callbacks.sandbox import Mute

BATCHES: list[int] = []  # numbers of the batches that CountsElsewhere has seen


def fit(folder: Path, monitor: HessianMonitor | None, model: Classifier | None = None) -> list[Tensor]:
    """Train for 16 steps on the same weights and batches; the weights at the end."""
    torch.manual_seed(0)
    model = model or Classifier()
    run = trainer(folder, [monitor] if monitor else [], max_epochs=1)
    run.fit(model, data(n=128))
    assert run.global_step == 16
    return [p.detach().clone() for p in model.parameters()]


class CountsElsewhere(Classifier):
    """Keeps account of its batches where a replay cannot put it back, and takes none twice."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        BATCHES.append(batch_idx)
        if BATCHES.count(batch_idx) > 1:
            raise ZeroDivisionError("seen before")
        return super().training_step(batch, batch_idx)


class NotANumberOnce(Classifier):
    """Has a loss of NaN at step 8, in replays only, whose batch has number 0."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.global_step == 8 and batch_idx == 0 else loss


def seeded(kind: type[Classifier]) -> Classifier:
    torch.manual_seed(0)
    return kind()


def test_a_step_that_fails_only_when_replayed(tmp_path: Path) -> None:
    """The monitor goes off with the step's error, and the weights are those of the run without it."""
    BATCHES.clear()
    monitor = HessianMonitor(every_n_steps=4)
    found = fit(tmp_path / "with", monitor, seeded(CountsElsewhere))
    assert monitor.off == "ZeroDivisionError: seen before" and monitor._readings == 1
    expected = fit(tmp_path / "without", None, seeded(Classifier))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("full_every", [1, 2, 10])
def test_a_loss_of_nan_at_one_reading(tmp_path: Path, full_every: int) -> None:
    """That reading is NaN, ordinary or full; those before and after are as without it, and so are the weights."""
    runs = {}
    for kind in (NotANumberOnce, Classifier):
        monitor = HessianMonitor(every_n_steps=2, full_every_n_readings=full_every)
        weights = fit(tmp_path / kind.__name__, monitor, seeded(kind))
        assert monitor.off is None and monitor._readings == 8
        runs[kind] = (weights, scalars(tmp_path / kind.__name__ / "run"))
    assert all(map(torch.equal, runs[NotANumberOnce][0], runs[Classifier][0]))
    found, expected = (dict(runs[kind][1]["hessian/lambda_max"]) for kind in (NotANumberOnce, Classifier))
    assert [step for step, value in found.items() if math.isnan(value)] == [7]
    for step in expected.keys() - {7}:
        assert found[step] == pytest.approx(expected[step], rel=0.2)
    assert 7 not in dict(runs[NotANumberOnce][1]["hessian/critical_lr"])


def test_differences_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary in the terminal says that products are approximate, and why."""
    monitor = HessianMonitor(every_n_steps=8, method="differences")
    trainer(tmp_path, [DynWatch(hessian=monitor)], max_epochs=1).fit(Classifier(), data(n=128))
    printed = " ".join(capsys.readouterr().out.split())
    assert "differences of gradients, approximate: asked for" in printed


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A reading that runs out of memory halves the samples, until they fit; later readings work with those."""
    tried: list[int | None] = []
    whole = hessian.choose

    def choose(replay: Any, method: Any) -> Any:
        tried.append(replay.samples)
        if replay.samples > 2:
            raise torch.OutOfMemoryError("no memory")
        return whole(replay, method)

    monkeypatch.setattr(hessian, "choose", choose)
    monitor = HessianMonitor(every_n_steps=2)
    fit(tmp_path, monitor)
    assert tried == [8, 4, 2] and monitor._allowed == 2 and monitor._readings == 8
    assert monitor._stream is not None and monitor._stream.series["hessian/lambda_max"].last > 0


def test_memory_that_is_never_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a single sample does not fit either, the monitor goes off, and the run goes on."""

    def choose(replay: Any, method: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(hessian, "choose", choose)
    monitor = HessianMonitor(every_n_steps=2)
    fit(tmp_path, monitor)
    assert monitor.off is not None and "no memory" in monitor.off


# --- batches that the step skips


class Skips(Classifier):
    """Returns None for some of the batches, in replays and in training."""

    def __init__(self, skipped: set[int]) -> None:
        super().__init__()
        self.kept = [x for i, (x, _) in enumerate(data(n=128)) if i not in skipped]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        known = any(torch.equal(batch[0], x[: len(batch[0])]) for x in self.kept)
        return super().training_step(batch, batch_idx) if known else None


def skipping(*skipped: int) -> Skips:
    torch.manual_seed(0)
    return Skips(set(skipped))


@pytest.mark.parametrize(
    ("probe", "skipped", "steps"),
    [
        ("first", [0], range(1, 16)),
        ("first", [0, 1, 2], range(3, 16)),
        ("first", [1, 7], range(16)),  # never asked again
        ("current", [0, 5, 6, 15], [1, 2, 3, 4, *range(7, 15)]),
    ],
)
def test_a_skipped_batch_is_no_reading(probe: Any, skipped: list[int], steps: Any, tmp_path: Path) -> None:
    """The next one is taken, from the next batch; the monitor stays on, and the weights are those without it."""
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=3, probe_batch=probe)
    found = fit(tmp_path / "with", monitor, skipping(*skipped))
    assert monitor.off is None and monitor.failure is None
    read = scalars(tmp_path / "with" / "run")["hessian/lambda_max"]
    assert [step for step, _ in read] == list(steps) and all(math.isfinite(value) for _, value in read)
    assert monitor._readings == len(read)
    expected = fit(tmp_path / "without", None, skipping(*skipped))
    assert all(map(torch.equal, found, expected))


def test_a_run_that_skips_all_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the summary, with the number of the batch that replays see."""
    monitor = HessianMonitor(every_n_steps=4)
    trainer(tmp_path, [DynWatch(hessian=monitor, stop=False)], max_epochs=1).fit(skipping(*range(16)), data(n=128))
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "hessian/lambda_max: not available: training_step returned None, which skips the batch, at each of 4 readings; "
        "it was given batch_idx=0." in printed
    )
    assert monitor.off is None


def test_the_cost_of_a_skipped_reading_is_no_guide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is spent, and the next one is planned with what a whole one took."""
    monkeypatch.setattr(hessian.Budget, "is_due", lambda budget, step: True)
    monitor = HessianMonitor()
    fit(tmp_path, monitor, skipping(*range(16)))
    assert monitor._skipped == 16 and monitor._budget is not None
    assert monitor._budget.costs == {} and monitor._budget.spent > 0
    budget = hessian.Budget(0.05)
    budget.spend("full", 8.0)
    budget.spend("full", 0.5, whole=False)
    assert budget.costs == {"full": 8.0} and budget.spent == 8.5


# --- what is refused, and how it is told


class Scripted(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[2] = torch.jit.script(self.net[2])


class Complex(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(4, dtype=torch.complex64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (self.phase.abs() ** 2).sum()


@pytest.mark.parametrize(
    ("kind", "off"),
    [
        (
            Scripted,
            "CannotReplayError: net.2 is compiled by TorchScript (torch.jit), where no other values can be given to "
            "its parameters (net.2.weight, net.2.bias): train the plain module, and script it after training.",
        ),
        (
            Complex,
            "CannotReplayError: complex parameters have no real Hessian here: phase. Keep their real and imaginary "
            "parts as one real parameter (torch.view_as_complex in forward), or freeze them.",
        ),
    ],
)
def test_modules_that_are_refused(
    kind: type[Classifier], off: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The error names them and what to do, the warning has one full stop after it, and the run is as without."""
    monitor = HessianMonitor(every_n_steps=4)
    found = fit(tmp_path / "with", monitor, seeded(kind))
    assert monitor.off == off
    told = [r.getMessage() for r in caplog.records if "is off for the rest" in r.getMessage()]
    assert len(told) == 1 and f"Cause: {off} If the cause is not in your model" in told[0]
    expected = fit(tmp_path / "without", None, seeded(kind))
    assert all(map(torch.equal, found, expected))


class Coordinates(Classifier):
    """Takes inputs as sparse coordinates, which cannot be cut."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0].to_dense(), batch[1]], batch_idx)


def test_a_batch_that_cannot_be_cut_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch's own message is a hundred lines; and rates by batch size are missing for this reason, not for products."""
    monitor = HessianMonitor(every_n_steps=4, full_every_n_readings=1, max_samples=4)
    loader: Any = DataLoader([[x.to_sparse(), y] for x, y in data()], batch_size=None)
    trainer(tmp_path, [DynWatch(hessian=monitor, stop=False)], max_epochs=1).fit(Coordinates(), loader)
    assert monitor.off is None
    printed = " ".join(capsys.readouterr().out.split())
    (why,) = [part.partition("; all of it is used")[0] for part in printed.split("hessian max_samples: ")[1:]]
    assert why.startswith("the batch cannot be cut (NotImplementedError: ") and len(why) < 160
    assert f"critical_lr_at_batch_size/: not available: it needs parts of the batch: {why}." in printed


def test_a_mute_logger_counts_as_nothing() -> None:
    """Whatever a step turns it into."""
    for mute in (Mute(), Mute().experiment.best_model_score, Mute()["loss"]):
        assert (float(mute), int(mute), len(mute), bool(mute), list(mute)) == (0.0, 0, 0, False, [])


# --- nets and losses that were not measured


class Words(Classifier):
    """Looks its inputs up in tables, whose gradients may be sparse."""

    def __init__(self, sparse: bool, bags: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 5, sparse=sparse)
        self.bags = nn.EmbeddingBag(8, 5, mode="sum", sparse=sparse) if bags else None
        self.net = nn.Linear(5, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words = batch[0].argsort(1)[:, :3]
        mixed = self.table(words).sum(1)
        if self.bags is not None:  # which have no second derivative
            mixed = mixed * self.bags(words)
        return nn.functional.cross_entropy(self.net(mixed.tanh()), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("method", ["exact", "differences"])
def test_tables_with_sparse_gradients(method: Any, tmp_path: Path) -> None:
    """They are read as those with dense ones, and stay sparse in training."""
    read, weights = [], []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = Words(sparse, bags=method == "differences")
        monitor = HessianMonitor(every_n_steps=2, full_every_n_readings=2, method=method)
        weights.append(fit(tmp_path / str(sparse), monitor, model))
        assert monitor.off is None and model.table.sparse is sparse
        assert model.bags is None or model.bags.sparse is sparse
        assert model.table.weight.grad is not None and model.table.weight.grad.is_sparse is sparse
        read.append(dict(scalars(tmp_path / str(sparse) / "run")["hessian/lambda_max"]))
    torch.testing.assert_close(weights[0], weights[1])
    assert len(read[0]) == 8 and read[1] == pytest.approx(read[0], rel=1e-3)


@pytest.mark.parametrize("size", [4, 8, 9, 15, 16])
def test_batch_norm_has_rates_by_batch_size(size: int, tmp_path: Path) -> None:
    """Each part of the batch has two samples at least, and so a variance."""
    model = Classifier()
    model.net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=1, batch_sizes=[32])
    trainer(tmp_path, [monitor], max_epochs=1).fit(model, data(n=2 * size, batch_size=size))
    assert monitor.off is None
    rates = scalars(tmp_path / "run")["hessian/critical_lr_at_batch_size/32"]
    assert len(rates) == 2 and all(rate > 0 for _, rate in rates)


class Shaped(Classifier):
    """A loss of the weights alone, from a given step on."""

    shape: Callable[[Tensor], Tensor]
    since = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step <= self.since:
            return super().training_step(batch, batch_idx)
        return self.shape(torch.cat([p.reshape(-1) for p in self.parameters()])).sum()


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda w: w, "domed": lambda w: -1e-3 * w**2}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_loss_without_positive_curvature_has_no_critical_rate(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither infinity nor NaN is logged, and the summary says why; the ratio is 0."""
    model = seeded(Shaped)
    model.shape = SHAPES[shape]  # type: ignore[attr-defined]
    model.since = -1  # type: ignore[attr-defined]
    monitor = HessianMonitor(every_n_steps=4, full_every_n_readings=1)
    trainer(tmp_path, [DynWatch(hessian=monitor, stop=False)], max_epochs=1).fit(model, data(n=128))
    found = scalars(tmp_path / "run")
    printed = " ".join(capsys.readouterr().out.split())
    assert monitor.off is None
    logged = {tag: [value for _, value in read] for tag, read in found.items() if tag.startswith("hessian/")}
    assert {tag: read for tag, read in logged.items() if not all(map(math.isfinite, read))} == {}
    assert logged["hessian/sharpness_ratio"] == [0.0] * 4 and max(logged["hessian/lambda_max"]) <= 0
    why = "the largest eigenvalue is not above zero, so that curvature bounds no learning rate."
    for tag in ("hessian/critical_lr", "hessian/critical_lr_at_batch_size/"):
        assert not any(name.startswith(tag) for name in logged) and f"{tag}: not available: {why}" in printed


def test_a_rate_that_there_was_stays_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the last reading has none, that is remarked, and what it was before is not hidden."""
    model = seeded(Shaped)
    model.shape, model.since = SHAPES["linear"], 8  # type: ignore[attr-defined]
    monitor = HessianMonitor(every_n_steps=4)
    trainer(tmp_path, [DynWatch(hessian=monitor, stop=False)], max_epochs=1).fit(model, data(n=128))
    printed = " ".join(capsys.readouterr().out.split())
    assert "hessian/critical_lr: none at step 15: the largest eigenvalue is not above zero" in printed
    assert "hessian/critical_lr: not available" not in printed
    read = scalars(tmp_path / "run")["hessian/critical_lr"]
    assert [step for step, _ in read] == [3, 7]


def test_dice_of_the_system_are_no_state(tmp_path: Path) -> None:
    """A module may hold a generator that cannot be put back because it has no state."""
    model = Classifier()
    model.dice = random.SystemRandom()  # type: ignore[assignment]
    monitor = HessianMonitor(every_n_steps=8)
    fit(tmp_path, monitor, model)
    assert monitor.off is None and monitor._readings == 2
