"""Two real processes over gloo: readings are those of the global batch, and no failure on one rank hangs the other."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import distributed_run
import pytest
import torch
from distributed_run import CLIP, GLOBAL_BATCH, PLACES, STEPS, Net
from two_ranks import RANKS, Launch, Results, launch


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(distributed_run.__file__, "ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(distributed_run.__file__, "fsdp", tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(params=["ddp", "fsdp"])
def either(request: pytest.FixtureRequest) -> Launch:
    result: Launch = request.getfixturevalue(request.param)
    return result


@functools.lru_cache
def one_process(norm_type: float, clip: float | None = None, accumulate: int = 1) -> dict[str, list[float]]:
    """Readings of one process that sees the same global batches."""
    result = distributed_run.fit(
        distributed_run.everything(norm_type),
        "single",
        rank_batch=GLOBAL_BATCH // accumulate,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    return comparable(result)


def comparable(result: Results) -> dict[str, list[float]]:
    """The readings in the order of steps, without those that differ by their nature."""
    groups = ("grad_norm/", "update_ratio/", "stop/")
    return {
        tag: list(values.values())
        for tag, values in result["readings"].items()
        if tag.startswith(groups) and tag != "grad_norm/noise_scale"
    }


def assert_same_readings(result: Results, expected: dict[str, list[float]]) -> None:
    found = comparable(result)
    assert found.keys() == expected.keys()
    assert {len(values) for tag, values in found.items() if tag.startswith("grad_norm")} == {STEPS}
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=1e-5, abs=1e-12), tag


@dataclass
class ByHand:
    losses: list[float]
    totals: list[float]
    noise_scale: list[float]


def by_hand(rank_batch: int, accumulate: int) -> ByHand:
    """The run in plain torch: each rank's own gradients, their mean, and the estimator of arXiv 1812.06162, A.1."""
    x, y = distributed_run.samples()
    body = copy.deepcopy(Net().body)
    parameters = list(body.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    result = ByHand([], [], [])
    signal_mean = noise_mean = 0.0
    for step in range(STEPS):
        losses, gradients, small_squares = [], [], []
        for rank in RANKS:
            for micro in range(accumulate):
                batch = [
                    rank + 2 * i
                    for i in range(
                        (step * accumulate + micro) * rank_batch, (step * accumulate + micro + 1) * rank_batch
                    )
                ]
                loss = torch.nn.functional.cross_entropy(body(x[batch]), y[batch])
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()
                losses.append(loss.item())
                gradients.append(gradient)
                if micro == 0:
                    small_squares.append(float(gradient.square().sum()))
        mean = torch.stack(gradients).mean(0)
        result.losses.append(sum(losses) / len(losses))
        result.totals.append(float(mean.norm()))
        small, big = sum(small_squares) / len(small_squares), float(mean.square().sum())
        noise = (small - big) / (1 / rank_batch - 1 / GLOBAL_BATCH)
        signal_mean += 0.05 * (big - noise / GLOBAL_BATCH - signal_mean)
        noise_mean += 0.05 * (noise - noise_mean)
        result.noise_scale.append(noise_mean / signal_mean if signal_mean > 0 and noise_mean >= 0 else math.nan)
        for p, g in zip(parameters, torch.split(mean.float(), [p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)
        optimizer.step()
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "norm_type"), [("norm_2", 2.0), ("norm_inf", math.inf), ("norm_1", 1.0)])
def test_ddp_reads_the_global_batch(ddp: Launch, scenario: str, norm_type: float) -> None:
    """Norms, layers, clipping, update ratios and the loss on every rank equal those of one process."""
    expected = one_process(norm_type, CLIP if scenario == "norm_2" else None)
    for result in ddp[scenario]:
        assert_same_readings(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "norm_type"), [("norm_2", 2.0), ("norm_inf", math.inf), ("norm_1", 1.0)])
def test_fsdp_reads_whole_tensors(fsdp: Launch, scenario: str, norm_type: float) -> None:
    """Norms of sharded gradients and updates, uneven and empty shards among them, equal those of one process."""
    expected = one_process(norm_type)
    for result in fsdp[scenario]:
        assert_same_readings(result, expected)


@pytest.mark.slow
def test_readings_are_those_of_plain_torch(ddp: Launch, fsdp: Launch) -> None:
    """Total norm and loss equal the mean over per-rank gradients and losses that autograd gives outside Lightning."""
    expected = by_hand(rank_batch=4, accumulate=1)
    for result in (*ddp["watched"], *fsdp["norm_2"]):
        found = comparable(result)
        assert found["grad_norm/total"] == pytest.approx(expected.totals, rel=1e-5)
        assert found["stop/loss"] == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.slow
def test_ddp_with_accumulation_reads_the_global_batch(ddp: Launch) -> None:
    """Micro-batches on two ranks are read as one batch, like the same micro-batches in one process."""
    for result in ddp["accumulated"]:
        assert_same_readings(result, one_process(2.0, accumulate=2))


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "rank_batch", "accumulate"), [("watched", 4, 1), ("accumulated", 2, 2)])
def test_noise_scale_under_ddp(ddp: Launch, scenario: str, rank_batch: int, accumulate: int) -> None:
    """The noise scale from ranks, or from their first micro-batches, is the paper's estimator from their gradients."""
    expected = by_hand(rank_batch, accumulate).noise_scale
    assert sum(math.isfinite(value) for value in expected) > STEPS // 2
    for result in ddp[scenario]:
        found = list(result["readings"]["grad_norm/noise_scale"].values())
        assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)


@pytest.mark.slow
def test_ranks_train_as_without_dynwatch(ddp: Launch, fsdp: Launch) -> None:
    """Weights and optimizer state on each rank have the same bits with DynWatch as without."""
    for with_it, without in ((ddp["watched"], ddp["bare"]), (fsdp["norm_2"], fsdp["bare"])):
        for rank in RANKS:
            assert with_it[rank]["weights"] == without[rank]["weights"]
            assert with_it[rank]["weights"] != with_it[rank]["weights_before"][0]


@pytest.mark.slow
def test_nan_on_one_rank_ends_both_and_spares_the_weights(either: Launch) -> None:
    """A NaN loss on rank 1 ends both ranks at its step, with weights and optimizer state as before that step."""
    for result in either["nan_each_step"]:
        assert (result["verdict"]["rule"], result["verdict"]["step"], result["steps"]) == ("non_finite", 3, 4)
        assert "All weights are finite" in result["verdict"]["reason"]
        assert result["weights"] == result["weights_before"][3] != result["weights_before"][2]


@pytest.mark.slow
def test_nan_on_one_rank_at_the_default_cadence(either: Launch) -> None:
    """Where ranks look only as often as the Trainer logs, both end at that look and name the step of the NaN."""
    for result in either["nan_default_cadence"]:
        assert (result["verdict"]["rule"], result["verdict"]["step"], result["steps"]) == ("non_finite", 3, 5)
        assert math.isnan(result["readings"]["stop/loss"]["4"])


@pytest.mark.slow
def test_a_verdict_on_one_rank_ends_both(either: Launch) -> None:
    """A rule that fires on rank 1 alone ends both with its reason, and they go on saving checkpoints together."""
    for result in either["one_sided"]:
        assert (result["verdict"]["rule"], result["verdict"]["step"], result["steps"]) == ("one_sided", 3, 4)
        assert result["verdict"]["reason"].startswith("This rank has had enough.")
    assert len(list((either.folder / "one_sided").iterdir())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_monitor_that_fails_on_one_rank(ddp: Launch, place: str) -> None:
    """It goes off on both ranks, which train on to the end as without it; the other monitor stays on."""
    for result, bare in zip(ddp[f"clumsy_gradients_{place}"], ddp["bare"], strict=True):
        assert result["off"]["ClumsyGradientNormMonitor"] and result["off"]["EarlyTermination"] is None
        assert (result["steps"], result["weights"]) == (STEPS, bare["weights"])
    assert f"clumsy in {place}" in ddp[f"clumsy_gradients_{place}"][1]["off"]["ClumsyGradientNormMonitor"]


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in PLACES if place != "after_flush"])
def test_a_stop_that_fails_on_one_rank(ddp: Launch, place: str) -> None:
    """A broken early termination goes off on both ranks and ends neither; the other monitor stays on."""
    for result, bare in zip(ddp[f"clumsy_stop_{place}"], ddp["bare"], strict=True):
        assert result["off"]["ClumsyEarlyTermination"] and result["off"]["GradientNormMonitor"] is None
        assert (result["steps"], result["weights"], result["verdict"]) == (STEPS, bare["weights"], None)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["failing_norm_4", "failing_norm_5", "failing_norm_6", "failing_copy"])
def test_local_failure_between_collectives(fsdp: Launch, scenario: str) -> None:
    """A norm or a copy that fails on rank 1 between sums over shards hangs nobody and is no reason to stop."""
    for result, bare in zip(fsdp[scenario], fsdp["bare"], strict=True):
        assert result["off"]["GradientNormMonitor"]
        assert (result["steps"], result["weights"], result["verdict"]) == (STEPS, bare["weights"], None)


@pytest.mark.slow
def test_local_failure_of_the_search_for_nan(fsdp: Launch) -> None:
    """A search for non-finite entries that fails on rank 1 switches the monitors that search off on both ranks."""
    for result in fsdp["failing_search"]:
        assert result["off"]["GradientNormMonitor"] and result["off"]["EarlyTermination"]
        assert result["steps"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("rank", RANKS)
def test_an_error_of_the_user_on_one_rank(rank: int, tmp_path: Path) -> None:
    """When training_step raises on one rank the run ends with that error instead of waiting for a collective."""
    ended = launch(distributed_run.__file__, f"raising_{rank}", tmp_path)
    assert ended.code not in (None, 0), ended.output[-6000:]
    assert f"the user's own error on rank {rank}" in ended.output
    assert not list(tmp_path.glob("*.json"))
