"""The noise scale is checked against gradients whose mean and covariance are known."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwatch.noise_scale import NoiseScale, signal_and_noise

Pair = tuple[float, float, float, float]

POSITIVE = st.floats(1e-6, 1e6)
ANY = st.floats(allow_nan=True, allow_infinity=True)
PAIRS = st.lists(
    st.tuples(
        st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf, 0.0, 1e300]),
        st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf, 0.0]),
        st.sampled_from([1.0, 0.25]),
        st.sampled_from([0.01, 0.2]),
    ),
    max_size=30,
)


def inverse_sizes(sizes: list[int]) -> tuple[float, float]:
    """1/B of the first micro-batch, and of the plain mean of the gradients of all micro-batches."""
    return 1 / sizes[0], sum(1 / size for size in sizes) / len(sizes) ** 2


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@given(signal=st.floats(0, 1e6), noise=st.floats(0, 1e6), sizes=st.tuples(st.integers(1, 1000), st.integers(2, 1000)))
@settings(max_examples=100, deadline=None)
def test_two_noiseless_equations_are_solved(signal: float, noise: float, sizes: tuple[int, int]) -> None:
    """Squares that are exactly |G|² + tr Σ / B give |G|² and tr Σ back."""
    small, big = 1 / sizes[0], 1 / (sizes[0] * sizes[1])
    found = signal_and_noise(signal + noise * small, signal + noise * big, small, big)
    assert found == pytest.approx((signal, noise), rel=1e-6, abs=1e-6 * max(signal, noise, 1e-300) * sizes[0] * 2)


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [1, 2], [1, 3], [2, 1, 1]], ids=str)
def test_the_mean_over_all_possible_samples_is_exact(sizes: list[int]) -> None:
    """Enumerating every draw of a small population, with unequal micro-batches too, the estimates have no bias."""
    population = np.array([[3.0, -1.0], [0.5, 2.0], [1.0, 4.0]])
    signal = float(population.mean(0) @ population.mean(0))
    noise = float(population.var(0).sum())
    inverse_small, inverse_big = inverse_sizes(sizes)
    cuts = np.cumsum(sizes)[:-1]
    found = []
    for draw in itertools.product(range(3), repeat=sum(sizes)):
        micro = [part.mean(0) for part in np.split(population[list(draw)], cuts)]
        big = np.mean(micro, axis=0)
        found.append(signal_and_noise(micro[0] @ micro[0], big @ big, inverse_small, inverse_big))
    assert np.mean(found, axis=0) == pytest.approx([signal, noise], rel=1e-12)


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [8, 8, 8, 3], [2, 16, 5]], ids=str)
def test_synthetic_gradients_of_known_covariance(sizes: list[int]) -> None:
    """On Gaussian per-sample gradients the running estimate comes near tr Σ / |G|², and its mean over time nearer."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.5, 2.0, size=400)
    mean = rng.normal(size=400) / 4
    true = float((spread**2).sum() / (mean @ mean))
    scale, seen = NoiseScale(), []
    cuts = np.cumsum(sizes)[:-1]
    for _ in range(600):
        samples = mean + spread * rng.normal(size=(sum(sizes), 400))
        micro = [part.mean(0) for part in np.split(samples, cuts)]
        big = np.mean(micro, axis=0)
        seen.append(scale.update(micro[0] @ micro[0], big @ big, *inverse_sizes(sizes)))
    assert seen[-1] == pytest.approx(true, rel=0.25)
    assert np.mean(seen[100:]) == pytest.approx(true, rel=0.05)


@given(signal=POSITIVE, noise=POSITIVE, n=st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_a_steady_run_has_its_noise_scale_from_the_first_pair(signal: float, noise: float, n: int) -> None:
    """The running means have no start-up bias in their quotient."""
    scale = NoiseScale()
    found = [scale.update(signal + noise, signal + noise / 8, 1.0, 1 / 8) for _ in range(n)]
    assert found == pytest.approx([noise / signal] * n, rel=1e-6 + 1e-12 * noise / signal)


def test_signal_and_noise_are_averaged_before_they_are_divided() -> None:
    """Two pairs with scales 1 and 100 give the quotient of the means, not the mean of the quotients."""
    scale = NoiseScale()
    scale.update(2.0, 1.5, 1.0, 0.5)  # |G|² = 1, tr Σ = 1
    found = scale.update(101.0, 51.0, 1.0, 0.5)  # |G|² = 1, tr Σ = 100
    assert found == pytest.approx((0.95 * 1 + 100) / (0.95 + 1))


def test_the_estimate_follows_a_change() -> None:
    """A run whose noise grows tenfold is told so within some hundred readings."""
    scale = NoiseScale()
    for noise in [1.0] * 100 + [10.0] * 200:
        found = scale.update(1 + noise, 1 + noise / 4, 1.0, 0.25)
    assert found == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize(
    ("small", "big", "why"),
    [(5.0, 0.5, "a negative signal"), (0.0, 0.0, "no gradient at all"), (2.0, 5.0, "a negative noise")],
)
def test_what_cannot_be_told_is_nan(small: float, big: float, why: str) -> None:
    """An averaged signal or noise that is not positive gives NaN, and later good pairs still count."""
    scale = NoiseScale()
    assert math.isnan(scale.update(small, big, 1.0, 0.25)), why
    found = [scale.update(5.0, 2.0, 1.0, 0.25) for _ in range(300)]
    assert found[-1] == pytest.approx(4.0, rel=1e-3)


def test_gradients_without_noise_have_scale_zero() -> None:
    """The same gradient from both batch sizes means that one sample is enough."""
    assert NoiseScale().update(4.0, 4.0, 1.0, 0.25) == 0.0


@pytest.mark.parametrize(
    "pair",
    [
        (math.nan, 2.0, 1.0, 0.25),
        (5.0, math.inf, 1.0, 0.25),
        (math.inf, math.inf, 1.0, 0.25),
        (1.7e308, 1.0, 0.1, 0.01),  # finite squares, but not their quotient
        (5.0, 2.0, math.nan, math.nan),  # a batch of unknown size
        (5.0, 2.0, 0.25, 0.25),
        (5.0, 2.0, *inverse_sizes([32, 4])),  # a short last micro-batch
    ],
    ids=str,
)
def test_a_pair_that_tells_nothing_changes_nothing(pair: Pair) -> None:
    """Such a pair repeats the last noise scale, raises nothing, and leaves the running means as they were."""
    scale = NoiseScale()
    assert math.isnan(scale.update(*pair))
    before = scale.update(5.0, 2.0, 1.0, 0.25)
    state = scale.state_dict()
    assert scale.update(*pair) == before == 4.0
    assert scale.state_dict() == state


@given(small=ANY, big=ANY, inverse_small=ANY, inverse_big=ANY)
@settings(max_examples=200, deadline=None)
def test_no_pair_blinds_the_estimate(small: float, big: float, inverse_small: float, inverse_big: float) -> None:
    """Whatever comes in, nothing is raised and the running means stay finite."""
    scale = NoiseScale()
    scale.update(small, big, inverse_small, inverse_big)
    assert all(math.isfinite(value) for value in scale.state_dict().values())


@given(pairs=PAIRS)
@settings(max_examples=60, deadline=None)
def test_a_restored_estimate_goes_on_as_if_unbroken(pairs: list[Pair]) -> None:
    """Through JSON and into a new object before every pair, all values are the same to the last bit."""
    unbroken, broken = NoiseScale(), NoiseScale()
    for pair in [(5.0, 2.0, 1.0, 0.25), *pairs, (7.0, 2.0, 1.0, 0.25)]:
        state = json.loads(json.dumps(broken.state_dict()))
        broken = NoiseScale()
        broken.load_state_dict(state)
        assert same(unbroken.update(*pair), broken.update(*pair))


@pytest.mark.parametrize(("small", "big"), [(0.25, 0.25), (0.1, 0.5), (math.nan, 0.1), (0.1, math.nan)])
def test_a_big_batch_that_is_not_bigger_is_an_error(small: float, big: float) -> None:
    """The message names both inverse sizes and what is needed."""
    message = (
        f"inverse_big={big} must be less than inverse_small={small}: "
        "the noise scale needs gradients of two different batch sizes."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        signal_and_noise(2.0, 1.0, small, big)
