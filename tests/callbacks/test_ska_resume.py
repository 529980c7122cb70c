"""A killed and resumed run has the SKA readings, the characteristic times and the stop that it would have had."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ska_resume_run
import torch
from runs import scalars
from ska_resume_run import SAVED_AT, train

TIME_LIMIT = 120  # seconds; it takes 10 on an idle core


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """Bit by bit, with a probe that waited for its flush; what is saved are primitives and tensors."""
    ended = subprocess.run(
        [sys.executable, ska_resume_run.__file__, str(tmp_path)], capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    checkpoint = tmp_path / "killed" / "checkpoints" / f"step={SAVED_AT}.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if "SKAMonitor" in key)
    assert list(state["own"]["layers"]) == ["net.0", "net.2"] and state["own"]["since"]["steps"] == 1
    assert [entry["step"] for entry in state["unflushed"]] == [8]
    whole = train(tmp_path, "unbroken", killed=False)
    resumed = train(tmp_path, "resumed", killed=False, checkpoint=checkpoint)
    assert whole.verdict is not None and resumed.verdict == whole.verdict
    expected, found = scalars(tmp_path / "unbroken"), scalars(tmp_path / "resumed")
    tags = {tag for tag in expected if tag.startswith("ska/")}
    assert {"ska/net.0/flow", "ska/equilibrium", "ska/settled_time"} <= tags == {t for t in found if t[:4] == "ska/"}
    for tag in tags:
        assert found[tag] == [(step, value) for step, value in expected[tag] if step >= 8], tag
