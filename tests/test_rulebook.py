"""The rulebook: order, cooldown, min_steps, failures, state; and what `actions` may say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwatch.rules import (
    Divergence,
    NonFinite,
    Plateau,
    Rule,
    Rulebook,
    StopWhen,
    Verdict,
    apply_actions,
)
from dynwatch.rules import default_rules as defaults
from dynwatch.rules.base import Action


class Above(Rule):
    """Fires while x is above a bound; counts its readings."""

    kept = ("seen",)

    def __init__(self, name: str, bound: float = 0.0, action: Action = "warn") -> None:
        self.name, self.bound, self.action = name, bound, action
        self.seen = 0

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self.seen += 1
        return self.verdict(step, "High.", "Lower it.") if readings.get("x", 0.0) > self.bound else None


class Breaks(Rule):
    """Raises from a step on."""

    name = "breaks"

    def __init__(self, at: int) -> None:
        self.at, self.asked = at, 0

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self.asked += 1
        if step >= self.at:
            raise RuntimeError("no such layer")
        return None


def fired(book: Rulebook, steps: range, x: float = 1.0) -> list[int]:
    """The steps of all verdicts, with x at each step."""
    return [verdict.step for step in steps for _, verdict in book.update(step, {"x": x}, {})]


# --- when a verdict counts


@pytest.mark.parametrize("action", ["warn", "shadow"])
@pytest.mark.parametrize("cooldown", [1, 7, 1000])
def test_a_rule_that_has_spoken_stays_silent_for_the_cooldown(action: Action, cooldown: int) -> None:
    """Verdicts of one rule lie at least `cooldown` steps apart, and come again right after it."""
    book = Rulebook([Above("a", action=action)], cooldown=cooldown)
    assert fired(book, range(3, 40)) == list(range(3, 40, cooldown))


def test_without_cooldown_every_verdict_counts() -> None:
    """Zero turns it off."""
    assert fired(Rulebook([Above("a")], cooldown=0), range(5)) == [0, 1, 2, 3, 4]


def test_a_stop_knows_no_cooldown() -> None:
    """A verdict that ends the run counts at every step, until the trainer may stop."""
    assert fired(Rulebook([Above("a", action="stop")], cooldown=100), range(5)) == [0, 1, 2, 3, 4]


def test_each_rule_has_a_cooldown_of_its_own() -> None:
    """One rule's verdict does not silence another's."""
    book = Rulebook([Above("low", 0.0), Above("high", 5.0)], cooldown=10)
    assert fired(book, range(4), x=1.0) == [0]
    assert [rule.name for rule, _ in book.update(4, {"x": 9.0}, {})] == ["high"]


def test_steps_of_the_cooldown_are_steps_of_the_run() -> None:
    """Sparse readings do not lengthen it."""
    book = Rulebook([Above("a")], cooldown=100)
    assert fired(book, range(0, 500, 60)) == [0, 120, 240, 360, 480]


@pytest.mark.parametrize("min_steps", [0, 1, 5])
def test_no_verdict_counts_before_min_steps(min_steps: int) -> None:
    """The first that counts is at the step that completes `min_steps`, and early ones start no cooldown."""
    book = Rulebook([Above("a"), Above("b", action="stop")], min_steps=min_steps, cooldown=1000)
    found = [(step, rule.name) for step in range(8) for rule, _ in book.update(step, {"x": 1.0}, {})]
    first = max(min_steps - 1, 0)
    assert found == [(first, "a"), *((step, "b") for step in range(first, 8))]
    assert all(rule.seen == 8 for rule in book.rules if isinstance(rule, Above))  # they were asked all the same


def test_verdicts_come_in_the_order_of_the_rules() -> None:
    """With the very rule that gave each of them."""
    rules = [Above("b"), Above("a"), Above("c")]
    found = Rulebook(rules).update(0, {"x": 1.0}, {})
    assert [rule for rule, _ in found] == rules
    assert [verdict.rule for _, verdict in found] == ["b", "a", "c"]


# --- failures


def test_a_failing_rule_goes_off_and_the_others_go_on() -> None:
    """It is told why, is not asked again, and costs no other rule a reading."""
    broken, before, after = Breaks(at=2), Above("before"), Above("after")
    book = Rulebook([before, broken, after], cooldown=0)
    assert fired(book, range(5)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert book.failed == {"breaks": "RuntimeError: no such layer"}
    assert (broken.asked, before.seen, after.seen) == (3, 5, 5)


def test_a_wish_to_end_the_program_is_no_failure() -> None:
    """KeyboardInterrupt passes through."""

    class Interrupted(Breaks):
        def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Rulebook([Interrupted(0)]).update(0, {}, {})


# --- arguments


@pytest.mark.parametrize("thing", [NonFinite, "non_finite", None, 3, {"name": "x"}])
def test_what_is_no_rule_is_an_error(thing: Any) -> None:
    """The message shows it; a class that was not called is the likeliest mistake."""
    with pytest.raises(ValueError, match=f"^rules has {re.escape(repr(thing))}, which must be an instance of Rule"):
        Rulebook([Divergence(), thing])


def test_a_rule_without_a_name_is_an_error() -> None:
    """It could not be told from others, nor be logged."""

    class Nameless(Rule):
        def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
            return None

    with pytest.raises(ValueError, match=r"^rules has .*Nameless.*, which must have a name"):
        Rulebook([Nameless()])


def test_two_rules_of_one_name_are_an_error() -> None:
    """The message lists the names."""
    with pytest.raises(ValueError, match=r"^rules has two rules of one name: non_finite, divergence, non_finite"):
        Rulebook([NonFinite(), Divergence(), NonFinite()])


@pytest.mark.parametrize("argument", ["min_steps", "cooldown"])
@pytest.mark.parametrize("value", [-1, 1.5, None, True])
def test_numbers_out_of_bounds_are_errors(argument: str, value: Any) -> None:
    """The message names the argument, its value and the bound."""
    with pytest.raises(ValueError, match=f"^{argument}={re.escape(repr(value))} must be a whole number, 0 or more"):
        Rulebook([], **{argument: value})


# --- state

EVENTS = st.lists(st.sampled_from([0.0, 1.0, 9.0]), max_size=40)


@given(events=EVENTS, cut=st.integers(0, 40), cooldown=st.sampled_from([0, 3, 10]))
@settings(deadline=None)
def test_a_restored_rulebook_goes_on(events: list[float], cut: int, cooldown: int) -> None:
    """State at any point, through JSON: the same verdicts, cooldowns and state as an unbroken book's."""

    def book() -> Rulebook:
        condition = StopWhen("x > 0.5 for 3 readings", name="often", action="shadow")
        return Rulebook([Above("low", 0.0), Above("high", 5.0, "stop"), condition], 2, cooldown)

    unbroken, broken = book(), book()
    for step, x in enumerate(events):
        if step == cut:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = book()
            broken.load_state_dict(state)
        expected = [verdict.to_dict() for _, verdict in unbroken.update(step, {"x": x}, {})]
        assert [verdict.to_dict() for _, verdict in broken.update(step, {"x": x}, {})] == expected
    assert json.dumps(broken.state_dict()) == json.dumps(unbroken.state_dict())


def test_a_checkpoint_may_know_other_rules() -> None:
    """Rules that it does not know start afresh, and those that are gone are forgotten."""
    old = Rulebook([Above("stays"), Above("goes")])
    fired(old, range(3))
    new = Rulebook([Above("comes"), Above("stays")])
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert [rule.seen for rule in new.rules if isinstance(rule, Above)] == [0, 3]
    assert [rule.name for rule, _ in new.update(3, {"x": 1.0}, {})] == ["comes"]  # "stays" is in its cooldown


def test_the_state_is_a_copy() -> None:
    """Later verdicts do not change a state that was taken."""
    book = Rulebook([Above("a")], cooldown=5)
    state = book.state_dict()
    kept = json.dumps(state)
    fired(book, range(3))
    assert json.dumps(state) == kept


# --- apply_actions


@pytest.mark.parametrize("action", ["stop", "warn", "shadow"])
def test_one_word_holds_for_all_rules(action: str) -> None:
    """Every rule gets it, and none is left out."""
    rules = apply_actions(defaults(), action)
    assert [rule.name for rule in rules] == [rule.name for rule in defaults()]
    assert {rule.action for rule in rules} == {action}


def test_off_leaves_a_rule_out() -> None:
    """By name or, as one word, all of them; the others keep their order and actions."""
    left = apply_actions(defaults(), {"divergence": "off", "plateau": "off"})
    expected = [(r.name, r.action) for r in defaults() if r.name not in ("divergence", "plateau")]
    assert [(rule.name, rule.action) for rule in left] == expected
    assert apply_actions(defaults(), "off") == []


@pytest.mark.parametrize("actions", [None, {}])
def test_without_actions_rules_stay_as_they_are(actions: Any) -> None:
    """The very instances come back in a list of their own."""
    rules = defaults()
    left = apply_actions(rules, actions)
    assert left == rules and left is not rules
    assert [rule.action for rule in left] == [rule.action for rule in defaults()]


def test_a_users_own_rules_are_named_like_any_other() -> None:
    """Their instances are used, with the action of the dict rather than that of their constructor."""
    mine, condition, plateau = Above("mine"), StopWhen("loss > 3"), Plateau(min_readings=64)
    left = apply_actions([mine, condition, plateau], {"mine": "stop", "when_loss": "shadow"})
    assert left[0] is mine and left[1] is condition and left[2] is plateau
    assert [rule.action for rule in left] == ["stop", "shadow", "warn"]


def test_an_action_reaches_the_verdict() -> None:
    """A rule that was made to stop says so, and one that was made to warn does not."""
    for action, severity in (("stop", "stop"), ("shadow", "stop"), ("warn", "warn")):
        (rule,) = apply_actions([Above("a")], {"a": action})
        verdict = rule.update(0, {"x": 1.0}, {})
        assert verdict is not None and verdict.severity == severity


def test_an_unknown_rule_is_an_error() -> None:
    """The message lists the rules there are; "off" is no excuse for a misspelt name."""
    for action in ("warn", "off"):
        with pytest.raises(ValueError, match=r"^actions names the rule 'platau', which is not there\. .*plateau"):
            apply_actions(defaults(), {"platau": action})


@pytest.mark.parametrize("action", ["Stop", "halt", "", None, True])
def test_an_unknown_action_is_an_error(action: Any) -> None:
    """The message shows the rule, the word, and the words there are."""
    message = f"actions['plateau']={action!r} must be 'stop', 'warn', 'shadow' or 'off'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apply_actions(defaults(), {"plateau": action})


def test_a_mistake_in_one_action_changes_no_rule() -> None:
    """Rules that belong to the user are as they were after the error."""
    mine = [Above("a"), Above("b")]
    with pytest.raises(ValueError, match="halt"):
        apply_actions(mine, {"a": "stop", "b": "halt"})
    assert [rule.action for rule in mine] == ["warn", "warn"]


def test_one_unknown_word_for_all_is_an_error() -> None:
    """Also without a dict."""
    with pytest.raises(ValueError, match="halt"):
        apply_actions(defaults(), "halt")


@pytest.mark.parametrize("name", ["loss", "loss_limit", "lr", "verdict"])
def test_a_rule_may_not_write_over_readings_of_dynwatchs_own(name: str) -> None:
    """The step at which it fired would stand among the losses."""
    with pytest.raises(ValueError, match=f"rules has a rule named '{name}', but dynwatch itself writes to stop/{name}"):
        Rulebook([StopWhen("x > 1", name=name)])


@pytest.mark.parametrize("actions", [{"plateau": False}, {"plateau": "off"}])
def test_what_yaml_makes_of_off(actions: dict[str, str | bool]) -> None:
    """YAML reads off as False."""
    names = [rule.name for rule in apply_actions(defaults(), actions)]
    assert "plateau" not in names and len(names) == len(defaults()) - 1


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ("stpo", "actions='stpo' must be"),
        (["plateau"], "actions=['plateau'] must be a dict"),
        (True, "actions=True must"),
    ],
)
def test_an_action_that_is_none(actions: Any, words: str) -> None:
    """The message names what was given, and no rule is changed."""
    rules = defaults()
    with pytest.raises(ValueError, match=re.escape(words)):
        apply_actions(rules, actions)
    assert [rule.action for rule in rules] == [rule.action for rule in defaults()]
