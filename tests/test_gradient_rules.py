"""Gradients that explode or vanish, and layers that are dead: what is found, when, and what is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from dynwatch.rules import DeadLayers, GradientExplosion, Rule, VanishingGradients

GRADIENT, SCALER, IDLE, PROGRESS = "stop/grad_norm", "stop/scaler", "stop/idle_parameters", "stop/progress"
STEPS = 800


def fired(rule: Rule, stream: Sequence[dict[str, float]]) -> list[int]:
    """The steps at which a rule fires."""
    return [step for step, readings in enumerate(stream) if rule.update(step, readings, {})]


# --- GradientExplosion


def exploded(norms: Sequence[float] | np.ndarray, **arguments: float) -> list[int]:
    """The steps at which the norms alone make the rule fire."""
    return fired(GradientExplosion(**arguments), [{GRADIENT: float(norm)} for norm in norms])  # type: ignore[arg-type]


HEALTHY_NORMS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "log-normal noise": lambda t, rng: 1.5 * np.exp(0.5 * rng.normal(size=STEPS)),
    "small batches": lambda t, rng: 1.5 * np.exp(1.2 * rng.normal(size=STEPS)),
    "infinite variance": lambda t, rng: 2 * np.clip(np.abs(rng.standard_t(1.8, STEPS)), 0.1, None),
    "warm-up peak": lambda t, rng: 0.5 + 30 * np.exp(-(((t - 60) / 20) ** 2)),
    "tiny at first": lambda t, rng: np.where(t < 30, 1e-6, 0.8) * np.exp(0.2 * rng.normal(size=STEPS)),
    "exactly zero at first": lambda t, rng: np.where(t < 30, 0.0, 0.8),
    "grows fifty times": lambda t, rng: 0.5 * np.exp(np.minimum(t / 100, np.log(50))),
    "shrinks to nothing": lambda t, rng: 3 * np.exp(-t / 30),
    "shrinks, then back to its start": lambda t, rng: np.where(t < 300, 3 * np.exp(-t / 20), 3.0),
    "oscillates as in a GAN": lambda t, rng: np.exp(2 * np.sin(t / 20) + 0.5 * rng.normal(size=STEPS)),
    "cyclic learning rate": lambda t, rng: 1 + 9 * np.sin(t / 50) ** 2,
    "a loss that is a sum": lambda t, rng: 1e6 * np.exp(0.5 * rng.normal(size=STEPS)),
    "spikes that recover": lambda t, rng: np.where(t % 50 > 41, 1e5, 1.0),
    "a NaN now and then": lambda t, rng: np.where(t % 10 == 5, np.nan, 1.0),
}


@pytest.mark.parametrize("course", HEALTHY_NORMS)
def test_healthy_gradients_are_left_alone(course: str) -> None:
    """No seed of a course that a person would let run makes the rule fire."""
    t = np.arange(STEPS, dtype=np.float64)
    for seed in range(10):
        assert exploded(HEALTHY_NORMS[course](t, np.random.default_rng(seed))) == [], f"seed {seed}"


@pytest.mark.parametrize("patience", [1, 10])
@pytest.mark.parametrize("height", [101.0, 1e5, 1e300, math.inf, math.nan])
def test_a_jump_is_found_after_patience_norms(patience: int, height: float) -> None:
    """More than a hundred times the usual norm, or none that is finite: at the last of `patience` in a row."""
    assert exploded([1.0] * 50 + [height] * 20, patience=patience)[0] == 50 + patience - 1


def test_the_bound_itself_is_still_allowed() -> None:
    """A hundred times the usual norm is not more than a hundred times."""
    assert exploded([2.0] * 50 + [200.0] * 30) == []
    assert exploded([2.0] * 50 + [200.001] * 30)[0] == 59


def test_one_usual_norm_begins_the_count_anew() -> None:
    """Nine outside, one inside, again and again, never fires."""
    assert exploded([1.0] * 30 + ([1e6] * 9 + [1.0]) * 20) == []


@pytest.mark.parametrize("rate", [1.01, 1.02, 1.05, 1.2])
def test_a_slow_exponential_growth_is_found(rate: float) -> None:
    """However slow, it is found ten norms after a thousand times the start's median, which its twenty norms span."""
    norms = [2 * rate**step for step in range(1000)]
    start = 2 * (rate**9 + rate**10) / 2
    outside = next(step for step, norm in enumerate(norms) if norm > 1000 * start)
    # A fast growth leaves the median of the last hundred behind before it reaches ten times the start.
    assert 0 <= outside + 9 - exploded(norms)[0] <= (0 if rate < 1.02 else math.log(10) / math.log(rate))


def test_norms_below_the_least_are_never_an_explosion() -> None:
    """Tiny first gradients grow to `min_norm` unjudged, and past it they count."""
    assert exploded([1e-9] * 30 + [1.0] * 100) == []
    assert exploded([1e-9] * 30 + [1.01] * 100)[0] == 39
    assert exploded([1e-9] * 30 + [8.0] * 100, min_norm=10.0) == []


def test_overflows_under_a_scaler_are_left_out() -> None:
    """They neither count nor reset, however many; without a scaler they count."""
    calm, overflow = [{GRADIENT: 1.0, SCALER: 1.0}] * 30, [{GRADIENT: math.inf, SCALER: 1.0}]
    high = [{GRADIENT: 1e4, SCALER: 1.0}]
    assert fired(GradientExplosion(), overflow * 30 + calm + overflow * 100) == []
    assert fired(GradientExplosion(), calm + (high + overflow) * 10) == [30 + 18]
    assert fired(GradientExplosion(), calm + [{GRADIENT: math.inf, SCALER: 0.0}] * 10) == [39]


# --- VanishingGradients


def profiles(norms: Sequence[float], count: int = 8) -> list[dict[str, float]]:
    """The same gradient norms by layer, from the first layer to the last, at `count` steps."""
    return [{f"grad_norm/layer/fc{i}": float(norm) for i, norm in enumerate(norms)}] * count


@pytest.mark.parametrize("patience", [1, 5])
@pytest.mark.parametrize("layers", [4, 5, 9, 40])
def test_a_profile_that_shrinks_towards_the_input_is_found(layers: int, patience: int) -> None:
    """From ten thousandth on between the medians of the thirds, after `patience` profiles."""
    third = layers // 3
    # With one factor per layer, the medians of the first and the last third lie `layers - third` layers apart.
    for ratio, found in ((0.9e-4, True), (1.1e-4, False)):
        norms = [(ratio ** (1 / (layers - third))) ** (layers - i) for i in range(layers)]
        assert (fired(VanishingGradients(patience), profiles(norms))[:1] == [patience - 1]) == found


HEALTHY_PROFILES: dict[str, Callable[[np.random.Generator], Sequence[float]]] = {
    "uniform": lambda rng: np.exp(0.5 * rng.normal(size=12)),
    "uniformly small": lambda rng: 1e-12 * np.exp(0.5 * rng.normal(size=12)),
    "all zero": lambda rng: [0.0] * 12,
    "one small layer": lambda rng: [1.0] * 4 + [1e-9] + [1.0] * 7,
    "a small first layer": lambda rng: [1e-9] + [1.0] * 11,
    "a large last layer": lambda rng: [1.0] * 11 + [1e9],
    "growing towards the input": lambda rng: 0.1 ** np.arange(12),
    "alternating weights and norms": lambda rng: [1e-6, 1.0] * 6,
    "scattered over ten orders": lambda rng: 10.0 ** rng.uniform(-10, 0, 12),
    "zero but for the last, as with a zero output layer": lambda rng: [0.0] * 11 + [1.0],
    "a frozen third": lambda rng: [0.0] * 4 + list(np.exp(0.1 * rng.normal(size=8))),
    "few layers": lambda rng: [1e-9, 1e-5, 1.0],
}


@pytest.mark.parametrize("shape", HEALTHY_PROFILES)
def test_other_profiles_are_left_alone(shape: str) -> None:
    """Only a shrinking over the whole depth is meant."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        stream = [item for _ in range(20) for item in profiles(HEALTHY_PROFILES[shape](rng), 1)]
        assert fired(VanishingGradients(), stream) == [], f"seed {seed}"


def test_a_good_profile_begins_the_count_anew() -> None:
    """Steps without a profile, with other tags, or with one that is not finite do not."""
    bad, good = profiles(0.01 ** np.arange(8)[::-1], 1), profiles([1.0] * 8, 1)
    assert fired(VanishingGradients(), (bad * 4 + good) * 5) == []
    broken = [{**bad[0], "grad_norm/layer/fc3": math.nan}]
    assert fired(VanishingGradients(), bad * 4 + [{}, {"grad_norm/total": 1.0}] + broken + bad) == [7]


def test_the_reason_names_the_ends_of_the_profile() -> None:
    """With their norms and their number."""
    verdict = VanishingGradients(1).update(3, profiles([1e-8, 1e-6, 1e-4, 1e-2, 1.0])[0], {})
    assert verdict is not None and not verdict.weights_suspect
    assert verdict.reason.startswith("The gradient shrinks from 1 at fc4 to 1e-08 at fc0, over 5 layers;")
    assert verdict.evidence == {"first layers": [(3, 1e-8)], "last layers": [(3, 1.0)]}


# --- DeadLayers

SIGNS: dict[str, tuple[dict[str, float], dict[str, float], str]] = {
    "stands still": (
        {"update_ratio/a/b": 0.9e-7, "update_ratio/c": 1e-4},
        {"update_ratio/a/b": 1.1e-7, "update_ratio/c": 1e-4},
        "Layer a/b stands still: its updates are 9e-08 times its weights at step",
    ),
    "none moves": (
        {"update_ratio/a": 0.0, "update_ratio/c": 0.9e-9},
        {"update_ratio/a": 0.0, "update_ratio/c": 1.1e-9},
        "No layer moves: updates are at most 9e-10 times the weights at step",
    ),
    "without gradient": (
        {"grad_norm/layer/a/b": 0.0, "grad_norm/layer/c": 1e-30},
        {"grad_norm/layer/a/b": 1e-30, "grad_norm/layer/c": 1e-30},
        "Layer a/b gets no gradient: its norm is exactly 0 at step",
    ),
    "dead units": (
        {"activation/dead/a/b": 0.95, "activation/dead/c": 0.0},
        {"activation/dead/a/b": 0.9, "activation/dead/c": 0.0},
        "95% of the ReLU units of a/b do not fire any more at step",
    ),
    "idle": (
        {IDLE: 0.2},
        {IDLE: 0.1},
        "20% of the trainable parameters have never been moved by an optimizer at step",
    ),
}
each_sign = pytest.mark.parametrize("sign", SIGNS)


@each_sign
@pytest.mark.parametrize("patience", [1, 3])
def test_each_sign_is_found_after_patience_readings(sign: str, patience: int) -> None:
    """With a reason in words, at the reading that completes the patience; readings may be far apart."""
    bad, _, reason = SIGNS[sign]
    rule = DeadLayers(patience)
    verdicts = [rule.update(50 * i, reading, {}) for i in range(6) for reading in (bad, {"stop/loss": 1.0})]
    assert [v is not None for v in verdicts[::2]] == [False] * (patience - 1) + [True] * (7 - patience)
    assert verdicts[1::2] == [None] * 6
    first = verdicts[2 * (patience - 1)]
    assert first is not None
    assert first.reason.startswith(f"{reason} {50 * (patience - 1)}, at {patience} readings in a row.")


@each_sign
def test_what_is_within_the_bound_is_left_alone(sign: str) -> None:
    """It neither fires nor leaves the count as it was."""
    bad, good, _ = SIGNS[sign]
    assert fired(DeadLayers(), [good] * 20) == []
    assert fired(DeadLayers(), [bad, bad, good] * 10) == []


@each_sign
def test_signs_are_counted_apart(sign: str) -> None:
    """Readings of the other kinds in between do not reset a count, and their good ones do not fire."""
    bad, _, _ = SIGNS[sign]
    others = [good for name, (_, good, _) in SIGNS.items() if not set(good) & set(bad)]
    assert fired(DeadLayers(), [bad, *others, bad, *others, bad])[0] == 2 * (len(others) + 1)


def test_a_layer_stands_still_only_beside_others_that_move() -> None:
    """Where all have slowed down together, as at the end of a schedule, no layer is singled out."""
    assert fired(DeadLayers(), [{"update_ratio/a": 0.0, "update_ratio/b": 0.9e-4}] * 10) == []
    assert fired(DeadLayers(), [{"update_ratio/a": 0.0, "update_ratio/b": 1.1e-4}] * 10)[0] == 2


def test_a_warm_up_from_zero_is_left_alone() -> None:
    """Two readings without any update at the beginning are within the patience."""
    rates = [0.0, 0.0, *np.linspace(0.1, 1, 10)]
    stream = [{"update_ratio/a": 1e-3 * lr, "update_ratio/b": 2e-3 * lr, PROGRESS: 0.01} for lr in rates]
    assert fired(DeadLayers(), stream) == []


def test_the_end_of_a_cosine_is_left_alone() -> None:
    """Updates fall to nothing in the last of a hundred readings and for good after it; halfway they may not."""
    lr = [0.5 * (1 + math.cos(math.pi * min(i / 100, 1.0))) for i in range(120)]
    ratios = [{"update_ratio/a": 1e-3 * x, "update_ratio/b": 2e-3 * x} for x in lr]
    whole = [{**item, PROGRESS: min(i / 100, 1.0)} for i, item in enumerate(ratios)]
    assert fired(DeadLayers(), whole) == []
    early = [{**item, PROGRESS: min(i / 200, 1.0)} for i, item in enumerate(ratios)]
    assert fired(DeadLayers(), early)[0] == 102  # the third after step 99, of which cos still leaves 2.5e-4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_progress_that_is_not_finite_is_not_the_end_of_the_run(value: float) -> None:
    """A run that does not move is found although its progress is told once and bad ever after."""
    still = {"update_ratio/a": 0.0, "update_ratio/b": 0.0}
    assert fired(DeadLayers(), [{PROGRESS: 0.5}] + [{**still, PROGRESS: value}] * 5) == [3, 4, 5]


def test_all_gradients_zero_are_no_dead_layer() -> None:
    """A reading in which every norm is zero says nothing of any one layer."""
    assert fired(DeadLayers(), [{"grad_norm/layer/a": 0.0, "grad_norm/layer/b": 0.0}] * 10) == []


def test_idle_parameters_say_where() -> None:
    """The note of the reading is in the reason; a reading that is not finite does not count."""
    rule = DeadLayers(patience=1)
    verdict = rule.update(9, {IDLE: 0.5}, {IDLE: "backbone.0 and 3 more layers"})
    assert verdict is not None and "50% of the trainable" in verdict.reason
    assert "(backbone.0 and 3 more layers)" in verdict.reason
    assert DeadLayers(patience=1).update(9, {IDLE: math.inf}, {}) is None


def test_several_layers_make_one_verdict() -> None:
    """It tells the first and how many there are, with the first one's readings as evidence."""
    reading = {"activation/dead/a": 1.0, "activation/dead/b": 0.0, "activation/dead/c": 0.99}
    rule = DeadLayers()
    verdict = [rule.update(step, reading, {}) for step in (0, 50, 100)][-1]
    assert verdict is not None
    assert verdict.reason.startswith("100% of the ReLU units of a do not fire")
    assert "2 layers" in verdict.reason
    assert list(verdict.evidence) == ["activation/dead/a"]
    assert verdict.evidence["activation/dead/a"][-1] == (100, 1.0)
