"""Closed-form step radii, the least of a batch, the predicted loss and the bound of the KL divergence."""

from __future__ import annotations

import inspect
import math
import resource
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from complex_zeros import nearest_zero
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynwatch import step_forecast, step_radius
from dynwatch.step_radius import (
    batch_radius,
    batch_radius_sigmoid,
    kl_bound,
    normalized_step,
    predicted_loss,
    predicted_loss_sigmoid,
    radius_b1,
    radius_b1m,
    radius_b2,
    radius_pi,
    radius_sigmoid,
)

BOUNDS = ["pi", "b1", "b1m", "b2"]
RADII = {
    "pi": lambda z, a, **options: radius_pi(a, **options),
    "b1": radius_b1,
    "b1m": radius_b1m,
    "b2": radius_b2,
}


def pair(*shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random logits and tangents."""
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype), torch.randn(*shape, dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize(
    ("z", "a", "pi", "b1"),
    [
        ([0.0, 0.0], [1.0, -1.0], math.pi / 2, math.pi / 2),
        ([3.0, 0.0], [1.0, 0.0], math.pi, 4.343916),
        ([2.0] + [0.0] * 9, [1.0] + [0.0] * 9, math.pi, math.pi),
    ],
)
def test_known_radii(z: list[float], a: list[float], pi: float, b1: float) -> None:
    """The paper's bound and B1 of three samples worked out by hand."""
    logits, tangents = torch.tensor(z), torch.tensor(a)
    assert radius_pi(tangents).item() == pytest.approx(pi)
    assert radius_b1(logits, tangents).item() == pytest.approx(b1)


def test_two_largest_classes_are_not_enough() -> None:
    """The binary formula on the two largest classes is above the nearest zero; none of the bounds is."""
    z, a = torch.tensor([2.0] + [0.0] * 9), torch.tensor([1.0] + [0.0] * 9)
    truth = nearest_zero(z.numpy(), a.numpy())
    assert truth == pytest.approx(3.148, abs=5e-4)
    assert math.hypot(2, math.pi) == pytest.approx(3.724, abs=5e-4)
    assert math.hypot(2, math.pi) > truth
    assert all(RADII[bound](z, a).item() <= truth * (1 + 1e-9) for bound in BOUNDS)


@pytest.mark.parametrize("bound", BOUNDS)
def test_invariances(bound: str) -> None:
    """Shifts of logits or tangents and the order of classes change nothing; twice the tangents halve the radius."""
    z, a = pair(40, 7)
    radius, shift, order = RADII[bound], torch.randn(40, 1, dtype=torch.float64), torch.randperm(7)
    before = radius(z, a)
    for other in (
        radius(z + shift, a),
        radius(z, a + shift),
        radius(z[:, order], a[:, order]),
        2 * radius(z, 2 * a),
        radius(z, -2 * a) * 2,
    ):
        torch.testing.assert_close(other, before, rtol=1e-9, atol=0)


@pytest.mark.parametrize("bound", BOUNDS)
def test_temperature_divides_logits_and_tangents(bound: str) -> None:
    """A radius at temperature T is that of z / T and a / T; for two classes √(δ² + π² T²) / Δ."""
    z, a = pair(30, 5)
    radius = RADII[bound]
    torch.testing.assert_close(radius(z, a, temperature=2.5), radius(z / 2.5, a / 2.5), rtol=1e-9, atol=0)
    gap = (z[:, 0] - z[:, 1]) * (bound != "pi")
    binary = torch.hypot(gap, torch.full_like(gap, 2.5 * math.pi)) / (a[:, 0] - a[:, 1]).abs()
    torch.testing.assert_close(radius(z[:, :2], a[:, :2], temperature=2.5), binary)
    assert batch_radius(z, a, bound, temperature=2.5).radius.item() == pytest.approx(  # type: ignore[arg-type]
        radius(z, a, temperature=2.5).min().item(), rel=2e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bound", BOUNDS)
def test_narrow_types_are_widened_first(bound: str, dtype: torch.dtype) -> None:
    """Half and single precision give what the same numbers in double precision give, in double precision."""
    z, a = pair(2, 3, 9, dtype=dtype)
    found = RADII[bound](z, a)
    assert found.dtype == torch.float64 and found.shape == (2, 3)
    assert torch.equal(found, RADII[bound](z.double(), a.double()))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e15, 1e30])
def test_huge_and_tiny_numbers(bound: str, size: float) -> None:
    """Logits of ±1e4 and tangents from 1e-30 to 1e30 in single precision give finite radii in proportion."""
    z, a = torch.tensor([1e4, -1e4, 9.9e3]), torch.tensor([1.0, -1.0, 0.5])
    found = RADII[bound](z, a * size)
    assert found.isfinite()
    assert found.item() * size == pytest.approx(RADII[bound](z, a).item(), rel=1e-6)


def test_logits_of_ten_thousand() -> None:
    """B1 of a certain class is its log-odds over the spread, where its probability rounds to 1."""
    assert radius_b1(torch.tensor([1e4, -1e4]), torch.tensor([0.0, 2.0])).item() == pytest.approx(1e4, rel=1e-7)


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_sample_that_does_not_move_has_no_limit(bound: str) -> None:
    """Equal tangents give an infinite radius, and a batch of such samples is infinite with the first that counts."""
    z, a = torch.randn(3, 4), torch.full((3, 4), 0.3)
    assert RADII[bound](z, a).tolist() == [math.inf] * 3
    found = batch_radius(z, a, bound, mask=torch.tensor([False, True, True]))  # type: ignore[arg-type]
    assert (found.radius.item(), found.index.item()) == (math.inf, 1)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    ("where", "bad"),
    [("logits", math.nan), ("logits", math.inf), *(("tangents", bad) for bad in (math.nan, math.inf, -math.inf))],
)
def test_what_is_not_finite_makes_the_radius_nan(bound: str, bad: float, where: str) -> None:
    """The sample's radius and the batch's are NaN, and others' are not; a mask takes the sample out."""
    z, a = pair(5, 4)
    clean = RADII[bound](z, a)
    (z if where == "logits" else a)[3, 1] = bad
    mask = torch.tensor([True, True, True, False, True])
    if bound != "pi" or where == "tangents":
        found = RADII[bound](z, a)
        assert found.isnan().tolist() == [False, False, False, True, False]
        torch.testing.assert_close(found[mask], clean[mask])
    binding = batch_radius(z, a, bound)  # type: ignore[arg-type]
    assert binding.radius.isnan() and binding.index.item() == 3
    masked = batch_radius(z, a, bound, mask)  # type: ignore[arg-type]
    assert masked.radius.item() == pytest.approx(clean[mask].min().item(), rel=2e-3)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("tangent", [0.0, 7.0, math.nan])
def test_a_masked_class_is_left_out(bound: str, tangent: float) -> None:
    """A logit of minus infinity has no term in the sum: the radius is that of the others, whatever its tangent."""
    z, a = pair(6, 5)
    expected = batch_radius(z[:, 1:].contiguous(), a[:, 1:].contiguous(), bound)  # type: ignore[arg-type]
    z[:, 0], a[:, 0] = -math.inf, tangent
    found = batch_radius(z, a, bound)  # type: ignore[arg-type]
    assert found.radius.item() == pytest.approx(expected.radius.item(), rel=1e-12)
    assert found.index == expected.index
    z[2, 1:4] = -math.inf  # one class is left: nothing can cancel it
    assert batch_radius(z[2:3], a[2:3], bound).radius.item() == math.inf  # type: ignore[arg-type]
    z[2] = -math.inf
    assert batch_radius(z[2:3], a[2:3], bound).radius.isnan()  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (1, 1, 2, 3, 4), (4,)])
def test_the_least_of_a_batch(bound: str, shape: tuple[int, ...]) -> None:
    """Radius and index are those of the least sample that counts, for any leading shape."""
    z, a = pair(*shape)
    mask = torch.rand(shape[:-1]) < 0.7
    mask.view(-1)[0] = True
    each = RADII[bound](z, a).masked_fill(~mask, math.inf)
    found = batch_radius(z, a, bound, mask)  # type: ignore[arg-type]
    assert found.radius.shape == found.index.shape == () and found.index.dtype == torch.int64
    assert found.radius.item() == pytest.approx(each.min().item(), rel=2e-3)
    assert each.flatten()[found.index].item() == pytest.approx(each.min().item(), rel=2e-3)
    assert (found.scanned > 0) == (bound == "b2")


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_no_sample_left(bound: str, rows: int) -> None:
    """Without samples, or with all masked, the radius is infinite and the index -1."""
    mask = torch.zeros(rows, dtype=torch.bool)
    found = batch_radius(torch.randn(rows, 4), torch.randn(rows, 4), bound, mask)  # type: ignore[arg-type]
    assert (found.radius.item(), found.index.item(), found.scanned) == (math.inf, -1, 0)


def test_the_radius_of_a_batch_is_that_of_its_product() -> None:
    """The product of two samples' F, whose log is the batch's loss, has its nearest zero at the lesser radius."""
    z, a = pair(2, 3)
    # e^(z_i + z_j) with tangents a_i + a_j, over pairs of classes: the product as a sum of exponentials again.
    together = nearest_zero(
        (z[0][:, None] + z[1][None]).flatten().numpy(), (a[0][:, None] + a[1][None]).flatten().numpy()
    )
    apart = min(nearest_zero(z[i].numpy(), a[i].numpy()) for i in range(2))
    assert together == pytest.approx(apart, rel=1e-7)
    assert batch_radius(z, a, "b2").radius.item() <= together


def test_sigmoid_is_a_softmax_over_a_logit_and_zero() -> None:
    """Its exact radius is B1 of (z, 0), (a, 0), also at another temperature, and the least of a batch is found."""
    z, a = pair(6, 5, scale=10.0)
    zeros = torch.zeros_like(z)
    for temperature in (1.0, 0.4):
        softmax = radius_b1(torch.stack([z, zeros], -1), torch.stack([a, zeros], -1), temperature)
        torch.testing.assert_close(radius_sigmoid(z, a, temperature), softmax)
    a[1, 2] = 0.0
    assert radius_sigmoid(z, a)[1, 2].item() == math.inf
    mask = torch.rand(6, 5) < 0.5
    mask[0, 0] = True
    found = batch_radius_sigmoid(z, a, mask)
    expected = radius_sigmoid(z, a).masked_fill(~mask, math.inf)
    assert (found.radius.item(), found.index.item()) == (expected.min().item(), expected.argmin().item())
    a[0, 0] = math.nan
    assert batch_radius_sigmoid(z, a, mask).radius.isnan()
    assert batch_radius_sigmoid(z, a, mask & False).index.item() == -1


@pytest.mark.parametrize(
    ("length", "radius", "expected"),
    [(3.0, 1.5, 2.0), (3.0, math.inf, 0.0), (0.0, 2.0, 0.0), (1.0, 0.0, math.inf), (1.0, math.nan, math.nan)],
)
def test_normalized_step(length: float, radius: float, expected: float) -> None:
    """It is length / radius, with 0 for an infinite radius, for numbers and for tensors."""
    assert normalized_step(length, radius) == pytest.approx(expected, nan_ok=True)
    assert float(normalized_step(length, torch.tensor(radius))) == pytest.approx(expected, nan_ok=True)
    assert float(normalized_step(torch.tensor(length), radius)) == pytest.approx(expected, nan_ok=True)


def targets_of(kind: str, shape: tuple[int, ...], classes: int) -> Tensor:
    """Class indices, some ignored, or probabilities."""
    if kind == "probabilities":
        return torch.softmax(torch.randn(*shape, classes), -1)
    indices = torch.randint(classes, shape)
    if kind == "ignored":
        indices[torch.rand(shape) < 0.4] = -100
        indices.view(-1)[:2] = torch.tensor([-100, 1])
    return indices


@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_predicted_loss_is_torchs(monkeypatch: pytest.MonkeyPatch, kind: str, weighted: bool, smoothing: float) -> None:
    """It equals cross_entropy at moved logits with every option, in one slice of rows or in many."""
    z, a = pair(4, 6, 5)
    targets = targets_of(kind, (4, 6), 5)
    options: dict[str, Any] = {"label_smoothing": smoothing, "weight": torch.rand(5) + 0.1 if weighted else None}
    lengths = [0.0, 0.5, 20.0]
    flat = targets.double().reshape(-1, 5) if kind == "probabilities" else targets.reshape(-1)
    wide = {**options, "weight": options["weight"].double() if weighted else None}
    expected = [F.cross_entropy((z + length * a).reshape(-1, 5), flat, **wide) for length in lengths]
    for elements in (2**19, 17):
        monkeypatch.setattr("dynwatch._logit_rows.ELEMENTS", elements)
        found = predicted_loss(z, a, targets, torch.tensor(lengths), **options)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)
        one = predicted_loss(z, a, targets, 0.5, **options)
        assert one.shape == () and one.item() == pytest.approx(found[1].item())


def test_predicted_loss_takes_another_ignore_index_and_no_sample() -> None:
    """Another index can be ignored, also a class; with all ignored it is NaN, as in torch."""
    z, a = pair(5, 4, scale=1e4)
    targets = torch.tensor([0, 1, 2, 2, 3])
    assert predicted_loss(z, a, targets, 2.0, ignore_index=2).item() == pytest.approx(
        F.cross_entropy(z + 2 * a, targets, ignore_index=2).item()
    )
    assert predicted_loss(z, a, torch.full((5,), -100)).isnan()


def test_predicted_loss_sigmoid_is_torchs() -> None:
    """It equals binary_cross_entropy_with_logits at moved logits, with weights."""
    z, a = pair(4, 6)
    targets, weight, pos = torch.rand(4, 6), torch.rand(6), torch.rand(6) * 3
    lengths = torch.tensor([0.0, 3.0])
    for options in ({}, {"weight": weight}, {"pos_weight": pos}, {"weight": weight, "pos_weight": pos}):
        wide = {name: value.double() for name, value in options.items()}
        expected = [F.binary_cross_entropy_with_logits(z + t * a, targets.double(), **wide) for t in lengths]
        torch.testing.assert_close(
            predicted_loss_sigmoid(z, a, targets, lengths, **options), torch.stack(expected), rtol=1e-12, atol=0
        )
    assert predicted_loss_sigmoid(z, a, targets, 3.0).shape == ()


def divergence(z: Tensor, a: Tensor, length: float) -> Tensor:
    """KL from the predictions before to those after."""
    before, after = torch.log_softmax(z, -1), torch.log_softmax(z + length * a, -1)
    return (before.exp() * (before - after)).sum(-1)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 50),
    scale=st.floats(-2, 2.5),
    length=st.sampled_from([0.01, 1, 9]),
)
def test_the_kl_bound_holds(seed: int, classes: int, scale: float, length: float) -> None:
    """The mean KL is never above the bound, for samples under a mask too."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(12, classes, generator=generator, dtype=torch.float64) * 10**scale
    a = torch.randn(12, classes, generator=generator, dtype=torch.float64)
    mask = torch.arange(12) < 7
    true = divergence(z, a, length)
    assert true.mean() <= kl_bound(a, length) + 1e-12
    assert true[mask].mean() <= kl_bound(a, length, mask) + 1e-12
    a[11, 0] = math.nan
    assert kl_bound(a, length).isnan() and not kl_bound(a, length, mask).isnan()


def test_the_kl_at_the_papers_radius() -> None:
    """At x = π the largest KL over two-class logits is 1.0946, as the docstring says, and three classes stay below."""
    gap = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    two = divergence(torch.stack([gap, 0 * gap], -1), torch.tensor([0.0, 1.0], dtype=torch.float64), math.pi)
    sharp = math.log(math.expm1(math.pi) / math.pi) - 1 + math.pi / math.expm1(math.pi)
    assert sharp == pytest.approx(1.0946, abs=5e-5)
    assert two.max().item() == pytest.approx(sharp, rel=1e-6)
    z, a = pair(20000, 3)
    place = (a - a.amin(1, keepdim=True)) / (a.amax(1, keepdim=True) - a.amin(1, keepdim=True))
    assert 0.9 < divergence(z, place, math.pi).max().item() <= sharp
    assert kl_bound(place, math.pi).item() == pytest.approx(math.pi**2 / 8)


def test_errors_name_the_argument_and_the_remedy() -> None:
    """One class, other shapes, types, masks, bounds and temperatures are refused in words."""
    z, a = torch.zeros(3, 4), torch.ones(3, 4)
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"tangents has shape \(3, 1\).*radius_sigmoid", lambda: radius_pi(a[:, :1])),
        (ValueError, r"logits has shape \(3, 1\).*radius_sigmoid", lambda: batch_radius(z[:, :1], a[:, :1])),
        (ValueError, "2 classes or more", lambda: radius_pi(torch.tensor(1.0))),
        (ValueError, r"tangents has shape \(2, 4\) and must have that of logits", lambda: radius_b1(z, a[:2])),
        (TypeError, "logits has dtype torch.int64", lambda: radius_b2(z.long(), a)),
        (TypeError, "tangents has dtype torch.complex64", lambda: radius_b1m(z, a.cfloat())),
        (TypeError, "tangents has type list", lambda: radius_pi([1.0, 2.0])),  # type: ignore[arg-type]
        (TypeError, "mask has dtype torch.int64 .* boolean", lambda: batch_radius(z, a, mask=torch.ones(3).long())),
        (ValueError, r"mask has shape \(3, 4\)", lambda: batch_radius(z, a, mask=z == 0)),
        (ValueError, "bound='b3' must be 'pi'", lambda: batch_radius(z, a, "b3")),  # type: ignore[arg-type]
        (ValueError, "temperature=0.0 must be a finite number above 0|temperature=0.0", lambda: radius_pi(a, 0.0)),
        (ValueError, "temperature=nan", lambda: radius_sigmoid(z, a, math.nan)),
        (ValueError, "length=-1.0 must be 0 or more", lambda: normalized_step(-1.0, 1.0)),
        (ValueError, r"targets has shape \(2,\)", lambda: predicted_loss(z, a, torch.zeros(2).long())),
        (ValueError, r"targets has shape \(3, 4\) and dtype torch.int64", lambda: predicted_loss(z, a, z.long())),
        (ValueError, "label_smoothing=1.5", lambda: predicted_loss(z, a, torch.zeros(3).long(), label_smoothing=1.5)),
        (ValueError, r"length has shape \(1, 1\)", lambda: predicted_loss(z, a, z, torch.ones(1, 1))),
        (ValueError, r"targets has shape \(3,\)", lambda: predicted_loss_sigmoid(z, a, z[:, 0])),
    ]
    for kind, text, call in cases:
        with pytest.raises(kind, match=text):
            call()


def test_closed_forms_leave_the_values_on_the_device() -> None:
    """On the meta device, where no value can be read, closed forms, losses and the KL bound run all the same."""
    z, a = torch.empty(3, 4, device="meta"), torch.empty(3, 4, device="meta")
    mask = torch.empty(3, dtype=torch.bool, device="meta")
    for bound in BOUNDS[:3]:
        assert batch_radius(z, a, bound, mask).radius.is_meta  # type: ignore[arg-type]
    assert batch_radius_sigmoid(z, a).radius.is_meta
    assert predicted_loss(z, a, torch.empty(3, dtype=torch.int64, device="meta")).is_meta
    assert kl_bound(a, 1.0, mask).is_meta


def test_vocabularies_take_bounded_memory() -> None:
    """32 samples of 50 000 classes in half precision take less than 64 MiB on top of their own, whichever bound."""
    z, a = pair(32, 50_000, dtype=torch.bfloat16)
    targets = torch.randint(50_000, (32,))
    batch_radius(z[:2], a[:2], "b2")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bound in BOUNDS:
        assert 0 < batch_radius(z, a, bound).radius.item() < math.inf  # type: ignore[arg-type]
    assert predicted_loss(z, a, targets, torch.tensor([0.0, 1.0])).isfinite().all()
    assert kl_bound(a) > 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024


def test_slices_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Radii are the same with all rows at once and with one row at a time."""
    z, a = pair(9, 6)
    whole = {bound: radius(z, a) for bound, radius in RADII.items()}
    monkeypatch.setattr("dynwatch._logit_rows.ELEMENTS", 1)
    for bound, radius in RADII.items():
        torch.testing.assert_close(radius(z, a), whole[bound], rtol=1e-12, atol=0)


def test_no_graph_is_built() -> None:
    """Logits that ask for a gradient give radii and losses that do not."""
    z, a = (tensor.requires_grad_() for tensor in pair(3, 4))
    assert not batch_radius(z, a, "b2").radius.requires_grad
    assert not radius_sigmoid(z, a).requires_grad
    assert not predicted_loss(z, a, torch.tensor([0, 1, 2])).requires_grad
    assert not predicted_loss_sigmoid(z, a, torch.zeros(3, 4)).requires_grad


def test_one_module_has_all_names() -> None:
    """What is promised of step_radius is there, with the losses that live elsewhere."""
    assert step_radius.predicted_loss is step_forecast.predicted_loss
    assert list(inspect.signature(batch_radius).parameters) == ["logits", "tangents", "bound", "mask", "temperature"]
    assert all(hasattr(step_radius, name) for name in step_radius.__all__)
    assert np.isfinite(float(radius_pi(torch.tensor([0.0, 1.0]))))
