"""A killed and resumed run has the readings that it would have had."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import moe_resume_run
import pytest
import torch
from moe_resume_run import SAVED_AT, train
from runs import scalars
from torch import Tensor

TIME_LIMIT = 120  # seconds; it takes 10 on an idle core


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(is_plain, [*value.keys(), *value.values()]))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """The probe, the last choices, losses of samples, dead experts and readings that wait are in the checkpoint."""
    ended = subprocess.run(
        [sys.executable, moe_resume_run.__file__, str(tmp_path)], capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").iterdir()
    saved = torch.load(checkpoint, weights_only=True)
    (watch,) = (state for key, state in saved["callbacks"].items() if "DynWatch" in key)
    own = watch["MoEPathwayMonitor"]
    assert is_plain(own) and own["own"]["pathways"]["probe"] and own["unflushed"]
    train(tmp_path, "unbroken", killed=False)
    train(tmp_path, "resumed", killed=False, checkpoint=checkpoint)
    expected, found = scalars(tmp_path / "unbroken"), scalars(tmp_path / "resumed")
    tags = [tag for tag in expected if tag.startswith("moe/") and not tag.endswith(("/experts", "/top_k"))]
    assert {"moe/distance", "moe/memorized", "moe/layer_1/stability", "moe/layer_2/dead_experts"} <= set(tags)
    for tag in tags:
        # What waited for a flush when the checkpoint was saved is handed on after the resume.
        later = [(step, value) for step, value in expected[tag] if step >= min(8, SAVED_AT)]
        assert found[tag] == later, tag
    assert [step for step, _ in found["moe/layer_0/experts"]] != []
