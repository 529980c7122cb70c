"""Mixtures of experts on two real processes: counts and pathways are those of the global batch."""

from __future__ import annotations

import functools
from typing import Any

import moe_run
import pytest
from distributed_run import GLOBAL_BATCH, Net
from moe_run import DroppingNet, MixtureNet, StackedNet
from two_ranks import RANKS, Launch, Results, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(moe_run.__file__, "ddp", tmp_path_factory.mktemp("moe_ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(moe_run.__file__, "fsdp", tmp_path_factory.mktemp("moe_fsdp"))


ALONE: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "linear": (MixtureNet, {}),
    "dispatch": (DroppingNet, {}),
    "accumulated": (MixtureNet, {"accumulate_grad_batches": 2}),
    "stacked": (StackedNet, {}),
}


@functools.lru_cache
def one_process(scenario: str) -> dict[str, dict[str, float]]:
    """Readings of one process that sees the same global batches."""
    net, settings = ALONE[scenario]
    return readings(moe_run.watched("single", net(), fit_with={"rank_batch": GLOBAL_BATCH} | settings))


def readings(result: Results) -> dict[str, dict[str, float]]:
    return {
        tag: {str(step): value for step, value in values.items()}
        for tag, values in result["readings"].items()
        if tag.startswith("moe/")
    }


@pytest.mark.parametrize("scenario", ["linear", "accumulated"])
def test_ddp_is_one_process(ddp: Launch, scenario: str) -> None:
    """Counts, pathways, losses and groups: the same on both ranks, and as one process has them."""
    first, second = ddp[scenario]
    assert first["off"] == second["off"] == {"MoEPathwayMonitor": None}
    assert readings(first) == readings(second)
    expected = one_process(scenario)
    assert readings(first).keys() == expected.keys() and "moe/distance" in expected
    for tag, values in expected.items():
        assert readings(first)[tag] == pytest.approx(values, rel=1e-4), tag


def test_a_capacity_is_of_each_rank(ddp: Launch) -> None:
    """Routers drop what does not fit on their own rank, so the load is not that of one process; shares are of both."""
    first, second = ddp["dispatch"]
    assert readings(first) == readings(second)
    assert all(0 < share < 0.6 for share in readings(first)["moe/layer_0/dropped"].values())
    assert readings(first)["moe/distance"]["2"] == pytest.approx(one_process("dispatch")["moe/distance"]["2"], rel=0.2)


def test_fsdp_is_one_process(fsdp: Launch) -> None:
    """Sharded experts and routers: the same readings, consistency too, for which routers are gathered."""
    first, second = fsdp["stacked"]
    assert first["off"] == second["off"] == {"MoEPathwayMonitor": None}
    assert readings(first) == readings(second)
    expected = one_process("stacked")
    assert readings(first).keys() == expected.keys() and "moe/consistency" in expected
    for tag, values in expected.items():
        assert readings(first)[tag] == pytest.approx(values, rel=1e-3), tag


@pytest.mark.parametrize("scenario", ["linear", "failing_count", "failing_look"])
def test_the_run_is_as_without_it(ddp: Launch, scenario: str) -> None:
    """Weights and optimizer state of both ranks have the bits of the bare run, before every batch."""
    for rank in RANKS:
        bare, watched = ddp["bare"][rank], ddp[scenario][rank]
        assert watched["weights_before"] == bare["weights_before"] and watched["weights"] == bare["weights"]


def test_sharded_weights_are_as_without_it(fsdp: Launch) -> None:
    for rank in RANKS:
        assert fsdp["stacked"][rank]["weights_before"] == fsdp["bare"][rank]["weights_before"]


def test_a_failure_on_one_rank_is_agreed(ddp: Launch) -> None:
    """Nobody waits for it: the monitor goes off on both, the other says where it failed."""
    first, second = ddp["failing_count"]
    assert first["off"]["MoEPathwayMonitor"] == "it failed on another rank"
    assert second["off"]["MoEPathwayMonitor"] == "RuntimeError: made to fail"
    assert first["steps"] == second["steps"] == ddp["bare"][0]["steps"]


def test_a_look_that_fails_on_one_rank_is_none_on_both(ddp: Launch) -> None:
    """Health goes on, and each says why there are no pathways."""
    first, second = ddp["failing_look"]
    assert first["off"] == second["off"] == {"MoEPathwayMonitor": None}
    assert first["reasons"]["moe/distance"] == "the probe could not be run on another rank"
    assert second["reasons"]["moe/distance"] == "RuntimeError('made to fail')"
    assert readings(first)["moe/layer_0/load_cv"] == readings(second)["moe/layer_0/load_cv"]
    assert set(readings(first)["moe/layer_0/load_cv"]) == {str(step) for step in range(first["steps"])}
