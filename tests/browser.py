"""A real TensorBoard and a headless Chromium, for tests and for the pictures in docs/images."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_PATIENCE = 120  # seconds, on a busy machine


def chromium() -> str | None:
    """The path of an installed Chromium."""
    return next((path for path in map(shutil.which, _CHROMIUM) if path), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium; a RuntimeError if none is installed."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    if path is None:
        raise RuntimeError(f"None of {', '.join(_CHROMIUM)} is on PATH.")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def tensorboard(logdir: Path, runs: Collection[str]) -> Iterator[str]:
    """A TensorBoard process that has read these runs and our panels; gives its address, without a slash at the end."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "output")
        with said.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _wait_until_read(process, said, set(runs))
        finally:
            process.terminate()
            process.wait(_PATIENCE)


def _wait_until_read(process: subprocess.Popen[bytes], said: Path, runs: set[str]) -> str:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        found = re.search(r"http://127\.0\.0\.1:\d+", said.read_text())
        if not found:
            continue
        tags = _get(f"{found[0]}/data/plugin/scalars/tags")
        if runs <= tags.keys() and _get(f"{found[0]}/data/plugin/custom_scalars/layout"):
            return found[0]
    raise RuntimeError(f"TensorBoard showed no panels (exit status {process.poll()}):\n{said.read_text()}")


def _get(address: str) -> dict[str, object]:
    with urllib.request.urlopen(address, timeout=_PATIENCE) as answer:
        return json.load(answer)
