"""The main job on real data: a healthy run and two poor ones, all under DynWatch.

Small CNNs learn handwritten digits (1797 images that scikit-learn ships). The first has a sensible
learning rate and finishes. The second has one that diverges: dynwatch ends it and says why. In the third
the optimizer was not given the convolutions: dynwatch warns. Then the rules are replayed over all three logs.

    python examples/digits.py [--logdir logs/digits]
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynwatch.callbacks import DynWatch, GradientNormMonitor
from dynwatch.rules import StopWhen, default_rules, replay

EPOCHS = 12


class DigitsCNN(pl.LightningModule):
    """Two convolutions and a linear head on 8 x 8 images."""

    def __init__(self, lr: float, forgetful: bool = False) -> None:
        super().__init__()
        self.lr = lr
        self.forgetful = forgetful  # train the head alone, as happens by mistake
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.LeakyReLU(0.1))
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2))
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = self.head if self.forgetful else self
        return torch.optim.SGD(trained.parameters(), lr=self.lr, momentum=0.9)


def loaders(seed: int = 0) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, val = order[:1500], order[1500:]
    shuffle = torch.Generator().manual_seed(seed)
    return (
        DataLoader(TensorDataset(x[train], y[train]), batch_size=50, shuffle=True, generator=shuffle),
        DataLoader(TensorDataset(x[val], y[val]), batch_size=300),
    )


def train(name: str, model: pl.LightningModule, logdir: Path) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=TensorBoardLogger(logdir, name=None, version=name, default_hp_metric=False),
        # DynWatch() is enough; these runs are so short that finer curves are nice to have.
        callbacks=[DynWatch(GradientNormMonitor(every_n_steps=5, update_ratio_every_n_steps=10))],
        gradient_clip_val=1.0,
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, *loaders())
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("logs/digits"))
    logdir = parser.parse_args().logdir
    torch.set_num_threads(2)
    # The loaders are a few hundred in-memory images; Lightning's advice on workers does not apply.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    print("\n== 1. A healthy run: SGD, learning rate 0.05 ==\n")
    pl.seed_everything(0, verbose=False)
    healthy = train("healthy", DigitsCNN(lr=0.05), logdir)
    print(f"\nValidation accuracy {healthy.callback_metrics['val_accuracy']:.3f} after {healthy.global_step} steps.")

    print("\n== 2. A poor run: the same, learning rate 3 ==\n")
    pl.seed_everything(0, verbose=False)
    poor = train("poor", DigitsCNN(lr=3.0), logdir)
    planned = EPOCHS * 30
    print(f"\nEnded after {poor.global_step} of {planned} steps.")

    print("\n== 3. A forgetful run: the optimizer was given the head alone ==\n")
    pl.seed_everything(0, verbose=False)
    train("forgetful", DigitsCNN(lr=0.05, forgetful=True), logdir)

    print("\n== 4. What the rules say of the three logs, without training ==\n")
    own = StopWhen("stop/loss > 5 for 3 readings", advice="A loss of digits above 5 is worse than guessing.")
    replay(logdir, [*default_rules(), own], planned_steps=planned).print()
    print(f"\nLogs of the runs: {logdir.resolve()}")


if __name__ == "__main__":
    main()
