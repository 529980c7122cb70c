"""Where a verdict is written: JSON lines, TensorBoard text, the Python log and the terminal."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from dynwatch.callbacks.namespaces import Trainer
from dynwatch.callbacks.series import sparkline
from dynwatch.callbacks.stream import tensorboard_writers
from dynwatch.callbacks.terminal import terminal
from dynwatch.rules import Action, Verdict

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
            file.write(json.dumps(record, allow_nan=False, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        log.warning("dynwatch could not write %s: %s. The verdict stands in the log above.", path, error)
        return None
    return path


def with_circumstances(trainer: Trainer, verdict: Verdict, rate: str) -> Verdict:
    """Add to a verdict what its advice should be read with: the learning rate, and whether gradients are clipped."""
    rates = [f"{float(g['lr']):.3g}" for o in trainer.optimizers for g in o.param_groups if "lr" in g]
    facts = [f"{rate}: {', '.join(dict.fromkeys(rates))}."] if rates else []
    if trainer.gradient_clip_val:
        facts.append(f"Gradient clipping is on, at {trainer.gradient_clip_val}.")
    return replace(verdict, reason=" ".join([verdict.reason, *facts]))


def describe_outcome(verdict: Verdict, checkpoint: str | None, discarded_at: int | None) -> str:
    """What a stop has left behind, in words."""
    parts = []
    if discarded_at is not None and not verdict.weights_suspect:
        parts.append(f"The update of step {discarded_at} was thrown away: weights are those before it.")
    if checkpoint:
        parts.append(f"Last checkpoint: {checkpoint}")
    return " ".join(parts) or "No checkpoint was saved before the stop."


def record_verdict(
    trainer: Trainer, folder: str | None, action: Action, verdict: Verdict, outcome: str, **more: Any
) -> None:
    """Write a verdict to the Python log, to `dynwatch.jsonl` with `more` beside it, and to TensorBoard."""
    try:
        record = {
            "time": time.time(),
            "pid": os.getpid(),
            "action": action,
            **verdict.to_dict(),
            "epoch": trainer.current_epoch,
            **more,
        }
        _write(trainer, folder, action, verdict, record, outcome)
    except Exception as error:  # numbers of a user's own rule that JSON does not know; the other ranks go on
        log.warning(
            "The verdict of %s could not be recorded: %s: %s. It says: %s",
            verdict.rule,
            type(error).__name__,
            error,
            verdict.reason,
        )


def _write(
    trainer: Trainer, folder: str | None, action: Action, verdict: Verdict, record: dict[str, Any], outcome: str
) -> None:
    what = {"stop": "ends this run", "warn": "warns", "shadow": "would have ended this run (shadow)"}[action]
    level = logging.INFO if action == "shadow" else logging.WARNING
    log.log(level, "dynwatch %s (%s): %s %s", what, verdict.rule, verdict.reason, verdict.advice)
    append_record(folder, record)
    title = f"**{verdict.rule}** at step {verdict.step}: dynwatch {what}"
    text = "\n\n".join(part for part in (title, verdict.reason, verdict.advice, outcome) if part)
    for writer in tensorboard_writers(trainer):
        try:
            writer.add_text("stop/verdict", text, verdict.step)
            writer.flush()
        except Exception as error:
            log.warning("dynwatch could not write its verdict to TensorBoard: %s.", error)


_TITLES = {
    "stop": ("dynwatch ended this run: {rule}", "red"),
    "warn": ("dynwatch warned: {rule}", "yellow"),
    "shadow": ("dynwatch would have ended this run (shadow): {rule}", "blue"),
}


def verdict_panel(action: Action, verdict: Verdict, outcome: str) -> Panel:
    """A verdict for the terminal."""
    title, colour = _TITLES[action]
    lines = [Text(verdict.reason), Text(verdict.advice, style="bold")]
    for tag, readings in verdict.evidence.items():
        values = [value for _, value in readings]
        if values:
            last = ", ".join(f"{value:.4g}" for value in values[-3:])
            lines.append(Text(f"{tag}  {sparkline(values)}  … {last}  (steps {readings[0][0]}-{readings[-1][0]})"))
    if outcome:
        lines.append(Text(outcome, style="dim"))
    return Panel(Group(*lines), title=title.format(rule=verdict.rule), border_style=colour)


def print_verdicts(verdicts: Sequence[tuple[Action, Verdict]], outcome: str) -> None:
    """Print the first verdict of each rule and action, a stop last, and how often it came again.

    Args:
        verdicts: All verdicts of a run, in order.
        outcome: What the stop left behind, in words.
    """
    if not verdicts:
        return
    again = Counter((action, verdict.rule) for action, verdict in verdicts)
    first = {(action, verdict.rule): verdict for action, verdict in reversed(verdicts)}
    with terminal() as console:
        for (action, rule), verdict in sorted(first.items(), key=lambda item: (item[0][0] == "stop", item[1].step)):
            count = again[action, rule]
            more = f"So {count} times in this run." if count > 1 else ""
            console.print(verdict_panel(action, verdict, outcome if action == "stop" else more))
