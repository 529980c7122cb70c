"""Windows, block means and the trend test against NumPy, SciPy and plain enumeration."""

from __future__ import annotations

import json
import math
from itertools import combinations, permutations
from statistics import fmean, pvariance

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwatch.trends import RobustWindow, RunMeans, mann_kendall

NUMBER = st.floats(-1e300, 1e300) | st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, 5e-324, 1e-300, 1e300, -1e300])
NUMBERS = st.lists(NUMBER, max_size=60)

# --- RobustWindow


@given(numbers=NUMBERS, size=st.integers(1, 20))
@settings(deadline=None)
def test_a_window_has_the_median_and_mad_of_its_numbers(numbers: list[float], size: int) -> None:
    """After each number both are NumPy's, of the last `size` numbers alone."""
    window = RobustWindow(size)
    for i, number in enumerate(numbers):
        window.add(number)
        last = np.array(numbers[max(i + 1 - size, 0) : i + 1])
        assert len(window) == len(last)
        assert window.full == (i + 1 >= size)
        assert window.median == np.median(last)
        assert window.mad == pytest.approx(np.median(np.abs(last - np.median(last))), rel=1e-12, abs=0)
        assert window.sigma == 1.4826 * window.mad


@given(numbers=NUMBERS, size=st.integers(1, 20), cut=st.integers(0, 60))
@settings(deadline=None)
def test_a_restored_window_goes_on(numbers: list[float], size: int, cut: int) -> None:
    """State taken at any point and sent through JSON gives the same medians and the same later state."""
    unbroken, broken = RobustWindow(size), RobustWindow(size)
    for i, number in enumerate(numbers):
        if i == cut:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = RobustWindow(size)
            broken.load_state_dict(state)
        unbroken.add(number)
        broken.add(number)
        assert (broken.median, broken.mad, broken.full) == (unbroken.median, unbroken.mad, unbroken.full)
    assert broken.state_dict() == unbroken.state_dict()


def test_the_mad_follows_a_restored_window() -> None:
    """A spread that was computed before loading is not kept for the numbers loaded."""
    window = RobustWindow(3)
    for number in (1.0, 2.0, 9.0):
        window.add(number)
    assert window.mad == 1.0
    window.load_state_dict({"numbers": [10.0, 20.0, 30.0]})
    assert (window.median, window.mad) == (20.0, 10.0)


def test_an_empty_window_has_no_spread() -> None:
    """Median, MAD and sigma are NaN before the first number."""
    window = RobustWindow(3)
    assert len(window) == 0 and not window.full
    assert all(map(math.isnan, (window.median, window.mad, window.sigma)))


# --- RunMeans


def naive_blocks(numbers: list[float], most: int) -> list[float]:
    """Means of blocks of the least power of two that keeps their number within `most`."""
    length = 1
    while len(numbers) // length > most:
        length *= 2
    return [fmean(numbers[i : i + length]) for i in range(0, len(numbers) - length + 1, length)]


@given(numbers=st.lists(st.floats(-1e6, 1e6), max_size=300), most=st.sampled_from([2, 4, 8, 64]))
@settings(deadline=None)
def test_block_means_are_those_of_the_whole_run(numbers: list[float], most: int) -> None:
    """The blocks span the run from its first number, never more than `most`, and add() tells when one is complete."""
    means = RunMeans(most)
    for i, number in enumerate(numbers, 1):
        before = len(means.blocks) * means.block_length
        complete = means.add(number)
        assert len(means) == i
        assert complete == (len(means.blocks) * means.block_length > before)
        assert len(means.blocks) <= most
    assert means.blocks == pytest.approx(naive_blocks(numbers, most), rel=1e-9, abs=1e-6)


def test_memory_does_not_grow_with_the_run() -> None:
    """After a hundred thousand numbers there are 32 to 64 blocks, of a power of two each, and a short state."""
    means = RunMeans(64)
    for i in range(100_000):
        means.add(float(i))
    assert 32 <= len(means.blocks) <= 64
    assert means.block_length == 2048
    assert len(means) == 100_000
    assert len(json.dumps(means.state_dict())) < 2000
    assert means.blocks[0] == 2047 / 2


@given(numbers=st.lists(st.floats(-1e6, 1e6), max_size=100), cut=st.integers(0, 100))
@settings(deadline=None)
def test_restored_means_go_on(numbers: list[float], cut: int) -> None:
    """State taken at any point, also within a block, gives bit-identical blocks and the same later state."""
    unbroken, broken = RunMeans(8), RunMeans(8)
    for i, number in enumerate(numbers):
        if i == cut:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = RunMeans(8)
            broken.load_state_dict(state)
        assert broken.add(number) == unbroken.add(number)
    assert broken.blocks == unbroken.blocks
    assert broken.state_dict() == unbroken.state_dict()


def test_blocks_and_state_are_copies() -> None:
    """What was taken does not change with later numbers, and changing it changes nothing."""
    means = RunMeans(4)
    for number in range(3):
        means.add(float(number))
    blocks, state = means.blocks, means.state_dict()
    kept = json.dumps(state)
    for number in range(20):
        means.add(float(number))
    assert blocks == [0.0, 1.0, 2.0] and json.dumps(state) == kept
    means.blocks.clear()
    assert means.blocks


# --- mann_kendall


def naive_mann_kendall(numbers: list[float]) -> float:
    """S pair by pair, and the variance with each group of ties counted by hand."""
    n = len(numbers)
    s = sum((b > a) - (b < a) for a, b in combinations(numbers, 2))
    ties = [numbers.count(value) for value in set(numbers)]
    variance = (n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18
    return 0.0 if s == 0 else (s - (1 if s > 0 else -1)) / math.sqrt(variance)


SERIES = st.lists(st.integers(-3, 3).map(float), max_size=40) | st.lists(NUMBER, max_size=40)


@given(numbers=SERIES)
@settings(max_examples=200, deadline=None)
def test_the_trend_test_follows_its_formula(numbers: list[float]) -> None:
    """With and without ties, the statistic is that of a count over all pairs."""
    assert mann_kendall(numbers) == pytest.approx(naive_mann_kendall(numbers), rel=1e-12)


def test_the_trend_agrees_with_scipy() -> None:
    """On random numbers with ties, the sign is Kendall's tau's and the p-value SciPy's asymptotic one, nearly."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for i in range(100):
        numbers = rng.integers(0, 8, 40).astype(float) + (0.1 * np.arange(40) if i % 2 else 0)
        found = stats.kendalltau(np.arange(40), numbers, method="asymptotic")
        z = mann_kendall(numbers.tolist())
        # SciPy has no continuity correction: its S is one unit further from 0.
        assert z == 0 or np.sign(z) == np.sign(found.statistic)
        sigma = abs(stats.norm.isf(found.pvalue / 2))
        assert abs(z) <= sigma + 1e-9 and abs(z) == pytest.approx(sigma, abs=0.15)


@pytest.mark.parametrize("numbers", [[1.0, 2, 3, 4, 5], [1.0, 2, 3, 4, 5, 6], [1.0, 1, 2, 3, 3], [1.0, 1, 1, 2, 3, 3]])
def test_the_null_distribution_is_that_of_all_orders(numbers: list[float]) -> None:
    """Over every order of the numbers S has mean 0 and exactly the variance of the formula."""
    scores, z_scores = [], []
    for order in permutations(numbers):
        scores.append(sum((b > a) - (b < a) for a, b in combinations(order, 2)))
        z_scores.append(mann_kendall(order))
    assert sum(scores) == 0
    # Where S is far from 0, z gives back the standard deviation that it was divided by.
    sigma = [(s - math.copysign(1, s)) / z for s, z in zip(scores, z_scores, strict=True) if abs(s) > 1]
    assert sigma == pytest.approx([math.sqrt(pvariance(scores))] * len(sigma))


@given(numbers=st.lists(st.integers(-50, 50), min_size=2, max_size=30))
@settings(deadline=None)
def test_only_the_order_of_the_numbers_matters(numbers: list[int]) -> None:
    """Growing transforms leave the statistic as it is; falling ones and a reversal of time turn its sign."""
    z = mann_kendall(numbers)
    for grows in (lambda x: 3 * x - 7, lambda x: x**3, lambda x: math.exp(x / 10), lambda x: math.atan(x)):
        assert mann_kendall([grows(x) for x in numbers]) == z
    assert mann_kendall([-x for x in numbers]) == -z
    assert mann_kendall(numbers[::-1]) == -z


def test_huge_and_tiny_numbers_do_not_overflow() -> None:
    """From one end of the floats to the other, the statistic is that of the ranks."""
    numbers = [-1.7e308, -1e308, -5e-324, 0.0, 5e-324, 1e308, 1.7e308]
    with np.errstate(all="raise"):
        assert mann_kendall(numbers) == mann_kendall([1.0, 2, 3, 4, 5, 6, 7])


@pytest.mark.parametrize("numbers", [[], [1.0], [2.0] * 10, [1.0, 2.0, 1.0]])
def test_where_nothing_can_be_told_the_statistic_is_zero(numbers: list[float]) -> None:
    """No numbers, one, only ties, and as many rises as falls."""
    assert mann_kendall(numbers) == 0.0
