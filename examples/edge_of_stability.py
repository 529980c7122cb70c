"""The edge of stability on real digits: curvature rises until the learning rate is critical, and hovers there.

A small network learns 500 handwritten digits by full-batch gradient descent and by Adam (no noise from batches). The
largest eigenvalue of the Hessian grows until it reaches 2/lr (Cohen et al., arXiv 2103.00065), and for Adam that of the
preconditioned Hessian until 38/lr (arXiv 2207.14484): in both runs the sharpness ratio comes to 1 and stays, while the
loss goes on falling. That is healthy; a ratio above 1 with a rising loss is not.

    python examples/edge_of_stability.py [--logdir logs/edge_of_stability] [--steps 1200]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynwatch.callbacks import DynWatch, HessianMonitor

SAMPLES = 500
READ_EVERY = 20
WIDTH = 40  # characters of a bar that stands for a ratio of 1
# Name, learning rate, the eigenvalue that decides, and what it is held at, times the rate.
RUNS = (
    ("sgd", 0.15, "hessian/lambda_max", 2),
    ("adam", 2e-3, "hessian/preconditioned_lambda_max", 38),
)


class Digits(pl.LightningModule):
    """A tanh network that is trained on squared errors, by all the data at each step."""

    def __init__(self, optimizer: str, lr: float) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self.net(x) - nn.functional.one_hot(y, 10)).square().sum(1).mean() / 2
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.lr, eps=1e-7)
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def one_batch(steps: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """The same batch at each step, in one epoch: beginning an epoch would cost more than the step."""
    digits = load_digits()
    x = torch.tensor(digits.data[:SAMPLES], dtype=torch.float32) / 16
    return DataLoader([(x, torch.tensor(digits.target[:SAMPLES]))] * steps, batch_size=None)  # type: ignore[arg-type]


def train(optimizer: str, lr: float, steps: int, logdir: Path) -> EventAccumulator:
    torch.manual_seed(0)
    # All of the batch, at a cadence of our own: this run is about curvature.
    monitor = HessianMonitor(every_n_steps=READ_EVERY, full_every_n_readings=4, max_samples=None)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(logdir, name=None, version=optimizer, default_hp_metric=False),
        callbacks=[DynWatch(hessian=monitor, report=False)],
        log_every_n_steps=READ_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(optimizer, lr), one_batch(steps))
    return EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0}).Reload()


def series(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step + 1: event.value for event in events.Scalars(tag)}


def print_path(optimizer: str, lr: float, tag: str, threshold: int, events: EventAccumulator) -> None:
    """The eigenvalue, its share of the threshold and the loss over the run."""
    eigenvalue, loss, ratio = (series(events, name) for name in (tag, "train_loss", "hessian/sharpness_ratio"))
    print(f"\n{optimizer}, learning rate {lr:g}: {tag} against {threshold}/lr = {threshold / lr:g}\n")
    print(f"{'step':>6}{'loss':>10}{'lambda':>10}{'ratio':>8}  0{'1':>{WIDTH}}")
    steps = sorted(ratio)
    for step in steps[:: max(len(steps) // 15, 1)]:
        filled = "#" * round(WIDTH * ratio[step])
        bar = filled.ljust(WIDTH)[:WIDTH] + "|" + filled[WIDTH + 1 :]
        print(f"{step:6}{loss[step]:10.4f}{eigenvalue[step]:10.4g}{ratio[step]:8.2f}  {bar}")
    late = steps[len(steps) * 3 // 4 :]
    ratios = [ratio[step] for step in late]
    print(
        f"\nIn the last quarter the ratio is {statistics.mean(ratios):.2f} on average, from {min(ratios):.2f} to "
        f"{max(ratios):.2f}; the loss went from {loss[late[0]]:.4f} to {loss[late[-1]]:.4f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("logs/edge_of_stability"))
    parser.add_argument("--steps", type=int, default=1200, help="of each run; the phenomenon needs about 700")
    asked = parser.parse_args()
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|smaller than the logging interval|treespec).*")
    torch.set_num_threads(1)  # a net this small gains nothing from more, and waits where cores are busy
    for optimizer, lr, tag, threshold in RUNS:
        print_path(optimizer, lr, tag, threshold, train(optimizer, lr, asked.steps, asked.logdir))
    print(f"\nThe panels: tensorboard --logdir {asked.logdir}")


if __name__ == "__main__":
    main()
