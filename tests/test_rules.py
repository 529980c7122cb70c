"""Stop rules: healthy curves are left alone, blow-ups are found, and no reading breaks or blinds a rule."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwatch.rules import EVIDENCE_LENGTH, Divergence, NonFinite, Rule, Verdict

LOSS, GRADIENT, WEIGHTS, SCALER = "stop/loss", "stop/grad_norm", "stop/weight_norm", "stop/scaler"
BAD = [math.nan, math.inf, -math.inf]
STEPS = 600

READING = st.floats(-10, 10) | st.floats() | st.sampled_from([*BAD, 0.0, 1.0, 1.0, 100.0, 1.7e308, -1.7e308])
READINGS = st.fixed_dictionaries(
    {},
    optional={LOSS: READING, GRADIENT: READING, WEIGHTS: READING, SCALER: st.sampled_from([0.0, 1.0]), "else": READING},
)
STREAM = st.lists(READINGS | st.just({LOSS: 1.0, GRADIENT: 1.0}), max_size=60)
RULES: dict[str, Callable[[], Rule]] = {
    "non_finite": NonFinite,
    "non_finite, impatient": lambda: NonFinite(scaler_patience=2),
    "divergence": Divergence,
    "divergence, impatient": lambda: Divergence(patience=2, window=5, k=3.0),
    "divergence, at once": lambda: Divergence(patience=1, window=1),
}
rules = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


def fired(losses: Sequence[float], rule: Rule | None = None) -> list[int]:
    """The steps at which the loss alone makes a rule fire."""
    rule = rule or Divergence()
    return [step for step, loss in enumerate(losses) if rule.update(step, {LOSS: float(loss)}, {})]


def strict_json(verdict: Verdict | None) -> str:
    """The verdict as a program would read it; raises where JSON has no word for a value."""
    return json.dumps(verdict and verdict.to_dict(), allow_nan=False)


# --- every rule


@rules
@given(stream=STREAM)
@settings(max_examples=60, deadline=None)
def test_no_reading_breaks_a_rule(make: Callable[[], Rule], stream: list[dict[str, float]]) -> None:
    """NaN, infinite, huge, missing, unknown and repeated readings raise nothing, and verdicts stay strict JSON."""
    rule = make()
    for i, readings in enumerate(stream):
        step = i // 2  # steps may repeat
        verdict = rule.update(step, readings, {})
        record = json.loads(strict_json(verdict))
        if verdict is not None:
            assert (record["rule"], record["step"]) == (rule.name, step)
            assert all(len(readings) <= EVIDENCE_LENGTH for readings in record["evidence"].values())


@rules
@given(stream=STREAM, cut=st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_restored_rule_goes_on_as_if_unbroken(
    make: Callable[[], Rule], stream: list[dict[str, float]], cut: int
) -> None:
    """State taken at any point, sent through JSON and loaded into a new rule, gives the same verdicts and state."""
    unbroken, broken = make(), make()
    for step, readings in enumerate(stream):
        if step == cut:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = make()
            broken.load_state_dict(state)
        expected = strict_json(unbroken.update(step, readings, {}))
        assert strict_json(broken.update(step, readings, {})) == expected
    assert json.dumps(broken.state_dict()) == json.dumps(unbroken.state_dict())


def eventful_run() -> list[dict[str, float]]:
    """A healthy start, spikes and overflows that recover, steps without readings, and a bad end of either kind."""
    good = [{LOSS: 2.0 + 0.1 * math.sin(i), GRADIENT: 1.0} for i in range(20)]
    spike = [{LOSS: 30.0, GRADIENT: 9.0}] * 8
    overflow: list[dict[str, float]] = [{LOSS: 2.0, GRADIENT: math.inf, SCALER: 1.0}]
    return [*good, *spike, {}, *good, *overflow, *good[:2], *overflow * 30, *spike * 5, {LOSS: math.nan}, {}]


@rules
def test_a_rule_can_be_restored_at_every_step_of_an_eventful_run(make: Callable[[], Rule]) -> None:
    """Also in the middle of a count: the state is the same right after loading, and so are all verdicts after it."""
    run = eventful_run()
    rule, states, expected = make(), [], []
    for step, readings in enumerate(run):
        states.append(json.dumps(rule.state_dict()))
        expected.append(strict_json(rule.update(step, readings, {})))
    assert any(verdict != "null" for verdict in expected)
    for cut in range(len(run)):
        restored = make()
        restored.load_state_dict(json.loads(states[cut]))
        assert json.dumps(restored.state_dict()) == states[cut]
        found = [strict_json(restored.update(step, run[step], {})) for step in range(cut, len(run))]
        assert found == expected[cut:]


@rules
def test_state_is_a_copy(make: Callable[[], Rule]) -> None:
    """What was taken at one step does not change with the next, and loading it does not tie two rules together."""
    rule = make()
    rule.update(0, {LOSS: 1.0, GRADIENT: 1.0}, {})
    state = rule.state_dict()
    kept = json.dumps(state)
    other = make()
    other.load_state_dict(state)
    for step in range(1, 4):
        rule.update(step, {LOSS: 2.0, GRADIENT: math.nan, SCALER: 1.0}, {})
        other.update(step, {LOSS: 1.5, GRADIENT: 3.0}, {})
    assert json.dumps(state) == kept


# --- verdicts


def test_a_verdict_is_strict_json() -> None:
    """Non-finite evidence becomes words; everything else stays what it is."""
    verdict = Verdict("rule", 3, "Why.", "What to do.", {"a": [(1, 0.5), (2, math.nan)], "b": [(3, -math.inf)]}, False)
    assert json.loads(strict_json(verdict)) == {
        "rule": "rule",
        "step": 3,
        "reason": "Why.",
        "advice": "What to do.",
        "evidence": {"a": [[1, 0.5], [2, "nan"]], "b": [[3, "-inf"]]},
        "weights_suspect": False,
        "severity": "stop",
    }


# --- NonFinite


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        (LOSS, "The loss is {value} at step 5"),
        (GRADIENT, "The gradient is not finite at step 5"),
        (WEIGHTS, "The weights are not finite after step 5"),
    ],
)
def test_the_first_non_finite_reading_fires(tag: str, reason: str, value: float) -> None:
    """Finite readings pass, however large; the first NaN or infinity of any kind does not."""
    rule = NonFinite()
    for step, good in enumerate([0.0, -1e300, 1e300, 1e-300, 1.0]):
        assert rule.update(step, {LOSS: good, GRADIENT: abs(good), WEIGHTS: abs(good)}, {}) is None
    verdict = rule.update(5, {LOSS: 1.0, GRADIENT: 1.0, WEIGHTS: 1.0} | {tag: value}, {})
    assert verdict is not None
    assert (verdict.rule, verdict.step) == ("non_finite", 5)
    assert verdict.reason == reason.format(value=value) + "."


@pytest.mark.parametrize(
    ("readings", "notes", "reason"),
    [
        ({GRADIENT: math.nan}, {GRADIENT: "gradient of w"}, "The gradient is not finite at step 0: gradient of w."),
        ({LOSS: math.nan}, {GRADIENT: "gradient of w"}, "The loss is nan at step 0: gradient of w."),
        ({LOSS: math.nan}, {GRADIENT: "g", WEIGHTS: "weight w"}, "The loss is nan at step 0: weight w."),
        ({WEIGHTS: math.inf}, {WEIGHTS: "weight w"}, "The weights are not finite after step 0: weight w."),
        (
            {LOSS: math.nan, GRADIENT: math.nan, WEIGHTS: math.nan},
            {WEIGHTS: "weight w"},
            "The weights are not finite after step 0: weight w.",
        ),
    ],
)
def test_the_reason_says_where(readings: dict[str, float], notes: dict[str, str], reason: str) -> None:
    """The note of the first bad tensor ends the sentence, and spoilt weights are told before anything they cause."""
    verdict = NonFinite().update(0, readings, notes)
    assert verdict is not None and verdict.reason == reason


@pytest.mark.parametrize("patience", [1, 2, 25])
def test_scaler_overflows_are_routine_until_their_patience_ends(patience: int) -> None:
    """Under a gradient scaler the n-th non-finite gradient in a row fires, and none before it."""
    rule = NonFinite(scaler_patience=patience)
    verdicts = [rule.update(step, {LOSS: 1.0, GRADIENT: math.inf, SCALER: 1.0}, {}) for step in range(patience)]
    assert [v is not None for v in verdicts] == [False] * (patience - 1) + [True]
    assert verdicts[-1] is not None
    assert verdicts[-1].reason == (
        f"The gradient scaler has skipped {patience} steps in a row, up to step {patience - 1}."
    )


def test_a_good_gradient_ends_a_row_of_overflows() -> None:
    """A scaler that finds its scale again may overflow as often as before; a thousand scattered ones are routine."""
    rule = NonFinite(scaler_patience=3)
    for step in range(3000):
        gradient = 1.0 if step % 3 == 2 else math.inf
        assert rule.update(step, {LOSS: 1.0, GRADIENT: gradient, SCALER: 1.0}, {}) is None


def test_a_scaler_does_not_excuse_a_loss_or_weights() -> None:
    """Only the gradient may be non-finite under a scaler; and a scaler that is off (0) excuses nothing."""
    for readings in ({LOSS: math.nan}, {WEIGHTS: math.nan}):
        assert NonFinite().update(0, {GRADIENT: math.inf, SCALER: 1.0} | readings, {}) is not None
    assert NonFinite().update(0, {GRADIENT: math.inf, SCALER: 0.0}, {}) is not None


def test_evidence_holds_the_last_readings() -> None:
    """The verdict carries the last readings with their steps, oldest first, the deciding one included."""
    rule = NonFinite()
    for step in range(100):
        rule.update(step, {LOSS: float(step), GRADIENT: step / 2}, {})
    verdict = rule.update(100, {LOSS: math.inf, GRADIENT: math.inf}, {})
    assert verdict is not None
    steps = range(101 - EVIDENCE_LENGTH, 100)
    assert verdict.evidence == {
        LOSS: [*((s, float(s)) for s in steps), (100, math.inf)],
        GRADIENT: [*((s, s / 2) for s in steps), (100, math.inf)],
    }


def test_evidence_has_nothing_that_was_not_read() -> None:
    """A gradient that nobody measured is not shown as NaN."""
    rule = NonFinite()
    rule.update(0, {LOSS: 0.0}, {})
    rule.update(1, {GRADIENT: 0.0}, {})
    verdict = rule.update(2, {LOSS: math.inf}, {})
    assert verdict is not None
    assert verdict.evidence == {LOSS: [(0, 0.0), (2, math.inf)], GRADIENT: [(1, 0.0)]}


@pytest.mark.parametrize("patience", [0, -1])
def test_scaler_patience_below_one_is_an_error(patience: int) -> None:
    """The message names the argument, its value and the bound."""
    with pytest.raises(ValueError, match=f"^scaler_patience={patience} must be a whole number, 1 or more\\.$"):
        NonFinite(scaler_patience=patience)


# --- Divergence


def naive_divergence(losses: list[float], patience: int, window: int, k: float, min_rise: float) -> list[int]:
    """The docstring's formula, from the whole history at each step, with NumPy."""
    inside: list[float] = []
    first: list[float] = []
    outside: list[float] = []
    steps = []
    for step, loss in enumerate(losses):
        if len(first) < 20:
            if math.isfinite(loss):
                first.append(loss)
                inside.append(loss)
            continue
        if inside:
            usual = np.median(inside[-window:])
            mad = np.median(np.abs(np.array(inside[-window:]) - usual))
            begin = np.median(first[:5])
            centre = max(np.median(first), usual)
            rise = max(k * (1.4826 * mad), 3 * abs(centre), min_rise)
            limit = min(centre + rise, begin + 10 * max(abs(begin), min_rise))
        if math.isfinite(loss) and loss <= limit:
            inside.append(loss)
            outside = []
        else:
            outside.append(loss if math.isfinite(loss) else math.inf)
            if not inside or len(outside) < patience:
                continue
            last, half = outside[-patience:], patience // 2
            if half and np.median(last[-half:]) - centre < 0.9 * (np.median(last[:half]) - centre):
                continue
            steps.append(step)
    return steps


@given(
    losses=st.lists(st.floats(-5, 5) | st.floats(-1e6, 1e6) | st.sampled_from([*BAD, 0.0, 2.0]), max_size=60),
    patience=st.integers(1, 4),
    window=st.integers(1, 12),
    k=st.sampled_from([0.5, 3.0, 6.0]),
    min_rise=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_divergence_follows_its_formula(
    losses: list[float], patience: int, window: int, k: float, min_rise: float
) -> None:
    """The rule fires at the steps of a naive version that recomputes everything from the whole history."""
    rule = Divergence(patience, window, k, min_rise)
    assert fired(losses, rule) == naive_divergence(losses, patience, window, k, min_rise)


def decay(t: np.ndarray) -> np.ndarray:
    return 0.2 + 2.1 * np.exp(-t / 150)


def heavy(rng: np.random.Generator) -> np.ndarray:
    """Noise with infinite variance: single losses are far off, always."""
    return np.clip(rng.standard_t(1.8, STEPS), -50, 50)


HEALTHY: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "decay with heavy-tailed noise": lambda t, rng: np.abs(decay(t) + 0.3 * heavy(rng)),
    "decay with multiplicative noise": lambda t, rng: decay(t) * np.exp(0.5 * rng.normal(size=STEPS)),
    "warm-up bump below twice the start": lambda t, rng: decay(t) + 1.9 * np.exp(-(((t - 30) / 15) ** 2)),
    "cyclic learning rate": lambda t, rng: decay(t) * (1 + 0.6 * np.sin(t / 20) ** 2) + 0.05 * rng.normal(size=STEPS),
    "sawtooth of restarts": lambda t, rng: 2.3 * np.exp(-(t % 100) / 30) + 0.05 * rng.normal(size=STEPS),
    "negative log-density": lambda t, rng: -3 * (1 - np.exp(-t / 100)) + 0.2 * rng.normal(size=STEPS),
    "far below zero": lambda t, rng: -1000 + 20 * rng.normal(size=STEPS),
    "constant": lambda t, rng: np.full(STEPS, 0.7),
    "constant zero": lambda t, rng: np.zeros(STEPS),
    "constant and negative": lambda t, rng: np.full(STEPS, -0.7),
    "long plateau": lambda t, rng: np.log(10) + 0.01 * rng.normal(size=STEPS),
    "plateau, then a drop to nothing": lambda t, rng: np.where(t < 400, 2.3, 1e-6) * (1 + 0.1 * rng.normal(size=STEPS)),
    "overfitting slowly": lambda t, rng: 0.5 + t / STEPS * 0.4 + 0.05 * rng.normal(size=STEPS),
    "noise around zero": lambda t, rng: rng.normal(size=STEPS),
    "denormal": lambda t, rng: 5e-324 * np.ones(STEPS),
    "a first batch of half the loss": lambda t, rng: np.where(t == 0, 1.2, decay(t)),
    "a lucky first batch": lambda t, rng: np.where(t == 0, 0.4, decay(t)) + 0.1 * rng.normal(size=STEPS),
    "a value loss before and after the first reward": lambda t, rng: np.where(t < 40, 0, 3 + rng.normal(size=STEPS)),
    "five lucky batches": lambda t, rng: np.where(t < 5, 3e3, 1e4 * (1 + 0.3 * rng.normal(size=STEPS))),
    "two very lucky batches": lambda t, rng: np.where(t < 2, 100, 1e4 * (1 + 0.3 * rng.normal(size=STEPS))),
    "a generator that loses": lambda t, rng: np.clip(0.7 + (t - 30) / 5, 0.7, 5),
    "from exactly zero": lambda t, rng: np.where(t < 3, 0.0, 0.02 * (1 - np.exp(-t / 50))),
    "from nearly zero": lambda t, rng: np.where(t < 3, 1e-8, 0.02 * (1 - np.exp(-t / 50))),
    "a spike that recovers slowly": lambda t, rng: decay(t) + np.where(t < 300, 0, 40 * np.exp(-(t - 300) / 40)),
    "spikes that recover": lambda t, rng: np.where(t % 60 < 15, 50.0, decay(t)),
    "a NaN now and then": lambda t, rng: np.where(t % 7 == 3, np.nan, decay(t)),
}


@pytest.mark.parametrize("curve", HEALTHY)
def test_healthy_runs_are_left_alone(curve: str) -> None:
    """No seed of a curve that a person would let run makes the rule fire."""
    t = np.arange(STEPS, dtype=np.float64)
    for seed in range(5):
        losses = HEALTHY[curve](t, np.random.default_rng(seed))
        assert fired(losses.tolist()) == [], f"seed {seed}"


BLOW_UPS: dict[str, tuple[int, Callable[[np.ndarray, np.random.Generator], np.ndarray]]] = {
    "from the first step": (1, lambda t, rng: 2.3 * 1.5**t),
    "early to a high plateau": (5, lambda t, rng: np.where(t < 5, 2.3, 800 + rng.normal(size=STEPS))),
    "in the middle, exponential": (300, lambda t, rng: decay(t) * 1.3 ** np.maximum(t - 300, 0)),
    "in the middle, a jump": (300, lambda t, rng: np.where(t < 300, decay(t), 40 + rng.normal(size=STEPS))),
    "out of heavy-tailed noise": (300, lambda t, rng: decay(t) + 0.1 * heavy(rng) + np.where(t < 300, 0, 30)),
    "from a tiny loss": (100, lambda t, rng: 1e-8 * (1 + 0.1 * rng.normal(size=STEPS)) * np.where(t < 100, 1, 1e10)),
    "from a negative loss": (100, lambda t, rng: rng.normal(size=STEPS) - np.where(t < 100, 5, -100)),
    "to a finite loss among NaN": (100, lambda t, rng: np.where(t < 100, 1.0, np.where(t % 2, np.nan, 1e6))),
    "to NaN alone": (100, lambda t, rng: np.where(t < 100, 1.0, np.nan)),
    "to infinity": (100, lambda t, rng: np.where(t < 100, 1.0, np.inf)),
    "after a NaN in the history": (100, lambda t, rng: np.where(t < 100, np.where(t % 9 != 5, 1.0, np.nan), 40.0)),
    "after a NaN at the start": (100, lambda t, rng: np.where(t < 100, np.where(t < 3, np.nan, 1.0), 40.0)),
    "after a plateau without any noise": (400, lambda t, rng: np.where(t < 400, 1.0, 25)),
}


@pytest.mark.parametrize("curve", BLOW_UPS)
def test_blow_ups_are_found_and_not_before_they_begin(curve: str) -> None:
    """Every clear divergence fires, after `patience` bad steps or soon after."""
    begin, losses_of = BLOW_UPS[curve]
    t = np.arange(STEPS, dtype=np.float64)
    for seed in range(5):
        with np.errstate(over="ignore"):
            steps = fired(losses_of(t, np.random.default_rng(seed)).tolist())
        assert steps, f"seed {seed}"
        assert begin + 19 <= steps[0] <= begin + 45, f"seed {seed}"


@given(patience=st.integers(2, 30), value=st.sampled_from([1e3, 1e30, *BAD]), spikes=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_spike_that_recovers_starts_the_count_again(patience: int, value: float, spikes: int) -> None:
    """Spikes one step shorter than the patience never fire, whatever is in them; one step more does."""
    run = [1.0] * 30
    for _ in range(spikes):
        run += [value] * (patience - 1) + [1.0]
    assert fired(run, Divergence(patience)) == []
    assert fired([*run, *[value] * patience], Divergence(patience)) == [len(run) + patience - 1]


def test_a_divergence_does_not_move_its_own_band() -> None:
    """Losses outside the band leave its end where it was, however many they are."""
    rule = Divergence(window=20)
    fired([1.0] * 30, rule)
    for step in range(30, 200):
        rule.update(step, {LOSS: 13.0 + step}, {})
        assert rule.limit == 11.0


def test_the_band_has_its_centre_at_the_start_or_the_usual_loss_whichever_is_higher() -> None:
    """A loss that has settled above its start is measured against where it settled, one below against its start."""
    for settled, limit in ((1.9, 7.6), (0.1, 4.0)):
        rule = Divergence(window=10, min_rise=0.0)
        fired([1.0] * 20 + [settled] * 20, rule)
        assert rule.limit == pytest.approx(limit)


def test_the_band_begins_after_twenty_finite_losses() -> None:
    """Before them there is no limit and nothing to say; a step without a loss and a NaN are none of them."""
    rule = Divergence(patience=1)
    assert rule.update(0, {"stop/grad_norm": 1e9}, {}) is None
    assert fired([math.nan, math.inf, 1e9] + [1.0] * 18, rule) == [] and math.isnan(rule.limit)
    assert fired([1.0, 1.0], rule) == [] and rule.limit == 11.0


def test_steps_without_a_loss_do_not_count() -> None:
    """The patience counts losses: empty steps neither fire nor reset."""
    rule = Divergence(patience=3)
    fired([1.0] * 20, rule)
    verdicts = [rule.update(step, {LOSS: 50.0} if step % 3 == 2 else {}, {}) for step in range(20, 29)]
    assert [v.step for v in verdicts if v] == [26]  # losses at 20, 23 and 26


@pytest.mark.parametrize("rate", [1.02, 1.04, 1.1])
def test_a_slow_rise_cannot_take_the_band_along(rate: float) -> None:
    """An exponential rise is found once it is ten times min_rise above its beginning, however slow it is."""
    steps = fired([2.3 * rate**t for t in range(400)])
    assert steps and steps[0] <= math.log(1 + 100 / 2.3) / math.log(rate) + 23


def test_a_loss_that_comes_back_is_given_time() -> None:
    """Far outside but falling: no verdict; once it stays where it is, there is one."""
    falling = [1.0] * 50 + [1e6 * 0.9**t for t in range(60)]
    assert fired(falling) == []
    (first, *_) = fired([*falling, *[falling[-1]] * 40])
    assert len(falling) < first < len(falling) + 20


@pytest.mark.parametrize("min_rise", [0.0, 1e-3, 1.0, 50.0])
def test_a_rise_below_min_rise_does_not_matter(min_rise: float) -> None:
    """The band reaches at least min_rise above its centre."""
    rule = Divergence(patience=3, min_rise=min_rise)
    fired([0.0] * 21, rule)
    assert rule.limit == min_rise
    assert fired([min_rise + 1e-6] * 3, rule) == [2]
    assert fired([0.0] * 20 + [min_rise] * 10, Divergence(patience=3, min_rise=min_rise)) == []


def test_an_equal_loss_is_inside() -> None:
    """The limit itself is still allowed."""
    assert fired([1.0] * 20 + [11.0] * 10, Divergence(patience=1)) == []
    assert fired([1.0] * 20 + [11.0 + 1e-9], Divergence(patience=1)) == [20]


def test_the_verdict_explains_itself() -> None:
    """The reason has the loss, the limit, how long, the start and the usual value; the evidence has the steps."""
    rule = Divergence(patience=3)
    losses = [2.5] * 20 + [0.5] * 30 + [18.0, 19.0, 20.0]
    verdict = next(v for v in (rule.update(s, {LOSS: x}, {}) for s, x in enumerate(losses)) if v)
    assert verdict.rule == "divergence" and verdict.step == 52
    assert verdict.reason == (
        "The loss is 20 at step 52 and has been above 12.5 for 3 steps; it began at 2.5 and its usual value was 0.5."
    )
    assert "Lower the learning rate" in verdict.advice
    assert verdict.evidence == {LOSS: list(enumerate(losses))[-EVIDENCE_LENGTH:]}
    assert verdict.weights_suspect


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "patience=0 must be a whole number, 1 or more."),
        ({"window": -3}, "window=-3 must be a whole number, 1 or more."),
        ({"patience": "a"}, "patience='a' must be a whole number, 1 or more."),
        ({"k": 0.0}, "k=0.0 must be a number above 0; 6 is the default, less is stricter."),
        ({"k": math.nan}, "k=nan must be a number above 0; 6 is the default, less is stricter."),
        ({"min_rise": -1.0}, "min_rise=-1.0 must be a number, 0 or more; 0 turns it off."),
    ],
)
def test_bad_arguments_say_their_bound(arguments: dict[str, Any], message: str) -> None:
    """An error names the argument, its value and the bound."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Divergence(**arguments)
