"""The step radius on two real processes: readings are those of the global batch, capped steps are the same."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import step_radius_run
from distributed_run import GLOBAL_BATCH, Net
from hessian_run import AdamNet, BesideNetWhole
from step_radius_run import R_MAX, ManualNet, of_batch
from two_ranks import RANKS, Launch, Results, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(step_radius_run.__file__, "ddp", tmp_path_factory.mktemp("step_radius_ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(step_radius_run.__file__, "fsdp", tmp_path_factory.mktemp("step_radius_fsdp"))


ALONE: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "sgd": (Net, {}),
    "adam": (AdamNet, {"b2": True}),
    "differences": (Net, {}),
    "manual": (ManualNet, {"logits": of_batch}),
    "beside": (BesideNetWhole, {}),
}


@functools.lru_cache
def one_process(scenario: str) -> dict[str, dict[str, float]]:
    """Readings of one process that sees the same global batches."""
    net, arguments = ALONE[scenario]
    return readings(step_radius_run.watched("single", net(), fit_with={"rank_batch": GLOBAL_BATCH}, **arguments))


def readings(result: Results) -> dict[str, dict[str, float]]:
    return {
        tag: {str(step): value for step, value in values.items()}
        for tag, values in result["readings"].items()
        if tag.startswith("step_radius/")
    }


def assert_alike(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]], rel: float) -> None:
    assert found.keys() == expected.keys() and "step_radius/r" in found
    for tag, values in expected.items():
        assert found[tag].keys() == values.keys(), tag
        # A change of the loss is a difference of two losses of about 1.
        around = 1e-5 if tag.endswith("loss") else 0.0
        for step, value in values.items():
            assert found[tag][step] == pytest.approx(value, rel=rel, abs=around), (tag, step)


@pytest.mark.parametrize("scenario", ["sgd", "adam", "manual"])
def test_ddp_is_one_process(ddp: Launch, scenario: str) -> None:
    """Every reading is that of the global batch, the same on both ranks."""
    first, second = ddp[scenario]
    assert readings(first) == readings(second)
    assert_alike(readings(first), one_process(scenario), 1e-4)


def test_differences_under_ddp(ddp: Launch) -> None:
    """The approximate way gives the same to a thousandth."""
    first, _ = ddp["differences"]
    assert first["way"][0] == "differences"
    assert_alike(readings(first), one_process("differences"), 1e-3)


@pytest.mark.parametrize("scenario", ["sgd", "adam", "beside"])
def test_fsdp_is_one_process(fsdp: Launch, scenario: str) -> None:
    """Sharded weights are moved in place; readings are those of one process to a thousandth, and say how."""
    first, second = fsdp[scenario]
    assert readings(first) == readings(second)
    assert first["way"][:2] == ["differences", "parameters are spread over ranks (FSDP2)"]
    assert_alike(readings(first), one_process(scenario), 1e-3)


def test_nothing_changes(ddp: Launch, fsdp: Launch) -> None:
    """Weights before every batch, and optimizer state at the end, have the bits of a run without the monitor."""
    for both, scenarios in ((ddp, ("sgd", "differences", "inf")), (fsdp, ("sgd", "inf"))):
        for name in scenarios:
            for rank in RANKS:
                assert both[name][rank]["weights_before"] == both["bare"][rank]["weights_before"], (name, rank)
                assert both[name][rank]["weights"] == both["bare"][rank]["weights"], (name, rank)


def test_a_controller_caps_alike(ddp: Launch, fsdp: Launch) -> None:
    """Both ranks cap the same steps, to the same length; under DDP to the same weights."""
    for both in (ddp, fsdp):
        first, second = both["controlled"]
        assert first["capped"] == second["capped"] > 3
        assert readings(first) == readings(second)
        for step, wanted in readings(first)["step_radius/wanted_r"].items():
            found = readings(first)["step_radius/r"][step]
            assert found == pytest.approx(min(wanted, R_MAX), rel=2e-3)
    assert ddp["controlled"][0]["weights_before"] == ddp["controlled"][1]["weights_before"]
    assert ddp["controlled"][0]["weights"] != ddp["bare"][0]["weights"]


def test_nan_on_one_rank(ddp: Launch) -> None:
    """It is NaN for all at that step, caps nothing there, and the next step is read again."""
    for name in ("nan_in_one", "nan_controlled"):
        first, second = ddp[name]
        assert first["off"] == second["off"] and set(first["off"].values()) == {None}
    values = readings(ddp["nan_in_one"][0])["step_radius/r"]
    assert math.isfinite(values["1"]) and math.isnan(values["2"])


def test_no_cross_entropy(ddp: Launch) -> None:
    """On all ranks or on one: the monitor goes off on both, with the reason, and the run goes on."""
    for rank in RANKS:
        assert "computes no cross_entropy" in ddp["flat"][rank]["off"]["StepRadiusMonitor"]
        assert ddp["flat"][rank]["steps"] == ddp["flat_on_one"][rank]["steps"] == 4
    first, second = ddp["flat_on_one"]
    assert first["off"]["StepRadiusMonitor"] == "it failed on another rank"
    assert "computes no cross_entropy" in second["off"]["StepRadiusMonitor"]


@pytest.mark.parametrize("scenario", ["failing", "failing_choice", "failing_control"])
def test_a_failure_on_one_rank(ddp: Launch, scenario: str) -> None:
    """Nobody waits for it: what failed goes off on both ranks at the next flush, and the run goes on."""
    name = "StepRadiusController" if scenario == "failing_control" else "StepRadiusMonitor"
    first, second = ddp[scenario]
    assert first["off"][name] == "it failed on another rank"
    assert second["off"][name] == "RuntimeError: made to fail"
    assert first["weights_before"] == second["weights_before"]


def test_what_needs_whole_weights(fsdp: Launch) -> None:
    """Forward mode that was asked for is refused under FSDP2, in words that help."""
    assert "use 'auto'" in fsdp["forward"][0]["off"]["StepRadiusMonitor"]
