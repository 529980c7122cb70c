"""The certified scan and the closed forms are checked against the nearest complex zero itself."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from complex_zeros import nearest_zero, zeros_within
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynwatch import step_radius_scan
from dynwatch.step_radius import batch_radius, radius_b1, radius_b1m, radius_b2, radius_pi
from dynwatch.step_radius_scan import TOLERANCE, log_odds, scan_rows

# Rounding of the bounds and of the zero.
EXACT = 1 + 1e-9


def draw(seed: int, rows: int, classes: int, scale: float, law: str = "normal") -> tuple[Tensor, Tensor]:
    """Logits of a scale, and tangents of another: normal, level in groups, or with one class that moves alone."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    z, a = torch.randn(rows, classes, **options) * scale, torch.randn(rows, classes, **options)
    if law == "groups":
        z, a = z.round(), (2 * a).round()
    elif law == "alone":
        a = torch.zeros_like(a)
        a[:, 0] = 1.0
    return z, a * 10 ** torch.empty(rows, 1, dtype=torch.float64).uniform_(-6, 6, generator=generator)


def exact(z: Tensor, a: Tensor) -> Tensor:
    """The nearest zero of each row."""
    zeros = [nearest_zero(*row) for row in zip(z.numpy(), a.numpy(), strict=True)]
    return torch.tensor(zeros, dtype=torch.float64)


def check_order(z: Tensor, a: Tensor) -> None:
    """π/Δ ≤ B1 ≤ B1m ≤ exact and B1m ≤ B2 ≤ exact, for every row."""
    truth = exact(z, a)
    chain = [radius_pi(a), radius_b1(z, a), radius_b1m(z, a), radius_b2(z, a), truth]
    for lower, higher in pairwise(chain):
        assert (lower <= higher * EXACT).all(), (z, a)
    assert (scan_rows(z, a) <= truth * EXACT).all(), (z, a)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 12) | st.integers(2, 60),
    exponent=st.floats(-2, 2),
    law=st.sampled_from(["normal", "groups", "alone"]),
)
def test_no_bound_is_above_the_nearest_zero(seed: int, classes: int, exponent: float, law: str) -> None:
    """The bounds are in order and none is above the certified zero."""
    check_order(*draw(seed, 1, classes, 10**exponent, law))


@pytest.mark.parametrize(("classes", "scale"), [(2, 1e3), (3, 1e3), (5, 1e3), (1000, 0.1), (1000, 3.0), (300, 30.0)])
def test_bounds_hold_for_large_logits_and_many_classes(classes: int, scale: float) -> None:
    """The same where a zero costs more to find."""
    check_order(*draw(7, 2, classes, scale))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.floats(-2, 3))
def test_two_classes_are_exact(seed: int, exponent: float) -> None:
    """For two classes all but the paper's bound are √(δ² + π²) / Δ, and so is the scan up to its tolerance."""
    z, a = draw(seed, 20, 2, 10**exponent)
    gap, spread = (z[:, 0] - z[:, 1]).abs(), (a[:, 0] - a[:, 1]).abs()
    binary = torch.hypot(gap, torch.full_like(gap, math.pi)) / spread
    for bound in (radius_b1(z, a), radius_b1m(z, a), radius_b2(z, a)):
        torch.testing.assert_close(bound, binary, rtol=1e-12, atol=0)
    scanned = scan_rows(z, a)
    assert (scanned <= binary * EXACT).all()
    assert (scanned >= binary * (1 - 3 * TOLERANCE)).all()


def naive(z: Tensor, a: Tensor, step: float = 1e-3, reach: float = 12.0) -> float:
    """The scan's minimum on a fine grid of single points, certified by nothing."""
    spread = a.max() - a.min()
    u = torch.arange(-reach, reach, step, dtype=torch.float64)
    p = torch.softmax(z + u[:, None] * a / spread, dim=1)
    mean = p @ a
    deviation = ((p * (a - mean[:, None]) ** 2).sum(1)).sqrt() / spread
    value = torch.hypot(u, math.pi / 2 / deviation)
    return float((value[p.max(1).values <= 0.5 + step].min()) / spread)


@pytest.mark.parametrize("classes", [3, 4, 10, 50])
@pytest.mark.parametrize("law", ["normal", "groups", "alone"])
def test_the_scan_finds_the_minimum_it_claims(classes: int, law: str) -> None:
    """It agrees with a fine grid, to its tolerance and the grid's."""
    z, a = draw(11, 6, classes, 1.5, law)
    for logits, tangents, found in zip(z, a, scan_rows(z, a), strict=True):
        if found < math.inf:
            assert found.item() == pytest.approx(naive(logits, tangents), rel=3 * TOLERANCE)


@pytest.mark.parametrize(
    ("classes", "scale", "of_pi", "of_b2"),
    [(3, 0.01, 0.84, 0.97), (3, 10, 0.26, 1.0), (10, 0.01, 0.54, 0.87), (10, 10, 0.25, 0.99), (100, 3, 0.33, 0.85)],
)
def test_median_tightness(classes: int, scale: float, of_pi: float, of_b2: float) -> None:
    """Over normal logits of a scale and normal tangents the medians of bound / zero are those documented."""
    z, a = draw(3, 250 if classes < 100 else 15, classes, scale)
    truth = exact(z, a)
    assert (radius_pi(a) / truth).median().item() == pytest.approx(of_pi, abs=0.05)
    assert (radius_b2(z, a) / truth).median().item() == pytest.approx(of_b2, abs=0.05)


def test_far_crossings() -> None:
    """Where classes that are level lead for long and others take over far away, the scan still gets there."""
    z, a = torch.tensor([[1e4, 1e4, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    truth = math.hypot(1e4 + math.log(2), math.pi)
    assert scan_rows(z, a).item() == pytest.approx(truth, rel=3 * TOLERANCE)
    assert scan_rows(z, a).item() <= truth


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("scale", [0.0, 1e-10, 1e4, 1e15])
def test_the_scan_ends_on_hard_inputs(size: float, scale: float) -> None:
    """Tiny and huge logits and tangents give a positive, finite radius, in proportion to 1 / tangents."""
    z, a = draw(5, 8, 6, scale)
    a = a / (a.amax(1, keepdim=True) - a.amin(1, keepdim=True))
    found = radius_b2(z, a * size)
    assert (found >= radius_b1m(z, a * size)).all()
    assert found.isfinite().all()
    torch.testing.assert_close(found * size, radius_b2(z, a), rtol=1e-6, atol=0)


def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each look at some intervals adds how many they are."""
    found, inner = [], step_radius_scan._moments

    def counting(logits: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        found.append(len(logits))
        return inner(logits, slopes)

    monkeypatch.setattr(step_radius_scan, "_moments", counting)
    return found


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e30])
@pytest.mark.parametrize("scale", [1e2, 1e8, 1e12, 1e16, 1e30])
def test_the_work_is_bounded_for_huge_logits(
    classes: int, size: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few dozen evaluations a row, a bound in order with the others, and below the zero of two classes."""
    z, a = draw(4, 20, classes, scale)
    z[0], a[0] = scale * torch.linspace(1, -1, classes), torch.linspace(0, 1, classes)
    a = a / (a.amax(1, keepdim=True) - a.amin(1, keepdim=True)) * size
    counts = evaluations(monkeypatch)
    found = scan_rows(z, a)
    assert sum(counts) <= 20 * 100
    assert found.isfinite().all()
    assert (found >= radius_b1m(z, a) * (1 - 1e-9)).all()
    if classes == 2:
        truth = torch.hypot(z[:, 0] - z[:, 1], torch.full_like(z[:, 0], math.pi)) / (a[:, 0] - a[:, 1]).abs()
        assert (found <= truth * EXACT).all()
        assert (found >= truth * (1 - 3 * TOLERANCE)).all()


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_row_has_its_share_of_evaluations(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two level classes that move almost alike are costly: the work stays bounded and the bound below the zero."""
    far = 1e3 / gap
    z, a = torch.tensor([[0.0, 0.0, -far]], dtype=torch.float64), torch.tensor([[0.0, gap, 1.0]], dtype=torch.float64)
    counts = evaluations(monkeypatch)
    found = scan_rows(z, a).item()
    assert sum(counts) <= 4 * step_radius_scan._HALVINGS + 4
    assert math.pi <= found <= math.pi / gap * EXACT
    monkeypatch.setattr(step_radius_scan, "_HALVINGS", 5)
    before = sum(counts)
    early = scan_rows(z, a).item()
    assert math.pi <= early <= math.pi / gap * EXACT and early < found
    assert sum(counts) - before <= 24


@pytest.mark.parametrize("scale", [1e100, 1e160, 1e300])
def test_squares_that_overflow_do_not_lift_the_bound(scale: float) -> None:
    """Where the square of a distance is beyond the floats, the bound is still there and below the zero."""
    z, a = torch.tensor([[scale, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert scale * (1 - 1e-9) <= scan_rows(z, a).item() <= scale * EXACT


def test_a_class_on_top_at_both_ends_rules_out_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """The top class loses very slowly to the next: one look at each end of the way is enough, not one each unit."""
    z = torch.tensor([[0.0, -1.0, -1e6, -1e6]], dtype=torch.float64)
    a = torch.tensor([[0.5, 0.5 + 1e-4, 0.0, 1.0]], dtype=torch.float64)
    counts = evaluations(monkeypatch)
    # Classes 0 and 1 alone have the zero (1 + πi) / 1e-4; the others are below exp(-1e5) there.
    truth = math.hypot(1.0, math.pi) / 1e-4
    assert truth * (1 - 3 * TOLERANCE) <= scan_rows(z, a).item() <= truth * EXACT
    assert sum(counts) <= 400


def test_a_ceiling_only_cuts_refinement() -> None:
    """What lies below the ceiling is as without it; the others are said to be above it, by less work."""
    z, a = draw(2, 50, 8, 1.0)
    a = a / (a.amax(1, keepdim=True) - a.amin(1, keepdim=True))
    full = scan_rows(z, a)
    ceiling = full.median().item()
    cut = scan_rows(z, a, ceiling)
    below = full < ceiling
    torch.testing.assert_close(cut[below], full[below], rtol=2 * TOLERANCE, atol=0)
    assert (cut[~below] >= ceiling * (1 - 2 * TOLERANCE)).all()
    assert (cut[~below] < full[~below]).any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 30), exponent=st.floats(-2, 3))
def test_early_exit_gives_the_minimum_of_all(seed: int, classes: int, exponent: float) -> None:
    """Of a batch it finds what scanning every sample finds, up to the scan's tolerance, having looked at no more."""
    z, a = draw(seed, 30, classes, 10**exponent)
    found = batch_radius(z, a, "b2")
    everywhere = radius_b2(z, a)
    assert found.radius.item() == pytest.approx(everywhere.min().item(), rel=2 * TOLERANCE)
    assert everywhere[found.index].item() <= everywhere.min().item() * (1 + 2 * TOLERANCE)
    assert 1 <= found.scanned <= 30


def test_early_exit_scans_few_samples() -> None:
    """When one sample moves ten times as fast as any other, no other is scanned."""
    z, a = torch.zeros(4, 50, 20), torch.rand(4, 50, 20)
    a[2, 7] *= 10
    found = batch_radius(z, a, "b2")
    assert (found.scanned, found.index.item()) == (1, 107)


def test_log_odds_keep_their_digits() -> None:
    """Log-odds of a certain class are those of arithmetic, also where its probability rounds to 1."""
    odds, top = log_odds(torch.tensor([[0.0, 2e4, 0.0], [1.0, 1.0, -9e3]], dtype=torch.float64))
    assert odds.tolist() == pytest.approx([2e4 - math.log(2), 0.0])
    assert top[0].item() == 1


def test_the_reference_counts_zeros() -> None:
    """The winding number counts the zeros of 1 + e^t, ±πi, ±3πi, …, and of a double one."""
    z, a = np.zeros(2), np.array([0.5, -0.5])
    assert [zeros_within(z, a, radius) for radius in (3.0, 3.2, 9.5, 16.0)] == [0, 2, 4, 6]
    squared = np.array([0.0, math.log(2), 0.0]), np.array([-1.0, 0.0, 1.0])
    assert zeros_within(*squared, 3.2) == 4
    assert nearest_zero(np.array([3.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0])) == pytest.approx(
        math.hypot(3 - math.log(2), math.pi), abs=1e-9
    )
