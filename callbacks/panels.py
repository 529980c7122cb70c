"""Ready-made TensorBoard panels: what monitors declare, the layout, and a link that pins the main cards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

# TensorBoard restores at most this many pinned cards from a link.
MOST_PINS = 10


@dataclass(frozen=True)
class Chart:
    """One chart of the Custom Scalars tab.

    Attributes:
        category: The heading under which it stands.
        title: The chart's own title.
        tags: The scalar tags that it draws. A tag that ends in "/" stands for all tags below it.
        pinned: Whether the first tag belongs to the main cards of the Time Series tab.
    """

    category: str
    title: str
    tags: tuple[str, ...]
    pinned: bool = False


Layout = dict[str, dict[str, list[object]]]


def layout(charts: Iterable[Chart]) -> Layout:
    """The argument of `SummaryWriter.add_custom_scalars` for these charts.

    Example:
        >>> layout([Chart("gradients", "total norm", ("grad_norm/total",))])
        {'gradients': {'total norm': ['Multiline', ['grad_norm/total$']]}}
    """
    categories: Layout = {}
    for chart in charts:
        # TensorBoard matches from the start of a tag, so an exact tag needs only its end.
        patterns = [re.escape(tag) + ("" if tag.endswith("/") else "$") for tag in chart.tags]
        categories.setdefault(chart.category, {})[chart.title] = ["Multiline", patterns]
    return categories


def pinned_link(charts: Iterable[Chart], port: int = 6006) -> str:
    """A link that opens TensorBoard with the main cards pinned on top and unsmoothed.

    Example:
        >>> pinned_link([Chart("gradients", "total norm", ("a",), pinned=True)])
        'http://localhost:6006/?pinnedCards=%5B%7B%22plugin%22%3A%22scalars%22%2C%22tag%22%3A%22a%22%7D%5D&smoothing=0#timeseries'
    """
    pins = [{"plugin": "scalars", "tag": chart.tags[0]} for chart in charts if chart.pinned][:MOST_PINS]
    cards = quote(json.dumps(pins, separators=(",", ":")), safe="")
    return f"http://localhost:{port}/?pinnedCards={cards}&smoothing=0#timeseries"
