"""The spectrum's density over time as a picture with axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dynwatch.callbacks.drawing import BLUES, FAINT, INK, PAPER, font
from dynwatch.spectral_density import SpectralDensity

_WIDTH, _HEIGHT = 840, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 104, 44, 56
_BAR = 16  # width of the colour bar
# The palest shade. A single eigenvalue's weight is off by about its own size, and is to be seen all the same.
_FEWEST = 0.1
# Pixels by which an eigenvalue is broadened, above and below.
_BREADTH = 2.0
# The least distance between the labels of an axis, in pixels.
_APART = 22

Colours = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]


def density_picture(densities: Sequence[tuple[int, SpectralDensity]]) -> Colours:
    """Draw densities side by side: steps to the right, eigenvalues upwards, darker where there are more.

    Eigenvalues are on a scale that is linear near zero and logarithmic beyond (a hundredth of the largest), counts on
    a logarithmic one, so that single outliers show beside the bulk. A density reaches halfway to its neighbours.

    Args:
        densities: By step, ascending, at least one, each with nodes.

    Returns:
        [height, width, 3] colours.
    """
    largest = max(float(np.abs(density.nodes).max()) for _, density in densities) or 1.0
    knee = largest / 100
    low = float(_bent(min(float(density.nodes.min()) for _, density in densities), knee))
    high = float(_bent(max(float(density.nodes.max()) for _, density in densities), knee))
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
    rows, columns = _HEIGHT - _TOP - _BOTTOM, _WIDTH - _LEFT - _RIGHT
    steps = [step for step, _ in densities]
    edges = _edges(steps)
    across = [round(columns * (edge - edges[0]) / (edges[-1] - edges[0])) for edge in edges]
    counts = np.zeros((rows, columns))
    for i, (_, density) in enumerate(densities):
        height = (high - _bent(density.nodes, knee)) / (high - low) * rows
        counts[:, across[i] : across[i + 1]] = _column(height, density.weights * density.dimension, rows)[:, None]
    most = max(float(counts.max()), 10.0)

    image = np.full((_HEIGHT, _WIDTH, 3), PAPER, dtype=np.uint8)
    image[_TOP : _TOP + rows, _LEFT : _LEFT + columns] = _coloured(counts, most)
    bar = _LEFT + columns + 24
    scale = np.geomspace(most, _FEWEST, rows)
    image[_TOP : _TOP + rows, bar : bar + _BAR] = _coloured(scale, most)[:, None]

    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    small, large = font(13), font(15)
    bottom = _TOP + rows - 1

    draw.text((_LEFT, _TOP - 12), "Eigenvalues of the Hessian", fill=INK, font=large, anchor="ls")
    zero = bottom - (0 - low) / (high - low) * (rows - 1)
    for x in range(_LEFT, _LEFT + columns, 8):
        if _TOP < zero < bottom:
            draw.line((x, zero, x + 3, zero), fill=FAINT)
    draw.rectangle((_LEFT - 1, _TOP - 1, _LEFT + columns, _TOP + rows), outline=INK)
    taken: list[float] = []
    for value in _decades(knee, largest):
        y = bottom - (float(_bent(value, knee)) - low) / (high - low) * (rows - 1)
        if _TOP <= y <= bottom and all(abs(y - other) >= _APART for other in taken):
            taken.append(y)
            draw.line((_LEFT - 6, y, _LEFT - 1, y), fill=INK)
            draw.text((_LEFT - 10, y), _figure(value), fill=INK, font=small, anchor="rm")

    for step in _round_steps(steps[0], steps[-1]):
        at = _LEFT + columns * (step - edges[0]) / (edges[-1] - edges[0])
        draw.line((at, _TOP + rows, at, _TOP + rows + 5), fill=INK)
        draw.text((at, _TOP + rows + 9), f"{step}", fill=INK, font=small, anchor="ma")
    draw.text((_LEFT + columns / 2, _HEIGHT - 8), "step", fill=INK, font=small, anchor="md")

    draw.rectangle((bar - 1, _TOP - 1, bar + _BAR, _TOP + rows), outline=INK)
    draw.text((_WIDTH - 8, _TOP - 12), "count", fill=INK, font=small, anchor="rs")
    for exponent in range(math.floor(math.log10(most)) + 1):
        y = bottom - math.log(10**exponent / _FEWEST) / math.log(most / _FEWEST) * (rows - 1)
        draw.line((bar + _BAR, y, bar + _BAR + 5, y), fill=INK)
        draw.text((bar + _BAR + 9, y), _figure(10.0**exponent), fill=INK, font=small, anchor="lm")
    return np.asarray(picture)


def _column(height: Array, count: Array, rows: int) -> Array:
    """The counts along one column of pixels, [rows]: of each node in its middle, and fewer around it."""
    apart = (np.arange(rows)[:, None] + 0.5 - height) / _BREADTH
    profile = np.exp(-(apart**2) / 2)
    column = (profile * count).sum(1)
    column[(profile * (count > 0)).max(1, initial=0.0) < 0.1] = 0.0  # white, however many there are nearby
    return np.asarray(column)


def _coloured(counts: Array, most: float) -> Colours:
    shade = np.log(np.maximum(counts, _FEWEST) / _FEWEST) / math.log(most / _FEWEST)
    stops = np.linspace(0, 1, len(BLUES))
    colours = np.stack([np.interp(shade, stops, BLUES[:, c]) for c in range(3)], axis=-1)
    colours[counts < _FEWEST / 2] = PAPER
    found: Colours = colours.round().astype(np.uint8)
    return found


def _edges(steps: Sequence[int]) -> list[float]:
    """Where the densities of these steps begin and end: halfway between them."""
    between = [(a + b) / 2 for a, b in pairwise(steps)]
    first = between[0] - steps[0] if between else 0.5
    last = steps[-1] - between[-1] if between else 0.5
    return [steps[0] - first, *between, steps[-1] + last]


def _bent(values: npt.ArrayLike, knee: float) -> Array:
    return np.arcsinh(np.asarray(values) / knee)


def _decades(knee: float, largest: float) -> list[float]:
    """Where the axis is labelled: zero, and powers of ten on both sides, the largest first."""
    exponents = range(math.floor(math.log10(largest)), math.ceil(math.log10(knee)) - 1, -1)
    return [0.0, *(sign * 10.0**exponent for exponent in exponents for sign in (1, -1))]


def _round_steps(first: int, last: int) -> list[int]:
    """At most six round numbers from the first to the last; the first alone if there is no such."""
    size = 1
    while (last - first) / size > 5:
        size = size * 5 // 2 if str(size).startswith("2") else size * 2
    found = list(range(-(-first // size) * size, last + 1, size))
    return found or [first]


def _figure(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"  # with a hyphen: Pillow's own font has no minus sign
