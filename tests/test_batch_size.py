"""Batch-size corrections are checked against ensembles of matrices with known covariance."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynwatch.batch_size import (
    HessianSpread,
    critical_lr_in_noise,
    directional,
    isotropic,
    isotropic_inverse,
    spread_of_chunks,
)

Array = npt.NDArray[np.float64]
NOTHING = HessianSpread(outer=0.0, along=0.0, samples=8)


class Ensemble:
    """H_i = H + x_i x_iᵀ - E[x xᵀ] with noise mostly along the outlier of H, as in trained nets."""

    def __init__(self, size: int = 40, samples: int = 512) -> None:
        self.rng = np.random.default_rng(0)
        deviations = np.full(size, math.sqrt(0.5))
        deviations[0] = math.sqrt(6.0)
        bulk = self.rng.normal(0, 0.1, size)
        bulk[0] = 10.0
        self.x = self.rng.normal(size=(samples, size)) * deviations
        self.plain = np.diag(bulk - deviations**2)
        values, vectors = np.linalg.eigh(self.mean(np.arange(samples)))
        self.sharpness, self.u = float(values[-1]), vectors[:, -1]

    def mean(self, rows: npt.NDArray[np.int64]) -> Array:
        """The Hessian of a batch."""
        x = self.x[rows]
        return self.plain + x.T @ x / len(rows)

    def spread(self, rows: npt.NDArray[np.int64], u: Array) -> HessianSpread:
        """Of these samples along u, each a chunk of its own."""
        products = self.plain @ u + self.x[rows] * (self.x[rows] @ u)[:, None]
        return spread_of_chunks(list(torch.from_numpy(products)), torch.from_numpy(u), [1] * len(rows))

    def draw(self, batch: int) -> npt.NDArray[np.int64]:
        """A random batch."""
        return self.rng.choice(len(self.x), batch, replace=False)


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    """One for all tests."""
    return Ensemble()


@pytest.mark.parametrize("batch", [32, 64, 128])
def test_directional_is_the_mean_sharpness_of_batches(ensemble: Ensemble, batch: int) -> None:
    """The shift of the mean over 600 random batches is right to a tenth and four standard errors; so is the spread."""
    spread = ensemble.spread(np.arange(512), ensemble.u)
    mean, sd = directional(ensemble.sharpness, spread, batch, full=512)
    sharpest, along = [], []
    for _ in range(600):
        hessian = ensemble.mean(ensemble.draw(batch))
        sharpest.append(np.linalg.eigvalsh(hessian)[-1])
        along.append(ensemble.u @ hessian @ ensemble.u)
    # uᵀHu has the mean λ exactly, and nearly all of the fluctuation.
    shifts = np.array(sharpest) - np.array(along)
    shift = mean - ensemble.sharpness
    assert abs(shift - shifts.mean()) < 0.1 * shift + 4 * shifts.std() / math.sqrt(600)
    assert sd == pytest.approx(np.std(sharpest), rel=0.15)


def test_directional_extrapolates_to_a_larger_set(ensemble: Ensemble) -> None:
    """From batches of 64, each with what it knows of itself, it comes closer to the full set than λ as measured."""
    measured, corrected, along = [], [], []
    for _ in range(200):
        rows = ensemble.draw(64)
        values, vectors = np.linalg.eigh(ensemble.mean(rows))
        measured.append(values[-1])
        corrected.append(directional(values[-1], ensemble.spread(rows, vectors[:, -1]), batch=512, full=64)[0])
        along.append(ensemble.u @ ensemble.mean(rows) @ ensemble.u)
    excess = float(np.mean(np.array(measured) - along))
    left = np.array(corrected) - along
    assert abs(left.mean()) < 0.2 * excess + 4 * left.std() / math.sqrt(200)


@pytest.mark.parametrize(
    ("spike", "expected"), [(2.0, 2.5), (1.3, 1.3 + 1 / 1.3), (0.5, 2.0), (-2.0, -2.5), (-0.3, -2.0)]
)
def test_isotropic_is_the_extreme_of_a_spiked_random_matrix(spike: float, expected: float) -> None:
    """A spike in the Gaussian orthogonal ensemble shifts by v/λ, or is lost below the edge 2√v."""
    rng, n = np.random.default_rng(1), 300
    extremes = []
    for _ in range(12):
        a = rng.normal(size=(n, n))
        noise = (a + a.T) / math.sqrt(2 * n)  # E |noise z|² = 1 for a unit z
        noise[0, 0] += spike
        extremes.append(np.linalg.eigvalsh(noise)[-1 if spike > 0 else 0])
    form = isotropic(spike, variance=2.0, batch=1, full=2)
    assert form == pytest.approx(expected)
    assert np.mean(extremes) == pytest.approx(form, abs=0.08)


@given(
    st.floats(-1e15, 1e15).filter(lambda x: abs(x) > 1e-10),
    st.floats(0, 1e15),
    st.integers(1, 512),
    st.integers(0, 10_000),
)
def test_inverse_takes_the_isotropic_form_back(lambda_: float, variance: float, batch: int, more: int) -> None:
    """What stands above the noise is recovered; what does not is buried."""
    v = variance * (1 / batch - 1 / (batch + more))
    observed = isotropic(lambda_, variance, batch, batch + more)
    back = isotropic_inverse(observed, variance, batch, batch + more)
    if abs(lambda_) <= math.sqrt(v):
        assert back is None
    elif abs(lambda_) > 1.01 * math.sqrt(v):
        assert back == pytest.approx(lambda_, rel=1e-6)


def test_a_full_batch_needs_no_correction() -> None:
    """At B = N all forms leave λ as it is, and nothing is uncertain."""
    for size in (-3.0, 1e-10, 1e15):
        assert isotropic(size, 5.0, 64, 64) == size
        assert isotropic_inverse(size, 5.0, 64, 64) == pytest.approx(size, rel=1e-14)
    assert isotropic(0.0, 5.0, 64, 64) == isotropic_inverse(0.0, 5.0, 64, 64) == 0.0
    assert directional(3.0, HessianSpread(5.0, 5.0, 64), 64, 64) == (3.0, 0.0)


def test_what_is_not_a_number_stays_so() -> None:
    """NaN in gives NaN out, also from the spread; directions without positive curvature have no correction."""
    assert math.isnan(isotropic(math.nan, 1.0, 1, 2))
    inverse = isotropic_inverse(math.nan, 1.0, 1, 2)
    assert inverse is not None and math.isnan(inverse)
    for lambda_ in (math.nan, 0.0, -1.0):
        assert all(math.isnan(x) for x in directional(lambda_, NOTHING, 1, 2))
    assert all(math.isnan(x) for x in directional(1.0, HessianSpread(math.nan, math.nan, 8), 1, 2))


@given(st.floats(1e-10, 1e15), st.floats(0, 1e15), st.integers(1, 10**6), st.integers(1, 10**6))
def test_directional_moves_the_right_way_and_stays_positive(
    lambda_: float, outer: float, batch: int, full: int
) -> None:
    """Smaller batches are sharper, larger ones flatter but never below half of what was measured."""
    mean, sd = directional(lambda_, HessianSpread(outer, 2.0, 8), batch, full)
    assert mean >= lambda_ if batch <= full else lambda_ / 2 <= mean <= lambda_
    assert sd == pytest.approx(math.sqrt(2.0 * abs(1 / batch - 1 / full)))


@pytest.mark.parametrize("sizes", [(1, 2, 3), (3, 3), (1, 1, 1, 1, 1, 1), (5, 1)])
def test_spread_is_unbiased_whatever_the_split(sizes: tuple[int, ...]) -> None:
    """Its mean over all ways to split six samples is exactly the spread of the samples."""
    rng = np.random.default_rng(2)
    h, u = rng.normal(size=(6, 3)), rng.normal(size=3)
    u /= np.linalg.norm(u)
    cuts = np.cumsum(sizes)[:-1]
    found = []
    for order in permutations(range(6)):
        chunks = [torch.from_numpy(part.mean(0)) for part in np.split(h[list(order)], cuts)]
        found.append(spread_of_chunks(chunks, torch.from_numpy(u), sizes))
    total, along = np.var(h, axis=0, ddof=1).sum(), np.var(h @ u, ddof=1)
    assert np.mean([each.along for each in found]) == pytest.approx(along, rel=1e-10)
    assert np.mean([each.outer for each in found]) == pytest.approx(total - along, rel=1e-10)
    assert {each.samples for each in found} == {6}


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
@pytest.mark.parametrize("length", [1e-10, 1.0, 1e15])
def test_spread_scales_with_the_hessian_and_not_with_u(scale: float, length: float) -> None:
    """Products of float32 at any scale give the square of the scale; the length of u drops out."""
    generator = torch.Generator().manual_seed(0)
    products, u = torch.randn(4, 50, generator=generator), torch.randn(50, generator=generator)
    u /= u.norm()
    plain = spread_of_chunks(list(products), u, [8, 8, 8, 4])
    found = spread_of_chunks(list(products * scale * length), u * length, [8, 8, 8, 4])
    assert found.along == pytest.approx(plain.along * scale**2, rel=1e-3)
    assert found.outer == pytest.approx(plain.outer * scale**2, rel=1e-3)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_spread_is_never_negative(seed: int, size: int) -> None:
    """Of chunks that differ along u alone, where rounding decides the sign of the rest, it is zero or hardly more."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(size, generator=generator)
    products = [c * u for c in torch.randn(5, generator=generator)]
    found = spread_of_chunks(products, u, [2] * 5)
    assert 0 <= found.outer <= 1e-5 * found.along
    assert spread_of_chunks([products[0]] * 3, u, [1, 2, 3]).outer <= 1e-10 * found.along


def test_spread_of_a_broken_product_is_not_a_number() -> None:
    """A product with NaN shows in the result, and is not clipped to zero."""
    found = spread_of_chunks([torch.tensor([1.0, math.nan]), torch.ones(2)], torch.ones(2), [1, 1])
    assert math.isnan(found.outer) and math.isnan(found.along)


def test_spread_over_processes_is_that_of_the_whole() -> None:
    """With dot products summed over shares, each process gets the spread of the whole vectors in one reduction."""
    generator = torch.Generator().manual_seed(1)
    products, u = torch.randn(3, 10, generator=generator), torch.randn(10, generator=generator)
    heard: list[torch.Tensor] = []

    def listen(dots: torch.Tensor) -> torch.Tensor:
        heard.append(dots)
        return dots

    spread_of_chunks(list(products[:, 6:]), u[6:], [1, 2, 3], reduce=listen)
    assert [len(dots) for dots in heard] == [7]
    whole = spread_of_chunks(list(products), u, [1, 2, 3])
    share = spread_of_chunks(list(products[:, :6]), u[:6], [1, 2, 3], reduce=lambda dots: dots + heard[0])
    assert (share.outer, share.along) == (pytest.approx(whole.outer), pytest.approx(whole.along))


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: isotropic(1.0, -1.0, 1, 2), "variance=-1.0 must be a number, 0 or more"),
        (lambda: isotropic(1.0, math.nan, 1, 2), "variance=nan must be a number"),
        (lambda: isotropic(1.0, 1.0, 0, 2), "batch=0 must be a whole number, 1 or more"),
        (lambda: isotropic(1.0, 1.0, 3, 2), "full=2 must be a whole number, 3 or more"),
        (lambda: isotropic_inverse(1.0, 1.0, 3, 2), "full=2 must be a whole number, 3 or more"),
        (lambda: directional(1.0, NOTHING, 0, 1), "batch=0 must be a whole number"),
        (lambda: directional(1.0, NOTHING, 1, 0), "full=0 must be a whole number"),
        (lambda: spread_of_chunks([ONES], ONES, [1]), "products has 1 chunks and sizes 1: .*split the batch further"),
        (lambda: spread_of_chunks([ONES, ONES], ONES, [1]), "products has 2 chunks and sizes 1"),
        (lambda: spread_of_chunks([ONES, ONES], ONES, [1, 0]), r"sizes\[1\]=0 must be a whole number, 1 or more"),
        (
            lambda: spread_of_chunks([ONES, torch.ones(3)], ONES, [1, 1]),
            r"products\[1\] has shape \(3,\) and must have that of u, \(2,\)",
        ),
        (lambda: spread_of_chunks([ONES, ONES], 0 * ONES, [1, 1]), "u has norm 0 .*pass the top Ritz vector"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], text: str) -> None:
    """An argument out of bounds is told with its value and the bound."""
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("averaged", [False, True], ids=["summed", "averaged"])
@pytest.mark.parametrize("noise", [0.0, 0.3, 10.0])
def test_critical_rate_in_noise_is_that_of_the_second_moments(momentum: float, averaged: bool, noise: float) -> None:
    """One direction whose curvature comes anew each step: E x² shrinks just below the rate and grows just above."""
    curvature, kept = 2.0, (1 - momentum if averaged else 1.0)
    spread = HessianSpread(outer=0.0, along=noise * 10**6, samples=10**9)
    rate = critical_lr_in_noise(
        curvature,
        spread,
        batch=10**6,
        full=10**9,
        threshold=2 * (1 + momentum) / kept,
        inverse_gain=(1 - momentum) / kept,
    )

    def growth(lr: float) -> float:
        # m' = β m + kept h x, x' = x - lr m', on (x², x m, m²), with E h = λ and E h² = λ² + noise
        b, first, second = momentum, kept * curvature, kept**2 * (curvature**2 + noise)
        m2 = [second, 2 * b * first, b * b]  # E m'² from x², x m, m²
        xm = [first, b, 0.0]  # E x m'
        step = np.array(
            [
                [1 - 2 * lr * xm[0] + lr**2 * m2[0], -2 * lr * xm[1] + lr**2 * m2[1], lr**2 * m2[2]],
                [xm[0] - lr * m2[0], xm[1] - lr * m2[1], -lr * m2[2]],
                m2,
            ]
        )
        return float(np.abs(np.linalg.eigvals(step)).max())

    assert growth(0.98 * rate) < 1 < growth(1.02 * rate)


def test_processes_pool_their_chunks() -> None:
    """Two that hold five and two chunks of one batch both have the spread of the seven."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(6, generator=generator, dtype=torch.float64)
    products = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(7)]
    sizes = [4, 4, 3, 1, 2, 5, 4]
    meeting, given = threading.Barrier(2), {}

    def pool(number: int) -> Callable[[Tensor], Tensor]:
        def add(tensor: Tensor) -> Tensor:
            given[number] = tensor.clone()
            meeting.wait(10)
            total = given[0] + given[1]
            meeting.wait(10)
            return total

        return add

    def on(number: int) -> HessianSpread:
        mine = slice(None, 5) if number == 0 else slice(5, None)
        return spread_of_chunks(products[mine], u, sizes[mine], pool=pool(number))

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(on, range(2))
    expected = spread_of_chunks(products, u, sizes)
    assert first == second
    assert first.samples == expected.samples == 23
    assert (first.outer, first.along) == pytest.approx((expected.outer, expected.along), rel=1e-12)
