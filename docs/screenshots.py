"""Takes the pictures in docs/images of the digits demo, as TensorBoard shows it.

    python docs/screenshots.py

Needs Chromium and playwright. The gradient, update and loss charts are set to a logarithmic scale, with the button
that each chart has: on a linear one the diverging run would hide the healthy one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests"))

from browser import browser, tensorboard  # noqa: E402 - its folder is known only now

if TYPE_CHECKING:
    from playwright.sync_api import Page

LARGEST = 200_000  # bytes
LOGARITHMIC = ("Gradient norm, before", "Gradient norm by layer", "Update-to-weight", "Loss, and the limit")
CARD = "tf-custom-scalar-multi-line-chart-card"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder, "digits")
        command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--logdir", str(logs)]
        subprocess.run(command, check=True, capture_output=True)
        with tensorboard(logs, ["healthy", "poor", "forgetful"]) as address, browser() as chromium:
            page = chromium.new_page(viewport={"width": 1500, "height": 1130})
            panels(page, f"{address}/#custom_scalars&_smoothingWeight=0")
            page = chromium.new_page(viewport={"width": 1400, "height": 830})
            verdict(page, f"{address}/#text")


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
    if path.stat().st_size > LARGEST:
        raise RuntimeError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}.")


if __name__ == "__main__":
    main()
