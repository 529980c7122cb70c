"""The bounded memory of one tag, and its curve in block characters."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynwatch.callbacks.series import Series, sparkline

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("points", "width", "drawn"),
    [
        ([], 24, ""),
        ([3.0], 24, "▁"),
        ([2.0, 2.0, 2.0], 24, "▁▁▁"),
        ([1.0, 2.0, 3.0, 4.0], 24, "▁▃▆█"),
        ([4.0, 3.0, 2.0, 1.0], 24, "█▆▃▁"),
        ([0.0, 0.0, 8.0, 8.0], 2, "▁█"),
        ([-1e-30, 1e-30], 24, "▁█"),
        ([0.0, NAN, 1.0], 24, "▁!█"),
        ([0.0, INF, 1.0], 24, "▁!█"),
        ([0.0, -INF, 1.0], 24, "▁!█"),
        ([NAN], 24, "!"),
        ([8.9e307, 8.9e307], 1, "▁"),
        ([-1.7e308, 1.7e308], 24, "▁█"),
        ([NAN, INF, -INF], 24, "!!!"),
        ([0.0, 0.0, NAN, 1.0], 2, "▁!"),
        ([1.0, 2.0], 0, ""),
    ],
)
def test_sparkline_draws_low_as_low_and_marks_what_is_not_finite(points: list[float], width: int, drawn: str) -> None:
    """Empty, single, constant, rising, falling, tiny and non-finite points each have their picture."""
    assert sparkline(points, width) == drawn


@given(st.lists(st.floats(), max_size=200), st.integers(0, 40))
def test_sparkline_of_anything_is_as_wide_as_it_may_be(points: list[float], width: int) -> None:
    """Whatever the numbers, there is one known character for each cell."""
    drawn = sparkline(points, width)
    assert len(drawn) == min(width, len(points))
    assert set(drawn) <= set("▁▂▃▄▅▆▇█!")


def test_sparkline_of_a_long_series_shows_every_bad_reading() -> None:
    """One NaN among ten thousand readings is seen in its place."""
    points = [float(i) for i in range(10_000)]
    points[5_001] = NAN
    drawn = sparkline(points, 20)
    assert drawn.index("!") == 10
    assert drawn.count("!") == 1
    assert (drawn[0], drawn[-1]) == ("▁", "█")


def test_a_new_series_has_nothing_to_show() -> None:
    """Before the first reading the last value is NaN, the bounds are empty and the curve too."""
    series = Series()
    assert math.isnan(series.last)
    assert series.smallest > series.largest
    assert series.sparkline() == ""


@given(st.lists(st.floats(), min_size=1, max_size=50))
def test_last_smallest_and_largest_are_those_of_the_readings(values: list[float]) -> None:
    """The bounds are of the finite readings; the last is the last, finite or not."""
    series = Series()
    for value in values:
        series.add(value)
    finite = [value for value in values if math.isfinite(value)]
    assert series.count == len(values)
    assert series.last == values[-1] or math.isnan(series.last) == math.isnan(values[-1]) is True
    assert series.smallest == min(finite, default=INF)
    assert series.largest == max(finite, default=-INF)


@pytest.mark.parametrize("count", [1, 511, 512, 513, 514, 1024, 1025, 1026, 5_000, 65_537])
def test_thinning_keeps_the_span_of_the_run_in_at_most_512_evenly_spaced_points(count: int) -> None:
    """The curve begins with the first reading, ends within one stride of the last, and has equal steps between."""
    series = Series()
    for i in range(count):
        series.add(float(i))
    points = series.points
    strides = {b - a for a, b in itertools.pairwise(points)} or {1.0}
    assert len(points) <= 512
    assert len(points) >= min(count, 256)
    assert points[0] == 0
    assert len(strides) == 1
    assert count - 1 - points[-1] < strides.pop()
    assert (series.last, series.smallest, series.largest) == (count - 1, 0, count - 1)


def test_extremes_survive_thinning() -> None:
    """A spike that the thinned curve has dropped still stands in the largest value."""
    series = Series()
    for i in range(2_000):
        series.add(1e6 if i == 1_001 else 1.0)
    assert 1e6 not in series.points
    assert series.largest == 1e6
