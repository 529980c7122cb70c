"""The TensorBoard layout that the callbacks declare, and the link that pins the main cards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import runs
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from dynwatch.callbacks import DynWatch, GradientNormMonitor, HessianMonitor, SKAMonitor, StepRadiusMonitor
from dynwatch.callbacks.panels import MOST_PINS, Chart, layout, pinned_link
from dynwatch.callbacks.stream import Stream


def matches(patterns: list[str], tag: str) -> bool:
    """What TensorBoard does with the patterns of a chart."""
    return re.compile("|".join(f"({pattern})" for pattern in patterns)).match(tag) is not None


def layouts_in(folder: Path) -> list[Layout]:
    """All custom-scalars layouts in the event files of a folder, in the order of writing."""
    found = []
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "custom_scalars":
                    found.append(Layout.FromString(value.tensor.string_val[0]))
    return found


def watch(**settings: Any) -> DynWatch:
    """DynWatch with all of its monitors at every step, and quiet."""
    defaults = {"every_n_steps": 1, "update_ratio_every_n_steps": 1}
    hessian = HessianMonitor(every_n_steps=3, full_every_n_readings=2)
    radius, ska = StepRadiusMonitor(every_n_steps=2), SKAMonitor(every_n_steps=2)
    norms = GradientNormMonitor(**(defaults | settings))
    return DynWatch(norms, hessian=hessian, step_radius=radius, ska=ska, report=False)


@pytest.mark.parametrize(
    ("declared", "tag", "matched"),
    [
        ("grad_norm/total", "grad_norm/total", True),
        ("grad_norm/total", "grad_norm/total_x", False),
        ("grad_norm/total", "grad_norm/total/x", False),
        ("grad_norm/total", "user/grad_norm/total", False),
        ("grad_norm/layer/net.0", "grad_norm/layer/net.0", True),
        ("grad_norm/layer/net.0", "grad_norm/layer/netx0", False),
        ("a+b(c)[d]|e", "a+b(c)[d]|e", True),
        ("a+b(c)[d]|e", "e", False),
        ("update_ratio/", "update_ratio/net.0", True),
        ("update_ratio/", "update_ratio/block.attn/x", True),
        ("update_ratio/", "update_ratios", False),
        ("update_ratio/", "update_ratio", False),
        ("grad_norm/layer/", "grad_norm/total", False),
    ],
)
def test_a_pattern_matches_its_tags_and_no_other(declared: str, tag: str, matched: bool) -> None:
    """A tag stands for itself, with nothing special in it; one that ends in a slash for all below it."""
    kind, patterns = layout([Chart("c", "t", (declared,))])["c"]["t"]
    assert kind == "Multiline"
    assert isinstance(patterns, list)
    assert matches(patterns, tag) is matched


def test_layout_keeps_the_order_of_charts_and_gathers_a_category() -> None:
    """Categories stand where they come first; a later chart of one joins it at its end."""
    charts = [Chart("b", "2", ("x", "y/")), Chart("a", "1", ("z",)), Chart("b", "1", ("z",))]
    drawn = layout(charts)
    assert [(category, list(inside)) for category, inside in drawn.items()] == [("b", ["2", "1"]), ("a", ["1"])]
    assert drawn["b"]["2"] == ["Multiline", ["x$", "y/"]]


@pytest.mark.parametrize("count", [0, 1, MOST_PINS, MOST_PINS + 5])
def test_link_pins_the_first_tag_of_the_first_ten_pinned_charts(count: int) -> None:
    """The link reads back as TensorBoard reads it, whatever is in a tag, and asks for no more pins than it takes."""
    tags = [f'group/{i} &#?"%+ä' for i in range(count)]
    charts = [Chart("c", tag, (tag, "other"), pinned=True) for tag in tags] + [Chart("c", "not", ("not",))]
    link = urlsplit(pinned_link(charts, port=7007))
    query = parse_qs(link.query, strict_parsing=True)
    assert (link.scheme, link.netloc, link.path, link.fragment) == ("http", "localhost:7007", "/", "timeseries")
    assert query["smoothing"] == ["0"]
    assert json.loads(query["pinnedCards"][0]) == [{"plugin": "scalars", "tag": tag} for tag in tags[:10]]


def test_a_run_has_one_layout_and_each_of_its_charts_has_data(tmp_path: Path) -> None:
    """Two members write one layout together; every pattern in it finds a tag, and every tag of ours has a chart."""
    fit = runs.trainer(tmp_path, [watch()], max_epochs=6, accumulate_grad_batches=2, gradient_clip_val=0.1)
    fit.fit(runs.Classifier(), runs.data())
    (written,) = layouts_in(tmp_path)
    categories = ["gradients", "curvature", "step radius", "SKA", "run"]
    assert [category.title for category in written.category] == [f"dynwatch · {name}" for name in categories]
    charts = [chart for category in written.category for chart in category.chart]
    bands = [re.escape(tag) + "$" for c in charts for s in c.margin.series for tag in (s.value, s.lower, s.upper)]
    patterns = [tag for chart in charts for tag in chart.multiline.tag] + bands
    logged = runs.scalars(tmp_path / "run").keys()
    assert [p for p in patterns if not any(matches([p], tag) for tag in logged)] == []
    assert {tag for tag in logged if not matches(patterns, tag)} == {"epoch", "train_loss"}


def test_a_stopped_run_adds_no_second_layout(tmp_path: Path) -> None:
    """What is written at a verdict leaves the panels alone."""
    watched = watch()
    runs.trainer(tmp_path, [watched]).fit(runs.Classifier(bad_at=2), runs.data())
    assert watched.verdict is not None
    assert len(layouts_in(tmp_path)) == 1


def test_each_run_of_one_callback_has_its_own_layout(tmp_path: Path) -> None:
    """A callback that is used for two fits writes one layout in each folder."""
    watched = watch()
    for name in ("first", "second"):
        runs.trainer(tmp_path / name, [watched], max_epochs=1).fit(runs.Classifier(), runs.data())
        assert len(layouts_in(tmp_path / name)) == 1


@pytest.mark.parametrize(
    ("settings", "clip", "missing"),
    [
        ({}, None, {"Share of steps clipped"}),
        ({}, 1.0, set()),
        ({"layers": []}, 1.0, {"Gradient norm by layer", "Update-to-weight ratio by layer"}),
        ({"update_ratio_every_n_steps": 0}, 1.0, {"Update-to-weight ratio by layer"}),
    ],
)
def test_what_a_run_cannot_measure_gets_no_empty_chart(
    tmp_path: Path, settings: dict[str, Any], clip: float | None, missing: set[str]
) -> None:
    """Charts of readings that are turned off, or out of reach as the noise scale of one batch is, are left out."""
    missing = missing | {"Gradient noise scale (samples)"}
    fit = runs.trainer(tmp_path, [watch(**settings)], max_epochs=1, gradient_clip_val=clip)
    fit.fit(runs.Classifier(), runs.data())
    (written,) = layouts_in(tmp_path)
    shown = {chart.title for category in written.category for chart in category.chart}
    everything = {chart.title for chart in GradientNormMonitor().charts()}
    assert everything - shown == missing


@pytest.mark.parametrize("kind", ["csv", "none"])
def test_without_tensorboard_there_is_no_layout(tmp_path: Path, kind: str) -> None:
    """With another logger or none, no event file appears, and the readings still reach callback_metrics."""
    logger = CSVLogger(tmp_path) if kind == "csv" else False
    fit = runs.trainer(tmp_path, [watch()], logger=logger)
    fit.fit(runs.Classifier(), runs.data())
    assert list(tmp_path.rglob("events.out.tfevents.*")) == []
    assert float(fit.callback_metrics["grad_norm/total"]) > 0


def test_a_refused_layout_costs_only_the_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If TensorBoard's writer refuses the layout, the log says so and the scalars are written."""

    def refuse(*args: object) -> None:
        raise OSError("disk full")

    fit = runs.trainer(tmp_path, [watch()], max_epochs=1)
    monkeypatch.setattr(fit.logger.experiment, "add_custom_scalars", refuse)
    fit.fit(runs.Classifier(), runs.data())
    assert "could not write its TensorBoard panels: disk full" in caplog.text
    assert layouts_in(tmp_path) == []
    assert len(runs.scalars(tmp_path / "run")["grad_norm/total"]) == 8


def test_charts_of_a_stream_without_members_are_its_own_cost() -> None:
    """The stream itself declares the chart of dynwatch's overhead."""
    assert [chart.tags for chart in Stream().charts()] == [("dynwatch/overhead",)]


def test_a_margin_chart_names_its_tags_as_they_are(tmp_path: Path) -> None:
    """Value, lower and upper end reach the event file unescaped, beside an ordinary chart of the same category."""
    tags = ("a+b[c]|d$", "hessian/lambda_max (low)", "λ high")
    charts = [Chart("c", "λ", tags, margin=True), Chart("c", "all", ("hessian/",))]
    assert layout(charts) == {"c": {"λ": ["Margin", list(tags)], "all": ["Multiline", ["hessian/"]]}}
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_custom_scalars(layout(charts))
    (written,) = layouts_in(tmp_path)
    margin, lines = written.category[0].chart
    assert [(s.value, s.lower, s.upper) for s in margin.margin.series] == [tags]
    assert (margin.HasField("multiline"), lines.HasField("margin")) == (False, False)


@pytest.mark.parametrize(
    "tags",
    [
        (),
        ("a",),
        ("a", "b"),
        ("a", "b", "c", "d"),
        ("a", "b/", "c"),
        ("a", "", "c"),
        "abc",
        ["a", "b", "c"],
        ("a", 1, "c"),
    ],
    ids=repr,
)
def test_a_margin_chart_of_other_tags_is_an_error(tags: Any) -> None:
    """The message has the tags, the chart's title, and what they must be; without a margin they pass."""
    with pytest.raises(ValueError, match=re.escape(f"tags={tags!r} of the margin chart 't' must be three exact tags")):
        Chart("c", "t", tags, margin=True)
    Chart("c", "t", tags)


def test_a_margin_chart_of_a_value_with_a_parenthesis_is_an_error() -> None:
    """TensorBoard would show an empty chart of it; the tags of the band's ends may have one."""
    with pytest.raises(ValueError, match="must begin with a value without parentheses, of which TensorBoard draws"):
        Chart("c", "t", ("a (b)", "c", "d"), margin=True)
    Chart("c", "t", ("a", "c (d)", "e (f)"), margin=True)


def test_a_star_stands_for_one_part_of_a_tag() -> None:
    """In the layout, in the link (its first) and in the summary."""
    chart = Chart("experts", "load", ("moe/layer_*/load",), pinned=True)
    (pattern,) = layout([chart])["experts"]["load"][1]  # type: ignore[misc]
    assert re.match(pattern, "moe/layer_12/load")
    assert not re.match(pattern, "moe/layer_1/load_cv") and not re.match(pattern, "moe/layer_1/x/load")
    assert quote("moe/layer_0/load", safe="") in pinned_link([chart])
    with pytest.raises(ValueError, match="must be three exact tags"):
        Chart("experts", "load", ("a*", "b", "c"), margin=True)
