"""A killed and resumed run reads the curvature that it would have read.

Where the last reading found the top of the spectrum is not saved, so that the first ordinary reading after a resume
starts from the gradient: it agrees within the solver's error bar. Full readings start at random, from the same vectors.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hessian_resume_run
import numpy as np
import pytest
import torch
from hessian_resume_run import COSTS, EVERY, FULL_EVERY, KILLED_AT, SAVED_AT, SCENARIOS, train
from resume_run import ResumableBatches
from runs import Classifier, data, scalars, trainer
from torch import Tensor

from dynwatch.callbacks import HessianMonitor, hessian
from dynwatch.spectral_density import SpectralDensity

TIME_LIMIT = 120  # seconds for all killed runs together; they take 10 on an idle core
READ = ["sgd", "adam", "current"]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all killed runs."""
    folder = tmp_path_factory.mktemp("killed")
    ended = subprocess.run(
        [sys.executable, hessian_resume_run.__file__, str(folder)], capture_output=True, text=True, timeout=TIME_LIMIT
    )
    for name in SCENARIOS:
        assert f"{name} {int(signal.SIGKILL)}\n" in ended.stdout, ended.stdout + ended.stderr
    return folder


def checkpoint(killed: Path, name: str) -> Path:
    (only,) = (killed / name / "killed" / "checkpoints").iterdir()
    return only


def saved_state(killed: Path, name: str) -> dict[str, Any]:
    saved = torch.load(checkpoint(killed, name), weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if "HessianMonitor" in key)
    own: dict[str, Any] = state["own"]
    return own


def resume(killed: Path, name: str, version: str) -> HessianMonitor:
    return train(name, killed / name, version, killed=False, checkpoint=checkpoint(killed, name))


def readings(folder: Path) -> dict[str, dict[int, float]]:
    return {tag: dict(values) for tag, values in scalars(folder).items() if tag.startswith("hessian/")}


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_a_resumed_run_reads_the_same(killed: Path, tmp_path: Path, name: str) -> None:
    """At the same steps, of the same kinds; full readings the same, others within the solver's error."""
    train(name, tmp_path, "unbroken", killed=False)
    monitor = resume(killed, name, "resumed")
    expected, found = readings(tmp_path / "unbroken"), readings(killed / name / "resumed")
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert found[tag].keys() == {step for step in values if step >= SAVED_AT}, tag
    full = expected["hessian/trace"].keys() & found["hessian/trace"].keys()
    assert full and found["hessian/lambda_max"].keys() - full
    for tag in ("lambda_max", "lambda_min", "trace", "trace_error", "batch_sharpness"):
        for step in full:
            assert found[f"hessian/{tag}"][step] == expected[f"hessian/{tag}"][step], (tag, step)
    for step, value in found["hessian/lambda_max"].items():
        bars = sum(run["hessian/lambda_max_error"][step] for run in (expected, found))
        # The top vector of another batch may lead to that batch's second eigenvalue, in one of the runs only.
        assert name == "current" or abs(value - expected["hessian/lambda_max"][step]) <= bars
    for tag in ("critical_lr", "sharpness_ratio"):
        for step, value in found[f"hessian/{tag}"].items():
            assert value == pytest.approx(expected[f"hessian/{tag}"][step], rel=0.3 if name == "current" else 0.1)
    assert monitor._readings == len(expected["hessian/lambda_max"])


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_what_is_saved(killed: Path, name: str) -> None:
    """The checkpoint loads with weights_only=True; it has the count, the first batch and the densities so far."""
    state = saved_state(killed, name)
    assert state["readings"] == SAVED_AT // EVERY
    first = next(iter(data(64, 8)))
    if name == "current":
        assert state["probe"] is None
    else:
        assert all(torch.equal(saved, given) for saved, given in zip(state["probe"], first, strict=True))
    steps = [i * EVERY - 1 for i in range(1, SAVED_AT // EVERY + 1)]
    assert [density[0] for density in state["densities"]] == steps[1::FULL_EVERY]
    assert KILLED_AT > SAVED_AT


@needs_fork
@pytest.mark.slow
def test_densities_go_on(killed: Path) -> None:
    """The picture over time holds those from before the kill, number for number, and those after."""
    state = saved_state(killed, "sgd")
    monitor = resume(killed, "sgd", "resumed_for_densities")
    assert len(monitor._densities.kept) > len(state["densities"]) > 0
    for (step, density), saved in zip(monitor._densities.kept, state["densities"], strict=False):
        assert [step, density.nodes.tolist(), density.weights.tolist(), density.hvps, density.dimension] == saved


@needs_fork
@pytest.mark.slow
def test_costs_survive(killed: Path) -> None:
    """What a reading costs is known after the resume, so that it does not begin with one that it cannot afford."""
    monitor = resume(killed, "budget", "resumed")
    assert saved_state(killed, "budget")["budget"] == {"costs": COSTS}
    assert monitor._budget is not None and monitor._budget.costs == COSTS
    assert "hessian/lambda_max" not in readings(killed / "budget" / "resumed")


@needs_fork
@pytest.mark.slow
def test_a_probe_batch_of_another_kind(killed: Path) -> None:
    """A dataclass is left out of the checkpoint; the resumed run takes its own first batch and reads."""
    assert saved_state(killed, "pairs")["probe"] is None
    monitor = resume(killed, "pairs", "resumed")
    found = readings(killed / "pairs" / "resumed")["hessian/lambda_max"]
    assert min(found) >= SAVED_AT and len(found) == (EVERY * 12 - SAVED_AT) // EVERY and monitor.off is None
    third = list(data(64, 8))[SAVED_AT % 8]
    assert torch.equal(monitor._probe.x, third[0])


def test_a_probe_batch_that_is_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Above the bound it is left out of the checkpoint, at the bound it is not."""
    x, y = next(iter(data()))
    for most, kept in ((x.nbytes + y.nbytes, True), (x.nbytes + y.nbytes - 1, False)):
        monkeypatch.setattr(hessian, "MOST_SAVED_BYTES", most)
        monitor = HessianMonitor(every_n_steps=4)
        trainer(tmp_path, [monitor], logger=False, max_epochs=1).fit(Classifier(), data())
        state = monitor.state_dict()["own"]
        assert (state["probe"] is not None) == kept
        again = HessianMonitor(every_n_steps=4)
        again.load_state(state)
        assert (again._probe is not None) == kept and again._readings == 2


def test_state_round_trip(tmp_path: Path) -> None:
    """A state that was saved and loaded is the state again, also as a file with weights_only=True."""
    monitor = HessianMonitor()
    monitor._readings, monitor._allowed, monitor._batch_size = 7, 16, 64
    monitor._probe = [torch.arange(3.0), {"mask": torch.tensor([True])}]
    monitor._densities.kept = [(4, SpectralDensity(np.array([-1.0, 2.5]), np.array([0.75, 0.25]), 9, 100, "complete"))]
    assert monitor._budget is not None
    monitor._budget.spend("full", 2.5)
    torch.save(monitor.state(), tmp_path / "state.pt")
    again = HessianMonitor()
    again.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert _plain(again.state()) == _plain(monitor.state())
    assert again._budget is not None and again._budget.costs == {"full": 2.5}


def test_a_state_with_another_cadence(tmp_path: Path) -> None:
    """A state with costs loads into a monitor with an explicit cadence, and one without into one with a budget."""
    with_budget, explicit = HessianMonitor(), HessianMonitor(every_n_steps=5)
    explicit.load_state(with_budget.state())
    with_budget.load_state(explicit.state())
    assert explicit.state()["budget"] is None and with_budget.state()["budget"] == {"costs": {}}


def test_a_second_run_starts_afresh(tmp_path: Path) -> None:
    """The same callback in another run takes a new probe batch and counts readings from zero."""
    monitor = HessianMonitor(every_n_steps=4)
    trainer(tmp_path, [monitor], logger=False, max_epochs=1).fit(Classifier(), data())
    first = monitor._probe
    trainer(tmp_path, [monitor], logger=False, max_epochs=1).fit(Classifier(), ResumableBatches(list(data())[4:]))
    assert not torch.equal(monitor._probe[0], first[0])
    assert monitor._readings == 1


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
