"""What `DynWatch()` with everything on costs over a whole run: the GPT of 10.9 million parameters, curvature and all.

    python benchmarks/overhead.py [--steps 1000]

Curvature readings come as `max_overhead` (5 %) allows. The share is of the whole run: the time of all steps, with what
callbacks and logging add, over that of as many median steps on which nothing of dynwatch's was measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import pytorch_lightning as pl
import torch
from gpt import GPT, loader
from pytorch_lightning.loggers import TensorBoardLogger

from dynwatch.callbacks import DynWatch, HessianMonitor


class Clock(pl.Callback):
    """First of the callbacks: seconds from the start of one batch to that of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    torch.set_num_threads(2)
    torch.manual_seed(0)
    clock, watch = Clock(), DynWatch(report=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="auto",
            devices=1,
            logger=TensorBoardLogger(folder),
            callbacks=[clock, watch],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(GPT(), loader(steps))
    seconds = [after - before for before, after in zip(clock.starts, clock.starts[1:], strict=False)]
    # Norms are measured on each tenth step, update ratios on each fiftieth, and readings on logging steps. By blocks of
    # fifty, because a shared machine drifts.
    blocks = [seconds[i : i + 50] for i in range(0, len(seconds), 50)]
    bare = [statistics.median(s for i, s in enumerate(block) if (i + 1) % 10) for block in blocks]
    quiet = statistics.median(bare)
    (hessian,) = (monitor for monitor in watch.monitors if isinstance(monitor, HessianMonitor))
    due = sorted(seconds[49::50], reverse=True)
    print(f"a step {quiet:.3f} s; the longest: {', '.join(f'{s / quiet:.0f}' for s in due[:5])} steps")
    print(f"curvature readings: {hessian._readings} in {steps} steps")
    print(f"dynwatch/overhead, as it reports: {trainer.callback_metrics['dynwatch/overhead'].item():.1%}")
    expected = sum(each * len(block) for each, block in zip(bare, blocks, strict=True))
    print(f"over bare: {sum(seconds) / expected - 1:+.1%}")


if __name__ == "__main__":
    main()
