"""The rules that warn about a loss: what they find, at which step, and which healthy curves they leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from dynwatch.rules import LossSpike, NoLearning, Overfitting, Plateau, Rule

LOSS, VAL_LOSS, LR, LR_LOW, PROGRESS = "stop/loss", "stop/val_loss", "stop/lr", "stop/lr_low", "stop/progress"
STEPS = 1200
Curve = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def fired(
    rule: Rule, losses: Sequence[float] | np.ndarray, more: Callable[[int], Mapping[str, float]] = lambda step: {}
) -> list[int]:
    """The steps at which a rule fires, fed with losses and whatever `more` says of a step."""
    return [s for s, loss in enumerate(losses) if rule.update(s, {LOSS: float(loss), **more(s)}, {})]


def of(steps: int) -> Callable[[int], Mapping[str, float]]:
    """Progress in a run of so many steps."""
    return lambda step: {PROGRESS: step / steps}


def decay(t: np.ndarray, begin: float = 0.0) -> np.ndarray:
    return 0.2 + 2.1 * np.exp(-np.maximum(t - begin, 0) / 150)


def curves(curve: Curve, seeds: int) -> list[list[float]]:
    """The curve with several seeds."""
    t = np.arange(STEPS, dtype=np.float64)
    return [curve(t, np.random.default_rng(seed)).tolist() for seed in range(seeds)]


def noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    return sigma * rng.normal(size=STEPS)


# Curves in which nothing is wrong for LossSpike and NoLearning; none of them stands where it began.
HEALTHY: dict[str, Curve] = {
    "large batches": lambda t, rng: decay(t) + noise(rng, 0.005),
    "small batches": lambda t, rng: decay(t) * np.exp(noise(rng, 0.8) - 0.32),
    "single examples, skewed": lambda t, rng: decay(t) * rng.normal(size=STEPS) ** 2,
    "infinite variance": lambda t, rng: np.abs(decay(t) + 0.3 * np.clip(rng.standard_t(1.8, STEPS), -50, 50)),
    "warm-up without effect": lambda t, rng: decay(t, begin=100) + noise(rng, 0.02),
    "warm-up bump": lambda t, rng: decay(t) + 0.8 * np.exp(-(((t - 60) / 40) ** 2)) + noise(rng, 0.02),
    "cyclic learning rate": lambda t, rng: decay(t) * (1 + 0.6 * np.sin(t / 40) ** 2) + noise(rng, 0.05),
    "warm restarts": lambda t, rng: 0.3 + 2 * np.exp(-(t % 300) / 60 - t / 1000) + noise(rng, 0.05),
    "spikes that recover": lambda t, rng: decay(t) + 3.0 * ((t % 200 > 150) & (t % 200 < 180)) + noise(rng, 0.02),
    "a spike that recovers slowly": lambda t, rng: decay(t) + 3 * (t > 700) * np.exp(-(t - 700) / 40),
    "negative log-density": lambda t, rng: -3 * (1 - np.exp(-t / 100)) + noise(rng, 0.2),
    "a power law": lambda t, rng: 2 + 8 * (t + 1) ** -0.3 + noise(rng, 0.02),
    "linear": lambda t, rng: 2.3 - 1.5 * t / STEPS + noise(rng, 0.1),
    "fast, then flat in noise": lambda t, rng: 1 + np.exp(-t / 60) + noise(rng, 0.5),
}


@pytest.mark.parametrize("curve", HEALTHY)
@pytest.mark.parametrize("kind", [LossSpike, NoLearning])
def test_healthy_curves_are_left_alone(kind: type[Rule], curve: str) -> None:
    """No seed of a curve that learns, and keeps what it learns, makes these rules fire."""
    for seed, losses in enumerate(curves(HEALTHY[curve], 8)):
        assert fired(kind(), losses, of(STEPS)) == [], f"seed {seed}"


# --- LossSpike


@pytest.mark.parametrize("patience", [1, 10, 50])
@pytest.mark.parametrize("height", [1.36, 2.3, 9.0, math.inf, math.nan])
def test_a_jump_that_stays_is_found_after_its_patience(patience: int, height: float) -> None:
    """At the last of `patience` losses above half of the way back from 0.4 to 2.3, which is 1.35."""
    run = [2.3] * 20 + [0.4] * 60
    assert fired(LossSpike(patience), run + [height] * 60)[0] == 80 + patience - 1
    assert fired(LossSpike(patience), run + [1.34] * 200) == []


def test_a_jump_that_recovers_is_left_alone() -> None:
    """One loss inside begins the count anew; a loss that falls has time, and where it stops too high it is found."""
    run = [2.3] * 20 + [0.4] * 60
    assert fired(LossSpike(), run + ([2.2] * 49 + [0.4]) * 5) == []
    falling = [0.4 + 4 * 0.99**i for i in range(140)]
    assert falling[-1] > 1.35 and fired(LossSpike(), run + falling) == []
    (first, *_) = fired(LossSpike(), [*run, *falling, *[falling[-1]] * 60])
    assert 80 + 140 < first < 80 + 140 + 50


@pytest.mark.parametrize("lost", [0.2, 1.0])
def test_how_much_must_be_lost_is_an_argument(lost: float) -> None:
    """The limit lies at that share of the way from the best level to the start."""
    run = [2.0] * 20 + [1.0] * 60
    assert fired(LossSpike(lost=lost), run + [1.0 + lost - 0.01] * 100) == []
    assert fired(LossSpike(lost=lost), run + [1.0 + lost + 0.01] * 100)[0] == 80 + 49


def test_noise_widens_the_limit() -> None:
    """A rise within six robust sigmas of the last losses is none, however much of the gain it is."""
    run = [1.2] * 20 + [0.9, 1.1] * 40
    assert fired(LossSpike(patience=5), run + ([1.0 + 6 * 1.4826 * 0.1 - 0.01] * 5 + [0.9, 1.1] * 10) * 5) == []
    assert fired(LossSpike(patience=5), run + [1.0 + 6 * 1.4826 * 0.1 + 0.01] * 5) == [104]


# --- NoLearning


def asked(steps: int, share: float = 0.25, least: int = 50) -> int:
    """The first step that completes a block when the share is spent; blocks are doubled so that 32 span the run."""
    for step in range(max(math.ceil(share * steps), least - 1), steps):
        length = 1
        while (step + 1) // length > 32:
            length *= 2
        if (step + 1) % length == 0:
            return step
    raise AssertionError("no block is completed")


NOT_LEARNING: dict[str, Curve] = {
    "small noise": lambda t, rng: 2.3 + noise(rng, 0.01),
    "large noise": lambda t, rng: 2.3 + noise(rng, 1.0),
    "no noise": lambda t, rng: np.full(STEPS, 0.7),
    "rising": lambda t, rng: 2.3 + t / STEPS + noise(rng, 0.1),
    "an oscillation, as in a GAN": lambda t, rng: 1.4 + 0.1 * np.sin(t / 7) + noise(rng, 0.1),
    "spikes": lambda t, rng: 2.3 + noise(rng, 0.05) + 1e6 * (t % 90 == 7),
    "negative": lambda t, rng: -5 + noise(rng, 0.3),
    "hardly fallen": lambda t, rng: 2.3 - 0.01 * t / STEPS,
    "a long plateau before grokking": lambda t, rng: np.where(t < 1000, 2.3, 0.1) + noise(rng, 0.01),
}


@pytest.mark.parametrize("curve", NOT_LEARNING)
def test_a_loss_that_stays_at_its_start_is_found_when_the_share_is_spent(curve: str) -> None:
    """At the very first step at which it can be told, with at most one in ten seeds later or never."""
    found = [fired(NoLearning(), losses, of(STEPS))[:1] for losses in curves(NOT_LEARNING[curve], 20)]
    assert all(steps == [] or steps[0] >= asked(STEPS) for steps in found)
    assert found.count([asked(STEPS)]) >= 18


@pytest.mark.parametrize("steps", [60, 200, 1000, 3000])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.8])
def test_the_share_and_the_least_number_of_readings_are_waited_for(steps: int, share: float) -> None:
    """Whatever the length of the run, the first verdict is at the end of the first block after both."""
    losses = [2.3 + 0.01 * (step % 3) for step in range(steps)]
    assert fired(NoLearning(share=share), losses, of(steps))[0] == asked(steps, share)


@pytest.mark.parametrize(("without_budget", "step"), [(2000, 2047), (64, 63), (100, 99), (101, 103)])
def test_without_a_budget_a_number_of_losses_is_waited_for(without_budget: int, step: int) -> None:
    """Then the first block that ends at or after it decides, and the reason counts steps."""
    rule = NoLearning(without_budget=without_budget)
    losses = [2.3 + 0.01 * (i % 3) for i in range(2100)]
    verdicts = [v for v in (rule.update(i, {LOSS: loss}, {}) for i, loss in enumerate(losses)) if v]
    assert verdicts[0].step == step
    assert f"has no falling trend after {step} steps" in verdicts[0].reason


def test_a_noisy_loss_that_learns_slowly_is_seldom_taken_for_one_that_does_not() -> None:
    """Gains of about the noise by a quarter of the run; of 60 seeds 1, 7 and 3 were flagged."""
    kinds: list[tuple[int, Curve]] = [
        (6, lambda t, rng: 1 - np.minimum(t / 300, 1.0) + noise(rng, 1.0)),
        (14, lambda t, rng: (0.1 + 0.9 * np.exp(-t / 250)) * rng.normal(size=STEPS) ** 2),
        (11, lambda t, rng: 2.3 - 0.8 * (1 - np.exp(-t / 100)) + noise(rng, 0.7)),
    ]
    for most, kind in kinds:
        assert sum(fired(NoLearning(), losses, of(STEPS)) != [] for losses in curves(kind, 60)) <= most


def test_a_run_that_has_learnt_is_left_alone_for_good() -> None:
    """Also when all is lost again before the share is spent."""
    fell_and_rose = [2.3 - min(i, 60) / 100 if i < 100 else 2.3 for i in range(600)]
    assert fired(NoLearning(), fell_and_rose, of(600)) == []


# --- Plateau

FALL_AND_STAY = [max(1.0, 2.3 - step / 150) + 0.01 * (step % 3) for step in range(2400)]


def rates(*parts: tuple[int, float], low: float | None = None) -> Callable[[int], Mapping[str, float]]:
    """A learning rate that is constant in parts, each up to a step; `low` is what the schedule still plans."""

    def at(step: int) -> Mapping[str, float]:
        now = next(lr for end, lr in parts if step < end)
        return {LR: now, LR_LOW: min(now, low if low is not None else min(lr for end, lr in parts if step < end))}

    return at


def test_a_plateau_is_found_once_it_is_half_of_the_run() -> None:
    """The fall ends at step 195, so the later half is flat from about step 390 on; and every block tells it again."""
    (first, *more) = fired(Plateau(), FALL_AND_STAY)
    assert 0.9 * 390 <= first <= 1.1 * 390
    assert len(more) > 20


def test_an_unknown_or_constant_rate_is_no_excuse() -> None:
    """The rule fires as without any, and names the rate that it knows."""
    plain = fired(Plateau(), FALL_AND_STAY)
    assert fired(Plateau(), FALL_AND_STAY, rates((9999, 0.1))) == plain
    assert fired(Plateau(), FALL_AND_STAY, lambda step: {LR: math.nan, LR_LOW: math.nan}) == plain
    assert fired(Plateau(), FALL_AND_STAY, lambda step: {LR: 0.1}) == plain
    rule = Plateau()
    readings = [{LOSS: loss, LR: 0.03} for loss in FALL_AND_STAY]
    verdict = next(v for v in (rule.update(s, r, {}) for s, r in enumerate(readings)) if v)
    assert "at a learning rate of 0.03: it came down from 2.259 to " in verdict.reason


def test_before_a_planned_decay_a_plateau_is_left_alone() -> None:
    """While the rate is high and will be less than half, a plateau is not judged; a decay to more is no decay."""
    assert fired(Plateau(), FALL_AND_STAY, rates((9999, 0.1), low=0.049)) == []
    assert fired(Plateau(), FALL_AND_STAY, rates((9999, 0.1), low=0.051)) != []


def test_after_the_decay_half_of_the_run_must_show_what_it_has_brought() -> None:
    """A rate that drops at step 500 for good lets the rule fire from step 1000 on; a second drop at 900 from 1800."""
    (first, *_) = fired(Plateau(), FALL_AND_STAY, rates((500, 0.1), (9999, 0.01)))
    assert 1000 - 32 <= first <= 1000 + 32
    (first, *_) = fired(Plateau(), FALL_AND_STAY, rates((500, 0.1), (900, 0.02), (9999, 0.005)))
    assert 1800 - 64 <= first <= 1800 + 64


def test_a_rate_below_a_tenth_of_its_peak_counts_as_decayed() -> None:
    """Its further way down excuses nothing, once half of the run lies after the drop."""
    assert fired(Plateau(), FALL_AND_STAY, rates((300, 0.1), (9999, 0.0099), low=0.0)) != []
    assert fired(Plateau(), FALL_AND_STAY, rates((300, 0.1), (9999, 0.0101), low=0.0)) == []


@pytest.mark.parametrize(
    "rate",
    [
        lambda step: 0.05 * (1 + math.cos(math.pi * step / 2400)),
        lambda step: 0.1 * (1 - step / 2400),
        lambda step: 0.055 + 0.045 * math.sin(step / 40),
        lambda step: 0.05 * (1 + math.cos(math.pi * (step % 300) / 300)),
    ],
    ids=["cosine", "linear", "cyclic", "warm restarts"],
)
def test_schedules_that_go_down_and_cycles_are_given_their_time(rate: Callable[[int], float]) -> None:
    """A flat loss under them is not judged before the last tenth of the run, and not in it."""
    lrs = [rate(step) for step in range(2400)]
    lows = np.minimum.accumulate(lrs[::-1])[::-1]
    more = [{LR: lr, LR_LOW: float(low), PROGRESS: s / 2400} for s, (lr, low) in enumerate(zip(lrs, lows, strict=True))]
    assert fired(Plateau(), FALL_AND_STAY, lambda step: more[step]) == []


def test_a_run_that_is_done_is_left_alone() -> None:
    """Below a tenth of its start a positive loss has converged; `converged=0` turns this off."""
    done = [max(0.15, 2.3 - step / 150) + 0.001 * (step % 3) for step in range(1500)]
    assert fired(Plateau(), done) == []
    assert fired(Plateau(converged=0.0), done) != []


def test_the_last_tenth_of_a_run_is_not_judged() -> None:
    """Little is left to save."""
    assert fired(Plateau(), FALL_AND_STAY[:440], of(440))[-1] <= 0.9 * 440
    assert fired(Plateau(), FALL_AND_STAY[:440], lambda step: {PROGRESS: 0.95}) == []


NO_PLATEAU: dict[str, Curve] = {
    "still at its start, before grokking": lambda t, rng: 2.3 + noise(rng, 0.05),
    "falls late": lambda t, rng: decay(t, begin=700) + noise(rng, 0.02),
    "linear": lambda t, rng: 2.3 - 1.5 * t / STEPS + noise(rng, 0.05),
    "a power law": lambda t, rng: 2 + 8 * (t + 1) ** -0.3 + noise(rng, 0.1),
    "a power law in large noise": lambda t, rng: 2 + 3 * (t + 1) ** -0.3 + noise(rng, 0.5),
    "logarithmic in noise": lambda t, rng: 2.3 - np.log1p(t / 100) / 4 + noise(rng, 0.3),
    "rising": lambda t, rng: 2.3 + t / STEPS + noise(rng, 0.1),
    "oscillating": lambda t, rng: 0.7 + 0.5 * np.sin(t / 15) + noise(rng, 0.2),
}


@pytest.mark.parametrize("curve", NO_PLATEAU)
def test_what_falls_slowly_or_has_not_fallen_yet_is_no_plateau(curve: str) -> None:
    """At most one of twenty seeds of a curve that is still at its start, or still on its way, is called a plateau."""
    assert sum(fired(Plateau(), losses, of(STEPS)) != [] for losses in curves(NO_PLATEAU[curve], 20)) <= 1


# --- Overfitting


def overfitted(train: Sequence[float], validation: Sequence[float], **arguments: float) -> list[int]:
    """The ends of validation at which the rule fires, with four training losses before each."""
    rule, found = Overfitting(**arguments), []  # type: ignore[arg-type]
    for end, (loss, value) in enumerate(zip(train, validation, strict=True)):
        for step in range(4):
            assert rule.update(5 * end + step, {LOSS: loss}, {}) is None
        if rule.update(5 * end + 4, {VAL_LOSS: value}, {}):
            found.append(end)
    return found


FALLING = [2.0 / (1 + end / 3) for end in range(60)]


@pytest.mark.parametrize("patience", [4, 5, 12])
def test_a_rise_without_noise_is_found_after_its_patience(patience: int) -> None:
    """Best at end 10 and rising from there: the first verdict comes `patience` ends after it."""
    validation = [1.0 + 0.1 * abs(end - 10) for end in range(60)]
    assert overfitted(FALLING, validation, patience=patience)[0] == 10 + patience


def test_a_rise_within_the_tolerance_is_left_alone() -> None:
    """Less than a twentieth of what the training loss has gained does not matter, unless one says so."""
    validation = [1.0 + (0.1 * (10 - end) if end < 10 else 0.0015 * (end - 10)) for end in range(60)]
    assert overfitted(FALLING, validation) == []
    assert overfitted(FALLING, validation, tolerance=0.01) != []


def test_where_training_does_not_fall_nothing_is_overfitted() -> None:
    """A validation loss that rises with the training loss, or beside a flat one with noise, is another matter."""
    validation = [1.0 + 0.05 * end for end in range(60)]
    fell_once = [2.0, *(1.0 + 0.01 * end for end in range(59))]
    for train in ([2.0 + 0.1 * end for end in range(60)], [2.0] * 60, fell_once):
        assert overfitted(train, validation) == []
    flagged = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        flagged += overfitted((2.0 + 0.01 * rng.normal(size=60)).tolist(), validation) != []
    assert flagged <= 18  # of 200 seeds 22


@pytest.mark.parametrize(("ends", "most"), [(30, 8), (100, 14)])
def test_noise_alone_is_seldom_taken_for_a_rise(ends: int, most: int) -> None:
    """Of 200 runs whose validation loss is flat noise beside a falling training loss, 2 and 7 were flagged."""
    train = (0.3 + 2 * np.exp(-np.arange(ends) / 20)).tolist()
    flagged = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        flagged += overfitted(train, (1.0 + 0.05 * rng.normal(size=ends)).tolist()) != []
    assert flagged <= most


def test_a_real_rise_in_noise_is_found() -> None:
    """Twenty ends after the best, at most, for every seed: the rise is as large as the noise at each end."""
    end = np.arange(60)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        validation = 0.5 + 1.5 * np.exp(-end / 5) + 0.02 * np.maximum(end - 20, 0) + 0.02 * rng.normal(size=60)
        found = overfitted(FALLING, validation.tolist())
        assert found and 22 <= found[0] <= 40, f"seed {seed}"


def test_a_new_best_begins_anew() -> None:
    """A second descent below the first minimum takes the warning back."""
    course = [*np.linspace(2, 1, 10), *np.linspace(1.1, 1.4, 4), *np.linspace(1, 0.5, 46)]
    assert overfitted(FALLING, course) == []


def test_only_a_validation_after_training_counts() -> None:
    """A second validation without a training loss in between is not a second witness."""
    rule = Overfitting()
    for end in range(40):
        rule.update(2 * end, {LOSS: FALLING[end], VAL_LOSS: 1.0 + 0.1 * abs(end - 36)}, {})
        for again in range(10):
            assert rule.update(2 * end + 1, {VAL_LOSS: 2.0 + 0.1 * again}, {}) is None
