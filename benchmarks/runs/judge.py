"""What dynwatch's rules, and two baselines, would have done with every run of the zoo.

    python benchmarks/runs/judge.py [--out logs/zoo] [--half reporting|tuning|all] [--runs]

Reads what `record.py` wrote and asks the rules anew, so that rules can be tuned without training. Even seeds are
the tuning half, odd seeds the reporting half. The baselines are Lightning's own `EarlyStopping` and the rule
"twice the mean for five steps".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from pytorch_lightning.callbacks import EarlyStopping
from record import Recorded, load
from rich.console import Console
from rich.table import Table

from dynwatch.rules import Rule, Rulebook, StopWhen, default_rules

HALVES = {"tuning": lambda seed: seed % 2 == 0, "reporting": lambda seed: seed % 2 == 1, "all": lambda seed: True}
SPIKE = "stop/loss > 2 * mean(stop/loss, 50) for 5 readings"


@dataclass(frozen=True)
class Fired:
    """The first time that something fired in a run: which rule, where, and the budget left then."""

    rule: str
    action: str
    step: int
    left: float
    reason: str


def ask(run: Recorded, rules: list[Rule]) -> list[Fired]:
    """The first verdict of each rule."""
    book, found = Rulebook(rules, cooldown=run.steps), {}
    for step, readings, notes in run.rows:
        for rule, verdict in book.update(step, readings, notes):
            left = max(0.0, 1 - (step + 1) / run.steps)
            found.setdefault(rule.name, Fired(rule.name, rule.action, step, left, verdict.reason))
    assert not book.failed, (run.kind, book.failed)
    return sorted(found.values(), key=lambda fired: fired.step)


def early_stopping(run: Recorded) -> list[Fired]:
    """Lightning's EarlyStopping on the validation loss, with its own arithmetic."""
    callback = EarlyStopping("val_loss", patience=3, check_finite=True)
    for step, loss in run.validations:
        stops, reason = callback._evaluate_stopping_criteria(torch.tensor(loss))
        if stops:
            return [Fired("EarlyStopping", "stop", step, max(0.0, 1 - (step + 1) / run.steps), reason or "")]
    return []


def stops(fired: Sequence[Fired]) -> list[Fired]:
    return [one for one in fired if one.action == "stop"]


def row(name: str, runs: Sequence[Recorded], judge: Callable[[Recorded], list[Fired]]) -> list[str]:
    """One line of the table: shares of poor and of healthy runs, and the budget saved by stops."""
    verdicts = [(run, judge(run)) for run in runs]
    poor = [fired for run, fired in verdicts if not run.healthy]
    healthy = [fired for run, fired in verdicts if run.healthy]
    saved = [stops(fired)[0].left for fired in poor if stops(fired)]
    left = [fired[0].left for fired in poor if fired]
    return [
        name,
        f"{sum(map(bool, poor))} of {len(poor)} ({sum(map(bool, poor)) / max(len(poor), 1):.0%})",
        f"{median(left):.0%}" if left else "–",
        str(len(saved)),
        f"{median(saved):.0%}" if saved else "–",
        str(sum(bool(stops(fired)) for fired in healthy)),
        f"{sum(map(bool, healthy))} of {len(healthy)}",
    ]


def table(runs: Sequence[Recorded], half: str) -> Table:
    count = sum(run.healthy for run in runs)
    shown = Table(title=f"{half} half: {len(runs) - count} poor and {count} healthy runs", title_justify="left")
    shown.add_column("judge")
    for column in ("poor found", "budget left", "poor stopped", "budget saved", "healthy stopped", "healthy warned"):
        shown.add_column(column, justify="right")
    shown.add_row(*row("dynwatch, default set", runs, lambda run: ask(run, default_rules())), style="bold")
    shown.add_section()
    for i, rule in enumerate(default_rules()):
        shown.add_row(*row(f"  {rule.name} ({rule.action})", runs, lambda run, i=i: ask(run, [default_rules()[i]])))
    shown.add_section()
    shown.add_row(*row("Lightning's EarlyStopping", runs, early_stopping))
    shown.add_row(*row("twice the mean, 5 steps", runs, lambda run: ask(run, [StopWhen(SPIKE, name="spike")])))
    return shown


def each_run(runs: Sequence[Recorded]) -> Table:
    shown = Table("run", "rules, and the step at which each fired", "EarlyStopping", title="Each run")
    for run in sorted(runs, key=lambda run: (run.healthy, run.kind, run.seed)):
        fired = ", ".join(f"{one.rule}{'!' * (one.action == 'stop')} {one.step}" for one in ask(run, default_rules()))
        other = ", ".join(str(one.step) for one in early_stopping(run))
        style = None if run.healthy == (not fired) else "yellow" if run.healthy else "red"
        name = f"{'healthy' if run.healthy else 'poor'} {run.kind}-{run.seed}"
        shown.add_row(name, f"{fired or '–'} of {run.steps}", other, style=style)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logs/zoo"))
    parser.add_argument("--half", choices=HALVES, default="reporting")
    parser.add_argument("--runs", action="store_true", help="also print what fired in each run")
    arguments = parser.parse_args()
    runs = [run for run in load(arguments.out) if HALVES[arguments.half](run.seed)]
    if not runs:
        parser.error(f"--out {arguments.out} holds no recorded runs; run benchmarks/runs/record.py first")
    console = Console(width=None if Console().is_terminal else 130)
    if arguments.runs:
        console.print(each_run(runs))
    console.print(table(runs, arguments.half))


if __name__ == "__main__":
    main()
