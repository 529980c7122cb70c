"""How much memory readings take it that they may use."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import runs
import torch

from dynwatch.callbacks import HessianMonitor, curvature_reading
from dynwatch.callbacks.memory import _available, _left, free_memory


def test_memory_of_the_machine(tmp_path: Path) -> None:
    """MemAvailable in bytes; infinity where it is not told."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:   25 kB\n")
    assert _available(meminfo) == 25 * 1024
    meminfo.write_text("MemTotal:  100 kB\n")
    assert _available(meminfo) == _available(tmp_path / "none") == math.inf
    assert free_memory(torch.device("cpu")) > 0


def test_memory_of_a_container(tmp_path: Path) -> None:
    """The limit less what is used, of the first control group that has one; infinity for "max"."""
    for name, text in {"limit": "1000\n", "used": "300\n", "none": "max\n"}.items():
        (tmp_path / name).write_text(text)
    limit, used, none = (str(tmp_path / name) for name in ("limit", "used", "none"))
    assert _left([(none, used), (limit, used)]) == 700
    assert _left([(none, used)]) == _left([("nowhere", used)]) == math.inf


@pytest.mark.parametrize(
    ("vectors", "seen", "unseen"),
    [
        (40, "hessian/lambda_min", "nothing"),
        (8, "hessian/lambda_max", "hessian/lambda_min"),
        (2, "train_loss", "hessian/lambda_max"),
    ],
    ids=["enough", "short", "too_short"],
)
def test_readings_keep_to_the_memory(
    vectors: int, seen: str, unseen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too little for a spectrum only the upper end is read, with less nothing; the run goes on and says why."""
    model = runs.Classifier()
    size = sum(p.numel() for p in model.parameters())
    room = 2 * 4 * size * (curvature_reading._OTHER_VECTORS + vectors)
    monkeypatch.setattr(curvature_reading, "free_memory", lambda device: float(room))
    monitor = HessianMonitor(every_n_steps=4, full_every_n_readings=1)
    fit = runs.trainer(tmp_path, [monitor])
    fit.fit(model, runs.data())
    logged = runs.scalars(tmp_path / "run")
    assert monitor.off is None and fit.global_step == 16
    assert seen in logged and unseen not in logged
    if "hessian/hvps" in logged:
        assert max(value for _, value in logged["hessian/hvps"]) <= vectors + 11
