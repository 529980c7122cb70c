"""Sharpness, and the critical learning rate in the words of three rules: what is found, and what is left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest

from dynwatch.rules import Divergence, GradientExplosion, NonFinite, Outcome, Rule, Sharpness, replay_readings
from dynwatch.rules.critical_lr import EDGE, CriticalRate
from dynwatch.rules.sharpness import LossesSince

LOSS, GRADIENT, LR = "stop/loss", "stop/grad_norm", "stop/lr"
RATIO, CRITICAL = "hessian/sharpness_ratio", "hessian/critical_lr"
STEPS = 600


def fired(rule: Rule, losses: Sequence[float] | np.ndarray, at: Iterable[int], ratio: float = 2.0) -> list[int]:
    """The steps at which a rule fires, with a loss at each step and a ratio at some."""
    sharp = set(at)
    found = []
    for step, loss in enumerate(losses):
        readings = {LOSS: float(loss), **({RATIO: ratio} if step in sharp else {})}
        if rule.update(step, readings, {}):
            found.append(step)
    return found


def every(spacing: int, steps: int = STEPS) -> range:
    return range(0, steps, spacing)


RISING = 0.2 * 1.02 ** np.arange(STEPS)

# --- Sharpness: what is left alone

HEALTHY: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "falling": lambda t, rng: 0.2 + 2 * np.exp(-t / 100),
    "falling in noise": lambda t, rng: 0.2 + 2 * np.exp(-t / 100) + 0.3 * rng.normal(size=STEPS),
    "constant": lambda t, rng: np.full(STEPS, 0.7),
    "zero": lambda t, rng: np.zeros(STEPS),
    "flat in noise": lambda t, rng: 1 + 0.3 * rng.normal(size=STEPS),
    "flat in small noise": lambda t, rng: 1 + 1e-6 * rng.normal(size=STEPS),
    "infinite variance": lambda t, rng: np.abs(rng.standard_t(1.8, STEPS)),
    "negative": lambda t, rng: -3 + 0.2 * rng.normal(size=STEPS),
    "oscillates at the edge": lambda t, rng: np.exp(-t / 200) * (1 + 0.5 * (-1) ** t),
    "swings slowly": lambda t, rng: 1 + 0.02 * np.sin(t / 60) + 0.1 * rng.normal(size=STEPS),
    "rises by less than a tenth": lambda t, rng: 1 + 0.09 * t / STEPS,
    "rises within its noise": lambda t, rng: 1 + 0.3 * t / STEPS + 0.3 * rng.normal(size=STEPS),
    "one loss": lambda t, rng: np.ones(1),
    "none that is finite": lambda t, rng: np.where(t % 2, np.nan, np.inf),
}


@pytest.mark.parametrize("course", HEALTHY)
@pytest.mark.parametrize("spacing", [1, 7, 50, 100])
def test_a_ratio_above_one_alone_is_healthy(course: str, spacing: int) -> None:
    """No seed of a loss that does not rise makes the rule fire, however large the ratio is at every reading."""
    t = np.arange(STEPS, dtype=np.float64)
    for seed in range(8):
        losses = HEALTHY[course](t, np.random.default_rng(seed))
        assert fired(Sharpness(), losses, every(spacing), ratio=10.0) == [], f"seed {seed}"


def test_a_catapult_is_told_only_while_it_rises() -> None:
    """A loss that a large rate throws up and that comes down by itself: not at sparse readings, nor on its way down."""
    t = np.arange(STEPS)
    losses = np.exp(-t / 300) + 5 * np.exp(-(((t - 130) / 12) ** 2))
    assert fired(Sharpness(), losses, every(50)) == fired(Sharpness(), losses, every(100)) == []
    for spacing in (1, 7):
        found = fired(Sharpness(), losses, every(spacing))
        assert found and 100 < found[0] <= found[-1] <= 140


def test_a_rising_loss_alone_is_no_matter_of_curvature() -> None:
    """Up to the margin, which is still allowed, and without readings it never fires."""
    for ratio in (0.0, 0.5, 1.0, EDGE):
        assert fired(Sharpness(), RISING, every(50), ratio) == []
    assert fired(Sharpness(), RISING, []) == []
    assert fired(Sharpness(margin=1.0), RISING, every(50), 1.01) != []


# --- Sharpness: what is found


@pytest.mark.parametrize("patience", [2, 3, 5])
@pytest.mark.parametrize("spacing", [10, 37, 100])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_it_fires_at_the_last_of_patience_readings(patience: int, spacing: int, scale: float) -> None:
    """And at every reading after it, whatever the loss's unit."""
    found = fired(Sharpness(patience), scale * RISING, every(spacing))
    assert found == list(range((patience - 1) * spacing, STEPS, spacing))


@pytest.mark.parametrize(
    "losses",
    [0.3 + 0.002 * np.arange(STEPS), RISING, -5 + 0.02 * np.arange(STEPS), np.exp(1e-4 * np.arange(STEPS) ** 2)],
    ids=["linear", "exponential", "from below zero", "faster than exponential"],
)
def test_a_rise_is_told_from_its_noise(losses: np.ndarray) -> None:
    """With noise of a tenth of the whole rise within 300 steps, and with a NaN at every third step, it is found."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        noisy = losses + 0.1 * (losses[300] - losses[0]) * rng.normal(size=STEPS)
        noisy[::3] = math.nan
        found = fired(Sharpness(), noisy, every(100))
        assert found and found[0] <= 400, f"seed {seed}"


def test_a_run_that_blows_up_after_a_long_stay_at_the_edge_is_found() -> None:
    """The trend is that of the last readings' stretch, so that what fell long before does not hide a rise."""
    losses = np.concatenate([0.2 + 2 * np.exp(-np.arange(3000) / 300), 0.2 * 1.01 ** np.arange(STEPS)])
    found = fired(Sharpness(), losses, every(50, len(losses)))
    assert found and 3000 < found[0] <= 3150


def test_readings_at_every_step_wait_for_enough_losses() -> None:
    """Three readings in a row are no stretch of losses; after twenty losses there is one."""
    assert fired(Sharpness(), 0.2 * 1.1 ** np.arange(60), range(60))[0] == 20


def test_one_reading_within_the_margin_begins_anew() -> None:
    """Two above and one at 1, again and again, never fires, although the loss rises all the time."""
    rule = Sharpness()
    for step, loss in enumerate(RISING):
        readings = {LOSS: loss} | ({RATIO: 1.0 if step % 60 == 40 else 3.0} if step % 20 == 0 else {})
        assert rule.update(step, readings, {}) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_ratio_that_is_not_finite_is_no_reading(value: float) -> None:
    """It neither counts nor begins anew."""
    rule, found = Sharpness(), []
    for step, loss in enumerate(RISING):
        readings = {LOSS: loss} | ({RATIO: 2.0} if step % 20 == 0 else {RATIO: value} if step % 20 == 7 else {})
        if rule.update(step, readings, {}):
            found.append(step)
    assert found == list(range(40, STEPS, 20))


# --- Sharpness: readings far apart


def test_stale_readings_do_not_count() -> None:
    """Twice the usual distance is near enough; a step more, and the reading is the first of a new row."""
    steady = [0, 20, 40, 60]
    assert fired(Sharpness(5), RISING, [*steady, 100]) == [100]
    assert fired(Sharpness(5), RISING, [*steady, 101]) == []
    assert fired(Sharpness(3), RISING, [*steady, 201, 221]) == [40, 60]
    assert fired(Sharpness(3), RISING, [*steady, 201, 221, 241])[-1] == 241


def test_readings_whose_distance_doubles_are_not_stale() -> None:
    """A cadence that thins out as 10, 20, 40, … is a usual one."""
    assert fired(Sharpness(), RISING, [10, 20, 40, 80, 160, 320]) == [40, 80, 160, 320]


# --- Sharpness: words


def explained(**known: float) -> tuple[str, str]:
    """Reason and advice of the first verdict of a rising loss, with whatever else is known at each reading."""
    rule = Sharpness()
    for step in range(200):
        readings = {LOSS: 0.2 + 0.002 * step} | ({RATIO: 2.1, **known} if step % 50 == 0 else {})
        verdict = rule.update(step, readings, {})
        if verdict:
            assert not verdict.weights_suspect
            assert verdict.evidence == {RATIO: [(0, 2.1), (50, 2.1), (100, 2.1)]}
            return verdict.reason, verdict.advice
    raise AssertionError("no verdict")


def test_the_verdict_says_by_how_much() -> None:
    """Ratio, margin, readings in a row, the loss's way, and both learning rates."""
    reason, advice = explained(**{LR: 0.3, CRITICAL: 0.14})
    assert reason == (
        "The sharpness is 2.1 times what the optimizer bears at its learning rate at step 100, above 1.5 at 3 readings "
        "in a row, and the loss has risen from 0.233 to 0.369 since step 0."
    )
    assert advice.startswith(
        "The learning rate 0.3 was 2.1 times the critical rate 0.14 (hessian/critical_lr at step 100): set it below "
        "0.14. A longer warm-up"
    )


@pytest.mark.parametrize(
    ("known", "advice"),
    [
        ({}, "Divide the learning rate by 2.1 or more. A longer"),
        ({LR: 0.3}, "Divide the learning rate by 2.1 or more. A longer"),
        ({CRITICAL: 0.14}, "The critical learning rate was 0.14 (hessian/critical_lr at step 100): keep the learning"),
        ({LR: 0.16, CRITICAL: 0.14}, "The learning rate 0.16 was 1.1 times the critical rate 0.14 ("),
        ({LR: 0.1, CRITICAL: 0.14}, "Divide the learning rate by 2.1 or more. A longer"),
    ],
)
def test_the_advice_uses_what_is_known(known: dict[str, float], advice: str) -> None:
    """Without rates the ratio tells the factor; what would excuse the rate is not said by a rule that blames it."""
    assert explained(**known)[1].startswith(advice)


def test_the_advice_quotes_what_the_run_would_have_borne() -> None:
    """A ramped rate that passes 1.1 and blows up: the rate of then, not that of the sharp place it came to."""
    rule, verdict = Sharpness(), None
    readings = {100: (1.72, 1.1), 120: (1.8, 0.9), 140: (2.1, 0.44)}
    for step in range(100, 141):
        lr, critical = readings.get(step, (1.7, None))
        sharp = {RATIO: lr / critical, CRITICAL: critical} if critical else {}
        verdict = rule.update(step, {LOSS: 0.2 + 0.05 * (step - 100), LR: lr, **sharp}, {})
    assert verdict is not None and verdict.step == 140
    assert verdict.advice.startswith(
        "The learning rate 2.1 was 1.9 times the critical rate 1.1 (hessian/critical_lr at step 100): set it below 1.1."
    )


@pytest.mark.parametrize(("patience", "quoted"), [(2, 0.3), (3, 0.5), (4, 0.7)])
def test_as_many_critical_rates_are_kept_as_its_patience(patience: int, quoted: float) -> None:
    """Those before the readings that made it fire are not quoted."""
    rule, critical = Sharpness(patience), iter([0.9, 0.7, 0.5, 0.3, 0.1])
    for step in range(81):
        sharp = {RATIO: 4.0, CRITICAL: next(critical)} if step % 20 == 0 else {}
        verdict = rule.update(step, {LOSS: 0.2 + 0.02 * step, LR: 2.0, **sharp}, {})
    assert verdict is not None and f"set it below {quoted:g}. " in verdict.advice


# --- LossesSince


def test_moments_lie_ten_losses_apart() -> None:
    """A moment that comes earlier is none, and with too few moments or losses there is not enough."""
    losses = LossesSince(moments=2)
    assert (losses.first, losses.blocks, losses.enough) == (None, [], False)
    seen = []
    for step in range(45):
        losses.begin(step)
        losses.add(float(step))
        seen.append((losses.first, losses.enough))
    assert [seen[i] for i in (0, 9, 10, 18, 19, 20, 29)] == [
        (0, False),
        (0, False),
        (0, False),
        (0, False),
        (0, True),
        (10, False),
        (10, True),
    ]
    assert losses.blocks == [float(step) for step in range(30, 45)]


# --- the critical rate


@pytest.mark.parametrize("age", [0, 1, 500, 501])
@pytest.mark.parametrize("step", [0, 400])
def test_a_reading_is_near_for_500_steps(step: int, age: int) -> None:
    """After that nothing is said of it."""
    critical = CriticalRate()
    critical.take(step, {CRITICAL: 0.1, LR: 1.0})
    assert critical.near(step + age) == (0.1 if age <= 500 else None)
    assert bool(critical.words(step + age)) == (age <= 500)


def test_a_sparse_reading_is_near_for_its_last_distance() -> None:
    """If the last two lay 2000 steps apart, the newest is quoted for 2000 steps."""
    critical = CriticalRate()
    critical.take(1000, {CRITICAL: 0.1})
    critical.take(3000, {CRITICAL: 0.2})
    assert (critical.near(5000), critical.near(5001)) == (0.2, None)


def test_nothing_is_said_before_the_first_reading() -> None:
    """At step 0, which is near to an unset step, too."""
    critical = CriticalRate()
    critical.take(0, {LR: 0.1})
    assert (critical.near(0), critical.words(0)) == (None, "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_a_rate_that_is_none_does_not_replace_one(value: float) -> None:
    """Neither as the critical one nor, if not finite, as the learning rate."""
    critical = CriticalRate()
    critical.take(1, {CRITICAL: 0.1, LR: 1.0})
    critical.take(2, {CRITICAL: value})
    critical.take(2, {LR: value})
    assert critical.words(3).startswith(
        "The learning rate 1 was 10 times the critical rate 0.1 (hessian/critical_lr at"
    )


def test_the_largest_rate_since_the_reading_is_compared() -> None:
    """A warm-up goes on after it, a decay does not excuse, and what was before it does not count."""
    critical = CriticalRate()
    for step, lr in enumerate([9.0, 0.1, 0.4, 0.2]):
        critical.take(step, {LR: lr, **({CRITICAL: 0.2} if step == 1 else {})})
    assert critical.words(3).startswith("The learning rate 0.4 was 2 times the critical rate 0.2 ")


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        (0.5, "was 14 times the critical rate 0.036 (hessian/critical_lr at step 7): set it below 0.036. "),
        (0.037, "was 1 times the critical rate 0.036 (hessian/critical_lr at step 7), as in many healthy runs; a "),
        (0.036, "Curvature is not the cause as measured: the learning rate 0.036 was below the critical rate 0.036 ("),
        (1e-10, "Curvature is not the cause as measured: the learning rate 1e-10 was below the critical rate 0.036 ("),
        (0.0, "Curvature is not the cause as measured: "),
        (1e15, "was 2.8e+16 times the critical rate 0.036 "),
    ],
)
def test_a_rate_is_blamed_only_above_the_edge(lr: float, words: str) -> None:
    """Below the critical rate curvature is excused, and little above it runs are healthy too."""
    critical = CriticalRate()
    critical.take(7, {LR: lr, CRITICAL: 0.036})
    assert words in critical.words(9) and critical.words(9).endswith(". ")


def test_what_was_measured_in_a_blow_up_replaces_nothing_near() -> None:
    """Where a rule sees trouble, a newer reading counts only if none is near."""
    critical = CriticalRate()
    critical.take(10, {CRITICAL: 0.1})
    critical.take(400, {CRITICAL: 7.0}, calm=False)
    assert critical.near(500) == 0.1
    critical.take(511, {CRITICAL: 8.0}, calm=False)
    assert critical.near(511) == 8.0
    fresh = CriticalRate()
    fresh.take(3, {CRITICAL: 9.0}, calm=False)
    assert fresh.near(3) == 9.0


@pytest.mark.parametrize(
    ("rates", "lr", "words"),
    [
        ([1.1, 0.9, 0.1], 2.0, "was 1.8 times the critical rate 1.1 (hessian/critical_lr at step 0): set it below 1.1"),
        ([1.1, 0.9, 0.1], 1.0, "was 1.1 times the critical rate 0.9 (hessian/critical_lr at step 10): set it below"),
        ([1.1, 0.9, 0.1], 0.5, "was 5 times the critical rate 0.1 (hessian/critical_lr at step 20): set it below 0.1"),
        ([0.2, 0.2, 0.2], 0.5, "critical rate 0.2 (hessian/critical_lr at step 20): set it below 0.2. "),
        ([9.0, 0.1, 0.1, 0.1], 20.0, "critical rate 0.1 (hessian/critical_lr at step 30): set it below 0.1. "),
        ([0.1, 0.1, 1.1], 0.5, "Curvature is not the cause as measured: the learning rate 0.5 was below the critical"),
        ([0.1, 1.1, 0.45], 0.5, "critical rate 0.45 (hessian/critical_lr at step 20), as in many healthy runs"),
    ],
)
def test_the_newest_blames_and_the_largest_exceeded_is_advised(rates: list[float], lr: float, words: str) -> None:
    """What the learning rate stayed below bounds nothing, and only the last three readings count."""
    critical = CriticalRate()
    for i, rate in enumerate(rates):
        critical.take(10 * i, {CRITICAL: rate, LR: lr})
    assert words in critical.words(40)


def test_readings_of_another_time_are_not_advised() -> None:
    """One that lies further back than the distance of the readings explains is of another phase of the run."""
    critical = CriticalRate()
    for step, rate in [(0, 5.0), (5000, 0.2), (5010, 0.1)]:
        critical.take(step, {CRITICAL: rate, LR: 10.0})
    assert "set it below 0.2. " in critical.words(5020)


def test_the_largest_of_the_last_is_told_without_a_learning_rate() -> None:
    """Whoever knows the rate can compare it."""
    critical = CriticalRate()
    for step, rate in enumerate([0.5, 0.7, 0.1]):
        critical.take(step, {CRITICAL: rate})
    assert critical.words(3).startswith("The critical learning rate was 0.7 (hessian/critical_lr at step 1): keep")


def test_the_critical_rate_is_restored() -> None:
    """Through JSON at every step, with the same words ever after."""
    stream = [{LR: 0.1 * step, **({CRITICAL: 0.3 + step} if step % 3 == 1 else {})} for step in range(12)]
    for cut in range(len(stream)):
        whole, part = CriticalRate(), CriticalRate()
        for step, readings in enumerate(stream):
            if step == cut:
                state = json.loads(json.dumps(part.state_dict()))
                part = CriticalRate()
                part.load_state_dict(state)
            whole.take(step, readings)
            part.take(step, readings)
        assert whole.state_dict() == part.state_dict()
        assert [whole.words(step) for step in (11, 400, 900)] == [part.words(step) for step in (11, 400, 900)]


# --- the critical rate in the words of Divergence and GradientExplosion


def blown_up(kind: type[Rule], critical: float | None, after: float | None = None, lr: float = 0.5) -> Outcome:
    """A replay in which the loss and the gradient jump at step 420, with curvature at step 400 and perhaps at 421."""
    steps = range(450)
    curves = {
        LOSS: [(step, 2.0 if step < 420 else 900.0) for step in steps],
        GRADIENT: [(step, 2.0 if step < 420 else 9e5) for step in steps],
        LR: [(step, lr) for step in steps],
    }
    values = {400: critical, 421: after}
    curves[CRITICAL] = [(step, value) for step, value in values.items() if value is not None]
    (outcome,) = replay_readings({tag: curve for tag, curve in curves.items() if curve}, [kind()])
    return outcome


both = pytest.mark.parametrize("kind", [Divergence, GradientExplosion])


@both
def test_verdicts_quote_the_critical_rate(kind: type[Rule]) -> None:
    """Also in a replay, and first of all that they advise; the rest of the advice is as without it."""
    plain, quoted = blown_up(kind, None).verdict, blown_up(kind, 0.036).verdict
    assert plain is not None and quoted is not None
    words = "The learning rate 0.5 was 14 times the critical rate 0.036 (hessian/critical_lr at step 400): set it below"
    assert quoted.advice == f"{words} 0.036. {plain.advice}"
    assert "critical" not in plain.advice
    assert (quoted.reason, quoted.evidence) == (plain.reason, plain.evidence)


@both
def test_a_rate_below_the_critical_one_is_not_blamed(kind: type[Rule]) -> None:
    """The advice says so, and where to look."""
    verdict = blown_up(kind, 0.036, lr=0.01).verdict
    assert verdict is not None and verdict.advice.startswith(
        "Curvature is not the cause as measured: the learning rate 0.01 was below the critical rate 0.036 "
        "(hessian/critical_lr at step 400); look at the data of these steps first. "
    )


@both
def test_the_reading_of_before_the_blow_up_is_quoted(kind: type[Rule]) -> None:
    """A net that has blown up is often flat, which must not excuse the rate that brought it there."""
    verdict = blown_up(kind, 0.036, after=50.0).verdict
    assert (
        verdict is not None and "14 times the critical rate 0.036 (hessian/critical_lr at step 400)" in verdict.advice
    )
    verdict = blown_up(kind, None, after=0.1).verdict
    assert verdict is not None and "critical rate 0.1 (hessian/critical_lr at step 421)" in verdict.advice


@both
def test_the_critical_rate_survives_a_resume(kind: type[Rule]) -> None:
    """Stopped between the reading and the blow-up, the restored rule still quotes it."""
    first, second = kind(), kind()
    for step in range(100):
        first.update(step, {LOSS: 2.0, GRADIENT: 2.0, LR: 0.5, **({CRITICAL: 0.1} if step == 60 else {})}, {})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    verdicts = [second.update(100 + i, {LOSS: 900.0, GRADIENT: 9e5}, {}) for i in range(30)]
    assert verdicts[-1] is not None and "5 times the critical rate 0.1 " in verdicts[-1].advice


@both
def test_a_reading_inside_the_blow_up_is_not_advised(kind: type[Rule]) -> None:
    """One that comes while the loss and the gradient rise, but lie within their usual bounds still."""
    rule, verdict = kind(), None
    for step in range(120):
        curvature = {60: 0.2, 80: 0.18, 99: 0.001}.get(step)
        risen = {LOSS: 900.0, GRADIENT: 9e5} if step > 99 else {LOSS: 2.0, GRADIENT: 2.0}
        sharp = {CRITICAL: curvature} if curvature else {}
        verdict = rule.update(step, {LR: 0.5, **risen, **sharp}, {}) or verdict
    assert verdict is not None and "set it below 0.2. " in verdict.advice


@pytest.mark.parametrize("bad", [{LOSS: math.nan}, {LOSS: math.inf}, {GRADIENT: math.nan}, {LOSS: -math.inf}])
def test_a_loss_or_gradient_that_is_not_finite_quotes_the_critical_rate(bad: dict[str, float]) -> None:
    """With the words of the other rules, also after a resume; without a reading the advice is as it was."""
    advice = {}
    for critical in (0.1, None):
        first, second = NonFinite(), NonFinite()
        for step in range(20):
            sharp = {CRITICAL: critical} if critical and step == 9 else {}
            assert first.update(step, {LOSS: 1.0, GRADIENT: 1.0, LR: 0.5, **sharp}, {}) is None
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        verdicts = [rule.update(20, {LOSS: 1.0, GRADIENT: 1.0, LR: 0.5} | bad, {}) for rule in (first, second)]
        assert verdicts[0] is not None and verdicts[0] == verdicts[1]
        advice[critical] = verdicts[0].advice
    words = (
        "The learning rate 0.5 was 5 times the critical rate 0.1 (hessian/critical_lr at step 9): set it below 0.1. "
    )
    assert advice[0.1].count(words) == 1 and advice[0.1].replace(words, "") == advice[None]


def test_non_finite_weights_quote_no_rate() -> None:
    """They are told once, at the end, wherever they come from."""
    rule = NonFinite()
    rule.update(0, {CRITICAL: 0.1, LR: 0.5}, {})
    verdict = rule.update(1, {"stop/weight_norm": math.nan}, {})
    assert verdict is not None and "critical" not in verdict.advice


def test_curvature_alone_is_nothing_that_non_finite_judges() -> None:
    """A log with rates only passes for one with nothing to read, and one with gradients alone for one with some."""
    (blind,) = replay_readings({CRITICAL: [(0, 0.1)], LR: [(0, 0.1)]}, [NonFinite()])
    assert blind.nothing_to_read and CRITICAL in blind.reads and CRITICAL not in blind.missing
    (sees,) = replay_readings({GRADIENT: [(0, 1.0)]}, [NonFinite()])
    assert not sees.nothing_to_read
    assert not {CRITICAL, LR} & {*sees.missing, *NonFinite().judges}


@both
def test_curvature_alone_is_nothing_to_judge(kind: type[Rule]) -> None:
    """A log with it but without what the rule needs is told as one with nothing to read, and one without is whole."""
    (blind,) = replay_readings({CRITICAL: [(0, 0.1)], LR: [(0, 0.1)]}, [kind()])
    assert blind.nothing_to_read and blind.missing == kind.needs
    (sees,) = replay_readings({LOSS: [(0, 1.0)], GRADIENT: [(0, 1.0)]}, [kind()])
    assert not sees.nothing_to_read and sees.missing == ()
    assert CRITICAL in kind.reads


def test_sharpness_without_curvature_has_nothing_to_read() -> None:
    """A log with losses and rates only does not pass for one that the rule was content with."""
    (blind,) = replay_readings({LOSS: [(0, 1.0)], LR: [(0, 0.1)]}, [Sharpness()])
    assert blind.nothing_to_read and blind.missing == (RATIO,)
    (sees,) = replay_readings({LOSS: [(0, 1.0)], RATIO: [(0, 0.1)]}, [Sharpness()])
    assert not sees.nothing_to_read and sees.missing == ()
