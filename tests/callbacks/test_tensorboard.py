"""The panels, the pinned link and the verdict in a real TensorBoard, seen by a real browser."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import browser
import pytest
import runs
import torch
from moe_model import Model, texts
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from dynwatch.callbacks import (
    DynWatch,
    GradientNormMonitor,
    HessianMonitor,
    MoEPathwayMonitor,
    SKAMonitor,
    StepRadiusMonitor,
)
from dynwatch.callbacks.panels import Chart, layout

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

PATIENCE_MS = 60_000
CARD = "tf-custom-scalar-multi-line-chart-card"
MARGIN_CARD = "tf-custom-scalar-margin-chart-card"


@dataclass(frozen=True)
class Seen:
    """Two runs in a TensorBoard: a good one of 16 steps, and one whose loss becomes NaN at its step 5."""

    address: str
    folder: Path
    link: str  # as dynwatch printed it


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser; without one these tests are skipped, except in CI, where they fail."""
    path = browser.chromium()
    if path is None:
        message = "no Chromium on PATH (chromium, chromium-browser or google-chrome)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="module")
def seen(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("logs")
    terminal = io.StringIO()
    with contextlib.redirect_stdout(terminal):
        for name, bad_at in (("good", None), ("poor", 5)):
            torch.manual_seed(0)
            hessian = HessianMonitor(every_n_steps=2, full_every_n_readings=1)
            gradients = GradientNormMonitor(every_n_steps=1, update_ratio_every_n_steps=1)
            radius, ska = StepRadiusMonitor(every_n_steps=1), SKAMonitor(every_n_steps=1, include_last=True)
            watch = DynWatch(gradients, hessian=hessian, step_radius=radius, ska=ska)
            logger = TensorBoardLogger(folder, name=None, version=name, default_hp_metric=False)
            trainer = runs.trainer(folder, [watch], logger=logger, gradient_clip_val=1.0, max_epochs=5)
            trainer.fit(runs.Classifier(bad_at=bad_at), runs.data())
    link = re.findall(r"http://localhost:6006\S*", terminal.getvalue())[-1]
    with browser.tensorboard(folder, ["good", "poor"]) as address:
        yield Seen(address, folder, link)


@pytest.fixture
def page(chromium: str) -> Iterator[Page]:
    with browser.browser() as opened:
        page = opened.new_page(viewport={"width": 1500, "height": 1100})
        page.set_default_timeout(PATIENCE_MS)
        yield page


def show_all_categories(page: Page) -> None:
    """Open the categories of the Custom Scalars tab that are closed."""
    page.locator("tf-category-paginated-view").first.wait_for()
    for category in page.locator("tf-category-paginated-view").all():
        if not category.locator("iron-collapse.iron-collapse-opened").count():
            category.locator("button.heading").click()


def test_custom_scalars_tab_shows_our_categories_and_charts_by_name(seen: Seen, page: Page) -> None:
    """Every chart that the callbacks declare stands under its heading, and nothing else does."""
    page.goto(f"{seen.address}/#custom_scalars")
    show_all_categories(page)
    page.locator(CARD, has_text="Share of the run's time spent in dynwatch").wait_for()
    shown = {
        category.locator("button.heading").inner_text().split("\n")[0]: category.locator(
            f"{CARD} .heading-label.name"
        ).all_inner_texts()
        for category in page.locator("tf-category-paginated-view").all()
    }
    assert shown == {
        "dynwatch · gradients": [
            "Gradient norm, before and after clipping",
            "Gradient norm by layer",
            "Update-to-weight ratio by layer",
            "Share of steps clipped",
            "Share of non-finite gradient entries",
        ],
        "dynwatch · curvature": [
            "Sharpness ratio (1 is the edge of stability)",
            "Critical learning rate",
            "Critical learning rate by batch size",
            "Batch sharpness",
            "Smallest Hessian eigenvalue",
            "Trace of the Hessian",
            "Learning rate and momentum for the spectrum",
            "Errors",
            "Hessian-vector products of a reading",
        ],
        "dynwatch · step radius": [
            "Normalised step r (risk above 1, alarm above 4)",
            "Change of the loss in a step, predicted and actual",
            "Radius and length of the step",
        ],
        "dynwatch · SKA": [
            "Entropy since the first probe, mean of the layers",
            "Equilibrium: flow and entropy steps over their peaks",
            "Knowledge flow, mean of the layers",
            "Entropy since the first probe by layer",
            "Knowledge flow by layer",
            "Alignment by layer",
            "Tensor Net of the step by layer",
            "Entropy of the step, as published, by layer",
            "Size of the pre-activations by layer",
            "Time since the first probe, at the peak of flow and at equilibrium",
        ],
        "dynwatch · run": [
            "Loss, and the limit above which it diverges",
            "Share of the run's time spent in dynwatch",
        ],
    }


@pytest.mark.parametrize(
    "title",
    [
        "Gradient norm, before and after clipping",
        "Gradient norm by layer",
        "Normalised step r (risk above 1, alarm above 4)",
        "Change of the loss in a step, predicted and actual",
        "Knowledge flow by layer",
        "Update-to-weight ratio by layer",
        "Loss, and the limit above which it diverges",
        "Learning rate and momentum for the spectrum",
        "Critical learning rate by batch size",
    ],
)
def test_a_chart_draws_its_curves(seen: Seen, page: Page, title: str) -> None:
    """Both of the good run's curves are there, each with ten different points or more."""
    page.goto(f"{seen.address}/#custom_scalars&_smoothingWeight=0")
    show_all_categories(page)
    card = page.locator(CARD, has_text=title)
    card.scroll_into_view_if_needed()
    lengths: list[int] = []
    for _ in range(PATIENCE_MS // 200):  # the curves of a chart come in one after the other
        lines = card.locator("path.line").evaluate_all("lines => lines.map(line => line.getAttribute('d') || '')")
        lengths = [len(set(re.findall(r"[\d.-]+,[\d.-]+", line))) for line in lines]
        if sum(length >= 10 for length in lengths) >= 2:
            return
        page.wait_for_timeout(200)
    pytest.fail(f"{title!r} has lines of {lengths} points")


def test_the_largest_eigenvalue_is_drawn_in_its_error_bar(seen: Seen, page: Page) -> None:
    """The chart has a curve of the good run's twenty readings, in a band with two edges of as many points."""
    page.goto(f"{seen.address}/#custom_scalars&_smoothingWeight=0")
    show_all_categories(page)
    card = page.locator(MARGIN_CARD, has_text="Largest Hessian eigenvalue, with its error bar")
    card.scroll_into_view_if_needed()
    drawn: dict[str, list[int]] = {}
    for _ in range(PATIENCE_MS // 200):
        drawn = {
            kind: [
                len(set(re.findall(r"[\d.-]+,[\d.-]+", path.get_attribute("d") or "")))
                for path in card.locator(f"path.{kind}").all()
            ]
            for kind in ("line", "area")
        }
        if max(drawn["area"], default=0) >= 30 and max(drawn["line"], default=0) >= 15:
            return
        page.wait_for_timeout(200)
    pytest.fail(f"the chart has lines and areas of {drawn} points")


def test_printed_link_opens_tensorboard_with_our_cards_pinned(seen: Seen, page: Page) -> None:
    """The link from the terminal, with the port of this TensorBoard, shows our main cards in the pinned section."""
    page.goto(seen.link.replace("http://localhost:6006", seen.address))
    pinned = page.locator("metrics-pinned-view")
    curvature = ("hessian/sharpness_ratio", "hessian/lambda_max")
    main = ("grad_norm/total", "grad_norm/clip_fraction", *curvature, "step_radius/r", "ska/entropy", "stop/loss")
    for tag in main:
        pinned.locator("card-view", has_text=tag).wait_for()
    assert pinned.locator("card-view").count() == len(main)


def test_text_tab_shows_the_verdict_of_the_poor_run_only(seen: Seen, page: Page) -> None:
    """The Text tab names the rule, the step and the poor run; of the good one it has what bounds its steps."""
    page.goto(f"{seen.address}/#text")
    loader = page.locator("tf-text-loader")
    loader.get_by_text("non_finite at step 5").wait_for()
    verdict = loader.filter(has_text="non_finite")
    assert verdict.count() == 1
    verdict.get_by_text("poor", exact=True).wait_for()
    binding = loader.filter(has_text="bound by sample").filter(has=page.get_by_text("good", exact=True))
    binding.get_by_text(re.compile(r"step \d+: r = .*, target \d")).first.wait_for()


def test_a_chart_of_all_layers_draws_each(chromium: str, page: Page, tmp_path: Path) -> None:
    """A tag with a star draws one curve for each router, and the pictures stand in the Images tab."""
    watch = DynWatch(moe=MoEPathwayMonitor(every_n_steps=1), hessian=False, step_radius=False, report=False)
    logger = TensorBoardLogger(tmp_path, name=None, version="moe", default_hp_metric=False)
    runs.trainer(tmp_path, [watch], logger=logger, max_epochs=2).fit(Model(), texts())
    with browser.tensorboard(tmp_path, ["moe"]) as address:
        page.goto(f"{address}/#custom_scalars&_smoothingWeight=0")
        show_all_categories(page)
        card = page.locator(CARD, has_text="Effective experts by layer")
        card.scroll_into_view_if_needed()
        lengths: list[int] = []
        for _ in range(PATIENCE_MS // 200):
            lines = card.locator("path.line").evaluate_all("lines => lines.map(line => line.getAttribute('d') || '')")
            lengths = [len(set(re.findall(r"[\d.-]+,[\d.-]+", line))) for line in lines]
            if sum(length >= 10 for length in lengths) >= 3:
                break
            page.wait_for_timeout(200)
        else:
            pytest.fail(f"the chart has lines of {lengths} points")
        assert card.locator(".match-list-entry").count() == 3
        page.goto(f"{address}/#images")
        page.get_by_text("moe/load").first.wait_for()


def test_a_margin_chart_draws_a_curve_in_a_band(chromium: str, page: Page, tmp_path: Path) -> None:
    """From three tags with characters that mean something in a pattern, and nothing from a tag that begins alike."""
    middle, low, high = "hessian/λ+max", "hessian/λ (low)", "hessian/λ|high$"
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer.add_custom_scalars(layout([Chart("curvature", "Largest eigenvalue", (middle, low, high), margin=True)]))
        for step in range(0, 200, 10):
            value = 5 + (step / 40) ** 2 % 3
            for tag, scalar in ((middle, value), (low, value - 1), (high, value + 1), (f"{middle}/other", 9.0)):
                writer.add_scalar(tag, scalar, step)
    with browser.tensorboard(tmp_path, ["run"]) as address:
        page.goto(f"{address}/#custom_scalars&_smoothingWeight=0")
        show_all_categories(page)
        card = page.locator(MARGIN_CARD, has_text="Largest eigenvalue")
        card.scroll_into_view_if_needed()
        drawn: dict[str, list[int]] = {}
        for _ in range(PATIENCE_MS // 200):
            drawn = {
                kind: [
                    len(set(re.findall(r"[\d.-]+,[\d.-]+", path.get_attribute("d") or "")))
                    for path in card.locator(f"path.{kind}").all()
                ]
                for kind in ("line", "area")
            }
            if drawn["area"] == [40] and 20 in drawn["line"]:  # a band has two edges of 20 points
                break
            page.wait_for_timeout(200)
        else:
            pytest.fail(f"the chart has lines and areas of {drawn} points")
        assert card.locator(".match-list-entry").count() == 1
