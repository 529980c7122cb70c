"""The picture of a spectrum over time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from dynwatch.callbacks import density_picture as module
from dynwatch.callbacks.density_picture import density_picture
from dynwatch.spectral_density import SpectralDensity

Colours = npt.NDArray[np.uint8]
PLOT = (slice(module._TOP, -module._BOTTOM), slice(module._LEFT, -module._RIGHT))


def density(nodes: list[float], counts: list[float] | None = None) -> SpectralDensity:
    """Eigenvalues, each as often as its count says."""
    counts = [1.0] * len(nodes) if counts is None else counts
    weights = np.array(counts) / sum(counts)
    return SpectralDensity(np.array(nodes), weights, len(nodes), round(sum(counts)), "complete")


def inside(picture: Colours) -> npt.NDArray[np.int64]:
    """Darkness within the axes, without the line at zero: [rows, columns], 0 where it is white."""
    colours = picture[PLOT].astype(np.int64)
    grey = (colours.max(-1) == colours.min(-1)) & (colours.max(-1) < 255)
    return np.where(grey, 0, 3 * 255 - colours.sum(-1))


def bands(picture: Colours, column: int) -> list[int]:
    """The rows in the middle of what is drawn in a column, from the top."""
    drawn = np.flatnonzero(inside(picture)[:, column])
    groups = np.split(drawn, np.flatnonzero(np.diff(drawn) > 1) + 1)
    return [round(float(group.mean())) for group in groups if len(group)]


SPECTRA: dict[str, list[tuple[int, SpectralDensity]]] = {
    "both_signs": [(i, density([-2.0, 0.0, 30.0], [1, 5000, 1])) for i in range(0, 640, 10)],
    "one_value": [(0, density([3.0]))],
    "zero": [(5, density([0.0], [1e9]))],
    "negative": [(99, density([-7.0, -1e-3])), (10**7, density([-7.0, -0.1]))],
    "tiny": [(i, density([-1e-10, 2e-12, 3e-10], [2, 90, 8])) for i in range(3)],
    "huge": [(i, density([-1e15, 2.0, 3e15], [2, 1e12, 8])) for i in (1, 10_000, 123_456_789)],
    "no_weight": [(0, density([0.0, 1.0], [1.0, 0.0]))],
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_any_spectrum_has_a_picture_with_nothing_cut(kind: str) -> None:
    """It has its size whatever it shows, something is drawn, and no ink touches the rim, where a label would be cut."""
    picture = density_picture(SPECTRA[kind])
    assert picture.shape == (module._HEIGHT, module._WIDTH, 3) and picture.dtype == np.uint8
    assert inside(picture).max() > 100
    rim = np.ones(picture.shape[:2], dtype=bool)
    rim[2:-2, 2:-2] = False
    assert (picture[rim] == 255).all()


def test_eigenvalues_stand_in_order_and_apart() -> None:
    """Four eigenvalues are four bands, the largest on top, also those that differ by orders of magnitude."""
    found = bands(density_picture([(0, density([-5.0, 0.0, 2.0, 80.0]))]), 100)
    assert len(found) == 4
    low, high = np.arcsinh(-5 / 0.8), np.arcsinh(80 / 0.8)
    rows = module._HEIGHT - module._TOP - module._BOTTOM
    for row, value in zip(found, [80.0, 2.0, 0.0, -5.0], strict=True):
        share = (high - np.arcsinh(value / 0.8)) / (high - low)
        assert row == pytest.approx(rows * (0.05 + share) / 1.1, abs=2)


def test_darker_where_there_are_more() -> None:
    """One, ten and ten thousand eigenvalues are drawn ever darker, and the one can still be seen."""
    picture = density_picture([(0, density([-1.0, 1.0, 100.0], [10_000, 10, 1]))])
    one, ten, many = (inside(picture)[row, 50] for row in bands(picture, 50))
    assert 150 < one < ten - 50 < many - 100


def test_a_density_reaches_halfway_to_its_neighbours() -> None:
    """Readings at uneven steps stand where their steps are: at 0, 10 and 40 the first goes to 5, the second to 25."""
    picture = density_picture([(0, density([1.0, 3.0])), (10, density([1.0])), (40, density([2.0]))])
    width = module._WIDTH - module._LEFT - module._RIGHT
    # The picture begins 5 steps before the first and ends 15 after the last.
    columns = [round(width * (step + 5) / 60) for step in (4, 6, 24, 26)]
    first, second, still, third = (bands(picture, column) for column in columns)
    assert len(first) == 2 and len(second) == 1
    assert second == still == first[1:]
    assert third != second and first[0] < third[0] < second[0]


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e5, 1e15])
def test_the_unit_does_not_matter(scale: float) -> None:
    """Eigenvalues in another unit give the same picture within the axes."""
    nodes, counts = [-3.0, -0.2, 0.01, 7.0], [1, 30, 1000, 2]
    plain = density_picture([(0, density(nodes, counts))])
    scaled = density_picture([(0, density([scale * node for node in nodes], counts))])
    assert np.abs(inside(plain) - inside(scaled)).mean() < 1


def test_labels_have_only_signs_that_the_font_has() -> None:
    """What Pillow's own font lacks is a box, as U+2212 is; the labels of negative numbers begin with a hyphen."""
    font = module.font(13)

    def drawn(sign: str) -> bytes:
        return bytes(font.getmask(sign))

    labels = [module._figure(value) for value in (-2e15, -300.0, -0.25, -1e-10, 0.0, 7e-9, 1e5)]
    assert labels == ["-2e15", "-300", "-0.25", "-1e-10", "0", "7e-9", "1e5"]
    box = drawn("\uffff")
    assert all(drawn(sign) != box for sign in "".join(labels)) and drawn("\N{MINUS SIGN}") == box


@pytest.mark.parametrize(
    ("first", "last", "marks"),
    [(0, 0, [0]), (7, 7, [7]), (0, 3, [0, 1, 2, 3]), (3, 97, [20, 40, 60, 80]), (99, 999, [200, 400, 600, 800])],
)
def test_steps_are_marked_at_round_numbers(first: int, last: int, marks: list[int]) -> None:
    """At most six of them, from the first to the last."""
    assert module._round_steps(first, last) == marks


def test_marks_of_long_runs() -> None:
    """However long the run, there are two to six marks within it."""
    for last in [1, 2, 9, 10, 51, 499, 5_001, 2_600_000, 10**12]:
        marks = module._round_steps(0, last)
        assert 2 <= len(marks) <= 6 and marks[0] == 0 and marks[-1] <= last
