"""What is done about a verdict: stop, warn, shadow or off, rule by rule, on real runs."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from runs import Classifier, data, scalars, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dynwatch.callbacks import DynWatch, EarlyTermination
from dynwatch.rules import NonFinite, Rule, Verdict, default_rules


class FiresFrom(Rule):
    """Objects to every loss from a given step on."""

    def __init__(self, name: str, step: int, action: Any = "stop") -> None:
        self.name, self.step, self.action = name, step, action

    def update(self, step: int, readings: Any, notes: Any) -> Verdict | None:
        if step < self.step or "stop/loss" not in readings:
            return None
        return self.verdict(step, f"{self.name} objects.", f"Ask {self.name}.")


class Raises(Rule):
    """Raises at every step from the fourth on, and counts how often it was asked."""

    name = "clumsy"

    def __init__(self) -> None:
        self.asked = 0

    def update(self, step: int, readings: Any, notes: Any) -> Verdict | None:
        self.asked += 1
        if step >= 3:
            raise ZeroDivisionError("by hand")
        return None


class Gradients(pl.Callback):
    """Keeps, after every update, what is left in p.grad."""

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seen += [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]


def fit(folder: Path, *callbacks: Any, bad_at: int | None = None, **settings: Any) -> tuple[pl.Trainer, Classifier]:
    """Train the same small network for 16 steps in two epochs; with `bad_at` its loss is NaN from there on."""
    torch.manual_seed(2)
    model, run = Classifier(bad_at=bad_at), trainer(folder, list(callbacks), **settings)
    run.fit(model, data())
    return run, model


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "dynwatch.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def same_weights(a: Classifier, b: Classifier) -> bool:
    return all(same_bits(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- a warning


@pytest.mark.parametrize("action", ["warn", "shadow"])
def test_the_run_goes_on_with_the_same_bits(action: str, tmp_path: Path) -> None:
    """A rule that warns, or fires in shadow mode, changes neither the length of the run nor a weight."""
    stop = EarlyTermination(rules=[FiresFrom("fussy", 3, action)], cooldown=2)
    _, bare = fit(tmp_path / "bare")
    run, model = fit(tmp_path / "watched", stop)
    assert run.global_step == 16 and not run.should_stop
    assert same_weights(bare, model)
    assert stop.verdict is None
    assert [(kind, verdict.step) for kind, verdict in stop.verdicts] == [(action, step) for step in range(3, 16, 2)]


@pytest.mark.parametrize(
    ("action", "severity", "level", "what"),
    [
        ("warn", "warn", logging.WARNING, "warns"),
        ("shadow", "stop", logging.INFO, "would have ended this run (shadow)"),
    ],
)
def test_it_is_written_everywhere(
    action: str, severity: str, level: int, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """JSON line, scalar at its step, callback_metrics, TensorBoard text, and the log at its level: once each."""
    with caplog.at_level(logging.INFO, "dynwatch"):
        run, _ = fit(tmp_path, EarlyTermination(rules=[FiresFrom("fussy", 3, action)]))
    (record,) = records(tmp_path)
    expected = {"action": action, "rule": "fussy", "step": 3, "severity": severity, "epoch": 0}
    assert {key: record[key] for key in expected} == expected
    assert record["reason"] == "fussy objects. Learning rate: 0.1."
    assert not {"stopped_after_step", "update_discarded_at_step", "last_checkpoint"} & record.keys()
    assert scalars(tmp_path / "run")["stop/fussy"] == [(3, 3.0)]
    assert run.callback_metrics["stop/fussy"].item() == 3
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    (text,) = events.Tensors("stop/verdict/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    assert written == f"**fussy** at step 3: dynwatch {what}\n\n{record['reason']}\n\nAsk fussy."
    (entry,) = [r for r in caplog.records if r.name == "dynwatch"]
    assert entry.levelno == level
    assert entry.getMessage() == f"dynwatch {what} (fussy): {record['reason']} Ask fussy."


def test_a_verdict_between_two_logged_steps_has_its_scalar(tmp_path: Path) -> None:
    """Where the Trainer logs every fifth step, a warning's scalar and loss stand at the step of the warning."""
    fit(tmp_path, EarlyTermination(rules=[FiresFrom("fussy", 6, "warn")]), log_every_n_steps=5)
    events = scalars(tmp_path / "run")
    assert events["stop/fussy"] == [(6, 6.0)]
    assert [step for step, _ in events["stop/loss"]] == [4, 6, 9, 14]


@pytest.mark.parametrize(("cooldown", "steps"), [(0, range(2, 16)), (1, range(2, 16)), (4, range(2, 16, 4))])
def test_cooldown(cooldown: int, steps: range, tmp_path: Path) -> None:
    """A rule that objects at every step is recorded every `cooldown` steps, in the file and in TensorBoard."""
    fit(tmp_path, EarlyTermination(rules=[FiresFrom("fussy", 2, "warn")], cooldown=cooldown))
    assert [record["step"] for record in records(tmp_path)] == list(steps)
    assert [step for step, _ in scalars(tmp_path / "run")["stop/fussy"]] == list(steps)


def test_cooldowns_do_not_mix(tmp_path: Path) -> None:
    """Each rule has a cooldown of its own, also where looks are several steps apart."""
    rules: list[Rule] = [FiresFrom("early", 1, "warn"), FiresFrom("late", 4, "shadow")]
    fit(tmp_path, EarlyTermination(rules=rules, cooldown=6, check_every_n_steps=5))
    found = [(record["rule"], record["step"]) for record in records(tmp_path)]
    assert found == [("early", 1), ("late", 4), ("early", 7), ("late", 10), ("early", 13)]


# --- the terminal


def panels(printed: str) -> list[str]:
    """Titles of the panels, in their order."""
    return re.findall(r"╭─+ (dynwatch .*?) ─+╮", printed)


def test_one_panel_for_each_rule_at_the_end_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings in the order of their first step, each once with its count, and the stop last."""
    rules: list[Rule] = [
        FiresFrom("third", 9, "stop"),
        FiresFrom("second", 4, "shadow"),
        FiresFrom("first", 2, "warn"),
    ]
    printed_in_run: list[str] = []

    class Look(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            printed_in_run.append(capsys.readouterr().out)

    fit(tmp_path, EarlyTermination(rules=rules, cooldown=3), Look())
    printed = capsys.readouterr().out
    assert printed_in_run == [""]
    assert panels(printed) == [
        "dynwatch warned: first",
        "dynwatch would have ended this run (shadow): second",
        "dynwatch ended this run: third",
    ]
    assert "So 3 times in this run." in printed and "So 2 times in this run." in printed
    assert printed.count("No checkpoint was saved before the stop.") == 1


def test_the_summary_of_dynwatch_names_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each action, with rules and first steps; no row in the table for the step of a verdict."""
    rules: list[Rule] = [FiresFrom("a", 2, "warn"), FiresFrom("b", 4, "warn"), FiresFrom("c", 5, "shadow")]
    fit(tmp_path, DynWatch(stop=EarlyTermination(rules=rules, cooldown=3)))
    printed = capsys.readouterr().out
    assert "Verdict: warned by a at step 2, b at step 4." in printed
    assert "Verdict: would have been stopped (shadow) by c at step 5." in printed
    assert not re.search(r"^ *stop/[abc]\b", printed, re.MULTILINE)


# --- which action is taken


def test_one_word_for_all_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """actions="shadow" lets a run of NaN losses go on to its end, says so at level INFO, and leaves no other trace."""
    with caplog.at_level(logging.INFO, "dynwatch"):
        run, model = fit(tmp_path, stop := EarlyTermination(actions="shadow"), bad_at=5)
    assert run.global_step == 16 and stop.verdict is None
    assert [(r["action"], r["rule"], r["step"]) for r in records(tmp_path)][:1] == [("shadow", "non_finite", 5)]
    assert {r.levelno for r in caplog.records if r.name == "dynwatch"} == {logging.INFO}
    assert all(p.isnan().all() for p in model.net[2].parameters())


def test_off_leaves_rules_out(tmp_path: Path) -> None:
    """actions="off" asks no rule at all, and the loss is still logged."""
    run, _ = fit(tmp_path, stop := EarlyTermination(actions="off"), bad_at=5)
    assert run.global_step == 16 and stop.rules == [] and records(tmp_path) == []
    assert len(scalars(tmp_path / "run")["stop/loss"]) == 16


def test_actions_by_rule(tmp_path: Path) -> None:
    """Each rule has its own: with non_finite off and divergence in shadow mode, loss_spike may stop."""
    stop = EarlyTermination(actions={"non_finite": "off", "divergence": "shadow", "loss_spike": "stop"})
    kept = {rule.name: rule.action for rule in default_rules()}
    del kept["non_finite"]
    expected = kept | {"divergence": "shadow", "loss_spike": "stop"}
    assert {rule.name: rule.action for rule in stop.rules} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"actions": {"divergance": "warn"}}, "actions names the rule 'divergance', which is not there. The rules are"),
        ({"actions": {"divergence": "stpo"}}, "actions['divergence']='stpo' must be 'stop', 'warn', 'shadow' or 'off'"),
        ({"actions": "quiet"}, "='quiet' must be 'stop', 'warn', 'shadow' or 'off'"),
        ({"cooldown": -1}, "cooldown=-1 must be a whole number, 0 or more"),
        ({"cooldown": 1.5}, "cooldown=1.5 must be a whole number, 0 or more"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], message: str) -> None:
    """Each is refused at construction, with its name, its value and what is allowed."""
    with pytest.raises(ValueError, match=re.escape(message)):
        EarlyTermination(**arguments)


@pytest.mark.parametrize("action", ["warn", "shadow", "off"])
@pytest.mark.parametrize("every", [1, 5])
def test_a_non_finite_rule_that_does_not_stop_throws_nothing_away(action: str, every: int, tmp_path: Path) -> None:
    """Updates go through, p.grad is left alone, and the weights are as spoilt as without dynwatch, bit for bit."""
    bare_gradients, gradients = Gradients(), Gradients()
    _, bare = fit(tmp_path / "bare", bare_gradients, bad_at=5)
    stop = EarlyTermination(actions={"non_finite": action, "divergence": "warn"}, check_every_n_steps=every)
    run, model = fit(tmp_path / "watched", stop, gradients, bad_at=5)
    assert run.global_step == 16
    assert model.net[2].weight.isnan().all() and same_weights(bare, model)
    assert len(gradients.seen) == 64
    assert all(same_bits(a, b) for a, b in zip(bare_gradients.seen, gradients.seen, strict=True))


def test_the_verdict_of_a_non_finite_rule_that_warns(tmp_path: Path) -> None:
    """It names the first bad layer as a stop does, and does not claim that an update was thrown away."""
    fit(tmp_path, EarlyTermination(rules=[NonFinite(action="warn")]), bad_at=5)
    (record,) = records(tmp_path)
    assert record["reason"].startswith("The loss is nan at step 5: gradient of net.0.weight first, 4 of 4 tensors")
    assert "thrown away" not in json.dumps(record)


# --- a stop among warnings


def test_a_stop_after_a_warning(tmp_path: Path) -> None:
    """Both are recorded, each with its action; the stop ends the run and is the callback's verdict."""
    stop = EarlyTermination(rules=[FiresFrom("fussy", 2, "warn"), NonFinite()])
    run, model = fit(tmp_path, stop, bad_at=5)
    assert run.global_step == 6 and stop.verdict.rule == "non_finite"
    assert [(r["action"], r["rule"], r["step"]) for r in records(tmp_path)] == [
        ("warn", "fussy", 2),
        ("stop", "non_finite", 5),
    ]
    assert records(tmp_path)[1]["update_discarded_at_step"] == 5
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_warning_and_a_stop_at_the_same_step(tmp_path: Path) -> None:
    """Neither hides the other, whichever rule comes first."""
    for folder, rules in (
        ("a", [FiresFrom("fussy", 4, "warn"), FiresFrom("strict", 4)]),
        ("b", [FiresFrom("strict", 4), FiresFrom("fussy", 4, "warn")]),
    ):
        run, _ = fit(tmp_path / folder, EarlyTermination(rules=rules))
        assert run.global_step == 5
        assert [(r["action"], r["step"]) for r in records(tmp_path / folder)] == [("warn", 4), ("stop", 4)]
        events = scalars(tmp_path / folder / "run")
        assert events["stop/fussy"] == events["stop/strict"] == [(4, 4.0)]


def test_min_steps_holds_warnings_back(tmp_path: Path) -> None:
    """Before min_steps a rule is fed but neither warns nor uses up its cooldown."""
    rules: list[Rule] = [FiresFrom("fussy", 0, "warn"), FiresFrom("quiet", 0, "shadow")]
    fit(tmp_path, EarlyTermination(rules=rules, min_steps=6, cooldown=7))
    found = [(record["rule"], record["step"]) for record in records(tmp_path)]
    assert found == [("fussy", 5), ("quiet", 5), ("fussy", 12), ("quiet", 12)]


def test_the_trainers_minimum_delays_the_stop_and_not_the_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While Trainer(min_steps=11) forbids the stop, warnings are told at once; the stop comes with its own step."""
    rules: list[Rule] = [FiresFrom("strict", 2), FiresFrom("fussy", 1, "warn")]
    with caplog.at_level(logging.WARNING, "dynwatch"):
        run, _ = fit(tmp_path, EarlyTermination(rules=rules, cooldown=4), min_steps=11)
    assert run.global_step == 11
    assert [(r["action"], r["step"]) for r in records(tmp_path)] == [
        ("warn", 1),
        ("warn", 5),
        ("warn", 9),
        ("stop", 2),
    ]
    assert records(tmp_path)[-1]["stopped_after_step"] == 10
    assert sum("The run goes on until Trainer(min_steps=11" in r.getMessage() for r in caplog.records) == 1


# --- rules that raise


def test_a_rule_that_raises_is_off_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, by name and cause, and not asked again; another rule still ends the run."""
    clumsy = Raises()
    watch = DynWatch(stop=EarlyTermination(rules=[clumsy, NonFinite()]), report=False)
    with caplog.at_level(logging.WARNING, "dynwatch"):
        run, _ = fit(tmp_path, watch, bad_at=9)
    assert clumsy.asked == 4
    told = [r.getMessage() for r in caplog.records if r.name == "dynwatch"]
    assert told[0] == ("The rule clumsy is off for the rest of this run, because it raised ZeroDivisionError: by hand.")
    assert [message.split(" (")[0] for message in told[1:]] == ["dynwatch ends this run"]
    assert run.global_step == 10 and watch.verdict.rule == "non_finite"
    assert not any(monitor.off for monitor in watch.monitors)


def test_a_rule_that_raised_is_asked_again_in_the_next_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second fit with the same callback starts with all rules, and tells of the failure again."""
    clumsy = Raises()
    stop = EarlyTermination(rules=[clumsy])
    for folder in ("a", "b"):
        fit(tmp_path / folder, stop)
    assert clumsy.asked == 8
    assert sum("The rule clumsy is off" in r.getMessage() for r in caplog.records) == 2
