"""Ready-made TensorBoard panels: what monitors declare, the layout, and a link that pins the main cards."""

from __future__ import annotations

import functools
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
        tags: The scalar tags that it draws. A tag that ends in "/" stands for all tags below it, and a "*" for any one
            part of a tag, up to the next "/".
        pinned: Whether the first tag belongs to the main cards of the Time Series tab; with a "*" its first one, 0.
        margin: Whether it is a curve in a shaded band: `tags` are then three, (value, lower, upper). TensorBoard
            draws it for runs that have all three, at the same steps.

    Raises:
        ValueError: If the tags of a margin chart are not three exact ones, or the first has a parenthesis.

    Example:
        >>> Chart("curvature", "largest eigenvalue", ("lambda", "lambda_low", "lambda_high"), margin=True).margin
        True
    """

    category: str
    title: str
    tags: tuple[str, ...]
    pinned: bool = False
    margin: bool = False

    def __post_init__(self) -> None:
        if not self.margin:
            return
        exact = isinstance(self.tags, tuple) and all(map(_is_exact, self.tags))
        if not exact or len(self.tags) != 3:
            raise ValueError(
                f"tags={self.tags!r} of the margin chart {self.title!r} must be three exact tags, "
                '(value, lower, upper), none of which ends in "/"; without margin=True a chart takes any number.'
            )
        if "(" in self.tags[0]:  # TensorBoard takes what follows the first parenthesis for the name of the run
            raise ValueError(
                f"tags={self.tags!r} of the margin chart {self.title!r} must begin with a value without parentheses, "
                "of which TensorBoard draws nothing; choose another tag."
            )


def _is_exact(tag: object) -> bool:
    return isinstance(tag, str) and tag != "" and not tag.endswith("/") and "*" not in tag


def is_group(tag: str) -> bool:
    """Whether a tag of a chart stands for several."""
    return tag.endswith("/") or "*" in tag


@functools.lru_cache(maxsize=256)
def tag_pattern(tag: str) -> re.Pattern[str]:
    """What a tag of a chart stands for, as a regular expression to `match`.

    Example:
        >>> bool(tag_pattern("moe/layer_*/load").match("moe/layer_3/load"))
        True
    """
    return re.compile(re.escape(tag).replace(r"\*", "[^/]*") + ("" if tag.endswith("/") else "$"))


Layout = dict[str, dict[str, list[object]]]


def layout(charts: Iterable[Chart]) -> Layout:
    """The argument of `SummaryWriter.add_custom_scalars` for these charts.

    Example:
        >>> layout([Chart("gradients", "total norm", ("grad_norm/total",))])
        {'gradients': {'total norm': ['Multiline', ['grad_norm/total$']]}}
        >>> layout([Chart("curvature", "λ", ("mid", "low", "high"), margin=True)])
        {'curvature': {'λ': ['Margin', ['mid', 'low', 'high']]}}
        >>> layout([Chart("ska", "flow", ("ska/*/flow",))])
        {'ska': {'flow': ['Multiline', ['ska/[^/]*/flow$']]}}
    """
    categories: Layout = {}
    for chart in charts:
        inside = categories.setdefault(chart.category, {})
        if chart.margin:  # by their names, which TensorBoard escapes itself
            inside[chart.title] = ["Margin", list(chart.tags)]
            continue
        # TensorBoard matches from the start of a tag, so an exact tag needs only its end.
        inside[chart.title] = ["Multiline", [tag_pattern(tag).pattern for tag in chart.tags]]
    return categories


def pinned_link(charts: Iterable[Chart], port: int = 6006) -> str:
    """A link that opens TensorBoard with the main cards pinned on top and unsmoothed.

    Example:
        >>> pinned_link([Chart("gradients", "total norm", ("a",), pinned=True)])
        'http://localhost:6006/?pinnedCards=%5B%7B%22plugin%22%3A%22scalars%22%2C%22tag%22%3A%22a%22%7D%5D&smoothing=0#timeseries'
    """
    tags = [chart.tags[0].replace("*", "0") for chart in charts if chart.pinned]
    pins = [{"plugin": "scalars", "tag": tag} for tag in tags[:MOST_PINS]]
    cards = quote(json.dumps(pins, separators=(",", ":")), safe="")
    return f"http://localhost:{port}/?pinnedCards={cards}&smoothing=0#timeseries"
