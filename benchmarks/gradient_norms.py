"""What watching gradient norms costs: the same GPT bare, with dynwatch, and with Lightning's own utility.

    python benchmarks/gradient_norms.py [--steps 50] [--rounds 5]

Every round trains each variant for the same steps, in turn, so that a machine whose speed drifts slows
all of them. A variant's figure is the median over rounds of its mean step time divided by the bare
one's of the same round.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from gpt import GPT, loader
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import grad_norm

from dynwatch.callbacks import DynWatch, EarlyTermination, GradientNormMonitor

WARM_UP = 5


class Clock(pl.Callback):
    """Times from the start of one batch to the start of the next, all callbacks and logging included."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def mean_step(self) -> float:
        # The mean, not the median: work that is due now and then must count.
        return (self.starts[-1] - self.starts[WARM_UP]) / (len(self.starts) - 1 - WARM_UP)


class LightningUtility(pl.Callback):
    """What Lightning's documentation recommends: its grad_norm, logged each step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class OnePass(pl.Callback):
    """The least that any norm costs: one fused pass over the gradients, nothing logged."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        torch._foreach_norm([p.grad for p in pl_module.parameters() if p.grad is not None])


VARIANTS: dict[str, Callable[[], list[pl.Callback]]] = {
    "bare": list,
    "one bare _foreach_norm pass": lambda: [OnePass()],
    "GradientNormMonitor(every_n_steps=1)": lambda: [GradientNormMonitor(every_n_steps=1)],
    "GradientNormMonitor()": lambda: [GradientNormMonitor()],
    "EarlyTermination()": lambda: [EarlyTermination()],
    "DynWatch()": lambda: [DynWatch(report=False)],
    "Lightning's grad_norm, each step": lambda: [LightningUtility()],
}


def seconds_per_step(callbacks: list[pl.Callback], steps: int) -> float:
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps + WARM_UP + 1,
            accelerator="auto",
            devices=1,
            logger=TensorBoardLogger(folder),
            log_every_n_steps=1,
            callbacks=[clock, *callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(GPT(), loader(steps + WARM_UP + 1))
    return clock.mean_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name, callbacks in VARIANTS.items():
            times[name].append(seconds_per_step(callbacks(), arguments.steps))
    parameters = sum(p.numel() for p in GPT().parameters())
    print(
        f"\n{parameters / 1e6:.1f} M parameters, {arguments.rounds} rounds of {arguments.steps} steps, "
        f"torch {torch.__version__}"
    )
    print(f"{'':40} {'ms a step':>10} {'over bare':>10}   (lowest … highest round)")
    for name, seconds in times.items():
        ratios = [s / bare - 1 for s, bare in zip(seconds, times["bare"], strict=True)]
        spread = "" if name == "bare" else f"   ({min(ratios):+.1%} … {max(ratios):+.1%})"
        print(f"{name:40} {1e3 * statistics.median(seconds):10.1f} {statistics.median(ratios):+10.1%}{spread}")


if __name__ == "__main__":
    main()
