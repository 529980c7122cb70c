"""Norms against float64 NumPy and PyTorch's own clipping, over inputs of every size, dtype and layout."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynwatch.gradients import (
    NonFinite,
    combine_norms,
    find_nonfinite,
    group_norms,
    tensor_norms,
    update_and_weight_norms,
)

NORM_TYPES = [0.5, 1.0, 2.0, 3.0, 10.0, math.inf]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
NORM = st.floats(0, 1e6) | st.floats(1e-300, 1e-150) | st.floats(1e150, 1e300)
PLACE = st.integers(0, 99)

norm_types = pytest.mark.parametrize("norm_type", NORM_TYPES)


def sparse(indices: list[int], values: list[float], size: int = 10) -> Tensor:
    """A COO tensor that is not coalesced: entries of one index are meant to be summed."""
    with torch.sparse.check_sparse_tensor_invariants(False):
        return torch.sparse_coo_tensor(torch.tensor([indices], dtype=torch.long), torch.tensor(values), (size,))


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "rank 0": lambda: torch.randn(()),
    "one entry": lambda: torch.randn(1),
    "empty": lambda: torch.randn(3, 0, 2),
    "zeros": lambda: torch.zeros(4, 4),
    "transposed": lambda: torch.randn(7, 5).T,
    "every other": lambda: torch.randn(40)[::2],
    "expanded": lambda: torch.randn(3, 1).expand(3, 6),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "sparse": lambda: sparse([1, 4, 1], [3.0, -2.0, 1.0]),
    "sparse and empty": lambda: sparse([], []),
    "sparse that cancels": lambda: sparse([2, 2], [5.0, -5.0]),
    "leaf that requires grad": lambda: torch.randn(4, requires_grad=True),
    "result with a graph": lambda: torch.randn(4, requires_grad=True).exp(),
    "conjugate view": lambda: torch.randn(5, dtype=torch.complex64).conj(),
    "nn.Parameter": lambda: nn.Parameter(torch.randn(3, 3)),
}


def exact(tensor: Tensor, norm_type: float) -> float:
    """The norm in float64, with the largest entry divided out, by NumPy."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    entries = np.abs(dense.resolve_conj().to(torch.complex128).numpy().reshape(-1))
    if entries.size == 0 or entries.max() == 0 or not np.isfinite(entries).all():
        return float(entries.sum())
    return float(entries.max() * np.linalg.norm(entries / entries.max(), norm_type))


@norm_types
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-10, 1e-6, 1.0, 1e4, 1e10, 1e15, 1e25])
def test_norms_are_exact_at_any_magnitude(norm_type: float, dtype: torch.dtype, scale: float) -> None:
    """No power under- or overflows on the way to a norm that itself fits."""
    tensor = (torch.randn(3, 41, dtype=torch.float64) * min(scale, 1e4 if dtype == torch.float16 else scale)).to(dtype)
    assert tensor_norms([tensor], norm_type).item() == pytest.approx(exact(tensor, norm_type), rel=1e-6, abs=0)


@norm_types
@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300])
def test_float64_has_its_own_range(norm_type: float, scale: float) -> None:
    """Entries whose squares do not even fit into float64 have a norm too."""
    tensor = torch.randn(300, dtype=torch.float64) * scale
    assert tensor_norms([tensor], norm_type).item() == pytest.approx(exact(tensor, norm_type), rel=1e-6, abs=0)


@norm_types
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_do_not_depend_on_the_layout(norm_type: float, layout: str) -> None:
    """Strided, expanded, sparse, empty and rank-0 tensors have the norm of their entries."""
    tensor = LAYOUTS[layout]()
    found = tensor_norms([tensor], norm_type)
    assert found.item() == pytest.approx(exact(tensor, norm_type), rel=1e-6, abs=0)
    assert not found.requires_grad


@norm_types
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_tensors_keep_their_digits(norm_type: float, dtype: torch.dtype) -> None:
    """A million entries are summed to 1e-6 (1e-5 for rare norms), which one float32 sum does not do."""
    tensor = (torch.rand(1_000_000) + 0.5).to(dtype)
    tolerance = 1e-6 if norm_type == 2 else 1e-5
    assert tensor_norms([tensor], norm_type).item() == pytest.approx(exact(tensor, norm_type), rel=tolerance)


def test_a_sum_of_squares_beyond_float64_is_no_error() -> None:
    """Two pieces whose squares fit one by one and not together (math.fsum would raise)."""
    tensor = torch.full((1 << 17,), 4e151, dtype=torch.float64)
    assert tensor_norms([tensor]).item() == pytest.approx(4e151 * math.sqrt(1 << 17))


@given(
    parts=st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9), st.floats(-1e3, 1e3)), max_size=12),
    norm_type=st.sampled_from(NORM_TYPES),
)
@settings(max_examples=100, deadline=None)
def test_norms_of_mixed_dtypes_stand_in_the_given_order(
    parts: list[tuple[torch.dtype, int, float]], norm_type: float
) -> None:
    """Tensors are reduced by dtype, but the i-th norm is that of the i-th tensor."""
    tensors = [torch.full((n,), value).to(dtype) for dtype, n, value in parts]
    found = tensor_norms(tensors, norm_type)
    assert found.shape == (len(tensors),) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx([exact(t, norm_type) for t in tensors], rel=1e-6, abs=0)


@given(place=PLACE, value=st.sampled_from([math.nan, math.inf, -math.inf]), norm_type=st.sampled_from(NORM_TYPES))
@settings(max_examples=60, deadline=None)
def test_one_bad_entry_is_seen_in_its_tensor_alone(place: int, value: float, norm_type: float) -> None:
    """Wherever the NaN or infinity is, its tensor's norm is NaN or infinite, and the neighbours' are not."""
    tensors = [torch.ones(100, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64) for _ in "ab"]
    for bad in range(len(tensors)):
        spoilt = [t.clone() for t in tensors]
        spoilt[bad][place] = value
        found = tensor_norms(spoilt, norm_type)
        assert [i for i, norm in enumerate(found.tolist()) if not math.isfinite(norm)] == [bad]
        assert math.isnan(found[bad]) == math.isnan(value)


@norm_types
def test_nan_wins_over_infinity(norm_type: float) -> None:
    """A tensor, a total and a group that hold both are NaN."""
    norms = tensor_norms([torch.tensor([math.inf, math.nan]), torch.tensor([math.inf, 1.0])], norm_type)
    assert norms[0].isnan() and norms[1].isinf()
    assert combine_norms(norms, norm_type).isnan()
    assert group_norms(norms, torch.tensor([0, 0]), 1, norm_type).isnan().all()


def test_measuring_changes_nothing() -> None:
    """The tensors' bits and the random state are as before, and no tensor of the result is one of the input's."""
    tensors = [torch.randn(5), torch.randn(3, 4).T, sparse([1, 1], [2.0, 3.0])]
    before, state = copy.deepcopy(tensors), torch.get_rng_state()
    tensor_norms(tensors).add_(1)
    find_nonfinite([(str(i), t) for i, t in enumerate(tensors)])
    assert torch.equal(torch.get_rng_state(), state)
    assert not tensors[2].is_coalesced()
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old.to_dense(), new.to_dense())


@norm_types
def test_the_total_is_that_of_pytorch_clipping_in_float64(norm_type: float) -> None:
    """`clip_grad_norm_` of a float64 copy of a model returns the same total norm, also without some gradients."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 10))
    model[:4](torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 4
    doubles = [nn.Parameter(g.double()) for g in grads]
    for p in doubles:
        p.grad = p.detach().clone()
    expected = torch.nn.utils.clip_grad_norm_(doubles, max_norm=1e9, norm_type=norm_type).item()
    assert combine_norms(tensor_norms(grads, norm_type), norm_type).item() == pytest.approx(expected, rel=1e-6)


def test_embedding_gradients_are_the_same_sparse_and_dense() -> None:
    """A token that occurs twice counts with the sum of its two rows, not with each."""
    tokens = torch.tensor([1, 3, 3, 3, 7])
    norms = []
    for is_sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(10, 4, sparse=is_sparse)
        table(tokens).square().sum().backward()
        assert table.weight.grad is not None and table.weight.grad.is_sparse == is_sparse
        norms.append(tensor_norms([table.weight.grad]).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@given(norms=st.lists(NORM, max_size=20), norm_type=st.sampled_from(NORM_TYPES))
@settings(max_examples=100, deadline=None)
def test_combined_norms_are_the_norm_of_the_norms(norms: list[float], norm_type: float) -> None:
    """Combining is the p-norm of the vector of norms, for any magnitudes; 0 for none."""
    given_norms = torch.tensor(norms, dtype=torch.float64)
    found = combine_norms(given_norms, norm_type)
    assert found.shape == ()
    assert found.item() == pytest.approx(exact(given_norms, norm_type), rel=1e-9, abs=0)


@given(cuts=st.lists(PLACE, max_size=5), norm_type=st.sampled_from(NORM_TYPES))
@settings(max_examples=60, deadline=None)
def test_a_total_does_not_depend_on_how_a_vector_is_cut(cuts: list[int], norm_type: float) -> None:
    """The norms of the pieces combine to the norm of the whole."""
    whole = torch.randn(99, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pieces = torch.tensor_split(whole, sorted(cuts))
    assert combine_norms(tensor_norms(pieces, norm_type), norm_type).item() == pytest.approx(
        exact(whole, norm_type), rel=1e-9
    )


@given(
    entries=st.lists(st.tuples(NORM | st.sampled_from([math.nan, math.inf]), st.integers(-1, 4)), max_size=20),
    norm_type=st.sampled_from(NORM_TYPES),
)
@settings(max_examples=150, deadline=None)
def test_each_group_is_combined_on_its_own(entries: list[tuple[float, int]], norm_type: float) -> None:
    """Group by group the same as `combine_norms`; -1 is in no group, and a NaN in one group is not seen in another."""
    norms = torch.tensor([norm for norm, _ in entries], dtype=torch.float64)
    index = torch.tensor([group for _, group in entries], dtype=torch.long)
    found = group_norms(norms, index, 5, norm_type)
    expected = [combine_norms(norms[index == group], norm_type).item() for group in range(5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=0, nan_ok=True)


def test_group_norms_without_groups_or_tensors() -> None:
    """No groups give an empty result; groups without tensors are 0."""
    assert group_norms(torch.ones(2), torch.tensor([-1, -1]), 0).shape == (0,)
    assert group_norms(torch.ones(0), torch.ones(0, dtype=torch.long), 2).tolist() == [0.0, 0.0]


def test_no_tensors_have_no_norms() -> None:
    """A model without gradients: no norms, a total of 0, nothing to find."""
    assert tensor_norms([]).shape == (0,)
    assert combine_norms(tensor_norms([])).item() == 0.0
    assert find_nonfinite([]) is None


@given(
    bad=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from([math.nan, math.inf, -math.inf]))),
)
@settings(max_examples=100, deadline=None)
def test_the_search_counts_what_is_there(bad: list[tuple[int, int, float]]) -> None:
    """The first name, the tensors and the entries are those of a count entry by entry."""
    tensors = [torch.zeros(6, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float64, torch.complex64)]
    for which, place, value in bad:
        tensors[which][place] = value
    spoilt = [sum(not np.isfinite(complex(x)) for x in t.tolist()) for t in tensors]
    found = find_nonfinite((f"t{i}", t) for i, t in enumerate([torch.zeros(0), *tensors]))
    if not bad:
        assert found is None
    else:
        first = next(i for i, count in enumerate(spoilt) if count) + 1
        assert found == NonFinite(f"t{first}", sum(map(bool, spoilt)), 5, sum(spoilt), 24)
        assert found.fraction == sum(spoilt) / 24


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_first_means_the_given_order(order: tuple[str, ...]) -> None:
    """The first bad tensor is the first that is handed in, not the first by name or the worst."""
    tensors = {"a": torch.full((9,), math.nan), "b": torch.tensor([0.0, math.inf]), "c": torch.ones(3)}
    found = find_nonfinite([(name, tensors[name]) for name in order])
    assert found is not None and found.first == next(name for name in order if name != "c")


def test_finite_giants_are_not_reported() -> None:
    """The largest float32 is finite, although its square is not."""
    assert find_nonfinite([("w", torch.full((4,), torch.finfo(torch.float32).max))]) is None


def test_sparse_entries_are_searched_after_their_sum() -> None:
    """Two finite halves of one entry may sum to infinity; it is one entry of those that are stored."""
    assert find_nonfinite([("emb", sparse([1, 1, 5], [3e38, 3e38, 1.0]))]) == NonFinite("emb", 1, 1, 1, 2)
    assert find_nonfinite([("emb", sparse([1, 1], [3e38, -3e38]))]) is None


def test_what_was_found_reads_as_a_sentence() -> None:
    """The text names the first tensor and both counts."""
    found = find_nonfinite([("ok", torch.ones(3)), ("conv.weight", torch.tensor([math.nan, 1.0]))])
    assert str(found) == "conv.weight first, 1 of 2 tensors, 1 of 5 entries"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_update_and_weight_norms_against_numpy(dtype: torch.dtype, scale: float) -> None:
    """Norms of after - before and of before, for any layouts of the two; the copies then hold the difference."""
    after = [(torch.randn(shape, dtype=torch.float64) * scale).to(dtype) for shape in ((3, 4), (), (0,), (2, 3, 4, 5))]
    before = [t.clone() for t in after]
    before[0] = (before[0] + scale).T.contiguous().T
    before[3] = (before[3] * 1.5).to(memory_format=torch.channels_last)
    kept, old = [t.clone() for t in after], [t.clone() for t in before]
    update, weight = update_and_weight_norms(before, after)
    difference = [o - k for o, k in zip(old, kept, strict=True)]
    assert weight.tolist() == pytest.approx([exact(t, 2) for t in old], rel=1e-6, abs=0)
    assert update.tolist() == pytest.approx([exact(t, 2) for t in difference], rel=1e-6, abs=0)
    assert update[1] == 0
    assert all(torch.equal(a, k) for a, k in zip(after, kept, strict=True))
    assert all(torch.equal(b, d) for b, d in zip(before, difference, strict=True))


def test_update_norms_of_parameters_that_require_grad() -> None:
    """Parameters are read without a graph, and a real SGD step has the update lr · |gradient|."""
    layer = nn.Linear(4, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    layer(torch.randn(5, 4)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    update, _ = update_and_weight_norms(before, list(layer.parameters()))
    gradient = tensor_norms([p.grad for p in layer.parameters() if p.grad is not None])
    assert update.tolist() == pytest.approx((0.01 * gradient).tolist(), rel=1e-4)
    assert not update.requires_grad


def test_update_norms_of_weights_that_are_zero_or_bad_or_absent() -> None:
    """Zero weights give a ratio of infinity or NaN, a NaN is kept to its tensor, and no tensors give no norms."""
    before = [torch.zeros(3), torch.zeros(3), torch.ones(3)]
    update, weight = update_and_weight_norms(before, [torch.ones(3), torch.zeros(3), torch.tensor([1.0, math.nan, 1])])
    ratio = update / weight
    assert ratio[0].isinf() and ratio[1].isnan()
    assert update[2].isnan() and weight[2].item() == pytest.approx(math.sqrt(3))
    assert [norms.shape for norms in update_and_weight_norms([], [])] == [(0,), (0,)]


@pytest.mark.parametrize("norm_type", [0, -1.0, -math.inf, math.nan])
def test_a_norm_type_that_is_not_positive_is_an_error(norm_type: float) -> None:
    """The message names the argument, its value and the remedy, also before there is any tensor."""
    message = re.escape(f"norm_type={norm_type} must be positive; use math.inf for the largest entry.")
    for tensors in ([], [torch.ones(2)]):
        with pytest.raises(ValueError, match=f"^{message}$"):
            tensor_norms(tensors, norm_type)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@norm_types
def test_an_accelerator_finds_the_same_norms(norm_type: float) -> None:
    """The fused kernels of a GPU agree with the CPU, for mixed dtypes and empty tensors too, and stay there."""
    tensors = [torch.randn(1000), torch.randn(10, 10).bfloat16(), torch.randn(0), torch.randn(7).double()]
    found = tensor_norms([t.cuda() for t in tensors], norm_type)
    assert found.is_cuda
    assert found.tolist() == pytest.approx(tensor_norms(tensors, norm_type).tolist(), rel=1e-5)
