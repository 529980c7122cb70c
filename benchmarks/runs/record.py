"""Trains every run of the zoo to its end and writes down what dynwatch's rules would have seen.

    python benchmarks/runs/record.py [--out logs/zoo] [--only NAME ...] [--seeds 0 1] [--fresh]

Even seeds are for tuning rules, odd seeds for reporting. A healthy kind that misses its goal, or a poor one
that reaches it, makes the program fail: its label would be wrong.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from catalogue import Kind, kinds
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dynwatch.callbacks import ActivationMonitor, DynWatch, EarlyTermination, GradientNormMonitor, StepRadiusMonitor
from dynwatch.rules import Rule

# One step: its number, its readings, and what is known of them in words.
Row = tuple[int, dict[str, float], dict[str, str]]


@dataclass(frozen=True)
class Recorded:
    """A run as it was.

    Attributes:
        kind: Its kind's name.
        seed: Its seed.
        healthy: Whether its kind is.
        steps: Optimizer steps, all that were planned.
        rows: Readings of each step, in order.
        validations: `val_loss` by step, after each validation.
        metrics: What the last validation logged.
        train_first: Mean training loss of the first 5 steps.
        train_last: Mean training loss of the last 20 steps.
        seconds: How long it took.
    """

    kind: str
    seed: int
    healthy: bool
    steps: int
    rows: list[Row]
    validations: list[tuple[int, float]]
    metrics: dict[str, float]
    train_first: float
    train_last: float
    seconds: float

    @property
    def best_validation(self) -> float:
        """The lowest validation loss; NaN only if there is no number at all."""
        losses = [loss for _, loss in self.validations if loss == loss]
        return min(losses, default=float("nan"))


class Recorder(Rule):
    """Looks at everything and objects to nothing."""

    name = "recorder"
    reads = ("stop/loss", "stop/val_loss")

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> None:
        self.rows.append((step, dict(readings), dict(notes)))


class Validations(pl.Callback):
    """The validation loss after each validation."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []
        self.metrics: dict[str, float] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.metrics = {name: value for name, value in logged.items() if name.startswith("val_")}
            self.losses.append((trainer.fit_loop.epoch_loop._batches_that_stepped, self.metrics["val_loss"]))


def train(kind: Kind, seed: int, folder: Path) -> Recorded:
    """Train one run to its end, stopped by nothing."""
    start = time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    run = kind.build(seed)
    recorder, validations = Recorder(), Validations()
    stop = EarlyTermination(rules=[recorder])
    watch = DynWatch(
        GradientNormMonitor(every_n_steps=5, update_ratio_every_n_steps=10),
        stop,
        report=False,
        activations=ActivationMonitor(every_n_steps=10),
        step_radius=StepRadiusMonitor(every_n_steps=10),
    )
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "default_root_dir": folder,
        "log_every_n_steps": 5,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [validations, watch],
    }
    trainer = pl.Trainer(**(defaults | run.trainer_settings()))
    trainer.fit(run.module, run.train, run.val)
    for monitor in watch.monitors:
        if monitor.off:
            raise RuntimeError(f"{kind.name}: {type(monitor).__name__} went off: {monitor.off}")
    losses = [readings["stop/loss"] for _, readings, _ in recorder.rows if "stop/loss" in readings]
    return Recorded(
        kind=kind.name,
        seed=seed,
        healthy=kind.healthy,
        steps=trainer.fit_loop.epoch_loop._batches_that_stepped,
        rows=recorder.rows,
        validations=validations.losses,
        metrics=validations.metrics,
        train_first=fmean(losses[:5]),
        train_last=fmean(losses[-20:]),
        seconds=time.perf_counter() - start,
    )


def path_of(out: Path, kind: str, seed: int) -> Path:
    return out / f"{kind}-{seed}.json.gz"


def save(recorded: Recorded, out: Path) -> None:
    """Write a run at once or not at all, so that an interrupted program leaves no half of it."""
    path = path_of(out, recorded.kind, recorded.seed)
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(gzip.compress(json.dumps(asdict(recorded)).encode(), compresslevel=5))
    unfinished.replace(path)


def load_one(path: Path) -> Recorded:
    saved = json.loads(gzip.decompress(path.read_bytes()))
    saved["rows"] = [(step, readings, notes) for step, readings, notes in saved["rows"]]
    saved["validations"] = [(step, loss) for step, loss in saved["validations"]]
    return Recorded(**saved)


def load(out: Path) -> list[Recorded]:
    """All recorded runs of a folder, by kind and seed; those of kinds that are no more are left out."""
    paths = [path for path in sorted(out.glob("*.json.gz")) if path.name.rsplit("-", 1)[0] in kinds()]
    return [load_one(path) for path in paths]


def work(name: str, seed: int, out: Path) -> str:
    """One run in a process of its own; the answer is what failed, if anything."""
    torch.set_num_threads(1)  # two runs at once beat two threads for models of this size
    warnings.filterwarnings("ignore")
    # dynwatch imports both namespaces of Lightning, and they write to each other's loggers.
    for namespace in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(namespace).setLevel(logging.ERROR)
    try:
        save(train(kinds()[name], seed, out), out)
    except Exception as error:
        return f"{name}-{seed}: {type(error).__name__}: {error}"
    return ""


def table(runs: list[Recorded]) -> Table:
    columns = ("steps", "train first", "last", "val best", "last", "goal", "reached", "seconds")
    shown = Table("kind", "label", "seed", *columns, title="The zoo")
    known = kinds()
    for run in sorted(runs, key=lambda run: not run.healthy):
        goal = known[run.kind].goal
        label = "healthy" if run.healthy else "poor"
        losses = (run.train_first, run.train_last, run.best_validation, run.validations[-1][1])
        verdict = f"{run.metrics.get(goal.metric, float('nan')):.3g}"
        mark = "" if known[run.kind].as_labelled(run.metrics) else "  WRONG LABEL"
        shown.add_row(
            run.kind,
            label,
            str(run.seed),
            str(run.steps),
            *(f"{loss:.3g}" for loss in losses),
            str(goal),
            verdict + mark,
            f"{run.seconds:.1f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logs/zoo"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="kinds to run; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--fresh", action="store_true", help="run also what is recorded already")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    known, out = kinds(), arguments.out
    unknown = set(arguments.only or ()) - set(known)
    if unknown:
        parser.error(f"no kind is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    wanted = [(name, seed) for seed in arguments.seeds for name in arguments.only or known]
    missing = [run for run in wanted if arguments.fresh or not path_of(out, *run).exists()]

    failures = []
    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with Progress() as progress, ProcessPoolExecutor(arguments.workers, mp_context=spawn) as pool:
        task = progress.add_task(f"{len(missing)} runs", total=len(missing))
        for done in as_completed([pool.submit(work, name, seed, out) for name, seed in missing]):
            failures += [done.result()] if done.result() else []
            progress.advance(task)

    runs = [load_one(path_of(out, *run)) for run in wanted if path_of(out, *run).exists()]
    Console(width=None if sys.stdout.isatty() else 160).print(table(runs))
    print(f"{len(missing)} runs in {time.perf_counter() - start:.0f} s, recorded in {out}.")
    for run in runs:
        if not known[run.kind].as_labelled(run.metrics):
            missed = "is called healthy but misses" if run.healthy else "is called poor but reaches"
            failures.append(f"{run.kind}-{run.seed} {missed} its goal, {known[run.kind].goal}: {run.metrics}")
    if failures:
        sys.exit("\n".join(["", *failures]))


if __name__ == "__main__":
    main()
