"""The summary in the terminal: what was watched, key figures, own cost, verdict, and where to look."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from dynwatch.callbacks.namespaces import Trainer
from dynwatch.callbacks.panels import is_group, pinned_link, tag_pattern
from dynwatch.callbacks.series import Series
from dynwatch.callbacks.stream import OVERHEAD, Stream, tensorboard_loggers
from dynwatch.callbacks.terminal import terminal
from dynwatch.rules import Action, Verdict


def tensorboard_lines(trainer: Trainer, stream: Stream) -> list[str]:
    """The command that opens this run in TensorBoard, and the link to its panels; none without it."""
    lines = []
    for logger in tensorboard_loggers(trainer):
        lines.append(f"tensorboard --logdir {shlex.quote(str(logger.root_dir))}")
    if lines:
        lines.append(pinned_link(stream.charts()))
    return lines


def print_start(trainer: Trainer, stream: Stream) -> None:
    """A few lines when training starts, so that one can watch from the first step."""
    with terminal() as console:
        watched = ", ".join(type(member).__name__ for member in stream.members if member.charts())
        console.print(Text(f"dynwatch watches this run: {watched}."))
        for line in tensorboard_lines(trainer, stream):
            console.print(Text(f"  {line}"), soft_wrap=True)
        if tensorboard_loggers(trainer):
            console.print(Text("All panels are in TensorBoard's Custom Scalars tab; the link shows the main cards."))


def print_summary(trainer: Trainer, stream: Stream, verdicts: Sequence[tuple[Action, Verdict]]) -> None:
    """The table at the end of fit."""
    steps_of_verdicts = {f"stop/{verdict.rule}" for _, verdict in verdicts}
    with terminal() as console:
        table = Table(title="dynwatch", title_justify="left", box=SIMPLE, pad_edge=False)
        table.add_column("reading", overflow="fold")
        for column in ("last", "min", "max"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("over the run", no_wrap=True)
        for tag, series in _key_series(stream):
            if tag in steps_of_verdicts:
                continue  # they stand in the verdict below
            low, high = (
                (_figure(series.smallest), _figure(series.largest)) if series.smallest <= series.largest else ("", "")
            )
            table.add_row(Text(tag), _figure(series.last), low, high, series.sparkline(20))
        console.print(table)
        for tag, reason in stream.reasons.items():
            console.print(Text(f"{tag}: not available: {reason}.", style="dim"))
        for subject, remark in stream.remarks.items():
            console.print(Text(f"{subject}: {remark}.", style="dim"))
        for member in stream.members:
            if member.off:
                console.print(Text(f"{type(member).__name__} was switched off: {member.off}", style="yellow"))
        for line, style in verdict_lines(verdicts):
            console.print(Text(line, style=style))
        console.print(Text(f"Own cost: {stream.overhead():.1%} of the run's time."))
        for line in tensorboard_lines(trainer, stream):
            console.print(Text(f"  {line}"), soft_wrap=True)


def verdict_lines(verdicts: Sequence[tuple[Action, Verdict]]) -> list[tuple[str, str]]:
    """What the rules had to say, as (line, style): one line for each action."""
    if not verdicts:
        return [("Verdict: nothing to object to.", "")]
    lines = []
    for action, what, style in (
        ("stop", "stopped by", "bold red"),
        ("warn", "warned by", "yellow"),
        ("shadow", "would have been stopped (shadow) by", "blue"),
    ):
        first: dict[str, int] = {}
        for of, verdict in verdicts:
            if of == action:
                first.setdefault(verdict.rule, verdict.step)
        if first:
            rules = ", ".join(f"{rule} at step {step}" for rule, step in first.items())
            lines.append((f"Verdict: {what} {rules}.", style))
    return lines


def _key_series(stream: Stream) -> Sequence[tuple[str, Series]]:
    """One row a tag, but of a group of layers only the lowest and the highest at the end."""
    rows: list[tuple[str, Series]] = []
    side = [tag_pattern(tag) for member in stream.members for tag in member.side_tags]
    shown = [t for chart in stream.charts() for t in chart.tags if is_group(t)]
    groups: dict[str, list[tuple[str, Series]]] = {}
    for tag, series in stream.series.items():
        if any(each.match(tag) for each in side):
            continue
        group = next((t for t in shown if tag_pattern(t).match(tag)), None)
        if group:
            groups.setdefault(group, []).append((tag, series))
        elif tag != OVERHEAD and tag not in stream.reasons:
            rows.append((tag, series))
    for members in groups.values():
        ends = sorted(members, key=lambda row: row[1].last)
        rows += ends if len(ends) <= 2 else [ends[0], ends[-1]]
    return rows


def _figure(value: float) -> str:
    return f"{value:.3g}"
