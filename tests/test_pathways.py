"""Pathways through experts, their distances against a naive dynamic program, consistency and effective dimension."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynwatch.pathways import (
    Pathway,
    effective_dimension,
    pathway_consistency,
    pathway_distance,
    pathway_text,
    pathways,
    sample_gates,
)
from dynwatch.routing import router_probabilities

# Two samples at three layers of four experts, and the routers' weights.
A = [[0.50, 0.30, 0.15, 0.05], [0.10, 0.60, 0.20, 0.10], [0.40, 0.05, 0.35, 0.20]]
B = [[0.30, 0.50, 0.15, 0.05], [0.10, 0.75, 0.05, 0.10], [0.05, 0.10, 0.30, 0.55]]
GATES = [torch.tensor(rows, dtype=torch.float64) for rows in zip(A, B, strict=True)]
WEIGHTS = [
    torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0]]),
    torch.tensor([[1, 0.5], [0, 1], [1, 0], [0, -1]]),
    torch.tensor([[0.5, 1], [1, 0], [0, 1], [1, 1]]),
]
NAN = math.nan


def naive_levenshtein(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The textbook table of distances between all beginnings of two sequences."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, j in product(range(1, len(a) + 1), range(1, len(b) + 1)):
        changed = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
        table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, changed)
    return table[-1][-1]


def naive_pathway(gates: Sequence[Sequence[float]], threshold: float) -> Pathway | None:
    """Experts of each layer one by one, best first, until what is kept exceeds the threshold."""
    layers = []
    for gate in gates:
        if not all(map(math.isfinite, gate)):
            return None
        kept: list[int] = []
        total = 0.0
        for expert in sorted(range(len(gate)), key=lambda e: (-gate[e], e)):
            if total > threshold or gate[expert] == 0:
                break
            kept.append(expert)
            total += gate[expert]
        if not kept:
            return None
        layers.append(tuple(kept))
    return tuple(layers)


# --- gates


def test_a_gate_is_the_mean_of_the_tokens_that_count() -> None:
    """The worked example, whatever the padding holds."""
    probabilities = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.3, 0.5, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]])
    valid, samples = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.int64)
    for padding in (0.1, NAN, math.inf):
        probabilities[2] = padding
        gates = sample_gates(probabilities, samples, 1, valid)
        assert gates.value[0].tolist() == pytest.approx([0.5, 0.3, 0.125, 0.075])
        assert gates.count.tolist() == [[2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gates_against_a_loop(dtype: torch.dtype) -> None:
    """Tokens in any order, samples outside the range and masked tokens are as a loop over tokens has them."""
    probabilities = torch.randn(60, 5).softmax(-1).to(dtype)
    samples, valid = torch.randint(-1, 6, (60,)), torch.rand(60) > 0.3
    gates = sample_gates(probabilities, samples, 5, valid).value
    for sample in range(5):
        own = [row for row, s, v in zip(probabilities.double(), samples, valid, strict=True) if s == sample and v]
        assert gates[sample].tolist() == pytest.approx((sum(own) / len(own)).tolist(), rel=1e-12)
    assert gates.dtype == torch.float64


def test_gates_of_parts_add_up() -> None:
    """A sample whose tokens lie in three parts has the gates of the whole."""
    probabilities, samples = torch.randn(90, 4).softmax(-1), torch.randint(0, 3, (90,))
    whole = sample_gates(probabilities, samples, 3)
    first, *others = (sample_gates(probabilities[i::3], samples[i::3], 3) for i in range(3))
    for other in others:
        first = first + other
    assert torch.equal(first.count, whole.count)
    assert torch.allclose(first.value, whole.value, rtol=1e-13, atol=0)


def test_gates_that_cannot_be_told_are_nan_and_spoil_no_others() -> None:
    """One sample has no valid token, one a NaN; the third is as without them."""
    probabilities = torch.tensor([[0.5, 0.5], [NAN, 0.5], [0.25, 0.75]])
    gates = sample_gates(probabilities, torch.tensor([0, 1, 2]), 3, torch.tensor([False, True, True])).value
    assert gates[0].isnan().all() and gates[1, 0].isnan()
    assert gates[2].tolist() == [0.25, 0.75]
    assert pathways([gates]) == [None, None, ((1,),)]


def test_gates_of_sigmoid_scores_sum_to_one() -> None:
    """Normalised token by token, not after the mean."""
    logits = torch.tensor([[2.0, -2.0], [-8.0, -8.0]])
    scores = logits.double().sigmoid()
    expected = (scores / scores.sum(-1, keepdim=True)).mean(0)
    gates = sample_gates(router_probabilities(logits, "sigmoid"), torch.tensor([0, 0]), 1).value[0]
    assert gates.tolist() == pytest.approx(expected.tolist())
    assert gates.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_samples": 0}, "n_samples=0 must be a whole number, 1 or more."),
        ({"probabilities": torch.zeros(3)}, "probabilities of shape [3] and torch.float32 must be [N, E] floats."),
        (
            {"samples": torch.zeros(2, dtype=torch.int64)},
            "samples of shape [2] must be [3], one entry for each row of ",
        ),
        (
            {"valid": torch.ones(3, 1, dtype=torch.bool)},
            "valid of shape [3, 1] must be [3], one entry for each row of ",
        ),
    ],
)
def test_gates_of_shapes_that_do_not_fit_are_an_error(change: dict[str, object], message: str) -> None:
    """The message names the argument and the shape that it must have."""
    fitting = {"probabilities": torch.zeros(3, 2), "samples": torch.zeros(3, dtype=torch.int64), "n_samples": 1}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        sample_gates(**{**fitting, **change})  # type: ignore[arg-type]


# --- pathways


@pytest.mark.parametrize(
    ("threshold", "a", "b"), [(0.7, "0,1-1,2-0,2", "1,0-1-3,2"), (0.5, "0,1-1-0,2", "1,0-1-3"), (0.0, "0-1-0", "1-1-3")]
)
def test_pathways_of_the_worked_example(threshold: float, a: str, b: str) -> None:
    """A sum that only equals the threshold does not exceed it: at .5 both experts of the first layer are kept."""
    found = [pathway_text(pathway) for pathway in pathways(GATES, threshold) if pathway]
    assert found == [a, b]


@given(
    data=st.data(), n_layers=st.integers(1, 3), n_experts=st.integers(1, 6), threshold=st.sampled_from([0.0, 0.5, 0.7])
)
@settings(max_examples=150, deadline=None)
def test_pathways_against_a_loop(data: st.DataObject, n_layers: int, n_experts: int, threshold: float) -> None:
    """Also with ties, zeros and NaN among the gates, of any size."""
    number = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1e-10, 1e15, NAN, math.inf]) | st.floats(0, 1, width=32)
    gate = st.lists(number, min_size=n_experts, max_size=n_experts)
    samples = data.draw(st.lists(st.lists(gate, min_size=n_layers, max_size=n_layers), min_size=1, max_size=3))
    gates = [torch.tensor(rows, dtype=torch.float64) for rows in zip(*samples, strict=True)]
    assert pathways(gates, threshold) == [naive_pathway(sample, threshold) for sample in samples]


def test_equal_gates_go_by_number() -> None:
    """A router without a preference keeps its first experts, on many of them and in half precision too."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        gates = [torch.full((2, 64), 1 / 64, dtype=dtype)]
        assert pathways(gates) == [(tuple(range(45)),)] * 2  # 44 / 64 = .6875, 45 / 64 = .703


def test_layers_may_differ_in_their_experts() -> None:
    """Each layer is ranked among its own."""
    gates = [torch.tensor([[1.0]]), torch.tensor([[0.1, 0.2, 0.7, 0.0]]), torch.tensor([[0.0, 1.0]])]
    assert pathways(gates) == [((0,), (2, 1), (1,))]


def test_pathways_of_no_samples_are_none() -> None:
    """An empty probe gives an empty list."""
    assert pathways([torch.zeros(0, 4)]) == []


@pytest.mark.parametrize(
    ("gates", "threshold", "message"),
    [
        ([], 0.7, "gates is empty and must hold a matrix for each layer."),
        ([torch.zeros(2)], 0.7, "gates[0] of shape [2] and torch.float32 must be [S, E] floats."),
        ([torch.zeros(2, 3), torch.zeros(1, 3)], 0.7, "gates[1] has 1 samples and gates[0] has 2; every layer must "),
        (GATES, 1.0, "threshold=1.0 must be a number, 0 or more and below 1."),
        (GATES, -0.1, "threshold=-0.1 must be a number, 0 or more and below 1."),
        (GATES, NAN, "threshold=nan must be a number, 0 or more and below 1."),
    ],
)
def test_what_makes_no_pathway_is_an_error(gates: list[Tensor], threshold: float, message: str) -> None:
    """The message names the argument, its value and its bound."""
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pathways(gates, threshold)


# --- distance


def test_distances_of_the_worked_example() -> None:
    """Both units, raw and normalised, whole and by layer."""
    found = pathways(GATES)
    char, expert = pathway_distance(found, unit="char"), pathway_distance(found)
    assert (char.distance, char.length, char.layerwise) == (5.0, 10.0, (2.0, 2.0, 1.0))
    assert char.normalized == pytest.approx(0.454545, abs=1e-6)
    assert (expert.distance, expert.length, expert.layerwise) == (4.0, 5.5, (2.0, 1.0, 1.0))
    assert expert.normalized == pytest.approx(0.666667, abs=1e-6)
    found = pathways(GATES, threshold=0.5)
    assert (pathway_distance(found, unit="char").distance, pathway_distance(found).distance) == (5.0, 4.0)


EXPERTS = st.lists(st.integers(0, 12), min_size=1, max_size=5, unique=True).map(tuple)


@st.composite
def groups_of_pathways(draw: st.DrawFn) -> tuple[list[Pathway | None], list[str]]:
    """Up to six samples in two groups, some without a pathway."""
    n_layers = draw(st.integers(1, 4))
    path = st.lists(EXPERTS, min_size=n_layers, max_size=n_layers).map(tuple)
    drawn = draw(st.lists(st.tuples(st.none() | path, st.sampled_from("xy")), max_size=6))
    return [path for path, _ in drawn], [group for _, group in drawn]


def check_distance(paths: list[Pathway | None], groups: list[str]) -> None:
    """Distances of experts by their id l K + e, and of characters, pair by pair with the naive program."""
    flat = [[layer * 13 + e for layer, ids in enumerate(p) for e in ids] if p is not None else [] for p in paths]
    pairs = [
        (i, j)
        for i, j in combinations(range(len(paths)), 2)
        if paths[i] is not None and paths[j] is not None and groups[i] == groups[j]
    ]
    for unit in ("expert", "char"):
        whole: list[Sequence[Hashable]] = flat if unit == "expert" else [pathway_text(p or ()) for p in paths]
        found = pathway_distance(paths, groups, unit)
        assert (found.n_pairs, found.n_samples) == (len(pairs), sum(p is not None for p in paths))
        if not pairs:
            assert math.isnan(found.distance) and math.isnan(found.normalized)
            assert all(map(math.isnan, found.layerwise))
            continue
        distances = [naive_levenshtein(whole[i], whole[j]) for i, j in pairs]
        shares = [d / max(len(whole[i]), len(whole[j])) for d, (i, j) in zip(distances, pairs, strict=True)]
        assert found.distance == pytest.approx(sum(distances) / len(pairs))
        assert found.normalized == pytest.approx(sum(shares) / len(pairs))
        for layer, mean in enumerate(found.layerwise):
            total = 0
            for i, j in pairs:
                a, b = (paths[i] or ())[layer], (paths[j] or ())[layer]
                total += naive_levenshtein(*((a, b) if unit == "expert" else (pathway_text((a,)), pathway_text((b,)))))
            assert mean == pytest.approx(total / len(pairs))
        assert found.distance <= sum(found.layerwise) + 1e-9


@given(groups_of_pathways())
@settings(max_examples=120, deadline=None)
def test_distances_against_a_naive_program(drawn: tuple[list[Pathway | None], list[str]]) -> None:
    """Means over pairs within groups, in both units, with samples that have no pathway left out."""
    check_distance(*drawn)


def test_long_pathways_against_a_naive_program() -> None:
    """Of several hundred symbols, as real models have, where rapidfuzz works in blocks of 64."""
    draw = torch.Generator().manual_seed(1)
    paths: list[Pathway | None] = [
        tuple(tuple(torch.randperm(13, generator=draw)[:9].tolist()) for _ in range(16)) for _ in range(3)
    ]
    check_distance(paths, ["x"] * 3)


def test_the_same_expert_at_another_layer_is_another() -> None:
    """Layers are not mixed up, and numbers of several digits count as one symbol."""
    found = pathway_distance([((3,), (5,)), ((5,), (3,))])
    assert (found.distance, found.layerwise) == (2.0, (1.0, 1.0))
    hundreds = [((100,),), ((7,),)]
    assert (pathway_distance(hundreds).distance, pathway_distance(hundreds, unit="char").distance) == (1.0, 3.0)


def test_one_expert_leaves_nothing_to_differ() -> None:
    """With a single expert all pathways are the same."""
    found = pathway_distance(pathways([torch.ones(4, 1)] * 3))
    assert (found.distance, found.normalized, found.length, found.n_pairs) == (0.0, 0.0, 3.0, 6)


@pytest.mark.parametrize("paths", [[], [None, None], [((0,),)], [((0,),), None]], ids=str)
def test_without_a_pair_the_distance_is_nan(paths: list[Pathway | None]) -> None:
    """And the number of pairs says why."""
    found = pathway_distance(paths)
    assert math.isnan(found.distance) and math.isnan(found.normalized) and found.n_pairs == 0
    assert math.isnan(found.length) == (found.n_samples == 0)


def test_groups_of_one_sample_make_no_pair() -> None:
    """Pairs across groups do not count."""
    assert pathway_distance([((0,),), ((1,),)], groups=["a", "b"]).n_pairs == 0


def test_groups_combine_with_their_pairs_as_weights() -> None:
    """The whole is the mean of its groups, weighted."""
    paths = pathways([torch.randn(9, 8).mul(2).softmax(-1) for _ in range(3)])
    keys = [0, 1, 1, 0, 2, 2, 2, 2, 1]
    whole = pathway_distance(paths, keys)
    parts = [pathway_distance([p for p, key in zip(paths, keys, strict=True) if key == k]) for k in range(3)]
    assert sum(part.n_pairs for part in parts) == whole.n_pairs == 1 + 3 + 6
    assert sum(part.distance * part.n_pairs for part in parts) == pytest.approx(whole.distance * whole.n_pairs)
    assert sum(part.length * part.n_samples for part in parts) == pytest.approx(whole.length * whole.n_samples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "word"}, "unit='word' must be 'expert' (expert ids) or 'char' (characters of their text)."),
        ({"groups": ["a"]}, "groups has 1 keys and must have 2, one for each pathway."),
        (
            {"pathways": [((0,),), ((0,), (1,))]},
            "pathways of [1, 2] layers must all have the same number: compare those ",
        ),
    ],
)
def test_distances_that_make_no_sense_are_an_error(arguments: dict[str, object], message: str) -> None:
    """The message names the argument and what it must be."""
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pathway_distance(**{"pathways": [((0,),), ((1,),)], **arguments})  # type: ignore[arg-type]


# --- consistency


def test_consistency_of_the_worked_example() -> None:
    """Cosines, their raw mean and the paper's complexity of both samples."""
    found = pathway_consistency(GATES, WEIGHTS)
    assert found.cosines[0].tolist() == pytest.approx([0.909819, 0.998378], abs=1e-6)
    assert found.cosines[1].tolist() == pytest.approx([0.942567, 0.907959], abs=1e-6)
    assert found.mean.tolist() == pytest.approx([0.954098, 0.925263], abs=1e-6)
    assert found.complexity.tolist() == pytest.approx([0.044351, 0.018358], abs=1e-6)


@pytest.mark.parametrize("cosine", [0.1, 0.9])
def test_equal_cosines_have_no_complexity_whatever_their_size(cosine: float) -> None:
    """Which is why the raw mean is the main figure."""
    angles = torch.arange(4, dtype=torch.float64) * math.acos(cosine)
    weights = [torch.tensor([[angle.cos(), angle.sin()]], dtype=torch.float64) for angle in angles]
    found = pathway_consistency([torch.ones(1, 1)] * 4, weights)
    assert found.mean.item() == pytest.approx(cosine)
    assert found.complexity.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_scale_of_routers_changes_nothing(scale: float, dtype: torch.dtype) -> None:
    """Cosines are those of float64, in half precision up to its rounding."""
    exact = pathway_consistency(GATES, WEIGHTS).cosines
    gates = [gate.to(dtype) for gate in GATES]
    scaled = pathway_consistency(gates, [(weight * scale).to(dtype) for weight in WEIGHTS]).cosines
    assert torch.allclose(scaled, exact, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_few_layers_have_no_complexity() -> None:
    """One layer has no cosine either; of two the complexity would be 0 always."""
    one = pathway_consistency(GATES[:1], WEIGHTS[:1])
    assert one.cosines.shape == (2, 0) and one.mean.isnan().all() and one.complexity.isnan().all()
    two = pathway_consistency(GATES[:2], WEIGHTS[:2])
    assert two.mean.isfinite().all() and two.complexity.isnan().all()


def test_cosines_near_zero_have_no_complexity() -> None:
    """A quotient by 1e-3 or less is noise."""
    turned = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, 1e-4]])]
    found = pathway_consistency([torch.ones(2, 1)] * 3, turned)
    assert found.mean.tolist() == pytest.approx([5e-5] * 2) and found.complexity.isnan().all()


def test_zero_and_nan_make_only_their_sample_nan() -> None:
    """Gates of zero have no direction; the other samples are as without them. Routers of zero have none at all."""
    gates = [gate.clone() for gate in GATES]
    gates[1][0] = 0.0
    found = pathway_consistency(gates, WEIGHTS)
    assert found.mean[0].isnan() and found.complexity[0].isnan()
    assert found.mean[1].item() == pytest.approx(0.925263, abs=1e-6)
    gates[1][0] = NAN
    assert pathway_consistency(gates, WEIGHTS).mean.isnan().tolist() == [True, False]
    assert pathway_consistency(GATES, [torch.zeros(4, 2)] * 3).mean.isnan().all()


def test_autocast_changes_nothing() -> None:
    """Within a half-precision region the figures are the same to the last bit."""
    outside = pathway_consistency(GATES, WEIGHTS), effective_dimension(GATES[0].float())
    with torch.autocast("cpu", torch.bfloat16):
        inside = pathway_consistency(GATES, WEIGHTS), effective_dimension(GATES[0].float())
    assert torch.equal(outside[0].cosines, inside[0].cosines) and torch.equal(outside[1], inside[1])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS[:2], "router_weights has 2 layers and must have those of gates, 3."),
        (
            [*WEIGHTS[:2], torch.zeros(4, 3)],
            "router_weights[2] of shape [4, 3] must be [4, 2]: an expert a row, and as ",
        ),
        ([torch.zeros(8), *WEIGHTS[1:]], "router_weights[0] of shape [8] and torch.float32 must be [E, d] floats."),
    ],
)
def test_routers_that_do_not_fit_are_an_error(weights: list[Tensor], message: str) -> None:
    """The message names the layer and the shape that it must have."""
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pathway_consistency(GATES, weights)


# --- effective dimension


def test_effective_dimension_of_the_worked_example() -> None:
    """The first layer at λ = .1."""
    assert effective_dimension(GATES[0], ridge=0.1).item() == pytest.approx(1.159132, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (6, 4), (3, 8)], ids=str)
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_effective_dimension_against_the_inverse(shape: tuple[int, int], ridge: float) -> None:
    """The trace of H (H + λ I)⁻¹ by inverting, and its bounds."""
    gates = torch.randn(shape, dtype=torch.float64).softmax(-1)
    h = gates @ gates.T
    expected = (h @ torch.linalg.inv(h + ridge * torch.eye(len(h), dtype=torch.float64))).trace().item()
    found = effective_dimension(gates, ridge).item()
    assert found == pytest.approx(expected, rel=1e-9)
    assert 0 < found < min(shape)


def test_effective_dimension_leaves_out_samples_without_gates() -> None:
    """NaN rows and rows of zeros change nothing; without any sample it is 0."""
    more = torch.cat([GATES[0], torch.full((2, 4), NAN, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)])
    assert effective_dimension(more).item() == pytest.approx(effective_dimension(GATES[0]).item())
    assert effective_dimension(torch.full((2, 4), NAN)).item() == 0.0
    assert effective_dimension(torch.zeros(0, 4)).item() == 0.0


@pytest.mark.parametrize("ridge", [0.0, -1.0, NAN, math.inf])
def test_a_ridge_that_is_not_positive_is_an_error(ridge: float) -> None:
    """The message says its bound."""
    with pytest.raises(ValueError, match=f"^ridge={ridge} must be a (finite )?number above 0"):
        effective_dimension(GATES[0], ridge)
