"""Samples that have settled below where they began."""

from __future__ import annotations

import math

import pytest
import torch

from dynwatch.memorization import MemorizedSamples


def looks(memorized: MemorizedSamples, *losses: list[float]) -> list[list[bool]]:
    return [memorized.update(torch.tensor(each)).tolist() for each in losses]


def test_a_sample_must_have_fallen_and_settled() -> None:
    """One settles low, one falls still, one never moves, one climbs."""
    found = looks(
        MemorizedSamples(window=3, tolerance=0.05),
        [2.0, 2.0, 2.0, 2.0],
        [0.50, 1.5, 2.0, 3.0],
        [0.45, 1.2, 2.0, 3.0],
        [0.44, 0.9, 2.0, 3.0],
    )
    assert found == [[False] * 4, [False] * 4, [False] * 4, [True, False, False, False]]


def test_it_is_forgotten_when_it_rises() -> None:
    found = looks(MemorizedSamples(window=2), [2.0], [0.5], [0.5], [0.9], [0.9])
    assert found == [[False], [False], [True], [False], [True]]


def test_what_is_not_finite_says_nothing() -> None:
    """NaN at first, in between, and infinity; the first finite loss is the one to compare with."""
    memorized = MemorizedSamples(window=2)
    found = looks(memorized, [math.nan, 2.0], [2.0, 0.5], [0.5, math.inf], [0.5, 0.5], [0.5, 0.5])
    assert found == [[False, False], [False, False], [False, False], [True, False], [True, True]]


def test_other_samples_start_afresh() -> None:
    memorized = MemorizedSamples(window=2)
    looks(memorized, [2.0], [0.5])
    assert looks(memorized, [0.5, 0.5], [0.5, 0.5]) == [[False, False], [False, False]]


def test_state_goes_on() -> None:
    """Through primitives and tensors, in the middle of a window."""
    one, other = MemorizedSamples(), MemorizedSamples()
    looks(one, [2.0, 1.0], [0.5, 0.9])
    other.load_state_dict(one.state_dict())
    rest = [[0.5, 0.8], [0.5, 0.1], [0.5, 0.1]]
    assert looks(one, *rest) == looks(other, *rest)
    fresh = MemorizedSamples()
    fresh.load_state_dict(MemorizedSamples().state_dict())
    assert looks(fresh, [1.0]) == [[False]]


def test_arguments() -> None:
    with pytest.raises(ValueError, match="window=1 must be a whole number, 2 or more"):
        MemorizedSamples(window=1)
    with pytest.raises(ValueError, match=r"tolerance=1\.0 must be"):
        MemorizedSamples(tolerance=1.0)
    with pytest.raises(ValueError, match=r"losses of shape \[1, 1\] must be \[S\]"):
        MemorizedSamples().update(torch.zeros(1, 1))
