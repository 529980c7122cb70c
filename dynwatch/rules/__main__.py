"""What rules would have made of past runs: `python -m dynwatch.rules lightning_logs`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dynwatch.rules import default_rules
from dynwatch.rules.old_logs import replay
from dynwatch.rules.ska_equilibrium import SKAEquilibrium
from dynwatch.rules.stop_when import StopWhen


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dynwatch.rules",
        description="At which step would each rule have fired in past runs? Reads TensorBoard logs, made with "
        "dynwatch or without, and asks the default rules and ska_equilibrium.",
    )
    parser.add_argument("logdir", metavar="LOGDIR", help="folder with event files at any depth, or one event file")
    parser.add_argument("--loss", metavar="TAG", help="the training loss, in logs without stop/loss")
    parser.add_argument("--val-loss", metavar="TAG", help="the validation loss, in logs without stop/val_loss")
    parser.add_argument(
        "--planned-steps", metavar="N", type=int, help="budget of each run (default: as long as it was)"
    )
    parser.add_argument(
        "--when",
        metavar="EXPRESSION",
        action="append",
        default=[],
        help="a further condition, such as 'val_accuracy < 0.2 after 1000 steps'; may be given several times",
    )
    asked = parser.parse_args(arguments)
    try:
        rules = [*default_rules(), SKAEquilibrium(), *(StopWhen(expression) for expression in asked.when)]
        replayed = replay(
            asked.logdir, rules, loss=asked.loss, val_loss=asked.val_loss, planned_steps=asked.planned_steps
        )
    except ValueError as error:
        parser.error(str(error))
    replayed.print()


if __name__ == "__main__":
    _main()
