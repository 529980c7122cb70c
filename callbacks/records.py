"""Where a verdict is written: JSON lines, TensorBoard text, the Python log and the terminal."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from dynwatch.callbacks.namespaces import Trainer
from dynwatch.callbacks.series import sparkline
from dynwatch.callbacks.stream import tensorboard_writers
from dynwatch.callbacks.terminal import terminal
from dynwatch.rules import Verdict

log = logging.getLogger("dynwatch")

FILE_NAME = "dynwatch.jsonl"


def append_record(folder: str | None, record: dict[str, Any]) -> Path | None:
    """Append one JSON object as a line and force it to the disk, so that it outlives a killed process.

    Returns:
        The file, or None if there is no folder or it cannot be written (said once in the log).
    """
    if folder is None:
        return None
    path = Path(folder) / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        log.warning("dynwatch could not write %s: %s. The verdict stands in the log above.", path, error)
        return None
    return path


def write_text(trainer: Trainer, verdict: Verdict, outcome: str) -> None:
    """Write a verdict to TensorBoard's Text tab as `stop/verdict`."""
    text = f"**{verdict.rule}** at step {verdict.step}\n\n{verdict.reason}\n\n{verdict.advice}\n\n{outcome}"
    for writer in tensorboard_writers(trainer):
        try:
            writer.add_text("stop/verdict", text, verdict.step)
            writer.flush()
        except Exception as error:
            log.warning("dynwatch could not write its verdict to TensorBoard: %s.", error)


def verdict_panel(verdict: Verdict, outcome: str) -> Panel:
    """A verdict for the terminal."""
    lines = [Text(verdict.reason), Text(verdict.advice, style="bold")]
    for tag, readings in verdict.evidence.items():
        values = [value for _, value in readings]
        if values:
            last = ", ".join(f"{value:.4g}" for value in values[-3:])
            lines.append(Text(f"{tag}  {sparkline(values)}  … {last}  (steps {readings[0][0]}-{readings[-1][0]})"))
    lines.append(Text(outcome, style="dim"))
    return Panel(Group(*lines), title=f"dynwatch ended this run: {verdict.rule}", border_style="red")


def print_verdict(verdict: Verdict, outcome: str) -> None:
    with terminal() as console:
        console.print(verdict_panel(verdict, outcome))
