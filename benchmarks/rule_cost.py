"""What asking the rules costs, on one core and without a model.

    python benchmarks/rule_cost.py [--steps 20000]

Every rule is fed the readings that a run under `DynWatch()` has: the loss, the gradient norm and the schedule on each
step, 32 layers of norms on each 10th, 32 update ratios and 16 shares of dead units on each 50th, and a validation
loss on each 200th.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dynwatch.rules import Rule, Rulebook, StopWhen, default_rules

Step = tuple[int, dict[str, float]]


def readings(steps: int) -> list[Step]:
    draw = random.Random(0)
    found = []
    for step in range(steps):
        now = {
            "stop/loss": 2.3 / (1 + step / 100) + draw.gauss(0, 0.05),
            "stop/grad_norm": 1 + abs(draw.gauss(0, 0.3)),
            "stop/progress": (step + 1) / steps,
            "stop/lr": 0.1,
            "stop/lr_low": 0.0,
        }
        if step % 10 == 9:
            now |= {"grad_norm/total": 1.0, "grad_norm/clipped": 1.0, "grad_norm/nonfinite": 0.0}
            now |= {f"grad_norm/layer/block{i}": 0.1 + draw.random() for i in range(32)}
        if step % 50 == 49:
            now |= {f"update_ratio/block{i}": 1e-3 for i in range(32)}
            now |= {f"activation/dead/block{i}": 0.1 for i in range(16)}
        if step % 200 == 199:
            now["stop/val_loss"] = 1.0
        found.append((step, now))
    return found


def microseconds(rules: Sequence[Rule], steps: Sequence[Step]) -> tuple[float, float]:
    """Mean over all steps, and over the steps on which everything is due."""
    book = Rulebook(rules)
    spent = {True: 0.0, False: 0.0}
    for step, now in steps:
        start = time.perf_counter()
        book.update(step, now, {})
        spent[step % 200 == 199] += time.perf_counter() - start
    full = sum(step % 200 == 199 for step, _ in steps)
    return 1e6 * sum(spent.values()) / len(steps), 1e6 * spent[True] / max(full, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = readings(parser.parse_args().steps)
    table = Table(title="Asking the rules, in microseconds a step")
    for column in ("rules", "mean", "step on which all is due"):
        table.add_column(column, justify="left" if column == "rules" else "right")
    spike = "stop/loss > 2 * mean(stop/loss, 100) for 20 readings"
    named = {"all default rules": default_rules(), f"StopWhen({spike!r})": [StopWhen(spike)]}
    for name, rules in {**named, **{rule.name: [rule] for rule in default_rules()}}.items():
        mean, full = microseconds(rules, steps)
        table.add_row(name, f"{mean:.1f}", f"{full:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
