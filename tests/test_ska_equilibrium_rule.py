"""SKAEquilibrium and the level that it reads: what settles a network, and what does not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynwatch.rules import Outcome, Rulebook, SKAEquilibrium, default_rules, replay_readings
from dynwatch.ska_equilibrium import SETTLED, Change, Equilibrium, Moment

LEVEL = "ska/equilibrium"


def fired(rule: SKAEquilibrium, levels: Sequence[float], every: int = 50) -> list[int]:
    """The steps at which a rule fires, with a level at each so many steps."""
    steps = range(every - 1, every * len(levels), every)
    return [step for step, level in zip(steps, levels, strict=True) if rule.update(step, {LEVEL: level}, {})]


# --- the rule


def test_it_fires_once_all_probes_of_its_patience_are_settled_and_goes_on() -> None:
    """At the fifth of them, past its least step; the level itself still counts."""
    assert fired(SKAEquilibrium(min_steps=0), [1.0, 0.5] + [0.1] * 6) == [349, 399]
    assert fired(SKAEquilibrium(min_steps=380), [1.0, 0.5] + [0.1] * 6) == [399]
    assert fired(SKAEquilibrium(min_steps=0, level=0.5, patience=1), [1.0, 0.5, 0.6, 0.4]) == [99, 199]


def test_a_probe_above_its_level_begins_anew() -> None:
    """So does none at all, where probes come late; a NaN is no probe."""
    assert fired(SKAEquilibrium(min_steps=0), [0.05] * 4 + [0.2] + [0.05] * 4) == []
    rule = SKAEquilibrium(min_steps=0, patience=3)
    found = [rule.update(step, {LEVEL: 0.01}, {}) for step in (50, 100, 400, 450, 500)]
    assert [verdict is not None for verdict in found] == [False, False, False, False, True]
    rule = SKAEquilibrium(min_steps=0, patience=2)
    assert not rule.update(50, {LEVEL: 0.01}, {}) and not rule.update(51, {LEVEL: math.nan}, {})
    assert not rule.update(52, {"stop/loss": 1.0}, {}) and rule.update(100, {LEVEL: 0.01}, {})


def test_a_verdict_explains_itself_and_does_not_promise_more() -> None:
    """Numbers, evidence, and that it is no word on generalisation; the weights are good."""
    rule = SKAEquilibrium(min_steps=0, patience=2, action="stop")
    rule.update(49, {LEVEL: 0.08}, {})
    verdict = rule.update(99, {LEVEL: 0.0421}, {})
    assert verdict is not None and verdict.severity == "stop" and not verdict.weights_suspect
    assert "0.042 of their peaks" in verdict.reason and "2 probes in a row" in verdict.reason
    assert "step 99" in verdict.reason and "nothing of how well the network generalises" in verdict.advice
    assert verdict.evidence == {LEVEL: [(49, 0.08), (99, 0.0421)]}
    assert SKAEquilibrium().action == "warn"


def test_it_is_not_asked_by_default_and_replays() -> None:
    """Past runs are judged from the logged level alone; without it there is nothing to read."""
    assert "ska_equilibrium" not in [rule.name for rule in default_rules()]
    curve = [(step, 0.05) for step in range(49, 1000, 50)]
    (outcome,) = replay_readings({LEVEL: curve}, [SKAEquilibrium(action="stop")])
    assert outcome.step == 549 and outcome.saved == pytest.approx(0.45)
    (outcome,) = replay_readings({"stop/loss": curve}, [SKAEquilibrium()])
    assert isinstance(outcome, Outcome) and outcome.nothing_to_read and outcome.missing == (LEVEL,)


@given(levels=st.lists(st.floats(0, 1), max_size=40), cut=st.integers(0, 40))
def test_a_restored_rule_goes_on_as_it_would_have(levels: list[float], cut: int) -> None:
    """Through JSON, at any place."""
    whole, first, second = (SKAEquilibrium(patience=2, min_steps=100, level=0.4) for _ in range(3))
    expected = [whole.update(10 * i, {LEVEL: level}, {}) for i, level in enumerate(levels)]
    found = [first.update(10 * i, {LEVEL: level}, {}) for i, level in enumerate(levels[:cut])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.update(10 * (cut + i), {LEVEL: level}, {}) for i, level in enumerate(levels[cut:])]
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 0.0}, "level=0.0 must be a number above 0 and below 1; 0.1 is a tenth of the peaks"),
        ({"level": 1.0}, "level=1.0 must be"),
        ({"patience": 0}, "patience=0 must be a whole number, 1 or more"),
        ({"min_steps": -1}, "min_steps=-1 must be a whole number, 0 or more"),
        ({"action": "end"}, "action='end' must be 'stop'"),
    ],
)
def test_arguments_out_of_bounds_are_told(arguments: dict[str, object], message: str) -> None:
    """With their bounds."""
    with pytest.raises(ValueError, match=message):
        SKAEquilibrium(**arguments)  # type: ignore[arg-type]


def test_it_goes_with_the_default_rules() -> None:
    """In one book."""
    book = Rulebook([*default_rules(), SKAEquilibrium(action="stop", patience=1, min_steps=0)], cooldown=0)
    assert [verdict.rule for _, verdict in book.update(5, {LEVEL: 0.01}, {})] == ["ska_equilibrium"]


# --- the level


def levels(flows: Sequence[float], entropies: Sequence[float], smoothing: float = 0.0) -> list[float]:
    equilibrium = Equilibrium(smoothing)
    pairs = enumerate(zip(flows, entropies, strict=True))
    return [equilibrium.update({"a": Change(*pair)}, Moment(float(i), i)) for i, pair in pairs]


def test_the_level_is_the_larger_of_both_by_their_peaks() -> None:
    """Without smoothing the plain ratios; the sign of an entropy step is of no matter."""
    assert levels([2.0, 4.0, 1.0, 0.0], [0.1, -0.1, -0.05, 0.02]) == pytest.approx([1, 1, 0.5, 0.2])
    assert levels([2.0, 1.0, 0.1], [0.0, 0.0, 0.0]) == pytest.approx([1, 0.5, 0.05])


def test_the_level_is_smoothed() -> None:
    """An exponential average, the first value whole: one quiet probe does not settle a network."""
    assert levels([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], smoothing=0.7) == pytest.approx([1, 0.7, 0.49])


def test_all_layers_must_settle() -> None:
    """The level is that of the layer that moves most by its own measure; one that never moved does not count."""
    equilibrium = Equilibrium(0.0)
    still = Change(0.0, 0.0)
    assert math.isnan(equilibrium.update({"still": still}, Moment(0.0, 0)))
    assert equilibrium.update({"a": Change(8.0, 1.0), "b": Change(1.0, 0.1), "still": still}, Moment(1.0, 1)) == 1
    level = equilibrium.update({"a": Change(0.1, 0.0), "b": Change(0.5, 0.0), "still": still}, Moment(2.0, 2))
    assert level == 0.5
    assert equilibrium.peak == Moment(1.0, 1)
    # A layer that is missing keeps its place.
    assert equilibrium.update({"a": Change(0.1, 0.0)}, Moment(3.0, 3)) == 0.5
    assert math.isnan(equilibrium.update({"a": Change(math.nan, 0.0)}, Moment(4.0, 4)))
    assert math.isnan(equilibrium.update({}, Moment(5.0, 5)))


def test_the_characteristic_times() -> None:
    """The largest mean flow, and the beginning of the last stretch at or below the level."""
    equilibrium = Equilibrium(0.0)
    settled = []
    for i, flow in enumerate([1.0, 10.0, SETTLED, 0.5, 2.0, 0.4, 0.3]):
        equilibrium.update({"a": Change(flow, 0.0)}, Moment(i / 10, i))
        settled.append(None if equilibrium.settled is None else equilibrium.settled.step)
    assert equilibrium.peak == Moment(0.1, 1) and settled == [None, None, 2, 2, None, 5, 5]


@given(flows=st.lists(st.floats(0, 1e10), min_size=1, max_size=30), cut=st.integers(0, 30))
def test_the_level_is_a_share_and_survives_a_restore(flows: list[float], cut: int) -> None:
    """Between 0 and 1 whatever comes, and the same when its state goes through JSON in between."""
    whole, parted = Equilibrium(), Equilibrium()
    for i, flow in enumerate(flows):
        if i == cut:
            state = json.loads(json.dumps(parted.state_dict()))
            parted = Equilibrium()
            parted.load_state_dict(state)
        level, again = (e.update({"a": Change(flow, -flow / 3)}, Moment(float(i), i)) for e in (whole, parted))
        assert (math.isnan(level) and math.isnan(again)) or 0 <= level == again <= 1
        assert (whole.peak, whole.settled) == (parted.peak, parted.settled)


def test_a_smoothing_out_of_bounds_is_told() -> None:
    """With the bounds."""
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"smoothing={bad!r} must be a number, 0 or more and below 1"):
            Equilibrium(bad)
