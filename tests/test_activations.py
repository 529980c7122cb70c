"""Which units of a ReLU layer fire, against loops over every entry."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynwatch.activations import SilentUnits, units_that_fired


def naive(output: Tensor) -> list[bool]:
    """For each unit, whether any of its entries is above zero, entry by entry."""
    axis = 1 if output.dim() >= 4 else output.dim() - 1
    fired = [False] * output.shape[axis]
    for index in product(*map(range, output.shape)):
        if output[index].item() > 0:
            fired[index[axis]] = True
    return fired


SHAPES = [(7,), (1,), (1, 1), (4, 6), (3, 5, 6), (2, 5, 3, 4), (2, 4, 3, 2, 2), (1, 3, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_units_fire_where_a_loop_finds_an_entry_above_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Features are in the last dimension, channels of an image in dimension 1."""
    for sparsity in (0.5, 1.5, 3.0):
        output = (torch.randn(shape) - sparsity).clamp(min=0).to(dtype)
        assert units_that_fired(output).tolist() == naive(output)


def test_a_layout_in_memory_does_not_matter() -> None:
    """Transposed and channels-last outputs have the units that their shape says."""
    image = (torch.randn(2, 6, 3, 3) - 1.5).relu()
    assert units_that_fired(image.contiguous(memory_format=torch.channels_last)).tolist() == naive(image)
    assert units_that_fired(image[0, :, 0].t()).tolist() == naive(image[0, :, 0].t())


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3), (0, 3, 2, 2), (2, 0, 3)], ids=str)
def test_no_unit_fires_on_an_empty_batch(shape: tuple[int, ...]) -> None:
    """There is still one answer for each unit."""
    assert units_that_fired(torch.zeros(shape)).tolist() == [False] * 3


def test_a_layer_without_units_has_none_that_fire() -> None:
    """An output of width zero gives an empty answer."""
    assert units_that_fired(torch.zeros(4, 0)).tolist() == []


def test_a_single_number_is_one_unit() -> None:
    """Also an output without dimensions has an answer."""
    assert units_that_fired(torch.tensor(2.0)).tolist() == [True]
    assert units_that_fired(torch.tensor(0.0)).tolist() == [False]


def test_nan_does_not_fire_and_infinity_does() -> None:
    """Neither NaN nor a negative number is above zero, and a good entry beside them counts."""
    nan, inf = float("nan"), float("inf")
    output = torch.tensor([[nan, inf, -inf, nan, -0.0], [nan, 0.0, -1.0, 1.0, 0.0]])
    assert units_that_fired(output).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("units", [255, 256, 257, 511, 513, 1000, 100_000])
def test_of_a_wide_layer_evenly_spaced_units_are_looked_at(units: int) -> None:
    """At most 256 units are looked at, the first among them, and those that are sampled are told rightly."""
    which = torch.zeros(2, units)
    which[1, torch.arange(0, units, 3)] = 1.0
    fired = units_that_fired(which)
    assert min(units, 128) <= len(fired) <= 256
    stride = -(-units // 256)
    assert fired.tolist() == [unit % 3 == 0 for unit in range(0, units, stride)]


def test_the_number_of_units_is_an_argument() -> None:
    """`most` bounds the answer also for images."""
    image = torch.zeros(1, 10, 2, 2)
    image[0, 3, 1, 1] = 1.0
    assert units_that_fired(image, most=4).tolist() == [False, True, False, False]  # units 0, 3, 6 and 9


def test_looking_takes_no_part_in_autograd() -> None:
    """The answer asks for no gradient and leaves the output as it was."""
    output = torch.randn(4, 3, requires_grad=True).relu()
    before = output.clone()
    assert not units_that_fired(output).requires_grad
    assert torch.equal(output, before) and output.requires_grad


# --- SilentUnits

LOOKS = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=20)


@given(stream=LOOKS, looks=st.integers(1, 5))
@settings(deadline=None)
def test_a_unit_is_dead_after_looks_without_firing(stream: list[list[bool]], looks: int) -> None:
    """The share is that of units whose last `looks` looks exist and are all silent."""
    silent = SilentUnits(looks)
    for i, fired in enumerate(stream):
        dead = [i + 1 >= looks and not any(look[unit] for look in stream[i + 1 - looks : i + 1]) for unit in range(4)]
        assert silent.update(fired) == sum(dead) / 4


@given(stream=LOOKS, looks=st.integers(1, 5), cut=st.integers(0, 20))
@settings(deadline=None)
def test_restored_counts_go_on(stream: list[list[bool]], looks: int, cut: int) -> None:
    """State taken at any look and sent through JSON gives the same shares and the same later state."""
    unbroken, broken = SilentUnits(looks), SilentUnits(looks)
    for i, fired in enumerate(stream):
        if i == cut:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = SilentUnits(looks)
            broken.load_state_dict(state)
        assert broken.update(fired) == unbroken.update(fired)
    assert broken.state_dict() == unbroken.state_dict()


def test_another_width_starts_afresh() -> None:
    """A layer whose number of units changes is counted anew instead of raising; one without units has none dead."""
    silent = SilentUnits(looks=2)
    silent.update([False, False])
    assert silent.update([False, False, False]) == 0.0
    assert silent.update([False, True, False]) == pytest.approx(2 / 3)
    assert silent.update([]) == 0.0


def test_the_state_is_a_copy() -> None:
    """Later looks do not change a state that was taken."""
    silent = SilentUnits(looks=3)
    silent.update([False, True])
    state = silent.state_dict()
    silent.update([False, False])
    assert state == {"silent": [1, 0]}
