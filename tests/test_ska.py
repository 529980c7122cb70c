"""SKA against worked tables, plain sums over single numbers, and autograd."""

from __future__ import annotations

import io
import math
from dataclasses import astuple, fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynwatch.ska import (
    alignment,
    decision_change,
    decision_entropy,
    entropy_gradient,
    knowledge_flow,
    knowledge_norm,
    step_entropy,
    tensor_net,
)
from dynwatch.ska_crossings import Crossing, zero_crossings
from dynwatch.ska_layer import SUMS, KnowledgeReading, LayerKnowledge
from dynwatch.ska_learner import forward_only_pass

LN2 = math.log(2)
NUMBER = st.floats(-30, 30, allow_subnormal=False)
# Pairs of probes of one layer, one to eight elements.
PAIR = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=8)


def double(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def now_and_before(pair: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(pair, dtype=torch.float64)
    return both[:, 0], both[:, 1]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def follow(layer: LayerKnowledge, *probes: Tensor, dt: float = 1.0) -> list[KnowledgeReading]:
    return [layer.read(layer.measure(z).tolist(), dt) for z in probes]


def same(first: KnowledgeReading, second: KnowledgeReading, tolerance: float = 1e-12) -> bool:
    """Whether two readings agree, NaN with NaN."""
    left, right = astuple(first), astuple(second)
    return left[:3] == right[:3] and left[3:] == pytest.approx(right[3:], rel=tolerance, abs=tolerance, nan_ok=True)


# --- The worked tables

A_PATH = [0.5, 1.0, 2.0, 1.5]
A_CHANGE = [0.1085992474, 0.1497384993, -0.0632226018]
A_PUBLISHED = [-0.1566755957, -0.4320539809, 0.1368164011]
A_TRAPEZOID = [-0.1175066968, -0.3240404857, 0.1596191346]
A_GRADIENT = [-0.4403266568, -0.5189744404, -0.2315483361]
A_PAPER = [0.5073548198, 1.1837445280, -0.5701668732]
A_CODE = [0.2237037588, 0.5778496280, -0.2474076030]


def test_one_unit_has_the_values_of_the_table() -> None:
    """Change, both entropies, gradient and both Nets of each step (oracle A), and the exact forms of the whole path."""
    steps = [(double(z), double(before)) for before, z in pairwise(A_PATH)]
    close = {"rel": 0, "abs": 1e-9}
    assert [decision_change(*step).item() for step in steps] == pytest.approx(A_CHANGE, **close)
    assert [step_entropy(*step, "published").item() for step in steps] == pytest.approx(A_PUBLISHED, **close)
    assert [step_entropy(*step).item() for step in steps] == pytest.approx(A_TRAPEZOID, **close)
    assert [entropy_gradient(*step).item() for step in steps] == pytest.approx(A_GRADIENT, **close)
    assert [tensor_net(*step, "paper").item() for step in steps] == pytest.approx(A_PAPER, **close)
    assert [tensor_net(*step, "code").item() for step in steps] == pytest.approx(A_CODE, **close)
    ends = double(1.5), double(0.5)
    assert step_entropy(*ends, "exact").item() == pytest.approx(-0.2709320043, **close)
    assert tensor_net(*ends, "paper", exact=True).item() == pytest.approx(0.9982682981, **close)
    assert tensor_net(*ends, "code", exact=True).item() == pytest.approx(0.4564042895, **close)


def test_a_followed_unit_has_the_values_of_the_table() -> None:
    """Oracle A through float32 sums: each step, the sums over steps and the exact forms, in their own fields."""
    readings = follow(LayerKnowledge(), *(torch.tensor([z]) for z in A_PATH))
    close = {"rel": 0, "abs": 3e-7}
    for name, values in {
        "entropy_published": A_PUBLISHED,
        "entropy_trapezoid": A_TRAPEZOID,
        "net_paper": A_PAPER,
        "net_code": A_CODE,
        "flow": [0.5, 1.0, 0.5],
    }.items():
        assert [getattr(reading, name) for reading in readings[1:]] == pytest.approx(values, **close), name
    last = readings[-1]
    sums = (last.entropy_published_sum, last.entropy_trapezoid_sum, last.net_paper_sum, last.net_code_sum)
    assert sums == pytest.approx((-0.4519131755, -0.2819280478, 1.1209324746, 0.5541457838), **close)
    exact = (last.entropy, last.net_paper_exact, last.net_code_exact)
    assert exact == pytest.approx((-0.2709320043, 0.9982682981, 0.4564042895), **close)


def test_a_closed_loop_has_the_values_of_the_table() -> None:
    """Oracle B: the published forms do not return to zero where trapezoid and exact forms do."""
    last = follow(LayerKnowledge(), *(torch.tensor([z]) for z in (1.0, 1.2, 1.0, 1.2, 1.0)))[-1]
    drifted = (last.entropy_published_sum, last.net_paper_sum, last.net_code_sum)
    assert drifted == pytest.approx((-0.0216209232, 0.0247168226, 0.0052561413), rel=0, abs=1e-6)
    returned = (last.entropy, last.entropy_trapezoid_sum, last.net_paper_exact, last.net_code_exact)
    assert returned == pytest.approx((0, 0, 0, 0), abs=1e-12)


C_BEFORE = double([0.0, -1.0], [0.5, 2.0])
C_NOW = double([0.2, -1.5], [0.5, 1.0])


def test_a_matrix_has_the_values_of_the_table() -> None:
    """Oracle C as sums over the matrix."""
    found = (
        step_entropy(C_NOW, C_BEFORE, "published"),
        alignment(C_NOW, C_BEFORE),
        knowledge_norm(C_NOW),
        knowledge_flow(C_NOW, C_BEFORE, dt=0.1),
        tensor_net(C_NOW, C_BEFORE, "paper"),
        tensor_net(C_NOW, C_BEFORE, "code"),
    )
    table = (0.0144238537, -0.0295256425, 1.8814887723, 11.3578166916, -0.8202923298, -0.6043167524)
    assert [value.item() for value in found] == pytest.approx(table, rel=0, abs=1e-9)


def test_a_followed_matrix_has_the_values_of_the_table_per_element() -> None:
    """Oracle C of four elements: sums over 4, norms over their root, the cosine as it is."""
    last = follow(LayerKnowledge(), C_BEFORE, C_NOW, dt=0.1)[-1]
    found = (last.entropy_published * 4, last.alignment, last.norm * 2, last.flow * 2)
    found += (last.net_paper * 4, last.net_code * 4)
    table = (0.0144238537, -0.0295256425, 1.8814887723, 11.3578166916, -0.8202923298, -0.6043167524)
    assert found == pytest.approx(table, rel=1e-6)
    assert (last.elements, last.non_finite, last.reason) == (4, 0, "step")


def test_steps_that_shrink_go_to_the_exact_entropy() -> None:
    """Oracle E, and the orders: the published sum's error halves with the step, the trapezoid's falls to a quarter."""
    for n, published, trapezoid in ((1, -1.09875, -0.54937), (4, -0.61466, -0.47731), (32, -0.49017, -0.47300)):
        path = torch.linspace(0, 2, n + 1, dtype=torch.float64)
        for form, value in (("published", published), ("trapezoid", trapezoid), ("exact", -0.47293)):
            assert step_entropy(path[1:], path[:-1], form).item() == pytest.approx(value, abs=1e-5)
    fine, finer = (torch.linspace(0, 2, n + 1, dtype=torch.float64) for n in (1000, 2000))
    exact = step_entropy(fine[1:], fine[:-1], "exact")
    for form, order in (("published", 2), ("trapezoid", 4)):
        errors = [step_entropy(path[1:], path[:-1], form) - exact for path in (fine, finer)]
        assert (errors[0] / errors[1]).item() == pytest.approx(order, rel=0.01)


# --- Properties of the formulas


@given(z=NUMBER)
@settings(deadline=None)
def test_the_entropy_of_a_decision_is_that_of_a_yes_or_no(z: float) -> None:
    """h is -p log2 p - (1-p) log2 (1-p) of p = sigmoid(z), even, between 0 and 1, and 1 at zero."""
    p, q = sigmoid(z), sigmoid(-z)
    value = decision_entropy(double(z)).item()
    assert value == pytest.approx(-(p * math.log2(p) + q * math.log2(q)), rel=1e-12)
    assert value == decision_entropy(double(-z)).item()
    assert 0 <= value <= 1
    assert decision_entropy(double(0.0)).item() == 1.0


def test_the_entropy_next_to_zero_is_not_rounded_above_one_bit() -> None:
    """Where the sum of both terms would be a last digit too large."""
    for dtype in (torch.float32, torch.float64):
        near = decision_entropy(torch.logspace(-12, -1, 1000, dtype=dtype))
        assert near.max().item() == 1.0 and near.min().item() > 0.99


@given(pair=PAIR)
@settings(deadline=None)
def test_all_sums_are_those_of_single_numbers(pair: list[tuple[float, float]]) -> None:
    """Every formula equals the plain sum over elements in Python's own floats."""
    z, before = now_and_before(pair)
    change = [sigmoid(a) - sigmoid(b) for a, b in pair]
    slope = [sigmoid(a) * sigmoid(-a) for a, _ in pair]
    close = {"rel": 1e-9, "abs": 1e-9}
    published = -sum(a * d for (a, _), d in zip(pair, change, strict=True)) / LN2
    trapezoid = -sum((a + b) / 2 * d for (a, b), d in zip(pair, change, strict=True)) / LN2
    assert decision_change(z, before).tolist() == pytest.approx(change, **close)
    assert step_entropy(z, before, "published").item() == pytest.approx(published, **close)
    assert step_entropy(z, before).item() == pytest.approx(trapezoid, **close)
    for sign, name in ((1, "paper"), (-1, "code")):
        net = sum((sigmoid(a) + sign * a * s / LN2) * (a - b) for (a, b), s in zip(pair, slope, strict=True))
        assert tensor_net(z, before, name).item() == pytest.approx(net, **close)


@given(pair=PAIR)
@settings(deadline=None)
def test_the_exact_entropy_is_at_most_one_bit_an_element(pair: list[tuple[float, float]]) -> None:
    """However far it goes; and the exact Nets differ by two of it, around a mean without it."""
    z, before = now_and_before(pair)
    exact = step_entropy(z, before, "exact").item()
    assert abs(exact) <= len(pair)
    paper, code = (tensor_net(z, before, sign, exact=True).item() for sign in ("paper", "code"))
    assert code - paper == pytest.approx(2 * exact, abs=1e-9)
    softplus = sum(math.log1p(math.exp(a)) - math.log1p(math.exp(b)) for a, b in pair)
    assert (code + paper) / 2 == pytest.approx(softplus, rel=1e-9, abs=1e-9)


@given(pair=PAIR)
@settings(deadline=None)
def test_the_gradient_is_that_of_the_published_entropy(pair: list[tuple[float, float]]) -> None:
    """G equals autograd of -z·(sigmoid(z) - D_before)/ln 2, with the decisions before held fixed."""
    z, before = now_and_before(pair)
    z.requires_grad_()
    (by_autograd,) = torch.autograd.grad(-(z * (torch.sigmoid(z) - torch.sigmoid(before))).sum() / LN2, z)
    torch.testing.assert_close(entropy_gradient(z.detach(), before), by_autograd, rtol=1e-9, atol=1e-12)


@given(pair=PAIR)
@settings(deadline=None)
def test_both_nets_add_up_to_twice_the_decisions_along_the_step(pair: list[tuple[float, float]]) -> None:
    """Net paper + Net code = 2 sum D dZ."""
    z, before = now_and_before(pair)
    both = tensor_net(z, before, "paper") + tensor_net(z, before, "code")
    torch.testing.assert_close(both, 2 * (torch.sigmoid(z) * (z - before)).sum(), rtol=1e-9, atol=1e-9)


@given(pair=PAIR)
@settings(deadline=None)
def test_the_published_entropy_is_norms_times_the_cosine(pair: list[tuple[float, float]]) -> None:
    """dH = -|Z| |dD| cos / ln 2, with a cosine from -1 to 1."""
    z, before = now_and_before(pair)
    cosine = alignment(z, before)
    product = -knowledge_norm(z) * knowledge_norm(decision_change(z, before)) * cosine / LN2
    torch.testing.assert_close(step_entropy(z, before, "published"), product, rtol=1e-9, atol=1e-12)
    assert -1 <= cosine.item() <= 1


@given(path=st.lists(NUMBER, min_size=1, max_size=20))
@settings(deadline=None)
def test_a_path_that_turns_back_has_no_entropy(path: list[float]) -> None:
    """There and back over the same points, trapezoid and exact sums are 0 to rounding, formula and tracker alike."""
    loop = path + path[-2::-1]
    z = torch.tensor(loop, dtype=torch.float64)
    for form in ("trapezoid", "exact"):
        assert step_entropy(z[1:], z[:-1], form).item() == pytest.approx(0, abs=1e-12)
    last = follow(LayerKnowledge(), *(torch.tensor([value]) for value in loop))[-1]
    found = (last.entropy, last.entropy_trapezoid_sum, last.net_paper_exact, last.net_code_exact)
    assert found == pytest.approx((0, 0, 0, 0), abs=1e-12)


@given(path=st.lists(NUMBER, min_size=2, max_size=20))
@settings(deadline=None)
def test_the_exact_forms_do_not_depend_on_the_path(path: list[float]) -> None:
    """Step by step they add up to those of first and last, so around any closed path to 0."""
    z = torch.tensor(path, dtype=torch.float64)
    assert step_entropy(z[1:], z[:-1], "exact").item() == pytest.approx(
        step_entropy(z[-1:], z[:1], "exact").item(), abs=1e-12
    )
    assert step_entropy(z.roll(-1), z, "exact").item() == pytest.approx(0, abs=1e-12)
    assert tensor_net(z.roll(-1), z, exact=True).item() == pytest.approx(0, abs=1e-11)


def test_around_a_triangle_the_trapezoid_is_small_but_not_zero() -> None:
    """A closed path that does not turn back over its own points encloses an area, so only the exact form is 0."""
    z = double(0.0, 1.0, 3.0)
    assert step_entropy(z.roll(-1), z, "exact").item() == pytest.approx(0, abs=1e-12)
    assert 0.01 < abs(step_entropy(z.roll(-1), z).item()) < abs(step_entropy(z.roll(-1), z, "published").item())


# --- Extremes


HUGE = [(1e30, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
HUGE += [(1e4, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]


@pytest.mark.parametrize(("size", "dtype"), HUGE)
def test_huge_pre_activations_do_not_overflow(size: float, dtype: torch.dtype) -> None:
    """From one certain decision to its opposite everything is finite, with the values that arithmetic in reals has."""
    z, before = torch.tensor([size, -size, size], dtype=dtype), torch.tensor([-size, size, size], dtype=dtype)
    value = float(z[0])
    assert decision_entropy(z).tolist() == [0, 0, 0]
    assert decision_change(z, before).tolist() == [1, -1, 0]
    assert step_entropy(z, before, "published").item() == pytest.approx(-2 * value / LN2)
    assert step_entropy(z, before).item() == step_entropy(z, before, "exact").item() == 0
    assert entropy_gradient(z, before).tolist() == pytest.approx([-1 / LN2, 1 / LN2, 0])
    assert alignment(z, before).item() == pytest.approx(2 / math.sqrt(6))
    assert knowledge_norm(z).item() == pytest.approx(value * math.sqrt(3))
    assert knowledge_flow(z, before, 1.0).item() == pytest.approx(value * math.sqrt(8))
    assert tensor_net(z, before).item() == pytest.approx(2 * value)
    assert tensor_net(z[:1], before[:1], exact=True).item() == pytest.approx(value)
    last = follow(LayerKnowledge(), before, z)[-1]
    assert all(map(math.isfinite, astuple(last)[1:]))
    found = (last.norm, last.flow, last.alignment, last.entropy, last.net_code)
    expected = (value, value * math.sqrt(8 / 3), 2 / math.sqrt(6), 0, value * 2 / 3)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("base", [0.0, 5.0, -15.0, 60.0, -80.0])
@pytest.mark.parametrize("step", [1e-10, 1e-5, 1e-2])
def test_small_changes_of_decisions_keep_their_digits(base: float, step: float) -> None:
    """Where 1 - D or D - D_before would be rounded away, the change still equals slope times step, to second order."""
    now, before = base + step / 2, base - step / 2
    change = decision_change(double(now), double(before)).item()
    slope = sigmoid(base) * sigmoid(-base)
    assert change == pytest.approx(slope * (now - before), rel=1e-5)
    assert change == -decision_change(double(before), double(now)).item()


def test_half_precision_is_widened_first() -> None:
    """In bfloat16 itself the change of decisions of this step would be rounded to 0 or to twice its value."""
    z, before = torch.tensor([0.01], dtype=torch.bfloat16), torch.tensor([0.009], dtype=torch.bfloat16)
    true = sigmoid(float(z)) - sigmoid(float(before))
    assert decision_change(z, before).item() == pytest.approx(true, rel=1e-4)
    assert decision_change(z, before).dtype == torch.float32
    last = follow(LayerKnowledge(), before, z)[-1]
    assert last.entropy_published == pytest.approx(-float(z) * true / LN2, rel=1e-4)


def test_knowledge_that_stands_still_changes_nothing() -> None:
    """A constant path, and one at zero: no entropy, no flow, no Net, alignment 0 and not NaN."""
    for value in (0.0, 3.0):
        z = torch.full((2, 3), value)
        assert alignment(z, z).item() == 0
        last = follow(LayerKnowledge(), z, z, z)[-1]
        steps = [getattr(last, field.name) for field in fields(last) if field.name not in ("reason", "norm")]
        assert steps == [6, 0] + [0] * (len(steps) - 2)
        assert last.norm == value


def test_alignment_from_zero_is_along_the_step() -> None:
    """Away from zero it is 1, back to zero the norm is 0 and so is the cosine."""
    away, zero = torch.tensor([2.0, -2.0]), torch.zeros(2)
    assert alignment(away, zero).item() == pytest.approx(1)
    assert alignment(zero, away).item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_the_formulas(value: float) -> None:
    """A published entropy of a NaN or an infinity is not a number that could pass for a good one."""
    z = torch.tensor([1.0, value])
    assert not math.isfinite(step_entropy(z, torch.zeros(2), "published").item())
    assert not math.isfinite(knowledge_flow(z, torch.zeros(2), 1.0).item())


def test_empty_tensors_have_empty_sums() -> None:
    """Sums over no element are 0 and there is no mean."""
    none = torch.zeros(0, 3)
    for value in (step_entropy(none, none), tensor_net(none, none), alignment(none, none), knowledge_norm(none)):
        assert value.item() == 0
    first, second = follow(LayerKnowledge(), none, none)
    assert (first.reason, second.reason, second.elements) == ("first", "step", 0)
    assert all(map(math.isnan, astuple(second)[3:]))


# --- Errors


def test_arguments_that_do_not_fit_are_named() -> None:
    """Errors name the argument, its value and what to pass."""
    z = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"before has shape \(3, 2\) and must have that of z, \(2, 3\): pass the same"):
        step_entropy(z, z.T)
    with pytest.raises(ValueError, match=r"form='right' must be 'published' \(right end\), 'trapezoid' or 'exact'"):
        step_entropy(z, z, "right")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sign='plus' must be 'paper' \(plus\) or 'code'"):
        tensor_net(z, z, "plus")  # type: ignore[arg-type]
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"dt={bad!r} must be"):
            knowledge_flow(z, z, bad)
    for bad in (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64), [1.0]):
        with pytest.raises(TypeError, match=r"z has (dtype|type) .* and must be a tensor of real floats"):
            LayerKnowledge().measure(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="must be a tensor of real floats"):
            decision_entropy(bad)  # type: ignore[arg-type]
    layer = LayerKnowledge()
    with pytest.raises(ValueError, match=r"sums has 2 entries and must have 12: pass what measure returned"):
        layer.read([1.0, 2.0])
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"dt={bad!r} must be .*time since the probe before"):
            layer.read(layer.measure(z), bad)


# --- LayerKnowledge


@given(pair=PAIR, start=st.lists(NUMBER, min_size=8, max_size=8))
@settings(deadline=None)
def test_a_reading_equals_the_formulas(pair: list[tuple[float, float]], start: list[float]) -> None:
    """What the tracker sums in one go is what each formula gives, of the same numbers in float64, per element."""
    first = torch.tensor(start[: len(pair)]).double()
    before, z = (value.float().double() for value in reversed(now_and_before(pair)))
    last = follow(LayerKnowledge(), first, before, z, dt=0.5)[-1]
    n = len(pair)
    expected = {
        "norm": knowledge_norm(z) / math.sqrt(n),
        "flow": knowledge_flow(z, before, 0.5) / math.sqrt(n),
        "entropy": step_entropy(z, first, "exact") / n,
        "entropy_published": step_entropy(z, before, "published") / n,
        "entropy_trapezoid": step_entropy(z, before) / n,
        "entropy_trapezoid_sum": (step_entropy(z, before) + step_entropy(before, first)) / n,
        "net_paper": tensor_net(z, before, "paper") / n,
        "net_code": tensor_net(z, before, "code") / n,
        "net_code_sum": (tensor_net(z, before, "code") + tensor_net(before, first, "code")) / n,
        "net_paper_exact": tensor_net(z, first, "paper", exact=True) / n,
        "net_code_exact": tensor_net(z, first, "code", exact=True) / n,
    }
    for name, value in expected.items():
        assert getattr(last, name) == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name
    # Where float32 cannot tell knowledge or its change from none, the cosine has no digits.
    if min(knowledge_norm(z), knowledge_norm(decision_change(z, before))) > 1e-6:
        assert last.alignment == pytest.approx(alignment(z, before).item(), abs=1e-4)


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_parts_of_a_batch_add_up_to_the_whole(cut: int) -> None:
    """Two ranks with any share of the samples, one of them perhaps none, read what one process reads."""
    probes = torch.randn(5, 7, 3).cumsum(0)
    whole, left, right = LayerKnowledge(), LayerKnowledge(), LayerKnowledge()
    for z in probes:
        sums = left.measure(z[:cut]) + right.measure(z[cut:])
        found, other = left.read(sums.tolist(), 0.1), right.read(sums.tolist(), 0.1)
        if found.reason != "first":
            assert sums[0] == 0
        assert same(found, other, 0)
        assert same(found, whole.read(whole.measure(z).tolist(), 0.1))


def test_a_large_layer_is_summed_in_slices() -> None:
    """Beyond one slice (2^16 numbers), not a multiple of it and not contiguous, sums are those of the formulas."""
    z, before = (torch.randn(300, 330).T for _ in range(2))
    last = follow(LayerKnowledge(), before, z)[-1]
    n = z.numel()
    assert last.entropy_trapezoid == pytest.approx(step_entropy(z.double(), before.double()).item() / n, rel=1e-5)
    assert last.net_paper == pytest.approx(tensor_net(z.double(), before.double(), "paper").item() / n, rel=1e-5)
    assert last.flow == pytest.approx(knowledge_norm(z.double() - before.double()).item() / math.sqrt(n), rel=1e-6)


def test_sums_come_in_their_order() -> None:
    """Twelve float64 numbers without a graph, under the names that SUMS gives them; the input is left as it was."""
    layer = LayerKnowledge()
    first = dict(zip(SUMS, layer.measure(torch.tensor([3.0, 3.0])).tolist(), strict=True))
    assert first["began"] == 1 and all(first[name] == 0 for name in SUMS if "Δ" in name)
    layer.measure(torch.tensor([0.0, 0.0]))
    z = torch.tensor([1.0, -2.0], requires_grad=True)
    sums = layer.measure(z * 1)
    assert sums.dtype == torch.float64 and not sums.requires_grad and z.tolist() == [1.0, -2.0]
    found = dict(zip(SUMS, sums.tolist(), strict=True))
    d, e = sigmoid(1.0), sigmoid(-2.0)
    assert found == pytest.approx(
        {
            "began": 0,
            "elements": 2,
            "non_finite": 0,
            "z ΔD": (d - 0.5) - 2 * (e - 0.5),
            "mean ΔD": (d - 0.5) / 2 - (e - 0.5),
            "z²": 5,
            "ΔD²": (d - 0.5) ** 2 + (e - 0.5) ** 2,
            "Δz²": 5,
            "D Δz": d - 2 * e,
            "z D' Δz": d * (1 - d) + 4 * e * (1 - e),
            "h": decision_entropy(z.detach()).sum().item(),
            "softplus": math.log1p(math.e) + math.log1p(math.exp(-2)),
        },
        rel=1e-6,
    )


def test_a_first_probe_has_a_norm_and_no_step() -> None:
    """What belongs to a step is NaN, what counts from here is 0."""
    (first,) = follow(LayerKnowledge(), torch.tensor([3.0]), dt=0.0)
    assert (first.reason, first.norm, first.entropy, first.net_code_exact) == ("first", 3.0, 0.0, 0.0)
    assert (first.entropy_published_sum, first.entropy_trapezoid_sum, first.net_paper_sum) == (0.0, 0.0, 0.0)
    steps = (first.flow, first.alignment, first.entropy_published, first.entropy_trapezoid)
    assert all(map(math.isnan, (*steps, first.net_paper, first.net_code)))


def test_another_shape_begins_anew_and_says_so() -> None:
    """Also one with as many elements; afterwards everything equals that of a layer that began there."""
    probes = [torch.randn(3, 2) for _ in range(3)]
    for shape in ((2, 3), (3, 4), (6,)):
        layer, fresh = LayerKnowledge(), LayerKnowledge()
        follow(layer, *probes)
        later = [torch.randn(shape) for _ in range(3)]
        found, expected = follow(layer, *later, dt=0.1), follow(fresh, *later, dt=0.1)
        assert [reading.reason for reading in found] == ["reshaped", "step", "step"]
        assert astuple(found[0])[1:] == pytest.approx(astuple(expected[0])[1:], nan_ok=True)
        assert all(same(one, other) for one, other in zip(found[1:], expected[1:], strict=True))


def test_the_flow_of_another_shape_is_forgotten() -> None:
    """Neither the last flow nor the longest interval of the old shape says anything of the new one."""
    layer = LayerKnowledge()
    follow(layer, torch.zeros(2), torch.ones(2), dt=100.0)
    assert math.isnan(follow(layer, torch.zeros(3), torch.ones(3), dt=0.0)[-1].flow)
    assert follow(layer, torch.zeros(3), dt=1e-3)[0].flow == pytest.approx(1000)


def test_a_shape_that_changes_on_one_rank_begins_anew_on_all() -> None:
    """Also the rank that could have compared does not, so that all read the same."""
    left, right = LayerKnowledge(), LayerKnowledge()
    left.read(sums := left.measure(torch.ones(2)) + right.measure(torch.ones(2)))
    right.read(sums)
    sums = left.measure(torch.zeros(2)) + right.measure(torch.zeros(3))
    found, other = left.read(sums), right.read(sums)
    assert found.reason == other.reason == "reshaped" and same(found, other)
    assert found.elements == 5 and found.entropy == 0.0 and math.isnan(found.flow)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_after_a_probe_that_is_not_finite_the_sums_go_on(bad: float) -> None:
    """One bad element makes that reading NaN and no later one: its steps are taken across the bad probe."""
    start, end = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 1.0])
    spoilt, clean = LayerKnowledge(), LayerKnowledge()
    found = follow(spoilt, start, torch.tensor([bad, 0.5]), end, end)
    expected = follow(clean, start, torch.tensor([0.5, 0.5]), end, end)
    assert found[1].non_finite == 1 and found[1].reason == "step"
    assert all(map(math.isnan, astuple(found[1])[3:]))
    assert all(same(one, other) for one, other in zip(found[2:], expected[2:], strict=True))


def test_a_first_probe_that_is_not_finite_begins_at_zero() -> None:
    """Its bad elements count as undecided until they have a value, so that the bound of one bit holds."""
    readings = follow(LayerKnowledge(), torch.full((2,), math.nan), torch.tensor([20.0, -20.0]))
    assert (readings[0].reason, readings[0].non_finite) == ("first", 2)
    assert math.isnan(readings[0].norm)
    assert readings[1].entropy == pytest.approx(-1.0, abs=1e-6)


def test_sums_of_a_failed_rank_are_left_out() -> None:
    """NaN in the place of sums gives a reading without numbers; what follows goes on from before."""
    layer, other = LayerKnowledge(), LayerKnowledge()
    follow(layer, torch.zeros(2), torch.ones(2))
    follow(other, torch.zeros(2), torch.ones(2))
    lost = layer.read([math.nan] * len(SUMS))
    assert (lost.reason, lost.elements) == ("lost", 0) and math.isnan(lost.entropy)
    assert same(follow(layer, torch.full((2,), 2.0))[0], follow(other, torch.full((2,), 2.0))[0])
    begun_late = LayerKnowledge()
    begun_late.read([math.nan] * len(SUMS))
    assert follow(begun_late, torch.ones(2))[0].reason == "first"


def test_a_lost_change_of_size_still_begins_anew() -> None:
    """If the sums that told of another shape never came, the number of elements tells."""
    layer = LayerKnowledge()
    follow(layer, torch.zeros(2))
    layer.measure(torch.zeros(3))
    assert follow(layer, torch.ones(3))[0].reason == "reshaped"


def test_the_flow_keeps_its_value_while_time_stands_still() -> None:
    """With an interval of 0, or below 1e-4 of the longest, the last flow is repeated; all else is read anew."""
    layer = LayerKnowledge()
    first = follow(layer, torch.zeros(1), torch.ones(1), dt=0.1)[-1]
    assert first.flow == pytest.approx(10)
    for dt in (0.0, 1e-12, 0.99e-5):
        held = follow(layer, torch.rand(1), dt=dt)[0]
        assert held.flow == first.flow and held.entropy_trapezoid != first.entropy_trapezoid
    follow(layer, torch.ones(1), dt=0.0)
    assert follow(layer, torch.zeros(1), dt=1e-4)[0].flow == pytest.approx(1e4)
    assert math.isnan(follow(LayerKnowledge(), torch.zeros(1), torch.ones(1), dt=0.0)[-1].flow)


def test_a_state_of_tensors_and_numbers_goes_on_bit_for_bit() -> None:
    """Saved and loaded without pickled classes after each probe, readings equal those of the unbroken tracker."""
    probes = torch.randn(6, 4, 3).cumsum(0)
    probes[2, 0, 0] = math.nan
    unbroken, broken = LayerKnowledge(), LayerKnowledge()
    # Intervals that hold the flow test that it and the longest interval are in the state.
    for z, dt in zip(probes, (0.1, 0.1, 0.1, 0.1, 1e-6, 0.0), strict=True):
        file = io.BytesIO()
        torch.save(broken.state_dict(), file)
        file.seek(0)
        broken = LayerKnowledge()
        broken.load_state_dict(torch.load(file, weights_only=True))
        assert same(follow(broken, z, dt=dt)[0], follow(unbroken, z, dt=dt)[0], 0)
    assert math.isfinite(follow(broken, probes[0], dt=0.0)[0].flow)


def test_a_state_is_a_copy() -> None:
    """Neither later probes nor later edits of the state reach across."""
    layer = LayerKnowledge()
    follow(layer, torch.zeros(2), torch.ones(2))
    state = layer.state_dict()
    restored = LayerKnowledge()
    restored.load_state_dict(state)
    follow(layer, torch.full((2,), 5.0))
    assert state["before"].tolist() == [1.0, 1.0]
    state["before"].zero_()
    state["totals"].clear()
    assert restored.state_dict()["before"].tolist() == [1.0, 1.0] and restored.state_dict()["totals"]


def test_what_is_stored_is_one_float32_tensor() -> None:
    """Of the shape of z, whatever its type, in the same memory from probe to probe, and not that of z."""
    layer = LayerKnowledge()
    z = torch.randn(4, 3, dtype=torch.float64)
    layer.measure(z)
    stored = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    assert [(tensor.dtype, tensor.shape) for tensor in stored] == [(torch.float32, z.shape)]
    place = stored[0].data_ptr()
    z.zero_()
    assert stored[0].abs().sum() > 0
    layer.measure(z)
    assert vars(layer)["_before"].data_ptr() == place


@pytest.mark.parametrize("first", [True, False])
def test_probes_may_be_taken_in_and_out_of_inference_mode(first: bool) -> None:
    """A tracker that began, or was loaded, in one takes probes and gives its state in the other."""
    layer, copy = LayerKnowledge(), LayerKnowledge()
    with torch.inference_mode(first):
        layer.measure(torch.zeros(2))
        copy.load_state_dict(layer.state_dict())
    with torch.inference_mode(not first):
        sums = layer.measure(torch.ones(2)), copy.measure(torch.ones(2))
    assert torch.equal(sums[0], sums[1]) and sums[0].tolist()[7] == 2.0


# --- Zero crossings


def test_a_crossing_is_interpolated() -> None:
    """Between neighbours of opposite sign, and at the zero itself where there is one."""
    assert zero_crossings([-1.0, 3.0, -1.0]) == [Crossing(0.25, True), Crossing(1.75, False)]
    assert zero_crossings([-1.0, 0.0, 0.0, 2.0]) == [Crossing(1.0, True)]
    assert zero_crossings([1.0, 0.0, 0.0, -2.0]) == [Crossing(1.0, False)]
    assert zero_crossings([1e308, -1e308]) == [Crossing(0.5, False)]


@pytest.mark.parametrize("values", [[], [1.0], [0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0], [math.nan], [2.0, math.inf]])
def test_without_a_change_of_sign_there_is_no_crossing(values: list[float]) -> None:
    """Touching zero and coming from zero are none, nor is what is not finite."""
    assert zero_crossings(values) == []


def test_noise_within_the_dead_band_crosses_nothing() -> None:
    """A series that ends in small noise crosses once, where it last changed sign before it left the band."""
    values = [-5.0, -0.2, 0.3, -0.1, 0.1, 4.0, 0.2, -0.3, 0.2, 3.0]
    assert len(zero_crossings(values)) == 5
    assert zero_crossings(values, dead_band=0.5) == [Crossing(3.5, True)]
    assert zero_crossings([-1.0, 1.0], dead_band=1.0) == []


def test_values_that_are_not_finite_are_stepped_over() -> None:
    """The crossing lies between the neighbours that are left."""
    assert zero_crossings([-1.0, math.nan, math.inf, 2.0]) == [Crossing(1.0, True)]


@given(values=st.lists(st.floats(-10, 10), max_size=30), band=st.floats(0, 3))
@settings(deadline=None)
def test_crossings_alternate_and_lie_where_signs_change(values: list[float], band: float) -> None:
    """As many as changes of sign among the values beyond the band, in order, each between two opposite values."""
    found = zero_crossings(values, band)
    signs = [value > 0 for value in values if abs(value) > band]
    assert [crossing.rising for crossing in found] == [b for a, b in pairwise(signs) if a != b]
    positions = [crossing.position for crossing in found]
    assert positions == sorted(positions)
    for crossing in found:
        low, high = values[math.floor(crossing.position)], values[math.ceil(crossing.position)]
        assert low == 0 or high == 0 or min(low, high) < 0 < max(low, high) or crossing.position % 1 == 0


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_dead_band_that_is_no_distance_is_refused(bad: float) -> None:
    """The error names it."""
    with pytest.raises(ValueError, match=f"dead_band={bad!r} must be"):
        zero_crossings([1.0], bad)


# --- The forward-only learner


def test_one_unit_learns_as_in_the_table() -> None:
    """Oracle D in float64: knowledge, and weight and bias after each pass."""
    weights, biases, before = [double([0.5])], [double(0.0)], None
    table = [
        (1.0, 0.5, 0.0),
        (1.0, 0.5567302122, 0.0283651061),
        (1.1418255305, 0.6249406456, 0.0624703228),
        (1.3123516141, 0.6968441921, 0.0984220960),
    ]
    entropies = []
    for z, weight, bias in table:
        found = forward_only_pass(double([2.0]), weights, biases, before, lr=0.1)
        if before is not None:
            entropies.append(step_entropy(found.knowledge[0], before[0], "published").item())
        weights, biases, before = found.weights, found.biases, found.knowledge
        numbers = (before[0].item(), weights[0].item(), biases[0].item())
        assert numbers == pytest.approx((z, weight, bias), rel=0, abs=1e-9)
    assert entropies == pytest.approx([0.0, -0.0444049004, -0.0565947409], rel=0, abs=1e-9)


def test_layers_learn_as_in_loops_over_samples_and_units() -> None:
    """Three layers of unequal widths: each weight moves by the mean over samples of G times the input of last time."""
    sizes, n, lr = [3, 4, 2, 5], 6, 0.3
    weights = [torch.randn(b, a, dtype=torch.float64) for a, b in pairwise(sizes)]
    biases = [torch.randn(b, dtype=torch.float64) for b in sizes[1:]]
    x = torch.rand(n, 3, dtype=torch.float64)
    first = forward_only_pass(x, weights, biases, None, lr)
    assert all(torch.equal(new, old) for new, old in zip(first.weights + first.biases, weights + biases, strict=True))
    weights = [weight + 0.1 for weight in weights]  # so that the second pass differs from the first
    second = forward_only_pass(x, weights, biases, first.knowledge, lr)
    below_now, below_then = x, x
    for layer, weight in enumerate(weights):
        z, old = below_now @ weight.T + biases[layer], first.knowledge[layer]
        torch.testing.assert_close(second.knowledge[layer], z)
        for j in range(weight.shape[0]):
            g = [
                -(z[s, j].item() * sigmoid(z[s, j]) * sigmoid(-z[s, j]) + sigmoid(z[s, j]) - sigmoid(old[s, j])) / LN2
                for s in range(n)
            ]
            assert second.biases[layer][j].item() == pytest.approx(biases[layer][j].item() - lr * sum(g) / n)
            for i in range(weight.shape[1]):
                step = sum(g[s] * below_then[s, i].item() for s in range(n)) / n
                assert second.weights[layer][j, i].item() == pytest.approx(weight[j, i].item() - lr * step)
        below_now, below_then = torch.sigmoid(z), torch.sigmoid(old)


def test_a_pass_leaves_what_it_is_given() -> None:
    """Weights of a module (with a graph) are neither changed nor shared, and no graph comes back."""
    layer = torch.nn.Linear(2, 3)
    before = [torch.zeros(4, 3)]
    kept = layer.weight.detach().clone()
    for old in (None, before):
        found = forward_only_pass(torch.ones(4, 2), [layer.weight], [layer.bias], old, lr=1.0)
        found.weights[0].add_(1)
        assert torch.equal(layer.weight, kept)
        assert not any(value.requires_grad for value in found.knowledge + found.weights + found.biases)


def test_the_type_of_the_weights_is_kept() -> None:
    """Also of half-precision ones, though the gradient is computed in float32."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        weight, bias, x = torch.ones(3, 2, dtype=dtype), torch.zeros(3, dtype=dtype), torch.ones(4, 2, dtype=dtype)
        found = forward_only_pass(x, [weight], [bias], [torch.zeros(4, 3, dtype=dtype)], lr=0.1)
        assert {value.dtype for value in found.knowledge + found.weights + found.biases} == {dtype}


def test_layers_that_do_not_fit_are_named() -> None:
    """Errors name the list, the place in it and the shape that it must have."""
    x, weight, bias = torch.ones(4, 2), torch.ones(3, 2), torch.ones(3)
    for arguments, message in (
        ((x[0], [weight], [bias], None), r"inputs has shape \(2,\) and must be \[N, n_in\]"),
        ((x[:0], [weight], [bias], None), r"inputs has shape \(0, 2\) and must be"),
        ((x, [], [], None), "weights has 0 layers, biases 0: all must have the same number"),
        ((x, [weight], [bias], []), "weights has 1 layers, biases 1, before 0"),
        ((x, [weight, weight], [bias, bias], None), r"weights\[1\] has shape \(3, 2\) and must be \[n_out, 3\]"),
        ((x, [weight], [torch.ones(2)], None), r"biases\[0\] has shape \(2,\) and must be \[3\]"),
        ((x, [weight], [bias], [torch.ones(5, 3)]), r"before\[0\] has shape \(5, 3\) and must be \[4, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            forward_only_pass(*arguments, lr=0.1)  # type: ignore[arg-type]
    for bad in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"lr={bad!r} must be"):
            forward_only_pass(x, [weight], [bias], None, lr=bad)
