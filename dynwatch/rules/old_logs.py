"""Rules on TensorBoard logs of past runs, made with dynwatch or without: this is how rules are tuned without training.

TensorBoard's reader and Rich are imported where they are needed, so that the engine stays light.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from dynwatch.rules.base import Rule, check_count
from dynwatch.rules.log_tags import Curve, check_tag, map_tags
from dynwatch.rules.replaying import Outcome, PastRun, label_rules, listed, replay_readings
from dynwatch.rules.tags import LOSS, OWN

_PLACEHOLDER = "hp_metric"  # Lightning's, for the hyperparameters tab


@dataclass(frozen=True)
class Replayed:
    """What rules make of past runs: a sequence of outcomes, which Rich prints as a table.

    Attributes:
        logdir: Where the logs are.
        runs: What was read, by name of the run.

    Example:
        >>> replayed = Replayed("logs", {"poor": PastRun((Outcome("poor", "divergence", "stop", step=39),))})
        >>> [(outcome.run, outcome.step) for outcome in replayed]
        [('poor', 39)]
        >>> replayed.table().row_count
        1
    """

    logdir: str
    runs: Mapping[str, PastRun]

    @property
    def outcomes(self) -> list[Outcome]:
        """One for each run and rule."""
        return [outcome for run in self.runs.values() for outcome in run.outcomes]

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)

    def __getitem__(self, index: int) -> Outcome:
        return self.outcomes[index]

    def table(self) -> Any:
        """A `rich.table.Table`: of each run the rules that fire, in the order of their steps, and those that do not."""
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(f"Where rules would have fired: {self.logdir}"),
            title_justify="left",
            box=SIMPLE,
            show_edge=False,
            padding=(0, 1, 0, 0),
            expand=True,
        )
        table.add_column("run", overflow="fold", max_width=24)
        for column in ("rule", "action"):
            table.add_column(column, no_wrap=True)
        for column in ("at step", "saved"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("reason", overflow="fold", ratio=1)
        for name, run in self.runs.items():
            rows: list[tuple[Text | str, ...]] = []
            for o in sorted((o for o in run.outcomes if o.step is not None), key=lambda o: o.step or 0):
                saved = f"{o.saved:.0%}" if o.saved is not None and o.action != "warn" else "-"  # a warning saves none
                style = {"stop": "bold red", "warn": "yellow"}.get(o.action, "")
                reason = Text(o.verdict.reason if o.verdict else "")
                rows.append((Text(o.rule, style), o.action, str(o.step), saved, reason))
            never = [o.rule for o in run.outcomes if o.step is None and not o.nothing_to_read]
            if never:
                rows.append((Text("never", "dim"), "", "", "", Text(", ".join(never), "dim")))
            if not rows:
                rows.append((Text("-", "dim"), "", "", "", Text("no rule had anything to read", "dim")))
            for i, row in enumerate(rows):
                table.add_row(Text(name, "bold") if i == 0 else "", *row)
            table.add_section()
        return table

    def notes(self) -> list[str]:
        """What the table should be read with: where readings are from, which are missing, what could not be read."""
        where: dict[str, list[str]] = {}
        for name, run in self.runs.items():
            for note in run.notes():
                where.setdefault(note, []).append(name)
        return [note if len(names) == len(self.runs) else f"{listed(names)}: {note}" for note, names in where.items()]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(self.table(), "", *(Text(note, "dim") for note in self.notes()))

    def print(self) -> None:
        """Print the table and what it should be read with."""
        from rich.console import Console

        Console().print(self)


def replay(
    logdir: str | os.PathLike[str],
    rules: Iterable[Rule] | None = None,
    *,
    loss: str | None = None,
    val_loss: str | None = None,
    planned_steps: int | None = None,
    tags: Mapping[str, str] | None = None,
) -> Replayed:
    """Ask rules at which step they would have fired in past runs, from their TensorBoard logs.

    Each folder with event files is a run. Several event files in one folder are one run that was resumed: of two
    values of a tag at one step the one that was written later counts, and what the first part logged beyond the
    end of the last part stays. All scalars go to the rules under their own names, so that `StopWhen` can ask for
    each, and those that rules know by another name also under that (see `map_tags`): `stop/loss` from
    `train_loss`, say. The result tells which.

    A log holds what was logged: where the loss was logged each 50 steps, a rule's `patience` counts these losses,
    and the same rule in a run may fire sooner. Readings that dynwatch does not log (the scaler, the norm of the
    weights at the end) are missing. A run that ended early looks as if it was planned so, unless `planned_steps`
    says otherwise.

    Args:
        logdir: A folder with event files at any depth, or one event file.
        rules: The rules, which stay as they are: each run gets copies. None takes the default ones.
        loss: Tag of the training loss in logs that have no `stop/loss`.
        val_loss: Tag of the validation loss in logs that have no `stop/val_loss`.
        planned_steps: Budget of each run in steps; None takes as many as the run's log has.
        tags: Tags of the log by reading (`{"stop/lr": "my_rate"}`), in place of all other choices.

    Returns:
        The outcomes, one for each run and rule; `print()` shows them.

    Raises:
        ValueError: If `logdir` does not exist or has no event files, a named tag is in no run, there are no rules,
            or `planned_steps` is no whole number of at least 1.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from dynwatch.rules import NonFinite
        >>> with TemporaryDirectory() as folder:
        ...     with SummaryWriter(f"{folder}/poor") as writer:
        ...         for step, loss in enumerate([2.3, 2.2, float("nan"), 2.1]):
        ...             writer.add_scalar("train_loss", loss, step)
        ...     replayed = replay(folder, [NonFinite()])
        >>> replayed[0].run, replayed[0].step, replayed[0].saved, replayed.runs["poor"].mapped
        ('poor', 2, 0.25, {'stop/loss': 'train_loss'})
    """
    from dynwatch.rules import default_rules

    asked = list(label_rules(default_rules() if rules is None else rules).values())
    if planned_steps is not None:
        check_count("planned_steps", planned_steps)
    root = Path(logdir)
    files = _event_files(root)
    logs, unreadable = {}, {run: [why for path in paths if (why := _trouble(path))] for run, paths in files.items()}
    for run, paths in files.items():
        try:
            logs[run] = _read_scalars(root if root.is_file() else paths[0].parent)
        except Exception as error:  # one log of many, which another user or a full disk may have spoilt
            logs[run] = {}
            unreadable[run].append(f"The log cannot be read ({type(error).__name__}: {error}).")
    known = sorted({tag for log in logs.values() for tag in log})
    named = {"loss": loss, "val_loss": val_loss, **{f"tags[{key!r}]": tag for key, tag in (tags or {}).items()}}
    for argument, tag in named.items():
        if tag is not None:
            check_tag(argument, tag, known)
    runs = {}
    for name, log in logs.items():
        readings, mapped = map_tags(log, tags, loss, val_loss)
        losses = [step for step, _ in readings.get(LOSS, [])]
        last = max((curve[-1][0] for curve in log.values()), default=None)
        runs[name] = PastRun(
            outcomes=tuple(replay_readings(readings, asked, planned_steps, name)),
            mapped=mapped,
            planned_steps=None if last is None else planned_steps or last + 1,
            loss_every=median(b - a for a, b in pairwise(losses)) if len(losses) > 1 else None,
            unreadable=tuple(unreadable[name]),
            losses=len(losses) if LOSS in readings else None,
            recorded=tuple(_recorded(log)),
        )
    return Replayed(str(logdir), runs)


def _recorded(log: Mapping[str, Curve]) -> Iterator[str]:
    """Where rules fired in the run itself: their scalars hold the step, and dynwatch's other ones do not."""
    for tag, curve in log.items():
        if tag.startswith("stop/") and tag not in OWN:
            yield f"{tag.removeprefix('stop/')} at step {curve[0][1]:.0f}"


def _event_files(root: Path) -> dict[str, list[Path]]:
    """Event files by run, the runs in the order that a person gives their numbers."""
    if not root.exists():
        raise ValueError(f"logdir={str(root)!r} does not exist; pass the folder that `tensorboard --logdir` shows.")
    if root.is_file():
        if not _is_event_file(root):
            raise ValueError(f"logdir={str(root)!r} is no event file (…tfevents…); pass one, or a folder with some.")
        return {".": [root]}
    runs: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*tfevents*")):
        if path.is_file() and _is_event_file(path):
            runs.setdefault(path.parent.relative_to(root).as_posix(), []).append(path)
    if not runs:
        raise ValueError(
            f"logdir={str(root)!r} has no event files (…tfevents…) at any depth; pass the folder that "
            "`tensorboard --logdir` shows, such as lightning_logs."
        )
    return dict(sorted(runs.items(), key=lambda item: _by_number(item[0])))


def _by_number(name: str) -> list[tuple[int, str]]:
    """What puts version_9 before version_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_event_file(path: Path) -> bool:
    return "tfevents" in path.name and not path.name.endswith(".profile-empty")


def _accumulator(path: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    everything, one = dict.fromkeys(["scalars", "tensors"], 0), dict.fromkeys(["images", "audio", "histograms"], 1)
    return EventAccumulator(str(path), size_guidance={**everything, **one, "distributions": 1})


def _trouble(path: Path) -> str | None:
    """What is wrong with an event file from which not even the first event can be read."""
    try:
        _accumulator(path).FirstEventTimestamp()
    except ValueError:
        return f"{path.name} has no event that can be read."
    except Exception as error:
        return f"{path.name} cannot be read ({type(error).__name__}: {error})."
    return None


def _read_scalars(path: Path) -> dict[str, Curve]:
    """All scalars of a folder's event files, also those that were written as tensors, by step."""
    from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped]

    events = _accumulator(path).Reload()
    kinds = events.Tags()
    written = [(tag, e.wall_time, e.step, e.value) for tag in kinds["scalars"] for e in events.Scalars(tag)]
    for tag in kinds["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            written += [(tag, e.wall_time, e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)]
    curves: dict[str, dict[int, float]] = {}
    for tag, _, step, value in sorted(written, key=lambda event: event[1]):
        if tag != _PLACEHOLDER:
            curves.setdefault(tag, {})[step] = float(value)
    return {tag: sorted(curve.items()) for tag, curve in curves.items()}
