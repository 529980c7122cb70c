"""Takes the pictures in docs/images of the examples, as TensorBoard shows them.

    python docs/screenshots.py [digits] [edge_of_stability] [batch_size] [lr_spike] [moe] [ska]

Needs Chromium and playwright. Without an argument it takes all. In that of the digits the gradient,
update and loss charts are set to a logarithmic scale, with the button that each chart has: on a linear one the
diverging run would hide the healthy one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests"))

from browser import browser, tensorboard  # noqa: E402 - its folder is known only now

if TYPE_CHECKING:
    from playwright.sync_api import Page

LARGEST = 200_000  # bytes
LOGARITHMIC = ("Gradient norm, before", "Gradient norm by layer", "Update-to-weight", "Loss, and the limit")
CARD = "tf-custom-scalar-multi-line-chart-card"
MARGIN_CARD = "tf-custom-scalar-margin-chart-card"


def main() -> None:
    takers = {
        "digits": digits,
        "edge_of_stability": edge_of_stability,
        "batch_size": batch_size,
        "lr_spike": lr_spike,
        "moe": moe,
        "ska": ska,
    }
    parser = argparse.ArgumentParser(description="Takes the pictures in docs/images.")
    parser.add_argument("examples", nargs="*", metavar="example", help=f"of {', '.join(takers)}; all if none is named")
    IMAGES.mkdir(exist_ok=True)
    for name in parser.parse_args().examples or takers:
        with tempfile.TemporaryDirectory() as folder:
            takers[name](Path(folder, name))


def run(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / name), *arguments], check=True, capture_output=True)


def digits(logs: Path) -> None:
    run("digits.py", "--logdir", str(logs))
    with tensorboard(logs, ["healthy", "poor", "forgetful"]) as address, browser() as chromium:
        page = chromium.new_page(viewport={"width": 1500, "height": 1130})
        panels(page, f"{address}/#custom_scalars&_smoothingWeight=0")
        page = chromium.new_page(viewport={"width": 1400, "height": 830})
        verdict(page, f"{address}/#text")


def edge_of_stability(logs: Path) -> None:
    run("edge_of_stability.py", "--logdir", str(logs))
    with tensorboard(logs, ["sgd", "adam"]) as address, browser() as chromium:
        page = chromium.new_page(viewport={"width": 1100, "height": 490})
        curvature(page, f"{address}/#custom_scalars&_smoothingWeight=0")
    events = EventAccumulator(str(logs / "sgd"), size_guidance={"images": 0}).Reload()
    (IMAGES / "density.png").write_bytes(events.Images("hessian/density")[-1].encoded_image_string)
    check_size(IMAGES / "density.png")


def batch_size(folder: Path) -> None:
    run("batch_size.py", "--picture", str(IMAGES / "batch_size.png"))
    check_size(IMAGES / "batch_size.png")


def lr_spike(logs: Path) -> None:
    run("lr_spike.py", "--logdir", str(logs))
    with tensorboard(logs, ["plain_0", "clipped_0", "controlled_0"]) as address, browser() as chromium:
        page = chromium.new_page(viewport={"width": 1050, "height": 470})
        page.goto(f"{address}/#scalars&_smoothingWeight=0&tagFilter=val_accuracy%7Cstep_radius%2Fr%24")
        page.get_by_text("Ignore outliers in chart scaling").click()
        card = page.locator("tf-scalar-card", has_text="step_radius/r").last  # the filter's, after its folded group
        card.locator("path.line").first.wait_for(state="attached")
        card.get_by_title("Toggle y-axis log scale").click()
        card.get_by_title("Fit domain to data").click()
        save(page, "lr_spike.png")


def moe(logs: Path) -> None:
    run("moe_language_model.py", "--logdir", str(logs))
    with tensorboard(logs, ["healthy_0", "collapsed_0"]) as address, browser() as chromium:
        page = chromium.new_page(viewport={"width": 1450, "height": 438})
        only(page, f"{address}/#custom_scalars&_smoothingWeight=0", "Effective experts|busiest expert|samples, normal")
        page.locator(CARD, has_text="Effective experts").locator("path.line").first.wait_for(state="attached")
        page.mouse.move(700, 300)
        page.mouse.wheel(0, -1000)  # folding has scrolled
        save(page, "moe.png")


def ska(logs: Path) -> None:
    run("ska_forward_only.py", "--logdir", str(logs), "--picture", str(IMAGES / "ska.png"))
    check_size(IMAGES / "ska.png")


def curvature(page: Page, address: str) -> None:
    """The charts of the ratio and of the eigenvalues behind it, without the others, in one row."""
    only(page, address, "Sharpness ratio|Largest")
    bar = page.locator(MARGIN_CARD, has_text="Largest Hessian")
    bar.locator("path").first.wait_for(state="attached")
    # TensorBoard puts charts with error bars into a row of their own, below.
    ratio = page.locator(CARD, has_text="Sharpness ratio")
    ratio.evaluate("(ratio, bar) => ratio.after(bar)", bar.element_handle())
    save(page, "edge_of_stability.png")


def only(page: Page, address: str, titles: str) -> None:
    """Go to the panels and hide all whose titles do not match."""
    page.goto(address)
    page.locator(CARD).first.wait_for()
    page.get_by_text("Ignore outliers in chart scaling").click()
    page.get_by_text("dynwatch · gradients").click()  # folds it
    for card in page.locator(f"{CARD}, {MARGIN_CARD}").filter(has_not_text=re.compile(titles)).all():
        card.evaluate("card => { card.style.display = 'none'; }")


def panels(page: Page, address: str) -> None:
    page.goto(address)
    page.locator(CARD).first.wait_for()
    page.get_by_text("Ignore outliers in chart scaling").click()
    for title in LOGARITHMIC:
        card = page.locator(CARD, has_text=title)
        card.locator("path.line").first.wait_for(state="attached")
        card.get_by_title("Toggle y-axis log scale").click()
        card.get_by_title("Fit domain to data").click()
    page.locator(CARD).first.scroll_into_view_if_needed()
    save(page, "panels.png")


def verdict(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_text("stop/verdict").first.wait_for()
    save(page, "verdict.png")


def save(page: Page, name: str) -> None:
    """Keep what the page shows, with as many colours as its size allows."""
    path = IMAGES / name
    page.mouse.move(5, 5)  # so that no tooltip shows
    page.wait_for_timeout(2000)  # curves move to their new scale
    page.screenshot(path=path)
    if path.stat().st_size > LARGEST:
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    check_size(path)


def check_size(path: Path) -> None:
    if path.stat().st_size > LARGEST:
        raise RuntimeError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}.")


if __name__ == "__main__":
    main()
