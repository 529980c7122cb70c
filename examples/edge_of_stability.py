"""The edge of stability on real digits: curvature rises until the learning rate is critical, and hovers there.

A small network learns 1000 handwritten digits by full-batch gradient descent and by Adam (no noise from batches). The
largest eigenvalue of the Hessian grows until it reaches 2/lr (Cohen et al., arXiv 2103.00065), and for Adam that of the
preconditioned Hessian until 38/lr (arXiv 2207.14484): in both runs the sharpness ratio comes to 1 and stays, while the
loss goes on falling. That is healthy; a ratio above 1 with a rising loss is not.

    python examples/edge_of_stability.py [--logdir logs/edge_of_stability]
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynwatch.callbacks import DynWatch, HessianMonitor

STEPS = 2000


class Digits(pl.LightningModule):
    """A tanh network that is trained on squared errors, by all the data at each step."""

    def __init__(self, optimizer: str, lr: float) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self.net(x) - nn.functional.one_hot(y, 10)).square().sum(1).mean() / 2
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.lr, eps=1e-7)
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def one_batch() -> DataLoader[tuple[Tensor, ...]]:
    digits = load_digits()
    x = torch.tensor(digits.data[:1000], dtype=torch.float32) / 16
    return DataLoader(TensorDataset(x, torch.tensor(digits.target[:1000])), batch_size=1000)


def train(optimizer: str, lr: float, logdir: Path) -> EventAccumulator:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=TensorBoardLogger(logdir, name=None, version=optimizer, default_hp_metric=False),
        # All of the batch, at a cadence of our own: this run is about curvature.
        callbacks=[DynWatch(hessian=HessianMonitor(every_n_steps=50, max_samples=None))],
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(optimizer, lr), one_batch())
    events = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0})
    return events.Reload()


def print_path(optimizer: str, lr: float, events: EventAccumulator) -> None:
    """λ, the threshold and the loss over the run."""
    tag, threshold = ("hessian/lambda_max", 2) if optimizer == "sgd" else ("hessian/preconditioned_lambda_max", 38)
    print(f"\n{optimizer}, lr={lr}: {tag} against {threshold}/lr = {threshold / lr:g}")
    print(f"{'step':>6} {'lambda':>10} {'ratio':>7} {'loss':>8}")
    ratio = {event.step: event.value for event in events.Scalars("hessian/sharpness_ratio")}
    loss = {event.step: event.value for event in events.Scalars("train_loss")}
    for event in events.Scalars(tag)[1::4]:
        bar = "#" * round(30 * min(ratio[event.step], 2))
        print(f"{event.step:6} {event.value:10.4g} {ratio[event.step]:7.2f} {loss[event.step]:8.4f}  {bar}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("logs/edge_of_stability"))
    logdir = parser.parse_args().logdir
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(does not have many workers|smaller than the logging interval|treespec).*")
    torch.set_num_threads(2)
    for optimizer, lr in (("sgd", 0.15), ("adam", 1e-3)):
        print_path(optimizer, lr, train(optimizer, lr, logdir))
    print(f"\nThe panels: tensorboard --logdir {logdir}")


if __name__ == "__main__":
    main()
