"""Colours and letters of the pictures that monitors draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ImageFont

INK, FAINT, PAPER = (40, 40, 40), (170, 170, 170), (255, 255, 255)
# From light to dark blue, about evenly in lightness; what is white is empty.
BLUES = np.array([(204, 221, 240), (146, 186, 222), (82, 143, 196), (29, 95, 158), (8, 42, 94)], dtype=float)


def font(size: int) -> Any:
    """Pillow's own font in a size."""
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()
