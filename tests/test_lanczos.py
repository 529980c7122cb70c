"""Eigenvalues and their error bars against dense `eigvalsh`, on matrices that are hard in different ways."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynwatch.krylov import Basis
from dynwatch.lanczos import Extremes, extreme_eigenvalues, lanczos
from dynwatch.operators import Operator, from_matrix

Array = NDArray[np.float64]

KINDS = ["semicircle", "power law", "outliers", "clustered top", "mostly negative", "low rank"]
STARTS = ["random", "gradient", "earlier Ritz vector"]


def spectrum(kind: str, n: int, rng: np.random.Generator) -> Array:
    """Eigenvalues of about unit size."""
    if kind == "semicircle":
        M = rng.normal(size=(n, n))
        return np.linalg.eigvalsh(M + M.T) / math.sqrt(2 * n)
    if kind == "power law":
        return np.arange(1, n + 1) ** -rng.uniform(0.3, 3.0)
    k = min(n, int(rng.integers(1, 8)))
    if kind == "outliers":
        values = rng.exponential(0.02, size=n) * rng.choice([1.0, 1.0, 1.0, -0.5], size=n)
        values[:k] = np.arange(1, k + 1) ** -rng.uniform(0.3, 1.5)
    elif kind == "clustered top":
        values = 0.1 * rng.normal(size=n)
        values[:k] = 1 - 10 ** rng.uniform(-4, -1) * rng.random(size=k)
    elif kind == "mostly negative":
        values = rng.exponential(0.05, size=n)
        values[:k] = -rng.uniform(0.5, 1, size=k)
    else:
        values = np.zeros(n)
        values[:k] = rng.normal(size=k)
    return values


def matrix_of(values: Array, rng: np.random.Generator) -> Array:
    """A symmetric matrix with these eigenvalues, in a random basis."""
    Q, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def start_of(kind: str, matrix: Array, rng: np.random.Generator) -> Tensor | None:
    """A start as a monitor has it: none, a vector that A has been applied to, or the top of a matrix nearby."""
    n = len(matrix)
    if kind == "random":
        return None
    if kind == "gradient":
        return torch.from_numpy(matrix @ rng.normal(size=n))
    size = np.abs(np.linalg.eigvalsh(matrix)).max()
    E = rng.normal(size=(n, n)) * size * 10 ** rng.uniform(-3, -0.5) / math.sqrt(8 * n)
    return torch.from_numpy(np.linalg.eigh(matrix + E + E.T)[1][:, -1].copy())


def cases(count: int, seed: int) -> Iterator[tuple[str, Array, Tensor | None]]:
    rng = np.random.default_rng(seed)
    for i in range(count):
        n = int(math.exp(rng.uniform(math.log(2), math.log(301))))
        A = matrix_of(spectrum(KINDS[i % 6], n, rng), rng)
        start = STARTS[i // 6 % 3]
        yield start, A * 10 ** rng.uniform(-10, 15), start_of(start, A, rng)


def operator_of(matrix: Array | Tensor, dtype: torch.dtype = torch.float64) -> Operator:
    return from_matrix(torch.as_tensor(matrix).to(dtype))


def counted(operator: Operator) -> tuple[Operator, list[int]]:
    """The operator, and a list that grows with each product."""
    calls: list[int] = []

    def product(vector: Tensor) -> Tensor:
        calls.append(1)
        return operator(vector)

    return replace(operator, apply=product), calls


def check_ritz_pair(found: Extremes, matrix: Array) -> None:
    """The top vector has norm 1 and the Rayleigh quotient that was reported."""
    top = found.top.double().numpy()
    assert np.linalg.norm(top) == pytest.approx(1, rel=1e-5)
    assert top @ matrix @ top == pytest.approx(found.lambda_max, rel=1e-4, abs=1e-5 * np.abs(matrix).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_error_bars_hold(dtype: torch.dtype) -> None:
    """Over six families of spectra, sizes 2 to 300, three starts and 25 decades, 99 % of the true errors are inside."""
    generator = torch.Generator().manual_seed(1)
    inside: dict[str, list[bool]] = {start: [] for start in STARTS}
    for start, A, vector in cases(1026, seed=2):
        found = extreme_eigenvalues(operator_of(A, dtype), start=vector, generator=generator)
        true = np.linalg.eigvalsh(torch.from_numpy(A).to(dtype).double().numpy())[-1]
        inside[start].append(abs(found.lambda_max - true) <= found.lambda_max_error)
        if found.reason == "converged":
            assert found.lambda_max_error <= 0.11 * abs(found.lambda_max)  # ten times the tolerance, and noise
    assert {start: len(held) for start, held in inside.items()} == dict.fromkeys(STARTS, 342)
    assert np.mean([np.mean(held) for held in inside.values()]) >= 0.99
    assert min(np.mean(held) for held in inside.values()) >= 0.98


def test_error_bars_of_both_ends_hold() -> None:
    """The same for the smallest eigenvalue, which comes from the same products."""
    generator = torch.Generator().manual_seed(1)
    held = []
    for _, A, vector in cases(300, seed=3):
        found = extreme_eigenvalues(operator_of(A), ends="both", start=vector, generator=generator)
        true = np.linalg.eigvalsh(A)
        assert found.lambda_min is not None and found.lambda_min_error is not None
        held.append(abs(found.lambda_max - true[-1]) <= found.lambda_max_error)
        held.append(abs(found.lambda_min - true[0]) <= found.lambda_min_error)
    assert np.mean(held) >= 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_a_tight_tolerance_reaches_dense_accuracy(kind: str, n: int) -> None:
    """In float64, with as many products as rows, both ends agree with `eigvalsh` to 1e-10."""
    rng = np.random.default_rng(n)
    A = matrix_of(spectrum(kind, n, rng), rng)
    true = np.linalg.eigvalsh(A)
    found = extreme_eigenvalues(operator_of(A), ends="both", tol=1e-13, max_hvps=n)
    size = np.abs(true).max()
    assert found.hvps <= n
    assert found.lambda_max == pytest.approx(true[-1], abs=1e-10 * size)
    assert found.lambda_min == pytest.approx(true[0], abs=1e-10 * size)
    check_ritz_pair(found, A)


def test_the_largest_is_not_the_largest_in_size() -> None:
    """diag(−5, 1) has 1 and −5, where power iteration says −5."""
    found = extreme_eigenvalues(operator_of(torch.diag(torch.tensor([-5.0, 1.0]))), ends="both")
    assert (found.lambda_max, found.lambda_min) == (pytest.approx(1), pytest.approx(-5))
    assert (found.hvps, found.reason) == (2, "exhausted")
    assert found.bottom is not None
    assert found.bottom.abs().tolist() == pytest.approx([1, 0], abs=1e-10)
    assert found.top.abs().tolist() == pytest.approx([0, 1], abs=1e-10)


@pytest.mark.parametrize("given", [False, True], ids=["random start", "given start"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-10, 1.0, 1e15, 1e30])
def test_a_multiple_of_the_identity_ends_at_once(scale: float, given: bool) -> None:
    """Nothing leaves the first Krylov space; a given start is followed by one random vector, then it ends."""
    start = torch.ones(50) if given else None
    found = extreme_eigenvalues(operator_of(scale * torch.eye(50), torch.float32), ends="both", start=start)
    assert found.lambda_max == pytest.approx(scale, rel=1e-5)
    assert found.lambda_min == pytest.approx(scale, rel=1e-5)
    assert abs(found.lambda_max - float(np.float32(scale))) <= found.lambda_max_error <= 1e-3 * scale
    assert (found.hvps, found.reason) == (2 if given else 1, "invariant_subspace")


def test_rank_one() -> None:
    """Two products know all of a matrix of rank one, and its null space."""
    x = torch.arange(1.0, 31.0, dtype=torch.float64)
    found = extreme_eigenvalues(operator_of(torch.outer(x, x)), ends="both")
    assert found.lambda_max == pytest.approx(float(x @ x))
    assert found.lambda_min == pytest.approx(0, abs=1e-8)
    assert (found.hvps, found.reason) == (2, "invariant_subspace")


def test_repeated_extremes() -> None:
    """Eigenvalues of multiplicity 7 at both ends are found once each, exactly."""
    values = np.array([2.0] * 7 + [0.5] * 20 + [-1.0] * 7)
    A = matrix_of(values, np.random.default_rng(0))
    krylov = lanczos(operator_of(A))
    assert krylov.ritz == pytest.approx([-1, 0.5, 2])
    assert krylov.reason == "invariant_subspace"


def test_one_row() -> None:
    """A matrix of one row needs one product and is known up to rounding."""
    found = extreme_eigenvalues(operator_of(torch.tensor([[-3.0]])), ends="both")
    assert (found.lambda_max, found.lambda_min, found.hvps, found.reason) == (-3.0, -3.0, 1, "exhausted")
    assert 0 <= found.lambda_max_error < 1e-13


def test_a_start_without_randomness_is_followed_by_one() -> None:
    """An eigenvector as start would never leave itself; a second random start finds what it hides."""
    operator = operator_of(torch.diag(torch.tensor([1.0, 3.0, 2.0, 0.0, 0.5, 0.25, 0.1])))
    found = extreme_eigenvalues(operator, start=torch.eye(7)[0], mix=0.0)
    assert found.lambda_max == pytest.approx(3, rel=1e-2)
    assert found.krylov.beta[0] == 0 and found.krylov.weights.sum() == pytest.approx(1)
    assert found.krylov.weights[np.isclose(found.krylov.ritz, 1)].sum() == pytest.approx(1)


def test_a_start_that_has_lost_the_top_recovers() -> None:
    """From the second eigenvector, readings that each start at the last Ritz vector reach the first in eight."""
    values = np.concatenate([[1.0, 0.6], 0.02 * np.random.default_rng(0).normal(size=2000)])
    start, found = torch.eye(2002)[1], []
    for seed in range(300, 308):
        generator = torch.Generator().manual_seed(seed)
        found.append(extreme_eigenvalues(diagonal(values), start=start, generator=generator))
        start = found[-1].top
    assert found[0].lambda_max < 0.7
    assert found[-1].lambda_max == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 3])
def test_a_product_that_is_not_finite_ends_it(bad: float, at: int) -> None:
    """Values are NaN and errors infinite, and no more products are asked for."""
    A = operator_of(np.diag(np.arange(20.0)))
    operator, calls = counted(A)
    spoilt = replace(operator, apply=lambda v: operator(v) * (bad if len(calls) == at else 1.0))
    found = extreme_eigenvalues(spoilt, ends="both")
    assert math.isnan(found.lambda_max) and found.lambda_min is not None and math.isnan(found.lambda_min)
    assert found.lambda_max_error == found.lambda_min_error == math.inf
    assert found.top.isnan().all() and found.top.shape == (20,)
    assert (found.reason, found.hvps, len(calls), len(found.krylov.alpha)) == ("non_finite", at, at, at - 1)


@pytest.mark.parametrize("start", [torch.zeros(20), torch.full((20,), math.nan), torch.full((20,), math.inf)], ids=str)
def test_a_useless_start_is_replaced_by_a_random_one(start: Tensor) -> None:
    """Zero, NaN and infinite starts give what no start gives."""
    operator = operator_of(np.diag(np.arange(20.0)))
    found, plain = extreme_eigenvalues(operator, start=start), extreme_eigenvalues(operator)
    assert found.krylov.random_start
    assert (found.lambda_max, found.hvps) == (plain.lambda_max, plain.hvps)


@pytest.mark.parametrize("start", [None, torch.ones(60)], ids=["random start", "given start"])
@pytest.mark.parametrize("max_hvps", [1, 2, 5, 30])
def test_products_are_counted_and_bounded(start: Tensor | None, max_hvps: int) -> None:
    """`hvps` is the number of products, and never more than allowed."""
    rng = np.random.default_rng(0)
    operator, calls = counted(operator_of(matrix_of(spectrum("semicircle", 60, rng), rng)))
    found = extreme_eigenvalues(operator, max_hvps=max_hvps, start=start)
    assert found.hvps == len(calls) == len(found.krylov.basis) <= max_hvps
    assert found.reason == ("converged" if max_hvps == 30 else "max_hvps")


def neural(n: int = 3000) -> Array:
    """A spectrum as a small net's: ten outliers and a bulk near zero."""
    rng = np.random.default_rng(0)
    values = rng.exponential(0.003, size=n) * rng.choice([1.0, 1.0, 1.0, -0.5], size=n)
    values[:10] = np.arange(1, 11) ** -1.0
    return values


def diagonal(values: Array, dtype: torch.dtype = torch.float32) -> Operator:
    entries = torch.from_numpy(values).to(dtype)
    return Operator(lambda v: entries * v, len(values), len(values), dtype, torch.device("cpu"))


def test_a_good_start_needs_fewer_products() -> None:
    """A net-like spectrum takes at most 7 products from a random start and 4 from a rough Ritz vector."""
    values = neural()
    near = torch.zeros(len(values))
    near[0] = 1
    near[1:10] = 0.1 * torch.randn(9, generator=torch.Generator().manual_seed(0))
    cold, warm = (extreme_eigenvalues(diagonal(values), start=start) for start in (None, near))
    assert cold.reason == warm.reason == "converged"
    assert warm.lambda_max == pytest.approx(1, rel=1e-3) and cold.lambda_max == pytest.approx(1, rel=1e-3)
    assert warm.hvps <= 4 < cold.hvps <= 7


def test_no_ghosts() -> None:
    """With full reorthogonalisation 60 steps show each outlier once, though it converges after a few."""
    ritz = lanczos(diagonal(neural(1000)), steps=60).ritz
    outliers = ritz[ritz > 0.06]
    assert outliers == pytest.approx(1 / np.arange(10, 0, -1), rel=1e-4)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "cpu"])
def test_storages_agree(storage: str) -> None:
    """Rounded and host-side bases give the same extremes, within their error bars and to 1e-4, and unit vectors."""
    values = neural()
    found = extreme_eigenvalues(diagonal(values), ends="both", storage=storage)
    assert found.lambda_max == pytest.approx(1, rel=1e-4)
    assert abs(found.lambda_max - 1) <= found.lambda_max_error <= 1e-2
    assert found.lambda_min is not None and found.lambda_min_error is not None
    assert abs(found.lambda_min - values.min()) <= found.lambda_min_error
    assert float(found.top.norm()) == pytest.approx(1, rel=1e-5)
    assert found.top.dtype == torch.float32
    assert float(found.top[0].abs()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("storage", "dtype"), [("float32", torch.float64), ("bfloat16", torch.bfloat16)])
def test_the_basis_is_kept_as_asked(storage: str, dtype: torch.dtype) -> None:
    """Wide vectors stay wide, rounded ones take two bytes, and memory is for the steps taken, not those allowed."""
    basis = lanczos(diagonal(neural(), torch.float64), steps=6, storage=storage).basis
    assert {block.dtype for block in basis._blocks} == {dtype}
    assert sum(len(block) for block in basis._blocks) == 8


def test_the_basis_is_orthonormal() -> None:
    """After 60 steps in float32 the rows are orthonormal to rounding."""
    basis = lanczos(diagonal(neural(1000)), steps=60).basis
    Q = torch.cat(basis._blocks)[: len(basis)]
    assert float((Q @ Q.T - torch.eye(60)).abs().max()) < 1e-5
    v = torch.randn(1000)
    assert float(basis.dots(basis.project_out(v)).abs().max()) < 1e-5
    assert torch.allclose(basis.combine(basis.dots(v)), Q.T @ (Q @ v), atol=1e-5)


def test_asymmetric_products_widen_the_error_bar() -> None:
    """The larger the part of the products that no symmetric matrix has, the wider the error bar."""
    rng = np.random.default_rng(0)
    A = matrix_of(neural(200), rng)
    E = rng.normal(size=(200, 200)) / math.sqrt(200)
    clean = extreme_eigenvalues(operator_of(A), tol=1e-4)
    before = clean.krylov.noise
    assert before < 1e-13
    for size in (1e-5, 1e-4, 1e-3):
        found = extreme_eigenvalues(operator_of(A + size * E), tol=1e-4)
        assert abs(found.lambda_max - 1) <= found.lambda_max_error
        assert found.krylov.noise > 3 * before
        before = found.krylov.noise


def test_noise_ends_the_search_early() -> None:
    """Where the products are too rough for the tolerance it stops, says so, and does not spend the rest."""
    rng = np.random.default_rng(0)
    A = matrix_of(neural(200), rng) + 0.02 * rng.normal(size=(200, 200))
    found = extreme_eigenvalues(operator_of(A), max_hvps=100)
    assert found.reason == "noise"
    assert found.hvps < 20
    assert 1e-2 * found.lambda_max < found.lambda_max_error < 1


def test_every_dot_product_is_reduced() -> None:
    """Two processes with the same shares, each seeing half of every square, find the eigenvalues of their matrix."""
    rng = np.random.default_rng(0)
    A = matrix_of(spectrum("outliers", 50, rng), rng)
    plain = operator_of(A)

    def reduce(dots: Tensor) -> Tensor:
        result = dots * 2
        dots.fill_(math.nan)  # as a collective may leave it
        return result

    found = extreme_eigenvalues(replace(plain, dimension=100, reduce=reduce), ends="both", tol=1e-4)
    true = np.linalg.eigvalsh(A)
    assert found.lambda_max == pytest.approx(true[-1], rel=1e-4)
    assert found.lambda_min == pytest.approx(true[0], abs=1e-4)
    assert float(found.top.norm()) == pytest.approx(math.sqrt(0.5))


def test_products_are_not_written_to() -> None:
    """What the operator returned is its own: it may be the vector that it was given, or be used again."""
    entries, returned = torch.arange(1.0, 21.0), []

    def product(vector: Tensor) -> Tensor:
        found = entries * vector
        returned.append((found, found.clone()))
        return found

    extreme_eigenvalues(Operator(product, 20, 20, torch.float32, torch.device("cpu")))
    assert len(returned) > 3
    assert all(torch.equal(found, copy) for found, copy in returned)


def test_a_generator_makes_it_repeatable() -> None:
    """Without a generator two calls agree to the last bit; with another seed they start elsewhere."""
    operator = diagonal(neural())
    one, two = extreme_eigenvalues(operator), extreme_eigenvalues(operator)
    other = extreme_eigenvalues(operator, generator=torch.Generator().manual_seed(5))
    assert one.lambda_max == two.lambda_max
    assert one.krylov.alpha[0] != other.krylov.alpha[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ends": "min"}, "ends='min' must be 'max' (the largest eigenvalue) or 'both' (the smallest too)."),
        ({"tol": 0.0}, "tol=0.0 must be a number above 0."),
        ({"tol": math.nan}, "tol=nan must be a number above 0."),
        ({"max_hvps": 0}, "max_hvps=0 must be a whole number, 1 or more."),
        ({"mix": -0.1}, "mix=-0.1 must be a number, 0 or more."),
        (
            {"storage": "float16"},
            "storage='float16' must be 'float32' (fast), 'bfloat16' (half the memory) or 'cpu' (none on the "
            "accelerator).",
        ),
        ({"start": torch.ones(3)}, "start has shape (3,) and must have shape (2,): use flatten()."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_out_of_bounds_are_refused(arguments: dict[str, object], text: str) -> None:
    """Each error names the argument, its value, the bound and what to do."""
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        extreme_eigenvalues(from_matrix(torch.eye(2)), **arguments)


def test_an_operator_without_rows_is_refused() -> None:
    """No parameters, no eigenvalues: the error says what to pass."""
    with pytest.raises(
        ValueError, match=r"^operator has dimension 0 and must have at least one row: pass parameters\.$"
    ):
        lanczos(from_matrix(torch.zeros(0, 0)))


def test_an_empty_basis_projects_nothing_out() -> None:
    """A basis without vectors leaves a vector as it is."""
    v = torch.ones(3)
    assert torch.equal(Basis(from_matrix(torch.eye(3))).project_out(v), v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("at", [1, 3])
def test_a_failure_on_one_process_meets_the_others(
    at: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory runs out on one rank, it asks for the same collectives as the others, until NaN ends them all."""
    asked: list[tuple[object, ...]] = []
    told: list[Exception] = []
    broken_at = 0

    def product(vector: Tensor) -> Tensor:
        asked.append(("product",))
        products = sum(each == ("product",) for each in asked)
        return vector * math.nan if products == at else vector * torch.arange(1.0, 6.0, dtype=dtype)

    def reduce(dots: Tensor) -> Tensor:
        asked.append((dots.shape, dots.dtype))
        return dots

    appended = Basis.append

    def full(self: Basis, vector: Tensor) -> None:
        if len(self) + 1 == broken_at:
            raise MemoryError("full")
        appended(self, vector)

    monkeypatch.setattr(Basis, "append", full)
    operator = Operator(product, 5, 5, dtype, torch.device("cpu"), reduce=reduce, failed=told.append)
    assert extreme_eigenvalues(operator).reason == "non_finite"
    of_the_others = list(asked)
    assert (len(told), asked.count(("product",))) == (0, at)
    asked.clear()
    broken_at = at
    assert extreme_eigenvalues(operator).reason == "non_finite"
    assert asked == of_the_others
    assert len(told) == 1
    with pytest.raises(MemoryError):
        extreme_eigenvalues(replace(operator, failed=None))
