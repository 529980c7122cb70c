"""How experts are used, as pictures: the load of all layers, and which experts are chosen together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor

from dynwatch.callbacks.drawing import BLUES, FAINT, INK, PAPER, font
from dynwatch.routing import coactivation

Colours = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]

_MARGIN, _TOP, _GAP = 84, 44, 28
_WIDEST = 900  # pixels of all cells in a row
# Layers of the picture of pairs, evenly spaced over the model.
_MOST_SQUARES = 6
_SQUARE = 220
_RED = np.array((178, 24, 43), dtype=float)


def load_picture(loads: Mapping[int, Tensor], step: int) -> Colours:
    """Draw each expert's load, a row a layer: white is none, the middle blue an equal share, red four times that.

    Args:
        loads: By layer [E], at least one.
        step: For the title.

    Returns:
        [height, width, 3] colours.
    """
    most = max(map(len, loads.values()))
    cell = max(2, min(36, _WIDEST // max(most, 1)))
    height = max(10, min(28, cell))
    size = (_MARGIN + most * cell + 150, _TOP + len(loads) * height + 40)
    picture = Image.new("RGB", (max(size[0], 430), size[1]), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, 12), f"load of experts over an equal share, step {step}", fill=INK, font=font(14))
    for row, (layer, load) in enumerate(sorted(loads.items())):
        y = _TOP + row * height
        draw.text((_MARGIN - 8, y + height / 2), f"layer {layer}", fill=INK, font=font(12), anchor="rm")
        total = float(load.sum())
        shares = load.double().numpy() * len(load) / total if total > 0 else np.full(len(load), np.nan)
        cells = Image.fromarray(_of_shares(shares)[None]).resize((len(load) * cell, height), Image.Resampling.NEAREST)
        picture.paste(cells, (_MARGIN, y))
        for e in range(len(load) + 1):
            draw.line((_MARGIN + e * cell, y, _MARGIN + e * cell, y + height), fill=FAINT)
        for edge in (y, y + height):
            draw.line((_MARGIN, edge, _MARGIN + len(load) * cell, edge), fill=FAINT)
    bottom = _TOP + len(loads) * height + 8
    draw.text((_MARGIN, bottom), "expert 0", fill=INK, font=font(12))
    draw.text((_MARGIN + most * cell, bottom), f"{most - 1}", fill=INK, font=font(12), anchor="ra")
    x = _MARGIN + most * cell + 24
    for i, share in enumerate((0.0, 0.5, 1.0, 2.0, 4.0)):
        y = _TOP + i * 16
        red, green, blue = _of_shares(np.array([share]))[0].tolist()
        draw.rectangle((x, y, x + 14, y + 12), fill=(red, green, blue), outline=FAINT)
        draw.text((x + 22, y + 6), f"{share:g}" + " or more" * (share == 4), fill=INK, font=font(12), anchor="lm")
    return np.asarray(picture)


def coactivation_picture(pairs: Mapping[int, Tensor], step: int) -> Colours:
    """Draw how often tokens of an expert (row) chose another one (column) too, a square a layer; dark is always.

    Args:
        pairs: By layer [E, E] counts, at least one; of many, six are drawn.
        step: For the title.

    Returns:
        [height, width, 3] colours.
    """
    count = min(len(pairs), _MOST_SQUARES)
    layers = sorted(pairs.items())
    drawn = [layers[round(i * (len(layers) - 1) / max(count - 1, 1))] for i in range(count)]
    columns = min(3, count)
    rows = -(-count // columns)
    width = max(_GAP + columns * (_SQUARE + _GAP), 430)
    picture = Image.new("RGB", (width, _TOP + rows * (_SQUARE + 2 * _GAP)), PAPER)
    draw = ImageDraw.Draw(picture)
    title = f"share of an expert's tokens (row) that chose another too (column), step {step}"
    draw.text((_GAP, 12), title, fill=INK, font=font(14 if width > 560 else 11))
    for i, (layer, together) in enumerate(drawn):
        x, y = _GAP + i % columns * (_SQUARE + _GAP), _TOP + i // columns * (_SQUARE + 2 * _GAP)
        draw.text((x, y), f"layer {layer}", fill=INK, font=font(12))
        shares = coactivation(together).numpy().copy()
        np.fill_diagonal(shares, np.nan)  # always 1
        square = Image.fromarray(_of_parts(shares).round().astype(np.uint8)).resize(
            (_SQUARE, _SQUARE), Image.Resampling.NEAREST
        )
        picture.paste(square, (x, y + 20))
        draw.rectangle((x - 1, y + 19, x + _SQUARE, y + 20 + _SQUARE), outline=FAINT)
    return np.asarray(picture)


def _of_shares(shares: Array) -> Colours:
    """Blue up to twice an equal share, then towards red; [...] to [..., 3]."""
    red = np.clip(np.log2(np.maximum(np.nan_to_num(shares), 1e-9) / 2), 0, 1)[..., None]
    colours: Colours = ((1 - red) * _of_parts(np.minimum(shares / 2, 1)) + red * _RED).round().astype(np.uint8)
    return colours


def _of_parts(parts: Array) -> Array:
    """Blues for numbers from 0 (white, as what is not known) to 1; [...] to [..., 3]."""
    at = np.linspace(0, 1, len(BLUES))
    colours = np.stack([np.interp(np.nan_to_num(parts), at, BLUES[:, c]) for c in range(3)], axis=-1)
    colours[~(parts > 0)] = PAPER
    return np.asarray(colours)
