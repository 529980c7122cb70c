"""SKAMonitor on two real processes: readings are those of one process, and nobody waits for a rank that fails."""

from __future__ import annotations

import functools

import pytest
import ska_run
from distributed_run import GLOBAL_BATCH
from hessian_run import BesideNetWhole
from two_ranks import RANKS, Launch, Results, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(ska_run.__file__, "ddp", tmp_path_factory.mktemp("ska_ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(ska_run.__file__, "fsdp", tmp_path_factory.mktemp("ska_fsdp"))


def readings(result: Results) -> dict[str, dict[str, float]]:
    return {
        tag: {str(step): value for step, value in values.items()}
        for tag, values in result["readings"].items()
        if tag.startswith("ska/")
    }


@functools.lru_cache
def one_process(beside: bool = False) -> dict[str, dict[str, float]]:
    """Readings of one process that sees the same global batches."""
    module = BesideNetWhole() if beside else None
    return readings(ska_run.watched("single", module, fit_with={"rank_batch": GLOBAL_BATCH}))


def assert_alike(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]]) -> None:
    assert found.keys() == expected.keys() and {"ska/body.first/flow", "ska/body.last/net"} <= found.keys()
    for tag, values in expected.items():
        assert found[tag].keys() == values.keys(), tag
        for step, value in values.items():
            assert found[tag][step] == pytest.approx(value, rel=1e-3, abs=1e-6), (tag, step)


def test_ddp_is_one_process(ddp: Launch) -> None:
    """Every reading is that of the ranks' samples together, the same on both ranks."""
    first, second = ddp["plain"]
    assert readings(first) == readings(second)
    assert_alike(readings(first), one_process())


def test_fsdp_is_one_process(fsdp: Launch) -> None:
    """Weights that are gathered for a probe are let go of; a parameter beside the shards is no matter."""
    for scenario, beside in (("plain", False), ("beside", True)):
        first, second = fsdp[scenario]
        assert readings(first) == readings(second)
        assert_alike(readings(first), one_process(beside))


def test_nothing_changes(ddp: Launch, fsdp: Launch) -> None:
    """Weights before every batch have the bits of a run without the monitor."""
    for both in (ddp, fsdp):
        for rank in RANKS:
            assert both["plain"][rank]["weights_before"] == both["bare"][rank]["weights_before"]
            assert both["plain"][rank]["weights"] == both["bare"][rank]["weights"]


def test_a_batch_that_is_given_is_that_of_all_ranks(ddp: Launch) -> None:
    """Twice the same samples have the means of once."""
    import torch

    alone = ska_run.watched(
        "single", fit_with={"rank_batch": GLOBAL_BATCH}, probe=[torch.ones(2, 8), torch.zeros(2, dtype=torch.long)]
    )
    assert_alike(readings(ddp["given"][0]), readings(alone))


def test_cadences_on_the_budget_agree(ddp: Launch) -> None:
    """Ranks with clocks of their own probe at the same steps."""
    first, second = ddp["budget"]
    assert first["off"] == second["off"] == {"SKAMonitor": None}
    assert readings(first) == readings(second) and "49" in readings(first)["ska/entropy"]


def test_nan_on_one_rank(ddp: Launch) -> None:
    """That layer and the network have no reading at that step, on both ranks, and go on after it."""
    first, second = ddp["nan_in_one"]
    assert first["off"] == second["off"] == {"SKAMonitor": None}
    assert readings(first) == readings(second)
    assert list(readings(first)["ska/entropy"]) == ["0", "1", "3", "4"]


def test_a_batch_that_one_rank_skips(ddp: Launch) -> None:
    """Both try the next one."""
    first, second = ddp["skips_on_one"]
    assert first["off"] == second["off"] == {"SKAMonitor": None}
    assert list(readings(first)["ska/body.first/norm"]) == ["1", "2", "3", "4"]
    assert readings(first) == readings(second)


def test_nothing_to_read(ddp: Launch) -> None:
    """Both ranks say so and go on."""
    for rank in RANKS:
        result = ddp["one_layer"][rank]
        assert "include_last=True" in result["reasons"]["ska/entropy"] and result["steps"] == 5


@pytest.mark.parametrize("place", ska_run.PLACES)
def test_a_failure_on_one_rank(ddp: Launch, place: str) -> None:
    """Nobody waits for it: the monitor goes off on both ranks at the next flush, and the run goes on."""
    first, second = ddp[f"failing_{place}"]
    assert first["off"]["SKAMonitor"] == "it failed on another rank"
    assert "made to fail" in second["off"]["SKAMonitor"] or "could not be kept" in second["off"]["SKAMonitor"]
    assert first["steps"] == second["steps"] == 5
    assert first["weights_before"] == second["weights_before"] == ddp["bare"][0]["weights_before"][:5]


@pytest.mark.parametrize("place", ["enter_later", "look"])
def test_a_failure_on_one_rank_of_shards(fsdp: Launch, place: str) -> None:
    """Where a forward pass itself is a collective."""
    first, second = fsdp[f"failing_{place}"]
    assert first["off"]["SKAMonitor"] == "it failed on another rank"
    assert second["off"]["SKAMonitor"] == "RuntimeError: made to fail"
    assert first["weights_before"] == fsdp["bare"][0]["weights_before"][:5]
