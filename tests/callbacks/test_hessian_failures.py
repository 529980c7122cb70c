"""Readings that fail in a single process: the run goes on with the bits that it has without the monitor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Classifier, data, scalars, trainer
from torch import Tensor

from dynwatch.callbacks import DynWatch, HessianMonitor, hessian

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
