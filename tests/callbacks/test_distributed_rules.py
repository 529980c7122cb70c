"""Rules on two real processes over gloo: one answer on all ranks, whatever one of them sees, logs or raises."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import distributed_rules_run
import distributed_run
import pytest
import runs
from distributed_rules_run import EXIT_CODE, LOG_EVERY, RISE_AT, Forgetful, Gated, gates, idle
from distributed_run import GLOBAL_BATCH, STEPS
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn
from two_ranks import RANKS, Launch, Results, launch

from dynwatch.callbacks import EarlyTermination
from dynwatch.callbacks.idle_parameters import IdleParameters


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(distributed_rules_run.__file__, "ddp", tmp_path_factory.mktemp("ddp"), apart=True)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch(distributed_rules_run.__file__, "fsdp", tmp_path_factory.mktemp("fsdp"), apart=True)


@pytest.fixture(params=["ddp", "fsdp"])
def either(request: pytest.FixtureRequest) -> Launch:
    result: Launch = request.getfixturevalue(request.param)
    return result


def fired(result: Results) -> list[tuple[str, str, int]]:
    """Action, rule and step of all verdicts, in order."""
    return [(action, verdict["rule"], verdict["step"]) for action, verdict in result["verdicts"]]


def recorded(launched: Launch, scenario: str) -> list[tuple[str, str, int]]:
    """The same of the records on the disk."""
    file = launched.folder / scenario / "dynwatch.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(record["action"], record["rule"], record["step"]) for record in records]


@pytest.mark.slow
def test_a_stop_by_default_rules_is_the_same_on_all_ranks(ddp: Launch) -> None:
    """A loss that rises on rank 1 alone diverges in the mean: both ranks end at one look, with one verdict."""
    first, second = ddp["diverging"]
    at = RISE_AT + 19  # the patience of Divergence
    assert first["verdict"] == second["verdict"] and first["verdicts"] == second["verdicts"]
    assert (first["verdict"]["rule"], first["verdict"]["step"]) == ("divergence", at)
    assert first["verdict"]["evidence"]["stop/loss"][-1] == [at, pytest.approx(2.0 + 0.01 * (at % 3) + 500.0)]
    assert first["steps"] == second["steps"] == (at // LOG_EVERY + 1) * LOG_EVERY
    assert (first["told"], second["told"]) == (["divergence"], [])
    assert recorded(ddp, "diverging") == fired(first)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["diverging", "conditions"])
def test_shadow_notes_the_step_at_which_a_stop_ends_the_run(ddp: Launch, scenario: str) -> None:
    """The same rules in shadow mode note the stop's rule and step on both ranks, once, and the run goes on."""
    for stopped, shadow in zip(ddp[scenario], ddp[f"{scenario}_shadow"], strict=True):
        verdict = stopped["verdict"]
        assert fired(shadow).count(("shadow", verdict["rule"], verdict["step"])) == 1
        assert shadow["verdict"] is None and shadow["told"] == [] and shadow["steps"] > stopped["steps"]
    assert recorded(ddp, f"{scenario}_shadow") == fired(ddp[f"{scenario}_shadow"][0])


@pytest.mark.slow
def test_conditions_on_logged_metrics(either: Launch) -> None:
    """A metric counts with its mean over the ranks that log it; warn, shadow and stop come once, at one step.

    At step n rank 0 logs n and rank 1 logs n + 4 as `both`; only rank 0 logs `alone`, which is n.
    """
    first, second = either["conditions"]
    assert first["verdicts"] == second["verdicts"]
    assert fired(first) == [("warn", "both_warns", 4), ("shadow", "alone_notes", 6), ("stop", "both_stops", 11)]
    assert first["verdict"]["evidence"] == {
        "both": [[step, step + 2] for step in range(12)],
        "alone": [[step, step] for step in range(12)],
    }
    assert recorded(either, "conditions") == fired(first)
    assert (first["steps"], second["steps"]) == (12, 12)
    assert (first["told"], second["told"]) == (["both_stops"], [])
    assert first["off"] == second["off"] == {"EarlyTermination": None}


@pytest.mark.slow
def test_the_validation_loss_is_the_mean_over_ranks(ddp: Launch) -> None:
    """Overfitting shows in the mean of the ranks' losses, though not on rank 0; rank 0's own metric counts alone."""
    first, second = ddp["overfitting"]
    assert first["verdicts"] == second["verdicts"]
    by_rule = {verdict["rule"]: verdict for _, verdict in first["verdicts"]}
    values = [value for _, value in by_rule["overfitting"]["evidence"]["stop/val_loss"]]
    losses = [sum(distributed_rules_run.overfitting(epoch, rank) for rank in RANKS) / 2 for epoch in range(len(values))]
    assert values == pytest.approx(losses)
    assert min(losses) == losses[2] and len(values) > 6
    alone = [value for _, value in by_rule["when_val_alone"]["evidence"]["val_alone"]]
    assert alone == pytest.approx([distributed_rules_run.overfitting(epoch, 0) for epoch in range(7)])
    assert recorded(ddp, "overfitting") == fired(first)


@pytest.mark.slow
def test_a_rule_that_raises_on_one_rank(ddp: Launch) -> None:
    """It is off there, and the run goes on to its end; what it finds on the other rank still ends both."""
    for rank, result in enumerate(ddp["breaks"]):
        assert (result["steps"], result["verdict"], result["off"]) == (STEPS, None, {"EarlyTermination": None})
        assert result["failed"] == ["breaks"] * rank
    first, second = ddp["breaks_and_stops"]
    assert first["verdict"] == second["verdict"] and (first["verdict"]["rule"], first["verdict"]["step"]) == (
        "breaks",
        5,
    )
    assert (first["steps"], second["steps"]) == (6, 6)


@pytest.mark.slow
def test_a_stop_on_the_first_rank_alone_ends_both(ddp: Launch) -> None:
    """A verdict that only rank 0 has is rank 1's verdict, too."""
    first, second = ddp["one_sided_0"]
    assert first["verdicts"] == second["verdicts"] and fired(first) == [("stop", "one_sided", 3)]
    assert (first["steps"], second["steps"], second["told"]) == (4, 4, [])


@pytest.mark.slow
def test_odd_answers_of_a_rule_do_not_part_the_ranks(ddp: Launch) -> None:
    """A rule that answers with a text on one rank is off there; a verdict that is no JSON counts all the same."""
    for rank, result in enumerate(ddp["answers_a_text"]):
        assert (result["steps"], result["off"], result["verdicts"]) == (STEPS, {"EarlyTermination": None}, [])
        assert result["failed"] == ["answers"] * rank
    for scenario, action, steps in (("unwritable", "warn", STEPS), ("unwritable_stop", "stop", 4)):
        for result in ddp[scenario]:
            assert (result["steps"], fired(result)) == (steps, [(action, "answers", 3)])
            assert result["off"] == {"EarlyTermination": None}
    assert ddp["unwritable_stop"][0]["told"] == ["answers"]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["counts_stop", "counts_warn", "counts_all"])
def test_collectives_only_where_readings_are_looked_at(ddp: Launch, scenario: str) -> None:
    """Between looks there is no collective more than without dynwatch; a look takes two, and one for a stop rule."""
    for result, bare in zip(ddp[scenario], ddp["counts_bare"], strict=True):
        counts = result["counts"]
        assert len(counts) == len(bare["counts"]) == 2 * STEPS - 1
        looks = [step for step, count in enumerate(counts) if count != bare["counts"][step]]
        assert looks == [step for step in range(2 * STEPS - 1) if (step + 1) % LOG_EVERY == 0]
        expected = {"all_reduce": 2}
        if scenario != "counts_warn":  # Lightning's decision is a barrier and an all-reduce
            expected = {"all_reduce": 3, "barrier": 1, "reduce_boolean_decision": 1}
        for step in looks:
            assert counts[step] == bare["counts"][step] | expected


@functools.lru_cache
def gated_alone() -> dict[str, Any]:
    """What one process reads on the global batches."""
    result = distributed_run.fit(gates(), "single", Gated(), rank_batch=GLOBAL_BATCH)
    return {tag: values for tag, values in result["readings"].items() if tag.startswith("activation/")}


@pytest.mark.slow
def test_dead_units_are_those_of_the_global_batch(either: Launch) -> None:
    """A unit that fires on the data of one rank alone lives; all readings on both ranks are those of one process."""
    expected = gated_alone()
    assert expected["activation/dead/gate"] == {step: float(step >= 2) / 4 for step in range(STEPS)}
    assert 0 < max(expected["activation/dead/inner.1"].values()) < 1
    for result in either["gated"]:
        found = {tag: values for tag, values in result["readings"].items() if tag.startswith("activation/")}
        assert found == {tag: {str(step): value for step, value in of.items()} for tag, of in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("detached", [False, True], ids=["forgotten", "detached"])
def test_a_backbone_that_is_never_moved(either: Launch, detached: bool) -> None:
    """One that the optimizer was not given, or that gets no gradient, is told as in one process, on both ranks."""
    stop = EarlyTermination(idle().rules)
    stop.prints = False
    distributed_run.fit([stop], "single", Forgetful(detached), rank_batch=GLOBAL_BATCH)
    expected = [[action, verdict.to_dict()] for action, verdict in stop.verdicts]
    assert fired({"verdicts": expected}) == [("warn", "dead_layers", 2)]
    assert "(backbone.0, backbone.2)" in expected[0][1]["reason"]
    scenario = "detached" if detached else "forgotten"
    for result in either[scenario]:
        assert result["verdicts"] == expected
    assert recorded(either, scenario) == fired({"verdicts": expected})


@pytest.mark.slow
def test_exit_code_on_every_rank(ddp: Launch) -> None:
    """A stop ends the process of each rank with the code that was asked for."""
    assert [result["code"] for result in ddp["exit_code"]] == [EXIT_CODE, EXIT_CODE]
    assert ddp.codes == [EXIT_CODE, EXIT_CODE], ddp.output[-6000:]


def test_parameters_that_are_exchanged_before_the_first_step() -> None:
    """FSDP2 shows other tensors after a validation pass than at a step; those of the step are the ones to move."""
    module = nn.Linear(3, 2)
    idle_parameters = IdleParameters(module)
    module.weight = nn.Parameter(module.weight.detach().clone())
    idle_parameters.moved(module.parameters())
    assert idle_parameters.share == 0


class DeepSpeedLike(SingleDeviceStrategy):
    """Counts, by its name, as a strategy that keeps gradients where nothing else can see them."""


def test_idle_parameters_cannot_be_told_without_gradients(tmp_path: Path) -> None:
    """Where gradients are out of reach no parameter is called idle."""
    stop = EarlyTermination(idle().rules)
    trainer = runs.trainer(tmp_path, [stop], strategy=DeepSpeedLike("cpu"))
    trainer.fit(runs.Classifier(), runs.data())
    assert trainer.global_step == 16 and stop.off is None
    assert stop.verdicts == []
