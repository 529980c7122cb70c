"""A run that was killed with SIGKILL and resumed reads, stops and says the same as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resume_run
import runs
import torch
from resume_run import ENDED, JUDGED, KILLED_AT, SCENARIOS

from dynwatch.callbacks import DynWatch
from dynwatch.rules import Verdict

TIME_LIMIT = 120  # seconds for all killed runs together; they take 15 on an idle core

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all killed runs."""
    folder = tmp_path_factory.mktemp("killed")
    ended = subprocess.run(
        [sys.executable, resume_run.__file__, str(folder)], capture_output=True, text=True, timeout=TIME_LIMIT
    )
    for name in SCENARIOS | JUDGED | ENDED:
        assert f"{name} {int(signal.SIGKILL)}\n" in ended.stdout, ended.stdout + ended.stderr
    return folder


def checkpoint(folder: Path) -> Path:
    (only,) = (folder / "killed" / "checkpoints").iterdir()
    return only


def resume(killed: Path, name: str, version: str = "resumed") -> Verdict | None:
    """Resume a killed run, unless another test has, and return its verdict."""
    verdict: Verdict | None = resume_all(killed, name, version).verdict
    return verdict


def resume_all(killed: Path, name: str, version: str = "resumed") -> DynWatch:
    folder, scenario = killed / name, (SCENARIOS | JUDGED | ENDED)[name]
    return resume_run.train(scenario, folder, version, killed=False, checkpoint=checkpoint(folder))


def readings(folder: Path) -> dict[str, dict[int, str]]:
    """All of dynwatch's readings of a run but its own cost, as text so that NaN equals NaN."""
    groups = ("grad_norm/", "update_ratio/", "stop/", "activation/")
    return {
        tag: {step: repr(value) for step, value in values}
        for tag, values in runs.scalars(folder).items()
        if tag.startswith(groups)
    }


def records(folder: Path) -> list[dict[str, Any]]:
    """The verdicts in the log folder, without the time and the place."""
    file = folder / "dynwatch.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in ("time", "pid", "last_checkpoint")} for record in found]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_reads_the_same(killed: Path, tmp_path: Path, name: str) -> None:
    """Every reading of both parts together, the verdict, its evidence and its step are those of an unbroken run."""
    expected_verdict = resume_run.train(SCENARIOS[name], tmp_path, "unbroken", killed=False).verdict
    verdict = resume(killed, name)
    expected, first = readings(tmp_path / "unbroken"), readings(killed / name / "killed")
    second = readings(killed / name / "resumed")
    assert expected["grad_norm/total"] and first["grad_norm/total"] and second["grad_norm/total"]
    for tag in first.keys() & second.keys():
        twice = first[tag].keys() & second[tag].keys()
        assert {s: first[tag][s] for s in twice} == {s: second[tag][s] for s in twice}, tag
    together = {tag: first.get(tag, {}) | second.get(tag, {}) for tag in first | second}
    assert together == expected
    assert records(killed / name / "resumed") == records(tmp_path / "unbroken")
    assert repr(verdict) == repr(expected_verdict)
    assert (verdict is None) == name.startswith(("healthy", "accumulated"))


@pytest.mark.parametrize(
    ("name", "rule", "step"),
    [("diverging_7", "divergence", 12), ("nan_7", "non_finite", 9), ("nan_7_without_looks", "non_finite", 9)],
)
def test_the_verdict_counts_what_was_unread(killed: Path, name: str, rule: str, step: int) -> None:
    """Steps that were measured before the checkpoint and read after it take part in the verdict, with their words."""
    verdict = resume(killed, name, "resumed_once_more")
    assert verdict is not None and (verdict.rule, verdict.step) == (rule, step)
    assert rule == "divergence" or "gradient of net.0.weight first" in verdict.reason


@pytest.mark.parametrize("name", ["healthy_7", "accumulated_7", "nan_7_without_looks", "nan_1_delayed"])
def test_state_is_primitives_and_tensors(killed: Path, name: str) -> None:
    """The checkpoint loads with weights_only=True, and holds the readings that were not flushed yet."""
    saved = torch.load(checkpoint(killed / name), weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if "DynWatch" in key)
    unread = {entry["step"] for entry in state["EarlyTermination"]["unflushed"]}
    assert unread == (set() if name == "nan_1_delayed" else {8, 9})
    assert (state["EarlyTermination"]["own"]["verdict"] is not None) == (name == "nan_1_delayed")


@pytest.mark.parametrize("name", ["healthy_1", "healthy_7"])
def test_readings_before_the_kill_are_on_the_disk(killed: Path, name: str) -> None:
    """Event files of a killed run are readable up to what Lightning had its loggers save.

    With a log every 2 steps that is the logging step before the last one; what came after it may be there too.
    """
    last = max(readings(killed / name / "killed")["stop/loss"])
    assert last in ({KILLED_AT - 3, KILLED_AT - 1} if name == "healthy_1" else {7})


def saved_state(killed: Path, name: str) -> dict[str, Any]:
    saved = torch.load(checkpoint(killed / name), weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if "DynWatch" in key)
    found: dict[str, Any] = state
    return found


@pytest.mark.parametrize("name", JUDGED)
def test_warnings_and_notes_after_a_resume(killed: Path, tmp_path: Path, name: str) -> None:
    """Verdicts of a killed run before its checkpoint, and of the resumed one, are those of an unbroken run."""
    expected = resume_run.train(JUDGED[name], tmp_path, "unbroken", killed=False)
    resumed = resume_all(killed, name)
    whole, first = records(tmp_path / "unbroken"), records(killed / name / "killed")
    second = records(killed / name / "resumed")
    assert second == whole[-len(second) :] and second
    assert [record for record in first if record not in second] == whole[: -len(second)]
    assert first == whole[: len(first)]  # what was told before the kill is on the disk, also right before it
    assert bool(first) == (name not in ("spike_7", "defaults"))
    assert [a for a, _ in resumed.early_termination.verdicts] == [record["action"] for record in second]
    assert repr(resumed.early_termination.verdicts) == repr(expected.early_termination.verdicts[-len(second) :])
    assert not any(monitor.off for monitor in resumed.monitors)


def test_a_verdict_right_before_the_kill_is_on_the_disk(killed: Path) -> None:
    """Killed at the start of the next batch, or within on_stop, a run leaves its verdict as a whole line."""
    assert [record["step"] for record in records(killed / "spike_1" / "killed")] == [46]
    assert (JUDGED["spike_1"].killed_at, JUDGED["spike_1"].check_every_n_steps) == (47, 1)
    (record,) = records(killed / "in_on_stop" / "killed")
    assert (record["action"], record["rule"], record["step"]) == ("stop", "divergence", 12)
    resume_all(killed, "in_on_stop")
    assert records(killed / "in_on_stop" / "resumed") == [record]


def test_looks_at_units_survive(killed: Path, tmp_path: Path) -> None:
    """Units that were silent at looks before and after a kill are found dead at the look of an unbroken run."""
    resume_run.train(JUDGED["defaults"], tmp_path, "unbroken", killed=False)
    resume_all(killed, "defaults", "resumed_for_units")
    tag = "activation/dead/net.1"
    expected = readings(tmp_path / "unbroken")[tag]
    found = readings(killed / "defaults" / "resumed_for_units")[tag]
    assert found == {step: share for step, share in expected.items() if step >= min(found)}
    assert min(found) < 49 <= max(found)  # 25 looks, every 2 steps
    dead = [step for step, share in found.items() if float(share) > 0]
    assert min(dead) == 49


def assert_plain(value: Any, where: str = "state") -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) in (str, int), where
            assert_plain(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        assert type(value) in (list, tuple), where
        for i, item in enumerate(value):
            assert_plain(item, f"{where}[{i}]")
    else:
        assert value is None or type(value) in (bool, int, float, str, torch.Tensor), f"{where} is {type(value)}"


@pytest.mark.parametrize("name", JUDGED)
def test_state_of_all_rules_is_plain(killed: Path, name: str) -> None:
    """A checkpoint with any rule's history loads with weights_only=True and holds primitives and tensors only."""
    state = saved_state(killed, name)
    assert_plain(state)
    rules = state["EarlyTermination"]["own"]["rulebook"]["rules"]
    assert rules.keys() == {rule.name for rule in JUDGED[name].rules()}
    assert all(rules.values())
    assert sum(state["ActivationMonitor"]["own"]["net.1"]["silent"]) > 0
