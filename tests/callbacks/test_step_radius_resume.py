"""A killed and resumed run reads and caps the steps that it would have, and ends with the same weights."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import step_radius_resume_run
import torch
from runs import scalars
from step_radius_resume_run import JUMPS, SAVED_AT, train

TIME_LIMIT = 120  # seconds; it takes 10 on an idle core


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """A checkpoint lies between two capped steps: readings, caps and weights are those of one run, bit by bit.

    The learning rate of the last step before the kill is known after it, so that the jump right after it is seen.
    """
    ended = subprocess.run(
        [sys.executable, step_radius_resume_run.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").iterdir()
    saved = torch.load(checkpoint, weights_only=True)
    (own,) = (state["own"] for key, state in saved["callbacks"].items() if "Controller" in key)
    assert own["capped_steps"] == 1 and own["rates"] == {"0": [0.1]} and own["way"][0] == "forward"
    whole = train(tmp_path, "unbroken", killed=False)
    resumed = train(tmp_path, "resumed", killed=False, checkpoint=checkpoint)
    assert resumed.capped_steps == whole.capped_steps >= len(JUMPS)
    expected, found = scalars(tmp_path / "unbroken"), scalars(tmp_path / "resumed")
    for tag in ("step_radius/r", "step_radius/rho", "step_radius/scale", "step_radius/actual_loss"):
        assert found[tag] == [(step, value) for step, value in expected[tag] if step >= SAVED_AT], tag
    assert [step for step, _ in expected["step_radius/scale"]][: len(JUMPS)] == list(JUMPS)
    ends = [
        torch.load(max((tmp_path / version / "checkpoints").iterdir()), weights_only=True)["state_dict"]
        for version in ("unbroken", "resumed")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
