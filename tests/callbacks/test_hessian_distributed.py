"""Curvature on two real processes: readings are those of the global batch, and no failure on one rank hangs the other.

A rank that fails within the training step itself is rescued under DDP only: FSDP2 has collectives within the step.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import hessian_run
import pytest
from distributed_run import GLOBAL_BATCH, Net
from hessian_run import FAILURES, SOME_STEPS, AdamNet, BesideNetWhole, UnevenNet
from two_ranks import RANKS, Launch, Results, launch

pytestmark = pytest.mark.slow

AT_BATCH_SIZE = "hessian/critical_lr_at_batch_size/"
ORDINARY = {
    *("lambda_max", "lambda_max_error", "bounds/lambda_max_lower", "bounds/lambda_max_upper", "batch_sharpness"),
    *("critical_lr", "sharpness_ratio", "hvps"),
}
FULL = {
    *("lambda_min", "lambda_min_error", "trace", "trace_error", "learned_lr", "learned_momentum"),
    *(f"critical_lr_at_batch_size/{size}" for size in (4, 8, 16, 32)),
}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(hessian_run.__file__, "ddp", tmp_path_factory.mktemp("hessian_ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(hessian_run.__file__, "fsdp", tmp_path_factory.mktemp("hessian_fsdp"))


# By the name of the scenario: the net, and the arguments of the monitor.
ALONE: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "sgd": (Net, {}),
    "adam": (AdamNet, {}),
    "uneven": (UnevenNet, {"probe_batch": "current", "max_samples": None}),
    "differences": (Net, {"method": "differences", "fit_with": SOME_STEPS}),
    "smooth": (Net, hessian_run.SHARDED),
    "sharded_adam": (AdamNet, hessian_run.SHARDED),
    "beside": (BesideNetWhole, hessian_run.SHARDED),
}


@functools.lru_cache
def one_process(scenario: str) -> dict[str, dict[str, float]]:
    """Readings of one process that sees the same global batches."""
    net, arguments = ALONE[scenario]
    fit_with = {"rank_batch": GLOBAL_BATCH, **arguments.get("fit_with", {})}
    return readings(hessian_run.watched("single", net(), **(arguments | {"fit_with": fit_with})))


def readings(result: Results) -> dict[str, dict[str, float]]:
    """Those of curvature, with steps as text, as in JSON."""
    return {
        tag: {str(step): value for step, value in values.items()}
        for tag, values in result["readings"].items()
        if tag.startswith("hessian/")
    }


def tags(result: Results) -> set[str]:
    return {tag.removeprefix("hessian/") for tag in readings(result)}


@pytest.mark.parametrize(
    ("scenario", "expected_tags"),
    [
        ("sgd", ORDINARY | FULL),
        ("adam", ORDINARY | FULL | {"preconditioned_lambda_max"}),
        ("uneven", ORDINARY | FULL),
        ("differences", ORDINARY | {tag for tag in FULL if not tag.startswith("critical_lr_at")}),
    ],
)
def test_ddp_reads_the_global_batch(ddp: Launch, scenario: str, expected_tags: set[str]) -> None:
    """Every reading on both ranks is that of one process with the global batch, also where ranks' batches differ."""
    expected = one_process(scenario)
    for result in ddp[scenario]:
        found = readings(result)
        assert tags(result) == expected_tags
        assert found.keys() == expected.keys()
        for tag, values in expected.items():
            assert found[tag].keys() == values.keys()
            # Error bars are differences of near numbers. Chunks are of other samples than in one process, and few
            # tell the spread between samples roughly; that ranks pool theirs is in test_batch_size.py.
            loose = 0.05 if tag.endswith("_error") or scenario == "differences" else 1e-4
            if tag.startswith(AT_BATCH_SIZE):
                loose = 0.6
            assert list(found[tag].values()) == pytest.approx(list(values.values()), rel=loose, abs=1e-9), tag


def test_chunks_matter_to_the_rate_by_batch_size(ddp: Launch) -> None:
    """The noise of small batches allows less."""
    found = readings(ddp["sgd"][0])
    for step in found["hessian/trace"]:
        rates = [found[f"{AT_BATCH_SIZE}{size}"][step] for size in (4, 8, 16, 32)]
        assert rates == sorted(rates) and rates[0] < 0.95 * rates[1]


def test_a_cut_batch_on_each_rank(ddp: Launch) -> None:
    """`max_samples` counts on each rank: the readings are of other samples, and fewer."""
    first, second = map(readings, ddp["cut"])
    assert first == second
    assert abs(first["hessian/lambda_max"]["3"] / readings(ddp["sgd"][0])["hessian/lambda_max"]["3"] - 1) > 1e-3


@pytest.mark.parametrize("scenario", ["sgd", "adam", "uneven", "cut", "differences"])
def test_ranks_agree(ddp: Launch, scenario: str) -> None:
    """Both ranks have the very same readings."""
    first, second = ddp[scenario]
    assert readings(first) == readings(second) != {}


def test_ranks_train_as_without(ddp: Launch, fsdp: Launch) -> None:
    """Weights and optimizer state on each rank have the same bits with readings as without."""
    for rank in RANKS:
        for launched, scenario, bare in (
            (ddp, "sgd", "bare"),
            (ddp, "adam", "bare_adam"),
            (ddp, "nan_in_one", "bare"),
            (ddp, "cut", "bare_some"),
            (fsdp, "smooth", "bare"),
        ):
            with_it, without = launched[scenario][rank], launched[bare][rank]
            assert with_it["weights"] == without["weights"] != with_it["weights_before"][0], scenario
            assert with_it["weights_before"] == without["weights_before"]


def test_a_loss_of_nan_on_one_rank(ddp: Launch) -> None:
    """The reading of that step is NaN on both ranks; the others are those of the run without it."""
    expected = readings(ddp["sgd"][0])["hessian/lambda_max"]
    for result in ddp["nan_in_one"]:
        found = readings(result)["hessian/lambda_max"]
        assert result["off"]["HessianMonitor"] is None
        assert [step for step, value in found.items() if math.isnan(value)] == ["1"]
        for step in found.keys() - {"1"}:
            assert found[step] == pytest.approx(expected[step], rel=1e-3)


# --- failures on one rank


def test_a_skipped_batch_on_one_rank(ddp: Launch) -> None:
    """There is no reading on either rank at that step, nobody goes off or waits, and both train on as without it."""
    both = ddp["none_in_one"]
    assert json.dumps(readings(both[0])) == json.dumps(readings(both[1]))
    for result, without in zip(both, ddp["bare"], strict=True):
        assert result["off"]["HessianMonitor"] is None
        assert (result["weights"], result["steps"]) == (without["weights"], without["steps"])
        found = readings(result)["hessian/lambda_max"]
        assert [int(step) for step in found] == [0, *range(2, len(found) + 1)]
        assert all(map(math.isfinite, found.values())) and result["taken"] == len(found) == result["steps"] - 1


def kind(value: float | None) -> str:
    return "none" if value is None else "nan" if math.isnan(value) else "number"


@pytest.mark.parametrize(
    ("place", "rank"), [(place, rank) for place, error, rank in FAILURES if error == "error" and place != "chunks"]
)
def test_a_failure_on_one_rank(ddp: Launch, place: str, rank: int) -> None:
    """It hangs nobody: the monitor goes off on both at the next flush, and both train on as without it."""
    both, bare = ddp[f"{place}_error_{rank}"], ddp["bare_some"]
    assert both[rank]["off"]["HessianMonitor"] == "RuntimeError: made to fail"
    assert both[1 - rank]["off"]["HessianMonitor"] == "it failed on another rank"
    for result, without in zip(both, bare, strict=True):
        assert result["weights"] == without["weights"]
        assert result["taken"] == 4  # it took part until the flush, which is after the fourth


@pytest.mark.parametrize("rank", RANKS)
def test_parts_of_the_batch_that_fail_on_one_rank(ddp: Launch, rank: int) -> None:
    """The rates by batch size are left out on both ranks until they work again; all else is as without the failure."""
    both = ddp[f"chunks_error_{rank}"]
    assert json.dumps(readings(both[0])) == json.dumps(readings(both[1]))
    for result, without in zip(both, ddp["bare_some"], strict=True):
        found = readings(result)
        assert result["off"]["HessianMonitor"] is None
        assert result["weights"] == without["weights"]
        assert found["hessian/lambda_max"].keys() == found["hessian/critical_lr"].keys() == {"0", "1", "2", "3"}
        assert found[f"{AT_BATCH_SIZE}8"].keys() == {"1", "2", "3"}


@pytest.mark.parametrize("place", [place for place, error, _ in FAILURES if error == "memory"])
def test_memory_runs_out_on_one_rank(ddp: Launch, place: str) -> None:
    """That rank goes on with half its samples, and later readings are of what the ranks then have."""
    both, bare = ddp[f"{place}_memory_1"], ddp["bare_some"]
    assert [result["allowed"] for result in both] == [4, 2]
    assert json.dumps(readings(both[0])) == json.dumps(readings(both[1]))
    for result, without in zip(both, bare, strict=True):
        assert result["off"]["HessianMonitor"] is None
        assert result["weights"] == without["weights"]
        found = readings(result)["hessian/lambda_max"]
        assert all(math.isfinite(found[step]) for step in ("1", "2", "3"))
        # In the product, one that was lost; in chunks, one that has its main value; else none was begun.
        assert kind(found.get("0")) == {"product": "nan", "chunks": "number"}.get(place, "none")
    assert "the next ones use max_samples=2" in ddp.output


@pytest.mark.parametrize("rank", RANKS)
def test_an_optimizer_that_one_rank_cannot_judge(ddp: Launch, rank: int) -> None:
    """Eigenvalues stay; both ranks leave the critical rate out, and both say why."""
    both = ddp[f"stability_unsupported_{rank}"]
    assert both[rank]["reasons"]["hessian/critical_lr"] == "made to fail"
    assert "another rank" in both[1 - rank]["reasons"]["hessian/critical_lr"]
    for result in both:
        assert result["off"]["HessianMonitor"] is None
        assert {"lambda_max", "trace"} <= tags(result)
        assert not {"critical_lr", "sharpness_ratio"} & tags(result)


def test_a_step_that_fails_when_replayed_on_one_rank(ddp: Launch) -> None:
    """The monitor goes off on both ranks, with the step's error on that one, and both train on as without it."""
    first, second = ddp["raises_when_replayed"]
    assert first["off"]["HessianMonitor"] == "it failed on another rank"
    assert second["off"]["HessianMonitor"] == "ZeroDivisionError: called once too often"
    for result, without in zip((first, second), ddp["bare"], strict=True):
        assert (result["weights"], result["steps"]) == (without["weights"], without["steps"])


# --- FSDP2


@pytest.mark.parametrize("scenario", ["smooth", "sharded_adam", "beside"])
def test_fsdp_reads_the_global_batch(fsdp: Launch, scenario: str) -> None:
    """By differences over shards, uneven and empty ones and whole parameters beside them: within a per cent."""
    expected = one_process(scenario)
    first, second = fsdp[scenario]
    assert readings(first) == readings(second)
    found = readings(first)
    assert expected.keys() - found.keys() == {tag for tag in expected if tag.startswith(AT_BATCH_SIZE)}
    for name in ("lambda_max", "batch_sharpness", "critical_lr", "sharpness_ratio", "preconditioned_lambda_max"):
        tag = f"hessian/{name}"
        assert (tag in found) == (tag in expected) == (name != "preconditioned_lambda_max" or scenario != "smooth")
        assert list(found.get(tag, {}).values()) == pytest.approx(list(expected.get(tag, {}).values()), rel=1e-2), tag
    smallest = expected["hessian/lambda_min"]
    assert found["hessian/lambda_min"] == pytest.approx(smallest, rel=0.02)
    for step, trace in expected["hessian/trace"].items():
        error = found["hessian/trace_error"][step] + expected["hessian/trace_error"][step]
        assert abs(found["hessian/trace"][step] - trace) < 4 * error


def test_fsdp_is_marked_approximate(fsdp: Launch) -> None:
    """The monitor, the report's remarks and the log say that differences were used, and why."""
    for result in fsdp["smooth"]:
        assert (result["method"], result["why"]) == ("differences", "parameters are spread over ranks (FSDP2)")
        assert any("differences of gradients, approximate" in remark for remark in result["remarks"].values())
        assert AT_BATCH_SIZE in result["reasons"]
    assert "differences of gradients, which are approximate" in fsdp.output


def test_smallest_eigenvalue_is_refused_at_kinks(fsdp: Launch) -> None:
    """Of a net with ReLU differences give no smallest eigenvalue, and the reason names the function."""
    for result in fsdp["kinked"]:
        assert {"lambda_max", "trace"} <= tags(result) and not {"lambda_min", "lambda_min_error"} & tags(result)
        assert "Relu" in result["reasons"]["hessian/lambda_min"]


def test_exact_products_are_refused_under_fsdp(fsdp: Launch) -> None:
    """method="exact" switches the monitor off with the remedy, and training goes on."""
    for result, without in zip(fsdp["exact"], fsdp["bare"], strict=True):
        assert "use 'auto'" in result["off"]["HessianMonitor"]
        assert result["weights"] == without["weights"]


@pytest.mark.parametrize("place", ["enter", "stability"])
def test_a_failure_on_one_rank_under_fsdp(fsdp: Launch, place: str) -> None:
    """Outside of the training step a failure on one rank hangs nobody, and the monitor goes off on both."""
    first, second = fsdp[f"{place}_error_1"]
    assert first["off"]["HessianMonitor"] == "it failed on another rank"
    assert second["off"]["HessianMonitor"] == "RuntimeError: made to fail"
    for result, without in zip((first, second), fsdp["bare"], strict=True):
        assert result["weights"] == without["weights"]
