"""Densities and traces are checked against eigenvalues that are known, and their errors against theory."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynwatch.lanczos import lanczos
from dynwatch.operators import Operator, from_matrix
from dynwatch.spectral_density import SpectralDensity, spectral_density, trace

Array = NDArray[np.float64]


def diagonal(values: Array, dtype: torch.dtype = torch.float64) -> Operator:
    entries = torch.from_numpy(values).to(dtype)
    return Operator(lambda v: entries * v, len(values), len(values), dtype, torch.device("cpu"))


def rotated(values: Array, seed: int = 0) -> Operator:
    """A dense symmetric matrix with these eigenvalues: signs as probes are exact on a diagonal one."""
    n = len(values)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    A = (Q * values) @ Q.T
    return from_matrix(torch.from_numpy((A + A.T) / 2))


def neural(n: int) -> Array:
    """A spectrum as a small net's: ten outliers and a bulk near zero."""
    rng = np.random.default_rng(0)
    values = rng.exponential(0.003, size=n) * rng.choice([1.0, 1.0, 1.0, -0.5], size=n)
    values[:10] = np.arange(1, 11) ** -1.0
    return values


def spoilt(operator: Operator) -> Operator:
    return replace(operator, apply=lambda v: operator(v) * math.nan)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_moments_are_within_sampling_error(power: int, scale: float) -> None:
    """Σ w θᵏ is tr(Hᵏ)/n within four standard deviations of its sampling error, at all scales."""
    values = np.linspace(-1, 2, 1000) * scale
    density = spectral_density(diagonal(values), probes=4, steps=12)
    true = np.mean(values**power)
    deviation = math.sqrt(2 / 4000 * np.mean(values ** (2 * power)))
    assert (density.weights * density.nodes**power).sum() == pytest.approx(true, abs=4 * deviation, rel=0)


def test_moments_are_exactly_those_of_the_start() -> None:
    """Up to the degree 2 m − 1 the quadrature has no error but the start's: Σ w θᵏ = vᵀHᵏv."""
    values = np.linspace(-1, 2, 50)
    density = spectral_density(diagonal(values), steps=5, generator=torch.Generator().manual_seed(3))
    v = torch.randn(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    shares = v**2 / (v @ v)
    for power in range(10):
        assert (density.weights * density.nodes**power).sum() == pytest.approx((shares * values**power).sum(), rel=1e-9)
    assert abs((density.weights * density.nodes**10).sum() - (shares * values**10).sum()) > 1e-3


def test_nodes_are_in_order_and_weights_add_up() -> None:
    """Nodes of several probes are merged; weights are positive with sum 1, and counts are the products."""
    density = spectral_density(diagonal(neural(500)), probes=3, steps=10)
    assert (np.diff(density.nodes) >= 0).all()
    assert (density.weights >= 0).all() and density.weights.sum() == pytest.approx(1)
    assert (len(density.nodes), density.hvps, density.dimension) == (30, 30, 500)


def test_the_bulk_and_the_outliers_have_their_places() -> None:
    """Of a net-like spectrum the top node is the top eigenvalue, and the histogram has the bulk near zero."""
    values = neural(3000)
    density = spectral_density(diagonal(values, torch.float32))
    assert density.nodes[-1] == pytest.approx(1, rel=1e-4)
    edges, counts = density.histogram(40)
    zero = np.searchsorted(edges, 0.0) - 1
    true, _ = np.histogram(values, edges)
    assert counts[zero] + counts[zero + 1] == pytest.approx(true[zero] + true[zero + 1], rel=0.02)


@pytest.mark.parametrize(
    "values",
    [np.zeros(5), np.ones(5), np.full(5, 1e15), np.full(5, -1e-10), np.array([3.0]), np.linspace(0, 1e15, 40)],
    ids=["zero", "identity", "huge", "tiny negative", "one row", "wide"],
)
@pytest.mark.parametrize("bins", [1, 7])
def test_histograms_count_all_rows(values: Array, bins: int) -> None:
    """Counts add up to the rows and edges increase around all nodes, also where all eigenvalues are the same."""
    density = spectral_density(rotated(values))
    edges, counts = density.histogram(bins)
    assert (len(edges), len(counts)) == (bins + 1, bins)
    assert counts.sum() == pytest.approx(len(values)) and (counts >= 0).all()
    assert (np.diff(edges) > 0).all()
    assert edges[0] <= density.nodes[0] and density.nodes[-1] <= edges[-1]


def test_counts_are_where_the_nodes_are() -> None:
    """Two eigenvalues in exact shares fall into the outer bins, the largest into the last one."""
    density = SpectralDensity(np.array([0.0, 1.0]), np.array([0.25, 0.75]), 2, 8, "complete")
    edges, counts = density.histogram(4)
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert counts.tolist() == [2, 0, 0, 6]


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_densities_integrate_to_one(scale: float) -> None:
    """The broadened density has integral 1 and the mean of the nodes, at all scales."""
    density = spectral_density(diagonal(np.linspace(-1, 2, 200) * scale), steps=10)
    grid = np.linspace(-4, 5, 4001) * scale
    curve = density.density(grid, width=0.1 * scale)
    step = grid[1] - grid[0]
    assert curve.sum() * step == pytest.approx(1, rel=1e-6)
    assert (curve * grid).sum() * step == pytest.approx((density.weights * density.nodes).sum(), rel=1e-6)


def test_a_run_that_was_made_anyway_is_used() -> None:
    """From a random-start run the density is that of its Ritz values, without a product."""
    runs = [lanczos(diagonal(neural(300)), steps=8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    density = SpectralDensity.from_krylov(runs)
    assert density.hvps == 16
    assert density.nodes == pytest.approx(np.sort(np.concatenate([run.ritz for run in runs])))
    alone = SpectralDensity.from_krylov(runs[:1])
    assert alone.weights == pytest.approx(runs[0].weights)


def test_runs_that_say_nothing_about_a_density_are_refused() -> None:
    """No run, a given start and mixed operators are errors that say what to pass."""
    operator = diagonal(np.arange(5.0))
    random, given = lanczos(operator), lanczos(operator, start=torch.ones(5))
    text = (
        "runs[1] has a given start and must have a random one: other weights say nothing about the density. Call "
        "lanczos() or extreme_eigenvalues() without start."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        SpectralDensity.from_krylov([random, given])
    with pytest.raises(ValueError, match=r"^runs=\[\] must hold at least one Lanczos run\.$"):
        SpectralDensity.from_krylov([])
    text = "runs have dimensions [4, 5] and must have one: pass runs of one operator."
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        SpectralDensity.from_krylov([random, lanczos(diagonal(np.arange(4.0)))])


def test_products_that_are_not_finite_leave_no_nodes() -> None:
    """A density of nothing says so, is NaN where it is asked for and counts nobody; the trace is NaN."""
    operator = spoilt(diagonal(np.arange(5.0)))
    density = spectral_density(operator)
    assert (density.reason, len(density.nodes), density.hvps) == ("non_finite", 0, 1)
    assert np.isnan(density.density(np.zeros(3), 1.0)).all()
    assert density.histogram(3)[1].tolist() == [0, 0, 0]
    for found in (trace(operator), trace(operator, lanczos(operator))):
        assert math.isnan(found.value)
        assert (found.standard_error, found.reason) == (math.inf, "non_finite")


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "cpu"])
def test_storages_agree(storage: str) -> None:
    """However the basis is kept, the density's mean and the deflated trace come out alike."""
    operator = diagonal(neural(2000), torch.float32)
    plain, kept = spectral_density(operator, steps=10), spectral_density(operator, steps=10, storage=storage)
    assert (kept.weights * kept.nodes).sum() == pytest.approx((plain.weights * plain.nodes).sum(), rel=1e-3)
    deflated = trace(operator, lanczos(operator, steps=10, storage=storage))
    assert deflated.value == pytest.approx(neural(2000).sum(), abs=4 * deflated.standard_error)


@pytest.mark.parametrize("steps", [None, 1, 8], ids=["plain", "one step", "deflated"])
@pytest.mark.parametrize("signs", [True, False], ids=["signs", "normal vectors"])
def test_the_trace_has_no_bias(steps: int | None, signs: bool) -> None:
    """The mean over 300 seeds is the trace within four standard errors, which are what a single call reports."""
    values = np.concatenate([[5.0, -3.0], np.linspace(-1, 2, 58)])
    operator = rotated(values)
    if not signs:
        operator = replace(operator, draw=lambda g: torch.randn(60, generator=g, dtype=torch.float64))
    krylov = None if steps is None else lanczos(operator, steps=steps)
    found = [trace(operator, krylov, generator=torch.Generator().manual_seed(seed)) for seed in range(300)]
    estimates = np.array([f.value for f in found])
    deviation = estimates.std(ddof=1)
    assert estimates.mean() == pytest.approx(values.sum(), abs=4 * deviation / math.sqrt(300))
    reported = math.sqrt(np.mean([f.standard_error**2 for f in found]))
    assert reported == pytest.approx(deviation, rel=0.15)


def test_deflation_beats_plain_probes_of_the_same_cost() -> None:
    """On a net-like spectrum, at 12 products, half of them spent on a basis give the smaller error."""
    values = neural(300)
    operator = rotated(values)

    def error(basis: int) -> float:
        squares = []
        for seed in range(60):
            generator = torch.Generator().manual_seed(seed)
            krylov = lanczos(operator, steps=basis, generator=generator) if basis else None
            found = trace(operator, krylov, probes=12 - basis, generator=generator)
            squares.append((found.value / values.sum() - 1) ** 2)
        return math.sqrt(np.mean(squares))

    assert error(6) < 0.75 * error(0)


def test_a_basis_of_everything_gives_the_exact_trace() -> None:
    """A run that has spanned all rows needs no probe, and repeated eigenvalues leave only their copies to probe."""
    operator = rotated(np.array([1.0, -4.0, 2.5, 0.0, 1e-3]))
    found = trace(operator, lanczos(operator))
    assert found.value == pytest.approx(-0.499)
    assert (found.standard_error, found.hvps, found.reason) == (0.0, 0, "exact")
    repeated = rotated(np.array([2.0] * 9))
    found = trace(repeated, lanczos(repeated), probes=200)
    assert found.value == pytest.approx(18, abs=4 * found.standard_error)
    assert (found.hvps, found.reason) == (200, "complete")


@pytest.mark.parametrize("scale", [0.0, 1e-10, 1e15])
def test_signs_are_exact_on_a_diagonal(scale: float) -> None:
    """Random signs have no error on a diagonal matrix, at any scale and for one row."""
    for n in (1, 20):
        found = trace(diagonal(scale * np.arange(1.0, n + 1)), probes=2)
        assert found.value == pytest.approx(scale * n * (n + 1) / 2, rel=1e-12)
        assert found.standard_error <= 1e-12 * abs(found.value)


def test_normal_vectors_of_one_length_are_exact_on_the_identity() -> None:
    """Where signs have no meaning, the length of the normal vectors adds no noise."""
    operator = replace(diagonal(np.full(20, 3.0)), draw=lambda g: torch.randn(20, generator=g, dtype=torch.float64))
    for krylov in (None, lanczos(operator)):
        assert trace(operator, krylov, probes=2).value == pytest.approx(60, rel=1e-12)


def test_one_probe_knows_no_error() -> None:
    """The standard error of a single probe is infinite rather than zero."""
    assert trace(diagonal(np.arange(5.0)), probes=1).standard_error == math.inf


def test_the_same_seed_for_run_and_probes_is_no_trap() -> None:
    """By default the probes are not the start of the run, which the basis would project away."""
    values = np.concatenate([[1.0], np.zeros(400)])
    operator = rotated(values + 1)
    assert trace(operator, lanczos(operator, steps=1)).value == pytest.approx(402, rel=0.02)


@pytest.mark.parametrize("draws", [False, True], ids=["signs", "normal vectors"])
def test_every_dot_product_is_reduced(draws: bool) -> None:
    """Two processes with the same shares find the trace and the density of the matrix that they make together."""
    plain = rotated(neural(100))

    def reduce(dots: Tensor) -> Tensor:
        result = dots * 2
        dots.fill_(math.nan)  # as a collective may leave it
        return result

    draw = (lambda g: torch.randn(100, generator=g, dtype=torch.float64)) if draws else None
    both = replace(plain, dimension=200, reduce=reduce, draw=draw)
    total = 2 * neural(100).sum()
    found = trace(both, probes=50)
    assert found.value == pytest.approx(total, abs=4 * found.standard_error)
    if not draws:
        # Both draw the same, so what the probes see of the rest is twice the rest of one.
        krylov = lanczos(both, steps=5)
        found = trace(both, krylov, probes=50)
        assert found.value == pytest.approx(total - krylov.alpha.sum(), abs=4 * found.standard_error)
    density = spectral_density(both)
    assert density.histogram(10)[1].sum() == pytest.approx(200)
    assert density.nodes[-1] == pytest.approx(1)


@pytest.mark.parametrize("seed", [0, 1])
def test_probes_are_repeatable(seed: int) -> None:
    """The same generator state gives the same numbers, and no generator always the same ones."""
    operator = rotated(neural(50))
    one, two = (trace(operator, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert one == two
    assert trace(operator) == trace(operator) != one


def test_arguments_out_of_bounds_are_refused() -> None:
    """Each error names the argument, its value and its bound."""
    operator = diagonal(np.arange(5.0))
    density = spectral_density(operator)
    for text, call in {
        "probes=0 must be a whole number, 1 or more.": lambda: spectral_density(operator, probes=0),
        "steps=0 must be a whole number, 1 or more.": lambda: spectral_density(operator, steps=0),
        "probes=1.5 must be a whole number, 1 or more.": lambda: trace(operator, probes=1.5),  # type: ignore[arg-type]
        "bins=0 must be a whole number, 1 or more.": lambda: density.histogram(0),
        "width=0.0 must be a number above 0.": lambda: density.density(np.zeros(1), 0.0),
        "krylov has dimension 4 and must have the operator's, 5: pass a run on the same operator.": lambda: trace(
            operator, lanczos(diagonal(np.arange(4.0)))
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            call()
