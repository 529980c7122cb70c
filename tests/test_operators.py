"""Products with the Hessian against closed forms and dense Hessians by other means, on one and on two processes."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import numpy as np
import operators_run
import pytest
import torch
from operators_run import OWN, SAMPLES, N, symmetric, vector
from torch import Tensor, nn
from two_ranks import RANKS, Launch, launch

from dynwatch.lanczos import extreme_eigenvalues
from dynwatch.operators import (
    Operator,
    flatten,
    from_matrix,
    hessian,
    hessian_by_differences,
    preconditioned,
    unflatten,
    vector_dtype,
    weighted_mean,
)
from dynwatch.ranks import sharded

SCALES = [1e-10, 1.0, 1e15]


def dense(operator: Operator) -> Tensor:
    """The matrix, column by column."""
    return torch.stack([operator(row) for row in torch.eye(operator.size, dtype=operator.dtype)], 1)


def random_symmetric(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return drawn + drawn.T


def assert_close(found: Tensor, expected: Tensor, rel: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rel * float(expected.abs().max()), (found, expected)


# --- vectors


def test_flatten_and_back() -> None:
    """Tensors of different shapes, types and strides, an empty and a zero-dimensional one, come back as they were."""
    tensors = [
        torch.randn(3, 4).T,
        torch.randn(2).to(torch.bfloat16),
        torch.randn(2, 0),
        torch.tensor(5.0, dtype=torch.float16),
        torch.randn(1, 1, 3),
    ]
    flat = flatten(tensors)
    assert flat.shape == (18,) and flat.dtype == torch.float32
    back = unflatten(flat, tensors)
    assert [t.dtype for t in back] == [t.dtype for t in tensors]
    for found, original in zip(back, tensors, strict=True):
        assert torch.equal(found, original)


def test_flatten_nothing() -> None:
    """No tensors are a vector of no entries, and it is no tensors."""
    assert flatten([]).shape == (0,) and unflatten(flatten([]), []) == []


def test_flatten_gives_no_graph_and_a_copy() -> None:
    """The vector has no graph, and writing to it does not reach the tensors."""
    weight = torch.ones(2, requires_grad=True)
    flat = flatten([weight * 2])
    assert not flat.requires_grad
    flatten([weight]).add_(1)
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float64, torch.float16], torch.float64),
        ([], torch.float32),
    ],
)
def test_type_of_vectors(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    """It holds all parameters and is no narrower than float32."""
    assert vector_dtype([torch.zeros(1, dtype=dtype) for dtype in dtypes]) == expected


def test_a_vector_of_another_size_is_refused() -> None:
    """The message has both shapes and the remedy."""
    with pytest.raises(ValueError, match=re.escape("vector has shape (3,) and must have shape (2,): use flatten().")):
        from_matrix(torch.eye(2))(torch.ones(3))


# --- the exact Hessian


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n", [1, 5])
def test_quadratic_loss(n: int, scale: float) -> None:
    """½ xᵀAx has the Hessian A at any point and the gradient Ax, at every scale."""
    matrix = scale * random_symmetric(n)
    x = torch.randn(n, dtype=torch.float64, requires_grad=True)
    operator = hessian(x @ matrix @ x / 2, [x])
    assert_close(dense(operator), matrix)
    assert operator.gradient is not None and operator.approximate == ""
    assert_close(operator.gradient, matrix @ x.detach())


def test_logistic_regression() -> None:
    """The closed form Xᵀ diag(p (1 - p)) X / n, also where X has dependent columns."""
    X = torch.randn(20, 4, dtype=torch.float64)
    X[:, 3] = X[:, 0] - X[:, 1]
    y = (torch.arange(20) % 2).double()
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    loss = nn.functional.binary_cross_entropy_with_logits(X @ w, y)
    p = torch.sigmoid(X @ w.detach())
    expected = X.T @ torch.diag(p * (1 - p)) @ X / 20
    operator = hessian(loss, [w])
    assert_close(dense(operator), expected)
    found = extreme_eigenvalues(operator, ends="both", tol=1e-8)
    values = np.linalg.eigvalsh(expected.numpy())
    assert found.lambda_max == pytest.approx(values[-1], rel=1e-8)
    assert found.lambda_min == pytest.approx(0.0, abs=1e-12)


def linear_net() -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(2)
    weights = [torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    return weights, torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)


def loss_of_linear_net(flat: Tensor) -> Tensor:
    _, x, y = linear_net()
    first, second = flat[:12].view(3, 4), flat[12:].view(2, 3)
    return (x @ first.T @ second.T - y).square().mean()


def test_two_layers() -> None:
    """A linear net of two layers has the Hessian that autograd builds row by row, and .grad stays untouched."""
    weights, _, _ = linear_net()
    flat = flatten(weights)
    expected = torch.autograd.functional.hessian(loss_of_linear_net, flat)
    parameters = [w.requires_grad_() for w in weights]
    loss = loss_of_linear_net(torch.cat([p.reshape(-1) for p in parameters]))
    assert_close(dense(hessian(loss, parameters)), expected)
    assert all(p.grad is None for p in parameters)


def test_a_block_of_the_hessian() -> None:
    """With one layer's parameters the operator is that layer's diagonal block."""
    weights, _, _ = linear_net()
    expected = torch.autograd.functional.hessian(loss_of_linear_net, flatten(weights))[12:, 12:]
    parameters = [w.requires_grad_() for w in weights]
    loss = loss_of_linear_net(torch.cat([p.reshape(-1) for p in parameters]))
    assert_close(dense(hessian(loss, parameters[1:])), expected)


def test_products_of_a_net_are_symmetric_and_linear() -> None:
    """On a nonlinear net uᵀHv = vᵀHu and H(u + 2v) = Hu + 2Hv, over several products on one graph."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    operator = hessian(
        nn.functional.cross_entropy(net(torch.randn(9, 5).double()), torch.arange(9) % 3), [*net.parameters()]
    )
    u, v = torch.randn(2, operator.size, dtype=torch.float64)
    assert torch.dot(u, operator(v)).item() == pytest.approx(torch.dot(v, operator(u)).item(), rel=1e-10)
    assert_close(operator(u + 2 * v), operator(u) + 2 * operator(v))


def test_linear_loss() -> None:
    """A loss linear in all parameters has products of zero and its gradient."""
    x = torch.ones(3, requires_grad=True)
    operator = hessian((x * torch.arange(3.0)).sum(), [x])
    assert torch.equal(operator(torch.ones(3)), torch.zeros(3))
    assert operator.gradient is not None and operator.gradient.tolist() == [0.0, 1.0, 2.0]


def test_unused_and_linear_parameters() -> None:
    """Parameters that the loss does not use, or uses linearly, have rows and columns of zeros where they stand."""
    unused, curved, linear = (torch.full((2,), 3.0, dtype=torch.float64, requires_grad=True) for _ in range(3))
    operator = hessian((curved**2).sum() + linear.sum(), [unused, curved, linear])
    assert_close(dense(operator), torch.diag(torch.tensor([0.0, 0.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64)))
    assert operator.gradient is not None and operator.gradient.tolist() == [0, 0, 6, 6, 1, 1]


def test_a_parameter_given_twice_in_the_loss() -> None:
    """Tied weights are differentiated through both uses."""
    w = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    operator = hessian((w * w.flip(0)).sum() / 2, [w])
    assert_close(dense(operator), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Of parameters in half precision vectors are float32, and products those of the net up to its rounding."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    x, y = torch.randn(16, 4), torch.arange(16) % 2
    operator = hessian(nn.functional.cross_entropy(net(x.to(dtype)).float(), y), [*net.parameters()])
    assert operator.dtype == torch.float32 and operator(torch.ones(operator.size)).dtype == torch.float32
    exact = copy.deepcopy(net).double()  # net.double() would take the operator's parameters away
    expected = hessian(nn.functional.cross_entropy(exact(x.double()), y), [*exact.parameters()])
    found = extreme_eigenvalues(operator).lambda_max
    assert found == pytest.approx(extreme_eigenvalues(expected).lambda_max, rel=0.05)


def test_mixed_types() -> None:
    """Parameters of several types share vectors of the widest."""
    parameters = [torch.ones(2, dtype=d, requires_grad=True) for d in (torch.float64, torch.bfloat16, torch.float32)]
    operator = hessian(sum(((i + 1) * p.double() ** 2).sum() for i, p in enumerate(parameters)), parameters)  # type: ignore[arg-type]
    assert operator.dtype == torch.float64
    assert_close(dense(operator), torch.diag(torch.tensor([2.0, 2.0, 4.0, 4.0, 6.0, 6.0], dtype=torch.float64)))


def test_not_finite() -> None:
    """A loss of NaN has products of NaN, and does not raise."""
    x = torch.ones(2, requires_grad=True)
    operator = hessian((x**2).sum() * math.nan, [x])
    assert operator(torch.ones(2)).isnan().all()
    assert extreme_eigenvalues(operator).reason == "non_finite"


@pytest.mark.parametrize(("loss", "shape", "graph"), [("vector", "(2,)", True), ("constant", "()", False)])
def test_what_is_no_loss(loss: str, shape: str, graph: bool) -> None:
    """A vector, and a number without a graph, are refused with what they are."""
    x = torch.ones(2, requires_grad=True)
    given = x**2 if loss == "vector" else (x**2).sum().detach()
    with pytest.raises(ValueError, match=re.escape(f"loss has shape {shape} and requires_grad={graph}")):
        hessian(given, [x])


# --- differences


def smooth_gradient(matrix: Tensor, at: Tensor) -> Tensor:
    return torch.tanh(matrix @ at) @ matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_differences(scale: float, dtype: torch.dtype) -> None:
    """For a smooth loss they are the exact Hessian up to the type's error, at any scale of weights or of vectors."""
    matrix = random_symmetric(6, dtype=dtype) / scale
    weights = scale * torch.randn(6, dtype=dtype)
    operator = hessian_by_differences(lambda d: smooth_gradient(matrix, weights if d is None else weights + d), weights)
    expected = matrix @ torch.diag(1 - torch.tanh(matrix @ weights) ** 2) @ matrix
    assert operator.approximate == "central differences of the gradient"
    error = 1e-2 if dtype == torch.float32 else 1e-7
    v = torch.randn(6, dtype=dtype)
    for size in (1e-8, 1.0, 1e8):
        assert_close(operator(size * v), size * (expected @ v), error)
    assert operator.gradient is not None
    assert_close(operator.gradient, smooth_gradient(matrix, weights))


def test_differences_of_a_quadratic_loss() -> None:
    """Its gradient is linear, so that differences are exact up to rounding."""
    matrix = random_symmetric(5)
    weights = torch.randn(5, dtype=torch.float64)
    operator = hessian_by_differences(lambda d: matrix @ (weights if d is None else weights + d), weights)
    assert_close(dense(operator), matrix, 1e-8)


def test_differences_at_zero() -> None:
    """Weights of zero give steps that are not zero, and a vector of zero gives zero without asking for a gradient."""
    asked: list[Tensor | None] = []

    def gradient_at(displacement: Tensor | None) -> Tensor:
        asked.append(displacement)
        return torch.zeros(2) if displacement is None else 3 * displacement

    operator = hessian_by_differences(gradient_at, torch.zeros(2))
    assert torch.equal(operator(torch.zeros(2)), torch.zeros(2)) and asked == [None]
    assert_close(operator(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 6.0]), 1e-6)
    assert [d is None for d in asked] == [True, False, False]
    assert asked[1] is not None and asked[2] is not None and torch.equal(asked[1], -asked[2])


def test_step_of_differences() -> None:
    """Displacements have the norm relative_step |θ|, with the norm that is given."""
    sizes = []

    def gradient_at(displacement: Tensor | None) -> Tensor:
        if displacement is not None:
            sizes.append(float(displacement.norm()))
        return torch.zeros(4)

    weights = torch.full((4,), 3.0)
    hessian_by_differences(gradient_at, weights, relative_step=0.5)(torch.ones(4))
    hessian_by_differences(gradient_at, weights, 0.5, norm=lambda v: 2 * float(v.norm()))(torch.ones(4))
    # Of a vector twice as long for all processes together, this one's share of the step is half as long.
    assert sizes == pytest.approx([3.0, 3.0, 3.0, 3.0])


def test_differences_see_kinks() -> None:
    """A bend within the step looks like curvature: that is why they are marked approximate."""
    weights = torch.tensor([1e-4, 1.0])
    operator = hessian_by_differences(lambda d: torch.sign(weights if d is None else weights + d), weights)
    assert float(operator(torch.tensor([1.0, 0.0]))[0]) > 100  # the Hessian of |x| is zero there


# --- preconditioned


def test_preconditioned() -> None:
    """S (H + W) S, with a vector of weight decay, a number and none; it has the eigenvalues of S² (H + W)."""
    matrix = random_symmetric(4)
    scale = torch.tensor([0.0, 1.0, 2.0, 1e-3], dtype=torch.float64)
    for decay in (torch.tensor([1.0, 0.0, 3.0, 2.0], dtype=torch.float64), 0.5, 0.0):
        given = Operator(matrix.mv, 4, 4, torch.float64, torch.device("cpu"), gradient=torch.ones(4).double())
        W = torch.diag(decay) if isinstance(decay, Tensor) else decay * torch.eye(4, dtype=torch.float64)
        operator = preconditioned(given, scale, decay)
        S = torch.diag(scale)
        assert_close(dense(operator), S @ (matrix + W) @ S)
        assert operator.gradient is not None and torch.equal(operator.gradient, scale)
        values = np.linalg.eigvals((S @ S @ (matrix + W)).numpy()).real
        assert extreme_eigenvalues(operator, tol=1e-9).lambda_max == pytest.approx(values.max(), rel=1e-8)


def test_preconditioned_leaves_vectors_alone() -> None:
    """The vector that is given is the caller's, and is not changed."""
    v = torch.ones(2)
    preconditioned(from_matrix(torch.eye(2)), torch.tensor([2.0, 3.0]), 1.0)(v)
    assert v.tolist() == [1.0, 1.0]


# --- means


@pytest.mark.parametrize("scale", SCALES)
def test_weighted_mean(scale: float) -> None:
    """It is the mean of matrices and gradients by weight, at every scale, and of one operator that operator."""
    matrices = [scale * random_symmetric(3, seed) for seed in range(3)]
    operators = [
        Operator(m.mv, 3, 3, torch.float64, torch.device("cpu"), gradient=m[0], approximate=why)
        for m, why in zip(matrices, ("", "first", "second"), strict=True)
    ]
    operator = weighted_mean(operators, [1, 2, 5.0])
    assert_close(dense(operator), (matrices[0] + 2 * matrices[1] + 5 * matrices[2]) / 8)
    assert operator.gradient is not None
    assert_close(operator.gradient, (matrices[0][0] + 2 * matrices[1][0] + 5 * matrices[2][0]) / 8)
    assert operator.approximate == "first"
    assert_close(dense(weighted_mean(operators[:1], [7])), matrices[0])


def test_mean_of_micro_batches_is_the_whole_batch() -> None:
    """Hessians of unequal parts of a batch, weighted by their samples, are that of the batch."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(10, 3).double(), torch.arange(10) % 2
    parameters = [*net.parameters()]

    def part(rows: slice) -> Operator:
        return hessian(nn.functional.cross_entropy(net(x[rows]), y[rows]), parameters)

    whole, mean = part(slice(None)), weighted_mean([part(slice(0, 7)), part(slice(7, 10))], [7, 3])
    assert_close(dense(mean), dense(whole))
    assert mean.gradient is not None and whole.gradient is not None
    assert_close(mean.gradient, whole.gradient)


def test_gradients_are_left_out_of_a_mean_if_one_is_missing() -> None:
    """Without all gradients there is no mean of them, and the operators keep theirs."""
    gradient = torch.ones(2)
    with_one = Operator(torch.eye(2).mv, 2, 2, torch.float32, torch.device("cpu"), gradient=gradient)
    assert weighted_mean([with_one, from_matrix(torch.eye(2))], [1, 1]).gradient is None
    weighted_mean([with_one, with_one], [1, 3])
    assert gradient.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], [], "operators of sizes [] and 0 weights"),
        ([2], [1, 1], "operators of sizes [2] and 2 weights"),
        ([2, 3], [1, 1], "operators of sizes [2, 3] and 2 weights"),
        ([2, 2], [1, 0], "weights=[1, 0] must be positive"),
        ([2, 2], [1, math.nan], "weights=[1, nan] must be positive"),
    ],
)
def test_means_of_what_does_not_fit(sizes: list[int], weights: list[float], message: str) -> None:
    """Nothing, unequal numbers or sizes, and weights that are not positive are refused with what was given."""
    with pytest.raises(ValueError, match=re.escape(message)):
        weighted_mean([from_matrix(torch.eye(n)) for n in sizes], weights)


# --- two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder: Path = tmp_path_factory.mktemp("operators")
    return launch(operators_run.__file__, "operators", folder, apart=True)


def mean_of(values: list[Tensor]) -> Tensor:
    return (SAMPLES[0] * values[0] + SAMPLES[1] * values[1]) / sum(SAMPLES)


@pytest.mark.slow
def test_mean_over_ranks(two: Launch) -> None:
    """Products, gradients and eigenvalues are those of the mean by samples, on both ranks; dots are rank 0's."""
    matrix = mean_of([symmetric(rank) for rank in RANKS])
    values = np.linalg.eigvalsh(matrix.numpy())
    for result in two["mean"]:
        assert result["product"] == pytest.approx((matrix @ vector(9)).tolist(), rel=1e-12)
        assert result["extremes"] == pytest.approx([values[-1], values[0]], rel=1e-8)
        assert result["dots"] == [1.0]
    for result in two["mean_of_gradients"]:
        assert result["gradient"] == pytest.approx(mean_of([vector(rank) for rank in RANKS]).tolist(), rel=1e-12)
    assert two["mean"][0]["extremes"] == two["mean"][1]["extremes"]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "call"), [(0, 3), (1, 1)])
def test_a_product_that_raises_on_one_rank(two: Launch, rank: int, call: int) -> None:
    """Both ranks get NaN and end at the same product; the rank notes why, and takes part without computing more."""
    for result in two[f"raising_{rank}"]:
        assert (result["reason"], result["hvps"]) == ("non_finite", call)
        assert math.isnan(result["lambda_max"])
        assert all(map(math.isnan, result["again"]))
    failed, other = two[f"raising_{rank}"][rank], two[f"raising_{rank}"][1 - rank]
    assert "no memory" in failed["error"] and other["error"] == "None"
    assert (failed["calls"], other["calls"]) == (call, call + 1)


@pytest.mark.slow
def test_shards(two: Launch) -> None:
    """Entries over ranks, some on both, are one matrix: eigenvalues, norms, products and traces are the dense ones."""
    matrix = symmetric(4)
    values = np.linalg.eigvalsh(matrix.numpy())
    gradient = vector(5)
    for result in two["shards"]:
        assert result["dimension"] == N
        assert result["extremes"] == pytest.approx([values[-1], values[0]], rel=1e-8)
        assert result["norm"] == pytest.approx(float(gradient.norm()), rel=1e-12)
        assert result["along_gradient"] == pytest.approx(float(gradient @ matrix @ gradient), rel=1e-10)
        assert result["whole_trace"] == pytest.approx(float(matrix.trace()), rel=1e-9)
        spread = math.sqrt(2 * float(matrix.square().sum()) / operators_run.PROBES)
        assert abs(result["trace"] - float(matrix.trace())) < 5 * spread


@pytest.mark.slow
def test_random_vectors_over_shards(two: Launch) -> None:
    """Both ranks draw the same for what both hold, other numbers for their own, and go on in step."""
    first, second = two["shards"]
    both = [i for i in range(N) if i in OWN[0] and i in OWN[1]]
    for mine, theirs in zip(first["drawn"], second["drawn"], strict=True):
        assert mine[-len(both) :] == theirs[-len(both) :]
        assert not set(mine[: -len(both)]) & set(theirs[: -len(both)])
    assert first["drawn"][0] != first["drawn"][1]
    assert first["next"] == second["next"]


def test_shards_of_a_single_process() -> None:
    """A mask of another shape is refused before any process group is needed."""
    with pytest.raises(ValueError, match=re.escape("replicated has shape (3,) and must have shape (2,)")):
        sharded(from_matrix(torch.eye(2)), torch.zeros(3, dtype=torch.bool))
